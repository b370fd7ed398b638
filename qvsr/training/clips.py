"""Training clips: photographs in simulated motion with their LQ versions, made once by all cores and kept as arrays."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from qvsr.config import TrainingSettings
from qvsr.data.degrade import degrade_clip, generator, recipe_digest
from qvsr.data.motion import Photograph, load_photograph, simulate_clip
from qvsr.provenance import atomic_path

FRAMES = 5
UPSCALE = 4
HELD_OUT_SHARE = 16  # every 16th photograph makes validation clips only
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class TrainingClips:
    """All clips as uint8 arrays; the last `held_out` come from photographs that no other clip shows.

    Args:
        photographs: folder of images.
        folder: where the arrays are kept; made on first use.
        device: CUDA holds the arrays in its memory, a CPU maps the files.
    """

    def __init__(self, photographs: Path, folder: Path, settings: TrainingSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        prepare(photographs, folder, settings)
        self.gt, self.lq = (_open(folder / f"clips.{kind}.npy", device) for kind in ("gt", "lq"))

    def __len__(self) -> int:
        return self.settings.clips + self.settings.held_out

    def frames(self, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Ground truth and bicubically upscaled LQ of some clips, each (N, T, 3, S, S) float32 in [-1, 1]."""
        index = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows), device=self.gt.device)
        gt, lq = (_to_float(array[index].to(self.device)) for array in (self.gt, self.lq))
        up = F.interpolate(lq.flatten(0, 1), scale_factor=UPSCALE, mode="bicubic", align_corners=False).clamp(-1, 1)
        return gt, up.unflatten(0, lq.shape[:2])

    def batch(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """:meth:`frames` of `count` random training clips, whole clips flipped, turned and reversed at random."""
        gt, up = self.frames(torch.randint(self.settings.clips, (count,), generator=rng, device=rng.device))
        dims = [
            dim for dim, chance in zip((1, -2, -1), torch.rand(3, generator=rng, device=rng.device).tolist(), strict=True) if chance < 0.5
        ]
        return gt.flip(dims), up.flip(dims)


def _files(photographs: Path) -> list[Path]:
    files = sorted(file for file in photographs.rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(files) < 2 * HELD_OUT_SHARE:
        raise ValueError(f"{photographs} holds {len(files)} photographs; at least {2 * HELD_OUT_SHARE} are needed to train on")
    return files


def identity(photographs: Path, settings: TrainingSettings) -> dict[str, int | str]:
    """What the clips are made from; others have another value.

    Raises:
        ValueError: too few photographs.
    """
    files = _files(photographs)
    return {
        "photographs": hashlib.sha256("".join(f"{file.name}:{file.stat().st_size};" for file in files).encode()).hexdigest(),
        "clips": settings.clips,
        "held_out": settings.held_out,
        "size": settings.size,
        "seed": settings.seed,
        "degradation": recipe_digest(settings.degradation),
    }


def prepare(photographs: Path, folder: Path, settings: TrainingSettings) -> None:
    """Write ``clips.gt.npy`` and ``clips.lq.npy``, unless they are there for these settings and photographs."""
    key, files = identity(photographs, settings), _files(photographs)
    stamp = folder / "clips.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == key:
        return
    folder.mkdir(parents=True, exist_ok=True)
    held = files[::HELD_OUT_SHARE]
    # Workers inherit the photographs by forking: none reads or copies them. OpenCV's thread pool does not survive a fork.
    cv2.setNumThreads(0)
    _photographs.update(train=[load_photograph(file) for file in files if file not in held], held=[load_photograph(file) for file in held])
    jobs = [(row, settings) for row in range(settings.clips + settings.held_out)]
    size = settings.size
    with atomic_path(folder / "clips.gt.npy") as gt_file, atomic_path(folder / "clips.lq.npy") as lq_file:
        # In memory first: pages of a mapped file, touched in the order in which clips come, are slow to write on some disks.
        gt = np.empty((len(jobs), FRAMES, size, size, 3), np.uint8)
        lq = np.empty((len(jobs), FRAMES, size // UPSCALE, size // UPSCALE, 3), np.uint8)
        with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
            for done, (row, gt_clip, lq_clip) in enumerate(pool.imap_unordered(_make, jobs, chunksize=32), start=1):
                gt[row], lq[row] = gt_clip, lq_clip
                if done % 1000 == 0 or done == len(jobs):
                    print(f"clips {done}/{len(jobs)}", flush=True)
        for file, array in ((gt_file, gt), (lq_file, lq)):
            with file.open("wb") as opened:
                np.save(opened, array)
    with atomic_path(stamp) as temporary:
        temporary.write_text(json.dumps(key, indent=2) + "\n")


_photographs: dict[str, list[Photograph]] = {}


def _make(job: tuple[int, TrainingSettings]) -> tuple[int, NDArray[np.uint8], NDArray[np.uint8]]:
    row, settings = job
    pool = _photographs["train" if row < settings.clips else "held"]
    rng = generator(settings.seed, f"clip/{row}")
    scene, other = rng.choice(len(pool), 2, replace=False)
    gt = simulate_clip(pool[scene], pool[other], FRAMES, settings.size, rng)
    return row, gt, degrade_clip(gt, settings.degradation, f"training/{row}")


def _open(file: Path, device: torch.device) -> Tensor:
    array = np.load(file, mmap_mode="r" if device.type == "cpu" else None)
    if device.type == "cpu":
        array = np.lib.format.open_memmap(file, "r+")  # torch wants a writable map; nothing writes to it
    return torch.from_numpy(array).to(device)


def _to_float(clip: Tensor) -> Tensor:
    """(N, T, H, W, 3) uint8 to (N, T, 3, H, W) float32 in [-1, 1]."""
    return clip.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
