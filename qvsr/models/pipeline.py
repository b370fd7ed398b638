"""From a low-quality clip to a restored one: segments, image tiles, latents, sampling, decoding, colour (arXiv 2312.00853).

Frames are in [0, 1] at the border of this module and in [-1, 1] inside. Memory is that of one segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qvsr.config import SamplingSettings
from qvsr.models.colour import COLOUR_FIXES
from qvsr.models.flow import FlowFunction
from qvsr.models.noise import NoiseSource
from qvsr.models.sampler import Motion, NetworkCall, trajectory
from qvsr.models.tiling import Blend, Box, boxes, latent_boxes, pad_to_multiple, padded_size, reduced_boxes

if TYPE_CHECKING:
    from qvsr.models.checkpoints import Backbone

FLOW_REDUCTION = 4  # flow is estimated on frames reduced by this, whatever the upscale factor


class RestoreError(ValueError):
    """A clip cannot be restored; one line that says which part and what was found."""


@dataclass(frozen=True)
class PatchResult:
    """What one image tile went through.

    Attributes:
        box: the tile's place in the padded image.
        lq_latent: (T, C, h, w), sampled from the encoder's posterior and scaled.
        latent: (T, C, h, w), the result of sampling, scaled.
        frames: (T, 3, H, W), decoded and colour-fixed, about [-1, 1], not clamped.
    """

    segment: int
    patch: int
    box: Box
    lq_latent: Tensor
    latent: Tensor
    frames: Tensor


def bicubic_upscale(frames_TCHW: Tensor, upscale: int = 4) -> Tensor:
    """Bicubic enlargement (a = -0.75, align_corners=False, no antialias), clamped to [0, 1]; the table's row `bicubic`."""
    return F.interpolate(frames_TCHW, scale_factor=upscale, mode="bicubic", align_corners=False).clamp(0, 1)


def network_frames(lq_TCHW: Tensor, upscale: int) -> Tensor:
    """LQ frames in [0, 1] as the networks see them: in [-1, 1], enlarged bicubically, clamped."""
    return F.interpolate(lq_TCHW * 2 - 1, scale_factor=upscale, mode="bicubic", align_corners=False).clamp(-1, 1)


def segments(frames: int, length: int) -> list[list[int]]:
    """Frame numbers of every segment: disjoint, the last one filled up by repeating the last frame.

    >>> segments(7, 5), segments(2, 5)
    ([[0, 1, 2, 3, 4], [5, 6, 6, 6, 6]], [[0, 1, 1, 1, 1]])
    """
    return [[min(frame, frames - 1) for frame in range(start, start + length)] for start in range(0, frames, length)]


def to_uint8(frames_TCHW: Tensor, rounding: Literal["truncate", "round"] = "round") -> Tensor:
    """Frames in [0, 1] as (T, H, W, 3) uint8.

    Args:
        rounding: "round" to the nearest, halves to even; "truncate" as the released script does, 0.5 levels darker on average.
    Raises:
        RestoreError: a value is NaN or infinite.
    """
    _refuse_not_finite(frames_TCHW, "frames")
    scaled = frames_TCHW.clamp(0, 1).permute(0, 2, 3, 1) * 255
    return (scaled.round() if rounding == "round" else scaled).to(torch.uint8)


