"""What this machine can do at most, and what a process takes of its memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qvsr.memory import keep_freed
from qvsr.provenance import ROOT
from qvsr.speed.timing import BenchError

SIZE, COPIED = 2048, 2**26  # of square matrices; float32 values that are copied: 268 MB each way, beyond caches
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peaks:
    """The best that was seen of matrix products (1e9 operations a second, two a multiply-accumulate) and of copying (1e9 bytes read and written)."""

    fp32_gops: float
    bf16_gops: float
    int8_gops: float
    copy_gb_s: float

    def seconds(self, bits: int, macs: float, branch_macs: float, moved: float) -> float:
        """The least time of a layer: its operations at the peak of their kind, or its bytes, whichever takes longer.

        Args:
            bits: 32, 16 (bfloat16) or fewer: integers.
            branch_macs: of the low-rank branch, in float32.

        >>> peaks = Peaks(fp32_gops=100, bf16_gops=200, int8_gops=400, copy_gb_s=10)
        >>> peaks.seconds(4, macs=200e9, branch_macs=50e9, moved=1e9), peaks.seconds(32, macs=1e9, branch_macs=0, moved=20e9)
        (2.0, 2.0)
        """
        peak = {32: self.fp32_gops, 16: self.bf16_gops}.get(bits, self.int8_gops)
        return max(2 * macs / peak + 2 * branch_macs / self.fp32_gops, moved / self.copy_gb_s) / 1e9

    @classmethod
    def measure(cls, seconds: float = 1.0, size: int = SIZE, copied: int = COPIED) -> Peaks:
        """Matrix products of PyTorch's own kernels and a copy, each for about so long."""
        a, b = torch.rand(size, size), torch.rand(size, size)
        a16, b16 = a.bfloat16(), b.bfloat16()
        q, w = torch.randint(0, 128, (size, size), dtype=torch.uint8), torch.randint(-128, 127, (size, size), dtype=torch.int8).t()
        source = torch.ones(copied)
        target = torch.empty_like(source)
        operations = 2 * size**3
        return cls(
            fp32_gops=operations / _best(lambda: a @ b, seconds) / 1e9,
            bf16_gops=operations / _best(lambda: a16 @ b16, seconds) / 1e9,
            int8_gops=operations / _best(lambda: torch._int_mm(q, w), seconds) / 1e9,
            copy_gb_s=2 * 4 * copied / _best(lambda: target.copy_(source), seconds) / 1e9,
        )


def _best(call: Callable[[], object], seconds: float) -> float:
    call()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """How many processes ran on average in the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


# ---------------------------------------------------------------- memory


class Memory:
    """Memory of this process, in MB of 1e6 bytes, above what it has now: torch and our modules loaded, inputs there, no network yet."""

    def __init__(self) -> None:
        self._before, self._watched = self._resident(), False

    def resident(self) -> float | None:
        """What the process holds now."""
        now = self._resident()
        return None if now is None or self._before is None else now - self._before

    def start(self) -> None:
        """Forget the most that was held so far."""
        give_back()
        self._watched = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._watched = True

    def peak(self) -> float | None:
        """The most that was held since :meth:`start`; None where the system does not tell."""
        most = _status("VmHWM")
        return most - self._before if self._watched and most is not None and self._before is not None else None

    @staticmethod
    def _resident() -> float | None:
        give_back()
        return _status("VmRSS")


def give_back() -> None:
    """Collect garbage and hand freed memory back to the system, so that what is counted is held."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> float | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Measured:
    """What a process of its own found of one variant.

    Attributes:
        seconds: of each call after the first.
    """

    seconds: tuple[float, ...]
    peak_mb: float | None
    resident_mb: float | None

    def __str__(self) -> str:
        memory = (
            f"peak {self.peak_mb:,.0f} MB, {self.resident_mb:,.0f} at rest"
            if self.peak_mb and self.resident_mb
            else "memory is not known here"
        )
        return f"{memory}{''.join(f', {one:.1f} s' for one in self.seconds)}"


def in_a_process(work: str, job: Mapping[str, Any], threads: int) -> Any:
    """Call ``function`` of ``module``, given as ``module:function``, with a job in a new process; returns its result, both plain values.

    Raises:
        BenchError: the process failed; with its last line.
    """
    with tempfile.TemporaryDirectory(prefix="qvsr-bench-") as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "qvsr.speed.machine", work, json.dumps(job), str(out)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        threading = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        done = subprocess.run(command, env={**os.environ, **threading, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)
        if done.returncode or not out.is_file():
            last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
            killed = ", killed: there was not enough memory, perhaps" if done.returncode == -9 else ""
            raise BenchError(
                f"the process of {work.partition(':')[2]} {job.get('variant', '')} ended with {done.returncode}{killed}: {last}"
            )
        return json.loads(out.read_text())


def _main(work: str, job: str, out: str) -> None:
    import importlib

    module, _, function = work.partition(":")
    given = json.loads(job)
    keep_freed()  # as in every stage
    torch.set_num_threads(given["threads"])
    torch.set_num_interop_threads(1)
    with torch.no_grad():
        result = getattr(importlib.import_module(module), function)(given)
    Path(out).write_text(json.dumps(result, default=asdict))


if __name__ == "__main__":
    _main(*sys.argv[1:])
