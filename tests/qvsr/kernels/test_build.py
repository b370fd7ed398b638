"""The CUDA library's build: what nvcc makes of all sources for all architectures, without a GPU; and the rest of it with a compiler that only pretends."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qvsr.kernels import build, cuda
from qvsr.kernels.build import ARCHITECTURES, INTERMEDIATE, BuildError, Built

pytestmark = pytest.mark.timeout(1800)  # the build takes a minute of a core, which a busy machine has to find
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc here to build the kernels")
REGISTERS = 65536  # of a multiprocessor
THREADS = 256  # of a block at most, which must fit whole


@pytest.fixture(scope="session")
def built(pytestconfig: pytest.Config) -> Built:
    """The library for all architectures: about a minute of a core; kept with pytest's cache for as long as the sources are the same."""
    return build.find_or_build(ARCHITECTURES, Path(pytestconfig.cache.mkdir("kernels")))


# ---------------------------------------------------------------- with nvcc


@needs_nvcc
def test_the_library_has_every_architecture_and_ptx_for_later_ones(built: Built) -> None:
    known = {
        int(name)
        for name in re.findall(r"sm_(\d+)", subprocess.run([build.find_nvcc(), "--list-gpu-code"], capture_output=True, text=True).stdout)
    }
    if not set(ARCHITECTURES) <= known:
        pytest.skip(f"nvcc {built.compiler} does not know {sorted(set(ARCHITECTURES) - known)}")
    assert build.contents(built.path) == ([*ARCHITECTURES], [*INTERMEDIATE])
    assert (built.architectures, built.ptx) == (ARCHITECTURES, INTERMEDIATE)


@needs_nvcc
def test_registers_fit_and_none_is_spilled(built: Built) -> None:
    names = build.readable(sorted({kernel.name for kernel in built.kernels}))
    short = {name: re.sub(r"^.*::|<.*$", "", text.partition("<")[0]) for name, text in names.items()}
    assert {"quantize", "gemm", "repack", "prepare"} <= set(short.values())
    for kernel in built.kernels:
        what = f"{names[kernel.name]} for sm_{kernel.architecture}"
        assert kernel.spill_stores == kernel.spill_loads == 0, (
            f"{what}: {kernel.spill_stores} and {kernel.spill_loads} bytes of registers go to memory"
        )
        assert kernel.stack <= 64, f"{what}: an array of {kernel.stack} bytes is not in registers"
        assert kernel.registers * THREADS <= REGISTERS, f"{what}: {kernel.registers} registers"
    for name in names:
        assert {kernel.architecture for kernel in built.kernels if kernel.name == name} == set(built.architectures), (
            f"{names[name]} is missing somewhere"
        )


@needs_nvcc
def test_the_library_loads_without_a_gpu_and_exports_what_the_headers_declare(built: Built) -> None:
    library = cuda.load(built.path)
    assert library.qvsr_message(0) and library.qvsr_quantize_message(-104) == b"bits are not 2 to 8"
    if (nm := shutil.which("nm")) is None:
        pytest.skip("no nm here to list symbols")
    lines = subprocess.run([nm, "-D", str(built.path)], capture_output=True, text=True, check=True).stdout.splitlines()
    exported = {line.split()[-1] for line in lines if " T " in line}
    assert exported - {"_init", "_fini"} >= set(cuda.interface().functions)
    assert not [line for line in lines if " U " in line and ("cuda" in line or line.split()[-1][:2] == "cu")], "the runtime is linked in"


