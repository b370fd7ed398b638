"""Ancestral sampling of one image tile: a tiled network, the posterior of each step, motion guidance (arXiv 2312.00853).

The loop is :func:`trajectory`. The latent of a tile, `x`, is (T, C, h, w) for one segment of T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from qvsr.config import SamplingSettings
from qvsr.kernels.graphs import recorded
from qvsr.models.flow import occlusion, resize_flow, warp
from qvsr.models.schedule import Schedule
from qvsr.models.tiling import Blend, Box, gaussian_weights, latent_boxes

if TYPE_CHECKING:
    from qvsr.models.checkpoints import Backbone


@dataclass(frozen=True)
class NetworkCall:
    """One call of the U-Net, as it happened.

    Attributes:
        step: index in the respaced schedule, steps-1 … 0.
        timestep: what the networks were given, 0 … 999.
        x: (T, in_channels, h, w), the U-Net's input: the noisy latent tile, with the LQ latent behind it if it is concatenated.
        lq_latent: (T, C, h, w), the LQ latent tile, from which (with the timestep) the structure features come.
        output: (T, C, h, w), what the U-Net returned.
        tile: number of the latent tile in the image tile.
        clip, segment, patch: where in a clip it happened; filled in by the pipeline.
    """

    step: int
    timestep: int
    x: Tensor
    lq_latent: Tensor
    output: Tensor
    tile: int
    clip: str = ""
    segment: int = 0
    patch: int = 0


@dataclass(frozen=True)
class Motion:
    """Flows and occlusions between neighbouring frames on the latent grid.

    Attributes:
        forward: (B, T-1, 2, h, w), frame i to i+1 ("for backward propagation").
        backward: (B, T-1, 2, h, w), frame i+1 to i ("for forward propagation").
        forward_occluded: (B, T-1, 1, h, w), 1 where frame i is not seen in i+1.
        backward_occluded: (B, T-1, 1, h, w), 1 where frame i+1 is not seen in i.
    """

    forward: Tensor
    backward: Tensor
    forward_occluded: Tensor
    backward_occluded: Tensor

    @classmethod
    def from_flows(cls, forward: Tensor, backward: Tensor, height: int, width: int) -> Motion:
        """Motion of one segment from flows (T-1, 2, H, W) of any size, resized to the latent's and checked there."""
        forward, backward = resize_flow(forward, height, width), resize_flow(backward, height, width)
        masks = occlusion(forward, backward)
        return cls(forward[None], backward[None], masks[0][None, :, None], masks[1][None, :, None])

    def cut(self, box: Box) -> Motion:
        """The motion of one tile."""
        return Motion(*(box.cut(x) for x in (self.forward, self.backward, self.forward_occluded, self.backward_occluded)))


def motion_loss(x: Tensor, motion: Motion, pairs: Literal["published", "aligned"] = "published") -> Tensor:
    """How much neighbouring frames differ after warping: mean |(1 - occluded) (warped neighbour - frame)|, summed over pairs and directions.

    ``aligned`` warps frame i+1 to frame i with the flow of that pair, and frame i to i+1 likewise.

    ``published`` keeps the released loop's quirks, with which the networks were evaluated: it carries a frame one round too far.
    Backward, i = T-2 … 0, frame i is compared with x[i+1] warped by forward[i+1], the flow of the *next* pair, and in the
    first round with zero, which pulls x[T-2] to zero. The forward pass, i = 1 … T-1, mirrors it with x[i-1] and backward[i-2].

    Args:
        x: (B*T, C, h, w), frame fastest.
    Returns:
        scalar, the sum over both passes.
    """
    clips, frames = motion.forward.shape[0], motion.forward.shape[1] + 1
    late = int(pairs == "published")
    z = x.view(clips, frames, *x.shape[1:])
    loss = x.new_zeros(())
    for i in range(frames - 2, -1, -1):
        flow = i + late
        carried = warp(z[:, i + 1], motion.forward[:, flow]) if flow < frames - 1 else torch.zeros_like(z[:, i])
        loss = loss + ((1 - motion.forward_occluded[:, i]) * (carried - z[:, i])).abs().mean()
    for i in range(1, frames):
        flow = i - 1 - late
        carried = warp(z[:, i - 1], motion.backward[:, flow]) if flow >= 0 else torch.zeros_like(z[:, i])
        loss = loss + ((1 - motion.backward_occluded[:, i - 1]) * (carried - z[:, i])).abs().mean()
    return loss