def restore(
    backbone: Backbone,
    lq_TCHW: Tensor,
    sampling: SamplingSettings,
    noise: NoiseSource,
    flow: FlowFunction | None = None,
    observe: Callable[[NetworkCall], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    clip: str = "clip",
    on_patch: Callable[[PatchResult], None] | None = None,
) -> Tensor:
    """Restores a clip.

    Args:
        backbone: networks, context and settings; its device and precision are used.
        lq_TCHW: low-quality frames, RGB in [0, 1], any number of frames.
        sampling: steps, tiles, guidance, colour fix.
        noise: where random numbers come from.
        flow: estimates motion on the input; None leaves motion guidance out.
        observe: called after every call of the U-Net with what went in and came out.
        progress: called with (calls of the U-Net done, calls in all).
        clip: the clip's name, for messages.
        on_patch: called with what every image tile went through.
    Returns:
        (T, 3, upscale*H, upscale*W) float32 in [0, 1] on the input's device.
    Raises:
        RestoreError: the input is no such clip, a size in the settings cannot work, or the output is not finite.
    """
    pieces = list(restore_segments(backbone, lq_TCHW, sampling, noise, flow, observe, progress, clip, on_patch))
    return torch.cat(pieces).to(lq_TCHW.device)


@torch.no_grad()
def restore_segments(
    backbone: Backbone,
    lq_TCHW: Tensor,
    sampling: SamplingSettings,
    noise: NoiseSource,
    flow: FlowFunction | None = None,
    observe: Callable[[NetworkCall], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    clip: str = "clip",
    on_patch: Callable[[PatchResult], None] | None = None,
) -> Iterator[Tensor]:
    """The same as :func:`restore`, segment by segment: memory does not grow with the clip.

    Yields:
        (frames of the segment, 3, H, W) in [0, 1] on the CPU; the frames that filled up the last segment are dropped.
    """
    check(backbone, lq_TCHW, sampling, clip)
    length, upscale = sampling.frames_per_segment, sampling.upscale
    height, width = lq_TCHW.shape[-2] * upscale, lq_TCHW.shape[-1] * upscale
    factor = backbone.settings.first_stage.factor
    tile, stride = sampling.image_tile, sampling.image_tile_stride
    padded = padded_size(height, width, sampling.pad_multiple)
    plan = list(zip(boxes(*padded, tile, stride), reduced_boxes(*padded, tile, stride, factor), strict=True))
    step_done = _counter(progress, network_calls(lq_TCHW.shape[-2], lq_TCHW.shape[-1], len(lq_TCHW), sampling, factor))

    for segment, numbers in enumerate(segments(lq_TCHW.shape[0], length)):
        lq = lq_TCHW[numbers].to(backbone.context.device, torch.float32)
        image = pad_to_multiple(network_frames(lq, upscale), sampling.pad_multiple)
        motion = segment_motion(image, flow, factor) if flow is not None and sampling.guidance_scale != 0 else None
        blend = Blend(image)
        for patch, (box, latent_box) in enumerate(plan):

            def seen(call: NetworkCall, segment: int = segment, patch: int = patch) -> None:
                if observe is not None:
                    observe(replace(call, clip=clip, segment=segment, patch=patch))
                step_done()

            def draw(kind: str, shape: Sequence[int], step: int, segment: int = segment, patch: int = patch) -> Tensor:
                return noise.draw(kind, tuple(shape), segment=segment, patch=patch, step=step)

            where = f"{clip}: segment {segment} (frames {numbers[0]} to {numbers[-1]}), image tile {patch}"
            cut_motion = motion.cut(latent_box) if motion is not None else None
            result = restore_patch(backbone, box.cut(image), sampling, draw, cut_motion, seen, where)
            if on_patch is not None:
                on_patch(PatchResult(segment, patch, box, *result))
            blend.add(box, result[-1])
        frames = blend.result()[: len(set(numbers)), :, :height, :width]
        yield ((frames + 1) / 2).clamp(0, 1).cpu()


def restore_patch(
    backbone: Backbone,
    image: Tensor,
    sampling: SamplingSettings,
    draw: Callable[[str, Sequence[int], int], Tensor],
    motion: Motion | None = None,
    observe: Callable[[NetworkCall], None] | None = None,
    where: str = "clip",
) -> tuple[Tensor, Tensor, Tensor]:
    """One image tile of one segment: encode, sample, decode with the tile's own features, fix the colour.

    Args:
        image: (T, 3, H, W) in [-1, 1].
        where: names the tile in messages.
    Returns:
        LQ latent, sampled latent (both scaled) and frames in about [-1, 1].
    """
    scale = backbone.settings.scale_factor
    posterior, features = backbone.first_stage.encode(image)
    # A random draw, not the mode: that is how the published model conditions.
    lq_latent = posterior.sample(draw("posterior", posterior.mean.shape, -1).to(posterior.mean)) * scale
    _refuse_not_finite(lq_latent, f"{where}: LQ latent")
    latent = lq_latent
    for number, latent in enumerate(trajectory(backbone, lq_latent, sampling, draw, motion, observe), start=1):
        _refuse_not_finite(latent, f"{where}: latent after step {number} of {sampling.steps}")
    if backbone.vae is not backbone.first_stage:
        _, features = backbone.vae.encode(image)
    decoded = backbone.vae.decode(latent / scale, features)
    frames = COLOUR_FIXES[sampling.colour_fix](decoded, image)
    _refuse_not_finite(frames, f"{where}: decoded frames")
    return lq_latent, latent, frames


def segment_motion(image: Tensor, flow: FlowFunction, factor: int) -> Motion | None:
    """Flow between the frames of a segment on a quarter of their size, resized to the latent's, with occlusions there.

    Args:
        image: (T, 3, H, W) in [-1, 1], padded.
        factor: pixels a latent pixel.
    Returns:
        motion on (H / factor, W / factor); None for a single frame.
    """
    frames, _, height, width = image.shape
    if frames < 2:
        return None
    reduced = F.interpolate((image + 1) / 2, size=(height // FLOW_REDUCTION, width // FLOW_REDUCTION), mode="bicubic", align_corners=False)
    forward, backward = flow(reduced)
    return Motion.from_flows(forward.to(image), backward.to(image), height // factor, width // factor)


def network_calls(height: int, width: int, frames: int, sampling: SamplingSettings, factor: int) -> int:
    """Calls of the U-Net that a clip of LQ size (height, width) takes."""
    padded = padded_size(height * sampling.upscale, width * sampling.upscale, sampling.pad_multiple)
    calls = 0
    for box in boxes(*padded, sampling.image_tile, sampling.image_tile_stride):
        rows, columns = min(box.bottom, padded[0]) - box.top, min(box.right, padded[1]) - box.left
        calls += len(latent_boxes(rows // factor, columns // factor, sampling.tile, sampling.tile_overlap))
    return len(segments(frames, sampling.frames_per_segment)) * sampling.steps * calls


def check(backbone: Backbone, lq_TCHW: Tensor, sampling: SamplingSettings, clip: str) -> None:
    """Refuses a clip or settings that cannot work.

    Raises:
        RestoreError: what was found and what would work.
    """
    if lq_TCHW.dim() != 4 or lq_TCHW.shape[1] != 3 or 0 in lq_TCHW.shape or not lq_TCHW.is_floating_point():
        raise RestoreError(f"{clip}: LQ frames are {tuple(lq_TCHW.shape)} {lq_TCHW.dtype}; expected (T, 3, H, W) floating point in [0, 1]")
    low, high = (value.item() for value in lq_TCHW.aminmax())
    if not 0 <= low <= high <= 1:
        raise RestoreError(f"{clip}: LQ frames have values from {low:g} to {high:g}; expected RGB in [0, 1]")
    settings = backbone.settings
    if sampling.frames_per_segment != settings.unet.num_frames:
        raise RestoreError(
            f"sampling.frames_per_segment is {sampling.frames_per_segment}, but backbone {settings.name} works on "
            f"{settings.unet.num_frames} frames"
        )
    levels, factor = 2 ** (max(len(settings.unet.channel_mult), len(settings.structure.channel_mult)) - 1), settings.first_stage.factor
    for name, value, multiple in (
        ("pad_multiple", sampling.pad_multiple, factor),
        ("image_tile", sampling.image_tile, factor),
        ("tile", sampling.tile, levels),
    ):
        if value % multiple:
            raise RestoreError(f"sampling.{name} is {value}, but backbone {settings.name} needs a multiple of {multiple}")
    # The networks see latent tiles. One is smaller than `tile` only where the latent is, and must be halved without remainder as well.
    height, width = (side * sampling.upscale for side in lq_TCHW.shape[-2:])
    for side in padded_size(height, width, sampling.pad_multiple):
        latent = min(side, sampling.image_tile) // factor
        if latent < sampling.tile and latent % levels:
            raise RestoreError(
                f"{clip}: {height}x{width} pixels make a latent {latent} wide or high, but backbone {settings.name} needs a multiple of "
                f"{levels}; sampling.pad_multiple and sampling.image_tile that are multiples of {levels * factor} work"
            )


def _refuse_not_finite(x: Tensor, what: str) -> None:
    bad = x.numel() - int(torch.isfinite(x).sum())
    if bad:
        raise RestoreError(f"{what}: {bad} of {x.numel()} values are NaN or infinite; check the weights or the quantized model")


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    done = 0

    def step_done() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return step_done
