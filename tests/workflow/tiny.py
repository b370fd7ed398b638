"""A project of its own in a temporary folder: the real code and workflow, two clips of 64x64, a backbone with random weights."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qvsr import config as settings
from qvsr.provenance import ROOT

COPIED = ("Snakefile", "profiles", "workflow", "config", "qvsr", "baselines", "metrics", "environment.yml")
BACKBONE: dict[str, Any] = {
    "name": "tiny",
    "weights": "weights/tiny.safetensors",
    "vae_weights": "weights/tiny-vae.safetensors",
    "unet": {
        "in_channels": 8,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 1],
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "num_head_channels": 16,
        "context_dim": 16,
        "semb_channels": 32,
        "spade_channels": 8,
    },
    "structure": {
        "in_channels": 4,
        "model_channels": 32,
        "out_channels": 32,
        "channel_mult": [1, 1],
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "num_heads": 2,
    },
    "first_stage": {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 4, "embed_dim": 4},
    "vae": {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 4, "embed_dim": 4},
    "scale_factor": 1.0,
    "share_encoder": True,
    "concat_lq": True,
    "context_tokens": 3,
    "schedule": {"parameterization": "v"},
}
CONFIG: dict[str, Any] = {
    "output": "results",
    "backbone": BACKBONE,
    "sampling": {"steps": 3, "flow": "dis", "tile": 16, "tile_overlap": 8},
    "datasets": {
        "clips": {"kind": "folder", "path": "videos/clips", "frames": 3},
        "calibration": {"kind": "folder", "path": "videos/calibration", "frames": 3},
    },
    "evaluate": ["clips"],
    "calibration": {"dataset": "calibration", "steps": 2, "samples": 4},
    "method": {"quantvsr": {"rank_min": 2, "rank_max": 4, "rank_multiple": 2, "refine_updates": 4, "lba_updates": 4}},
    "variants": {"rotation": {"method": "quantvsr", "settings": {"branch": False, "refine": False, "lba": False}}},
    "methods": ["maxmin", "rotation", "quantvsr"],
    "ablation": {"Branch and training": ["quantvsr", "rotation"]},
    "bits": ["W4A4"],
}


def make(folder: Path) -> Path:
    """A project that is ready to run."""
    folder.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    write_frames(folder / "videos" / "clips" / "walk", seed=1)
    write_frames(folder / "videos" / "calibration" / "run", seed=2)
    write_weights(folder, BACKBONE)
    write_config(folder / "config" / "tiny.yaml", CONFIG)
    return folder


def write_config(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(values))


def write_frames(folder: Path, seed: int, frames: int = 3, size: int = 64) -> None:
    """A smooth random picture that moves by two pixels a frame."""
    import cv2

    folder.mkdir(parents=True)
    noise = np.random.default_rng(seed).uniform(0, 255, (12, 12, 3)).astype(np.float32)
    picture = cv2.resize(noise, (size + 2 * frames, size), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    for frame in range(frames):
        cv2.imwrite(str(folder / f"{frame:08d}.png"), picture[:, 2 * frame : 2 * frame + size])


def write_weights(folder: Path, backbone: dict[str, Any], seed: int = 0) -> None:
    """Random weights for a backbone, in the files that its settings name below `folder`."""
    import torch

    from qvsr.models.checkpoints import build, save_backbone

    chosen = settings.BackboneSettings.model_validate(backbone)
    torch.manual_seed(seed)
    network = build(chosen)
    # initial values hold zeros where training starts (last convolutions): small random ones, so that every layer matters
    for module in (network.unet, network.structure, network.vae):
        for parameter in module.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    save_backbone(network, folder / str(chosen.weights), folder / str(chosen.vae_weights))


def environment() -> dict[str, str]:
    """Without PYTHONPATH, so that the project's own copy of the code runs, not the one under test here."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SNAKEMAKE_PROFILE")}
    return {**inherited, "XDG_CACHE_HOME": inherited.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))}


def make_smoke(folder: Path) -> Path:
    """A project that is ready for ``config/smoke.yaml``: the trained weights and real clips."""
    make(folder)
    for file in (ROOT / "weights").glob("*.safetensors"):
        shutil.copy(file, folder / "weights")
    return folder


def snakemake_command(*arguments: str, config: str = "tiny") -> list[str]:
    return [sys.executable, "-m", "snakemake", "--configfile", f"config/{config}.yaml", "--cores", "2", *arguments]


def snakemake(project: Path, *arguments: str, config: str = "tiny") -> subprocess.CompletedProcess[str]:
    return subprocess.run(snakemake_command(*arguments, config=config), cwd=project, env=environment(), capture_output=True, text=True)


def stage(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m qvsr …`` in the project."""
    command = [sys.executable, "-m", "qvsr", *arguments]
    return subprocess.run(command, cwd=project, env={**environment(), **variables}, capture_output=True, text=True)


def due(project: Path, *arguments: str) -> set[str]:
    """Rules that a dry run would run."""
    done = snakemake(project, "--dry-run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^(?:(?:local)?rule|checkpoint) (\w+):$", done.stdout + done.stderr, flags=re.MULTILINE)) - {"all"}


def done(results: Path) -> int:
    """How many jobs' outputs are there."""
    patterns = ("clips/*/LQ/*", "calibration", "quantized/*", "restored/*/*/*", "measured/*/*", "tables", "figures")
    found = [path for pattern in patterns for path in results.glob(pattern)]
    return sum(not path.name.startswith(".") for path in found)


MEASURED = 2  # last columns of the fairness card: seconds and memory of a job


def outputs(project: Path, root: str = "results") -> dict[str, bytes]:
    """Every file that a run promises, by path; logs and Snakemake's own time stamps apart.

    How long quantizing took and how much memory it needed differ from run to run: the files of the benchmarks are left out, and so are their
    two columns of the fairness card, which are all that they go into.
    """
    results = project / root
    return {
        str(file.relative_to(results)): without_measured(file)
        for file in sorted(results.rglob("*"))
        if file.is_file() and not {"logs", "benchmarks"} & set(file.parts) and file.name != ".snakemake_timestamp"
    }


def without_measured(file: Path) -> bytes:
    """A file's bytes; of the fairness card's table the cells before the measured ones, without the spaces that their widths decide."""
    if file.stem != "fairness":
        return file.read_bytes()
    between, end = {".csv": (",", ""), ".md": ("|", "|"), ".tex": (" & ", r" \\")}[file.suffix]
    lines = []
    for line in file.read_text().splitlines():
        cells = line.removesuffix(end).split(between)
        table = len(cells) > MEASURED + 1 and line.endswith(end)
        lines.append(between.join(cell.strip() for cell in cells[:-MEASURED]) if table else line)
    return "\n".join(lines).encode()
