"""Noise is a function of its key."""

from __future__ import annotations

import itertools

import scipy.stats
import torch

from qvsr.models.noise import KeyedNoise

KEYS = list(itertools.product(["posterior", "start", "step"], [0, 1], [0, 1], [-1, 0, 3]))


def draw(noise: KeyedNoise, key: tuple[str, int, int, int]) -> torch.Tensor:
    kind, segment, patch, step = key
    return noise.draw(kind, (2, 3, 4), segment=segment, patch=patch, step=step)


def test_order_and_process_state_do_not_matter() -> None:
    forward = {key: draw(KeyedNoise(42, "a/b"), key) for key in KEYS}
    noise = KeyedNoise(42, "a/b")
    torch.manual_seed(1)
    torch.randn(7)
    for key in reversed(KEYS):
        assert torch.equal(draw(noise, key), forward[key])


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.randn(4)
    torch.manual_seed(0)
    draw(KeyedNoise(42, "a"), KEYS[0])
    assert torch.equal(torch.randn(4), expected)


def test_every_part_of_the_key_counts() -> None:
    draws = [draw(KeyedNoise(seed, clip), key) for seed in (0, 1) for clip in ("a", "b") for key in KEYS]
    assert len({tuple(x.flatten().tolist()) for x in draws}) == len(draws)


def test_it_is_standard_normal() -> None:
    x = KeyedNoise(0, "clip").draw("start", (5, 4, 64, 64), segment=0, patch=0, step=-1)
    assert scipy.stats.kstest(x.flatten().numpy(), "norm").pvalue > 0.01
