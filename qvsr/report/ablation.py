"""The ablation's tables: rows that differ in a few settings, each compared with the first of its table, clip by clip."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvsr.registry import METRICS
from qvsr.report.fairness import Fairness
from qvsr.report.tables import (
    LATEX_STYLE,
    MARKDOWN,
    Style,
    bits_order,
    csv_text,
    kinds,
    latex_prose,
    latex_table,
    markdown_table,
    metric_column,
    missing_notes,
    number,
    plural,
)
from qvsr.results import Row, by_clip, grouped, mean
from qvsr.statistics import Interval, interval

COLUMNS = (
    "table", "backbone", "dataset", "bits", "row", "method", "settings", "weight_bits", "act_bits", "metric", "value",
    "change", "change_low", "change_high", "clips",
)  # fmt: skip
FIDELITY = "psnr_fp"


@dataclass(frozen=True)
class Variant:
    """What stands behind a row's name: a method and its resolved settings, as plain values."""

    method: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Value:
    """A metric of one row: mean over clips, and the mean paired difference to the table's first row with its 95 % interval.

    The value is None where it is missing, the difference also where a value is infinite, the interval also where there is one clip or the
    row is the first itself.
    """

    value: float | None
    change: float | None
    within: Interval
    clips: int
    missing: str = ""


@dataclass(frozen=True)
class Table:
    """One ablation at one number of bits on one data set.

    Attributes:
        names: of the rows, in order; the first is what the others are compared with.
        settings: settings that differ within the table, in the order of the settings class.
        values: by row and metric.
    """

    title: str
    backbone: str
    dataset: str
    bits: str
    names: tuple[str, ...]
    settings: tuple[str, ...]
    values: Mapping[tuple[str, str], Value]


def differing(variants: Sequence[Variant]) -> tuple[str, ...]:
    """Settings that are not the same in all rows that have them.

    >>> differing([Variant("a", {"x": 1, "y": 2}), Variant("a", {"x": 1, "y": 3}), Variant("b", {})])
    ('y',)
    """
    keys = dict.fromkeys(key for variant in variants for key in variant.settings)
    return tuple(key for key in keys if len({json.dumps(v.settings[key]) for v in variants if key in v.settings}) > 1)


def compare(values: Mapping[str, float | None], first: Mapping[str, float | None], missing: str = "") -> Value:
    """A row's values by clip beside those of the first row."""
    own = [value for value in values.values() if value is not None]
    changes = [values[clip] - first[clip] for clip in first if values[clip] is not None and first[clip] is not None]
    finite = len(changes) == len(first) and all(math.isfinite(change) for change in changes)
    within = interval(changes) if finite and values is not first else Interval()
    return Value(mean(own) if len(own) == len(values) else None, mean(changes) if finite else None, within, len(values), missing)


def build(
    ablation: Mapping[str, Sequence[str]], variants: Mapping[str, Variant], rows: Sequence[Row], metrics: Sequence[str]
) -> list[Table]:
    """The tables in the order of the settings, for each data set and number of bits of the rows.

    Args:
        ablation: titles and names of rows.
        variants: what the names stand for.
        rows: of all clips of all named rows.
    """
    clips, missing = {}, {}
    for (backbone, dataset, method, bits, _, metric), group in grouped(rows).items():
        clips[backbone, dataset, bits, method, metric] = by_clip(group)
        reasons = [row.missing for by_seed in group.values() for row in by_seed.values() if row.missing]
        missing[backbone, dataset, bits, method, metric] = next(iter(reasons), "")
    places = sorted({key[:3] for key in clips}, key=lambda place: (*place[:2], bits_order(place[2])))
    tables = []
    for title, names in ablation.items():
        for place in places:
            values = {
                (name, metric): compare(clips[*place, name, metric], clips[*place, names[0], metric], missing[*place, name, metric])
                for name in names
                for metric in metrics
            }
            tables.append(Table(title, *place, tuple(names), differing([variants[name] for name in names]), values))
    return tables


