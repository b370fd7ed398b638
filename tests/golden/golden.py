"""Reads reference data: a ``.safetensors`` with a ``.json`` beside it, from the folder named by QVSR_GOLDEN_DIR."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = Path(__file__).parent / "data"
# Large sets that repeat with other sizes what the shipped ones show; beside the checkout and in QVSR_GOLDEN_DIR they must be there.
NOT_SHIPPED = {"unet_wide", "vae_two_clips", "pipeline", "eval_ewarp_paper", "eval_ewarp_strict"}


def folder() -> Path:
    """QVSR_GOLDEN_DIR, else ../shared/golden beside the checkout, else the subset shipped with the tests."""
    named = os.environ.get("QVSR_GOLDEN_DIR")
    if named:
        return Path(named)
    beside = ROOT.parent / "shared" / "golden"
    return beside if beside.is_dir() else SHIPPED


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a set; float8 tensors come as float32 (the cast is exact). A missing set fails the test."""
    if folder() == SHIPPED and name in NOT_SHIPPED:
        pytest.skip(f"reference data set {name} is too large to ship; name a folder that has it with QVSR_GOLDEN_DIR")
    meta_file, data_file = folder() / f"{name}.json", folder() / f"{name}.safetensors"
    for file in (meta_file, data_file):
        if not file.is_file():
            pytest.fail(f"reference data set {name} is not in {folder()}: {file.name} is missing")
    tensors = {
        key: value.float() if value.is_floating_point() and value.dtype.itemsize == 1 else value
        for key, value in load_file(data_file).items()
    }
    return json.loads(meta_file.read_text()), tensors


def load_json_gz(name: str) -> Any:
    """A gzipped JSON table, such as the key map of a checkpoint."""
    file = folder() / f"{name}.json.gz"
    if not file.is_file():
        pytest.fail(f"reference table {file.name} is not in {folder()}")
    return json.loads(gzip.decompress(file.read_bytes()))


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def matching(tensors: dict[str, Tensor], pattern: str) -> dict[tuple[str, ...], Tensor]:
    """The tensors whose whole name matches a pattern, by its groups; a set without any fails, for nothing would be compared."""
    found = {match.groups(): value for key, value in tensors.items() if (match := re.fullmatch(pattern, key))}
    assert found, f"the set has no tensor named like {pattern}"
    return found


def tolerance(meta: dict[str, Any]) -> float:
    """The absolute tolerance that a set states, else 1e-5."""
    return float(meta.get("tolerance", 1e-5))


def assert_close(actual: Tensor, expected: Tensor, meta: dict[str, Any], what: str, within: float | None = None) -> None:
    """Integers exactly, floating point to the set's tolerance; `within` is one that the set states in words."""
    allowed = tolerance(meta) if within is None else within
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(actual.to(expected.dtype), expected), f"{what}: integers differ"
        return
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    worst = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert worst <= allowed, f"{what}: differs by {worst:.3g}, tolerance {allowed:.3g}"


def settings_from(cls: Any, config: dict[str, Any], **more: Any) -> Any:
    """Settings of ours from a configuration of the reference: keys that we do not have concern its options we lack."""
    return cls(**{key: value for key, value in config.items() if key in cls.model_fields} | more)
