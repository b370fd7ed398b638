"""Seconds that one default segment takes at full precision, part by part: python benchmarks/segment.py [threads]

One segment is 5 frames of 128x128 pixels at the default number of steps. Medians of several rounds on this machine, in one run; idle
machines only. The share of a part says more than its seconds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvsr.config import load
from qvsr.models.checkpoints import load_backbone
from qvsr.models.flow import estimator
from qvsr.models.noise import KeyedNoise
from qvsr.models.pipeline import network_frames, restore, segment_motion

ROUNDS = 7
ROOT = Path(__file__).resolve().parent.parent


def seconds(work: Callable[[], object]) -> float:
    """Median time of a piece of work, after one round that is not counted."""
    work()
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


@torch.no_grad()
def main(threads: int) -> None:
    torch.set_num_threads(threads)
    config = load(ROOT / "config" / "default.yaml")
    files = {key: ROOT / getattr(config.backbone, key) for key in ("weights", "vae_weights")}
    backbone, sampling = load_backbone(config.backbone.model_copy(update=files)), config.sampling
    flow = estimator(sampling.flow, None)
    lq_TCHW = torch.rand(sampling.frames_per_segment, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    image = network_frames(lq_TCHW, sampling.upscale)
    z, features = backbone.first_stage.encode(image)
    t = torch.tensor([500])
    x = torch.cat([z.mean, z.mean], dim=1)
    parts = {
        "flow": (1, lambda: segment_motion(image, flow, backbone.settings.first_stage.factor)),
        "encoder": (1, lambda: backbone.first_stage.encode(image)),
        "structure encoder": (sampling.steps, lambda: backbone.structure(z.mean, t)),
        "U-Net": (sampling.steps, lambda: backbone.unet(x, t, backbone.context, struct)),
        "decoder": (1, lambda: backbone.vae.decode(z.mean, features)),
    }
    struct = backbone.structure(z.mean, t)
    whole = seconds(lambda: restore(backbone, lq_TCHW, sampling, KeyedNoise(0, "clip"), flow))
    print(f"whole segment, {threads} threads: {whole:.2f} s")
    for name, (calls, work) in parts.items():
        spent = calls * seconds(work)
        print(f"  {name:17s} {calls:2d} x {spent / calls:.3f} s  {spent / whole:4.0%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
