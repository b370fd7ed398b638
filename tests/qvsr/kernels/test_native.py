"""The loops in C against plain PyTorch and float64, and what happens where they cannot be built."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qvsr.kernels import finish, native, ops, reference  # noqa: F401  (ops defines the operators)
from qvsr.kernels.finish import Output
from qvsr.kernels.native import Sums
from qvsr.kernels.packing import pack_rows
from qvsr.quant.rotation import hadamard, random_signs, rotation_from_signs, small_factors

here = pytest.mark.skipif(native.library() is None, reason=f"the library is not there: {native.missing()}")
HALVES = (torch.float32, torch.bfloat16)
SHAPES = {"tokens": ((3, 37, 40), False), "maps": ((2, 40, 5, 7), True), "one token": ((1, 40), False), "many": ((130, 40), False)}


@here
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("granularity", ["tensor", "frame", "token"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_unrotated_integers_and_ranges_are_those_of_pytorch(name: str, granularity: str, symmetric: bool, clip: float | None) -> None:
    """To the last bit; a part of the channels, sizes that are no multiple of 16."""
    shape, channels_first = SHAPES[name]
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    factor = None if clip is None else torch.tensor(clip)
    for bits, (start, stop) in ((4, (3, 40)), (8, (0, 17)), (6, (39, 40))):
        call = (x, start, stop, channels_first, channels_first, [], None, bits, granularity, symmetric, 1e-4, factor, None, None)
        for found, expected in zip(native.quantize_activation(*call), reference.quantize_activation(*call), strict=True):
            assert found.shape == expected.shape and torch.equal(found, expected)
        static = (*call[:-2], torch.tensor(0.11), torch.tensor(7.0))
        assert torch.equal(native.quantize_activation(*static)[0], reference.quantize_activation(*static)[0])


@here
@pytest.mark.parametrize("n", [2, 12, 20, 48, 160, 320, 480, 640])
@pytest.mark.parametrize("left", [False, True])
def test_rotated_integers_are_those_of_the_dense_matrix(n: int, left: bool) -> None:
    """An integer may differ only where the value in float64 lies at the edge between two."""
    generator = torch.Generator().manual_seed(n)
    x, signs = torch.randn(2, 53, n, generator=generator), random_signs(n, 0).float()
    matrix = rotation_from_signs(signs.double(), torch.float64)
    exact = x.double() @ (matrix.T if left else matrix)
    factors = [hadamard(size).float() for size in small_factors(n)]
    for maps in (False, True) if left else (False,):
        given = x.movedim(-1, 1).contiguous() if maps else x
        q, scale, zero = native.quantize_activation(given, 0, n, maps, left, factors, signs, 8, "tensor", False, 1e-4, None, None, None)
        assert scale.item() == pytest.approx((exact.max() - exact.min()).item() / 255, rel=1e-5)
        position = exact / scale.double() + zero.double()
        assert float((q.double() - position).abs().max()) < 0.5 + 1e-3
        near = ((position - 0.5).round() + 0.5 - position).abs() < 1e-3
        assert bool((q == position.round())[~near].all()) and float(near.double().mean()) < 0.02


@here
@pytest.mark.parametrize("scale", [1e-38, 3e-31, 1e-4, 0.0123456789, 1 / 3, 1.9999999, 7.1e5, 3e31])
def test_quotients_are_rounded_as_divisions_are(scale: float) -> None:
    """Around every boundary between two integers, a few last digits to both sides; and far beyond the range."""
    s, steps = torch.tensor(scale), torch.arange(-1.5, 256.5, 0.5).repeat_interleave(41)
    x = (steps.double() * s.double()).float()
    x = (x.view(torch.int32) + torch.arange(-20, 21, dtype=torch.int32).repeat(len(x) // 41)).view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.tensor([0.0, -0.0, 1e-45, 3e38, -3e38, math.inf, -math.inf])]).view(-1, 1)
    found, _, _ = native.quantize_activation(x, 0, 1, False, False, [], None, 8, "tensor", False, 0.0, None, s, torch.tensor(3.0))
    assert torch.equal(found, ((x / s).round().clamp(-3, 252) + 3).to(torch.uint8))


@here
@pytest.mark.parametrize("granularity", ["tensor", "frame", "token"])
def test_nan_is_kept_in_what_it_touches_and_refused_by_fixed_ranges(granularity: str) -> None:
    x = torch.randn(4, 33, 24)
    x[2, 17, 5] = math.nan
    call = (x, 0, 24, False, False, [], None, 4, granularity, False, 1e-4, None)
    _, found, _ = native.quantize_activation(*call, None, None)
    _, expected, _ = reference.quantize_activation(*call, None, None)
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().sum() == 1
    with pytest.raises(ValueError, match="quantize_activation: x has NaN, which no integer stands for"):
        native.quantize_activation(*call, torch.tensor(0.1), torch.tensor(3.0))


def outputs(sums: list[Tensor], by_row: bool, rest: bool, branch: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rows, columns = sums[0].shape
    parts = []
    for total in sums:
        scale = torch.rand(rows if by_row else (), generator=generator)
        parts.append(
            Sums(
                total,
                torch.rand(columns, generator=generator),
                scale,
                torch.randint(0, 16, scale.shape, dtype=torch.int32, generator=generator),
                torch.randint(-99, 99, (columns,), dtype=torch.int32, generator=generator),
                torch.randint(-9, 9, (columns,), dtype=torch.int32, generator=generator) if rest else None,
                torch.randint(-99, 99, (rows,), generator=generator).float() if rest else None,
            )
        )
    thin, up = (torch.randn(rows, 5, generator=generator), torch.randn(columns, 5, generator=generator)) if branch else (None, None)
    y = Output(rows, sums[0][0], torch.randn(columns, generator=generator), thin, up)
    for m in finish.blocks(rows, columns):
        for n in (slice(0, 7), slice(7, None)):
            some = [
                Sums(
                    part.sums[m, n],
                    part.step[n],
                    part.scale[m] if by_row else part.scale,
                    part.zero_point[m] if by_row else part.zero_point,
                    part.total[n],
                    part.rest[n] if rest else None,
                    part.inputs[m] if rest else None,
                )
                for part in parts
            ]
            y.finish(m, some, n)
    return y.values


@here
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_scaled_sums_are_those_of_pytorch(whole: bool, by_row: bool, rest: bool, branch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, but for the branch, whose products are added in another order."""
    monkeypatch.setattr(finish, "BLOCK", 20_000)
    generator = torch.Generator().manual_seed(0)
    sums = [torch.randint(-(2**20), 2**20, (83, 611), dtype=torch.int32, generator=generator) for _ in range(2)]
    sums = sums if whole else [part.float() for part in sums]
    found = outputs(sums, by_row, rest, branch)
    monkeypatch.setattr(native, "library", lambda: None)
    expected = outputs(sums, by_row, rest, branch)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-3) if branch else torch.equal(found, expected)


