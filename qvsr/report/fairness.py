"""The fairness card: what each method was given and what it keeps, so that rows of the metrics table can be compared.

A row a (method, bits). Everything but the last two columns follows from the checkpoint; time and memory are what Snakemake measured of the
job that quantized, differ from run to run, and stand in no other file.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvsr.quant.cost import Facts
from qvsr.quant.layer import halves
from qvsr.report.tables import (
    LATEX_STYLE,
    MARKDOWN,
    RowSetting,
    Style,
    csv_text,
    escape_around_math,
    latex_table,
    markdown_table,
    plural,
    row_order,
    row_setting,
    setting_cell,
)

FORMS = ("csv", "md", "tex")


@dataclass(frozen=True)
class Measured:
    """What quantizing took: seconds, and the peak of resident memory in MiB; None where nobody measured."""

    seconds: float | None = None
    peak_mib: float | None = None


@dataclass(frozen=True)
class Fairness:
    """One row of the card; the fields are the columns of fairness.csv.

    Attributes:
        granularity: `shared` or the method's `native`; `reduced` says whether it did less than published.
        weight_ranges, act_ranges: what has a range of its own.
        activations: dynamic, or static with the number of rows by timestep.
        layers, left_out: quantized layers, and those at full precision; `exclude` are the latter's name prefixes.
        calibration_*: data set, samples, recorded sampling steps and digest of the calibration set.
        trained_params: numbers that the method trained by gradients.
        branch_params_pct, branch_macs_pct: of the low-rank branches, in percent of the full-precision network's own.
        weight_bits: bits of everything that the checkpoint holds for the quantized layers, over the number of their weights.
        act_bits: mean over the quantized layers, weighted by their multiply-accumulates.
        seconds, peak_mib: see :class:`Measured`.
    """

    method: str
    bits: str
    granularity: str
    reduced: bool
    weight_ranges: str
    act_ranges: str
    activations: str
    layers: int
    left_out: int
    exclude: str
    calibration_dataset: str
    calibration_samples: int | None
    calibration_steps: int | None
    calibration_digest: str
    trained_params: int
    branch_params: int
    branch_params_pct: float
    branch_macs_pct: float
    weight_bits: float
    act_bits: float
    seconds: float | None
    peak_mib: float | None


COLUMNS = tuple(Fairness.__dataclass_fields__)


def fairness(header: Mapping[str, Any], facts: Facts, full: Facts, measured: Measured) -> Fairness:
    """The row of a checkpoint.

    Args:
        header: the checkpoint's.
        facts: of the network with the checkpoint's layers.
        full: of the full-precision network.
        measured: what quantizing it took.
    """
    layers: Mapping[str, Mapping[str, Any]] = header["layers"]
    setting = row_setting(header)
    several_forms = header.get("by_timestep", {})
    names = {name.rpartition(".rows.")[0] if name.rpartition(".rows.")[0] in several_forms else name for name in layers}
    quantized = [layer for layer in facts.layers if layer.name in layers]
    weights = sum(layer.weights for layer in full.layers if layer.name in names)
    own_macs = sum(layer.macs for layer in quantized)
    own_params = sum(layer.weights + layer.bias for layer in full.layers) + full.other_params
    branch = sum(layer.branch_params for layer in quantized)
    data = header.get("calibration_set", {})
    return Fairness(
        method=header["method"],
        bits=header["bits"],
        granularity=setting.granularity,
        reduced=bool(setting.reduced),
        weight_ranges=weight_ranges(list(layers.values())),
        act_ranges=act_ranges(list(layers.values())),
        activations=static_or_dynamic(list(layers.values())),
        layers=len(names),
        left_out=len(full.layers) - len(names),
        exclude=" ".join(header["spec"]["exclude"]),
        calibration_dataset=data.get("dataset", ""),
        calibration_samples=data.get("samples"),
        calibration_steps=data.get("steps"),
        calibration_digest=header["calibration"],
        trained_params=header.get("trained_params", 0),
        branch_params=branch,
        branch_params_pct=100 * branch / own_params,
        branch_macs_pct=100 * sum(layer.branch_macs for layer in quantized) / sum(layer.macs for layer in full.layers),
        weight_bits=sum(layer.stored_bits for layer in quantized) / weights,
        act_bits=sum(layer.macs * layer.act_bits for layer in quantized) / own_macs,
        seconds=measured.seconds,
        peak_mib=measured.peak_mib,
    )


def weight_ranges(layers: Sequence[Mapping[str, Any]]) -> str:
    """What has a weight range of its own, in words, from the layers' facts; every range is one output channel's.

    >>> layer = {"shape": [4, 128, 3, 3], "parts": [64, 64], "weight_symmetric": False}
    >>> weight_ranges([layer]), weight_ranges([layer, {**layer, "shape": [4, 64], "parts": [64], "weight_symmetric": True}])
    ('output channel, 2 halves', 'output channel, groups of 64; symmetric in 1 layer')
    """
    return (
        "output channel"
        + _parts(layers)
        + _of_layers("symmetric", sum(bool(layer.get("weight_symmetric")) for layer in layers), len(layers))
    )


def act_ranges(layers: Sequence[Mapping[str, Any]]) -> str:
    """What has an activation range of its own: tensor, frame or token, the most frequent first, and parts of their channels."""
    words = _counted([layer.get("act_granularity_used", "tensor") for layer in layers])
    return words + _parts(layers) + _of_layers("symmetric", sum(bool(layer.get("act_symmetric")) for layer in layers), len(layers))


def static_or_dynamic(layers: Sequence[Mapping[str, Any]]) -> str:
    """Whether activation ranges are those of each call or fixed, and then for how many groups of timesteps.

    >>> static_or_dynamic([{"activations": "dynamic", "act_timesteps": []}])
    'dynamic'
    >>> static_or_dynamic([{"activations": "static", "act_timesteps": [200, 900]}, {"activations": "static", "act_timesteps": []}])
    'static in 1 layer, static (2 timesteps) in 1 layer'
    """
    return _counted(
        [
            layer["activations"] + (f" ({len(layer['act_timesteps'])} timesteps)" if len(layer["act_timesteps"]) > 1 else "")
            for layer in layers
        ]
    )


def _counted(words: Sequence[str]) -> str:
    """A word that is true of all layers, or each with how many it is true of, the most first."""
    found = sorted(Counter(words).items(), key=lambda one: (-one[1], one[0]))
    return found[0][0] if len(found) == 1 else ", ".join(f"{word} in {plural(count, 'layer')}" for word, count in found)


def _parts(layers: Sequence[Mapping[str, Any]]) -> str:
    """How the input channels of all layers are cut, in words."""
    cuts = [(layer["shape"][1], tuple(layer["parts"])) for layer in layers]
    cut = [parts for _, parts in cuts if len(parts) > 1]
    if not cut:
        return ""
    if all(parts == halves(channels) for channels, parts in cuts):
        return ", 2 halves"
    group = max(max(parts) for parts in cut)
    if all(parts == _groups(channels, group) for channels, parts in cuts):
        return f", groups of {group}"
    counts = sorted({len(parts) for parts in cut})
    return f", {' to '.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} parts in {plural(len(cut), 'layer')}"


def _groups(channels: int, size: int) -> tuple[int, ...]:
    return (size,) * (channels // size) + ((channels % size,) if channels % size else ())


def _of_layers(word: str, count: int, of: int) -> str:
    return "" if not count else f"; {word}" if count == of else f"; {word} in {plural(count, 'layer')}"


def read_benchmark(path: Path) -> Measured:
    """Seconds and peak memory from the file that Snakemake's ``benchmark:`` wrote; empty if there is none, or none of the numbers."""
    if not path.is_file():
        return Measured()
    with path.open(newline="") as file:
        row = next(csv.DictReader(file, delimiter="\t"), {})

    def value(key: str) -> float | None:
        try:
            return float(row.get(key) or "")
        except ValueError:  # "-" or "NA": the job ended before it was looked at
            return None

    return Measured(value("s"), value("max_rss"))


