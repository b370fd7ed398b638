"""The image autoencoder and the video autoencoder whose decoder mixes frames and fuses encoder features.

Key names are those of the published checkpoints (``first_stage_model.`` and the separate video autoencoder file). Images
are in [-1, 1]; rows are frames. The scale factor of the latent is applied outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvsr.config import AutoencoderSettings
from qvsr.models.layers import TemporalConv, Upsample


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


@dataclass(frozen=True)
class Posterior:
    """The encoder's Gaussian over latents; `logvar` is clamped to [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for standard normal `noise` of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class ResnetBlock(nn.Module):
    """Residual block without time embedding; `shortcut` names the 1x1 convolution where the width changes."""

    def __init__(self, channels: int, out_channels: int, shortcut: str = "nin_shortcut") -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = shortcut if channels != out_channels else None
        if self.shortcut:
            self.add_module(self.shortcut, nn.Conv2d(channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.get_submodule(self.shortcut)(x) if self.shortcut else x) + h


class MidAttention(nn.Module):
    """Single-head self-attention over the positions of a frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (layer(n).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = MidAttention(channels)
        self.block_2 = ResnetBlock(channels, channels)


class AsymmetricDownsample(nn.Module):
    """Stride 2 with the zero padding on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Encoder(nn.Module):
    """Image to moments, and the features of level 1 and 2 that the video decoder fuses."""

    def __init__(self, s: AutoencoderSettings) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(s.in_channels, s.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = s.ch
        for level, mult in enumerate(s.ch_mult):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(s.num_res_blocks):
                stage.block.append(ResnetBlock(channels, s.ch * mult))
                channels = s.ch * mult
            if level < len(s.ch_mult) - 1:
                stage.downsample = AsymmetricDownsample(channels)
            self.down.append(stage)
        self.mid = Middle(channels)
        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * s.z_channels, 3, padding=1)
        if s.linear_shortcut:
            self.linear_shortcut = nn.Conv2d(s.in_channels * s.factor**2, 2 * s.z_channels, 1)
            self.factor = s.factor

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        h = self.conv_in(x)
        for level, stage in enumerate(self.down):
            for block in stage.block:
                h = block(h)
            if level in (1, 2):
                features.append(h)
            if level < len(self.down) - 1:
                h = stage.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        out = self.conv_out(F.silu(self.norm_out(h)))
        if hasattr(self, "linear_shortcut"):
            out = out + self.linear_shortcut(F.pixel_unshuffle(x, self.factor))
        return out, features


class Decoder(nn.Module):
    """Latents to image, frame by frame."""

    def __init__(self, s: AutoencoderSettings) -> None:
        super().__init__()
        self.levels = len(s.ch_mult)
        channels = s.ch * s.ch_mult[-1]
        self.conv_in = nn.Conv2d(s.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels)
        self.up = nn.ModuleList(nn.Module() for _ in s.ch_mult)
        for level in reversed(range(self.levels)):
            stage, width = self.up[level], s.ch * s.ch_mult[level]
            stage.block = nn.ModuleList()
            for _ in range(s.num_res_blocks + 1):
                stage.block.append(ResnetBlock(channels, width))
                channels = width
            if level > 0:
                stage.upsample = Upsample(channels)
        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, s.out_ch, 3, padding=1)
        if s.linear_shortcut:
            self.linear_shortcut = nn.Conv2d(s.z_channels, s.out_ch * s.factor**2, 1)
            self.factor = s.factor

    def middle(self, h: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))

    def stage(self, h: Tensor, level: int) -> Tensor:
        for block in self.up[level].block:
            h = block(h)
        return h

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.conv_in(z))
        for level in reversed(range(self.levels)):
            h = self.stage(h, level)
            if level > 0:
                h = self.up[level].upsample(h)
        return self.finish(h, z)

    def finish(self, h: Tensor, z: Tensor) -> Tensor:
        out = self.conv_out(F.silu(self.norm_out(h)))
        if hasattr(self, "linear_shortcut"):
            out = out + F.pixel_shuffle(self.linear_shortcut(z), self.factor)
        return out