@here
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_weights_are_unpacked_and_centred(bits: int) -> None:
    values = torch.randint(0, 2**bits, (5, 91), dtype=torch.uint8)
    packed, centre = pack_rows(values, bits), torch.tensor([0, 1, 2, 3, -128], dtype=torch.int8)
    for start, count in ((0, 91), (10, 60), (90, 1)):
        expected = values[:, start : start + count].to(torch.int16) - centre[:, None]
        assert torch.equal(native.unpack(packed, bits, start, count, centre), expected.to(torch.int8))


@here
def test_one_and_two_threads_give_the_same_bytes() -> None:
    x, signs, before = torch.randn(3, 96, 9, 11), random_signs(96, 0).float(), torch.get_num_threads()
    factors, results = [hadamard(size).float() for size in small_factors(96)], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(native.quantize_activation(x, 0, 96, True, True, factors, signs, 8, "frame", False, 1e-4, None, None, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_without_a_compiler_pytorch_does_it_and_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    native._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            x = torch.randn(4, 8)
            q, scale, _ = torch.ops.qvsr.quantize_activation(x, 0, 8, False, False, [], None, 4, "tensor", False, 1e-4, None, None, None)
            torch.ops.qvsr.quantize_activation(x, 0, 8, False, False, [], None, 4, "tensor", False, 1e-4, None, None, None)
        assert scale.item() == pytest.approx((x.max() - x.min()).item() / 15) and q.max() == 15
        text = "there is no C compiler 'no-such-compiler'; install gcc, or name one in the variable CC"
        assert [record.getMessage() for record in caplog.records] == [
            f"packed layers round and scale by plain PyTorch, several times as slow: {text}"
        ]
        assert native.missing() == text
    finally:
        native._library.cache_clear()


@here
def test_a_failed_build_names_the_first_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "cpu.c").write_text("int broken(void) { return missing; }\n")
    monkeypatch.setattr(native, "SOURCES", tmp_path / "sources")
    with pytest.raises(
        native.BuildError, match=r"cpu\.c:1:\d+: error: .*missing.* undeclared.*; the command was: .*cc .*-ffp-contract=off"
    ):
        native.build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    if native.library() is None:
        pytest.skip("there is no C compiler")
    with pytest.raises(native.BuildError, match=r"no folder can be written: .*file.* \(.*\)"):
        native.build(tmp_path / "file")


@here
def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.build(tmp_path)
    assert native.load(first).qvsr_unpack
    runs: list[list[str]] = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda command: runs.append(command) or run(command))
    assert native.build(tmp_path) == first and [command[1:] for command in runs] == [["--version"]]


@here
def test_bfloat16_is_read_and_written_as_it_is() -> None:
    """Inputs give the integers of the same numbers in float32, outputs are those in float32 rounded once, NaN included."""
    signs, factors = random_signs(24, 0).float(), [hadamard(size).float() for size in small_factors(24)]
    for shape, first in (((3, 37, 24), False), ((2, 24, 5, 7), True)):
        x = torch.randn(shape).bfloat16()
        call = (0, 24, first, first, factors, signs, 8, "tensor", False, 1e-4, None, None, None)
        for found, expected in zip(native.quantize_activation(x, *call), native.quantize_activation(x.float(), *call), strict=True):
            assert torch.equal(found, expected)
    sums = torch.randint(-(2**20), 2**20, (9, 37)).float()
    parts = [Sums(sums, torch.rand(37) * 1e-3, torch.tensor(0.37))]
    outputs = [Output(9, sums[0], torch.randn(37).index_fill(0, torch.tensor([5]), math.nan), None, None, dtype) for dtype in HALVES]
    outputs[1].bias = outputs[0].bias
    for y in outputs:
        y.finish(slice(None), parts)
    assert (
        torch.equal(outputs[1].values.nan_to_num(-7), outputs[0].values.bfloat16().nan_to_num(-7)) and outputs[1].values.isnan().sum() == 9
    )
