"""The per-layer report: signal to quantization noise, ranges, clipping and input complexity of every quantized layer.

The full-precision network runs on calibration samples. Each layer's input is given to its quantized form too, so a layer is judged on
exact inputs: what other layers did wrong before it is not in these numbers. Noise and signal are summed over samples before the ratio.

Columns: a line a layer and timestep `t`, and one with `t` empty over all of them.

- `weight_sqnr_db`: of the smoothed, rotated weight against its rounded values plus branch;
- `act_sqnr_db`: of the smoothed, rotated input parts against their rounded values;
- `output_sqnr_db`: of the full-precision layer's output against the quantized layer's, on the same full-precision input;
- `weight_low`, `weight_high`, `input_low`, `input_high`: of what is rounded, that is smoothed, rotated, and for weights less the branch;
- `weight_clipped_pct`, `act_clipped_pct`: the share of that which lies beyond the outermost levels;
- `macs_pct`: of all the network's linear and convolution layers;
- `c_s`, `c_t`: :func:`qvsr.quantvsr.complexity` of the full-precision input, mean over samples.

Decibels are inf where nothing differs and empty where there is no signal (a layer that saw only zeros).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qvsr.quant import affine
from qvsr.quant.apply import quant_layers
from qvsr.quant.by_timestep import ByTimestep, row_of
from qvsr.quant.layer import QuantError, QuantLayer
from qvsr.quant.refine import Samples, call
from qvsr.quantvsr import complexity
from qvsr.report.tables import csv_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORST = 10


@dataclass(frozen=True)
class LayerRow:
    """One line of the report; the fields are the columns of the csv, which the module's docstring explains."""

    layer: str
    kind: str
    shape: str
    t: int | None
    weight_bits: int
    act_bits: int
    rank: int
    macs_pct: float
    weight_sqnr_db: float | None
    act_sqnr_db: float | None
    output_sqnr_db: float | None
    weight_low: float
    weight_high: float
    weight_clipped_pct: float
    input_low: float
    input_high: float
    act_clipped_pct: float
    c_s: float
    c_t: float


COLUMNS = tuple(one.name for one in fields(LayerRow))


def decibels(signal: float, noise: float) -> float | None:
    """Signal to noise from two energies: inf without noise, None without signal.

    >>> decibels(100.0, 1.0), decibels(1.0, 0.0), decibels(0.0, 0.0)
    (20.0, inf, None)
    """
    if signal == 0:
        return None
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


@dataclass
class Tally:
    """Sums over what was seen of weights, inputs or outputs, in float64."""

    signal: float = 0.0
    noise: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    clipped: int = 0
    values: int = 0

    def add(self, exact: Tensor, found: Tensor, ranged: Tensor | None = None, clipped: Tensor | None = None) -> None:
        """Count `found` in the place of `exact`; ranges are those of `ranged`, `clipped` marks what lies beyond the levels."""
        self.signal += _energy(exact)
        self.noise += _energy(exact.double() - found.double())
        low, high = affine.tensor_range(exact if ranged is None else ranged)
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        self.values += exact.numel()
        self.clipped += 0 if clipped is None else int(clipped.sum())

    def merge(self, other: Tally) -> None:
        self.signal, self.noise = self.signal + other.signal, self.noise + other.noise
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.clipped, self.values = self.clipped + other.clipped, self.values + other.values

    @property
    def sqnr(self) -> float | None:
        return decibels(self.signal, self.noise)

    @property
    def clipped_pct(self) -> float:
        return 100 * self.clipped / self.values


def _energy(x: Tensor) -> float:
    return float(x.double().pow(2).sum())


@dataclass
class Seen:
    """What one layer did at one timestep."""

    inputs: Tally = field(default_factory=Tally)
    outputs: Tally = field(default_factory=Tally)
    spatial: list[float] = field(default_factory=list)
    temporal: list[float] = field(default_factory=list)

    def merge(self, other: Seen) -> None:
        self.inputs.merge(other.inputs)
        self.outputs.merge(other.outputs)
        self.spatial += other.spatial
        self.temporal += other.temporal