@needs_nvcc
def test_launchers_check_their_arguments_without_a_device(built: Built) -> None:
    library, interface = cuda.load(built.path), cuda.interface()
    numbers, structures = interface.numbers, interface.structures
    assert library.qvsr_quantize(None, None) == numbers["QVSR_QUANTIZE_NULL"]
    whole = {
        "x": 4096,
        "q": 4096,
        "scale": 4096,
        "zero_point": 4096,
        "keys": 4096,
        "frames": 1,
        "tokens": 4,
        "channels": 8,
        "K": 8,
        "bits": 4,
    }
    for change, code in (
        ({"q": None}, "NULL"),
        ({"channels": 7}, "SIZE"),
        ({"x": 4098}, "ALIGNMENT"),
        ({"bits": 1}, "BITS"),
        ({"granularity": -1}, "GRANULARITY"),
        ({"factors": 1}, "FACTORS"),
    ):
        call = structures["QvsrActivation"](**whole | change)
        assert library.qvsr_quantize(ctypes.byref(call), None) == numbers[f"QVSR_QUANTIZE_{code}"], code
    large = structures["QvsrActivation"](**whole | {"K": 8192, "channels": 8192, "factors": 1})
    large.factor[0].size = 8192
    assert library.qvsr_quantize(ctypes.byref(large), None) == numbers["QVSR_QUANTIZE_CHANNELS"]
    three = (ctypes.c_int64 * 3)(1, 1, 1)
    assert library.qvsr_form(80, 4, 4) == numbers["QVSR_NIBBLES"] and library.qvsr_form(90, 4, 4) == numbers["QVSR_BYTES_4"]
    assert library.qvsr_form(80, 9, 8) == numbers["QVSR_BITS"]
    assert library.qvsr_form(103, 8, 8) == library.qvsr_form(999, 8, 8) == numbers["QVSR_BYTES_8"]  # a chip of tomorrow
    assert library.qvsr_matmul(None, None, 1, None) == library.qvsr_conv(None, None, None, None) == numbers["QVSR_NULL"]
    assert library.qvsr_repack(None, 8, 8, 0, 8, 1, 8, three, 8, None, None, None) == numbers["QVSR_NULL"]
    assert library.qvsr_prepare(None, 1, 8, 8, None, None, None) == numbers["QVSR_NULL"]


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the pointers of this call are none")
def test_a_driver_s_error_has_its_words(built: Built) -> None:
    library = cuda.load(built.path)
    whole = {
        "x": 4096,
        "q": 4096,
        "scale": 4096,
        "zero_point": 4096,
        "keys": 4096,
        "frames": 1,
        "tokens": 4,
        "channels": 8,
        "K": 8,
        "bits": 4,
    }
    code = library.qvsr_quantize(ctypes.byref(cuda.interface().structures["QvsrActivation"](**whole)), None)
    assert code > 0 and re.search("driver|device", library.qvsr_quantize_message(code).decode())


@needs_nvcc
def test_an_error_of_the_compiler_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "wrong.cu").write_text("__global__ void f() {}\nint g() { return nothing; }\n")
    with pytest.raises(BuildError) as raised:
        build._build(str(build.find_nvcc()), [80], tmp_path / "whole", tmp_path)
    assert re.match(
        rf'{tmp_path}/wrong\.cu\(2\): error: identifier "nothing" is undefined; the command was: \S+nvcc .* -c {tmp_path}/wrong\.cu',
        str(raised.value),
    )


# ---------------------------------------------------------------- with a compiler that only pretends


