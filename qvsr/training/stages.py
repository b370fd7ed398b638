"""The three stages of training the small model: what each trains, on what, and with which loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvsr.config import BackboneSettings, TrainingSettings
from qvsr.models.autoencoder import VideoAutoencoder
from qvsr.models.layers import zero_
from qvsr.models.schedule import Schedule
from qvsr.models.structure import StructureEncoder
from qvsr.models.unet import InflatedUNet
from qvsr.training.clips import TrainingClips
from qvsr.training.loop import Draw, Loss, fit

CHUNK = 64  # clips encoded or sampled at a time
SAMPLER_STEPS = 10
FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))  # under which clips are encoded for the second stage
TRUE_LATENTS = 0.3  # share of the decoder's clips that are shown the true latent
HALF_SAMPLED = 0.35  # share that are shown what the sampler makes of the true latent with half of its noise


class Networks(nn.Module):
    """Everything that is trained, under one state dict."""

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__()
        self.unet = InflatedUNet(settings.unet)
        self.structure = StructureEncoder(settings.structure)
        self.vae = VideoAutoencoder(settings.vae)
        self.context = nn.Parameter(torch.randn(1, settings.context_tokens, settings.unet.context_dim))
        for name, parameter in self.named_parameters():
            # The published model starts from uninitialised memory here; 0 would leave the temporal convolution without gradient.
            if name.endswith("temporal_alpha"):
                nn.init.constant_(parameter, 0.2)

    def train_only(self, *prefixes: str, but: str = "none") -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes) and but not in name)


class Stages:
    """The stages in order: :meth:`autoencoder`, :meth:`diffusion`, :meth:`decoder`."""

    def __init__(
        self,
        backbone: BackboneSettings,
        settings: TrainingSettings,
        nets: Networks,
        clips: TrainingClips,
        folder: Path,
        deadline: float | None,
    ) -> None:
        self.backbone, self.settings, self.nets, self.clips = backbone, settings, nets, clips
        self.folder, self.deadline, self.device = folder, deadline, clips.device
        self.schedule = Schedule(backbone.schedule)
        acp = self.schedule.alphas_cumprod.double().to(self.device)
        self.signal, self.noise = acp.sqrt().float(), (1 - acp).sqrt().float()

    def half(self) -> torch.autocast:
        """bfloat16 on a GPU, where it halves the memory traffic and needs no loss scaling; on a CPU it was 4 times slower than float32."""
        # Without a cache of weights: a recorded step would read what the cache held when it was recorded.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)

    def generator(self, offset: int) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(self.settings.seed + offset)

    # -- stage 1 ------------------------------------------------------------------------------------------------------

    def autoencoder(self) -> None:
        """Pixel and gradient L1 with a little KL. A quarter of the clips are upscaled LQ ones, which are encoded later too."""
        vae, stage = self.nets.vae, self.settings.autoencoder
        if not (self.folder / "autoencoder.state.safetensors").is_file():
            pca_start(vae, self.clips.frames(range(min(64, len(self.clips))))[0].flatten(0, 1))
        self.nets.train_only("vae.", but="fusion_layer")

        def draw(rng: torch.Generator) -> tuple[Tensor, ...]:
            gt, up = self.clips.batch(stage.batch, rng)
            x = torch.cat([gt, up[: -(-stage.batch // 3)]]).flatten(0, 1)
            latent = (x.shape[0], self.backbone.vae.embed_dim, *(side // self.backbone.vae.factor for side in x.shape[2:]))
            return x.contiguous(memory_format=torch.channels_last), torch.randn(latent, generator=rng, device=self.device)

        def loss(x: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with self.half():
                posterior, _ = vae.encode(x)
                out = vae.decode(posterior.sample(noise)).float()
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            return image_loss(out, x) + 1e-4 * kl, {"psnr": psnr(out.detach(), x), "kl": kl.detach()}

        self._fit("autoencoder", draw, loss, vae)
        normalise_latents(vae, self.clips.frames(range(min(128, len(self.clips))))[0].flatten(0, 1))

    # -- stage 2 ------------------------------------------------------------------------------------------------------

    def diffusion(self) -> None:
        """Squared error of the prediction at every noise level; U-Net, structure encoder and context train together."""
        hq, lq = self.latents(range(self.settings.clips), FLIPS)
        stage = self.settings.diffusion
        self.nets.train_only("unet.", "structure.", "context")
        levels = len(self.signal)

        def draw(rng: torch.Generator) -> tuple[Tensor, ...]:
            rows = torch.randint(len(hq), (stage.batch,), generator=rng, device=self.device)
            # Stratified: every batch sees the whole range of noise levels, which steadies the loss.
            place = torch.arange(stage.batch, device=self.device) + torch.rand(stage.batch, generator=rng, device=self.device)
            t = (place / stage.batch * levels).long().clamp(max=levels - 1)
            x0 = hq[rows].float()
            return x0, lq[rows].float(), torch.randn(x0.shape, generator=rng, device=self.device), t

        def loss(x0: Tensor, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            a, s = self.levels(t)
            target = a * noise - s * x0 if self.backbone.schedule.parameterization == "v" else noise
            return F.mse_loss(self.predict(a * x0 + s * noise, z, t), target), {}

        self._fit("diffusion", draw, loss, self.nets)

    @torch.no_grad()
    def latents(self, rows: range, flips: Sequence[tuple[int, ...]] = ((),)) -> tuple[Tensor, Tensor]:
        """Means of the latents of clips, ground truth and LQ, bfloat16 (flips * N, T, C, h, w)."""
        pairs = []
        for flip in flips:
            for start in range(rows.start, rows.stop, CHUNK):
                with self.half():
                    frames = self.clips.frames(range(start, min(start + CHUNK, rows.stop)))
                    pairs.append([self.encode(x.flip(flip)).bfloat16() for x in frames])
        return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])

    def encode(self, x: Tensor) -> Tensor:
        """Latent means (N, T, C, h, w) of clips (N, T, 3, H, W)."""
        return self.nets.vae.encode(x.flatten(0, 1).contiguous(memory_format=torch.channels_last))[0].mean.unflatten(0, x.shape[:2])

    def decode(self, z: Tensor, lq_up: Tensor) -> Tensor:
        """Clips (N, T, 3, H, W) of latents, with the LQ frames' features."""
        features = self.nets.vae.encode(lq_up.flatten(0, 1))[1]
        return self.nets.vae.decode(z.flatten(0, 1), features).unflatten(0, z.shape[:2])

    def predict(self, x_t: Tensor, z_lq: Tensor, t: Tensor) -> Tensor:
        """The U-Net's output, float32, for noisy latents (N, T, C, h, w) at timesteps (N,)."""
        rows_t = t[:, None].expand(-1, x_t.shape[1]).flatten()
        x, z = x_t.flatten(0, 1), z_lq.flatten(0, 1)
        with self.half():
            struct = self.nets.structure(z, rows_t)
            out = self.nets.unet(torch.cat([x, z], dim=1) if self.backbone.concat_lq else x, rows_t, self.nets.context, struct)
        return out.float().unflatten(0, x_t.shape[:2])

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes of signal and noise at timesteps (N,), each (N, 1, 1, 1, 1)."""
        return self.signal[t].view(-1, 1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1, 1)

    def denoised(self, x_t: Tensor, z_lq: Tensor, t: Tensor) -> Tensor:
        """The clean latent that the network sees in a noisy one."""
        out = self.predict(x_t, z_lq, t)
        a, s = self.levels(t)
        return a * x_t - s * out if self.backbone.schedule.parameterization == "v" else (x_t - s * out) / a

    @torch.no_grad()
    def sample(self, z_lq: Tensor, rng: torch.Generator, start: Tensor | None = None, steps: int = SAMPLER_STEPS) -> Tensor:
        """Respaced ancestral sampling without guidance or tiles: the last `steps` steps, from `start` (the LQ latent) noised to there."""
        respaced = self.schedule.respace(SAMPLER_STEPS)
        first = respaced.timesteps[steps - 1]
        x = self.signal[first] * (z_lq if start is None else start)
        x = x + self.noise[first] * torch.randn(z_lq.shape, generator=rng, device=self.device)
        for index in reversed(range(steps)):
            t = torch.full((len(x),), respaced.timesteps[index], device=self.device)
            x0 = self.denoised(x, z_lq, t)
            x = float(respaced.posterior_mean_coef1[index]) * x0 + float(respaced.posterior_mean_coef2[index]) * x
            if index > 0:
                x = x + float(respaced.posterior_variance[index]) ** 0.5 * torch.randn(x.shape, generator=rng, device=self.device)
        return x

    # -- stage 3 ------------------------------------------------------------------------------------------------------

    def decoder(self) -> None:
        """The video decoder learns to decode what the sampler makes, with the LQ frames' features beside it."""
        stage = self.settings.decoder
        count = min(self.settings.sampled, self.settings.clips)
        hq, lq = self.latents(range(count))
        rng = self.generator(1)
        parts = list(zip(hq.split(CHUNK), lq.split(CHUNK), strict=True))
        sampled = torch.cat([self.sample(z.float(), rng).bfloat16() for _, z in parts])
        half = torch.cat([self.sample(z.float(), rng, x0.float(), SAMPLER_STEPS // 2).bfloat16() for x0, z in parts])
        vae = self.nets.vae
        if not (self.folder / "decoder.state.safetensors").is_file():
            quiet_start(vae)
        self.nets.train_only("vae.decoder.", "vae.post_quant_conv.")

        def draw(rng: torch.Generator) -> tuple[Tensor, ...]:
            rows = torch.randint(count, (stage.batch,), generator=rng, device=self.device)
            gt, up = self.clips.frames(rows)
            kind = torch.rand((stage.batch, 1, 1, 1, 1), generator=rng, device=self.device)
            z = torch.where(kind < TRUE_LATENTS, hq[rows], torch.where(kind < TRUE_LATENTS + HALF_SAMPLED, half[rows], sampled[rows]))
            return z.float(), gt, up

        def loss(z: Tensor, gt: Tensor, up: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with self.half():
                with torch.no_grad():
                    features = vae.encode(up.flatten(0, 1).contiguous(memory_format=torch.channels_last))[1]
                out = vae.decode(z.flatten(0, 1), features).float().unflatten(0, z.shape[:2])
            flicker = (out.diff(dim=1) - gt.diff(dim=1)).abs().mean()
            value = image_loss(out.flatten(0, 1), gt.flatten(0, 1)) + flicker
            return value, {"psnr": psnr(out.detach(), gt), "flicker": flicker.detach()}

        self._fit("decoder", draw, loss, vae)

    def _fit(self, name: str, draw: Draw, loss: Loss, module: nn.Module) -> None:
        fit(module, draw, loss, getattr(self.settings, name), name, self.folder, self.settings.seed, self.deadline)
        self.nets.requires_grad_(False)


def image_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 of pixels plus half the L1 of horizontal and vertical differences, images in [-1, 1]."""
    error = out - target
    return error.abs().mean() + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


def psnr(x: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of images in [-1, 1], over everything at once."""
    return -10 * torch.log10((x.float() - target).square().mean() / 4)


@torch.no_grad()
def pca_start(vae: VideoAutoencoder, frames: Tensor) -> None:
    """Start the linear path as the principal components of image blocks: 30 dB before the first step of training.

    Args:
        frames: (N, 3, H, W) in [-1, 1].
    """
    encoder, decoder = vae.encoder, vae.decoder
    factor, z = vae.settings.factor, vae.settings.z_channels
    blocks = F.pixel_unshuffle(frames, factor).permute(0, 2, 3, 1).flatten(0, 2)
    mean = blocks.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((blocks - mean).T.double()))
    basis, spread = vectors[:, -z:].flip(1).float(), values[-z:].flip(0).sqrt().float()  # strongest first
    encoder.linear_shortcut.weight.zero_()
    encoder.linear_shortcut.weight[:z, :, 0, 0] = (basis / spread).T
    encoder.linear_shortcut.bias[:z] = -(mean @ (basis / spread))
    encoder.linear_shortcut.bias[z:] = -6.0  # the log-variance: nearly deterministic from the start
    decoder.linear_shortcut.weight[:, :, 0, 0] = basis * spread
    decoder.linear_shortcut.bias.copy_(mean)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.out_channels)[:, :, None, None])
        conv.bias.zero_()
    for conv in (encoder.conv_out, decoder.conv_out):
        conv.weight.mul_(0.1)
        conv.bias.zero_()


def quiet_start(vae: VideoAutoencoder) -> None:
    """Make the fusion layers add nothing at first: they come late to a decoder that already works."""
    for name, layer in vae.decoder.named_children():
        if name.startswith("fusion_layer_"):
            for conv in (layer.encode_enc_1.conv_out, layer.encode_enc_1.conv2, layer.encode_enc_3.conv2):
                zero_(conv)


@torch.no_grad()
def normalise_latents(vae: VideoAutoencoder, frames: Tensor) -> None:
    """Fold a shift and a scale per channel into the convolutions around the latent: zero mean, unit variance, no setting needed."""
    means = torch.cat([vae.encode(part)[0].mean for part in frames.split(64)])
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    z = len(shift)
    conv = vae.quant_conv
    conv.weight[:z] /= scale.view(-1, 1, 1, 1)
    conv.bias[:z] = (conv.bias[:z] - shift) / scale
    conv.bias[z:] -= 2 * scale.log()  # the log-variance follows the scale
    conv = vae.post_quant_conv
    conv.bias += conv.weight[:, :, 0, 0] @ shift
    conv.weight *= scale.view(1, -1, 1, 1)
