"""What the tests of processes call in one."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import torch

from qvsr.speed.machine import Measured, Memory

MB = 1_000_000


def hold(job: dict[str, Any]) -> dict[str, Any]:
    """Holds `kept` MB, `before` MB more until the peak is watched, and `more` MB for a while after that."""
    memory = Memory()
    kept = torch.ones(job["kept"] * MB // 4)
    before = torch.ones(job["before"] * MB // 4)
    del before
    at_rest = memory.resident()
    memory.start()
    more = torch.ones(job["more"] * MB // 4)
    del more
    return {**asdict(Measured((0.5,), memory.peak(), at_rest)), "threads": torch.get_num_threads(), "kept": float(kept[0])}


def fail(job: dict[str, Any]) -> None:
    raise ValueError(f"no {job['variant']} here")


def end(job: dict[str, Any]) -> None:
    sys.exit(7)
