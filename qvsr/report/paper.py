"""Ours against the published numbers (arXiv 2508.04485), on the paper's data, network and protocol; on any other there is no such table.

The numbers, the number of clips of each data set and the tolerances with their reasons are files of the folder `paper` beside this one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvsr.report.tables import MARKDOWN, csv_text, markdown_table, missing_notes, plural, row_order
from qvsr.results import Summary

FOLDER = Path(__file__).with_suffix("")
LINK = "[Against the paper](paper.md): these numbers beside the published ones."
BACKBONE, PROTOCOL = "mgld", "paper-v1"
# the paper's names of methods, and ours
METHODS = {
    "MGLD-VSR": "full_precision",
    "MaxMin": "maxmin",
    "Q-Diffusion": "q_diffusion",
    "QuaRot": "quarot",
    "ViDiT-Q": "vidit_q",
    "SVDQuant": "svdquant",
    "QuantVSR": "quantvsr",
}
COLUMNS = (
    "dataset", "bits", "method", "execution", "metric", "ours", "paper", "difference", "tolerance", "verdict", "clips", "seeds", "signature",
    "source",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One number beside the published one.

    Attributes:
        digits: decimals with which the paper prints the metric; ours is rounded to them before it is compared.
        tolerance: largest difference that is called `within`.
    """

    dataset: str
    bits: str
    method: str
    execution: str
    metric: str
    ours: float | None
    paper: float
    digits: int
    tolerance: float
    clips: int
    seeds: int
    signature: str
    source: str
    missing: str

    @property
    def difference(self) -> float | None:
        return None if self.ours is None else round(round(self.ours, self.digits) - self.paper, self.digits)

    @property
    def verdict(self) -> str:
        """`within`, `outside`, or nothing where there is no number of ours."""
        if self.difference is None:
            return ""
        return "within" if abs(self.difference) <= self.tolerance + 1e-9 else "outside"


def facts(name: str) -> list[dict[str, str]]:
    """Lines of a file of the folder, as they are printed.

    >>> facts("tables")[0]["method"], facts("tables")[0]["ssim"]
    ('MGLD-VSR', '0.6180')
    """
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def against(summaries: Iterable[Summary], methods: Sequence[str] = ()) -> tuple[list[Line], list[str]]:
    """Our means beside the published ones.

    Args:
        summaries: of any data; what the paper does not have is left out.
        methods: the order of rows.
    Returns:
        the lines in the order of the paper's data sets and of our tables; why a data set of the paper's, or a row, is not among them.
    """
    clips = {line["dataset"].lower(): line for line in facts("datasets")}
    published = {(line["dataset"].lower(), METHODS[line["method"]], line["bits"]): line for line in facts("tables")}
    tolerances = {line["metric"]: (float(line["tolerance"]), float(line["share"])) for line in facts("tolerances")}
    lines, notes = [], dict[str, None]()
    for s in summaries:
        name = s.dataset.lower()
        if s.backbone != BACKBONE or name not in clips or s.signature.split("|")[1:2] != [PROTOCOL] or s.metric not in tolerances:
            continue
        if s.limit is not None or s.clips != int(clips[name]["clips"]):
            of = f"limit={s.limit}" if s.limit is not None else plural(s.clips, "clip")
            notes[f"{s.dataset}: {of}, the paper has {clips[name]['clips']}: not compared with it."] = None
            continue
        row = published.get((name, s.method, s.bits))
        if row is None:
            notes[f"{s.dataset}: the paper has no {s.method} {s.bits}."] = None
            continue
        printed, (absolute, share) = row[s.metric], tolerances[s.metric]
        paper, digits = float(printed), len(printed.partition(".")[2])
        tolerance = max(absolute, share * paper)
        lines.append(
            Line(
                row["dataset"], s.bits, s.method, s.execution, s.metric, s.value, paper, digits, tolerance, s.clips, s.seeds, s.signature,
                row["source"], s.missing,
            )
        )  # fmt: skip
    order = [line["dataset"] for line in facts("datasets")]
    lines.sort(key=lambda o: (order.index(o.dataset), row_order(o.method, o.bits, methods), o.execution, list(tolerances).index(o.metric)))
    return lines, list(notes)


def write(folder: Path, lines: Sequence[Line], notes: Sequence[str] = ()) -> None:
    """Write paper.csv and paper.md into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "paper.csv").write_text(to_csv(lines), encoding="utf-8")
    (folder / "paper.md").write_text(to_markdown(lines, notes), encoding="utf-8")


def to_csv(lines: Sequence[Line]) -> str:
    """Long and tidy; ours in full precision, the difference as printed, empty where there is no number of ours."""

    def cell(value: object) -> str:
        return "" if value is None else repr(value) if isinstance(value, float) else str(value)

    return csv_text(COLUMNS, [[cell(getattr(line, column)) for column in COLUMNS] for line in lines])


def to_markdown(lines: Sequence[Line], notes: Sequence[str] = ()) -> str:
    """A table for each data set, with how many of its numbers are within their tolerance."""
    parts = []
    for dataset in dict.fromkeys(line.dataset for line in lines):
        own = [line for line in lines if line.dataset == dataset]
        several = len({line.execution for line in own}) > 1
        valued = [line for line in own if line.verdict]
        body = []
        for line in own:
            shown = [
                f"{value:{sign}.{line.digits}f}" if value is not None else "n/a"
                for value, sign in ((line.ours, ""), (line.difference, "+"))
            ]
            name = MARKDOWN.text(line.method + (f" ({line.execution})" if several else ""))
            tolerance = f"{line.tolerance:.{line.digits}f}"
            body.append([line.bits, name, line.metric, shown[0], f"{line.paper:.{line.digits}f}", shown[1], tolerance, line.verdict or "–"])
        within = sum(line.verdict == "within" for line in valued)
        header = ["Bits", "Method", "Metric", "Ours", "Paper", "Difference", "Tolerance", "Verdict"]
        parts += [f"### {dataset} against {own[0].source}: {within} of {plural(len(valued), 'number')} within tolerance", ""]
        parts += [*markdown_table([[header], body], 3), ""]
    return "\n".join([*parts, *(f"- {note}" for note in (*_notes(lines), *notes)), ""])


def _notes(lines: Sequence[Line]) -> list[str]:
    found = {line.metric for line in lines}
    return [
        "Ours is the mean over clips under the protocol paper-v1, rounded as the paper prints it; the tolerance is the largest difference called within.",
        "Published numbers hold for the authors' own LQ files: another draw of the degradation shifts every row of a data set "
        "(MGLD-VSR on SPMCS: 22.81 dB in Table 3, 22.39 dB in DOVE's Table 2). If full_precision is outside, look there first.",
        "The paper's settings of the other methods are not published; a row of theirs may be outside for that alone.",
        "Tolerances were set before any run on these data: "
        + "; ".join(f"{line['metric']} {_tolerance(line)} ({line['reason']})" for line in facts("tolerances") if line["metric"] in found)
        + ".",
        *missing_notes((line.metric, line.missing) for line in lines),
    ]


def _tolerance(line: dict[str, str]) -> str:
    return line["tolerance"] + (f" or {float(line['share']):.0%}" if float(line["share"]) else "")
