"""scripts/gpu_check.sh as far as it goes without a GPU: the build, the message, the comparison of its layers, its table."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qvsr.config import UNetSettings
from qvsr.kernels import build, cuda
from qvsr.provenance import ROOT
from qvsr.quant import apply
from tests.qvsr.kernels.test_graphs import Gpu


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script itself is the test")
def test_without_a_gpu_it_builds_and_says_so(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in --version) echo 'release 13.0, V13.0.1';; --list-gpu-code) echo sm_75 sm_80 sm_90;;"
        ' *) while [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done;; esac\n'
    )
    nvcc.chmod(0o755)
    environment = os.environ | {"CUDACXX": str(nvcc), "XDG_CACHE_HOME": str(tmp_path), "PYTHON": sys.executable}
    command = ["sh", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.startswith("built in ")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: torch ") and last.endswith(": the kernels are built for 3 architectures, nothing was run")
    assert list((tmp_path / "qvsr" / "kernels").glob("*/libqvsr_kernels.so")) and not list((tmp_path / "out").iterdir())
    missing = subprocess.run(command[:2], capture_output=True, text=True)
    assert missing.returncode != 0 and "a folder for the results is needed: sh scripts/gpu_check.sh FOLDER" in missing.stderr


def test_it_needs_no_more_than_it_says(tmp_path: Path) -> None:
    """torch, numpy, safetensors and pytest (and what these need): nothing else of the lock is imported, by its tests neither."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Stop:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('pydantic', 'typer', 'yaml', 'pandas', 'scipy', 'cv2', 'PIL', 'platformdirs', 'rich', 'tqdm'):\n"
        "            raise ModuleNotFoundError(name)\nsys.meta_path.insert(0, Stop())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    code = "import sys; sys.path.insert(0, 'scripts'); import gpu_check, qvsr.quant.rotation; print(len(gpu_check.SHAPES))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        str(ROOT),
        "--import-mode",
        "importlib",
        "-k",
        "gpu",
        "--co",
    ]
    files = [str(ROOT / "tests/qvsr/kernels" / name) for name in ("test_cuda.py", "test_graphs.py")]
    listed = subprocess.run([*command, *files], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert listed.returncode == 0, listed.stdout[-2000:]
    assert "test_gpu_stream_and_device" in listed.stdout and "test_gpu_replays_are_the_calls" in listed.stdout
    assert subprocess.run([sys.executable, "-c", "import yaml"], env=environment, capture_output=True).returncode != 0  # the guard itself


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here to build the kernels for the CPU")
def test_layers_are_compared_before_they_are_timed(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = cuda.load(build.build_emulated(tmp_path, flags=["-O0"]))
    monkeypatch.setattr(cuda, "_library", lambda x: emulated)
    monkeypatch.setattr(cuda, "_chip", lambda x: cuda.Chip(90, 4, 232448))
    for shape in check.SMALL:
        for bits in check.CONFIGURATIONS:
            layer = check.Layer(shape, bits, "cpu")
            assert check.compared(layer, cuda) < check.CLOSE
            outputs = (*shape.positions, shape.outputs)
            bfloat16 = layer.bfloat16()()
            assert tuple(bfloat16.movedim(1, -1).shape if shape.how else bfloat16.shape) == outputs
            other = layer.int_mm()
            assert other is None if shape.how else tuple(other().shape) == (111, 40)
    layer.scale *= float("nan")
    with pytest.raises(ValueError, match=r"^Shape\(name='3 x 3', .*\), W4A4: the result differs by nan of the largest output$"):
        check.compared(layer, cuda)


def test_multiplications_of_the_shapes(check: ModuleType) -> None:
    """Against the U-Net's own list: 18.9 G of the first 3 x 3 convolution, 2.1 G of the first linear layer."""
    macs = {(shape.name, shape.channels, shape.outputs, shape.size): shape.macs for shape in check.SHAPES}
    assert macs["3 x 3", 320, 320, (5, 64, 64)] == 18_874_368_000 and macs["linear", 320, 320, (5, 4096)] == 2_097_152_000
    assert macs["3 x 3, stride 2", 320, 320, (5, 64, 64)] * 4 == 18_874_368_000
    assert macs["3 x 1 x 1 temporal", 1280, 1280, (1, 5, 8, 8)] == 5 * 64 * 3 * 1280**2


def test_the_table(check: ModuleType) -> None:
    times = {"W8A8": (9.0, 10.0, 11.0), "W4A4": (7.0, 8.0, 9.0), "inputs": (1.0, 2.0, 3.0), "bfloat16": (19.0, 20.0, 21.0)}
    row = {"name": "3 x 3", "size": (5, 8, 8), "channels": 16, "outputs": 24, "error": {"W8A8": 1e-7, "W4A4": 2e-7}, "microseconds": times}
    row["peak_mb"] = {"W8A8": 1.5, "W4A4": 1.25, "inputs": 0.5, "bfloat16": 2.0}
    linear = row | {"name": "linear", "microseconds": times | {"int_mm": (8.0, 9.0, 10.0)}}
    found = {"device": "GPU X", "date": "2000-01-01", "driver": "1.2", "torch": "2", "nvcc": "V13", "system": "Linux"}
    found |= {"checks": {"tests": "passed: 9 passed"}, "rows": [row, linear], "left_out": ["the last"]}
    found["step"] = {
        "bfloat16": {"microseconds": (39e3, 40e3, 41e3), "resident_mb": 1900.0, "packed_mb": 0, "peak_mb": 2900.0},
        "W4A4, graph": {"microseconds": (24e3, 25e3, 26e3), "resident_mb": 700.0, "packed_mb": 500.0, "peak_mb": 1200.4},
    }
    text = check.table(found)
    assert (
        "| 3 x 3 | 5 x 8 x 8 | 16 to 24 | 10.0 (9.0 to 11.0) | 8.0 (7.0 to 9.0) | 2.0 (1.0 to 3.0) |  | 20.0 (19.0 to 21.0) |  | 2.00 | 2.50 |"
        in text
    )
    assert "| 9.0 (8.0 to 10.0) | 20.0 (19.0 to 21.0) | 0.90 | 2.00 | 2.50 |" in text and "| 1.5 | 1.2 | 2.0 | 2.0e-07 |" in text
    assert "2000-01-01, driver 1.2, torch 2, nvcc V13, Linux." in text and "- tests: passed: 9 passed" in text
    assert "| bfloat16 | 40.0 (39.0 to 41.0) | 1.00 | 1900 | 0 | 2900 |" in text
    assert "| W4A4, graph | 25.0 (24.0 to 26.0) | 1.60 | 700 | 500 | 1200 |" in text
    assert text.endswith("Left out: the last.\n")
    assert "a step" not in check.table(found | {"step": {}})


SMALL = UNetSettings(
    model_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(1,),
    num_head_channels=16,
    context_dim=8,
    semb_channels=8,
)


def test_a_step_is_measured_in_all_variants(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the GPU: what is timed, not how long it takes."""
    stand_in = Gpu().parts | {name: lambda: 7e6 for name in ("memory_allocated", "max_memory_allocated")}
    stand_in |= {name: lambda: None for name in ("empty_cache", "reset_peak_memory_stats")}
    for name, part in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    timed: list[str] = []
    monkeypatch.setattr(check, "timed", lambda calls, count: {name: timed.append(name) or call().shape for name, call in calls.items()})
    found = check.measured_steps(SMALL, 8, "cpu")
    assert list(found) == timed == ["bfloat16", "W8A8", "W8A8, graph", "W4A4", "W4A4, graph"]
    assert all(one == {"resident_mb": 0, "peak_mb": 0, "packed_mb": 0, "microseconds": (5, 4, 8, 8)} for one in found.values())

    def fails() -> None:
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fails)
    with pytest.raises(ValueError, match=r"^a step, W8A8: it is not recorded: no graphs here$"):
        check.measured_steps(SMALL, 8, "cpu")


@torch.no_grad()
def test_the_networks_of_a_step(check: ModuleType) -> None:
    """On a CPU and small: bfloat16 from end to end in all variants, and each packed one computes about what bfloat16 does."""
    inputs, results = check.given(SMALL, 8, "cpu"), {}
    for bits in (None, 8, 4):
        net = check.network(SMALL, bits, "cpu")
        results[bits] = net(*inputs)
        assert results[bits].dtype == torch.bfloat16 and results[bits].shape == (5, 4, 8, 8)
        if bits:
            layers = apply.quant_layers(net)
            assert {layer.execution for layer in layers.values()} == {"packed"} and "time_embed.0" not in layers and len(layers) > 20
    errors = [float((results[bits] - results[None]).float().norm() / results[None].float().norm()) for bits in (8, 4)]
    assert errors[0] < 0.1 < errors[1] < 1, errors  # 0.05 and 0.6 where it was written


def test_a_program_that_is_slow_or_fails(check: ModuleType) -> None:
    assert check.ran([sys.executable, "-c", "print('== 3 passed ==')"], 60) == (True, "3 passed")
    assert check.ran([sys.executable, "-c", "raise SystemExit('no')"], 60) == (False, "no")
    assert check.ran([sys.executable, "-c", "import time; time.sleep(60)"], 1) == (False, "did not end within 1 s")


def test_the_whole_fits_into_eight_minutes(check: ModuleType) -> None:
    assert check.SECONDS + 20 <= 480 and build.ARCHITECTURES[0] == 75
