"""Warping, occlusion and flow resizing against the reference's."""

from __future__ import annotations

import torch
from golden import assert_close, load, matching

from qvsr.models.flow import occlusion, raft_names, resize_flow, warp


def test_warp() -> None:
    meta, tensors = load("flow")
    assert_close(warp(tensors["feature"], tensors["fwd_flow"]), tensors["feature_warped_by_fwd_flow"], meta, "warp")


def test_occlusion() -> None:
    meta, tensors = load("flow")
    forward, backward = occlusion(tensors["fwd_flow"], tensors["bwd_flow"], **meta["occlusion"])
    assert torch.equal(forward, tensors["fwd_occ"])
    assert torch.equal(backward, tensors["bwd_occ"])


def test_resize() -> None:
    meta, tensors = load("flow")
    assert len(meta["resize_sizes_hw"]) == len(matching(tensors, r"resize_out\.(\d+)"))
    for number, (height, width) in enumerate(meta["resize_sizes_hw"]):
        assert_close(resize_flow(tensors["resize_in"], height, width), tensors[f"resize_out.{number}"], meta, f"{height}x{width}")


def test_raft_keys() -> None:
    """The published checkpoint's names lead to torchvision's."""
    meta, _ = load("eval_raft")
    mapping = meta["torchvision"]["key_mapping"]
    assert {key: raft_names(key) for key in mapping} == mapping
