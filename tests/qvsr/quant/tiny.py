"""A small network with the U-Net's signature and every kind of layer that is quantized, and calls of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvsr.config import QuantSpec, UNetSettings
from qvsr.models.unet import InflatedUNet

UNET_EXCLUDE = ("time_embed.0", "input_blocks.0.0", "out.2")


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.head = nn.Conv2d(4, width, 3, padding=1)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.temporal_conv = nn.Conv3d(2 * width, 2 * width, (3, 1, 1), padding=(1, 0, 0))
        self.tokens = nn.Linear(2 * width, 2 * width, bias=False)
        self.line = nn.Conv1d(2 * width, width, 3, padding=1)
        self.out = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, struct: dict[str, Tensor]) -> Tensor:
        emb = self.time_embed(t[:, None].float() / 1000)
        h = F.silu(self.head(x) + emb[:, :, None, None])
        h = F.silu(self.body(h)) + struct[str(h.shape[-1])]
        d = F.silu(self.down(h))
        d = d + self.temporal_conv(d.transpose(0, 1)[None])[0].transpose(0, 1)
        d = d + self.tokens(d.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(d.shape)
        d = self.line(d.flatten(2)).view(d.shape[0], -1, *d.shape[2:])
        return self.out(h + F.interpolate(d, scale_factor=2.0) + context.mean())


@dataclass
class Call:
    x: Tensor
    t: Tensor
    context: Tensor
    struct: dict[str, Tensor]
    out: Tensor = field(default_factory=lambda: torch.zeros(()))
    clip: str = "clip"


def network(width: int = 16, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(width).eval().requires_grad_(False)


@torch.no_grad()
def calls(net: Net, count: int = 4, width: int = 16, seed: int = 1) -> list[Call]:
    """Calls of the full-precision network, with its outputs."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for k in range(count):
        x = torch.randn(5, 4, 8, 8, generator=generator)
        call = Call(x, torch.tensor([100 * k]), torch.zeros(1, 2, 3), {"8": 0.1 * torch.randn(5, width, 8, 8, generator=generator)})
        call.out = net(call.x, call.t, call.context, call.struct)
        made.append(call)
    return made


def run(net: nn.Module, call: Call) -> Tensor:
    with torch.no_grad():
        out: Tensor = net(call.x, call.t, call.context, call.struct)
    return out


def spec(method: str, weight_bits: int = 4, act_bits: int = 4, **settings: object) -> QuantSpec:
    return QuantSpec(method=method, weight_bits=weight_bits, act_bits=act_bits, exclude=("time_embed.0", "head", "out"), settings=settings)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).pow(2).mean() / expected.pow(2).mean())


def initialised(settings: UNetSettings) -> InflatedUNet:
    """A U-Net of random weights none of whose branches is zero."""
    torch.manual_seed(0)
    unet = InflatedUNet(settings).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if parameter.abs().sum() == 0:
            parameter.normal_(0, 0.05)
    return unet


def unet() -> tuple[InflatedUNet, list[Call]]:
    """Two levels with attention on the second, and calls of it."""
    settings = UNetSettings(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_head_channels=32, context_dim=8,
        semb_channels=8, spade_channels=8,
    )  # fmt: skip
    net, made = initialised(settings), []
    generator = torch.Generator().manual_seed(1)
    for k in range(3):
        struct = {str(size): torch.randn(5, 8, size, size, generator=generator) for size in (4, 8)}
        x, context = torch.randn(5, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
        call = Call(x, torch.tensor([300 * k]), context, struct)
        call.out = run(net, call)
        made.append(call)
    return net, made
