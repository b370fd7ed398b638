"""Noise schedule of the diffusion process and its respacing to fewer steps.

The 1000-step process is linear in sqrt(beta) (arXiv 2112.10752, App. G); a sampler of N steps keeps N of its timesteps and
works with the betas that make the kept steps a process of their own (arXiv 2102.09672, Sec. 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qvsr.config import ScheduleSettings

Parameterization = Literal["eps", "v"]


def spaced_timesteps(total: int, sections: int | str) -> list[int]:
    """Timesteps of a `total`-step process that a shorter one keeps, in ascending order.

    Args:
        total: steps of the full process, such as 1000.
        sections: ``50`` keeps 50 evenly spaced steps, both ends included; ``"10,15,20"`` cuts the process into three
            equal sections and keeps 10, 15 and 20 of them; ``"ddim50"`` takes the first whole stride that gives 50.
    Returns:
        ascending timesteps in 0 … total-1. A section of which one step is kept keeps its first one.
    Raises:
        ValueError: more steps are asked for than there are, no whole stride gives the number, or not a number.
    >>> spaced_timesteps(1000, 5), spaced_timesteps(100, "2,3"), spaced_timesteps(10, "ddim5")
    ([0, 250, 500, 749, 999], [0, 49, 50, 74, 99], [0, 2, 4, 6, 8])
    """
    text = str(sections)
    if text.startswith("ddim"):
        counts = _counts(text.removeprefix("ddim"), text)
        if len(counts) != 1:
            raise _not_steps(text)
        return _whole_stride(total, counts[0])
    counts = _counts(text, text)
    size, extra = divmod(total, len(counts))
    kept: list[int] = []
    start = 0
    for number, count in enumerate(counts):
        length = size + (number < extra)
        if count > length:
            raise ValueError(f"steps {text!r}: {count} steps asked of a section of {length}; ask for {length} or fewer")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # The position is summed, not multiplied, and ties round to even: published lists depend on it.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return sorted(set(kept))


def _counts(text: str, whole: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise _not_steps(whole)
    return [int(part) for part in parts]


def _not_steps(text: str) -> ValueError:
    return ValueError(f"steps {text!r} is not a number of steps; use 50, '10,15,20' or 'ddim50'")


def _whole_stride(total: int, count: int) -> list[int]:
    for stride in range(1, total + 1):
        steps = range(0, total, stride)
        if len(steps) == count:
            return list(steps)
    raise ValueError(f"steps 'ddim{count}': no whole stride takes exactly {count} of {total} steps; use {count} without 'ddim'")


class Process:
    """Buffers of a diffusion process, one float32 value a step on the CPU, and what is computed with them.

    `timesteps[i]` is the timestep of the full process that the networks get at step i; step 0 is the least noisy.
    `posterior_*` describe q(x_{i-1} | x_i, x_0) (arXiv 2006.11239, Eq. 6 and 7); the log variance is clipped at
    log(1e-20), since the variance of the last step is 0. Where a method takes `index`, it is a step, or a tensor with
    one step for every row of x.
    """

    def __init__(self, betas: np.ndarray, timesteps: Sequence[int], parameterization: Parameterization) -> None:
        self.timesteps = tuple(timesteps)
        self.parameterization = parameterization
        # In the precision of the betas given: float64 for the full process, float32 for a respaced one, as published.
        acp = np.cumprod(1.0 - betas, axis=0)
        prev = np.append(1.0, acp[:-1])
        variance = betas * (1.0 - prev) / (1.0 - acp)
        self.betas = _buffer(betas)
        self.alphas_cumprod = _buffer(acp)
        self.alphas_cumprod_prev = _buffer(prev)
        self.sqrt_alphas_cumprod = _buffer(np.sqrt(acp))
        self.sqrt_one_minus_alphas_cumprod = _buffer(np.sqrt(1.0 - acp))
        self.log_one_minus_alphas_cumprod = _buffer(np.log(1.0 - acp))
        self.sqrt_recip_alphas_cumprod = _buffer(np.sqrt(1.0 / acp))
        self.sqrt_recipm1_alphas_cumprod = _buffer(np.sqrt(1.0 / acp - 1.0))
        self.posterior_variance = _buffer(variance)
        self.posterior_log_variance_clipped = _buffer(np.log(np.maximum(variance, 1e-20)))
        self.posterior_mean_coef1 = _buffer(betas * np.sqrt(prev) / (1.0 - acp))
        self.posterior_mean_coef2 = _buffer((1.0 - prev) * np.sqrt(1.0 - betas) / (1.0 - acp))

    def __len__(self) -> int:
        return len(self.timesteps)

    def respace(self, steps: int | str | Sequence[int]) -> RespacedSchedule:
        """The process that keeps only some timesteps.

        Args:
            steps: what :func:`spaced_timesteps` takes, or the kept steps themselves.
        Returns:
            process whose betas are 1 - acp[i] / acp[previous kept], computed in float32 from the float32 buffer.
        """
        kept = spaced_timesteps(len(self), steps) if isinstance(steps, int | str) else sorted(set(steps))
        acp = self.alphas_cumprod.numpy()[kept]
        betas = np.float32(1.0) - acp / np.append(np.float32(1.0), acp[:-1])
        return RespacedSchedule(betas, [self.timesteps[i] for i in kept], self.parameterization)

    def for_sampling(self, steps: int) -> RespacedSchedule:
        """The process of an N-step sampler, which starts at the noisiest timestep.

        One step is a case of its own: the published spacing would keep timestep 0 alone, but the noise it starts from is
        that of the last timestep, so that one is kept.
        """
        return self.respace([len(self) - 1]) if steps == 1 else self.respace(steps)

    def add_noise(self, x0: Tensor, noise: Tensor, index: int | Tensor) -> Tensor:
        """x at step `index`: sqrt(acp) x0 + sqrt(1 - acp) noise."""
        return _at(self.sqrt_alphas_cumprod, index, x0) * x0 + _at(self.sqrt_one_minus_alphas_cumprod, index, x0) * noise

    def start(self, latent: Tensor, noise: Tensor) -> Tensor:
        """x_T: the LQ latent noised to the last step of this process (of the full one in MGLD-VSR)."""
        return self.add_noise(latent, noise, len(self) - 1)

    def predict(self, x: Tensor, output: Tensor, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """x0 and eps that a network output means at step `index`; x0 is not clipped.

        eps: x0 = x / sqrt(acp) - sqrt(1 / acp - 1) eps.  v = sqrt(acp) eps - sqrt(1 - acp) x0 (arXiv 2202.00512, App. D).
        """
        if self.parameterization == "eps":
            x0 = _at(self.sqrt_recip_alphas_cumprod, index, x) * x - _at(self.sqrt_recipm1_alphas_cumprod, index, x) * output
            return x0, output
        signal, sigma = _at(self.sqrt_alphas_cumprod, index, x), _at(self.sqrt_one_minus_alphas_cumprod, index, x)
        return signal * x - sigma * output, signal * output + sigma * x

    def predict_x0(self, x: Tensor, output: Tensor, index: int | Tensor) -> Tensor:
        """The clean latent that a network output means at step `index`."""
        return self.predict(x, output, index)[0]

    def target(self, x0: Tensor, noise: Tensor, index: int | Tensor) -> Tensor:
        """What the network should output for x0 noised with `noise` at step `index`: eps or v."""
        if self.parameterization == "eps":
            return noise
        return _at(self.sqrt_alphas_cumprod, index, x0) * noise - _at(self.sqrt_one_minus_alphas_cumprod, index, x0) * x0

    def posterior_mean(self, x0: Tensor, x: Tensor, index: int | Tensor) -> Tensor:
        """Mean of q(x_{i-1} | x_i, x_0)."""
        return _at(self.posterior_mean_coef1, index, x) * x0 + _at(self.posterior_mean_coef2, index, x) * x


class Schedule(Process):
    """The process that the backbone was trained with: betas linear in their square root, computed in float64."""

    def __init__(self, settings: ScheduleSettings) -> None:
        roots = np.linspace(settings.linear_start**0.5, settings.linear_end**0.5, settings.timesteps, dtype=np.float64)
        super().__init__(roots**2, range(settings.timesteps), settings.parameterization)


class RespacedSchedule(Process):
    """A process that keeps some timesteps of another; made by :meth:`Process.respace`."""


def _buffer(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _at(buffer: Tensor, index: int | Tensor, like: Tensor) -> Tensor | float:
    if isinstance(index, int):
        return buffer[index].item()
    return buffer[index.cpu()].to(like).view(-1, *[1] * (like.dim() - 1))
