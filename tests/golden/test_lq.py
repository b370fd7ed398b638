"""Low-resolution frames to network input: upscaling, segments, padding, against the reference's."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from golden import assert_close, load, matching

from qvsr.models.pipeline import network_frames, segments
from qvsr.models.tiling import pad_to_multiple, padded_size


def test_upscaling_and_padding() -> None:
    meta, tensors = load("eval_lq")
    lq = tensors["lq"].permute(0, 3, 1, 2).float() / 255
    upscaled = network_frames(lq, meta["upscale"])
    for (frame,), expected in matching(tensors, r"upscaled_frame(\d+)").items():
        assert_close(upscaled[int(frame)].permute(1, 2, 0), expected, meta, f"frame {frame}")
    before = F.interpolate(lq * 2 - 1, scale_factor=meta["upscale"], mode="bicubic", align_corners=False)
    for (frame,), expected in matching(tensors, r"upscaled_before_clamp_frame(\d+)").items():
        assert_close(before[int(frame)].permute(1, 2, 0), expected, meta, f"frame {frame} before the clamp")
    last = segments(len(lq), meta["frames_per_segment"])[-1]
    multiple = common_multiple(meta)
    for (place,), expected in matching(tensors, r"last_segment_padded_frame(\d+)").items():
        assert_close(pad_to_multiple(upscaled[[last[int(place)]]], multiple)[0], expected, meta, f"padded frame {place}")


def common_multiple(meta: dict) -> int:
    """The multiple that padded sizes share, as the set's text says it."""
    return int(re.findall(r"to multiples of (\d+)", " ".join(meta["info"]))[0])


def test_segments() -> None:
    meta, _ = load("eval_lq")
    for frames, expected in meta["segments_by_number_of_frames"].items():
        assert segments(int(frames), meta["frames_per_segment"]) == expected


def test_padded_sizes() -> None:
    meta, _ = load("eval_lq")
    for case in meta["spatial_padding"]:
        assert list(padded_size(*case["hw"], common_multiple(meta))) == case["padded_hw"]
        image = torch.zeros(1, 1, *case["hw"])
        assert list(pad_to_multiple(image, common_multiple(meta)).shape[-2:]) == case["padded_hw"]
