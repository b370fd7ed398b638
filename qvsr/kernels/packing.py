"""Unsigned integers of 2 to 8 bits, or of 16, packed without gaps.

The layout is one little-endian bit stream: value ``i`` occupies bits ``i*b … i*b+b-1``, counted from the lowest bit of the
first byte. So 4-bit values lie two to a byte (the first in the low half), 6-bit values four to three bytes, and every other
width follows the same rule. Only the last byte can have unused bits; they are zero. In memory the integers are uint8, those of
16 bits int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 8  # eight b-bit values fill exactly b bytes, for every b


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take.

    >>> packed_size(5, 4), packed_size(5, 6)
    (3, 4)
    """
    _check_bits(bits)
    return (count * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers in 0 … 2^bits - 1.

    Args:
        values: uint8 (16 bits: int32), any shape; read in row-major order.
        bits: 2 to 8, or 16.
    Returns:
        uint8, one dimension, ``packed_size(values.numel(), bits)`` bytes.
    Raises:
        ValueError: another dtype, a value that does not fit, another number of bits.

    >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist()
    [33, 15]
    """
    _check_bits(bits)
    needed = torch.uint8 if bits <= 8 else torch.int32
    if values.dtype != needed:
        raise ValueError(f"pack: values are {values.dtype}, {str(needed).removeprefix('torch.')} is needed")
    flat = values.reshape(-1)
    for value in (int(flat.max()), int(flat.min())) if flat.numel() else ():
        if value >> bits:
            raise ValueError(f"pack: value {value} does not fit in {bits} bits (largest is {2**bits - 1})")
    if bits == 8:
        return flat.clone()
    if bits == 16:
        return torch.stack([flat & 0xFF, flat >> 8], 1).to(torch.uint8).view(-1)
    size = packed_size(flat.numel(), bits)
    padded = torch.zeros(-(-flat.numel() // GROUP) * GROUP, dtype=torch.int64, device=flat.device)
    padded[: flat.numel()] = flat
    shifts = torch.arange(GROUP, device=flat.device) * bits
    words = (padded.view(-1, GROUP) << shifts).sum(1)  # at most 56 bits: no sign trouble
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[:size].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8, one dimension, exactly ``packed_size(count, bits)`` bytes.
        bits: 2 to 8, or 16.
        count: how many values were packed.
    Returns:
        uint8 (16 bits: int32) ``(count,)``.
    Raises:
        ValueError: another dtype or length, or bits set behind the last value.
    """
    size = packed_size(count, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"unpack: a one-dimensional uint8 tensor is needed, found {packed.dtype} {tuple(packed.shape)}")
    if packed.numel() != size:
        raise ValueError(f"unpack: {packed.numel()} bytes do not hold {count} values of {bits} bits ({size} bytes)")
    if bits == 8:
        return packed.clone()
    if bits == 16:
        low, high = packed.view(-1, 2).to(torch.int32).unbind(1)
        return low | high << 8
    groups = -(-count // GROUP)
    padded = torch.zeros(groups * bits, dtype=torch.uint8, device=packed.device)
    padded[:size] = packed
    octets = torch.zeros(groups, 8, dtype=torch.uint8, device=packed.device)
    octets[:, :bits] = padded.view(groups, bits)
    words = octets.view(torch.int64)  # (groups, 1)
    shifts = torch.arange(GROUP, device=packed.device) * bits
    values = ((words >> shifts) & (2**bits - 1)).to(torch.uint8).reshape(-1)
    if bool(values[count:].any()):
        raise ValueError(f"unpack: bits are set behind value {count}: this is not {bits}-bit data")
    return values[:count].contiguous()


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8 and bits != 16:
        raise ValueError(f"{bits} bits cannot be packed: 2 to 8 can, and 16")
