"""Warping, occlusion and error of E*warp for stored flows: what `ewarp_dis` shares with the released metric."""

from __future__ import annotations

import pytest
import torch
from golden import assert_close, load, under

from metrics._warp import halve_and_pad, inconsistent, motion_boundary, occlusion, warp, warping_error


def test_half_resolution_and_padding() -> None:
    meta, tensors = load("eval_ewarp")
    frames = (tensors["clip"].float() / 255).permute(0, 3, 1, 2)
    assert list(frames.shape[-2:]) == meta["clip_hw"]
    half = halve_and_pad(frames)
    assert list(half.shape[-2:]) == meta["padded_hw"]
    stored = under(tensors, "half_padded_frame")
    assert stored
    for index, expected in stored.items():
        assert_close(half[int(index)], expected, meta, f"frame {index}")


def test_masks_warps_and_errors_for_given_flows() -> None:
    meta, tensors = load("eval_ewarp")
    for i, facts in enumerate(meta["cases"]):
        case = under(tensors, f"case{i}.")
        forward, backward = case["flow_forward"], case["flow_backward"]
        backward_warped = warp(backward, forward)
        assert_close(backward_warped, case["flow_backward_warped"], meta, f"case {i} backward flow")
        assert_close(warp(case["image2"], forward), case["warped"], meta, f"case {i} warp")
        assert_close(inconsistent(forward, backward_warped), case["inconsistent"], meta, f"case {i} inconsistent")
        assert_close(motion_boundary(forward), case["motion_boundary"], meta, f"case {i} boundary")
        assert_close(occlusion(forward, backward), case["occlusion"], meta, f"case {i} occlusion")
        error, visible = warping_error(case["image1"], case["image2"], forward, backward)
        assert visible == facts["not_occluded_pixels"]
        assert error == pytest.approx(facts["error"], rel=1e-5)  # float32 sums of the reference
        exchanged = occlusion(backward, forward) != occlusion(forward, backward)
        assert int(exchanged.sum()) == facts["pixels_that_would_differ_with_the_two_flows_exchanged"]


@pytest.mark.parametrize("name", ["eval_ewarp_paper", "eval_ewarp_strict"])
def test_score_from_stored_flows(name: str) -> None:
    clip_meta, clip_tensors = load("eval_ewarp")
    meta, tensors = load(name)
    frames = halve_and_pad((clip_tensors["clip"].float() / 255).permute(0, 3, 1, 2))
    errors = []
    for i, (forward, backward) in enumerate(zip(tensors["flow_forward"], tensors["flow_backward"], strict=True)):
        assert_close(occlusion(forward, backward), tensors["occlusion"][i], meta, f"pair {i}")
        if f"warped.pair{i}" in tensors:
            assert_close(warp(frames[i + 1], forward), tensors[f"warped.pair{i}"], clip_meta, f"pair {i} warp")
        error, visible = warping_error(frames[i], frames[i + 1], forward, backward)
        assert visible == meta["not_occluded_pixels_per_pair"][i]
        errors.append(1000 * error)
    assert errors == pytest.approx(meta["error_per_pair_times_1000"], rel=1e-5)  # float32 sums of the reference
    assert torch.tensor(errors, dtype=torch.float64).mean().item() == pytest.approx(meta["score"], rel=1e-5)
