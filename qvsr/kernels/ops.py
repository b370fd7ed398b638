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
        x           float32, on a CPU bfloat16 too, contiguous: (..., K), or (B, K, ...) with channels_first; the part is its channels start to stop.
        rotation, signs, left
                    matrices, signs and left of qvsr.kernels.rotate.rotate; an empty list: not rotated.
        granularity tensor, frame (a row of axis 0) or token: what shares one range.
        clip        (), narrows the range; symmetric, floor: as in qvsr.quant.affine.
        scale, zero_point
                    () of a fixed range; None: the range is that of x.
        returns     q, integers, contiguous, channels last; scale and zero_point, float32: (), (B,) or one a token.
    matmul_packed(q, scale, zero_point, weight, weight_bits, weight_scale, weight_zero_point, bias, thin, up, dtype)
        q, scale, zero_point
                    what quantize_activation returned, a part each.
        weight      of qvsr.kernels.packing.pack_weight, also for a GPU on the CPU; weight_scale, weight_zero_point: float32 (N, P).
        bias        (N,); thin: (..., R), the input after the first layer of the branch; up: (N, R).
        dtype       of the result, which is rounded to it from float32; None: float32.
        returns     (..., N)
    conv_packed(q, scale, zero_point, weight, ..., kernel, stride, padding, dilation, bias, thin, up, dtype)
        the same for maps, channels last: q (B, ..., K), result (B, ..., N), thin (B, ..., R) of the result's size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from qvsr.kernels import cpu, native, reference
from qvsr.kernels.packing import row_bytes
from qvsr.kernels.rotate import rotate