@torch.no_grad()
def report(full: nn.Module, quantized: nn.Module, samples: Samples, macs: Mapping[str, int]) -> list[LayerRow]:
    """Measure every quantized layer.

    Args:
        full: the full-precision network.
        quantized: another network whose layers were replaced.
        samples: recorded calls of the full-precision network.
        macs: of every linear and convolution layer of `full`, by name.
    Returns:
        for each layer, in the network's order, the line over all timesteps and then one a timestep.
    Raises:
        QuantError: no samples, nothing quantized, or a layer that was never reached.
    """
    if len(samples) == 0:
        raise QuantError("layers: the calibration set is empty")
    modules = _quantized_modules(quantized)
    if not modules:
        raise QuantError("layers: the network has no quantized layer")
    seen: dict[str, dict[int, Seen]] = {name: {} for name in modules}
    now = 0

    def look(name: str) -> Any:
        module = modules[name]

        def hook(_layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0]
            form = _form(module, now)
            here = seen[name].setdefault(now, Seen())
            for piece, scale, zero_point in form.input_rounding(x):
                q = torch.round(piece / scale) + zero_point
                outside = (q < 0) | (q > affine.levels(form.act_bits))
                here.inputs.add(piece, affine.round_to_grid(piece, scale, zero_point, form.act_bits), clipped=outside)
            here.outputs.add(output, module(x))
            spatial, temporal = complexity(x, "temporal_conv" in name)
            here.spatial.append(spatial.item())
            here.temporal.append(temporal.item())

        return hook

    with ExitStack() as stack:
        for name in modules:
            stack.callback(full.get_submodule(name).register_forward_hook(look(name)).remove)
        for index in range(len(samples)):
            sample = samples[index]
            now = int(sample.t.unique())
            for layer in quantized.modules():
                if isinstance(layer, QuantLayer | ByTimestep):
                    layer.timestep.value = now
            call(full, sample)
    total = sum(macs.values())
    rows = []
    for name, module in modules.items():
        if not seen[name]:
            raise QuantError(f"layers: {name} was not reached by any of the {len(samples)} samples")
        share = 100 * macs[name] / total
        weights = {form: _weight(form, full.get_submodule(name)) for form in {_form(module, t) for t in seen[name]}}
        by_t = sorted(seen[name].items())
        everything, of_all = Seen(), Tally()
        for _, one in by_t:
            everything.merge(one)
        for weight in weights.values():
            of_all.merge(weight)
        rows.append(_row(name, _form(module, by_t[0][0]), None, share, of_all, everything))
        rows += [_row(name, _form(module, t), t, share, weights[_form(module, t)], one) for t, one in by_t]
    return rows


def _quantized_modules(network: nn.Module) -> dict[str, QuantLayer | ByTimestep]:
    """Quantized layers by the names of the layers that they stand for; one of several forms is found inside its :class:`ByTimestep`."""
    forms = {name: module for name, module in network.named_modules() if isinstance(module, ByTimestep)}
    single = {name: module for name, module in quant_layers(network).items() if name.rpartition(".rows.")[0] not in forms}
    order = [name for name, _ in network.named_modules()]
    return dict(sorted((single | forms).items(), key=lambda item: order.index(item[0])))  # type: ignore[arg-type]


def _form(module: QuantLayer | ByTimestep, t: int) -> QuantLayer:
    form = module.rows[row_of(t, module.bounds)] if isinstance(module, ByTimestep) else module
    assert isinstance(form, QuantLayer)
    return form


def _weight(layer: QuantLayer, module: nn.Module) -> Tally:
    target, found, residual, q = layer.weight_rounding(module.weight)  # type: ignore[arg-type]
    tally = Tally()
    tally.add(target, found, residual, (q < 0) | (q > affine.levels(layer.weight_bits)))
    return tally


def _row(name: str, layer: QuantLayer, t: int | None, share: float, weight: Tally, seen: Seen) -> LayerRow:
    return LayerRow(
        layer=name,
        kind=layer.geometry.kind,
        shape="x".join(map(str, layer.geometry.weight_shape)),
        t=t,
        weight_bits=layer.weight_bits,
        act_bits=layer.act_bits,
        rank=layer.rank,
        macs_pct=share,
        weight_sqnr_db=weight.sqnr,
        act_sqnr_db=seen.inputs.sqnr,
        output_sqnr_db=seen.outputs.sqnr,
        weight_low=weight.low,
        weight_high=weight.high,
        weight_clipped_pct=weight.clipped_pct,
        input_low=seen.inputs.low,
        input_high=seen.inputs.high,
        act_clipped_pct=seen.inputs.clipped_pct,
        c_s=sum(seen.spatial) / len(seen.spatial),
        c_t=sum(seen.temporal) / len(seen.temporal),
    )


