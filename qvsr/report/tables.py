"""Tables of metrics and cost: a tidy CSV for programs, Markdown and LaTeX for people.

The same rows give the same bytes, whatever the order in which they come. In the wide tables the best value among the quantized methods at
the same bits is bold (all that print alike; only where two or more can be compared); ground truth, bicubic and full precision stand
for orientation and are never bold.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvsr.config import Config
from qvsr.method_settings import MethodSettings, reduced
from qvsr.plan import GROUND_TRUTH, REFERENCES
from qvsr.quant.cost import Cost
from qvsr.registry import METRICS
from qvsr.results import Row, Summary, aggregate
from qvsr.settings import Settings
from qvsr.statistics import NAMES

OWN = ("quantvsr",)  # the method that the others are compared with comes last in its block
METRIC_COLUMNS = (
    "backbone",
    "dataset",
    "method",
    "bits",
    "execution",
    "metric",
    "value",
    "low",
    "high",
    "clips",
    "frames",
    "signature",
    "seeds",
    "seed_sd",
    "interval",
)
COST_COLUMNS = (
    "method",
    "bits",
    "params_m",
    "params_saved_pct",
    "macs_g",
    "macs_saved_pct",
    "attention_macs_g",
    "rotation_macs_g",
    "rank_mean",
    "params_exact_m",
    "macs_exact_g",
    "quantized_layers",
    "layers",
)
UNITS = {"1e-3": ("×10⁻³", r"$\times 10^{-3}$")}
CARD = "fairness.md"
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{c: "\\" + c for c in "&%$#_{}"}}


@dataclass(frozen=True)
class RowSetting:
    """How a method was run.

    Attributes:
        granularity: `shared` by all methods, or the method's `native` one.
        reduced: settings below the published defaults, as ``{name: (value, default)}``.
    """

    granularity: str = "shared"
    reduced: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def row_setting(header: Mapping[str, Any]) -> RowSetting:
    """How the method of a checkpoint was run, from the settings in its header; a method without settings is `shared` and complete."""
    known = MethodSettings.model_fields.get(header.get("base", header["method"]))
    kind = known.annotation if known is not None else None
    if not (isinstance(kind, type) and issubclass(kind, Settings)):
        return RowSetting()
    own = kind.model_validate(header["spec"]["settings"])
    return RowSetting(getattr(own, "granularity", "shared"), reduced(own))


@dataclass(frozen=True)
class Style:
    """How a wide table is written: Markdown or LaTeX."""

    text: Callable[[str], str]
    bold: Callable[[str], str]
    emphasis: Callable[[str], str]
    up: str
    down: str
    infinite: str
    between: str  # a mean and its standard deviation
    unit: int  # index into UNITS' pairs


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it is.

    >>> print(latex_escape("full_precision 100% {a}"))
    full\\_precision 100\\% \\{a\\}
    """
    return "".join(LATEX.get(character, character) for character in text)


def markdown_escape(text: str) -> str:
    """Text that does not end a cell of a Markdown table."""
    return text.replace("|", "\\|")


MARKDOWN = Style(markdown_escape, "**{}**".format, "*{}*".format, "↑", "↓", "inf", " ± ", 0)
LATEX_STYLE = Style(
    latex_escape, r"\textbf{{{}}}".format, r"\emph{{{}}}".format, r"$\uparrow$", r"$\downarrow$", r"$\infty$", r" $\pm$ ", 1
)
MISSING = "n/a"
SYMBOLS = {"↑": LATEX_STYLE.up, "↓": LATEX_STYLE.down, "±": r"$\pm$", "×": r"$\times$", "−": "$-$", "⁻³": "$^{-3}$"}


def bits_order(bits: str) -> tuple[int, ...]:
    """Sorts W8A8 before W6A6 before W4A4: most bits first."""
    return tuple(-int(number) for number in re.findall(r"\d+", bits))


def row_order(method: str, bits: str, methods: Sequence[str] = ()) -> tuple[object, ...]:
    """Place of a row: those for orientation, then by bits; within bits as in `methods`, else by name with our own last."""
    if method in REFERENCES:
        return (0, REFERENCES.index(method), (), 0, 0, method)
    listed = (0, methods.index(method)) if method in methods else (1, 1 if method in OWN else 0)
    return (1, 0, bits_order(bits), *listed, method)