# -------------------------------------------------------------------------------------------------------------- writers


def write_fairness(folder: Path, rows: Iterable[Fairness], methods: Sequence[str] = ()) -> None:
    """Write fairness.csv, fairness.md and fairness.tex into a folder.

    Args:
        rows: one a method and bits, in any order.
        methods: the order of rows.
    """
    rows = sorted(rows, key=lambda row: row_order(row.method, row.bits, methods))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fairness.csv").write_text(fairness_csv(rows), encoding="utf-8")
    (folder / "fairness.md").write_text(fairness_markdown(rows), encoding="utf-8")
    (folder / "fairness.tex").write_text(fairness_latex(rows), encoding="utf-8")


def fairness_csv(rows: Sequence[Fairness]) -> str:
    """All columns; bits and shares with six decimals."""

    def cell(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return "" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)

    return csv_text(COLUMNS, [[cell(value) for value in asdict(row).values()] for row in rows])


def fairness_markdown(rows: Sequence[Fairness]) -> str:
    """The table for people, with what all rows share below it."""
    return "\n".join(
        ["### Fairness card", "", *markdown_table(_blocks(rows, MARKDOWN), 6), "", *(f"- {note}" for note in _notes(rows)), ""]
    )


def fairness_latex(rows: Sequence[Fairness]) -> str:
    """The same for LaTeX with booktabs."""
    caption = escape_around_math("Fairness card. " + " ".join(_notes(rows)))
    return "\n".join([*latex_table(_blocks(rows, LATEX_STYLE), 6, caption, "tab:fairness"), ""])


