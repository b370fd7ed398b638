"""Tables of speed and memory from the files of bench: a page for people, tidy CSV, and what the README shows of them.

A ratio is how many times as fast as float32 in the same run; of layers, as the faster of its two layouts. Means over layers are geometric and weighted by
multiply-accumulates, as often as the network has the layer. Files of two machines, or of two numbers of threads, make no table.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qvsr.report.tables import csv_text, markdown_table, plural
from qvsr.speed.timing import FP32_LAST, HEAD, KINDS, BenchError, Row, decibels, weighted_geometric_mean

EQUAL = "same bytes"  # packed as simulated
MACHINE = "machine.json"
PAGE = "speed.md"
COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
SAME = ("device", "threads", "torch", "path")  # of all rows of a page


# ---------------------------------------------------------------- files


def rows_json(rows: Sequence[Row]) -> str:
    """A list with an object a line."""
    return "[\n" + ",\n".join(json.dumps(dataclasses.asdict(row), allow_nan=False) for row in rows) + "\n]\n"


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Head and rows of a file of bench.

    Raises:
        BenchError: it is missing or not such a file, or its head is not beside it.
    """
    head = path.with_name(path.stem + HEAD)
    for file in (path, head):
        if not file.is_file():
            raise BenchError(f"no file {file}; `python -m qvsr bench` writes both {path.name} and {head.name}")
    try:
        rows = [_row(one) for one in json.loads(path.read_text())]
        return json.loads(head.read_text()), rows
    except (ValueError, TypeError, KeyError) as error:
        raise BenchError(f"{path} was not written by this version of `python -m qvsr bench` ({error}): measure again") from None


def _row(values: Mapping[str, Any]) -> Row:
    unknown = set(values) ^ set(COLUMNS)
    if unknown:
        raise ValueError(f"{min(unknown)} is {'not known' if min(unknown) in values else 'missing'}")
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Row(**fields)


def rows_csv(rows: Sequence[Row]) -> str:
    """All columns; shapes as 320x320x3x3, what is None empty, numbers with six digits."""

    def cell(value: Any) -> str:
        if isinstance(value, tuple):
            return "x".join(map(str, value))
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

    return csv_text(COLUMNS, [[cell(getattr(row, name)) for name in COLUMNS] for row in rows])