def metric_order(names: Iterable[str], wanted: Sequence[str] = ()) -> list[str]:
    """Metrics in the wanted order, the rest as registered."""
    known = [*wanted, *METRICS]
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def number(value: float | None, digits: int, style: Style = MARKDOWN) -> str:
    """A value as printed in wide tables; n/a where there is none."""
    if value is None:
        return MISSING
    return style.infinite if math.isinf(value) else f"{value:.{digits}f}"


# -------------------------------------------------------------------------------------------------------------- metrics


def ordered(rows: Iterable[Row], methods: Sequence[str] = (), metrics: Sequence[str] = ()) -> list[Summary]:
    """Means over clips in the order of the tables.

    Args:
        rows: of all clips and methods, in any order.
        methods, metrics: the order of rows and columns; default: by name, as registered.
    Raises:
        qvsr.results.ResultError: rows that must not be averaged, such as a method without one of the clips.
    """
    summaries = aggregate(rows)
    names = metric_order((s.metric for s in summaries), metrics)
    return sorted(
        summaries,
        key=lambda s: (s.backbone, s.dataset, row_order(s.method, s.bits, methods), s.execution, names.index(s.metric)),
    )


def metrics_csv(summaries: Sequence[Summary]) -> str:
    """Long and tidy, one line a metric; full precision of the numbers, empty where there is none."""

    def cell(value: object) -> str:
        return "" if value is None else repr(value) if isinstance(value, float) else str(value)

    lines = [[cell(signature(s) if column == "signature" else getattr(s, column)) for column in METRIC_COLUMNS] for s in summaries]
    return csv_text(METRIC_COLUMNS, lines)


def signature(summary: Summary) -> str:
    """A mean's signature: that of its values, marked if only a part of the data set was used."""
    return summary.signature + (f"|limit:{summary.limit}" if summary.limit is not None else "")


def metrics_markdown(
    summaries: Sequence[Summary],
    notes: Sequence[str] = (),
    settings: Mapping[tuple[str, str], RowSetting] | None = None,
    links: Sequence[str] = (),
) -> str:
    """Wide tables, one a data set, with links, footnotes (ours, then `notes`) and signatures; see :func:`write_metrics`."""
    parts = []
    for group in _by_dataset(summaries):
        table = _wide(group, MARKDOWN, settings or {})
        parts += [f"### {_heading(group)}", "", *markdown_table(table, 3 if settings else 2), ""]
        if settings:
            parts += [f"[Fairness card]({CARD}): ranges, calibration, training, side branch and effective bits of each method.", ""]
        parts += [line for link in links for line in (link, "")]
        parts += [f"- {line}" for line in (*_footnotes(group, settings or {}), *notes)]
        parts += ["- Signatures:", *(f"  - `{line}`" for line in _signatures(group)), ""]
    return "\n".join(parts)


def metrics_latex(
    summaries: Sequence[Summary], notes: Sequence[str] = (), settings: Mapping[tuple[str, str], RowSetting] | None = None
) -> str:
    """The same tables for LaTeX with booktabs; a block of lines for each bits, signatures as comments."""
    parts = []
    for group in _by_dataset(summaries):
        caption = latex_prose(f"{_heading(group)}. {' '.join((*_footnotes(group, settings or {}), *notes))}")
        parts += [f"% {line}" for line in _signatures(group)]
        wide = _wide(group, LATEX_STYLE, settings or {})
        parts += latex_table(wide, 3 if settings else 2, caption, f"tab:metrics-{group[0].dataset}")
        parts.append("")
    return "\n".join(parts)


def latex_prose(text: str) -> str:
    """A note in plain text, with our few symbols, for LaTeX; unlike :func:`escape_around_math` it takes any text, a `$` too.

    >>> print(latex_prose("$HOME: 1 ± 2, ↑"))
    \\$HOME: 1 $\\pm$ 2, $\\uparrow$
    """
    text = latex_escape(text)
    for symbol, command in SYMBOLS.items():
        text = text.replace(symbol, command)
    return text


def escape_around_math(text: str) -> str:
    return "".join(piece if piece.startswith("$") else latex_escape(piece) for piece in re.split(r"(\$[^$]*\$)", text))


