"""Decoder output to 8-bit frames against the published formula."""

from __future__ import annotations

import torch
from golden import assert_close, load

from qvsr.models.pipeline import to_uint8


def test_rounding_and_truncation() -> None:
    meta, tensors = load("eval_frames")
    frames = ((tensors["x"] + 1) / 2).clamp(0, 1)
    assert_close(frames.permute(0, 2, 3, 1) * 255, tensors["scaled"], meta, "scaled")
    truncated, rounded = to_uint8(frames, "truncate"), to_uint8(frames, "round")
    assert torch.equal(truncated, tensors["truncated"])
    assert torch.equal(rounded, tensors["rounded"])
    assert int((truncated != rounded).sum()) == meta["values_where_rounding_differs"]
