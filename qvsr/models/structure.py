"""The structure encoder of MGLD-VSR (arXiv 2312.00853; StableSR's time-aware encoder, arXiv 2305.07015).

Key names are those of the published checkpoint below ``structcond_stage_model.``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qvsr.config import StructureSettings
from qvsr.models.layers import Downsample, GroupNorm32, ResBlock, time_mlp, timestep_embedding, zero_


class PixelAttention(nn.Module):
    """Self-attention over the pixels of a frame; query, key and value of a head lie together in one projection."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2)).unflatten(1, (self.heads, 3, -1)).transpose(-1, -2)
        q, k, v = qkv.unbind(2)  # each (rows, heads, pixels, head width)
        out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        return x + self.proj_out(out).reshape(x.shape)


class Block(nn.Sequential):
    """A sequence whose residual blocks also get the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class StructureEncoder(nn.Module):
    """Half a U-Net over the clean LQ latent; its features steer the denoiser at every scale.

    >>> import torch
    >>> from qvsr.config import StructureSettings
    >>> s = StructureSettings(model_channels=32, out_channels=8, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(1,))
    >>> maps = StructureEncoder(s)(torch.zeros(2, 4, 4, 8), torch.tensor([3]))
    >>> {width: tuple(m.shape) for width, m in maps.items()}
    {'8': (2, 8, 4, 8), '4': (2, 8, 2, 4)}
    """

    def __init__(self, settings: StructureSettings) -> None:
        super().__init__()
        s = self.settings = settings
        emb = 4 * s.model_channels
        self.time_embed = time_mlp(s.model_channels)

        channels = s.model_channels
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(s.in_channels, channels, 3, padding=1))])
        tapped = []
        for level, mult in enumerate(s.channel_mult):
            width = s.model_channels * mult
            for _ in range(s.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(channels, width, emb)]
                channels = width
                if 2**level in s.attention_resolutions:
                    layers.append(PixelAttention(channels, s.num_heads))
                self.input_blocks.append(Block(*layers))
            tapped.append(channels)
            if level < len(s.channel_mult) - 1:
                self.input_blocks.append(Block(Downsample(channels)))
        self.middle_block = Block(
            ResBlock(channels, channels, emb), PixelAttention(channels, s.num_heads), ResBlock(channels, channels, emb)
        )
        self.fea_tran = nn.ModuleList(ResBlock(width, s.out_channels, emb) for width in tapped)

    def forward(self, z: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Structure maps of the LQ latent.

        Args:
            z: (B*T, C, H, W), the clean LQ latent, already times the scale factor.
            t: original timesteps, length 1 or B*T.
        Returns:
            {str(width): (B*T, out_channels, h, w)}, one entry a level, keyed by the width alone.
        """
        emb = self.time_embed(timestep_embedding(t, self.settings.model_channels).to(self.time_embed[0].weight.dtype))
        taps = []
        h = z
        for block in self.input_blocks:
            if isinstance(block[0], Downsample):
                taps.append(h)
            h = block(h, emb)
        taps.append(self.middle_block(h, emb))
        return {str(tap.shape[-1]): tran(tap, emb) for tap, tran in zip(taps, self.fea_tran, strict=True)}
