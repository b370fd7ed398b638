"""A backbone whose outputs are known: the denoiser knows the clean latent, the autoencoder averages and repeats pixels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qvsr.config import AutoencoderSettings, BackboneSettings, ScheduleSettings, UNetSettings
from qvsr.models.autoencoder import Posterior
from qvsr.models.schedule import Schedule


class Denoiser:
    """Answers what a perfect network would, if the clean latent were the LQ latent; pointwise, so tiles do not show."""

    def __init__(self, settings: BackboneSettings) -> None:
        self.schedule = Schedule(settings.schedule)
        self.calls: list[tuple[tuple[int, ...], int]] = []

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, struct: dict[str, Tensor]) -> Tensor:
        z = struct["z"]
        assert t.shape == (1,)
        assert torch.equal(struct["t"], t)
        self.calls.append((tuple(x.shape), int(t)))
        index = int(t)
        noisy = x[:, : z.shape[1]]
        if x.shape[1] > z.shape[1]:
            assert torch.equal(x[:, z.shape[1] :], z)
        acp = self.schedule.alphas_cumprod[index].double()
        noise = (noisy - acp.sqrt() * z) / (1 - acp).sqrt()
        return self.schedule.target(z, noise, index)


class Averages:
    """Encodes by averaging blocks of pixels, decodes by repeating them."""

    def __init__(self, factor: int, noisy: bool) -> None:
        self.factor = factor
        self.logvar = -2.0 if noisy else -30.0

    def encode(self, x: Tensor) -> tuple[Posterior, list[Tensor]]:
        mean = F.avg_pool2d(x, self.factor)
        return Posterior(mean, torch.full_like(mean, self.logvar)), [x]

    def decode(self, z: Tensor, features: list[Tensor]) -> Tensor:
        assert features[0].shape[-1] == z.shape[-1] * self.factor
        return F.interpolate(z, scale_factor=self.factor, mode="nearest")


def oracle(parameterization: str = "eps", concat_lq: bool = False, noisy: bool = False, **more: Any) -> SimpleNamespace:
    """The backbone; its latent has 3 channels and a quarter of the image's side."""
    autoencoder = AutoencoderSettings(ch_mult=(1, 1, 1), embed_dim=3, z_channels=3)
    settings = BackboneSettings(
        name="oracle",
        unet=UNetSettings(in_channels=6 if concat_lq else 3, out_channels=3, channel_mult=(1, 2)),
        first_stage=autoencoder,
        vae=autoencoder,
        schedule=ScheduleSettings(parameterization=parameterization),
        concat_lq=concat_lq,
        scale_factor=0.5,
    )
    networks = {
        "unet": Denoiser(settings),
        "structure": lambda z, t: {"z": z, "t": t},
        "first_stage": Averages(4, noisy),
        "vae": Averages(4, noisy),
    }
    return SimpleNamespace(**(networks | {"context": torch.zeros(1, 2, 3), "settings": settings} | more))