def write_metrics(
    folder: Path,
    summaries: Sequence[Summary],
    notes: Sequence[str] = (),
    settings: Mapping[tuple[str, str], RowSetting] | None = None,
    links: Sequence[str] = (),
) -> None:
    """Write metrics.csv, metrics.md and metrics.tex into a folder.

    Args:
        summaries: in the order of the tables, of :func:`ordered`.
        notes: more footnotes.
        settings: how each (method, bits) was run, a column of the wide tables; None leaves it and the link to the fairness card out.
        links: lines of Markdown below each table, to the files beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(metrics_csv(summaries), encoding="utf-8")
    (folder / "metrics.md").write_text(metrics_markdown(summaries, notes, settings, links), encoding="utf-8")
    (folder / "metrics.tex").write_text(metrics_latex(summaries, notes, settings), encoding="utf-8")


def _by_dataset(summaries: Sequence[Summary]) -> list[list[Summary]]:
    groups: dict[tuple[str, str], list[Summary]] = {}
    for s in summaries:
        groups.setdefault((s.backbone, s.dataset), []).append(s)
    return list(groups.values())


def _heading(group: Sequence[Summary]) -> str:
    first = group[0]
    limit = f", limit={first.limit}" if first.limit is not None else ""
    return f"{first.dataset}, {first.backbone}: {plural(first.clips, 'clip')}, {plural(first.frames, 'frame')}{limit}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _footnotes(group: Sequence[Summary], settings: Mapping[tuple[str, str], RowSetting]) -> list[str]:
    first = group[0]
    notes = [
        "↑ higher is better, ↓ lower is better. Bold: best of the methods at the same bits; the rows above them are there for orientation.",
        f"A value is the mean over the frames of a clip, then over {plural(first.clips, 'clip')}; "
        + (
            f"metrics.csv has the 95 % {kinds(s.interval for s in group)} intervals over clips."
            if first.clips > 1
            else "one clip gives no interval."
        ),
        *_seed_note(group),
        *missing_notes((s.metric, s.missing) for s in group),
    ]
    if any(METRICS[s.metric].facts["needs"] == "fp" for s in group):
        notes.append("Metrics ending in _fp compare with the output of full_precision, which is identical to itself (inf, 1).")
    if any(s.method == GROUND_TRUTH for s in group):
        notes.append("ground_truth is compared with itself; what moves in it has a warping error too, by which to read the others'.")
    executions = sorted({s.execution for s in group if s.method not in REFERENCES})
    if "external" in executions:
        executions.remove("external")
        notes.append(f"Frames written by another program: {', '.join(sorted({s.method for s in group if s.execution == 'external'}))}.")
    if executions == ["simulated"]:
        notes.append("Quantized rows are simulated: floating point on rounded values.")
    if executions == ["packed"]:
        notes.append("Quantized rows are packed: integers in memory, multiplied as integers.")
    found = {s.method: settings[s.method, s.bits] for s in group if (s.method, s.bits) in settings}
    if found:
        notes.append(
            "Setting: granularity shared by all methods (a range per output channel of a weight and per input tensor) or the method's native one."
        )
    notes += [reduced_note(method, setting) for method, setting in found.items() if setting.reduced]
    if first.limit is not None:
        notes.append(f"limit={first.limit}: only the first clips of the data set were used; not a result to quote.")
    return notes


def kinds(found: Iterable[str]) -> str:
    """Names of the kinds of intervals that were found.

    >>> kinds(["t", "", "bca", "t"])
    'BCa bootstrap or Student-t'
    """
    return " or ".join(NAMES[kind] for kind in sorted(set(found)) if kind) or NAMES["t"]


def missing_notes(found: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each reason why values are missing, with the metrics that it concerns.

    Args:
        found: (metric, reason); an empty reason is none.
    """
    metrics: dict[str, dict[str, None]] = {}
    for metric, reason in found:
        if reason:
            metrics.setdefault(reason, {})[metric] = None
    return [f"{MISSING} in {', '.join(names)}: {reason}" for reason, names in metrics.items()]


