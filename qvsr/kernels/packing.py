"""Unsigned integers of 2 to 8 bits, or of 16, packed without gaps.

The layout is one little-endian bit stream: value ``i`` occupies bits ``i*b … i*b+b-1``, counted from the lowest bit of the
first byte. So 4-bit values lie two to a byte (the first in the low half), 6-bit values four to three bytes, and every other
width follows the same rule. Only the last byte can have unused bits; they are zero. In memory the integers are uint8, those of
16 bits int32.

That is the layout of files. In memory a layer's weight lies in rows, one an output channel, so that a few rows can be unpacked at a time
(:func:`pack_rows`). A row of L values is cut into eight stretches of L/8 values; the first values of all stretches make up the first eight
values of its bit stream, and byte j of each eight values lies in stretch j of the row's bytes. So every step of unpacking reads and writes
stretches of whole bytes, which is several times as fast as unpacking the stream of a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    values = torch.empty(groups, GROUP, dtype=torch.uint8, device=packed.device)
    _spread(padded.view(groups, bits).T, values.T, bits)
    values = values.view(-1)
    if bool(values[count:].any()):
        raise ValueError(f"unpack: bits are set behind value {count}: this is not {bits}-bit data")
    return values[:count].contiguous()


def row_bytes(length: int, bits: int) -> int:
    """Bytes of a row of `length` values in memory: eight values fill `bits` bytes, the last eight may be incomplete.

    >>> row_bytes(576, 4), row_bytes(9, 6), row_bytes(9, 8)
    (288, 12, 9)
    """
    _check_bits(bits)
    return length * bits // 8 if bits in (8, 16) else -(-length // GROUP) * bits


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack a matrix of integers row by row, for memory.

    Args:
        values: uint8 (16 bits: int32) ``(N, L)``, 0 … 2^bits - 1.
        bits: 2 to 8, or 16.
    Returns:
        uint8 ``(N, row_bytes(L, bits))``.

    >>> pack_rows(torch.arange(16, dtype=torch.uint8)[None], 4).tolist()
    [[32, 49, 100, 117, 168, 185, 236, 253]]
    """
    count, length = values.shape
    if bits in (8, 16):
        return pack(values, bits).view(count, row_bytes(length, bits))
    padded = torch.zeros(count, -(-length // GROUP) * GROUP, dtype=torch.uint8, device=values.device)
    padded[:, :length] = values
    eights = padded.view(count, GROUP, -1).transpose(1, 2)  # stretch by stretch -> the eight values that share bytes
    return pack(eights, bits).view(count, -1, bits).transpose(1, 2).reshape(count, -1)


def unpack_rows(packed: Tensor, bits: int, length: int) -> Tensor:
    """Undo :func:`pack_rows`.

    Args:
        packed: uint8 ``(N, row_bytes(length, bits))``, contiguous; any rows of a packed matrix.
    Returns:
        uint8 (16 bits: int32) ``(N, length)``; of 8 bits the tensor itself.
    """
    count = packed.shape[0]
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row_bytes(length, bits):
        raise ValueError(
            f"unpack_rows: {packed.dtype} {tuple(packed.shape)} is not uint8 (N, {row_bytes(length, bits)}), rows of {length} values of {bits} bits"
        )
    if bits == 8:
        return packed
    if bits == 16:
        return unpack(packed.reshape(-1), 16, count * length).view(count, length)
    values = torch.empty(count, GROUP, packed.shape[1] // bits, dtype=torch.uint8, device=packed.device)
    _spread(packed.view(count, bits, -1).transpose(0, 1), values.transpose(0, 1), bits)
    return values.view(count, -1)[:, :length].contiguous()


def pack_weight(integers: Tensor, bits: int, parts: Sequence[int]) -> Tensor:
    """A layer's integer weight for memory: a row an output channel, in it part after part, in a part tap after tap, in a tap the channels.

    Args:
        integers: uint8 (16 bits: int32) ``(N, K, *kernel)``.
        parts: sizes of the parts that the K channels are cut into.
    """
    pieces = [part.flatten(2).transpose(1, 2).flatten(1) if part.dim() > 2 else part for part in integers.split(list(parts), 1)]
    return pack_rows(torch.cat(pieces, 1), bits)


def unpack_weight(packed: Tensor, bits: int, parts: Sequence[int], kernel: Sequence[int] = ()) -> list[Tensor]:
    """The parts of :func:`pack_weight`'s weight, each ``(N, taps, channels)``; any rows of it."""
    taps = math.prod(kernel)
    values = unpack_rows(packed, bits, sum(parts) * taps)
    return [part.reshape(len(packed), taps, -1) for part in values.split([size * taps for size in parts], 1)]


def _spread(octets: Tensor, values: Tensor, bits: int) -> None:
    """Write the eight values ``(8, …)`` that lie in `bits` bytes ``(bits, …)``."""
    for index in range(GROUP):
        byte, shift = divmod(index * bits, 8)
        target = values[index]
        torch.bitwise_right_shift(octets[byte], shift, out=target)
        if shift + bits > 8:
            target.bitwise_or_(octets[byte + 1] << (8 - shift))
        target.bitwise_and_(2**bits - 1)


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8 and bits != 16:
        raise ValueError(f"{bits} bits cannot be packed: 2 to 8 can, and 16")
