"""The method of interest against every other one at the same bits, clip by clip: difference, interval, test, and what could be shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qvsr.plan import REFERENCES
from qvsr.registry import METRICS
from qvsr.report.tables import (
    LATEX_STYLE,
    MARKDOWN,
    OWN,
    Style,
    csv_text,
    kinds,
    latex_prose,
    latex_table,
    markdown_table,
    metric_column,
    metric_order,
    plural,
    row_order,
)
from qvsr.results import Group, ResultError, Row, by_clip, describe, grouped, seeds_of
from qvsr.statistics import ALPHA, EXACT_UP_TO, FEWEST, Paired, adjusted, paired

COLUMNS = (
    "backbone", "dataset", "bits", "metric", "method", "execution", "other", "other_execution", "difference", "low", "high", "interval",
    "p", "p_adjusted", "clips", "seeds", "detectable", "signature",
)  # fmt: skip
SHOWN = ("psnr", "psnr_fp")  # in the tables for people; the csv has every metric
LINK = "[Comparisons](comparisons.md): paired differences, their intervals, tests, and the smallest difference that the clips could have shown."


@dataclass(frozen=True)
class Comparison:
    """One metric of the method of interest, less that of another at the same bits.

    Attributes:
        paired: the differences, method - other.
        p_adjusted: p after Benjamini and Hochberg over the others of the same bits and metric.
    """

    backbone: str
    dataset: str
    bits: str
    metric: str
    method: str
    execution: str
    other: str
    other_execution: str
    paired: Paired
    seeds: int
    signature: str
    p_adjusted: float | None = None


def compare(rows: Iterable[Row], methods: Sequence[str] = (), metrics: Sequence[str] = ()) -> list[Comparison]:
    """All comparisons in the order of the tables.

    The method of interest is our own where it is a row, else the first.

    Args:
        rows: of all clips and methods, in any order.
        methods, metrics: the order of rows and columns; default: by name, as registered.
    Raises:
        qvsr.results.ResultError: rows that have no common mean, or methods that were measured in different ways.
    """
    families: dict[tuple[str, str, str, str], dict[tuple[str, str], Group]] = {}
    for (backbone, dataset, method, bits, execution, metric), group in grouped(rows).items():
        if method not in REFERENCES:
            families.setdefault((backbone, dataset, bits, metric), {})[method, execution] = group
    names = metric_order((metric for *_, metric in families), metrics)
    found = []
    for place in sorted(families, key=lambda f: (f[0], f[1], row_order("", f[2]), names.index(f[3]))):
        backbone, dataset, bits, metric = place
        members = sorted(families[place], key=lambda member: (row_order(member[0], bits, methods), member[1]))
        first = next((member for member in members if member[0] in OWN), members[0])
        own, others = families[place][first], [member for member in members if member != first]
        row = _any(own)
        for other in others:
            theirs = _any(families[place][other]).signature
            if theirs != row.signature:
                key = (backbone, dataset, other[0], bits, other[1], metric)
                raise ResultError(f"{describe(key)}: measured as {theirs}, {first[0]} as {row.signature}; measure both under one protocol")
        family = [_compared(families[place][other], own) for other in others]
        signature = row.signature + (f"|limit:{row.limit}" if row.limit is not None else "")
        for other, one, p in zip(others, family, adjusted([one.p for one in family]), strict=True):
            line = Comparison(backbone, dataset, bits, metric, *first, *other, one, len(seeds_of(own)), signature)
            found.append(replace(line, p_adjusted=p))
    return found


def _any(group: Group) -> Row:
    return next(iter(next(iter(group.values())).values()))


def _compared(other: Group, own: Group) -> Paired:
    second, first = by_clip(own), by_clip(other)
    return paired([first[clip] for clip in second], list(second.values()))


def write(folder: Path, compared: Sequence[Comparison]) -> None:
    """Write comparisons.csv, comparisons.md and comparisons.tex into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparisons.csv").write_text(to_csv(compared), encoding="utf-8")
    (folder / "comparisons.md").write_text(to_markdown(compared), encoding="utf-8")
    (folder / "comparisons.tex").write_text(to_latex(compared), encoding="utf-8")


def to_csv(compared: Sequence[Comparison]) -> str:
    """Long and tidy, every metric; empty where there is no number."""
    lines = []
    for one in compared:
        found = one.paired
        numbers = [found.difference, found.within.low, found.within.high]
        cells: list[object] = [one.backbone, one.dataset, one.bits, one.metric, one.method, one.execution, one.other, one.other_execution]
        cells += [*numbers, found.within.kind, found.p, one.p_adjusted, found.clips, one.seeds, found.detectable, one.signature]
        lines.append(["" if cell is None else repr(cell) if isinstance(cell, float) else str(cell) for cell in cells])
    return csv_text(COLUMNS, lines)


def to_markdown(compared: Sequence[Comparison]) -> str:
    """A heading and a table for each data set and number of bits, with what the columns mean below."""
    parts = []
    for group in _by_place(compared):
        parts += [f"### {_heading(group)}", "", *markdown_table(_cells(group, MARKDOWN), 2), ""]
    return "\n".join([*parts, *(f"- {note}" for note in notes(compared)), ""])