def spread(timesteps: Sequence[int], count: int) -> list[int]:
    """Indices of at most `count` samples: timesteps evenly, and within a timestep evenly over its samples (clips), shifted from one to the next.

    >>> spread([0, 100, 0, 100, 0, 100], 2), spread([0, 100, 0, 100], 9)
    ([0, 3], [0, 1, 2, 3])
    """
    of: dict[int, list[int]] = {}
    for index, t in enumerate(timesteps):
        of.setdefault(t, []).append(index)
    count = min(count, len(timesteps))
    taken: list[int] = []
    for place, group in enumerate(of[t] for t in sorted(of)):
        share = min(len(group), count * (place + 1) // len(of) - count * place // len(of))
        taken += [group[(k * len(group) // share + place) % len(group)] for k in range(share)]
    return sorted(taken)


def layers_csv(rows: Iterable[LayerRow]) -> str:
    """All columns; numbers with six significant digits, empty where there is none."""

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

    return csv_text(COLUMNS, [[cell(getattr(row, column)) for column in COLUMNS] for row in rows])


def worst(rows: Iterable[LayerRow], count: int = WORST) -> str:
    """The layers whose output is least like full precision, as lines of text."""
    found = sorted((row for row in rows if row.t is None and row.output_sqnr_db is not None), key=lambda row: row.output_sqnr_db or 0.0)
    width = max((len(row.layer) for row in found[:count]), default=0)
    lines = [f"{'worst layers':<{width}}  output   weight   input  dB   MACs %   rank"]
    for row in found[:count]:
        values = [math.nan if value is None else value for value in (row.weight_sqnr_db, row.act_sqnr_db)]
        lines.append(
            f"{row.layer:<{width}}  {row.output_sqnr_db:6.2f}   {values[0]:6.2f}  {values[1]:6.2f}     {row.macs_pct:6.2f}   {row.rank:4d}"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- figure


def draw(path: Path, rows: Sequence[LayerRow], title: str, marked: int = 8) -> None:
    """Noise of weights, inputs and outputs along the network, and rank (without branches: the output's noise) against input complexity.

    Args:
        path: PNG to write.
        rows: of :func:`report`.
        title: such as "quantvsr W4A4, mgld-mini".
        marked: how many of the worst outputs are numbered and named.
    """
    from qvsr.report.figures import COLOURS, INK, MARKERS, SOFT, STYLE, _pyplot, _save

    layers = [row for row in rows if row.t is None]
    kinds = [kind for kind in ("Linear", "Conv1d", "Conv2d", "Conv3d") if any(row.kind == kind for row in layers)]
    looks = {kind: {"color": COLOURS[i], "marker": MARKERS[i]} for i, kind in enumerate(kinds)}
    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 11), layout="constrained")
        grid = figure.add_gridspec(4, 3, height_ratios=(1, 1, 1.25, 1.35), width_ratios=(1, 1, 0.95))
        tops = [figure.add_subplot(grid[line, :]) for line in range(3)]
        figure.suptitle(f"{title}: signal to quantization noise of {len(layers)} layers", x=0.01, ha="left", fontsize=12)
        what = (("weight_sqnr_db", "weights"), ("act_sqnr_db", "inputs"), ("output_sqnr_db", "outputs"))
        for axes, (column, word) in zip(tops, what, strict=True):
            _along(axes, rows, layers, column, looks)
            axes.set_ylabel(f"{word} (dB)")
        _sections(tops, layers)
        tops[-1].set_xlabel("layer, in the network's order; bars: lowest to highest of the timesteps")
        numbered = sorted((i for i, row in enumerate(layers) if _finite(row.output_sqnr_db)), key=lambda i: layers[i].output_sqnr_db or 0.0)
        numbered = numbered[:marked]
        bottom, top = tops[-1].get_ylim()
        tops[-1].set_ylim(bottom - 0.1 * (top - bottom), top)
        last, side = -math.inf, 1
        for number, i in sorted(enumerate(numbered, 1), key=lambda one: one[1]):
            side = -side if i - last < 0.02 * len(layers) else 1  # neighbours get their numbers left and right
            place = {"textcoords": "offset points", "xytext": (-7 * side, -8), "fontsize": 8, "ha": "center", "va": "center"}
            tops[-1].annotate(str(number), (i, layers[i].output_sqnr_db), color=INK, **place)
            last = i
        handles = [plt.Line2D([], [], linestyle="", markersize=6, label=kind, **look) for kind, look in looks.items()]
        tops[0].legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1.08), ncols=len(kinds), frameon=False, borderaxespad=0)

        branch = any(row.rank for row in layers)
        for panel, (column, label) in enumerate(
            (("c_s", "C_s, spatial complexity of the input"), ("c_t", "C_t, temporal complexity of the input"))
        ):
            axes = figure.add_subplot(grid[3, panel])
            _against(axes, layers, column, branch, looks)
            axes.set_xlabel(label)
            axes.set_ylabel("rank; within one, from first to last layer" if branch else "outputs (dB); no branch, hence no ranks")
        words = figure.add_subplot(grid[3, 2])
        words.axis("off")
        text = "\n".join(f"{number}  {layers[i].layer}\n    {layers[i].output_sqnr_db:.1f} dB" for number, i in enumerate(numbered, 1))
        words.text(0, 1, f"outputs least like full precision:\n\n{text}", va="top", fontsize=8, color=INK, linespacing=1.3)
        words.text(0, -0.12, "each on exact inputs; inf and silent layers not drawn", va="top", fontsize=7.5, color=SOFT)
        _save(figure, path, 150)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _along(axes: Axes, rows: Sequence[LayerRow], layers: Sequence[LayerRow], column: str, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """A point a layer; a bar from the lowest to the highest of its timesteps."""
    of: dict[str, list[float]] = {}
    for row in rows:
        if row.t is not None and _finite(getattr(row, column)):
            of.setdefault(row.layer, []).append(getattr(row, column))
    for kind, look in looks.items():
        own = [(i, row) for i, row in enumerate(layers) if row.kind == kind and _finite(getattr(row, column))]
        for i, row in own:
            values = of.get(row.layer, [])
            if len(values) > 1 and max(values) > min(values):
                axes.plot(
                    [i, i], [min(values), max(values)], color=look["color"], linewidth=1.2, alpha=0.4, zorder=2, solid_capstyle="butt"
                )
        axes.plot(
            [i for i, _ in own], [getattr(row, column) for _, row in own], linestyle="", markersize=4, markeredgewidth=0, zorder=3, **look
        )
    axes.set_xlim(-1, len(layers))
    _plain(axes)


def _sections(panels: Sequence[Axes], layers: Sequence[LayerRow]) -> None:
    """Lines between the network's blocks, their names above the first panel."""
    starts = [i for i, row in enumerate(layers) if i == 0 or _block(row) != _block(layers[i - 1])]
    for axes in panels:
        for start in starts[1:]:
            axes.axvline(start - 0.5, color="#cfcfcf", linewidth=0.8, zorder=1)
        axes.set_xticks(range(0, len(layers), max(1, round(len(layers) / 20 / 5) * 5)))
    reached = -math.inf
    for start, end in zip(starts, [*starts[1:], len(layers)], strict=True):
        name = _block(layers[start])
        middle, half = (start + end) / 2 - 0.5, 0.004 * len(layers) * len(name)  # about half of its letters' width
        middle = max(middle, reached + half, half - 1)
        panels[0].annotate(name, (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8, color="#555555")
        reached = middle + half + 0.005 * len(layers)


def _block(row: LayerRow) -> str:
    return row.layer.partition(".")[0]


def _against(axes: Axes, layers: Sequence[LayerRow], column: str, branch: bool, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Rank, or where no layer has a branch the output's noise, against a complexity on a logarithmic axis."""
    values = [getattr(row, column) for row in layers if getattr(row, column) > 0]
    floor = min(values, default=1.0) / 3  # where there is nothing to compare, complexity is 0: drawn left of all others
    ranks = sorted({row.rank for row in layers})
    gap = min((high - low for low, high in pairwise(ranks)), default=1)
    for kind, look in looks.items():
        own = [(i, row) for i, row in enumerate(layers) if row.kind == kind and (branch or _finite(row.output_sqnr_db))]
        # many layers have the same few ranks: the first layers stand a little lower, the last a little higher
        heights = [row.rank + 0.5 * gap * (i / len(layers) - 0.5) if branch else row.output_sqnr_db or 0.0 for i, row in own]
        at = [getattr(row, column) or floor for _, row in own]
        axes.plot(at, heights, linestyle="", markersize=4.5, alpha=0.6, markeredgewidth=0, **look)
    axes.set_xscale("log")
    if any(getattr(row, column) == 0 for row in layers):
        axes.axvline(floor * 3**0.5, color="#cfcfcf", linewidth=0.8)
        axes.annotate(
            "0", (floor, 0), xycoords=("data", "axes fraction"), xytext=(0, -4), textcoords="offset points", ha="center", va="top"
        )
    if branch:
        axes.set_yticks(ranks)
        axes.margins(y=0.06)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
