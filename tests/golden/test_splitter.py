"""Tile positions and overlap average against the reference's."""

from __future__ import annotations

import torch
from golden import assert_close, load, matching

from qvsr.models.tiling import Blend, boxes, reduced_starts, starts


def test_cases() -> None:
    meta, tensors = load("splitter")
    assert len(meta["cases"]) == len(matching(tensors, r"case(\d+)\.image"))
    for number, case in enumerate(meta["cases"]):
        height, width = case["shape"][-2:]
        assert starts(height, case["patch"], case["stride"]) == case["h_starts"]
        assert starts(width, case["patch"], case["stride"]) == case["w_starts"]
        tiles = boxes(height, width, case["patch"], case["stride"])
        assert [list(box) for box in tiles] == case["index_h0_h1_w0_w1"]
        image = tensors[f"case{number}.image"]
        blend = Blend(torch.zeros(case["shape"]))
        for k, box in enumerate(tiles):
            blend.add(box, box.cut(image) * (k + 1) + 0.1 * k)
        assert_close(blend.result(), tensors[f"case{number}.gathered"], meta, f"case {number}")


def test_production_sizes() -> None:
    meta, _ = load("splitter")
    facts = meta["production_sizes"]
    factor = facts["patch"] // facts["flow_patch"]
    for size in facts["list"]:
        for side, length in zip("hw", size["image_hw"], strict=True):
            assert starts(length, facts["patch"], facts["stride"]) == size[f"{side}_starts"]
            assert starts(length // factor, facts["flow_patch"], facts["flow_stride"]) == size[f"flow_{side}_starts"]
            # The published splitter may cut one tile more from the flow than from the image (a side of 3200); ours never does.
            if len(size[f"{side}_starts"]) == len(size[f"flow_{side}_starts"]):
                assert reduced_starts(length, facts["patch"], facts["stride"], factor) == size[f"flow_{side}_starts"]
