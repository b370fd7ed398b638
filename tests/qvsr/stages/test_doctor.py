"""What the doctor says of this machine, and what it answers where something is required."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from qvsr.provenance import ROOT
from qvsr.quant import layer
from qvsr.stages import doctor as stage
from qvsr.stages.doctor import DoctorError

KINDS = ["Linear", "Conv1d", "Conv2d", "Conv3d"]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Integer kernels that are there, or say why not."""

    def answering(reason: str | None, described: str = "by fingers") -> None:
        monkeypatch.setitem(sys.modules, "qvsr.kernels.native", types.SimpleNamespace(described=lambda: described))
        monkeypatch.setattr(layer, "EXECUTIONS", ("simulated", "packed"))
        monkeypatch.setitem(sys.modules, "qvsr.kernels.cpu", types.SimpleNamespace(missing=lambda: reason))

    return answering


def test_paths_follow_the_kernels(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    for reason, execution, expected in ((None, "packed", "by fingers"), ("this CPU has no VNNI", "reference", "this CPU has no VNNI")):
        kernels(reason)
        paths = stage.layer_paths()
        assert [path.kind for path in paths] == KINDS and {path.execution for path in paths} == {execution}
        assert {path.reason for path in paths} == {expected}
    monkeypatch.setattr(layer, "EXECUTIONS", ("simulated",))
    assert {(path.execution, path.reason) for path in stage.layer_paths()} == {("simulated", "this version has no packed execution")}


def test_paths_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(missing: str | None, available: bool) -> set[tuple[str, str]]:
        kernels = types.SimpleNamespace(missing=lambda: missing, described=lambda: "kernels of compute capability 9.0, built by nvcc V13")
        monkeypatch.setitem(sys.modules, "qvsr.kernels.cuda", kernels)
        monkeypatch.setattr(stage, "_cuda", lambda: {"available": available})
        paths = stage.gpu_paths()
        assert [path.kind for path in paths] == KINDS
        return {(path.execution, path.reason) for path in paths}

    words = "8-bit and 4-bit integer products on tensor cores, kernels of compute capability 9.0, built by nvcc V13"
    assert found(None, True) == {("packed", words)}
    assert found("no nvcc", True) == {("fallback", "torch._int_mm and float32 convolutions by PyTorch, more slowly: no nvcc")}
    assert found("torch finds no GPU", False) == {("none", "torch finds no GPU")}


def test_what_is_required_and_not_here(kernels: Any) -> None:
    kernels("this CPU has no VNNI")
    found = stage.report()
    with pytest.raises(DoctorError, match=r"^packed is required, but Linear layers are reference here: this CPU has no VNNI$"):
        stage.require(found, ["packed"])
    kernels(None)
    found = stage.report() | {"cuda": {"available": False, "reason": "torch finds no GPU"}}
    stage.require(found, ["packed"])
    with pytest.raises(DoctorError, match=r"^cuda is required, but there is none: torch finds no GPU$"):
        stage.require(found, ["packed", "cuda"])
    with pytest.raises(DoctorError, match=r"--require: no requirement 'cudda'; did you mean cuda\? known: cuda, packed"):
        stage.require(found, ["cudda"])


def test_features_are_read_from_the_kernel_s_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "processor : 0\nflags\t\t: fpu avx2 avx512_vnni sse\n")
    assert stage.cpu_features() == ["avx2", "avx512_vnni"]

    def missing(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert stage.cpu_features() == []


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qvsr", "doctor"]
    found = json.loads(subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True).stdout)
    assert found["torch"]["version"] == torch.__version__ and [path["kind"] for path in found["layers"]] == KINDS
    assert found["cuda"]["available"] == torch.cuda.is_available() and found["model"]["here"]
    done = subprocess.run([*command, "--require", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: --require: no requirement 'nothing'; known: cuda, packed\n"
    assert "quantized layers:" in done.stdout and "oneDNN" in done.stdout and "the same on a GPU:" in done.stdout