def _blocks(rows: Sequence[Fairness], style: Style) -> list[list[list[str]]]:
    header = ["Bits", "Method", "Setting", "Weight ranges", "Activation ranges", "Activations", "Trained", "Branch params", "Branch MACs"]
    header += ["Effective weight bits", "Mean activation bits", "Time (s)", "Peak (MiB)"]
    blocks: dict[str, list[list[str]]] = {}
    for row in rows:
        words = [row.weight_ranges, row.act_ranges, row.activations]
        shares = [f"{share:.1f}{style.text('%')}" if row.branch_params else "–" for share in (row.branch_params_pct, row.branch_macs_pct)]
        measured = ["–" if value is None else f"{value:.0f}" for value in (row.seconds, row.peak_mib)]
        setting = setting_cell(RowSetting(row.granularity, {"": (0, 0)} if row.reduced else {}), style)
        cells = [row.bits, style.text(row.method), setting, *map(style.text, words), f"{row.trained_params:,}", *shares]
        blocks.setdefault(row.bits, []).append([*cells, f"{row.weight_bits:.3f}", f"{row.act_bits:.3f}", *measured])
    return [[header], *blocks.values()]


def _notes(rows: Sequence[Fairness]) -> list[str]:
    notes = [
        "Weight ranges: one for each output channel, and for each half, group or part of its input channels where named; asymmetric unless it "
        "says symmetric. Activation ranges: one for a tensor (the whole input of a call), a frame or a token.",
        "Trained: numbers that the method trained by gradients.",
        "Branch: parameters and multiply-accumulates of the low-rank branch, in percent of the full-precision U-Net's.",
        "Effective weight bits: everything that the checkpoint holds for the quantized layers (integers, scales, zero points, smoothing, signs, "
        "branch, biases, tables; all forms where a layer has several), over the number of their weights. Mean activation bits: weighted by "
        "multiply-accumulates.",
        "Time and peak memory: of the job that quantized, as Snakemake measured them on the machine of the run, reading the model included; "
        "– where nothing was measured.",
    ]
    left = {
        row: f"{row.left_out} of {row.left_out + row.layers} layers left at full precision ({row.exclude or 'none named'})" for row in rows
    }
    data = {
        row: f"calibrated on {'–' if row.calibration_samples is None else row.calibration_samples} samples of data set {row.calibration_dataset or '–'}"
        + (f" at {row.calibration_steps} sampling steps" if row.calibration_steps is not None else "")
        + f", digest {row.calibration_digest}"
        for row in rows
    }
    return notes + _shared(rows, left) + _shared(rows, data)


def _shared(rows: Sequence[Fairness], texts: Mapping[Fairness, str]) -> list[str]:
    """A line for all rows where they agree, else one for each text with the rows that it is true of."""
    of: dict[str, list[str]] = {}
    for row in rows:
        of.setdefault(texts[row], []).append(f"{row.method} {row.bits}")
    return [f"{'All' if len(of) == 1 else ', '.join(names)}: {text}." for text, names in of.items()]
