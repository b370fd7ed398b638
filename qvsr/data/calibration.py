"""Calibration samples: calls of the full-precision U-Net, recorded while it restores clips.

A set is a folder: a ``.safetensors`` a sample (the U-Net's input `x`, the LQ latent `lq_latent`, the output `out`, the timestep `t`), the text
context once in ``context.safetensors``, and ``manifest.json``, written last, with the settings and the digest of every file. Structure maps are not
stored (28 MB a sample at full size): the frozen structure encoder computes them again from the LQ latent and the timestep.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qvsr.config import CalibrationSettings, SamplingSettings
from qvsr.provenance import atomic_path

if TYPE_CHECKING:
    from qvsr.models.checkpoints import Backbone
    from qvsr.models.flow import FlowFunction
    from qvsr.models.sampler import NetworkCall

MANIFEST, CONTEXT, PLAN = "manifest.json", "context.safetensors", "plan.json"
FORMAT = 1
STRUCT_CACHE_BYTES = 256 * 2**20


class CalibrationError(ValueError):
    """A calibration set that is missing, damaged, incomplete, or of another backbone."""


@dataclass(frozen=True)
class Sample:
    """One call of the full-precision U-Net.

    Attributes:
        x: (T, in_channels, h, w), the U-Net's input.
        t: (1,), the timestep.
        context: (1, tokens, D).
        struct: structure maps by width; empty if the set was opened without a structure encoder.
        out: (T, C, h, w), what the full-precision U-Net returned.
        lq_latent: (T, C, h, w).
        clip: name of the clip.
        step: index in the respaced schedule.
    """

    x: Tensor
    t: Tensor
    context: Tensor
    struct: dict[str, Tensor]
    out: Tensor
    lq_latent: Tensor
    clip: str
    step: int


class CalibrationSet:
    """The samples of a folder, in the order of its manifest.

    Args:
        folder: written by :func:`record`.
        structure: the backbone's structure encoder; its maps are kept in memory up to 256 MiB.
        backbone_digest: refuse a set that was recorded with other weights; None does not ask.
        device: where the tensors of a sample are put; that of `structure`.
    Raises:
        CalibrationError: the set is missing, incomplete, or of other weights.
    """

    def __init__(
        self,
        folder: str | Path,
        structure: nn.Module | None = None,
        backbone_digest: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self.structure, self.device = Path(folder), structure, device
        self.manifest = _read_json(self.folder / MANIFEST, "finish it with the calibrate stage")
        if self.manifest.get("format") != FORMAT:
            raise CalibrationError(f"{folder} has format {self.manifest.get('format')}, this program reads {FORMAT}: record it again")
        if backbone_digest is not None and self.manifest["backbone_digest"] != backbone_digest:
            found = f"{self.manifest['backbone']} {self.manifest['backbone_digest']}"
            raise CalibrationError(
                f"{folder} was recorded with other weights ({found}, these are {backbone_digest}): record it again in an empty folder"
            )
        missing = [file for file in (CONTEXT, *self.manifest["files"]) if not (self.folder / file).is_file()]
        if missing:
            raise CalibrationError(f"{folder}: {len(missing)} files of its manifest are missing, first {missing[0]}: record it again")
        self.names: list[str] = sorted(self.manifest["files"])
        self.context = load_file(self.folder / CONTEXT)["context"].to(device)
        self._struct: dict[int, dict[str, Tensor]] = {}
        self._struct_bytes = 0

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the digests of all files; first 16 hexadecimal digits."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        file = self.folder / self.names[index]
        if hashlib.sha256(file.read_bytes()).hexdigest() != self.manifest["files"][file.name]:
            raise CalibrationError(f"{file} is damaged (its content is not what was written): record the set again")
        tensors, facts = _read_sample(file)
        tensors = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        struct = self._maps(index, tensors["lq_latent"], tensors["t"])
        return Sample(
            tensors["x"], tensors["t"], self.context, struct, tensors["out"], tensors["lq_latent"], facts["clip"], int(facts["step"])
        )

    @torch.no_grad()
    def _maps(self, index: int, lq_latent: Tensor, t: Tensor) -> dict[str, Tensor]:
        if self.structure is None:
            return {}
        if index not in self._struct:
            maps: dict[str, Tensor] = self.structure(lq_latent, t)
            size = sum(value.numel() * value.element_size() for value in maps.values())
            if self._struct_bytes + size > STRUCT_CACHE_BYTES:
                return maps
            self._struct[index] = maps
            self._struct_bytes += size
        return self._struct[index]


def kept_steps(steps: int, kept: int) -> list[int]:
    """Which of the sampling steps are recorded: indices of the respaced schedule, evenly spaced from 0.

    >>> kept_steps(10, 5), kept_steps(50, 10)[-2:]
    ([0, 2, 4, 6, 8], [40, 45])
    """
    if not 1 <= kept <= steps:
        raise CalibrationError(f"calibration.steps is {kept}, but sampling.steps is {steps}: record between 1 and {steps}")
    return [index for index in range(steps) if index * kept // steps != (index - 1) * kept // steps]


def quotas(samples: int, clips: int) -> list[int]:
    """How many samples each clip gives at most, as even as possible.

    >>> quotas(10, 3)
    [3, 3, 4]
    """
    return [samples * (index + 1) // clips - samples * index // clips for index in range(clips)]


def record(
    backbone: Backbone,
    clips: Iterable[tuple[str, Tensor]],
    sampling: SamplingSettings,
    settings: CalibrationSettings,
    folder: str | Path,
    seed: int,
    flow: FlowFunction | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Restore clips at full precision and keep some of the U-Net's calls; continues where it was stopped.

    Of the sampling steps, `settings.steps` evenly spaced ones are recorded; of the calls of a clip as many as its share of `settings.samples`,
    chosen by hashes of their names and the seed. A clip whose samples are all there is not restored again.

    Args:
        clips: names and LQ frames ``(T, 3, H, W)`` in [0, 1].
        folder: is created; may hold an unfinished recording with the same settings.
        seed: of the noise, keyed by clip, and of the choice.
        flow: for motion guidance; None leaves it out.
        progress: called with (clips done, clips in all).
    Returns:
        the finished set, opened with the backbone's structure encoder.
    Raises:
        CalibrationError: no clips, or the folder holds a recording with other settings.
    """
    from qvsr.models.noise import KeyedNoise
    from qvsr.models.pipeline import restore

    folder, clips = Path(folder), list(clips)
    if not clips:
        raise CalibrationError(f"{folder}: no clips to record from; calibration.dataset is empty")
    check_names([name for name, _ in clips])
    steps = set(kept_steps(sampling.steps, settings.steps))
    plan = {
        "format": FORMAT,
        "backbone": backbone.settings.name,
        "backbone_digest": backbone.digest,
        "sampling": sampling.model_dump(mode="json"),
        "calibration": settings.model_dump(mode="json"),
        "seed": seed,
        "clips": {name: _frames_digest(frames) for name, frames in clips},
    }
    _claim(folder, plan)
    with atomic_path(folder / CONTEXT) as temporary:
        save_file({"context": backbone.context.detach().cpu().contiguous()}, temporary)
    for done, ((name, lq_TCHW), quota) in enumerate(zip(clips, quotas(settings.samples, len(clips)), strict=True)):
        marker = folder / f"{_plain(name)}.done.json"
        if quota and not _complete(folder, marker):
            written: list[str] = []

            def keep(seen: NetworkCall, name: str = name, written: list[str] = written) -> None:
                if seen.step in steps:
                    file = f"{_plain(name)}-s{seen.segment:03d}-p{seen.patch:02d}-t{seen.tile:02d}-i{seen.step:03d}.safetensors"
                    _write_sample(folder / file, seen, name)
                    written.append(file)

            restore(backbone, lq_TCHW, sampling, KeyedNoise(seed, name), flow, observe=keep, clip=name)
            chosen = sorted(sorted(written, key=lambda file: hashlib.sha256(f"{seed}/{file}".encode()).hexdigest())[:quota])
            for file in set(written) - set(chosen):
                (folder / file).unlink()
            _write_json(marker, {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in chosen})
        if progress is not None:
            progress(done + 1, len(clips))
    files: dict[str, str] = {}
    for name, _ in clips:
        marker = folder / f"{_plain(name)}.done.json"
        files |= json.loads(marker.read_text()) if marker.is_file() else {}
    _write_json(folder / MANIFEST, {**plan, "files": dict(sorted(files.items()))})
    return CalibrationSet(folder, backbone.structure, backbone.digest, backbone.context.device)


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder ours, or see that it is: what lies in it was recorded with the same settings."""
    file = folder / PLAN
    if file.is_file():
        old = _read_json(file, "empty the folder and record again")
        changed = sorted(key for key in plan.keys() | old.keys() if plan.get(key) != old.get(key))
        if changed:
            raise CalibrationError(
                f"{folder} holds samples recorded with another {', '.join(changed)}: empty it, or record to another folder"
            )
        return
    strangers = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"] if folder.is_dir() else []
    if strangers:
        raise CalibrationError(
            f"{folder} holds {len(strangers)} samples and no {PLAN} that tells their settings: empty it, or record to another folder"
        )
    _write_json(file, plan)


def _complete(folder: Path, marker: Path) -> bool:
    """Whether a clip's samples are all there and whole."""
    if not marker.is_file():
        return False
    files: dict[str, str] = json.loads(marker.read_text())
    return all(
        (folder / file).is_file() and hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest for file, digest in files.items()
    )


