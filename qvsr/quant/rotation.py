"""Randomised Hadamard rotations by construction (QuaRot, arXiv 2404.00456; QuantVSR, arXiv 2508.04485).

A rotation of n channels is ``diag(signs) @ H_n / sqrt(n)`` with a Hadamard matrix H_n and signs of +-1. H_n follows from n alone, so
a checkpoint stores the signs. Matrices are built by Sylvester's doubling, Paley's two constructions over the integers modulo a
prime, and Kronecker products of these; a size for which none of them works is not rotated. Large matrices are products wherever there are
such, so that they can be applied one small factor after the other (:mod:`qvsr.kernels.native`, :mod:`qvsr.kernels.rotate`).

The published convention, which :class:`qvsr.quant.layer.QuantLayer` follows: a linear layer multiplies tokens from the right
(``x @ rot``), a convolution multiplies channel vectors from the left (``rot @ c``), weights likewise.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from qvsr.kernels.rotate import FAST

LARGE = 64  # above this size products come before Paley's constructions: every factor that is left costs its size in additions a value


class HadamardError(ValueError):
    """A size for which no Hadamard matrix can be built here."""


@lru_cache(maxsize=64)
def hadamard(n: int) -> Tensor:
    """Hadamard matrix of size n: int8, entries +-1, ``H @ H.T == n * I``. Treat it as constant: it is shared.

    Raises:
        HadamardError: no construction known here gives this size.

    >>> hadamard(2).tolist()
    [[1, 1], [1, -1]]
    """
    built = _build(n)
    if built is None:
        raise HadamardError(f"no Hadamard matrix of size {n} can be built (1, 2 and products of 4, 12, 20, 24, 28, ... can)")
    return built


def can_rotate(n: int) -> bool:
    """Whether a Hadamard matrix of size n can be built.

    >>> [n for n in range(1, 65) if can_rotate(n)]
    [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64]
    """
    return _plan(n) is not None


@lru_cache(maxsize=1024)
def factors(n: int) -> tuple[int, int] | None:
    """The sizes of the two factors of a matrix that is applied fast, the smaller first; None where the matrix is applied as it is.

    >>> factors(160), factors(320), factors(1280), factors(1028)
    (None, (16, 20), (32, 40), None)
    """
    if n < FAST:  # one dense matrix is as fast there
        return None
    pairs = (left for left in range(math.isqrt(n), 3, -1) if n % left == 0 and can_rotate(left) and can_rotate(n // left))
    return next(((left, n // left) for left in pairs), None)


@lru_cache(maxsize=1024)
def small_factors(n: int) -> tuple[int, ...]:
    """Sizes of the smallest matrices whose Kronecker product, in this order, :func:`hadamard` gives.

    >>> small_factors(640), small_factors(160), small_factors(480), small_factors(12)
    ((20, 2, 2, 2, 2, 2), (2, 2, 2, 20), (20, 24), (12,))
    """
    plan = _plan(n)
    if plan is None:
        raise HadamardError(f"no Hadamard matrix of size {n} can be built (1, 2 and products of 4, 12, 20, 24, 28, ... can)")
    kind, argument = plan
    if kind in ("product", "double"):
        return (*small_factors(argument), *small_factors(n // argument))
    return (n,)


def random_signs(n: int, seed: int, name: str = "") -> Tensor:
    """n signs, int8 +-1, that depend on `seed` and `name` only."""
    key = hashlib.sha256(f"{seed}/{name}/{n}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return (torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8) * 2 - 1).to(torch.int8)


def rotation_from_signs(signs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``diag(signs) @ H_n / sqrt(n)`` for n signs; orthogonal to the rounding of `dtype`."""
    n = signs.numel()
    return (signs.to(dtype)[:, None] * hadamard(n).to(signs.device, dtype)) / math.sqrt(n)


def rotation(n: int, seed: int, name: str = "", dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rotation of n channels ``(n, n)``; the identity where no Hadamard matrix of this size can be built."""
    if not can_rotate(n):
        return torch.eye(n, dtype=dtype)
    return rotation_from_signs(random_signs(n, seed, name), dtype)


@lru_cache(maxsize=1024)
def _plan(n: int) -> tuple[str, int] | None:
    """How to build size n: the construction and its argument (a prime, or the left factor of a product)."""
    if n in (1, 2):
        return "sylvester", n
    if n < 1 or n % 4:
        return None
    if n & (n - 1) and (pair := factors(n)) is not None:
        return "product", pair[0]
    if n & (n - 1) == 0:  # powers of two are always Sylvester's, although Paley gives some of them too
        return "double", 2
    if n > LARGE and _plan(n // 2) is not None:
        return "double", 2
    if _is_prime(n - 1):
        return "paley1", n - 1
    if n // 2 % 2 == 0 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return "paley2", n // 2 - 1
    if _plan(n // 2) is not None:
        return "double", 2
    for left in range(12, math.isqrt(n) + 1, 4):
        if n % left == 0 and _plan(left) is not None and _plan(n // left) is not None:
            return "product", left
    return None


def is_product(n: int) -> bool:
    """Whether the matrix of this size was another one before products came first: checkpoints say which one they mean.

    >>> is_product(640), is_product(512), is_product(160), is_product(48)
    (True, False, True, False)
    """
    return n > LARGE and n & (n - 1) != 0 and (factors(n) is not None or (n % 4 == 0 and _plan(n // 2) is not None))


def _build(n: int) -> Tensor | None:
    plan = _plan(n)
    if plan is None:
        return None
    kind, argument = plan
    if kind == "sylvester":
        return torch.tensor([[1]] if n == 1 else [[1, 1], [1, -1]], dtype=torch.int8)
    if kind == "paley1":
        return _paley_one(argument)
    if kind == "paley2":
        return _paley_two(argument)
    return torch.kron(hadamard(argument), hadamard(n // argument))


def _jacobsthal(q: int) -> Tensor:
    """``(q, q)`` matrix of the quadratic character of ``i - j`` modulo the prime q: 0, +1 or -1."""
    character = torch.full((q,), -1, dtype=torch.int8)
    character[[i * i % q for i in range(q)]] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _paley_one(q: int) -> Tensor:
    """Size q + 1 for a prime q with remainder 3 modulo 4: the identity plus a skew matrix bordered by ones."""
    h = torch.ones(q + 1, q + 1, dtype=torch.int8)
    h[1:, 0] = -1
    h[1:, 1:] = _jacobsthal(q) + torch.eye(q, dtype=torch.int8)
    return h


def _paley_two(q: int) -> Tensor:
    """Size 2(q + 1) for a prime q with remainder 1 modulo 4: each entry of a symmetric conference matrix becomes 2 x 2."""
    c = torch.ones(q + 1, q + 1, dtype=torch.int8)
    c[0, 0] = 0
    c[1:, 1:] = _jacobsthal(q)
    sign = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(c, sign) + torch.kron(torch.eye(q + 1, dtype=torch.int8), zero)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
