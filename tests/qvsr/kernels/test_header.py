"""The C headers as ctypes against what a C++ compiler makes of them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from qvsr.kernels import build, cuda, header
from qvsr.kernels.header import HeaderError


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here to compile the headers")
def test_sizes_offsets_and_numbers_are_the_compiler_s(tmp_path: Path) -> None:
    interface = cuda.interface()
    expected = {}
    lines = ['#include "quantize.h"', '#include "api.h"', "#include <cstdio>", "int main() {"]
    for name, structure in interface.structures.items():
        expected[name] = ctypes.sizeof(structure)
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in structure._fields_:
            expected[f"{name}.{field}"] = getattr(structure, field).offset
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
    for name, value in interface.numbers.items():
        expected[name] = value
        lines.append(f'printf("{name} %d\\n", int({name}));')
    (tmp_path / "main.cpp").write_text("\n".join([*lines, "}"]))
    program = tmp_path / "main"
    command = ["g++", "-std=c++17", "-DQVSR_EMULATE", f"-I{build.SOURCES}", str(tmp_path / "main.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    found = dict(line.split() for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines())
    assert {name: int(value) for name, value in found.items()} == expected
    assert {"QvsrActivation", "QvsrFactor", "QvsrPart", "QvsrLayer", "QvsrWindow"} <= set(interface.structures)


def test_functions() -> None:
    found = cuda.interface().functions
    assert found["qvsr_quantize"] == (ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p])
    assert found["qvsr_message"] == (ctypes.c_char_p, [ctypes.c_int])
    assert found["qvsr_tiles_bytes"] == (ctypes.c_int64, [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("enum { A };", "enumeration: 'A' has no number"),
        ("struct S { int a, b; };", "structure: 'int a, b' is not a value, a pointer or an array"),
        ("struct S { double a; };", "'double a': type 'double' is not among int, int32_t, uint32_t, int64_t, uint8_t, float, cudaStream_t"),
        (
            "QVSR_API int f(size_t n);",
            "'size_t n': type 'size_t' is not among int, int32_t, uint32_t, int64_t, uint8_t, float, cudaStream_t",
        ),
    ],
)
def test_what_is_not_understood(text: str, message: str) -> None:
    with pytest.raises(HeaderError, match=f"^{message}$"):
        header.read([text])