def read_csv(text: str) -> list[Row]:
    """Rows from :func:`rows_csv`."""
    kinds = typing.get_type_hints(Row)

    def value(name: str, cell: str) -> Any:
        kind = kinds[name]
        if isinstance(kind, types.UnionType):
            if not cell:
                return None
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is tuple:
            return tuple(int(size) for size in cell.split("x"))
        return cell == "True" if kind is bool else kind(cell)

    return [Row(**{name: value(name, cell) for name, cell in line.items()}) for line in csv.DictReader(io.StringIO(text))]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Everything that one machine measured: heads and rows by what was measured."""

    heads: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Sequence[Row]]

    @classmethod
    def of_files(cls, files: Iterable[Path]) -> Speed:
        """From files of bench, whatever their names.

        Raises:
            BenchError: a file that is none, two of one kind, or files of different machines, threads or versions.
        """
        heads, rows, first = {}, {}, None
        for file in files:
            head, found = read(file)
            if not found or head.get("kind") not in KINDS:
                raise BenchError(f"{file} holds no measurement: measure again")
            if head["kind"] in rows:
                raise BenchError(f"{file} is the second file of {head['kind']}: give one of each kind")
            for key in SAME:
                values = {getattr(row, key) for row in found}
                first = found[0] if first is None else first
                if values != {getattr(first, key)}:
                    raise BenchError(
                        f"{file}: {key} is {min(map(str, values))}, elsewhere {getattr(first, key)}: measure all on one machine, alike"
                    )
            heads[head["kind"]], rows[head["kind"]] = head, found
        if not rows:
            raise BenchError("speed tables need at least one file of `python -m qvsr bench`")
        ordered = [kind for kind in KINDS if kind in rows]
        return cls({kind: heads[kind] for kind in ordered}, {kind: rows[kind] for kind in ordered})

    @classmethod
    def of_tables(cls, folder: Path) -> Speed:
        """From a folder that :meth:`write` filled; numbers have six digits.

        Raises:
            BenchError: the folder has no such tables.
        """
        if not (folder / MACHINE).is_file():
            raise BenchError(f"{folder} has no {MACHINE}; `make bench` measures and writes one")
        heads = json.loads((folder / MACHINE).read_text())
        return cls(heads, {kind: read_csv((folder / f"{kind}.csv").read_text()) for kind in heads})

    def write(self, folder: Path) -> None:
        """A CSV of each kind, the heads, and the page that these give."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind, rows in self.rows.items():
            (folder / f"{kind}.csv").write_text(rows_csv(rows), encoding="utf-8")
        (folder / MACHINE).write_text(json.dumps(self.heads, indent=1) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(page(Speed.of_tables(folder)), encoding="utf-8")


# ---------------------------------------------------------------- means


@dataclasses.dataclass(frozen=True)
class Mean:
    """A variant over all layers.

    Attributes:
        ratio: geometric mean of the ratios to float32, weighted by multiply-accumulates; linear, conv: of these kinds alone; bf16: of ratios to bfloat16.
        low, high: smallest and largest ratio of a layer.
        seconds: of all layers of the network one after the other; whole: the seconds of float32 over that.
        error: the largest; None where nothing is compared.
        roofline: least seconds of all layers over `seconds`.
    """

    variant: str
    ratio: float
    linear: float | None
    conv: float | None
    bf16: float | None
    low: float
    high: float
    seconds: float
    whole: float
    error: float | None
    roofline: float | None


def means(rows: Sequence[Row]) -> list[Mean]:
    """Of every variant of the layers, in the order of the rows. A variant that a layer does not have (Linear has one layout) counts with what it has."""

    def mean(ratios: Iterable[tuple[float | None, Row]]) -> float | None:
        pairs = [(ratio, row.count * row.macs) for ratio, row in ratios if ratio is not None]
        return weighted_geometric_mean(pairs) if pairs else None

    by_variant: dict[str, list[Row]] = {}
    for row in rows:
        by_variant.setdefault(row.variant, []).append(row)
    found = []
    for variant, own in by_variant.items():
        seconds = sum(row.count * row.seconds for row in own)
        found.append(
            Mean(
                variant,
                ratio=mean((row.ratio_fp32, row) for row in own) or 0.0,
                linear=mean((row.ratio_fp32, row) for row in own if row.kind == "Linear"),
                conv=mean((row.ratio_fp32, row) for row in own if row.kind != "Linear"),
                bf16=mean((row.ratio_bf16, row) for row in own),
                low=min(row.ratio_fp32 for row in own),
                high=max(row.ratio_fp32 for row in own),
                seconds=seconds,
                whole=sum(row.count * row.seconds_fp32 for row in own) / seconds,
                error=max((row.error for row in own if row.error is not None), default=None),
                roofline=sum(row.count * row.seconds * (row.roofline or 0) for row in own) / seconds,
            )
        )
    return found


# ---------------------------------------------------------------- Markdown


def machine_line(speed: Speed) -> str:
    """Where the numbers are from."""
    head, first = next(iter(speed.heads.values())), next(iter(speed.rows.values()))[0]
    features = ", ".join(head["features"]) or "no vector instructions that are known"
    return (
        f"{first.device}, {head['cores']} of its cores, {plural(first.threads, 'thread')}; {features}; torch {first.torch}; packed layers: {first.path} "
        f"({head['reason']})"
    )


def page(speed: Speed) -> str:
    """Everything: the machine, means and single layers, the U-Net, the clip."""
    lines = ["# Speed and memory", "", f"Machine: {machine_line(speed)}.", "", *_peak_lines(speed)]
    sections = {"layers": _layers, "unet": _unet, "clip": _clip}
    for kind, rows in speed.rows.items():
        lines += ["", *sections[kind](rows, speed.heads[kind])]
    return "\n".join([*lines, ""])


def _peak_lines(speed: Speed) -> list[str]:
    lines = []
    for kind, head in speed.heads.items():
        peaks, load = head["peaks"], head["load"]
        lines.append(
            f"- {kind}{' (quick: not a result to quote)' if head['quick'] else ''}: commit {head['git']}, {head['minutes']:.1f} minutes, load average "
            f"{_number(load[0], 2)} before and {_number(load[1], 2)} after; peaks measured first: float32 {peaks['fp32_gops']:.0f}, bfloat16 "
            f"{peaks['bf16_gops']:.0f}, 8-bit integers {peaks['int8_gops']:.0f} GOP/s, copying {peaks['copy_gb_s']:.1f} GB/s"
        )
    return lines


def _layers(rows: Sequence[Row], head: Mapping[str, Any]) -> list[str]:
    found = {row.name: row for row in rows}
    layers = sum(row.count for row in found.values())
    return [
        f"## Layers of the U-Net of {head['network']}",
        "",
        f"{plural(len(found), 'shape')}, {plural(layers, 'layer')}, each by itself; ratios to the faster layout of float32, above 1 is faster.",
        "",
        *means_table(rows),
        "",
        *MEANS_NOTES,
        "",
        *_shapes_table(rows),
        "",
        "- × : how many layers are alike. Share: of the multiply-accumulates of all of these. fp32: the faster layout.",
    ]


MEANS_NOTES = (
    "- Mean, Linear, convolutions: geometric, weighted by multiply-accumulates. All layers: seconds of all of them one after the other, and by how much that "
    "is less than float32.",
    "- Error: the largest norm of packed minus simulated, over the norm of simulated. Roofline: share of what the measured peaks allow, for all layers.",
)


def means_table(rows: Sequence[Row]) -> list[str]:
    """The variants over all layers."""
    header = ["Variant", "Mean", "Linear", "Convolutions", "to bf16", "Smallest", "Largest", "All layers (s)", "Ratio", "Roofline", "Error"]
    body = [
        [
            one.variant,
            _times(one.ratio),
            _times(one.linear),
            _times(one.conv),
            _times(one.bf16),
            _times(one.low),
            _times(one.high),
            f"{one.seconds:.2f}",
            _times(one.whole),
            _percent(one.roofline),
            _error(one.error),
        ]
        for one in means(rows)
        if one.variant != FP32_LAST.name  # it exists for convolutions alone; float32 is the faster of both
    ]
    return markdown_table([[header], body], 1)


def _shapes_table(rows: Sequence[Row]) -> list[str]:
    by_layer: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_layer.setdefault(row.name, {})[row.variant] = row
    shown = [name for name in dict.fromkeys(row.variant for row in rows) if not name.startswith("fp32")]
    lowest = _lowest(rows)
    total = sum(own["fp32"].count * own["fp32"].macs for own in by_layer.values())
    header = ["Layer", "Input", "×", "Share", "fp32 (ms)", "GOP/s", *shown, f"{lowest.partition(' ')[2]}: GOP/s", "GB/s", "roofline"]
    body = []
    for own in sorted(by_layer.values(), key=lambda own: -own["fp32"].count * own["fp32"].macs):
        first, last = own["fp32"], own[lowest]
        body.append(
            [
                f"{first.kind} {'×'.join(map(str, first.shape))}",
                "×".join(map(str, first.input)),
                str(first.count),
                _percent(first.count * first.macs / total, 1),
                f"{1e3 * first.seconds_fp32:.2f}",
                f"{2 * first.macs / first.seconds_fp32 / 1e9:.0f}",
                *(_times(own[name].ratio_fp32) if name in own else "–" for name in shown),
                f"{last.gops:.0f}",
                _number(last.gb_s, 1),
                _percent(last.roofline),
            ]
        )
    return markdown_table([[header], body], 2)


def _lowest(rows: Sequence[Row]) -> str:
    """The packed variant of fewest bits without a branch."""
    return min((row for row in rows if row.execution == "packed"), key=lambda row: (row.rank, int(row.bits.partition("A")[2]))).variant


def _unet(rows: Sequence[Row], head: Mapping[str, Any]) -> list[str]:
    shape = "×".join(map(str, rows[0].shape))
    return [
        f"## One step of the U-Net of {head['network']}, random weights, {shape}",
        "",
        *unet_table(rows),
        "",
        "- Seconds: median of alternating rounds in one process (quartiles). †: of another process or not in alternation, the ratio is rougher.",
        "- Peak: most memory of a process that does only this, above what torch, our modules and the inputs took before; in brackets of that of the float32 "
        "layout that takes less. At rest: the network before its first step.",
        "- dB: packed against simulated on the network's whole output; in brackets simulated against itself when its input moves by 1e-7. Random weights.",
    ]


def unet_table(rows: Sequence[Row]) -> list[str]:
    """A line a variant."""
    header = ["Variant", "Seconds", "Ratio", "to bf16", "GOP/s", "Roofline", "Peak (MB)", "At rest (MB)", "dB"]
    return markdown_table([[header], [[row.variant, *_whole(row, rows), *_decibels(row)] for row in rows]], 1)


def _whole(row: Row, rows: Sequence[Row]) -> list[str]:
    mark = "" if row.together else " †"
    return [
        f"{row.seconds:.2f} ({row.seconds_q1:.2f} to {row.seconds_q3:.2f}){mark}",
        _times(row.ratio_fp32) + mark,
        _times(row.ratio_bf16),
        f"{row.gops:.0f}",
        _percent(row.roofline),
        _peak(row, rows),
        _number(row.resident_mb, 0),
    ]


def _peak(row: Row, rows: Sequence[Row]) -> str:
    """Megabytes, and percent of what float32 takes."""
    full = [one.peak_mb for one in rows if one.bits == "W32A32" and one.peak_mb is not None]
    if row.peak_mb is None or not full:
        return _number(row.peak_mb, 0)
    return f"{row.peak_mb:,.0f} ({100 * row.peak_mb / min(full):.0f} %)"


def _decibels(row: Row) -> list[str]:
    if row.sqnr_db is None:
        return [EQUAL if row.error == 0 else "–"]
    return [f"{row.sqnr_db:.1f} ({_number(decibels(row.error_floor), 1)})"]


def _clip(rows: Sequence[Row], head: Mapping[str, Any]) -> list[str]:
    frames, _, height, width = rows[0].shape
    return [
        f"## A whole clip: {rows[0].name}, {plural(frames, 'frame')} to {width}×{height}, {head['network']}",
        "",
        *clip_table(rows),
        "",
        "- Everything that restores the clip, flow and autoencoder too; median of alternating rounds in one process (quartiles). Peak as above.",
        "- PSNR of packed frames from simulated ones, and of both from full precision.",
    ]


def clip_table(rows: Sequence[Row]) -> list[str]:
    """A line a variant."""
    header = ["Variant", "Seconds a frame", "Ratio", "Peak (MB)", "At rest (MB)", "PSNR to simulated", "to full precision"]
    body = [
        [
            row.variant,
            "{:.3f} ({:.3f} to {:.3f})".format(*(value / row.shape[0] for value in (row.seconds, row.seconds_q1, row.seconds_q3))),
            _times(row.ratio_fp32),
            _peak(row, rows),
            _number(row.resident_mb, 0),
            EQUAL if row.psnr_db is None and row.error == 0 else _number(row.psnr_db, 1),
            _number(row.psnr_fp_db, 1),
        ]
        for row in rows
    ]
    return markdown_table([[header], body], 1)


def short(speed: Speed, where: str) -> str:
    """What the README shows.

    Args:
        where: the page, as it is linked from there.
    """
    lines = [f"Machine: {machine_line(speed)}."]
    for kind, rows in speed.rows.items():
        if kind == "layers":
            body = [[one.variant, _times(one.ratio), _times(one.linear), _times(one.conv), _times(one.whole)] for one in means(rows)]
            header = [f"Layers of {speed.heads[kind]['network']}", "Mean", "Linear", "Convolutions", "All layers' time"]
            body = [cells for cells in body if not cells[0].startswith("fp32")]
        elif kind == "unet":
            header = [f"One step of its U-Net, {'×'.join(map(str, rows[0].shape))}", "Ratio", "Seconds", "Peak (MB)"]
            body = [[row.variant, _times(row.ratio_fp32), f"{row.seconds:.2f}", _peak(row, rows)] for row in rows]
        else:
            header = [f"A clip of {speed.heads[kind]['network']}", "Ratio", "Seconds a frame", "Peak (MB)"]
            body = [[row.variant, _times(row.ratio_fp32), f"{row.seconds / row.shape[0]:.3f}", _peak(row, rows)] for row in rows]
        lines += ["", *markdown_table([[header], body], 1)]
    return "\n".join(
        [
            *lines,
            "",
            "Ratios: times as fast as float32 (of layers, its faster layout) in the same run; means over layers are geometric, weighted by "
            f"multiply-accumulates.\nRotation, range and rounding of the input are in all of them. [Every layer, spread, GOP/s, errors]({where}).",
        ]
    )


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


def _percent(share: float | None, digits: int = 0) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}" if value else EQUAL
