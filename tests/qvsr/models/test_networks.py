"""Properties of the networks that reference data of fixed sizes does not show."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from qvsr.config import AutoencoderSettings, StructureSettings, UNetSettings
from qvsr.models.autoencoder import VideoAutoencoder
from qvsr.models.layers import TemporalConv, attend, clip_count, timestep_embedding
from qvsr.models.structure import StructureEncoder
from qvsr.models.unet import InflatedUNet


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Fresh networks start with zero residual branches: fill them so that every path acts."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def test_timestep_embedding_against_float64() -> None:
    out = timestep_embedding(torch.tensor([0, 1, 999]), 9)
    for row, t in zip(out, (0, 1, 999), strict=True):
        angles = [t * math.exp(-math.log(10000) * k / 4) for k in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0]
        assert torch.allclose(row.double(), torch.tensor(expected, dtype=torch.float64), atol=6e-5)  # float32 of angles up to 999


def test_attend_against_torch() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    heads = [torch.softmax(a @ b.mT / 2, -1) @ c for a, b, c in zip(q.split(4, -1), k.split(4, -1), v.split(4, -1), strict=True)]
    assert torch.allclose(attend(q, k, v, 3), torch.cat(heads, -1), atol=1e-6)


def test_temporal_conv_against_a_loop() -> None:
    torch.manual_seed(0)
    layer = randomised(TemporalConv(4, 3))
    x = torch.randn(6, 4, 2, 2)  # two clips of three frames
    weight, bias, alpha = layer.temporal_conv.weight[..., 0, 0], layer.temporal_conv.bias, layer.temporal_alpha
    for clip in range(2):
        frames = F.pad(x[3 * clip : 3 * clip + 3], (0, 0, 0, 0, 0, 0, 1, 1))
        for t in range(3):
            mixed = sum(torch.einsum("oc,chw->ohw", weight[..., k], frames[t + k]) for k in range(3)) + bias[:, None, None]
            expected = alpha * mixed + (1 - alpha) * x[3 * clip + t]
            assert torch.allclose(layer(x)[3 * clip + t], expected, atol=1e-6)


def test_clip_count() -> None:
    assert clip_count(8, 3) == 2
    with pytest.raises(ValueError, match="4 frames in the batch, temporal layers need clips of 5: pad the clip"):
        clip_count(4, 5)


UNET = UNetSettings(
    model_channels=64,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_head_channels=32,
    context_dim=8,
    semb_channels=32,
)


def test_unet_sees_time_context_and_structure() -> None:
    torch.manual_seed(0)
    net = randomised(InflatedUNet(UNET))
    x, context = torch.randn(5, 4, 8, 8), torch.randn(1, 3, 8)
    struct = {"8": torch.randn(5, 32, 8, 8), "4": torch.randn(5, 32, 4, 4)}
    with torch.no_grad():
        out = net(x, torch.tensor([10]), context, struct)
        others = [
            net(x, torch.tensor([500]), context, struct),
            net(x, torch.tensor([10]), context + 1, struct),
            net(x, torch.tensor([10]), context, struct | {"8": struct["8"] + 1}),
        ]
    for other in others:
        assert (out - other).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.allclose(out, net(x, torch.tensor([10] * 5), context.expand(5, -1, -1), struct), atol=1e-5)


def test_structure_encoder_treats_frames_independently() -> None:
    torch.manual_seed(0)
    net = randomised(
        StructureEncoder(
            StructureSettings(model_channels=64, out_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(1,))
        )
    )
    z = torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        together, alone = net(z, torch.tensor([3])), net(z[2:3], torch.tensor([3]))
    for width, maps in together.items():
        assert torch.allclose(maps[2:3], alone[width], atol=1e-5)


def test_linear_shortcut_passes_blocks_through() -> None:
    """With the nonlinear path silenced and an orthogonal linear one, decode(encode(x)) is x."""
    settings = AutoencoderSettings(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=12, embed_dim=12, linear_shortcut=True)
    vae = VideoAutoencoder(settings).eval()
    for conv in (
        vae.encoder.conv_out,
        vae.decoder.conv_out,
        vae.encoder.linear_shortcut,
        vae.decoder.linear_shortcut,
        vae.quant_conv,
        vae.post_quant_conv,
    ):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0].float()
    with torch.no_grad():
        vae.encoder.linear_shortcut.weight[:12, :, 0, 0] = basis
        vae.decoder.linear_shortcut.weight[:, :, 0, 0] = basis.T
        vae.quant_conv.weight[:12, :12, 0, 0] = torch.eye(12)
        vae.post_quant_conv.weight[:, :, 0, 0] = torch.eye(12)
        x = torch.rand(5, 3, 8, 12) * 2 - 1
        assert torch.allclose(vae.decode(vae.encode(x)[0].mean), x, atol=1e-5)
