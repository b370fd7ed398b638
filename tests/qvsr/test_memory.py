"""Freed memory stays with the process, where the C library is asked for it and nobody asked otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from qvsr import memory
print(memory.keep_freed() if sys.argv[1] == "kept" else None)
sizes = [2**22] * 20
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): tensors = [torch.ones(size) for size in sizes]; del tensors
before = faults()
for _ in range(5): tensors = [torch.ones(size) for size in sizes]; del tensors
print(faults() - before)
"""


def run(how: str, **environment: str) -> list[str]:
    names = os.environ | environment
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, env=names)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has what is asked for")
def test_freed_memory_is_used_again_without_a_page_fault() -> None:
    """20 tensors of 16 MB, given back and taken again: 82,000 pages a round."""
    kept, plain = run("kept"), run("plain")
    assert kept[0] == "True" and int(kept[1]) * 10 < int(plain[1]), (kept, plain)


def test_what_the_user_has_set_stays() -> None:
    assert run("kept", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
