"""Low-resolution frames to network input: upscaling, segments, padding, against the reference's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden import assert_close, load

from qvsr.models.pipeline import network_frames, segments
from qvsr.models.tiling import pad_to_multiple, padded_size


def test_upscaling_and_padding() -> None:
    meta, tensors = load("eval_lq")
    lq = tensors["lq"].permute(0, 3, 1, 2).float() / 255
    upscaled = network_frames(lq, meta["upscale"])
    named = {name: tensor for name, tensor in tensors.items() if name.startswith("upscaled_frame")}
    for name, expected in named.items():
        assert_close(upscaled[int(name.removeprefix("upscaled_frame"))].permute(1, 2, 0), expected, meta, name)
    before = F.interpolate(lq * 2 - 1, scale_factor=meta["upscale"], mode="bicubic", align_corners=False)
    for name in (name for name in tensors if name.startswith("upscaled_before_clamp_frame")):
        assert_close(before[int(name.rpartition("frame")[2])].permute(1, 2, 0), tensors[name], meta, name)
    last = segments(len(lq), meta["frames_per_segment"])[-1]
    multiple = common_multiple(meta)
    for name in (name for name in tensors if name.startswith("last_segment_padded_frame")):
        frame = last[int(name.rpartition("frame")[2])]
        assert_close(pad_to_multiple(upscaled[[frame]], multiple)[0], tensors[name], meta, name)


def common_multiple(meta: dict) -> int:
    """The multiple that padded sizes share, as the set's text says it."""
    text = " ".join(meta["info"])
    return int(text.partition("to multiples of ")[2].split()[0])


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
