"""The operators of packed execution: what each takes, its checks, and which backend computes it.

``qvsr::quantize_activation`` turns one part of a layer's input into integers, ``qvsr::matmul_packed`` and ``qvsr::conv_packed`` are a whole
layer from there on: ``sum over parts of scale * weight_scale * (integer sum) + low-rank branch + bias``. The sums are those of
``(q - zero_point) (w - weight_zero_point)`` over what the kernel sees, exact in integers; a padded zero adds nothing.

On a CPU :mod:`qvsr.kernels.native` rounds and :mod:`qvsr.kernels.cpu` multiplies with the integer instructions that there are, or they say
why they cannot, and then :mod:`qvsr.kernels.reference` does. The result is the same up to the float32 rounding of the last step.

Floating point enters in four places: the rotation and the range, the division by its scale, the products of the branch, and the scaling of
each part's sum; simulated execution (:mod:`qvsr.kernels.simulated`) shares all of them, and its sums are the same whole numbers. None
depends on the number of threads but the branch, a product of a library, whose order of additions could.

    SCHEMAS:
    quantize_activation(x, start, stop, channels_first, left, rotation, signs, bits, granularity, symmetric, floor, clip, scale, zero_point)
        x           float32, contiguous: (..., K), or (B, K, ...) with channels_first; the part is its channels start to stop.
        rotation, signs, left
                    matrices, signs and left of qvsr.kernels.rotate.rotate; an empty list: not rotated.
        granularity tensor, frame (a row of axis 0) or token: what shares one range.
        clip        (), narrows the range; symmetric, floor: as in qvsr.quant.affine.
        scale, zero_point
                    () of a fixed range; None: the range is that of x.
        returns     q, integers, contiguous, channels last; scale and zero_point, float32: (), (B,) or one a token.
    matmul_packed(q, scale, zero_point, weight, weight_bits, weight_scale, weight_zero_point, bias, thin, up)
        q, scale, zero_point
                    what quantize_activation returned, a part each.
        weight      of qvsr.kernels.packing.pack_weight; weight_scale, weight_zero_point: float32 (N, P).
        bias        (N,); thin: (..., R), the input after the first layer of the branch; up: (N, R).
        returns     float32 (..., N)
    conv_packed(q, scale, zero_point, weight, ..., kernel, stride, padding, dilation, bias, thin, up)
        the same for maps, channels last: q (B, ..., K), result (B, ..., N), thin (B, ..., R) of the result's size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qvsr.kernels import cpu, native, reference
from qvsr.kernels.rotate import rotate

GRANULARITIES = ("tensor", "frame", "token")
SCHEMAS = {
    "quantize_activation": "(Tensor x, int start, int stop, bool channels_first, bool left, Tensor[] rotation, Tensor? signs, int bits,"
    " str granularity, bool symmetric, float floor, Tensor? clip, Tensor? scale, Tensor? zero_point) -> (Tensor, Tensor, Tensor)",
    "matmul_packed": "(Tensor[] q, Tensor[] scale, Tensor[] zero_point, Tensor weight, int weight_bits, Tensor weight_scale,"
    " Tensor weight_zero_point, Tensor? bias, Tensor? thin, Tensor? up) -> Tensor",
    "conv_packed": "(Tensor[] q, Tensor[] scale, Tensor[] zero_point, Tensor weight, int weight_bits, Tensor weight_scale,"
    " Tensor weight_zero_point, int[] kernel, int[] stride, int[] padding, int[] dilation, Tensor? bias, Tensor? thin, Tensor? up) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"qvsr::{_name}", _schema)

log = logging.getLogger(__name__)
_said: set[str] = set()


class OperatorError(ValueError):
    """An argument that an operator cannot work with; the message names both."""


# ---------------------------------------------------------------- CPU


@torch.library.impl("qvsr::quantize_activation", "CPU")
def _quantize_activation(x: Tensor, start: int, stop: int, channels_first: bool, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    granularity, bits = rest[4], rest[3]
    _check("quantize_activation", "x", x, (torch.float32,))
    channels = x.shape[1 if channels_first else -1] if x.dim() > 1 else 0
    if not 0 <= start < stop <= channels:
        raise OperatorError(f"quantize_activation: channels {start} to {stop} are not among the {channels} of x {tuple(x.shape)}")
    if granularity not in GRANULARITIES:
        raise OperatorError(f"quantize_activation: granularity {granularity!r} is none of {', '.join(GRANULARITIES)}")
    if not (2 <= bits <= 8 or bits == 16):
        raise OperatorError(f"quantize_activation: {bits} bits are not possible; 2 to 8 are, and 16")
    if not x.numel() and rest[8] is None:
        raise OperatorError(
            f"quantize_activation: x {tuple(x.shape)} is empty and so has no range; a layer returns its empty output itself"
        )
    if bits > 8 or not x.numel() or native.library() is None:
        return reference.quantize_activation(x, start, stop, channels_first, *rest)
    left, rotation, signs, *others = rest
    if not native.quantizes(rotation, signs):
        x = rotate(x.narrow(1 if channels_first else -1, start, stop - start), rotation, signs, left, channels_first)
        start, stop, rotation = 0, stop - start, []
    return native.quantize_activation(x, start, stop, channels_first, left, rotation, signs, *others)


@torch.library.impl("qvsr::matmul_packed", "CPU")
def _matmul_packed(q: list[Tensor], scale: list[Tensor], zero_point: list[Tensor], weight: Tensor, bits: int, *rest: Any) -> Tensor:
    _check_layer("matmul_packed", q, scale, zero_point, weight, bits, *rest)
    return _backend("matmul_packed", q, bits)(q, scale, zero_point, weight, bits, *rest)


@torch.library.impl("qvsr::conv_packed", "CPU")
def _conv_packed(q: list[Tensor], scale: list[Tensor], zero_point: list[Tensor], weight: Tensor, bits: int, *rest: Any) -> Tensor:
    s, z, kernel, stride, padding, dilation, bias, thin, up = rest
    if not len(kernel) == len(stride) == len(padding) == len(dilation) == q[0].dim() - 2:
        raise OperatorError(
            f"conv_packed: kernel {kernel}, stride {stride}, padding {padding} and dilation {dilation} do not fit maps {tuple(q[0].shape)}"
        )
    _check_layer("conv_packed", q, scale, zero_point, weight, bits, s, z, bias, thin, up)
    return _backend("conv_packed", q, bits)(q, scale, zero_point, weight, bits, *rest)


def _backend(name: str, q: Sequence[Tensor], bits: int) -> Any:
    """The function that computes; where it is not the fast one, the reason is logged, each reason once."""
    reason = cpu.missing()
    if reason is None and (bits == 16 or q[0].dtype != torch.uint8):
        reason = "16 bits have no integer instructions"
    if reason is None:
        return getattr(cpu, name)
    if reason not in _said:
        _said.add(reason)
        log.warning("packed layers are computed by the slow reference: %s", reason)
    return getattr(reference, name)


def _check(name: str, what: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise OperatorError(f"{name}: {what} is {str(tensor.dtype).removeprefix('torch.')}, {wanted} is needed")
    if not tensor.is_contiguous():
        raise OperatorError(f"{name}: {what} {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous; call contiguous()")


def _check_layer(
    name: str,
    q: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    weight: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
) -> None:
    if not len(q) == len(scale) == len(zero_point) == weight_scale.shape[1] or not q:
        raise OperatorError(
            f"{name}: {len(q)} parts have {len(scale)} scales and {len(zero_point)} zero points, the weight has {weight_scale.shape[1]}"
        )
    for part in range(len(q)):
        _check(name, f"q[{part}]", q[part], (torch.uint8, torch.int32))
        for what, values in (("scale", scale[part]), ("zero_point", zero_point[part])):
            _check(name, f"{what}[{part}]", values, (torch.float32,))
            if values.shape != q[part].shape[:-1][: values.dim()]:
                raise OperatorError(f"{name}: {what}[{part}] {tuple(values.shape)} does not fit q[{part}] {tuple(q[part].shape)}")
    _check(name, "weight", weight, (torch.uint8,))
    for what, optional in (
        ("weight_scale", weight_scale),
        ("weight_zero_point", weight_zero_point),
        ("bias", bias),
        ("thin", thin),
        ("up", up),
    ):
        if optional is not None:
            _check(name, what, optional, (torch.float32,))
    if (thin is None) != (up is None):
        raise OperatorError(f"{name}: a branch needs both thin and up")


# ---------------------------------------------------------------- shapes, for tracing


@torch.library.register_fake("qvsr::quantize_activation")
def _fake_quantize_activation(x: Tensor, start: int, stop: int, channels_first: bool, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    bits, granularity = rest[3], rest[4]
    shape = (x.shape[0], *x.shape[2:], stop - start) if channels_first else (*x.shape[:-1], stop - start)
    ranges: tuple[Any, ...] = {"tensor": (), "frame": shape[:1], "token": shape[:-1]}[granularity] if rest[8] is None else ()
    q = x.new_empty(shape, dtype=torch.uint8 if bits <= 8 else torch.int32)
    return q, x.new_empty(ranges), x.new_empty(ranges)


@torch.library.register_fake("qvsr::matmul_packed")
def _fake_matmul_packed(q: list[Tensor], scale: list[Tensor], zero_point: list[Tensor], weight: Tensor, *rest: Any) -> Tensor:
    return weight.new_empty((*q[0].shape[:-1], weight.shape[0]), dtype=torch.float32)


@torch.library.register_fake("qvsr::conv_packed")
def _fake_conv_packed(q: list[Tensor], scale: list[Tensor], zero_point: list[Tensor], weight: Tensor, bits: int, *rest: Any) -> Tensor:
    kernel, stride, padding, dilation = rest[2:6]
    shape = reference.output_shape(q[0].shape[1:-1], kernel, stride, padding, dilation)
    return weight.new_empty((q[0].shape[0], *shape, weight.shape[0]), dtype=torch.float32)
