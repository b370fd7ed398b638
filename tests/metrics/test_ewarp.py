"""Warping error by RAFT: the input scale, small frames, options, what is refused. Values: tests/golden/test_eval_ewarp.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from metrics import ewarp as module
from metrics._frames import MetricError
from metrics._warp import shrink_and_pad, warping_error
from metrics.ewarp import ewarp
from qvsr.models.flow import FlowError, load_raft


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """RAFT with random weights, whose updates are small."""
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    state = raft_large(weights=None).state_dict()
    for key in ("weight", "bias"):
        state[f"update_block.flow_head.conv2.{key}"] *= 0.1
    path = tmp_path_factory.mktemp("raft") / "raft-things.safetensors"
    save_file(state, path)
    return {"raft-things": path}


def clip(frames: int = 2, height: int = 64, width: int = 72) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((frames, 3, height, width), generator=generator)


def measure(frames: torch.Tensor, weights: dict[str, Path], **options: Any) -> torch.Tensor:
    return ewarp(frames, **{"updates": 1, **options}, weights=weights)


class Recorder:
    """A network that keeps what it is fed with and finds no motion."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def to(self, _: object) -> Recorder:
        return self

    def __call__(self, first: torch.Tensor, second: torch.Tensor, num_flow_updates: int) -> list[torch.Tensor]:
        self.seen += [first, second]
        return [torch.zeros(2, 2, *first.shape[-2:])] * num_flow_updates


@pytest.mark.parametrize(("images", "low", "high"), [("0-255", -1.0, 1.0), ("0-1", -1.0, 2 / 255 - 1)])
def test_what_the_network_is_fed_with(
    images: str, low: float, high: float, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(module, "_network", lambda *_: recorder)
    frames = torch.stack([torch.zeros(3, 256, 264), torch.ones(3, 256, 264)])
    error = measure(frames, weights, images=images)
    first, second = recorder.seen
    assert first.shape == (2, 3, 128, 136) and torch.equal(second, first.flip(0))  # both directions in one call
    assert first[0].unique().tolist() == [low] and first[1].unique().item() == pytest.approx(high, abs=1e-7)  # float32
    assert error.item() == pytest.approx(3000)  # black against white, without motion: 1 a channel


def test_small_frames_are_extended_for_the_flow_alone(weights: dict[str, Path]) -> None:
    frames = clip()
    half = shrink_and_pad(frames)
    assert half.shape == (2, 3, 32, 40)
    extended = torch.nn.functional.pad(2 * half - 1, (0, 88, 0, 96), "replicate")
    with torch.no_grad():
        forward, backward = load_raft(weights["raft-things"])(extended, extended.flip(0), num_flow_updates=1)[-1][..., :32, :40]
    expected, visible = warping_error(half[0], half[1], forward, backward)
    assert 0 < visible <= 32 * 40
    assert measure(frames, weights).item() == pytest.approx(1000 * expected, rel=1e-9)


def test_options(weights: dict[str, Path]) -> None:
    frames = clip()
    whole = measure(frames, weights)
    torch.testing.assert_close(3 * measure(frames, weights, channels="mean"), whole, rtol=1e-12, atol=0)  # float64 rounding
    for changed in ({"scale": 1.0}, {"updates": 2}, {"images": "0-1"}):
        assert abs(measure(frames, weights, **changed) / whole - 1) > 1e-4, changed


def test_a_still_clip_is_ideal(weights: dict[str, Path]) -> None:
    constant = torch.full((3, 3, 32, 32), 0.3)
    torch.testing.assert_close(measure(constant, weights), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)  # float32 interpolation


def test_a_pair_without_common_pixels(weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(Recorder):
        def __call__(self, first: torch.Tensor, second: torch.Tensor, num_flow_updates: int) -> list[torch.Tensor]:
            return [torch.full((2, 2, *first.shape[-2:]), 40.0)]

    monkeypatch.setattr(module, "_network", lambda *_: Away())
    assert measure(clip(), weights, unseen="zero").item() == 0
    with pytest.raises(MetricError, match="ewarp: no pixel of frame 0 is found again in frame 1; is there a scene cut"):
        measure(clip(), weights)


def test_weights_are_read_again_when_their_file_is_replaced(weights: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "raft.safetensors"
    path.write_bytes(weights["raft-things"].read_bytes())
    first = module._network(path, path.stat().st_mtime_ns)
    assert module._network(path, path.stat().st_mtime_ns) is first
    os.utime(path, ns=(1, 1))
    assert module._network(path, path.stat().st_mtime_ns) is not first


def test_what_is_refused(weights: dict[str, Path], tmp_path: Path) -> None:
    frames = clip()
    with pytest.raises(MetricError, match="ewarp: 1 frame; a pair of frames is needed"):
        measure(frames[:1], weights)
    with pytest.raises(MetricError, match="ewarp: frames are 15x72; at least 16x16 is needed for optical flow"):
        measure(frames[:, :, :15], weights)
    with pytest.raises(MetricError, match="ewarp: prediction has NaN in frame 0"):
        measure(frames * float("nan"), weights)
    with pytest.raises(MetricError, match="ewarp: no range of images '0-2'; known: 0-1, 0-255"):
        measure(frames, weights, images="0-2")
    with pytest.raises(MetricError, match="ewarp: updates is 0; at least 1 is needed"):
        measure(frames, weights, updates=0)
    with pytest.raises(MetricError, match="ewarp: scale is 0; above 0, at most 1 is needed"):
        measure(frames, weights, scale=0)
    with pytest.raises(MetricError, match=r"ewarp: no weights at .*away\.pth; get them with: python -m qvsr assets fetch raft-things"):
        measure(frames, {"raft-things": tmp_path / "away.pth"})
    save_file({"fnet.conv1.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FlowError, match=r"other\.safetensors does not hold RAFT \(large\)"):
        measure(frames, {"raft-things": tmp_path / "other.safetensors"})
