"""Packed integers: every width, odd lengths, damaged input; compared with a bit string built in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvsr.kernels.packing import pack, packed_size, unpack


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
    ],
)
def test_messages(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
