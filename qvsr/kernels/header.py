"""C headers as ctypes: the structures, constants and functions of ``csrc/*.h``, so that nothing is written down twice.

Only what those headers use is understood: structures of plain values, pointers, arrays and other structures; enumerations with a number each;
functions on one or more lines that begin with ``QVSR_API``.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

PLAIN: dict[str, Any] = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint8_t": ctypes.c_uint8,
    "float": ctypes.c_float,
    "cudaStream_t": ctypes.c_void_p,
}
_STRUCT = re.compile(r"\bstruct (\w+) \{(.*?)\};", re.DOTALL)
_FIELD = re.compile(r"(?:const )?(\w+) ?(\*?) ?(\w+)(?:\[(\w+)\])?$")
_ENUM = re.compile(r"\benum \w* ?\{(.*?)\};", re.DOTALL)
_FUNCTION = re.compile(r"\bQVSR_API ([\w *]+?)(\w+)\(([^)]*)\);", re.DOTALL)


class HeaderError(ValueError):
    """A header has something that is not understood here; the message quotes it."""


@dataclass
class Header:
    """Structures, numbers of enumerations, and of each function its result and arguments."""

    structures: dict[str, type[ctypes.Structure]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    functions: dict[str, tuple[Any, list[Any]]] = field(default_factory=dict)


def read(texts: Iterable[str]) -> Header:
    """What headers declare, in their order.

    >>> header = read(["enum { SIDES = 3 }; struct Box { const float *at; int64_t size[SIDES]; };  QVSR_API int fill(const Box *box, int value);"])
    >>> header.numbers, ctypes.sizeof(header.structures["Box"]), len(header.functions["fill"][1])
    ({'SIDES': 3}, 32, 2)

    Raises:
        HeaderError: something else than the module's docstring lists.
    """
    header = Header()
    for text in texts:
        code = re.sub(r"//[^\n]*", "", text)
        for found in _ENUM.finditer(code):
            for item in filter(None, (part.strip() for part in found[1].split(","))):
                name, _, value = (part.strip() for part in item.partition("="))
                if not re.fullmatch(r"-?\d+", value):
                    raise HeaderError(f"enumeration: {item!r} has no number")
                header.numbers[name] = int(value)
        for found in _STRUCT.finditer(code):
            fields = [_field(header, line.strip()) for line in found[2].split(";") if line.strip()]
            header.structures[found[1]] = type(found[1], (ctypes.Structure,), {"_fields_": fields})
        for found in _FUNCTION.finditer(code):
            arguments = [_argument(header, one.strip()) for one in found[3].split(",") if one.strip()]
            result = ctypes.c_char_p if "char" in found[1] else _type(header, found[1].strip(), found[0])
            header.functions[found[2]] = (result, arguments)
    return header


def _field(header: Header, text: str) -> tuple[str, Any]:
    found = _FIELD.match(" ".join(text.split()))
    if found is None:
        raise HeaderError(f"structure: {text!r} is not a value, a pointer or an array")
    kind, star, name, size = found.groups()
    if star:
        return name, ctypes.c_void_p
    whole = _type(header, kind, text)
    if size is None:
        return name, whole
    return name, whole * (int(size) if size.isdigit() else header.numbers[size])


def _argument(header: Header, text: str) -> Any:
    """Pointers and arrays are addresses: ctypes takes tensors' numbers, its own arrays and ``byref`` alike."""
    if "*" in text or "[" in text:
        return ctypes.c_void_p
    return _type(header, text.split()[0], text)


def _type(header: Header, kind: str, text: str) -> Any:
    known = PLAIN | header.structures
    if kind not in known:
        raise HeaderError(f"{text!r}: type {kind!r} is not among {', '.join(known)}")
    return known[kind]