class DenseBlock(nn.Module):
    """Five convolutions, each reading all before it (arXiv 1809.00219)."""

    def __init__(self, channels: int, growth: int = 32) -> None:
        super().__init__()
        for i in range(1, 6):
            conv = nn.Conv2d(channels + (i - 1) * growth, channels if i == 5 else growth, 3, padding=1)
            if not conv.weight.is_meta:  # there are no values to draw, and trying loads torch's compiler: 1.5 s
                nn.init.kaiming_normal_(conv.weight)
                conv.weight.data *= 0.1
            nn.init.zeros_(conv.bias)
            self.add_module(f"conv{i}", conv)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for i in range(1, 5):
            seen = torch.cat([seen, F.leaky_relu(self.get_submodule(f"conv{i}")(seen), 0.2)], dim=1)
        return x + 0.2 * self.conv5(seen)


class Fusion(nn.Module):
    """What the encoder's feature adds to the decoder's (arXiv 2305.07015, Sec. 3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encode_enc_1 = ResnetBlock(2 * channels, channels, shortcut="conv_out")
        self.encode_enc_2 = nn.Sequential(DenseBlock(channels), DenseBlock(channels))
        self.encode_enc_3 = ResnetBlock(channels, channels)

    def forward(self, feature: Tensor, h: Tensor) -> Tensor:
        return self.encode_enc_3(self.encode_enc_2(self.encode_enc_1(torch.cat([feature, h], dim=1))))


class VideoDecoder(Decoder):
    """The decoder with a temporal convolution after every block and fusion of encoder features in the inner levels."""

    def __init__(self, s: AutoencoderSettings) -> None:
        super().__init__(s)
        self.temporal_mixing = TemporalConv(s.ch * s.ch_mult[-1], s.num_frames)
        for level, mult in enumerate(s.ch_mult):
            width = s.ch * mult
            self.up[level].temporal_mixing = nn.ModuleList(TemporalConv(width, s.num_frames) for _ in range(s.num_res_blocks + 1))
            if 0 < level < self.levels - 1:
                self.add_module(f"fusion_layer_{level}", Fusion(width))

    def forward(self, z: Tensor, features: list[Tensor] | None = None, fusion_w: float = 1.0) -> Tensor:  # type: ignore[override]
        h = self.mid.block_1(self.conv_in(z))
        h = self.mid.block_2(self.mid.attn_1(self.temporal_mixing(h)))
        for level in reversed(range(self.levels)):
            for block, mix in zip(self.up[level].block, self.up[level].temporal_mixing, strict=True):
                h = mix(block(h))
            if features is not None and 0 < level < self.levels - 1:
                h = h + fusion_w * self.get_submodule(f"fusion_layer_{level}")(features[level - 1], h)
            if level > 0:
                h = self.up[level].upsample(h)
        return self.finish(h, z)


class AutoencoderKL(nn.Module):
    """The image autoencoder; MGLD-VSR uses its encoder only."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings)
        self.decoder: nn.Module = self._decoder(settings)
        self.quant_conv = nn.Conv2d(2 * settings.z_channels, 2 * settings.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(settings.embed_dim, settings.z_channels, 1)

    def _decoder(self, settings: AutoencoderSettings) -> nn.Module:
        return Decoder(settings)

    def encode(self, x: Tensor) -> tuple[Posterior, list[Tensor]]:
        """Posterior and decoder features of images.

        Args:
            x: (rows, 3, H, W) in [-1, 1]; H and W multiples of the factor.
        Returns:
            posterior of (rows, embed_dim, H/f, W/f) and the features of level 1 and 2.
        """
        h, features = self.encoder(x)
        return Posterior.from_moments(self.quant_conv(h)), features

    def decode(self, z: Tensor) -> Tensor:
        """Images of unscaled latents, not clamped."""
        return self.decoder(self.post_quant_conv(z))


class VideoAutoencoder(AutoencoderKL):
    """The autoencoder whose decoder sees neighbouring frames and the LQ image's features."""

    def _decoder(self, settings: AutoencoderSettings) -> nn.Module:
        return VideoDecoder(settings)

    def decode(self, z: Tensor, features: list[Tensor] | None = None, fusion_w: float | None = None) -> Tensor:  # type: ignore[override]
        """Frames of unscaled latents.

        Args:
            z: (B*T, embed_dim, h, w), already divided by the scale factor.
            features: from :meth:`encode` of the LQ frames; None leaves fusion out.
            fusion_w: weight of the fused features; default: the setting.
        Returns:
            (B*T, 3, H, W), about [-1, 1], not clamped.
        """
        weight = self.settings.fusion_w if fusion_w is None else fusion_w
        return self.decoder(self.post_quant_conv(z), features, weight)
