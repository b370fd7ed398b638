"""Packed integers: every width, odd lengths, damaged input; compared with a bit string built in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvsr.kernels.packing import pack, pack_rows, pack_weight, packed_size, row_bytes, unpack, unpack_rows, unpack_weight


@st.composite
def values(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.sampled_from([*range(2, 9), 16]))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=67))


def bit_stream(numbers: list[int], bits: int) -> list[int]:
    """The same stream as one big integer, an independent formulation."""
    whole = sum(number << (bits * place) for place, number in enumerate(numbers))
    return list(whole.to_bytes((len(numbers) * bits + 7) // 8, "little"))


@settings(deadline=None, max_examples=200)
@given(values())
def test_round_trip_and_layout(case: tuple[int, list[int]]) -> None:
    bits, numbers = case
    tensor = torch.tensor(numbers, dtype=torch.uint8 if bits <= 8 else torch.int32)
    packed = pack(tensor, bits)
    assert packed.dtype == torch.uint8 and packed.tolist() == bit_stream(numbers, bits)
    assert packed.numel() == packed_size(len(numbers), bits)
    assert torch.equal(unpack(packed, bits, len(numbers)), tensor)


def test_two_four_bit_values_a_byte_and_four_six_bit_values_three() -> None:
    assert packed_size(1000, 4) == 500 and packed_size(1000, 6) == 750
    assert pack(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8), 4).tolist() == [0x21, 0x43]


def test_strided_input_is_read_row_by_row() -> None:
    tensor = torch.arange(12, dtype=torch.uint8).view(3, 4).T
    assert torch.equal(unpack(pack(tensor, 5), 5, 12).view(4, 3), tensor)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits, length = draw(st.sampled_from([*range(2, 9), 16])), draw(st.integers(1, 35))
    rows = st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length)
    return bits, draw(st.lists(rows, min_size=1, max_size=4))


@settings(deadline=None, max_examples=200)
@given(matrices())
def test_rows_in_memory(case: tuple[int, list[list[int]]]) -> None:
    """Eight values that lie one stretch apart share their bytes, which lie one stretch apart: each eight is a stream of its own."""
    bits, rows = case
    length = len(rows[0])
    tensor = torch.tensor(rows, dtype=torch.uint8 if bits <= 8 else torch.int32)
    packed = pack_rows(tensor, bits)
    assert tuple(packed.shape) == (len(rows), row_bytes(length, bits)) and torch.equal(unpack_rows(packed, bits, length), tensor)
    if bits < 8:
        stretch = -(-length // 8)
        for numbers, found in zip(rows, packed.tolist(), strict=True):
            numbers = numbers + [0] * (8 * stretch - length)
            for group in range(stretch):
                assert found[group::stretch] == bit_stream(numbers[group::stretch], bits)


@pytest.mark.parametrize("bits", [4, 6, 8, 16])
def test_a_weight_in_memory_is_parts_then_taps_then_channels(bits: int) -> None:
    dtype = torch.uint8 if bits <= 8 else torch.int32
    weight = torch.randint(0, 2**bits, (3, 5, 2, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = pack_weight(weight, bits, (2, 3))
    parts = unpack_weight(packed, bits, (2, 3), (2, 3))
    for n, k, i, j in ((0, 0, 0, 0), (2, 1, 1, 2), (1, 4, 0, 2), (2, 2, 1, 0)):
        assert parts[k >= 2][n, 3 * i + j, k - 2 * (k >= 2)] == weight[n, k, i, j]
    again = unpack_weight(packed[1:], bits, (2, 3), (2, 3))
    assert all(torch.equal(some, part[1:]) for some, part in zip(again, parts, strict=True))
    assert torch.equal(unpack_weight(pack_weight(weight[..., 0, 0], bits, (5,)), bits, (5,))[0][:, 0], weight[..., 0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(torch.tensor([16], dtype=torch.uint8), 4), "value 16 does not fit in 4 bits"),
        (lambda: pack(torch.tensor([1]), 4), "uint8 is needed"),
        (lambda: pack(torch.zeros(1, dtype=torch.uint8), 16), "values are torch.uint8, int32 is needed"),
        (lambda: pack(torch.tensor([2**16], dtype=torch.int32), 16), "value 65536 does not fit in 16 bits"),
        (lambda: pack(torch.tensor([3, -1], dtype=torch.int32), 16), "value -1 does not fit in 16 bits"),
        (lambda: pack(torch.zeros(1, dtype=torch.uint8), 9), "9 bits cannot be packed: 2 to 8 can"),
        (lambda: unpack(torch.zeros(3, dtype=torch.uint8), 4, 7), "3 bytes do not hold 7 values of 4 bits"),
        (lambda: unpack(torch.zeros(2, 2, dtype=torch.uint8), 4, 8), "one-dimensional uint8"),
        (lambda: unpack(torch.tensor([255], dtype=torch.uint8), 4, 1), "bits are set behind value 1"),
        (lambda: unpack_rows(torch.zeros(2, 5, dtype=torch.uint8), 4, 9), r"\(2, 5\) is not uint8 \(N, 8\), rows of 9 values of 4 bits"),
    ],
)
def test_messages(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
