"""Trains the small MGLD-VSR: autoencoder, then U-Net with structure encoder, then the feature-fusing video decoder.

Every stage resumes from its own state after a kill. Why the recipe is what it is stands in docs/mini.md.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from qvsr.config import BackboneSettings, TrainingSettings
from qvsr.models.checkpoints import Backbone, save_backbone
from qvsr.provenance import atomic_path, code_digest
from qvsr.training.clips import TrainingClips, identity
from qvsr.training.loop import OutOfTime
from qvsr.training.stages import Networks, Stages, psnr

CODE = ("qvsr/training/*.py", "qvsr/models/**/*.py", "qvsr/data/degrade.py", "qvsr/data/motion.py")
STAGES = ("autoencoder", "diffusion", "decoder")


def train(backbone: BackboneSettings, settings: TrainingSettings, photographs: Path, folder: Path, seconds: float | None = None) -> bool:
    """Run the stages that are not done yet, then evaluate and write the two weight files that `backbone` names.

    Args:
        photographs: folder of images to train on.
        folder: prepared clips, states and curves; the same folder resumes.
        seconds: stop after about this time with everything saved; None trains to the end.
    Returns:
        True when the weights are written, False when time ran out before.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    wanted = settings.device if settings.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    torch.manual_seed(settings.seed)
    nets = Networks(backbone).to(device)
    for module in nets.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    claim(folder, backbone, settings, identity(photographs, settings))
    clips = TrainingClips(photographs, folder, settings, device)
    stages = Stages(backbone, settings, nets, clips, folder, deadline)
    for name in STAGES:
        done = folder / f"{name}.safetensors"
        if not done.is_file():
            print(f"training {name} on {device}", flush=True)
            try:
                getattr(stages, name)()
            except OutOfTime as stop:
                print(stop, flush=True)
                return False
            with atomic_path(done) as temporary:
                save_file({key: value.contiguous().cpu() for key, value in nets.state_dict().items()}, temporary)
        nets.load_state_dict(load_file(done))
    evaluate(stages, folder / "evaluation.json")
    nets = nets.cpu()
    finished = Backbone(backbone, nets.unet, nets.structure, nets.vae, nets.vae, nets.context.detach(), "")
    if backbone.weights is None or backbone.vae_weights is None:
        raise ValueError("backbone.weights and backbone.vae_weights must name the files to write")
    save_backbone(finished, backbone.weights, backbone.vae_weights)
    return True


def claim(folder: Path, backbone: BackboneSettings, settings: TrainingSettings, clips: dict[str, int | str]) -> None:
    """Bind a folder of states to what it was begun with: a finished stage is not trained again, so other settings or code would do nothing.

    Args:
        clips: what the clips are made from.
    Raises:
        ValueError: the folder holds the states of another training.
    """
    begun = {
        "backbone": backbone.model_dump(mode="json", exclude={"name", "weights", "vae_weights", "flow_weights"}),
        "training": settings.model_dump(mode="json", exclude={"photographs", "device"}),
        "clips": clips,
        "code": {"digest": code_digest(*CODE)},
    }
    stamp = folder / "settings.json"
    if stamp.is_file():
        before = json.loads(stamp.read_text())
        other = [f"{part}.{key}" for part in begun for key in begun[part] if before[part].get(key) != begun[part][key]]
        if other:
            raise ValueError(f"{folder} holds a training with another {other[0]}; remove the folder, or give another output or --state")
    with atomic_path(stamp) as temporary:
        temporary.write_text(json.dumps(begun, indent=2) + "\n")


@torch.no_grad()
def evaluate(stages: Stages, file: Path) -> dict[str, object]:
    """Errors on clips of held-out photographs: one step at every noise level beside copying the LQ latent, sampling, PSNR.

    Writes and returns ``levels`` (a list of ``t, error, lq_error``: mean squared errors of the latent), ``sampled_error``, and
    the PSNR in dB of restored clips, of bicubic upscaling and of the autoencoder alone.
    """
    stages.nets.eval()
    rows = range(stages.settings.clips, len(stages.clips))
    gt, up = stages.clips.frames(rows)
    hq, lq = (torch.cat([stages.encode(part).float() for part in x.split(8)]) for x in (gt, up))
    rng = stages.generator(2)
    copied = F.mse_loss(lq, hq).item()
    levels = []
    for t in range(49, len(stages.signal), 50):
        times = torch.full((len(hq),), t, device=stages.device)
        a, s = stages.levels(times)
        x_t = a * hq + s * torch.randn(hq.shape, generator=rng, device=stages.device)
        levels.append({"t": t, "error": F.mse_loss(stages.denoised(x_t, lq, times), hq).item(), "lq_error": copied})
    sampled = stages.sample(lq, rng)

    def quality(z: torch.Tensor) -> float:
        parts = zip(z.split(8), up.split(8), gt.split(8), strict=True)
        return sum(psnr(stages.decode(a, b).clamp(-1, 1), c).item() * len(c) for a, b, c in parts) / len(gt)

    report: dict[str, object] = {
        "sampled_error": F.mse_loss(sampled, hq).item(),
        "restored_psnr": quality(sampled),
        "bicubic_psnr": sum(psnr(a, b).item() for a, b in zip(up.split(8), gt.split(8), strict=True)) / len(gt.split(8)),
        "autoencoder_psnr": quality(hq),
        "levels": levels,
    }
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "levels"}), flush=True)
    return report