def _write_sample(file: Path, seen: NetworkCall, clip: str) -> None:
    tensors = {"x": seen.x, "lq_latent": seen.lq_latent, "out": seen.output, "t": torch.tensor([seen.timestep])}
    facts = json.dumps({"clip": clip, "segment": seen.segment, "patch": seen.patch, "tile": seen.tile, "step": seen.step}, sort_keys=True)
    with atomic_path(file) as temporary:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary, {"sample": facts})


def _read_sample(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:  # type: ignore[no-untyped-call]
            return {key: opened.get_tensor(key) for key in opened.keys()}, json.loads(opened.metadata()["sample"])  # noqa: SIM118
    except SafetensorError as error:
        raise CalibrationError(f"{file} is damaged or no safetensors file ({error}): record the set again") from None


def _read_json(file: Path, remedy: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        raise CalibrationError(f"{file.parent} has no {file.name}: {remedy}") from None
    except ValueError as error:
        raise CalibrationError(f"{file} is damaged ({error}): {remedy}") from None
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _frames_digest(frames: Tensor) -> str:
    return hashlib.sha256(str(tuple(frames.shape)).encode() + frames.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _plain(name: str) -> str:
    """A clip's name as a file name."""
    return name.replace("/", "_")


def check_names(names: Sequence[str]) -> None:
    """Refuse clips whose names give one file name."""
    plain = [_plain(name) for name in names]
    doubled = sorted({name for name in plain if plain.count(name) > 1})
    if doubled:
        raise CalibrationError(f"two calibration clips give the file name {doubled[0]}: rename one")
