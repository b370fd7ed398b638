"""The clip pipeline with a backbone whose result is known, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import oracle

from qvsr.config import BackboneSettings, SamplingSettings
from qvsr.models.flow import dis_flow
from qvsr.models.noise import KeyedNoise
from qvsr.models.pipeline import (
    PatchResult,
    RestoreError,
    bicubic_upscale,
    check,
    network_calls,
    network_frames,
    restore,
    restore_segments,
    segments,
    to_uint8,
)
from qvsr.models.sampler import NetworkCall
from qvsr.models.tiling import pad_to_multiple

SMALL = SamplingSettings(steps=2, tile=16, tile_overlap=8, image_tile=96, image_tile_stride=64, colour_fix="none", guidance_scale=0)


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(5))


def expected(lq: torch.Tensor) -> torch.Tensor:
    """What the oracle restores: the upscaled, padded frames averaged over 4x4 blocks."""
    image = pad_to_multiple(network_frames(lq, 4), 32)
    blocks = F.interpolate(F.avg_pool2d(image, 4), scale_factor=4, mode="nearest")
    return (blocks[..., : lq.shape[-2] * 4, : lq.shape[-1] * 4] + 1) / 2


@pytest.mark.parametrize("frames", [1, 2, 5, 7])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (20, 34), (3, 5)])
def test_a_clip_comes_back_whole(frames: int, height: int, width: int) -> None:
    """Segments, padding, image tiles (136 > 96 pixels) and latent tiles leave no trace with a pointwise network."""
    lq = clip(frames, height, width)
    restored = restore(oracle("v"), lq, SMALL, KeyedNoise(0, "a"))
    assert restored.shape == (frames, 3, height * 4, width * 4)
    assert restored.dtype == torch.float32
    torch.testing.assert_close(restored, expected(lq), rtol=0, atol=1e-4)  # as in test_sampler


def test_bicubic_is_opencvs() -> None:
    frames = clip(2, 9, 13)
    for frame, enlarged in zip(frames, bicubic_upscale(frames, 4), strict=True):
        reference = cv2.resize(frame.permute(1, 2, 0).numpy(), (52, 36), interpolation=cv2.INTER_CUBIC)
        # OpenCV keeps its float coefficients in another order of sums.
        np.testing.assert_allclose(enlarged.permute(1, 2, 0).numpy(), reference.clip(0, 1), rtol=0, atol=2e-6)


def test_segments_fill_up_with_the_last_frame() -> None:
    assert segments(5, 5) == [[0, 1, 2, 3, 4]]
    assert segments(6, 5)[1] == [5, 5, 5, 5, 5]


def test_segments_come_one_by_one() -> None:
    """The first segment is there before the second is begun: memory does not grow with the clip."""
    calls: list[NetworkCall] = []
    pieces = restore_segments(oracle(), clip(12, 8, 8), SMALL, KeyedNoise(0, "a"), observe=calls.append)
    assert len(next(pieces)) == 5
    assert {call.segment for call in calls} == {0}
    assert [len(piece) for piece in pieces] == [5, 2]


def test_result_depends_on_the_key_only() -> None:
    lq, backbone = clip(6, 8, 8), oracle(noisy=True)
    first = restore(backbone, lq, SMALL, KeyedNoise(0, "a"), dis_flow)
    torch.manual_seed(99)
    assert torch.equal(restore(backbone, lq, SMALL, KeyedNoise(0, "a"), dis_flow), first)
    assert not torch.equal(restore(backbone, lq, SMALL, KeyedNoise(1, "a"), dis_flow), first)
    assert not torch.equal(restore(backbone, lq, SMALL, KeyedNoise(0, "b"), dis_flow), first)
    # A segment that follows others is the same as one restored alone but for its number.
    assert torch.equal(restore(backbone, lq[:5], SMALL, KeyedNoise(0, "a"), dis_flow), first[:5])


def test_guidance_sees_the_flow_of_its_tile() -> None:
    """A flow function gets a quarter of the padded size; guidance changes the result."""
    sizes = []

    def flow(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(tuple(frames.shape))
        return dis_flow(frames)

    lq = clip(5, 20, 34)
    guided = restore(oracle(), lq, SMALL.model_copy(update={"guidance_scale": -10.0}), KeyedNoise(0, "a"), flow)
    assert sizes == [(5, 3, 24, 40)]
    assert (guided - expected(lq)).abs().max() > 1e-3


def test_progress_counts_calls_of_the_unet() -> None:
    seen: list[tuple[int, int]] = []
    patches: list[PatchResult] = []
    backbone = oracle()
    restore(
        backbone,
        clip(7, 20, 34),
        SMALL,
        KeyedNoise(0, "a"),
        progress=lambda done, total: seen.append((done, total)),
        on_patch=patches.append,
    )
    total = len(backbone.unet.calls)
    assert seen == [(number, total) for number in range(1, total + 1)]
    assert total == network_calls(20, 34, 7, SMALL, 4)
    assert [(patch.segment, patch.patch) for patch in patches] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_published_number_of_calls() -> None:
    """720 x 1280 takes 600 calls a segment: 2 image tiles of 6 latent tiles, 50 steps."""
    assert network_calls(180, 320, 5, SamplingSettings(), 8) == 600
    assert network_calls(135, 240, 10, SamplingSettings(), 8) == 1200


def test_colour_fix_is_inside_the_tile() -> None:
    patches: list[PatchResult] = []
    lq = clip(5, 20, 34)
    restore(oracle(), lq, SMALL.model_copy(update={"colour_fix": "adain"}), KeyedNoise(0, "a"), on_patch=patches.append)
    image = pad_to_multiple(network_frames(lq, 4), 32)
    for patch in patches:
        torch.testing.assert_close(patch.frames.mean((-2, -1)), patch.box.cut(image).mean((-2, -1)), rtol=0, atol=1e-4)


def test_rounding() -> None:
    frames = torch.tensor([0.0, 0.4, 0.5, 0.6, 1.0, 254.5]).div(255).view(1, 1, 2, 3).expand(1, 3, 2, 3)
    assert to_uint8(frames, "truncate")[0, ..., 0].flatten().tolist()[1:4] == [0, 0, 0]
    assert to_uint8(frames, "round")[0, ..., 0].flatten().tolist() == [0, 0, 0, 1, 1, 254]
    assert to_uint8(frames).shape == (1, 2, 3, 3)
    assert to_uint8(frames).dtype == torch.uint8


def test_uint8_survives_a_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(levels.float() / 255).permute(0, 3, 1, 2), levels)


def broken(value: float, at: str) -> object:
    backbone = oracle()
    if at == "unet":
        denoiser = backbone.unet
        backbone.unet = lambda *args: denoiser(*args) * value
    else:
        setattr(backbone.vae, at, lambda z, features: F.interpolate(z, scale_factor=4) * value)
    return backbone


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("at", "where"), [("unet", "latent after step 1 of 2"), ("decode", "decoded frames")])
def test_output_that_is_not_finite_is_refused(value: float, at: str, where: str) -> None:
    with pytest.raises(RestoreError) as caught:
        restore(broken(value, at), clip(2, 8, 8), SMALL, KeyedNoise(0, "a"), clip="real/bikes")
    message = str(caught.value)
    assert message.startswith(f"real/bikes: segment 0 (frames 0 to 1), image tile 0: {where}: ")
    assert message.endswith("values are NaN or infinite; check the weights or the quantized model")
    assert "\n" not in message


def test_saving_nan_is_refused() -> None:
    frames = torch.zeros(1, 3, 2, 2)
    frames[0, 0, 0, 0] = float("nan")
    with pytest.raises(RestoreError, match="frames: 1 of 12 values are NaN or infinite"):
        to_uint8(frames)


@pytest.mark.parametrize(
    ("lq", "message"),
    [
        (torch.zeros(3, 8, 8), r"a/b: LQ frames are \(3, 8, 8\) torch.float32; expected \(T, 3, H, W\) floating point in \[0, 1\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"a/b: LQ frames are \(2, 3, 8, 8\) torch.uint8; expected"),
        (torch.zeros(0, 3, 8, 8), r"a/b: LQ frames are \(0, 3, 8, 8\) torch.float32; expected"),
        (torch.full((1, 3, 8, 8), 255.0), r"a/b: LQ frames have values from 255 to 255; expected RGB in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), r"a/b: LQ frames have values from nan to nan; expected RGB in \[0, 1\]"),
    ],
)
def test_what_is_no_clip_is_refused(lq: torch.Tensor, message: str) -> None:
    with pytest.raises(RestoreError, match=message):
        restore(oracle(), lq, SMALL, KeyedNoise(0, "a"), clip="a/b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames_per_segment": 4}, "sampling.frames_per_segment is 4, but backbone oracle works on 5 frames"),
        ({"pad_multiple": 18}, "sampling.pad_multiple is 18, but backbone oracle needs a multiple of 4"),
        ({"image_tile": 98}, "sampling.image_tile is 98, but backbone oracle needs a multiple of 4"),
        ({"tile": 12}, "sampling.tile is 12, but backbone oracle needs a multiple of 8"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(RestoreError) as caught:
        restore(oracle(), clip(1, 8, 8), SMALL.model_copy(update=change), KeyedNoise(0, "a"))
    assert str(caught.value) == message


def test_a_latent_that_the_networks_cannot_halve_is_refused() -> None:
    with pytest.raises(RestoreError) as caught:
        restore(oracle(), clip(1, 8, 12), SMALL.model_copy(update={"pad_multiple": 16}), KeyedNoise(0, "a"), clip="a/b")
    assert str(caught.value) == (
        "a/b: 32x48 pixels make a latent 12 wide or high, but backbone oracle needs a multiple of 8; "
        "sampling.pad_multiple and sampling.image_tile that are multiples of 32 work"
    )


@pytest.mark.parametrize(("height", "width"), [(180, 320), (135, 240), (128, 128), (64, 32)])
def test_the_published_model_takes_the_published_sizes(height: int, width: int) -> None:
    """Padding to 32 leaves latents such as 92x164, which its three halvings do not divide; its tiles of 64 do."""
    check(SimpleNamespace(settings=BackboneSettings()), torch.zeros(1, 3, height, width), SamplingSettings(), "clip")
