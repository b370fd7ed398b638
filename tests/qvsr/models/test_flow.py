"""Warping against scipy, flow of known motion, clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from qvsr.models.flow import FlowError, dis_flow, estimator, load_raft, occlusion, raft_flow, resize_flow, warp


def test_warp_is_scipys_interpolation() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(2, 3, 14, 19, dtype=torch.float64, generator=generator)
    flow = 4 * torch.randn(2, 2, 14, 19, dtype=torch.float64, generator=generator)
    y, x = np.mgrid[:14, :19].astype(float)
    warped = warp(feature, flow)
    for b in range(2):
        points = [y + flow[b, 1].numpy(), x + flow[b, 0].numpy()]
        for c in range(3):
            expected = scipy.ndimage.map_coordinates(feature[b, c].numpy(), points, order=1, mode="grid-constant")
            np.testing.assert_allclose(warped[b, c].numpy(), expected, rtol=0, atol=1e-10)


def test_opposite_flows_are_not_occluded() -> None:
    flow = torch.zeros(1, 2, 20, 30)
    flow[:, 0] = 3.0
    forward, backward = occlusion(flow, -flow)
    # Pixels whose target lies outside meet zero there: 3 pixels at the side they leave by.
    assert not forward[:, :, :-3].any()
    assert forward[:, :, -3:].all()
    assert not backward[:, :, 3:].any()
    assert backward[:, :, :3].all()


def test_resized_flow_moves_the_same_part_of_the_image() -> None:
    flow = torch.zeros(1, 2, 16, 24)
    flow[:, 0], flow[:, 1] = 6.0, -4.0
    small = resize_flow(flow, 8, 6)
    torch.testing.assert_close(small[:, 0], torch.full((1, 8, 6), 1.5))
    torch.testing.assert_close(small[:, 1], torch.full((1, 8, 6), -2.0))


def moving(size: int, frames: int = 3) -> torch.Tensor:
    """Smooth noise whose content moves by (+2, -1) pixels a frame."""
    texture = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(texture, size=(160, 160), mode="bicubic").clamp(0, 1)[0]
    return torch.stack([large[:, 10 + i : 10 + i + size, 10 - 2 * i : 10 - 2 * i + size] for i in range(frames)])


@pytest.mark.parametrize("size", [24, 64])
def test_dis_finds_a_translation(size: int) -> None:
    forward, backward = dis_flow(moving(size))
    assert forward.shape == backward.shape == (2, 2, size, size)
    inner = slice(size // 4, -size // 4)
    expected = torch.tensor([2.0, -1.0])
    for flow, sign in ((forward, 1), (backward, -1)):
        # A tenth of a pixel on average: what inverse search reaches on smooth texture.
        torch.testing.assert_close(flow[..., inner, inner].mean((0, 2, 3)), sign * expected, rtol=0, atol=0.1)


def test_dis_is_deterministic_and_leaves_threads_alone() -> None:
    import cv2

    frames, threads = moving(40), cv2.getNumThreads()
    first, second = dis_flow(frames), dis_flow(frames)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0][1:], dis_flow(frames[1:])[0])  # a pair does not depend on the pairs before it
    assert cv2.getNumThreads() == threads


@pytest.mark.parametrize("size", [1, 8])
def test_dis_takes_tiny_frames_and_single_ones(size: int) -> None:
    forward, backward = dis_flow(torch.rand(2, 3, size, size + 1))
    assert forward.shape == backward.shape == (1, 2, size, size + 1)
    assert dis_flow(torch.rand(1, 3, size, size))[0].shape == (0, 2, size, size)


def test_missing_raft_weights_say_what_would_work(tmp_path: Path) -> None:
    with pytest.raises(FlowError, match=r"RAFT weights .*raft\.pth not found; put the file there, or use sampling\.flow=dis"):
        estimator("raft", tmp_path / "raft.pth")
    with pytest.raises(FlowError, match=r"set backbone\.flow_weights, or use sampling\.flow=dis"):
        estimator("raft")
    with pytest.raises(FlowError, match="no flow 'farneback'; known: dis, none, raft"):
        estimator("farneback")
    assert estimator("none") is None
    assert estimator("dis") is dis_flow


def test_unsuitable_raft_weights_are_refused(tmp_path: Path) -> None:
    save_file({"fnet.conv1.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FlowError, match=r"other\.safetensors does not hold RAFT \(large\): \d+ keys missing, 1 of another shape"):
        load_raft(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    with pytest.raises(FlowError, match=r"RAFT weights .*broken\.safetensors cannot be read"):
        load_raft(tmp_path / "broken.safetensors")


def test_raft_runs_at_any_size(tmp_path: Path) -> None:
    """With random weights: shapes, both directions, and that the pair (b, a) is the pair (a, b) backwards."""
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    save_file(raft_large(weights=None).state_dict(), tmp_path / "raft.safetensors")
    flow = raft_flow(tmp_path / "raft.safetensors", updates=1)
    frames = torch.rand(2, 3, 36, 50, generator=torch.Generator().manual_seed(0))
    forward, backward = flow(frames)
    assert forward.shape == backward.shape == (1, 2, 36, 50)
    assert torch.equal(flow(frames.flip(0))[0], backward)
