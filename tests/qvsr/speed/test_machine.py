"""Peaks, memory of a process, and processes that fail."""

from __future__ import annotations

import sys

import pytest

from qvsr.speed.machine import Measured, Peaks, in_a_process
from qvsr.speed.timing import BenchError


def test_peaks_are_measured() -> None:
    peaks = Peaks.measure(0.05, 256, 2**20)
    assert all(value > 0.1 for value in vars(peaks).values())  # 1e8 operations or bytes a second: any machine has that


def test_the_longer_of_operations_and_bytes_counts() -> None:
    peaks = Peaks(fp32_gops=100, bf16_gops=500, int8_gops=1000, copy_gb_s=20)
    for bits, least in ((32, 2 * 50 / 100), (16, 2 * 50 / 500), (8, 2 * 50 / 1000), (4, 2 * 50 / 1000)):
        assert peaks.seconds(bits, 50e9, 0, 1e9) == pytest.approx(least)  # 1 GB takes 0.05 s
        assert peaks.seconds(bits, 50e9, 5e9, 1e9) == pytest.approx(least + 0.1)  # the branch is float32
        assert peaks.seconds(bits, 50e9, 0, 40e9) == pytest.approx(2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc, which only Linux has")
def test_memory_is_what_is_held_above_the_start() -> None:
    """80 MB stay, 300 MB come and go before the peak is watched, 120 MB while it is; a few MB are the process's own."""
    found = in_a_process("tests.qvsr.speed.work:hold", {"kept": 80, "before": 300, "more": 120, "threads": 1}, 1)
    assert (found["threads"], found["seconds"], found["kept"]) == (1, [0.5], 1.0)
    assert found["resident_mb"] == pytest.approx(80, abs=20)
    assert found["peak_mb"] == pytest.approx(200, abs=20)


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(BenchError, match=r"^the process of fail W4A4 ended with 1: ValueError: no W4A4 here$"):
        in_a_process("tests.qvsr.speed.work:fail", {"variant": "W4A4", "threads": 1}, 1)
    with pytest.raises(BenchError, match=r"^the process of end W4A4 ended with 7: without a word$"):
        in_a_process("tests.qvsr.speed.work:end", {"variant": "W4A4", "threads": 1}, 1)


def test_what_the_log_says_of_a_process() -> None:
    assert str(Measured((1.234, 2.0), 5120.4, 700.0)) == "peak 5,120 MB, 700 at rest, 1.2 s, 2.0 s"
    assert str(Measured((1.0,), None, None)) == "memory is not known here, 1.0 s"