def _seed_note(group: Sequence[Summary]) -> list[str]:
    most = max(s.seeds for s in group)
    if most == 1:
        return []
    note = f"±: standard deviation over {most} seeds of the noise, of the mean over clips; before that mean, a clip's value is its mean over the seeds."
    single = list(dict.fromkeys(s.method for s in group if s.seeds == 1))
    if single:
        note += f" Frames of {', '.join(single)} have one: their _fp metrics compare with full_precision of the run's own seed."
    return [note]


def reduced_note(method: str, setting: RowSetting) -> str:
    """What of a method is below its published defaults."""

    def shown(value: Any) -> str:
        return "all" if value is None else str(value)

    parts = [f"{name} {shown(value)} ({shown(default)})" for name, (value, default) in setting.reduced.items()]
    return f"{method} is reduced (in brackets the published default): {', '.join(parts)}."


def _signatures(group: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(signature(s) for s in group))


def _wide(group: Sequence[Summary], style: Style, settings: Mapping[tuple[str, str], RowSetting]) -> list[list[list[str]]]:
    """Blocks of lines of cells: the header, then one block a precision."""
    names = list(dict.fromkeys(s.metric for s in group))
    names = metric_order(names, names)
    several = len({s.execution for s in group if s.method not in REFERENCES} - {"external"}) > 1
    header = ["Bits", "Method", *(["Setting"] if settings else []), *(metric_column(name, style) for name in names)]
    lines: dict[tuple[str, str, str], dict[str, Summary]] = {}
    for s in group:
        lines.setdefault((s.method, s.bits, s.execution), {})[s.metric] = s
    blocks: dict[str, list[list[str]]] = {}
    for (method, bits, execution), values in lines.items():
        label = style.text(method + (f" ({execution})" if several and method not in REFERENCES else ""))
        cells = [
            _cell(values.get(name), [v for (m, b, _), v in lines.items() if b == bits and m not in REFERENCES], method, style, name)
            for name in names
        ]
        if settings:
            cells.insert(0, setting_cell(settings.get((method, bits)), style))
        block = "" if method in REFERENCES else bits
        blocks.setdefault(block, []).append(["–" if method in (GROUND_TRUTH, "bicubic") else bits, label, *cells])
    return [[header], *blocks.values()]


def setting_cell(setting: RowSetting | None, style: Style) -> str:
    """`shared` or `native`, and *reduced* where less was done than published; a dash for what is not quantized."""
    if setting is None:
        return "–"
    return style.text(setting.granularity) + (f", {style.emphasis('reduced')}" if setting.reduced else "")


def metric_column(name: str, style: Style) -> str:
    facts = METRICS[name].facts
    unit = UNITS[facts["unit"]][style.unit] if facts["unit"] in UNITS else style.text(facts["unit"])
    return f"{style.text(name)}{f' ({unit})' if unit else ''} {style.up if facts['higher_is_better'] else style.down}"


def _cell(summary: Summary | None, rivals: Sequence[dict[str, Summary]], method: str, style: Style, name: str) -> str:
    if summary is None:
        return "–"
    facts = METRICS[name].facts
    digits = facts["digits"]
    text = number(summary.value, digits, style)
    spread = f"{style.between}{summary.seed_sd:.{digits}f}" if summary.seed_sd is not None else ""
    if method in REFERENCES or summary.value is None:
        return text + spread
    printed = [float(number(rival[name].value, digits)) for rival in rivals if name in rival and rival[name].value is not None]
    best = max(printed) if facts["higher_is_better"] else min(printed)
    return (style.bold(text) if len(printed) > 1 and float(number(summary.value, digits)) == best else text) + spread


# ----------------------------------------------------------------------------------------------------------------- cost


def cost_lines(costs: Iterable[Cost], methods: Sequence[str] = ()) -> list[dict[str, object]]:
    """Cost rows in the order of the tables, with what each saves against full precision."""
    costs = sorted(costs, key=lambda c: row_order(c.method, c.bits, methods))
    full = next((c for c in costs if c.method == "full_precision"), None)
    lines = []
    for c in costs:
        saved = {
            f"{what}_saved_pct": 100 * (1 - getattr(c, column) / getattr(full, column)) if full is not None else None
            for what, column in (("params", "params_m"), ("macs", "macs_g"))
        }
        lines.append(c.row() | saved)
    return lines