GRANULARITIES = ("tensor", "frame", "token")
RESULTS = (torch.float32, torch.float16, torch.bfloat16)
SCHEMAS = {
    "quantize_activation": "(Tensor x, int start, int stop, bool channels_first, bool left, Tensor[] rotation, Tensor? signs, int bits,"
    " str granularity, bool symmetric, float floor, Tensor? clip, Tensor? scale, Tensor? zero_point) -> (Tensor, Tensor, Tensor)",
    "matmul_packed": "(Tensor[] q, Tensor[] scale, Tensor[] zero_point, Tensor weight, int weight_bits, Tensor weight_scale,"
    " Tensor weight_zero_point, Tensor? bias, Tensor? thin, Tensor? up, ScalarType? dtype=None) -> Tensor",
    "conv_packed": "(Tensor[] q, Tensor[] scale, Tensor[] zero_point, Tensor weight, int weight_bits, Tensor weight_scale,"
    " Tensor weight_zero_point, int[] kernel, int[] stride, int[] padding, int[] dilation, Tensor? bias, Tensor? thin, Tensor? up,"
    " ScalarType? dtype=None) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"qvsr::{_name}", _schema)

log = logging.getLogger(__name__)
_said: set[str] = set()


class OperatorError(ValueError):
    """An argument that an operator cannot work with; the message names both."""


# ---------------------------------------------------------------- CPU


def direct(name: str, x: Tensor, bits: int) -> Any:
    """What a layer calls for the operator `name`, whose arguments fit by construction, on an input `x`.

    On a CPU it is the function behind the operator: the dispatcher and the checks take as long as a small layer. The operator itself computes
    for all other devices and for whatever watches or traces operators.
    """
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    if not plain or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return getattr(torch.ops.qvsr, name)
    return _compute_activation if name == "quantize_activation" else backend(name, bits)


@torch.library.impl("qvsr::quantize_activation", "CPU")
def _quantize_activation(x: Tensor, start: int, stop: int, channels_first: bool, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_activation(x, start, stop, channels_first, rest[3], rest[4], rest[8] is not None, last=False)
    return _compute_activation(x, start, stop, channels_first, *rest)


def _compute_activation(x: Tensor, start: int, stop: int, channels_first: bool, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    left, rotation, signs, *others = rest
    if others[0] > 8 or not x.numel() or native.library() is None:
        return reference.quantize_activation(x, start, stop, channels_first, *rest)
    if not native.quantizes(rotation, signs):
        x = rotate(x.narrow(1 if channels_first else -1, start, stop - start).float(), rotation, signs, left, channels_first)
        start, stop, rotation = 0, stop - start, []
    return native.quantize_activation(x, start, stop, channels_first, left, rotation, signs, *others)


@torch.library.impl("qvsr::matmul_packed", "CPU")
def _matmul_packed(
    q: list[Tensor],
    scale: list[Tensor],
    zero_point: list[Tensor],
    weight: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    check_layer("matmul_packed", q, scale, zero_point, weight, bits, weight_scale, weight_zero_point, None, bias, thin, up, dtype)
    compute = backend("matmul_packed", bits if q[0].dtype == torch.uint8 else 16)
    return compute(q, scale, zero_point, weight, bits, weight_scale, weight_zero_point, bias, thin, up, dtype)  # type: ignore[no-any-return]


@torch.library.impl("qvsr::conv_packed", "CPU")
def _conv_packed(
    q: list[Tensor],
    scale: list[Tensor],
    zero_point: list[Tensor],
    weight: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    how = (kernel, stride, padding, dilation)
    check_layer("conv_packed", q, scale, zero_point, weight, bits, weight_scale, weight_zero_point, how, bias, thin, up, dtype)
    compute = backend("conv_packed", bits if q[0].dtype == torch.uint8 else 16)
    return compute(q, scale, zero_point, weight, bits, weight_scale, weight_zero_point, *how, bias, thin, up, dtype)  # type: ignore[no-any-return]


def backend(name: str, bits: int) -> Any:
    """The function that computes for the wider of weight and activations; where it is not the fast one, the reason is logged, each reason once."""
    reason = cpu.missing()
    if reason is None and bits == 16:
        reason = "16 bits have no integer instructions"
    if reason is None:
        return getattr(cpu, name)
    if reason not in _said:
        _said.add(reason)
        log.warning("packed layers are computed by the slow reference: %s", reason)
    return getattr(reference, name)


# ---------------------------------------------------------------- checks, of every device


def check(name: str, device: torch.device, dtypes: Sequence[torch.dtype] = (torch.float32,), /, **tensors: Tensor | None) -> None:
    """Each tensor is on the device, of one of the types, and contiguous.

    Raises:
        OperatorError: one is not.
    """
    for what, tensor in tensors.items():
        if tensor is None:
            continue
        check_device(name, what, tensor, device)
        if tensor.dtype not in dtypes:
            raise OperatorError(f"{name}: {what} is {_short(tensor.dtype)}, {' or '.join(map(_short, dtypes))} is needed")
        if not tensor.is_contiguous():
            raise OperatorError(f"{name}: {what} {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous; call contiguous()")


def check_device(name: str, what: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise OperatorError(f"{name}: {what} is on {tensor.device}, other arguments are on {device}; move it there")


def check_activation(x: Tensor, start: int, stop: int, channels_first: bool, bits: int, granularity: str, fixed: bool, last: bool) -> None:
    """Refuse what ``quantize_activation`` cannot work with.

    Args:
        fixed: whether the range is given.
        last: whether maps may have their channels last in memory.
    Raises:
        OperatorError: it names what.
    """
    name = "quantize_activation"
    dtypes = (torch.float32, torch.bfloat16) if x.device.type == "cpu" else (torch.float32,)
    check(name, x.device, dtypes, x=x.movedim(1, -1) if last and x.movedim(1, -1).is_contiguous() else x)
    channels = x.shape[1 if channels_first else -1] if x.dim() > 1 else 0
    if not 0 <= start < stop <= channels:
        raise OperatorError(f"{name}: channels {start} to {stop} are not among the {channels} of x {tuple(x.shape)}")
    if granularity not in GRANULARITIES:
        raise OperatorError(f"{name}: granularity {granularity!r} is none of {', '.join(GRANULARITIES)}")
    if not (2 <= bits <= 8 or bits == 16):
        raise OperatorError(f"{name}: {bits} bits are not possible; 2 to 8 are, and 16")
    if not x.numel() and not fixed:
        raise OperatorError(f"{name}: x {tuple(x.shape)} is empty and so has no range; a layer returns its empty output itself")


def check_layer(
    name: str,
    q: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    weight: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    how: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]] | None,
    bias: Tensor | None,
    thin: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[int, ...]:
    """The shape of a layer's result.

    Args:
        how: kernel, stride, padding and dilation of a convolution.
    Raises:
        OperatorError: what the operator cannot work with, by name.
    """
    if how is not None and (not 1 <= len(how[0]) <= 3 or any(len(one) != q[0].dim() - 2 for one in how)):
        kernel, stride, padding, dilation = how
        raise OperatorError(
            f"{name}: kernel {kernel}, stride {stride}, padding {padding} and dilation {dilation} do not fit maps {tuple(q[0].shape)}"
        )
    if not len(q) == len(scale) == len(zero_point) == weight_scale.shape[1] or not q:
        raise OperatorError(
            f"{name}: {len(q)} parts have {len(scale)} scales and {len(zero_point)} zero points, the weight has {weight_scale.shape[1]}"
        )
    device = q[0].device
    for part in range(len(q)):
        check(name, device, (torch.uint8, torch.int32), **{f"q[{part}]": q[part]})
        if q[part].shape[:-1] != q[0].shape[:-1]:
            raise OperatorError(f"{name}: q[{part}] {tuple(q[part].shape)} and q[0] {tuple(q[0].shape)} differ in more than channels")
        for what, values in (("scale", scale[part]), ("zero_point", zero_point[part])):
            check(name, device, **{f"{what}[{part}]": values})
            if values.shape != q[part].shape[:-1][: values.dim()]:
                raise OperatorError(f"{name}: {what}[{part}] {tuple(values.shape)} does not fit q[{part}] {tuple(q[part].shape)}")
            if values.dim() not in (0, 1, q[part].dim() - 1):
                raise OperatorError(f"{name}: {what}[{part}] {tuple(values.shape)} is neither one, one a frame nor one a row")
    check(name, weight.device if weight.device.type == "cpu" else device, (torch.uint8,), weight=weight)
    check(name, device, weight_scale=weight_scale, weight_zero_point=weight_zero_point, bias=bias, thin=thin, up=up)
    if (thin is None) != (up is None):
        raise OperatorError(f"{name}: a branch needs both thin and up")
    if dtype not in (None, *RESULTS):
        raise OperatorError(f"{name}: a result of {_short(dtype)} is not possible; {', '.join(map(_short, RESULTS))} are")
    shape = tuple(q[0].shape[:-1]) if how is None else (q[0].shape[0], *reference.output_shape(q[0].shape[1:-1], *how))
    count, rank = len(weight), () if up is None else (up.shape[-1],)
    taps = 1 if how is None else math.prod(how[0])
    for what, tensor, wanted in (
        ("weight", weight, (count, row_bytes(sum(part.shape[-1] for part in q) * taps, bits))),
        ("weight_scale", weight_scale, (count, len(q))),
        ("weight_zero_point", weight_zero_point, (count, len(q))),
        ("bias", bias, (count,)),
        ("thin", thin, (*shape, *rank)),
        ("up", up, (count, *rank)),
    ):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise OperatorError(f"{name}: {what} is {tuple(tensor.shape)}, {wanted} is needed")
    return (*shape, count)


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- shapes, for tracing


@torch.library.register_fake("qvsr::quantize_activation")
def _fake_quantize_activation(x: Tensor, start: int, stop: int, channels_first: bool, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    bits, granularity = rest[3], rest[4]
    shape = (x.shape[0], *x.shape[2:], stop - start) if channels_first else (*x.shape[:-1], stop - start)
    ranges: tuple[Any, ...] = {"tensor": (), "frame": shape[:1], "token": shape[:-1]}[granularity] if rest[8] is None else ()
    q = x.new_empty(shape, dtype=torch.uint8 if bits <= 8 else torch.int32)
    return q, x.new_empty(ranges, dtype=torch.float32), x.new_empty(ranges, dtype=torch.float32)


@torch.library.register_fake("qvsr::matmul_packed")
def _fake_matmul_packed(q: list[Tensor], scale: list[Tensor], zero_point: list[Tensor], weight: Tensor, bits: int, *rest: Any) -> Tensor:
    dtype = rest[5] if len(rest) > 5 else None
    return q[0].new_empty((*q[0].shape[:-1], weight.shape[0]), dtype=dtype or torch.float32)


@torch.library.register_fake("qvsr::conv_packed")
def _fake_conv_packed(q: list[Tensor], scale: list[Tensor], zero_point: list[Tensor], weight: Tensor, bits: int, *rest: Any) -> Tensor:
    kernel, stride, padding, dilation = rest[2:6]
    dtype = rest[9] if len(rest) > 9 else None
    shape = reference.output_shape(q[0].shape[1:-1], kernel, stride, padding, dilation)
    return q[0].new_empty((q[0].shape[0], *shape, weight.shape[0]), dtype=dtype or torch.float32)
