"""Two files of result rows, clip by clip: what one method gains over another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qvsr import results
from qvsr.provenance import atomic_path
from qvsr.registry import METRICS, suggest
from qvsr.statistics import Paired, adjusted, paired

COLUMNS = (
    "dataset", "metric", "higher_is_better", "clips", "a", "b", "difference", "low", "high", "interval", "p", "p_adjusted", "detectable",
    "signature",
)  # fmt: skip


class CompareError(ValueError):
    """Rows that cannot be paired; the message names both sides."""


@dataclass(frozen=True)
class Line:
    """One metric on one data set.

    Attributes:
        a, b: means over clips; None where a value is missing.
        paired: the differences b - a.
        p_adjusted: p after Benjamini and Hochberg over all lines.
    """

    dataset: str
    metric: str
    a: float | None
    b: float | None
    paired: Paired
    p_adjusted: float | None
    signature: str
    missing: str


def run(a: Path, b: Path, metrics: Sequence[str] = (), row_a: str = "", row_b: str = "", out: Path | None = None) -> str:
    """Compare two files.

    Args:
        a, b: JSON-lines files of `measure`.
        metrics: names; default: all that both files have.
        row_a, row_b: the row that is meant, as METHOD-BITS; needed where a file has several.
        out: csv to write.
    Returns:
        the table for people, with what it means.
    """
    first, second = chosen(results.read(a), row_a, a, "--row-a"), chosen(results.read(b), row_b, b, "--row-b")
    lines, notes = compare(first, second, metrics)
    if out is not None:
        with atomic_path(out) as partial:
            partial.write_text(to_csv(lines), encoding="utf-8")
    names = [f"{side}: {path}{f', {_row(rows[0])}' if _row(rows[0]) else ''}" for side, path, rows in (("A", a, first), ("B", b, second))]
    return "\n".join([*names, "", *to_text(lines), "", *notes])


def _row(row: results.Row) -> str:
    return f"{row.method}-{row.bits}".strip("-")


def chosen(rows: Sequence[results.Row], name: str, file: Path, option: str) -> list[results.Row]:
    """The rows of one method.

    Raises:
        CompareError: several and none named, or no such row.
    """
    found = sorted({_row(row) for row in rows})
    if name and name not in found:
        raise CompareError(f"{file}: {suggest('row', name, found)}")
    if not name and len(found) > 1:
        raise CompareError(f"{file} has {len(found)} rows: {', '.join(found)}; choose one by {option} METHOD-BITS")
    own = [row for row in rows if not name or _row(row) == name]
    for what in ("backbone", "execution"):
        several = sorted({getattr(row, what) for row in own})
        if len(several) > 1:
            raise CompareError(f"{file}: {_row(own[0])} of several kinds of {what}: {', '.join(several)}; compare files that have one")
    return own


def compare(a: Sequence[results.Row], b: Sequence[results.Row], metrics: Sequence[str] = ()) -> tuple[list[Line], list[str]]:
    """Paired differences B - A by data set and metric, and what is to be said about them.

    Raises:
        CompareError: a metric, data set or clip on one side only, signatures or lengths of a clip that differ, no metric in common.
        qvsr.results.ResultError: rows of one side that have no common mean.
    """
    sides = [{(key[1], key[5]): group for key, group in results.grouped(rows).items()} for rows in (a, b)]
    notes = []
    for name in metrics:
        for side, groups in zip("AB", sides, strict=True):
            if name not in {metric for _, metric in groups}:
                raise CompareError(f"{side}: {suggest('metric', name, {metric for _, metric in groups})}")
    wanted = set(metrics) or {metric for _, metric in sides[0]} & {metric for _, metric in sides[1]}
    if not wanted:
        raise CompareError(f"A and B have no metric in common: {_metrics(sides[0])} on one side, {_metrics(sides[1])} on the other")
    for side, own, other in (("A", sides[0], sides[1]), ("B", sides[1], sides[0])):
        alone = sorted({metric for _, metric in own} - {metric for _, metric in other})
        if alone and not metrics:
            notes.append(f"Only {side} has {', '.join(alone)}: not compared.")
        for place in own:
            if place[1] in wanted and place not in other:
                raise CompareError(f"only {side} has data set {place[0] or 'of no name'} ({place[1]}): measure it on both sides")
    order = list(metrics) or list(dict.fromkeys(row.metric for row in a))
    places = sorted((place for place in sides[0] if place[1] in wanted), key=lambda place: (place[0], order.index(place[1])))
    lines = [_line(*place, sides[0][place], sides[1][place]) for place in places]
    corrected = adjusted([line.paired.p for line in lines])
    lines = [replace(line, p_adjusted=p) for line, p in zip(lines, corrected, strict=True)]
    return lines, [*notes, *_notes(lines, sides)]


def _metrics(groups: dict[tuple[str, str], results.Group]) -> str:
    return ", ".join(sorted({metric for _, metric in groups}))


def _line(dataset: str, metric: str, a: results.Group, b: results.Group) -> Line:
    where = f"{dataset}, {metric}".removeprefix(", ")
    for side, own, other in (("A", a, b), ("B", b, a)):
        alone = sorted(set(own) - set(other))
        if alone:
            raise CompareError(f"{where}: only {side} has clip {', '.join(alone)}; nothing is left out of a mean, measure it on both sides")
    one, two = (next(iter(next(iter(group.values())).values())) for group in (a, b))
    if one.signature != two.signature:
        raise CompareError(f"{where}: A was measured as {one.signature}, B as {two.signature}; measure both under one protocol")
    for clip in a:
        lengths = [next(iter(group[clip].values())).frames for group in (a, b)]
        if lengths[0] != lengths[1]:
            raise CompareError(f"{where}: clip {clip} has {lengths[0]} frames in A, {lengths[1]} in B; measure the same frames")
    reasons = [row.missing for group in (a, b) for by_seed in group.values() for row in by_seed.values() if row.missing]
    values = [list(results.by_clip({clip: group[clip] for clip in sorted(group)}).values()) for group in (a, b)]
    means = [results.mean([v for v in side if v is not None]) if None not in side else None for side in values]
    return Line(dataset, metric, means[0], means[1], paired(*values), None, one.signature, next(iter(reasons), ""))


def _notes(lines: Sequence[Line], sides: Sequence[dict[tuple[str, str], results.Group]]) -> list[str]:
    from qvsr.report.comparisons import few_note
    from qvsr.report.tables import kinds, missing_notes
    from qvsr.statistics import ALPHA, FEWEST

    counts = sorted({line.paired.clips for line in lines})
    notes = [
        "B - A: mean over clips of the paired differences; above 0 B is better where ↑ stands, below 0 where ↓ does. "
        f"In brackets its 95 % {kinds(line.paired.within.kind for line in lines)} interval. p: two-sided sign-flip test over the clips; "
        f"adjusted by Benjamini and Hochberg over the lines{f', * below {ALPHA}' if counts[-1] >= FEWEST else ''}.",
        "Could show: the smallest true difference that so many clips with such a spread show in 80 % of cases (two-sided, 5 %, paired t).",
        *(few_note(count) for count in counts if count < FEWEST),
        *missing_notes((line.metric, line.missing) for line in lines),
    ]
    seeds = [results.seeds_of(next(iter(side.values()))) for side in sides]
    if max(map(len, seeds)) > 1 or seeds[0] != seeds[1]:
        shown = [", ".join(map(str, side)) for side in seeds]
        notes.append(f"Noise seeds: A {shown[0]}; B {shown[1]}. A clip's value is its mean over them.")
    return notes


def to_text(lines: Sequence[Line]) -> list[str]:
    """A table that reads in a terminal and in Markdown."""
    from qvsr.report.comparisons import paired_cells
    from qvsr.report.tables import MARKDOWN, markdown_table, metric_column, number

    header = ["Data set", "Metric", "Clips", "A", "B", "B - A", "p", "Adjusted", "Could show"]
    body = []
    for line in lines:
        digits = METRICS[line.metric].facts["digits"]
        cells = [line.dataset or "–", metric_column(line.metric, MARKDOWN), str(line.paired.clips)]
        cells += [number(line.a, digits), number(line.b, digits), *paired_cells(line.paired, line.p_adjusted, digits)]
        body.append(cells)
    return markdown_table([[header], body], 2)


def to_csv(lines: Sequence[Line]) -> str:
    """One line a data set and metric; full precision of the numbers, empty where there is none."""
    from qvsr.report.tables import csv_text

    body = []
    for line in lines:
        found = line.paired
        better = str(METRICS[line.metric].facts["higher_is_better"]).lower()
        cells: list[object] = [line.dataset, line.metric, better, found.clips, line.a, line.b, found.difference, found.within.low]
        cells += [found.within.high, found.within.kind, found.p, line.p_adjusted, found.detectable, line.signature]
        body.append(["" if cell is None else repr(cell) if isinstance(cell, float) else str(cell) for cell in cells])
    return csv_text(COLUMNS, body)