def write(
    folder: Path,
    tables: Sequence[Table],
    variants: Mapping[str, Variant],
    cards: Mapping[tuple[str, str], Fairness],
    metrics: Sequence[str],
) -> None:
    """Write ablation.csv, ablation.md and ablation.tex into a folder.

    Args:
        cards: fairness cards by row and bits.
        metrics: the order of columns; the change of psnr_fp, or of the first of them, stands last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ablation.csv").write_text(to_csv(tables, variants, cards, metrics), encoding="utf-8")
    (folder / "ablation.md").write_text(to_markdown(tables, variants, cards, metrics), encoding="utf-8")
    (folder / "ablation.tex").write_text(to_latex(tables, variants, cards, metrics), encoding="utf-8")


def to_csv(
    tables: Sequence[Table], variants: Mapping[str, Variant], cards: Mapping[tuple[str, str], Fairness], metrics: Sequence[str]
) -> str:
    """Tidy, one line a metric."""
    lines = []
    for table in tables:
        for name in table.names:
            own = {key: variants[name].settings[key] for key in table.settings if key in variants[name].settings}
            card = cards[name, table.bits]
            for metric in metrics:
                value = table.values[name, metric]
                cells = [table.title, table.backbone, table.dataset, table.bits, name, variants[name].method, json.dumps(own)]
                cells += [f"{card.weight_bits:.6f}", f"{card.act_bits:.6f}", metric]
                cells += ["" if one is None else repr(one) for one in (value.value, value.change, value.within.low, value.within.high)]
                lines.append([*cells, str(value.clips)])
    return csv_text(COLUMNS, lines)


def to_markdown(
    tables: Sequence[Table], variants: Mapping[str, Variant], cards: Mapping[tuple[str, str], Fairness], metrics: Sequence[str]
) -> str:
    """A heading and a table each, with what the columns mean below."""
    parts = []
    for table in tables:
        parts += [f"### {table.title}", "", f"{_place(table)}", ""]
        parts += [*markdown_table(_cells(table, variants, cards, metrics, MARKDOWN), 1), ""]
    return "\n".join([*parts, *(f"- {note}" for note in _notes(tables, metrics)), ""])


def to_latex(
    tables: Sequence[Table], variants: Mapping[str, Variant], cards: Mapping[tuple[str, str], Fairness], metrics: Sequence[str]
) -> str:
    """The same for LaTeX with booktabs."""
    parts = []
    for index, table in enumerate(tables):
        caption = latex_prose(f"{table.title}. {_place(table)}. {' '.join(_notes(tables, metrics))}")
        parts += [*latex_table(_cells(table, variants, cards, metrics, LATEX_STYLE), 1, caption, f"tab:ablation-{index + 1}"), ""]
    return "\n".join(parts)


def _place(table: Table) -> str:
    return f"{table.bits}, {table.dataset}, {table.backbone}: {plural(next(iter(table.values.values())).clips, 'clip')}"


def _notes(tables: Sequence[Table], metrics: Sequence[str]) -> list[str]:
    values = [(metric, value) for table in tables for (_, metric), value in table.values.items()]
    made = kinds(value.within.kind for _, value in values)
    return [
        "Each table names the settings in which its rows differ; all others are those of the configuration.",
        "Effective W bits: what is stored for the quantized layers (integers, scales, zero points, signs, branch) by the number of their weights; "
        "A bits: the mean over layers, weighted by their multiply-accumulates.",
        f"The last column is the mean over clips of the difference to the first row in {_shown(metrics)}, with its 95 % {made} interval (paired by clip).",
        *missing_notes((metric, value.missing) for metric, value in values),
    ]


def _shown(metrics: Sequence[str]) -> str:
    return FIDELITY if FIDELITY in metrics else metrics[0]


def _cells(
    table: Table, variants: Mapping[str, Variant], cards: Mapping[tuple[str, str], Fairness], metrics: Sequence[str], style: Style
) -> list[list[list[str]]]:
    """The header and one block of lines."""
    shown = _shown(metrics)
    digits = METRICS[shown].facts["digits"]
    header = ["Row", *map(style.text, table.settings), "Effective W / A bits", *(metric_column(name, style) for name in metrics)]
    lines = []
    for name in table.names:
        own, change = variants[name].settings, table.values[name, shown]
        cells = [style.text(name), *(_setting(own[key]) if key in own else "" for key in table.settings)]
        card = cards[name, table.bits]
        cells.append(f"{card.weight_bits:.2f} / {card.act_bits:.2f}")
        cells += [number(table.values[name, metric].value, METRICS[metric].facts["digits"], style) for metric in metrics]
        lines.append([*cells, _change(change, digits) if name != table.names[0] else ""])
    return [[[*header, style.text(f"{shown} less {table.names[0]}'s")]], lines]


def _change(value: Value, digits: int) -> str:
    if value.change is None:
        return "–"
    low, high = value.within.low, value.within.high
    between = "" if low is None or high is None else f" ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"{value.change:+.{digits}f}{between}"


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
