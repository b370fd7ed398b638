"""E*warp: warping, occlusion and error for stored flows, and the whole metric with the weights of the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden import assert_close, load, matching, under
from recipe import fill

from metrics._warp import inconsistent, motion_boundary, occlusion, shrink_and_pad, warp, warping_error
from metrics.ewarp import ewarp
from qvsr.protocols import read
from qvsr.registry import METRICS

ROUNDING = 1e-5  # a pixel nearer to a threshold than this may fall on the other side in another order of float32 sums
FLIPS = 2  # so many of them at most, and only where the set says that there are such pixels


def flipped(actual: torch.Tensor, expected: torch.Tensor, allowed: int, what: str) -> int:
    """How many pixels of two masks differ; more than allowed fail."""
    count = int((actual != expected.bool()).sum())
    assert count <= allowed, f"{what}: {count} pixels differ, {allowed} may"
    return count


def test_half_resolution_and_padding() -> None:
    meta, tensors = load("eval_ewarp")
    frames = (tensors["clip"].float() / 255).permute(0, 3, 1, 2)
    assert list(frames.shape[-2:]) == meta["clip_hw"]
    half = shrink_and_pad(frames)
    assert list(half.shape[-2:]) == meta["padded_hw"]
    for (index,), expected in matching(tensors, r"half_padded_frame(\d+)").items():
        assert_close(half[int(index)], expected, meta, f"frame {index}")


def test_masks_warps_and_errors_for_given_flows() -> None:
    meta, tensors = load("eval_ewarp")
    assert len(meta["cases"]) == len(matching(tensors, r"case(\d+)\.occlusion"))
    for i, facts in enumerate(meta["cases"]):
        case = under(tensors, f"case{i}.")
        forward, backward = case["flow_forward"], case["flow_backward"]
        backward_warped = warp(backward, forward)
        assert_close(backward_warped, case["flow_backward_warped"], meta, f"case {i} backward flow")
        assert_close(warp(case["image2"], forward), case["warped"], meta, f"case {i} warp")
        allowed = FLIPS if facts["smallest_distance_to_a_threshold"] < ROUNDING else 0
        flipped(inconsistent(forward, backward_warped), case["inconsistent"], allowed, f"case {i} inconsistent")
        flipped(motion_boundary(forward), case["motion_boundary"], allowed, f"case {i} boundary")
        flips = flipped(occlusion(forward, backward), case["occlusion"], allowed, f"case {i} occlusion")
        error, visible = warping_error(case["image1"], case["image2"], forward, backward)
        assert abs(visible - facts["not_occluded_pixels"]) <= flips
        assert error == pytest.approx(facts["error"], rel=1e-2 if flips else 1e-5)  # float32 sums of the reference
        exchanged = occlusion(backward, forward) != occlusion(forward, backward)
        assert abs(int(exchanged.sum()) - facts["pixels_that_would_differ_with_the_two_flows_exchanged"]) <= 2 * flips


@pytest.mark.parametrize("name", ["eval_ewarp_paper", "eval_ewarp_strict"])
def test_score_from_stored_flows(name: str) -> None:
    clip_meta, clip_tensors = load("eval_ewarp")
    meta, tensors = load(name)
    frames = shrink_and_pad((clip_tensors["clip"].float() / 255).permute(0, 3, 1, 2))
    errors, flips = [], 0
    for i, (forward, backward) in enumerate(zip(tensors["flow_forward"], tensors["flow_backward"], strict=True)):
        flips += flipped(occlusion(forward, backward), tensors["occlusion"][i], FLIPS, f"pair {i}")
        if f"warped.pair{i}" in tensors:
            assert_close(warp(frames[i + 1], forward), tensors[f"warped.pair{i}"], clip_meta, f"pair {i} warp")
        error, visible = warping_error(frames[i], frames[i + 1], forward, backward)
        assert abs(visible - meta["not_occluded_pixels_per_pair"][i]) <= flips
        errors.append(1000 * error)
    close = 1e-3 if flips else 1e-5  # stated in the set; float32 sums of the reference
    assert errors == pytest.approx(meta["error_per_pair_times_1000"], rel=close)
    assert torch.tensor(errors, dtype=torch.float64).mean().item() == pytest.approx(meta["score"], rel=close)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint with published names."""
    meta, tensors = load("eval_raft")
    factor = load("eval_ewarp_paper")[0]["flow_head_factor"]
    state = fill(meta["recipe"], tensors)
    for key in ("weight", "bias"):
        state[f"update_block.flow_head.conv2.{key}"] *= factor
    path = tmp_path_factory.mktemp("weights") / "raft-things.pth"
    torch.save({f"module.{key}": value for key, value in state.items()}, path)
    return {"raft-things": path}


@pytest.mark.parametrize(("protocol", "name"), [("paper-v1", "eval_ewarp_paper"), ("strict-v1", "eval_ewarp_strict")])
def test_the_metric_under_both_protocols(protocol: str, name: str, weights: dict[str, Path]) -> None:
    meta, _ = load(name)
    frames = (load("eval_ewarp")[1]["clip"].float() / 255).permute(0, 3, 1, 2)
    options = read(protocol).options(METRICS["ewarp"])
    values = ewarp(frames, **options, weights=weights)
    # stated in the set, for a network run anew; the two sets are 12 % apart
    assert values.tolist() == pytest.approx(meta["error_per_pair_times_1000"], rel=1e-3)
    assert values.mean().item() == pytest.approx(meta["score"], rel=1e-3)
    assert torch.equal(ewarp(frames[2:4], **options, weights=weights), values[2:3])  # a chunk of the clip