def write_cost(folder: Path, costs: Iterable[Cost], call: str, methods: Sequence[str] = ()) -> None:
    """Write cost.csv, cost.md and cost.tex into a folder.

    Args:
        costs: one a method and bits, in any order.
        call: what one call of the network is, for the footnote.
        methods: the order of rows.
    """
    lines = cost_lines(costs, methods)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.csv").write_text(cost_csv(lines), encoding="utf-8")
    (folder / "cost.md").write_text(cost_markdown(lines, call), encoding="utf-8")
    (folder / "cost.tex").write_text(cost_latex(lines, call), encoding="utf-8")


def one_call(config: Config) -> str:
    """What one call of the U-Net is, for footnotes."""
    return f"one segment of {config.backbone.unet.num_frames} frames on a latent tile of {config.sampling.tile}×{config.sampling.tile}"


def cost_csv(lines: Sequence[dict[str, object]]) -> str:
    """All columns; millions and 1e9 with six decimals, that is to single parameters and thousands of operations."""

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)

    return csv_text(COST_COLUMNS, [[cell(line[column]) for column in COST_COLUMNS] for line in lines])


def cost_markdown(lines: Sequence[dict[str, object]], call: str) -> str:
    """A table of both countings, with what they count."""
    table = markdown_table(_cost_blocks(lines, MARKDOWN), 2)
    return "\n".join([*table, "", *(f"- {note}" for note in _cost_notes(call)), ""])


def cost_latex(lines: Sequence[dict[str, object]], call: str) -> str:
    """The same for LaTeX with booktabs."""
    caption = escape_around_math(" ".join(_cost_notes(call)).replace("×", "$\\times$"))
    return "\n".join([*latex_table(_cost_blocks(lines, LATEX_STYLE), 2, caption, "tab:cost"), ""])


def _cost_notes(call: str) -> list[str]:
    return [
        f"The U-Net alone, in 32-bit equivalents; MACs are multiply-accumulates of one call: {call}.",
        "Params and MACs as published: everything × b/32 plus the 32-bit low-rank branch, bias additions counted, attention products and rotations not.",
        "Exact: every number at the precision it is kept or multiplied in; unquantized layers, scales, attention products and (dense) rotations counted.",
    ]


def _cost_blocks(lines: Sequence[dict[str, object]], style: Style) -> list[list[list[str]]]:
    percent = style.text("%")
    header = ["Bits", "Method", "Params (M)", f"saved ({percent})", "MACs (G)", f"saved ({percent})", "Mean rank"]
    header += ["Exact params (M)", "Exact MACs (G)", "Attention (G)", "Rotation (G)"]
    blocks: dict[str, list[list[str]]] = {}
    for line in lines:
        columns = [("params_m", 3), ("params_saved_pct", 1), ("macs_g", 3), ("macs_saved_pct", 1), ("rank_mean", 1)]
        columns += [("params_exact_m", 3), ("macs_exact_g", 3), ("attention_macs_g", 3), ("rotation_macs_g", 3)]
        cells = ["–" if line[name] is None else f"{line[name]:.{digits}f}" for name, digits in columns]
        if line["method"] in REFERENCES:
            cells[1] = cells[3] = cells[4] = "–"
        blocks.setdefault(str(line["bits"]), []).append([str(line["bits"]), style.text(str(line["method"])), *cells])
    return [[header], *blocks.values()]


# -------------------------------------------------------------------------------------------------------------- writers


def csv_text(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


def markdown_table(blocks: Sequence[Sequence[Sequence[str]]], left: int) -> list[str]:
    """Lines of a table whose first `left` columns are aligned left, the rest right; padded, so that the source can be read too."""
    lines = [line for block in blocks for line in block]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def row(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return [row(lines[0]), rule, *(row(line) for line in lines[1:])]


def latex_table(blocks: Sequence[Sequence[Sequence[str]]], left: int, caption: str, label: str) -> list[str]:
    columns = "l" * left + "r" * (len(blocks[0][0]) - left)
    out = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{{label}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
    ]
    for index, block in enumerate(blocks):
        out += [r"\midrule"] if index else []
        out += [" & ".join(cell.replace("–", "--") for cell in line) + r" \\" for line in block]
    return [*out, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
