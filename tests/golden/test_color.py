"""Colour fixes against the reference's."""

from __future__ import annotations

import pytest
from golden import assert_close, load

from qvsr.models.colour import COLOUR_FIXES


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_colour_fix(name: str) -> None:
    meta, tensors = load("color")
    assert_close(COLOUR_FIXES[name](tensors["content"], tensors["style"]), tensors[name], meta, name)