PRETENDS = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
    --version) echo "Cuda compilation tools, release 12.9, V12.9.1" ;;
    --list-gpu-code) printf 'sm_80\\nsm_90\\nsm_100\\n' ;;
    *) {body}
       while [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done
       echo "ptxas info    : Compiling entry function 'f' for 'sm_90'"
       echo "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
       echo "ptxas info    : Used 12 registers" ;;
esac
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put a compiler in CUDACXX that writes files of four letters and logs its calls; `body` is run at each."""

    def make(body: str = ":") -> Path:
        log, script = tmp_path / "nvcc.log", tmp_path / "nvcc"
        script.write_text(PRETENDS.format(log=log, body=body))
        script.chmod(0o755)
        monkeypatch.setenv("CUDACXX", str(script))
        return log

    return make


def test_a_library_is_built_once_whoever_asks(pretend: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, into = pretend("sleep 0.1"), tmp_path / "cache"
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: build.find_or_build([90], into), range(3)))
    assert len({one.path for one in found}) == 1 and found[0].path.read_text() == "made\n"
    assert (found[0].architectures, found[0].ptx, found[0].compiler) == ((90,), (90,), "V12.9.1")
    sources = len(list(build.SOURCES.glob("*.cu")))
    assert len([line for line in log.read_text().splitlines() if " -c " in line]) == sources
    place = found[0].path.parent
    assert [record.getMessage() for record in caplog.records] == [
        f"building the CUDA kernels for sm_90 with nvcc V12.9.1, once; they are kept in {place}"
    ]
    assert sorted(one.name for one in place.iterdir()) == ["libqvsr_kernels.so", "report.json"]
    assert {one.name for one in into.iterdir()} == {place.name, f"{place.name}.lock"}


def test_a_library_of_all_architectures_serves_each(pretend: Callable[..., Path], tmp_path: Path) -> None:
    pretend()
    assert build.find([90], tmp_path / "cache") is None
    whole = build.find_or_build(into=tmp_path / "cache")
    assert whole.architectures == (80, 90, 100)  # the nearest that this compiler knows: 7.5 is served by none, and dispatch says so
    assert build.find([90], tmp_path / "cache") == build.find([89], tmp_path / "cache") == whole
    assert build.find([103], tmp_path / "cache") is None  # a chip of its own is built for


def test_the_digest_follows_sources_compiler_and_architectures(pretend: Callable[..., Path], tmp_path: Path) -> None:
    pretend()
    nvcc, sources = str(build.find_nvcc()), tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    first = build.digest(nvcc, [80, 90], sources)
    assert first == build.digest(nvcc, [90, 80], sources) == build.digest(nvcc, [80, 90])
    assert build.digest(nvcc, [90], sources) != first
    with (sources / "common.cuh").open("a") as file:
        file.write("//\n")
    assert build.digest(nvcc, [80, 90], sources) != first


def test_a_build_that_fails_leaves_nothing(pretend: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend('echo "a.cu(3): warning: careful"; echo "a.cu(7): error: no" >&2; exit 2')
    with pytest.raises(BuildError, match=rf"^a\.cu\(7\): error: no; the command was: {tmp_path}/nvcc -O3 .* -c \S+\.cu -o \S+\.o$"):
        build.find_or_build([90], tmp_path / "cache")
    assert {one.suffix for one in (tmp_path / "cache").iterdir()} == {".lock"}
    assert build.main(["--architectures", "90", "--into", str(tmp_path / "cache")]) == 1
    assert capsys.readouterr().err.startswith("error: a.cu(7): error: no; the command was: ")


def test_what_killed_builds_have_left_is_swept_up(pretend: Callable[..., Path], tmp_path: Path) -> None:
    pretend()
    dead = subprocess.Popen(["true"])
    dead.wait()
    of_dead, of_living, young = (tmp_path / f".building-{one}" for one in (f"{dead.pid}-a", f"{os.getpid()}-b", f"{dead.pid}-c"))
    for folder in (of_dead, of_living, young, tmp_path / ".building-of-before"):
        (folder / "whole").mkdir(parents=True)
        (folder / "whole" / "matmul.o").write_text("half of it")
        if folder != young:
            os.utime(folder, (0, 0))
    build.find_or_build([90], tmp_path)
    assert {one.name for one in tmp_path.glob(".building-*")} == {of_living.name, young.name}


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(BuildError, match=r"^there is no nvcc; install NVIDIA's CUDA toolkit, or name the compiler in CUDACXX$"):
        build.find_or_build([90], tmp_path)
    assert build.find([90], tmp_path) is None


def test_a_compiler_that_cannot_be_run(tmp_path: Path) -> None:
    (script := tmp_path / "nvcc").write_text("not a program")
    script.chmod(0o755)
    with pytest.raises(BuildError, match=rf"^{script} --version: Exec format error$"):
        build.version_of(str(script))


def test_the_report_of_a_build(pretend: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend()
    assert build.main(["--architectures", "80,90", "--into", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "machine code of 80, 90, PTX of 90; nvcc V12.9.1" in out and re.search(
        r"\| kernel \| sm_90 \|\n\|---\|---:\|\n\| `f` \| 12 \|", out
    )


def test_spills_are_shown() -> None:
    kernels = (build.Kernel("f", 80, 255, 16, 12, 4), build.Kernel("f", 90, 96, 0, 0, 0))
    text = build.table(Built(Path("x"), (80, 90), (90,), kernels, "V", 1.0))
    assert text.splitlines()[-1] == "| `f` | 255+16 | 96 |"
