"""Layers that the U-Net, the structure encoder and the autoencoders share.

Module names are those of the published checkpoints, so that a state dict loads without renaming; that is why some
``nn.Sequential`` keep entries without parameters. Frames lie in the batch axis, frame fastest: row ``b * T + t`` is
frame ``t`` of clip ``b``.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32


class GroupNorm32(nn.GroupNorm):
    """GroupNorm of 32 groups; sums are float32 and the result has the input's type, whatever that is."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        # A channel count that 32 does not divide occurs in narrow structure encoders only; the published code then
        # normalises every channel by itself.
        super().__init__(GROUPS if channels % GROUPS == 0 else channels, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        # torch's kernels accumulate in float32 themselves; autocast would widen the whole map first, which costs more
        # memory traffic than the norm. The meta device, where costs are counted, has no autocast.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def zero_(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero, so that a residual branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of diffusion timesteps, cosines first (as in arXiv 2006.11239's code lineage).

    Args:
        t: original timesteps 0 … 999, shape (rows,).
        dim: width of the embedding.
    Returns:
        (rows, dim) float32.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def time_mlp(dim: int) -> nn.Sequential:
    """The two layers that turn a timestep embedding of width `dim` into one of 4 `dim`."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention of tokens, heads side by side in the channels.

    Args:
        q: (B, Nq, A*D); k, v: (B, Nk, A*D).
    Returns:
        (B, Nq, A*D).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded on all four sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class ResBlock(nn.Module):
    """Residual block that adds the time embedding before its second norm.

    `modulate` is a hook for what follows the second convolution: SPADE in the U-Net, nothing in the structure encoder.
    """

    def __init__(self, channels: int, out_channels: int, emb_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels), nn.SiLU(), nn.Dropout(0.0), zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def residual(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        h = h + self.emb_layers(emb)[:, :, None, None].to(h.dtype)
        return self.out_layers(h)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.skip_connection(x) + self.residual(x, emb)


class TemporalConv(nn.Module):
    """Convolution over three neighbouring frames, mixed with its input by a learned weight.

    The mix is ``a * conv(x) + (1 - a) * x`` with `a` used raw. A fresh layer starts at a = 0, the identity: the published
    code leaves it uninitialised until a checkpoint is loaded.
    """

    def __init__(self, channels: int, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.temporal_conv = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.temporal_alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        clips = clip_count(x.shape[0], self.num_frames)
        x_BCTHW = x.unflatten(0, (clips, -1)).transpose(1, 2)
        mixed = self.temporal_conv(x_BCTHW).transpose(1, 2).flatten(0, 1)
        return self.temporal_alpha * mixed + (1 - self.temporal_alpha) * x


def clip_count(rows: int, num_frames: int) -> int:
    """How many clips lie in a batch of `rows` frames; what does not fill a clip goes to the others, as published."""
    clips = rows // num_frames
    if clips == 0 or rows % clips:
        raise ValueError(f"{rows} frames in the batch, temporal layers need clips of {num_frames}: pad the clip")
    return clips
