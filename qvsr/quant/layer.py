"""The one quantized layer that every method fills in: Linear, Conv1d, Conv2d and Conv3d alike.

    y = low_bit(T(x)) + L1 L2 x' + bias + W offset,     x' = (x - offset) / smooth

T subtracts the offset from the input, if there is one, divides it by the smoothing scale, cuts its channels into parts, rotates each part
and rounds it with its own activation quantizer (dynamic per tensor, frame or token, with a factor that narrows the range, or static with
a table by timestep). The low-bit weight is the weight less L1 L2, transformed alike, with a scale and a zero point per output channel and
part: groups of 64 input channels are parts of 64. The branch L1 L2 sees the unrotated, unrounded x' and runs as two thin layers. ``W
offset`` is a constant of the full-precision weight; at a zero-padded border fewer taps see the offset, so it is stored tap by tap and
laid out for the size of the input.

A layer is *open* while a method works on it: it holds the floating-point weight, and L1, L2 can be trained through the rounding
(ranges stay as they were first measured, as published). `freeze` turns it into integers for good.

Execution is *simulated*: floating point on rounded values; or, of a frozen layer, *packed*: integers multiplied by the operators of
:mod:`qvsr.kernels.ops`, the weight packed in memory. A frozen layer multiplies whole numbers in both, which float32 adds exactly, and shares
the rest, so both give the same bytes; its convolutions return channels last. Open layers, gradients and float64 multiply the rounded values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvsr.kernels import cpu, cuda, ops, reference, simulated
from qvsr.kernels.packing import pack_weight, unpack_weight
from qvsr.kernels.reference import output_shape
from qvsr.kernels.rotate import rotate
from qvsr.quant import affine, low_rank
from qvsr.quant.rotation import can_rotate, factors, hadamard, is_product, random_signs, rotation_from_signs, small_factors
from qvsr.registry import suggest

KINDS: dict[type[nn.Module], str] = {nn.Linear: "Linear", nn.Conv1d: "Conv1d", nn.Conv2d: "Conv2d", nn.Conv3d: "Conv3d"}
EXECUTIONS = ("simulated", "packed")
GRANULARITIES = ops.GRANULARITIES
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class QuantError(ValueError):
    """A layer, setting or file that quantization cannot work with; the message names it."""


@dataclass(frozen=True)
class Geometry:
    """What a layer does apart from its numbers. `kernel` is empty for Linear."""

    kind: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel)

    @staticmethod
    def of(module: nn.Module, name: str = "layer") -> Geometry:
        """Geometry of a torch layer; refuses what the quantized layer does not do."""
        kind = KINDS.get(type(module))
        if kind is None:
            raise QuantError(f"{name}: {type(module).__name__} cannot be quantized; {', '.join(KINDS.values())} can")
        if isinstance(module, nn.Linear):
            return Geometry(kind, module.in_features, module.out_features)
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            found = f"groups={module.groups}, padding={module.padding!r}, padding_mode={module.padding_mode!r}"
            raise QuantError(f"{name}: {found} cannot be quantized; groups=1 with zero padding given as numbers can")
        return Geometry(
            kind,
            module.in_channels,
            module.out_channels,
            tuple(module.kernel_size),
            tuple(module.stride),
            tuple(module.padding),
            tuple(module.dilation),
        )


@dataclass(frozen=True)
class LayerPlan:
    """What a method decides for one layer.

    Attributes:
        weight_bits, act_bits: 2 to 8, or 16: nearly full precision, for tests of methods.
        parts: sizes of the parts that the input channels are cut into; empty: one part.
        rotate: rotate each part whose size has a Hadamard matrix.
        rank: of the low-rank branch; 0: no branch.
        scale_floor: smallest scale of all quantizers of the layer.
        act_granularity: what shares one dynamic activation range, in each part of its own: the `tensor`; a `frame`, which is a row of axis 0
            (a convolution's frame; a clip for Conv3d, whose kernel mixes frames; a pixel's frames in temporal attention); or a `token`, which
            is the channels of a Linear layer's token or of a 1x1 convolution's pixel. A larger kernel sums over pixels, whose different scales
            no integer sum can carry: there `token` falls back to `frame`.
        weight_symmetric, act_symmetric: ranges symmetric about 0 (:func:`qvsr.quant.affine.symmetric_range`) instead of minimum to maximum.
    """

    weight_bits: int
    act_bits: int
    parts: tuple[int, ...] = ()
    rotate: bool = False
    rank: int = 0
    scale_floor: float = affine.SCALE_FLOOR
    act_granularity: str = "tensor"
    weight_symmetric: bool = False
    act_symmetric: bool = False


@dataclass
class Timestep:
    """The timestep of the network call in progress; shared by the layers of a network that have a table by timestep."""

    value: int | None = field(default=None)


def halves(channels: int) -> tuple[int, ...]:
    """Two equal parts; one part where the number is odd.

    >>> halves(64), halves(5)
    ((32, 32), (5,))
    """
    return (channels,) if channels % 2 else (channels // 2, channels // 2)


class QuantLayer(nn.Module):
    """A quantized Linear, Conv1d, Conv2d or Conv3d; see the module's docstring. Built by :meth:`from_float` or :meth:`from_state`."""

    def __init__(self, geometry: Geometry, plan: LayerPlan, name: str = "layer") -> None:
        super().__init__()
        self.geometry, self.name = geometry, name
        self.parts = plan.parts or (geometry.in_channels,)
        if sum(self.parts) != geometry.in_channels or min(self.parts) < 1:
            raise QuantError(f"{name}: parts {self.parts} do not add up to its {geometry.in_channels} input channels")
        for bits in (plan.weight_bits, plan.act_bits):
            affine.levels(bits)
        self.weight_bits, self.act_bits, self.rank, self.scale_floor = plan.weight_bits, plan.act_bits, plan.rank, plan.scale_floor
        if plan.act_granularity not in GRANULARITIES:
            raise QuantError(f"{name}: {suggest('act_granularity', plan.act_granularity, GRANULARITIES)}")
        self.act_granularity, self.weight_symmetric, self.act_symmetric = plan.act_granularity, plan.weight_symmetric, plan.act_symmetric
        self.rotated: tuple[bool, ...] = tuple(plan.rotate and can_rotate(size) for size in self.parts)
        self.execution = "simulated"
        self.timestep = Timestep()
        self.act_timesteps: tuple[int, ...] = ()
        self.bias_timesteps: tuple[int, ...] = ()
        self._cache: tuple[Any, list[Tensor]] | None = None
        self._whole: list[Tensor] | None = None
        self._signs: list[Tensor] | None = None
        self._rotated_weight: Tensor | None = None
        self._grid: tuple[Tensor, Tensor] | None = None
        self.weight_shrink: tuple[Tensor, ...] | None = None
        self.refresh_ranges = False
        self.keep_rounded = True  # an open layer's rounded weight, from call to call
        self.up: nn.Parameter | None = None
        self.down: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self.correction: nn.Parameter | None = None
        for buffer in (
            "weight",
            "weight_q",
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "smooth",
            "signs",
            "act_scale",
            "act_zero_point",
            "act_clip",
        ):
            self.register_buffer(buffer, None)
        for buffer in ("offset", "offset_taps"):
            self.register_buffer(buffer, None)
        for part in range(len(self.parts)):
            self.register_buffer(f"rotation_{part}", None, persistent=False)
        self.stored_rotation = False

    weight: Tensor | None
    weight_q: Tensor | None
    weight_packed: Tensor | None
    weight_scale: Tensor
    weight_zero_point: Tensor
    smooth: Tensor | None
    offset: Tensor | None
    offset_taps: Tensor | None
    signs: Tensor | None
    act_scale: Tensor | None
    act_zero_point: Tensor | None
    act_clip: Tensor | None

    # ---------------------------------------------------------------- construction

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        plan: LayerPlan,
        name: str = "layer",
        seed: int = 0,
        rotations: Sequence[Tensor] | None = None,
        smooth: Tensor | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
        offset: Tensor | None = None,
    ) -> QuantLayer:
        """An open layer with dynamic activation ranges; the branch starts from the SVD and the weight ranges from the residual.

        Args:
            module: Linear, Conv1d, Conv2d or Conv3d with groups=1 and zero padding; its weight is shared, not copied.
            seed: of the rotations' signs, drawn per layer name and part.
            rotations: orthogonal matrices to use instead, one a part (an official checkpoint stores them).
            smooth: ``(K,)``, the input is divided and the weight multiplied by it.
            branch: L1 ``(N, R)`` and L2 ``(R, K, *kernel)`` to start from instead of the SVD.
            offset: ``(K,)``, subtracted from the input before it is divided; what that takes from the output is added again, exactly.
        """
        layer = cls(Geometry.of(module, name), plan, name)
        weight = module.weight.detach()  # type: ignore[operator,union-attr]
        if offset is not None:
            layer.offset = offset.detach().to(weight)
            layer.offset_taps = (weight * layer._along_inputs(layer.offset)).sum(1, keepdim=True)
        if smooth is not None:
            layer.smooth = smooth.detach().to(weight)
            weight = weight * layer._along_inputs(layer.smooth)  # type: ignore[assignment]
        layer.weight = weight  # type: ignore[assignment]
        if isinstance(module.bias, Tensor):
            layer.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
        if rotations is not None:
            layer._store_rotations(list(rotations))
        elif any(layer.rotated):
            layer._draw_rotations([random_signs(size, seed, f"{name}/{part}") for part, size in enumerate(layer.parts)])
        if plan.rank:
            try:
                up, down = branch if branch is not None else low_rank.svd_init(layer.weight, plan.rank)  # type: ignore[arg-type]
            except ValueError as error:
                raise QuantError(f"{name}: {error}") from None
            layer.up, layer.down = nn.Parameter(up.clone(), requires_grad=False), nn.Parameter(down.clone(), requires_grad=False)
        with torch.no_grad():
            layer.set_weight_ranges([affine.channel_range(part) for part in layer._residual().split(layer.parts, 1)])
        return layer.to(weight.device)

    def set_weight_ranges(self, ranges: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Scales and zero points from the minimum and maximum of each output channel, one pair of ``(N, 1, …)`` a part."""
        if self.weight_symmetric:
            ranges = [affine.symmetric_range(low, high, self.weight_bits) for low, high in ranges]
        pairs = [affine.qparams(low.reshape(-1), high.reshape(-1), self.weight_bits, self.scale_floor) for low, high in ranges]
        self.weight_scale = torch.stack([scale for scale, _ in pairs], 1)
        self.weight_zero_point = torch.stack([zero for _, zero in pairs], 1)
        self._cache = self._grid = self._whole = None

    @torch.no_grad()
    def refresh_weight_ranges(self) -> None:
        """Weight ranges of an open layer from what the branch leaves over now, times the factors ``(N, 1, …)`` a part in `weight_shrink`."""
        ranges = [affine.channel_range(part) for part in self._residual().split(self.parts, 1)]
        if self.weight_shrink is not None:
            ranges = [(low * factor, high * factor) for (low, high), factor in zip(ranges, self.weight_shrink, strict=True)]
        self.set_weight_ranges(ranges)

    def set_static_activations(self, low: Tensor, high: Tensor, timesteps: Sequence[int] = ()) -> None:
        """Fixed activation ranges instead of dynamic ones.

        Args:
            low, high: ``(S, P)`` for S rows of a table and P parts.
            timesteps: S upper bounds in rising order; a call at timestep t uses the first row whose bound is at least t, the last
                row beyond. Empty for a single row.
        """
        if low.shape != (max(1, len(timesteps)), len(self.parts)) or list(timesteps) != sorted(set(timesteps)):
            raise QuantError(
                f"{self.name}: a table {tuple(low.shape)} does not fit {len(self.parts)} parts and rising timesteps {list(timesteps)}"
            )
        if self.act_granularity != "tensor":
            raise QuantError(f"{self.name}: static activation ranges are per tensor, its plan says per {self.act_granularity}")
        self.act_scale, self.act_zero_point = self.act_grid(low, high, self.act_bits)
        self.act_timesteps = tuple(timesteps)

    def set_activation_clip(self, factors: Tensor) -> None:
        """Narrow dynamic activation ranges by a factor ``(P,)`` a part: a range ``low … high`` becomes ``factor * low … factor * high``."""
        if factors.shape != (len(self.parts),) or not bool(((factors > 0) & (factors <= 1)).all()):
            raise QuantError(
                f"{self.name}: activation factors {factors.tolist()} are not one above 0 and up to 1 for each of {len(self.parts)} parts"
            )
        if self.act_scale is not None:
            raise QuantError(f"{self.name}: its activation ranges are static; factors narrow dynamic ones")
        self.act_clip = factors

    def start_correction(self, timesteps: Sequence[int] = ()) -> nn.Parameter:
        """A correction of the output, zero, that training can fill in and :meth:`fold_correction` adds to the bias.

        Args:
            timesteps: S upper bounds in rising order, which give the correction, and later the bias, S rows; rows are chosen as for
                :meth:`set_static_activations`. Empty: one correction for all timesteps.
        """
        if list(timesteps) != sorted(set(timesteps)):
            raise QuantError(f"{self.name}: a bias table's timesteps {list(timesteps)} do not rise")
        if self.bias is not None and self.bias.dim() == 2 and tuple(timesteps) != self.bias_timesteps:
            raise QuantError(
                f"{self.name}: its bias is by timesteps {list(self.bias_timesteps)}, a correction by {list(timesteps)} does not fit"
            )
        self.bias_timesteps = tuple(timesteps)
        channels = self.geometry.out_channels
        shape = (len(timesteps), channels) if timesteps else (channels,)
        self.correction = nn.Parameter(self.weight_scale.new_zeros(shape), requires_grad=False)
        return self.correction

    def _draw_rotations(self, signs: list[Tensor]) -> None:
        self.signs = torch.cat(signs)
        for part, sign in enumerate(signs):
            if self.rotated[part] and factors(sign.numel()) is None:
                dtype = self.weight.dtype if self.weight is not None else torch.float32
                setattr(self, f"rotation_{part}", rotation_from_signs(sign, dtype))

    def _store_rotations(self, matrices: list[Tensor]) -> None:
        shapes = [tuple(matrix.shape) for matrix in matrices]
        if shapes != [(size, size) for size in self.parts]:
            raise QuantError(f"{self.name}: rotations {shapes} do not fit parts {self.parts}")
        self.rotated, self.stored_rotation = (True,) * len(matrices), True
        for part, matrix in enumerate(matrices):
            setattr(self, f"rotation_{part}", matrix.detach().clone())

    # ---------------------------------------------------------------- execution

    @property
    def is_linear(self) -> bool:
        return self.geometry.kind == "Linear"

    @property
    def act_granularity_used(self) -> str:
        """The plan's granularity, or what it falls back to in this layer; see :class:`LayerPlan`."""
        mixes_pixels = any(size > 1 for size in self.geometry.kernel)
        return "frame" if self.act_granularity == "token" and mixes_pixels else self.act_granularity

    @property
    def is_open(self) -> bool:
        """Whether the floating-point weight is still there."""
        return self.weight is not None

    def set_execution(self, execution: str) -> None:
        """Compute in floating point on rounded values (`simulated`), or with integers (`packed`, frozen layers only).

        Raises:
            QuantError: an execution that is not known, or an open layer.
        """
        self.check_execution(execution)
        if execution == "packed" and self.weight_q is not None:
            self.weight_packed, self.weight_q = pack_weight(self.weight_q, self.weight_bits, self.parts).cpu(), None
            self.weight_scale, self.weight_zero_point = self.weight_scale.contiguous(), self.weight_zero_point.contiguous()
            for parameter in (self.up, self.down):
                if parameter is not None:  # the strides that a file gives, even of an axis of size 1: they choose the product's routine
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        elif execution == "simulated" and self.weight_packed is not None:
            self.weight_q, self.weight_packed = self.integers(), None
        self._cache = self._grid = self._rotated_weight = self._whole = None
        self.execution = execution

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLayer:
        """Move the layer, all but its packed weight: that stays on the CPU, since a GPU holds it in its kernels' own order and would have it twice."""
        if self.weight_packed is None:
            return super()._apply(fn, recurse)
        packed, before = self.weight_packed, self.weight_scale.device
        self.weight_packed = None
        super()._apply(fn, recurse)
        self.weight_packed = packed
        if self.weight_scale.device != before:
            for device in (cpu, cuda):
                device.forget(packed)
        return self

    def check_execution(self, execution: str) -> None:
        """Raise what :meth:`set_execution` would."""
        if execution not in EXECUTIONS:
            raise QuantError(f"{self.name}: {suggest('execution', execution, EXECUTIONS)}")
        if execution == "packed" and self.is_open:
            raise QuantError(f"{self.name}: it is open, packed execution needs its integers; freeze it first (qvsr.quant.apply.freeze)")

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(…, K)`` to ``(…, N)`` for Linear; maps ``(B, K, …)`` to ``(B, N, …)`` for convolutions."""
        dtype = x.dtype
        x = self._scaled(x)
        differentiated = torch.is_grad_enabled() and x.requires_grad
        if differentiated and self.execution == "packed":
            raise QuantError(f"{self.name}: packed execution has no gradients; run it under torch.no_grad, or simulated")
        if self.is_open or differentiated or (x.dtype == torch.float64 and self.execution == "simulated"):
            y = self._linear(x) if self.is_linear else self._convolution(x)
        else:
            y = self._frozen(x, dtype)
        if self.offset_taps is not None:
            y = (y + self.offset_constant(self.offset_taps, x.shape)).to(dtype)
        if self.correction is None:
            return y
        # not as the operation's bias: its backward pass would compute the gradient of the whole weight too
        correction = self._bias_row(self.correction)
        return y + (correction if self.is_linear else self._along_inputs(correction))

    def offset_constant(self, taps: Tensor, shape: Sequence[int]) -> Tensor:
        """What an offset took from the output, for an input of this shape: ``(N,)`` for Linear, one map ``(1, N, …)`` for convolutions.

        Args:
            taps: ``(N, 1, *kernel)``, for each tap the sum over channels of weight times offset.
        """
        return taps[:, 0] if self.is_linear else self.operate(taps.new_ones(1, 1, *shape[2:]), taps)

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The plain operation of the layer's kind with its stride, padding and dilation."""
        if self.is_linear:
            return F.linear(x, weight, bias)
        geometry = self.geometry
        result: Tensor = _CONV[len(geometry.kernel)](x, weight, bias, geometry.stride, geometry.padding, geometry.dilation)
        return result

    def _scaled(self, x: Tensor) -> Tensor:
        """The input less the offset, divided by the smoothing scale."""
        if self.offset is not None:
            x = x - (self.offset if self.is_linear else self._along_inputs(self.offset))
        if self.smooth is not None:
            x = x / (self.smooth if self.is_linear else self._along_inputs(self.smooth))
        return x

    def _linear(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.geometry.in_channels)
        inputs = self.quantized_inputs(self.as_ranged(x))
        inputs, weights, bias = [part.reshape(-1, part.shape[-1]) for part in inputs], self.quantized_weights(), self._bias_now()
        y = F.linear(inputs[0], weights[0], bias)
        for part, weight in zip(inputs[1:], weights[1:], strict=True):
            y.addmm_(part, weight.T)
        if self.up is not None and self.down is not None:
            y.addmm_(rows @ self.down.T, self.up.T)
        return y.view(*x.shape[:-1], self.geometry.out_channels)

    def _convolution(self, x: Tensor) -> Tensor:
        geometry, inputs, weights = self.geometry, self.quantized_inputs(x), self.quantized_weights()
        convolve = _CONV[len(geometry.kernel)]
        how = (geometry.stride, geometry.padding, geometry.dilation)
        # the zeros of the padding are added after rounding: they stay exactly 0, whatever the zero point
        y = convolve(
            inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1),
            weights[0] if len(weights) == 1 else torch.cat(weights, 1),
            self._bias_now(),
            *how,
        )
        if self.up is None or self.down is None:
            return y
        thin = convolve(x, self.down, None, *how).flatten(2)
        if torch.is_grad_enabled() or not y.is_contiguous():
            return y + torch.matmul(self.up, thin).view(y.shape)
        y.view(*thin.shape[:1], geometry.out_channels, -1).baddbmm_(self.up.expand(thin.shape[0], -1, -1), thin)
        return y

    def _frozen(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A smoothed input through integers, to a type: as floating-point numbers, or by the operators of packed execution."""
        if not x.numel():
            return x.new_empty(self._output_shape(x), dtype=dtype)
        geometry = self.geometry
        channels_first = not self.is_linear and not _channels_last(x)
        ranged = self.as_ranged(x) if self.is_linear or channels_first else x.movedim(1, -1)
        # a CPU reads bfloat16 as it is
        ranged = (ranged.float() if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not x.is_cpu) else ranged).contiguous()
        inputs = [self._integer_input(ranged, part, channels_first) for part in range(len(self.parts))]
        columns: tuple[list[Tensor], ...] = tuple(list(values) for values in zip(*inputs, strict=True))
        thin = None
        if self.down is not None:
            down = self.down.to(ranged.dtype)
            if self.is_linear:
                thin = (ranged.view(-1, ranged.shape[-1]) @ down.T).view(*ranged.shape[:-1], -1)
            else:
                thin = self.operate(ranged if channels_first else ranged.movedim(-1, 1), down).movedim(1, -1).contiguous()
            thin = thin.float()
        how = () if self.is_linear else (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
        rest: tuple[Any, ...] = (*how, self._bias_now(), thin, self.up)
        if self.execution == "packed":
            rest = (*rest, dtype)
            operator = ops.direct("matmul_packed" if self.is_linear else "conv_packed", x, max(self.weight_bits, self.act_bits))
            y = operator(*columns, self.weight_packed, self.weight_bits, self.weight_scale, self.weight_zero_point, *rest)
        else:
            compute: Any = simulated.matmul if self.is_linear else simulated.conv
            y = compute(*columns, self._whole_weights(), self.weight_scale, *rest, dtype)
        return (y.view(self._output_shape(x)) if self.is_linear else y.movedim(-1, 1)).to(dtype)

    def _whole_weights(self) -> list[Tensor]:
        """The integer weight less its zero points in float32, a tensor a part, channels last; computed once."""
        if self._whole is None or self._whole[0].device != self.weight_scale.device:
            maps = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(self.geometry.weight_shape), torch.contiguous_format)
            zero_points = self.weight_zero_point.float().repeat_interleave(
                torch.tensor(self.parts, device=self.weight_zero_point.device), 1
            )
            values = self.integers().float().sub_(zero_points.view(*zero_points.shape, *(1,) * len(self.geometry.kernel)))
            self._whole = [part.contiguous(memory_format=maps) for part in values.split(self.parts, 1)]
        return self._whole

    def _integer_input(self, x: Tensor, part: int, channels_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Integers, scale and zero point of one part of a contiguous input."""
        start = sum(self.parts[:part])
        matrices, signs = self._rotation(part, small=True) if self.rotated[part] else ([], None)
        scale = zero_point = None
        if self.act_scale is not None and self.act_zero_point is not None:
            row = self._row(self.act_timesteps, "activation ranges depend")
            scale, zero_point = self.act_scale[row, part], self.act_zero_point[row, part]
        # simulated on a GPU: PyTorch's own operators, which need no compiler there
        own = self.execution == "packed" or x.device.type == "cpu"
        quantize: Any = ops.direct("quantize_activation", x, self.act_bits) if own else reference.quantize_activation
        return quantize(  # type: ignore[no-any-return]
            x,
            start,
            start + self.parts[part],
            channels_first,
            not self.is_linear,
            matrices,
            signs,
            self.act_bits,
            self.act_granularity_used,
            self.act_symmetric,
            self.scale_floor,
            None if self.act_clip is None else self.act_clip[part],
            scale,
            zero_point,
        )

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        geometry = self.geometry
        if self.is_linear:
            return (*x.shape[:-1], geometry.out_channels)
        how = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
        return (x.shape[0], geometry.out_channels, *output_shape(x.shape[2:], *how))

    def unrounded(self, x: Tensor, inputs: Sequence[Tensor], residual: Tensor) -> Tensor:
        """What an open layer returns where nothing is rounded.

        Args:
            inputs: :meth:`input_parts` of ``as_ranged(x)``; residual: the rotated weight less the branch, as in :meth:`rounding` but shaped as a weight.
        """
        if self.smooth is not None:
            x = x / (self.smooth if self.is_linear else self._along_inputs(self.smooth))
        if self.is_linear:
            y = F.linear(torch.cat(list(inputs), -1).reshape(*x.shape[:-1], -1), residual, self._bias_now())
            return y if self.up is None or self.down is None else y + x @ self.down.T @ self.up.T
        convolve = _CONV[len(self.geometry.kernel)]
        how = (self.geometry.stride, self.geometry.padding, self.geometry.dilation)
        y = convolve(torch.cat(list(inputs), 1), residual, self._bias_now(), *how)
        if self.up is None or self.down is None:
            return y
        return y + torch.matmul(self.up, convolve(x, self.down, None, *how).flatten(2)).view(y.shape)

    def quantized_inputs(self, x: Tensor) -> list[Tensor]:
        """The rotated and rounded parts of a (smoothed) input, in floating point: channels last for Linear, on axis 1 for convolutions."""
        pieces = x.split(self.parts, -1 if self.is_linear else 1)
        return [self._round_input(self._rotate_input(piece, part), part, own=self.rotated[part]) for part, piece in enumerate(pieces)]

    def quantized_weights(self) -> list[Tensor]:
        """The rounded weight in floating point: a tensor a part for Linear, one tensor for convolutions.

        An open layer computes it anew where L1, L2 are trained; else it is computed once.
        """
        trained = self.is_open and torch.is_grad_enabled() and self.up is not None and self.up.requires_grad
        if not trained:
            key = (self.up._version, self.down._version) if self.up is not None and self.down is not None else None
            if self._cache is not None and self._cache[0] == key:
                return self._cache[1]
        if trained and self.refresh_ranges:
            self.refresh_weight_ranges()
        scale, zero_point = self._weight_grid()
        if self.is_open:
            values = affine.fake_quantize(self._residual(), scale, zero_point, self.weight_bits)
        else:
            values = affine.dequantize(self.integers(), scale, zero_point)
        weights = list(values.split(self.parts, 1)) if self.is_linear else [values]
        if not trained:
            weights = [part.detach().contiguous() for part in weights]
            if self.keep_rounded or not self.is_open:
                self._cache = (key, weights)
        if not (self.keep_rounded and self.is_open):
            self._grid = None
        return weights

    def integers(self) -> Tensor:
        """The integer weight ``(N, K, *kernel)``, uint8 up to 8 bits."""
        if self.weight_q is not None:
            return self.weight_q
        if self.weight_packed is not None:
            rows = unpack_weight(self.weight_packed, self.weight_bits, self.parts, self.geometry.kernel)
            whole = torch.cat([part.transpose(1, 2) for part in rows], 1).reshape(self.geometry.weight_shape)
            return whole.to(self.weight_scale.device)
        with torch.no_grad():
            return affine.quantize(self._residual(), *self._weight_grid(), self.weight_bits)

    @torch.no_grad()
    def rounding(self) -> tuple[Tensor, Tensor, Tensor]:
        """What an open layer rounds and its grid: the smoothed, rotated weight less the branch, scales and zero points, each ``(N, K·taps)``."""
        if not self.is_open:
            raise QuantError(f"{self.name}: it is frozen, its floating-point weight is gone")
        weight = self._residual()
        scale, zero_point = (values.expand_as(weight).flatten(1) for values in self._weight_grid())
        return weight.flatten(1), scale, zero_point

    def input_parts(self, x: Tensor) -> list[Tensor]:
        """The smoothed and rotated parts of an input before rounding: what an activation range is measured on."""
        pieces = self._scaled(x).split(self.parts, -1 if self.is_linear else 1)
        return [self._rotate_input(piece, part) for part, piece in enumerate(pieces)]

    @torch.no_grad()
    def input_rounding(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Each part of an input before rounding (:meth:`input_parts`) with the scale and zero point that would round it, which broadcast."""
        return [(piece, *self._act_qparams(piece, part)) for part, piece in enumerate(self.input_parts(x))]

    @torch.no_grad()
    def weight_rounding(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the layer makes of a full-precision weight, all ``(N, K, *kernel)``, smoothed and rotated.

        Args:
            weight: the one that the layer was made from.
        Returns:
            the weight; its integers' values plus the branch; its share that is rounded (less the branch); the unclamped integers of the latter.
        """
        target = self._rotate_weight(weight if self.smooth is None else weight * self._along_inputs(self.smooth))
        branch = low_rank.product(self.up, self._rotate_weight(self.down)) if self.up is not None and self.down is not None else 0.0
        scale, zero_point = self._weight_grid()
        residual = target - branch
        return target, affine.dequantize(self.integers(), scale, zero_point) + branch, residual, torch.round(residual / scale) + zero_point

    def rounded_parts(self, x: Tensor) -> list[Tensor]:
        """:meth:`input_parts` after rounding, as :meth:`forward` multiplies them."""
        return self.quantized_inputs(self.as_ranged(self._scaled(x)))

    def as_ranged(self, x: Tensor) -> Tensor:
        """An input in the form that its activation ranges are taken of: Linear's tokens in rows, unless frames have ranges of their own."""
        return x.reshape(-1, self.geometry.in_channels) if self.is_linear and self.act_granularity != "frame" else x

    def freeze(self) -> None:
        """Integers for good: the floating-point weight is dropped. L1, L2 keep their values and are no longer trained."""
        self.set_integers(self.integers())

    def set_integers(self, integers: Tensor) -> None:
        """:meth:`freeze` with integers of the method's own choice instead of the nearest; scales and zero points stay.

        Args:
            integers: uint8 (16 bits: int32) ``(N, K, *kernel)``, 0 to 2^bits - 1, on the grid of :meth:`rounding`.
        Raises:
            QuantError: another shape or type, or an integer beyond the bits.
        """
        needed = affine.storage(self.weight_bits)
        if integers.dtype != needed or tuple(integers.shape) != self.geometry.weight_shape:
            found = f"{integers.dtype} {tuple(integers.shape)}"
            wanted = f"{str(needed).removeprefix('torch.')} {self.geometry.weight_shape}"
            raise QuantError(f"{self.name}: integers are {found}, {wanted} is needed")
        if int(integers.max()) > affine.levels(self.weight_bits):
            raise QuantError(f"{self.name}: integer {int(integers.max())} is beyond {self.weight_bits} bits")
        self.weight_q = integers
        self.weight = self._rotated_weight = self._cache = self._grid = self._whole = None
        for parameter in (self.up, self.down):
            if parameter is not None:
                parameter.requires_grad_(False)
                parameter.grad = None

    def fold_correction(self) -> None:
        """Add the learned correction to the bias; costs nothing at run time."""
        if self.correction is not None:
            self.bias = nn.Parameter(self._total_bias().detach().clone(), requires_grad=False)  # type: ignore[union-attr]
            self.correction = None

    def _rotate_input(self, piece: Tensor, part: int) -> Tensor:
        if not self.rotated[part]:
            return piece
        matrices, signs = self._rotation(part, small=False)
        signs = None if signs is None else signs.to(piece.dtype)
        return rotate(piece, matrices, signs, left=not self.is_linear, channels_first=not self.is_linear)

    def _rotation(self, part: int, small: bool) -> tuple[list[Tensor], Tensor | None]:
        """A part's rotation as :func:`qvsr.kernels.rotate.rotate` takes it: a matrix, or small ones and signs, wherever there are such if `small`."""
        matrix = getattr(self, f"rotation_{part}")
        if matrix is not None and (self.signs is None or not small):
            return [matrix], None
        assert self.signs is not None
        if self._signs is None or self._signs[0].device != self.signs.device:
            self._signs = list(self.signs.float().split(self.parts))
        return _factors(self.parts[part], self.signs.device), self._signs[part]

    def _round_input(self, piece: Tensor, part: int, own: bool) -> Tensor:
        scale, zero_point = self._act_qparams(piece, part)
        if torch.is_grad_enabled():
            return affine.fake_quantize(piece, scale, zero_point, self.act_bits)
        return affine.round_to_grid(piece, scale, zero_point, self.act_bits, overwrite=own)

    def _act_qparams(self, piece: Tensor, part: int) -> tuple[Tensor, Tensor]:
        if self.act_scale is None or self.act_zero_point is None:
            low, high = self.act_range(piece.detach())
            if self.act_clip is not None:
                low, high = low * self.act_clip[part], high * self.act_clip[part]
            return self.act_grid(low, high, self.act_bits)
        row = self._row(self.act_timesteps, "activation ranges depend")
        return self.act_scale[row, part], self.act_zero_point[row, part]

    def _row(self, bounds: Sequence[int], what: str) -> int:
        """The row of a table by timestep: the first whose upper bound is at least the timestep, the last beyond all."""
        if len(bounds) < 2:
            return 0
        now = self.timestep.value
        if now is None:
            raise QuantError(f"{self.name}: its {what} on the timestep, and none was set (qvsr.quant.apply.follow_timesteps)")
        return next((index for index, bound in enumerate(bounds) if now <= bound), len(bounds) - 1)

    def _bias_row(self, bias: Tensor) -> Tensor:
        return bias[self._row(self.bias_timesteps, "bias depends")] if bias.dim() == 2 else bias

    def _bias_now(self) -> Tensor | None:
        return None if self.bias is None else self._bias_row(self.bias)

    def act_range(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of what shares a range, shaped to broadcast over the piece."""
        if self.act_granularity_used == "tensor":
            return affine.tensor_range(piece)
        if self.act_granularity_used == "frame":
            return affine.channel_range(piece)  # whatever axis 0 is
        return affine.vector_range(piece, -1 if self.is_linear else 1)

    def act_grid(self, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of an activation range, of the layer's kind, for some number of bits."""
        if self.act_symmetric:
            low, high = affine.symmetric_range(low, high, bits)
        return affine.qparams(low, high, bits, self.scale_floor)

    def _residual(self) -> Tensor:
        """Rotated weight less the rotated branch: ``R(W) - L1 R(L2)``, the same as rotating the difference and much cheaper to train."""
        assert self.weight is not None
        if self._rotated_weight is None:
            self._rotated_weight = self._rotate_weight(self.weight)
        rotated = self._rotated_weight
        if self.up is None or self.down is None:
            return rotated
        return rotated - low_rank.product(self.up, self._rotate_weight(self.down))

    def _rotate_weight(self, weight: Tensor) -> Tensor:
        if not any(self.rotated):
            return weight
        pieces = []
        for part, piece in enumerate(weight.split(self.parts, 1)):
            pieces.append(self._rotate_input(piece, part))  # rotated as the input is: from the right, or tap by tap from the left
        return torch.cat(pieces, 1)

    def _total_bias(self) -> Tensor | None:
        if self.correction is None:
            return self.bias
        return self.correction if self.bias is None else self.bias + self.correction

    def _along_inputs(self, values: Tensor) -> Tensor:
        """One value a channel, shaped to broadcast over a weight or a batch of maps."""
        return values.view(1, -1, *(1,) * len(self.geometry.kernel))

    def _weight_grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point ``(N, P)``, each repeated over the channels of its part: ``(N, K, 1, …)``."""
        if self._grid is None:
            sizes = torch.tensor(self.parts, device=self.weight_scale.device)
            spread = [values.repeat_interleave(sizes, 1) for values in (self.weight_scale, self.weight_zero_point)]
            self._grid = tuple(values.view(*values.shape, *(1,) * len(self.geometry.kernel)) for values in spread)  # type: ignore[assignment]
        assert self._grid is not None
        return self._grid

    # ---------------------------------------------------------------- facts and storage

    def describe(self) -> dict[str, Any]:
        """All that is needed beside :meth:`state` to build the frozen layer again, and what a report wants to know; plain values."""
        facts = {
            "kind": self.geometry.kind,
            "shape": list(self.geometry.weight_shape),
            "weight_bits": self.weight_bits,
            "act_bits": self.act_bits,
            "parts": list(self.parts),
            "rotated": list(self.rotated),
            "rank": self.rank,
            "scale_floor": self.scale_floor,
            "act_granularity": self.act_granularity,
            "act_granularity_used": self.act_granularity_used,
            "weight_symmetric": self.weight_symmetric,
            "act_symmetric": self.act_symmetric,
            "offset": self.offset is not None,
            "activations": "dynamic" if self.act_scale is None else "static",
            "act_timesteps": list(self.act_timesteps),
            "bias_timesteps": list(self.bias_timesteps),
        }
        if self._needs_products():
            facts["hadamard"] = "small products"
        return facts

    def _needs_products(self) -> bool:
        """Whether a matrix that follows from the signs was another one in files from before products (:func:`qvsr.quant.rotation.is_product`)."""
        drawn = not self.stored_rotation and self.signs is not None
        return drawn and any(rotated and is_product(size) for size, rotated in zip(self.parts, self.rotated, strict=True))

    def state(self) -> dict[str, Tensor]:
        """Tensors of the layer by role; the weight as integers, not packed. A rotation is its signs, or a matrix if it was given."""
        roles: dict[str, Tensor | None] = {
            "weight": self.integers(),
            "scale": self.weight_scale,
            "zero_point": self.weight_zero_point,
            "up": self.up,
            "down": self.down,
            "bias": self._total_bias(),
            "smooth": self.smooth,
            "offset": self.offset,
            "offset_taps": self.offset_taps,
            "signs": self.signs,
            "act_scale": self.act_scale,
            "act_zero_point": self.act_zero_point,
            "act_clip": self.act_clip,
        }
        if self.stored_rotation:
            roles |= {f"rotation.{part}": getattr(self, f"rotation_{part}") for part in range(len(self.parts))}
        return {role: tensor.detach() for role, tensor in roles.items() if tensor is not None}

    @classmethod
    def from_state(cls, geometry: Geometry, facts: dict[str, Any], state: dict[str, Tensor], name: str = "layer") -> QuantLayer:
        """The frozen layer that :meth:`describe` and :meth:`state` tell of."""
        if tuple(facts["shape"]) != geometry.weight_shape or facts["kind"] != geometry.kind:
            raise QuantError(
                f"{name}: stored as {facts['kind']} {tuple(facts['shape'])}, the network has {geometry.kind} {geometry.weight_shape}"
            )
        # a checkpoint from before the last three existed has none of them
        later = {key: facts[key] for key in ("act_granularity", "weight_symmetric", "act_symmetric") if key in facts}
        plan = LayerPlan(
            facts["weight_bits"],
            facts["act_bits"],
            tuple(facts["parts"]),
            any(facts["rotated"]),
            facts["rank"],
            facts["scale_floor"],
            **later,
        )
        layer = cls(geometry, plan, name)
        layer.weight_q, layer.weight_scale, layer.weight_zero_point = (
            state["weight"].view(geometry.weight_shape),
            state["scale"],
            state["zero_point"],
        )
        layer.smooth, layer.act_scale, layer.act_zero_point = state.get("smooth"), state.get("act_scale"), state.get("act_zero_point")
        layer.offset, layer.offset_taps = state.get("offset"), state.get("offset_taps")
        layer.act_clip = state.get("act_clip")
        layer.act_timesteps, layer.bias_timesteps = tuple(facts["act_timesteps"]), tuple(facts.get("bias_timesteps", ()))
        for role in ("up", "down", "bias"):
            if role in state:
                setattr(layer, role, nn.Parameter(state[role], requires_grad=False))
        if "signs" in state:
            layer._draw_rotations(list(state["signs"].split(layer.parts)))
            if layer._needs_products() and facts.get("hadamard") != "small products":
                raise QuantError(
                    f"{name}: its file was made with other Hadamard matrices for parts of {layer.parts} channels; make it again"
                )
        elif "rotation.0" in state:
            layer._store_rotations([state[f"rotation.{part}"] for part in range(len(layer.parts))])
        return layer

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.geometry.weight_shape))
        return f"{self.geometry.kind} {shape}, W{self.weight_bits}A{self.act_bits}, parts={self.parts}, rank={self.rank}, rotated={any(self.rotated)}"


@lru_cache(maxsize=64)
def _factors(n: int, device: torch.device) -> list[Tensor]:
    """The small factors of a Hadamard matrix, shared by all layers of the size."""
    return [hadamard(size).to(device, torch.float32) for size in small_factors(n)]


def _channels_last(x: Tensor) -> bool:
    """Whether maps lie in memory with their channels last, and not also first."""
    return x.movedim(1, -1).is_contiguous() and not x.is_contiguous()