def to_latex(compared: Sequence[Comparison]) -> str:
    """The same for LaTeX with booktabs."""
    parts = []
    for index, group in enumerate(_by_place(compared)):
        caption = latex_prose(f"{_heading(group)}. {' '.join(notes(group))}")
        parts += [*latex_table(_cells(group, LATEX_STYLE), 2, caption, f"tab:comparisons-{index + 1}"), ""]
    return "\n".join(parts)


def notes(compared: Sequence[Comparison]) -> list[str]:
    """What the columns mean, and what so few clips can and cannot say."""
    clips = sorted({one.paired.clips for one in compared})
    most, seeds = max(clips), max(one.seeds for one in compared)
    found = [
        "Difference: mean over clips of the paired differences, the first method less the other; above 0 is better where ↑ stands, below 0 where ↓ does. "
        f"In brackets its 95 % {kinds(one.paired.within.kind for one in compared)} interval. comparisons.csv has every metric.",
        "p: two-sided sign-flip test over the clips"
        + (f", {'exact' if most <= EXACT_UP_TO else f'exact up to {EXACT_UP_TO} clips, else 9999 draws with a fixed seed'}. ")
        + "Adjusted: by Benjamini and Hochberg over the methods of a table's metric"
        + (f"; * below {ALPHA}." if most >= FEWEST else "."),
        "The test takes clips to be independent, which clips cut from one video are only in part; the interval also takes the differences to be normal, "
        "so the two may disagree at the edge.",
        "Could show: the smallest true difference that so many clips with such a spread show in 80 % of cases (two-sided, 5 %, paired t, one comparison). "
        "A difference that is not shown is not shown to be none.",
    ]
    if seeds > 1:
        found.append(f"A clip's value is the mean over {seeds} seeds of the noise.")
    return found + [few_note(count) for count in clips if count < FEWEST]


def few_note(clips: int) -> str:
    """What it means to have fewer clips than a test needs."""
    if clips == 1:
        return "1 clip has no spread over clips: there is no interval, and no test says anything."
    return (
        f"{plural(clips, 'clip')}: the smallest p that the test can give is 2/2^{clips} = {2 / 2**clips:g}, when every clip points the same way. "
        f"No difference can be shown at {ALPHA:.0%}, however large, and nothing is starred; {FEWEST} clips are the fewest that could. "
        "Differences and intervals describe these clips; that they hold for others is not shown."
    )


def _by_place(compared: Sequence[Comparison]) -> list[list[Comparison]]:
    """Groups of one data set and number of bits, each with the metrics that are shown: PSNR and fidelity, or the first that have values."""
    places: dict[tuple[str, str, str], list[Comparison]] = {}
    for one in compared:
        places.setdefault((one.backbone, one.dataset, one.bits), []).append(one)
    groups = []
    for group in places.values():
        valued = list(dict.fromkeys(one.metric for one in group if one.paired.difference is not None)) or [group[0].metric]
        shown = [name for name in SHOWN if name in valued] or valued[: len(SHOWN)]
        groups.append([one for name in shown for one in group if one.metric == name])
    return groups


def _heading(group: Sequence[Comparison]) -> str:
    one = group[0]
    several = len({o.other_execution for o in group} | {one.execution}) > 1
    name = one.method + (f" ({one.execution})" if several else "")
    return f"{one.dataset}, {one.bits}, {one.backbone}: {name} less each other, {plural(one.paired.clips, 'clip')}"


def _cells(group: Sequence[Comparison], style: Style) -> list[list[list[str]]]:
    """The header, then one block of lines a metric."""
    several = len({one.other_execution for one in group} | {group[0].execution}) > 1
    header = ["Metric", "Less", "Difference", "p", "Adjusted", "Could show"]
    blocks: dict[str, list[list[str]]] = {}
    for one in group:
        other = one.other + (f" ({one.other_execution})" if several else "")
        cells = [
            metric_column(one.metric, style),
            style.text(other),
            *paired_cells(one.paired, one.p_adjusted, METRICS[one.metric].facts["digits"]),
        ]
        blocks.setdefault(one.metric, []).append(cells)
    return [[header], *blocks.values()]


def paired_cells(found: Paired, p_adjusted: float | None, digits: int) -> list[str]:
    """Difference with its interval, p, adjusted p, smallest detectable difference; a star only where there are clips enough to earn it."""
    if found.difference is None:
        return ["–"] * 4
    low, high = found.within.low, found.within.high
    between = "" if low is None or high is None else f" ({low:+.{digits}f} to {high:+.{digits}f})"
    star = "*" if p_adjusted is not None and p_adjusted < ALPHA and found.clips >= FEWEST else ""
    smallest = "–" if found.detectable is None else "nothing" if math.isinf(found.detectable) else f"{found.detectable:.{digits}f}"
    return [f"{found.difference:+.{digits}f}{between}", _p(found.p), _p(p_adjusted) + star, smallest]


def _p(value: float | None) -> str:
    return "–" if value is None else "<0.001" if value < 0.0005 else f"{value:.3f}"
