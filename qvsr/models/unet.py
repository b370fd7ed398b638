"""The inflated U-Net of MGLD-VSR (arXiv 2312.00853): SPADE structure conditioning, temporal layers in the middle.

Key names are those of the published checkpoint below ``model.diffusion_model.``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvsr.config import UNetSettings
from qvsr.models.layers import (
    Downsample,
    GroupNorm32,
    ResBlock,
    TemporalConv,
    Upsample,
    attend,
    clip_count,
    time_mlp,
    timestep_embedding,
    zero_,
)


class Spade(nn.Module):
    """Spatially adaptive normalisation: scale and shift come from the structure map of the same width."""

    def __init__(self, channels: int, semb_channels: int, hidden: int) -> None:
        super().__init__()
        self.param_free_norm = GroupNorm32(channels)  # the published name; it does have weight and bias
        self.mlp_shared = nn.Sequential(nn.Conv2d(semb_channels, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, h: Tensor, struct: dict[str, Tensor]) -> Tensor:
        a = self.mlp_shared(struct[str(h.shape[-1])])
        return self.param_free_norm(h) * (1 + self.mlp_gamma(a)) + self.mlp_beta(a)


class SpadeResBlock(ResBlock):
    """Residual block whose branch passes through SPADE before the skip is added."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, semb_channels: int, spade_channels: int) -> None:
        super().__init__(channels, out_channels, emb_channels)
        self.spade = Spade(out_channels, semb_channels, spade_channels)

    def forward(self, x: Tensor, emb: Tensor, struct: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.skip_connection(x) + self.spade(self.residual(x, emb), struct)


class Attention(nn.Module):
    """Multi-head attention with separate linear projections; queries from one sequence, keys and values from another."""

    def __init__(self, channels: int, context_dim: int, head_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GatedGelu(nn.Module):
    """Linear layer whose first half of outputs is gated by the GELU of the second."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        opened = F.gelu(gate)
        return value * opened if torch.is_grad_enabled() else opened.mul_(value)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GatedGelu(channels, 4 * channels), nn.Dropout(0.0), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text context, feed-forward; each with its norm and skip."""

    def __init__(self, channels: int, context_dim: int, head_channels: int) -> None:
        super().__init__()
        self.attn1 = Attention(channels, channels, head_channels)
        self.attn2 = Attention(channels, context_dim, head_channels)
        self.ff = FeedForward(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, u: Tensor, context: Tensor) -> Tensor:
        n = self.norm1(u)
        u = u + self.attn1(n, n)
        u = u + self.attn2(self.norm2(u), context)
        return u + self.ff(self.norm3(u))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of each frame, with linear projections around it."""

    def __init__(self, channels: int, context_dim: int, head_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, head_channels)])
        self.proj_out = zero_(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        rows = x.shape[0]
        if context.shape[0] != rows:  # one context for all, or one a clip: row b serves the frames of clip b
            context = context[:, None].expand(-1, rows // context.shape[0], -1, -1).flatten(0, 1)
        u = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            u = block(u, context)
        return x + self.proj_out(u).transpose(1, 2).reshape(x.shape)


class TemporalAttention(nn.Module):
    """Attention over the frames at every pixel, mixed with its input by a learned weight as in :class:`TemporalConv`."""

    def __init__(self, channels: int, head_channels: int, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.norm = nn.LayerNorm(channels)
        self.temporal_attn = Attention(channels, channels, head_channels)
        self.temporal_alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        clips = clip_count(rows, self.num_frames)
        tokens = x.reshape(clips, rows // clips, channels, height * width).permute(0, 3, 1, 2).flatten(0, 1)
        n = self.norm(tokens)
        mixed = self.temporal_attn(n, n).unflatten(0, (clips, height * width)).permute(0, 2, 3, 1).reshape(x.shape)
        return self.temporal_alpha * mixed + (1 - self.temporal_alpha) * x


class Block(nn.Sequential):
    """A sequence whose members get what they need of (x, emb, context, struct)."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, struct: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, SpadeResBlock):
                x = layer(x, emb, struct)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class InflatedUNet(nn.Module):
    """Predicts the noise (or v) of a segment of latents.

    >>> from qvsr.config import UNetSettings
    >>> s = UNetSettings(model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(1,),
    ...                  num_head_channels=16, context_dim=8, semb_channels=8)
    >>> net = InflatedUNet(s)
    >>> struct = {"8": torch.zeros(5, 8, 8, 8), "4": torch.zeros(5, 8, 4, 4)}
    >>> net(torch.zeros(5, 4, 8, 8), torch.tensor([7]), torch.zeros(1, 3, 8), struct).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(self, settings: UNetSettings) -> None:
        super().__init__()
        s = self.settings = settings
        emb = 4 * s.model_channels
        levels = range(len(s.channel_mult))

        def res(channels: int, out: int) -> SpadeResBlock:
            return SpadeResBlock(channels, out, emb, s.semb_channels, s.spade_channels)

        def transformer(channels: int) -> SpatialTransformer:
            return SpatialTransformer(channels, s.context_dim, s.num_head_channels)

        def attention_at(level: int, channels: int) -> Iterator[nn.Module]:
            if 2**level in s.attention_resolutions:
                yield transformer(channels)

        self.time_embed = time_mlp(s.model_channels)

        channels = s.model_channels
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(s.in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level in levels:
            width = s.model_channels * s.channel_mult[level]
            for _ in range(s.num_res_blocks):
                self.input_blocks.append(Block(res(channels, width), *attention_at(level, width)))
                channels = width
                skips.append(channels)
            if level < levels[-1]:
                self.input_blocks.append(Block(Downsample(channels)))
                skips.append(channels)

        self.middle_block = Block(
            res(channels, channels),
            TemporalConv(channels, s.num_frames),
            transformer(channels),
            TemporalAttention(channels, s.num_head_channels, s.num_frames),
            res(channels, channels),
            TemporalConv(channels, s.num_frames),
        )

        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            width = s.model_channels * s.channel_mult[level]
            for i in range(s.num_res_blocks + 1):
                layers: list[nn.Module] = [res(channels + skips.pop(), width), *attention_at(level, width)]
                channels = width
                if i == s.num_res_blocks and level > 0:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), zero_(nn.Conv2d(channels, s.out_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, struct: dict[str, Tensor]) -> Tensor:
        """Network output for noisy latents.

        Args:
            x: (B*T, C, H, W); H and W multiples of 2**(levels-1).
            t: original timesteps, length 1 or B*T.
            context: (1, N, D), (B, N, D) or (B*T, N, D).
            struct: structure maps by width, as :class:`qvsr.models.structure.StructureEncoder` returns them.
        Returns:
            eps or v, (B*T, out_channels, H, W), of x's type; in between all is of the type that the norms' weights have.
        """
        dtype = self.out[0].weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.settings.model_channels).to(dtype))
        context, struct = context.to(dtype), {width: maps.to(dtype) for width, maps in struct.items()}
        skips = []
        h = x.to(dtype)
        for block in self.input_blocks:
            h = block(h, emb, context, struct)
            skips.append(h)
        h = self.middle_block(h, emb, context, struct)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context, struct)
        return self.out(h).to(x.dtype)