def guide(x: Tensor, motion: Motion, scale: float, log_variance: float, pairs: Literal["published", "aligned"] = "published") -> Tensor:
    """One gradient step on :func:`motion_loss`: x - scale * log variance * gradient.

    The weight is the *logarithm* of the posterior variance, as published: negative, so that with a negative scale the step
    descends, and largest (-46) in the last step, where the variance itself is 0.
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(motion_loss(leaf, motion, pairs), leaf)
    return x - scale * log_variance * gradient


def tiled_output(
    backbone: Backbone,
    x: Tensor,
    lq_latent: Tensor,
    step: int,
    timestep: int,
    tiles: Sequence[Box],
    unet: Callable[..., Tensor],
    observe: Callable[[NetworkCall], None] | None = None,
) -> Tensor:
    """The U-Net's output on overlapping tiles, blended with Gaussian weights.

    Tiles run one at a time: an activation range that is taken over a call is then that of one tile. The structure features
    are computed anew for each tile and step, since they depend on the tile's part of the LQ latent and on the timestep.

    Args:
        unet: the calls of the backbone's U-Net (:func:`qvsr.kernels.graphs.recorded`).
    """
    t = torch.tensor([timestep], device=x.device)
    weight = gaussian_weights(tiles[0].right - tiles[0].left, tiles[0].bottom - tiles[0].top).to(x.device)
    blend = Blend(x)
    for number, box in enumerate(tiles):
        x_tile, lq_tile = box.cut(x), box.cut(lq_latent)
        unet_input = torch.cat([x_tile, lq_tile], dim=1) if backbone.settings.concat_lq else x_tile
        output = unet(unet_input, t, backbone.context, backbone.structure(lq_tile, t), timestep=timestep)
        if observe is not None:
            observe(NetworkCall(step, timestep, unet_input, lq_tile, output, number))
        blend.add(box, output, weight)
    return blend.result()


@torch.no_grad()
def trajectory(
    backbone: Backbone,
    lq_latent: Tensor,
    sampling: SamplingSettings,
    draw: Callable[[str, Sequence[int], int], Tensor],
    motion: Motion | None = None,
    observe: Callable[[NetworkCall], None] | None = None,
) -> Iterator[Tensor]:
    """Latents of one image tile after each sampling step; the last one is the result.

    Args:
        lq_latent: (T, C, h, w), latent of the upscaled LQ frames, times the scale factor.
        draw: (kind, shape, step) to standard normal noise; kind "start" once, then "step" for every step.
        motion: flows on the latent grid; None leaves guidance out.
        observe: called after every call of the U-Net.
    """
    full = Schedule(backbone.settings.schedule)
    schedule = full.for_sampling(sampling.steps)
    tiles = latent_boxes(lq_latent.shape[-2], lq_latent.shape[-1], sampling.tile, sampling.tile_overlap)
    unet = recorded(backbone.unet)
    x = full.start(lq_latent, draw("start", lq_latent.shape, -1).to(lq_latent))
    for step in reversed(range(len(schedule))):
        output = tiled_output(backbone, x, lq_latent, step, schedule.timesteps[step], tiles, unet, observe)
        x0 = schedule.predict_x0(x, output, step)
        log_variance = schedule.posterior_log_variance_clipped[step]
        # The last step adds no noise; drawing it all the same keeps the published order of draws.
        sigma = (0.5 * log_variance).exp().item() if step > 0 else 0.0
        x = schedule.posterior_mean(x0, x, step) + sigma * draw("step", x.shape, step).to(x)
        if motion is not None and sampling.guidance_scale != 0:
            x = guide(x, motion, sampling.guidance_scale, log_variance.item(), sampling.guidance_pairs)
        yield x
