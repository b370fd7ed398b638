"""The CUDA kernels built for a CPU, once a process of tests."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from qvsr.kernels import build, cuda


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All of csrc/*.cu as functions of this CPU, with the types of their headers."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here to build the kernels for the CPU")
    library = cuda.load(build.build_emulated(tmp_path_factory.mktemp("emulated")))
    library.qvsr_emulate_error.restype = ctypes.c_char_p
    return library


@pytest.fixture
def on_cpu(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """qvsr.kernels.cuda with tensors of this CPU, as on a chip of compute capability 8.0."""
    monkeypatch.setattr(cuda, "_library", lambda x: emulated)
    monkeypatch.setattr(cuda, "_chip", lambda x: cuda.Chip(80, 4, 166912))
    return emulated


@pytest.fixture(scope="session")
def sanitizer() -> dict[str, str]:
    """Variables with which a process loads the address sanitizer first, as it must."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here to build the kernels for the CPU")
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("g++ here comes without the address sanitizer")
    return {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"}
