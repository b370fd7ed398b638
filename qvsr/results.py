"""Result rows: one JSON line for each clip and metric; writing, reading, and the mean over seeds and clips with its interval.

Infinite values (PSNR of identical frames) are kept, never replaced by a large number: JSON holds the string "inf", a mean
that contains one is inf, and it has no interval. NaN is refused when a row is made, so no mean can hide one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, field_validator, model_validator

from qvsr.plan import BICUBIC, GROUND_TRUTH
from qvsr.provenance import atomic_path
from qvsr.settings import Settings

NOISELESS = (GROUND_TRUTH, BICUBIC)  # rows that no noise goes into


class ResultError(ValueError):
    """Rows that cannot be read, or that must not be averaged."""


def _from_json(value: Any) -> Any:
    return {"inf": math.inf, "-inf": -math.inf}.get(value, value) if isinstance(value, str) else value


def _to_json(value: float) -> float | str:
    return str(value) if math.isinf(value) else value


Value = Annotated[float, BeforeValidator(_from_json), PlainSerializer(_to_json, when_used="json")]


class Context(Settings):
    """What a clip's measurements have in common."""

    backbone: str
    method: str
    bits: str
    execution: str = Field(
        "simulated", description="simulated (floating point on rounded values), packed (integers) or external (another program)"
    )
    seed: int
    dataset: str
    clip: str
    limit: int | None = Field(None, description="set when only the first clips of the data set are used")
    provenance: dict[str, Any] = Field(default_factory=dict, description="code digest, versions, device, lq: the draw of the LQ frames")


class Row(Context):
    """The value of one metric for one clip: the mean over its frames (or pairs of frames).

    >>> row = Row(backbone="mgld-mini", method="maxmin", bits="W4A4", seed=42, dataset="real", clip="bikes", metric="psnr",
    ...           value=float("inf"), frames=10, signature="psnr|strict-v1")
    >>> Row.parse(row.line()) == row, '"value": "inf"' in row.line()
    (True, True)
    """

    metric: str
    value: Value | None = Field(
        description="mean of per_frame, rounded if the protocol rounds clips; null: not measured, `missing` says why"
    )
    missing: str = Field("", description="why there is no value: what is not there, where it comes from, the command that gets it")
    per_frame: tuple[Value, ...] = Field((), description="one value a frame, or a pair of frames; empty when the source keeps none")
    frames: int = Field(ge=1, description="frames of the clip")
    signature: str
    inputs: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="pred, gt, fp: what was read, codec, pixel format, what it may have lost, SHA-256 of the pixels"
    )

    @field_validator("value", "per_frame")
    @classmethod
    def _no_nan(cls, value: float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
        if any(v is not None and math.isnan(v) for v in (value if isinstance(value, tuple) else (value,))):
            raise ValueError("NaN is no result")
        return value

    @model_validator(mode="after")
    def _value_is_the_mean(self) -> Row:
        if (self.value is None) != bool(self.missing) or (self.missing and self.per_frame):
            raise ValueError(f"value {self.value} with missing {self.missing!r}: a row has either a value or a reason why it has none")
        if self.value is not None and self.per_frame:
            digits = re.search(r"\|clip_digits:(\d+)", self.signature)
            rounded = 0.5000001 * 10.0 ** -int(digits[1]) if digits else 0.0
            if not math.isclose(self.value, mean(self.per_frame), rel_tol=1e-9, abs_tol=rounded):
                raise ValueError(f"value {self.value} is not the mean of per_frame, {mean(self.per_frame)}")
        return self

    def line(self) -> str:
        """The row as one line of JSON, keys sorted, without a line break."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, allow_nan=False)

    @classmethod
    def parse(cls, line: str) -> Row:
        """Inverse of :meth:`line`; raises ValueError with the reason."""
        return cls.model_validate(json.loads(line))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, the same in any order of the values; inf if one is.

    >>> mean([1e16, 1.0, -1e16]), mean([30.0, math.inf])
    (0.3333333333333333, inf)
    """
    return math.fsum(values) / len(values)


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """A file of JSON lines that appears whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text("".join(row.line() + "\n" for row in rows))


def write_frames(path: str | Path, rows: Iterable[Row]) -> None:
    """A file of JSON lines with one line a clip, metric and frame; that of a pair of frames has the number of its first."""
    keys = ("dataset", "clip", "method", "bits", "seed", "metric", "signature")
    with atomic_path(path) as partial, partial.open("w") as file:
        for row in rows:
            for index, value in enumerate(row.per_frame):
                line = {key: getattr(row, key) for key in keys} | {"frame": index, "value": _to_json(value)}
                file.write(json.dumps(line, sort_keys=True, allow_nan=False) + "\n")


def append(path: str | Path, rows: Iterable[Row]) -> None:
    """Add lines to a file (made if missing). The whole file is replaced, so a killed process leaves no half line."""
    path = Path(path)
    write(path, [*(read(path) if path.exists() else []), *rows])


def read(*paths: str | Path) -> list[Row]:
    """Rows of JSON-lines files, in order.

    Raises:
        ResultError: a missing or empty file or a damaged line; file, line number and reason in one line.
    """
    rows = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ResultError(f"{path}: no such file; the measure stage writes it")
        lines = path.read_text().splitlines()
        if not lines:
            raise ResultError(f"{path}: empty; delete it and measure again")
        for number, line in enumerate(lines, 1):
            try:
                rows.append(Row.parse(line))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                reason = f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
                raise ResultError(f"{path}, line {number}: not a result row: {reason}; delete the file and measure again") from None
            except ValueError as error:
                raise ResultError(f"{path}, line {number}: not JSON ({error}); delete the file and measure again") from None
    return rows


@dataclass(frozen=True)
class Summary:
    """A metric of a method over the clips of a data set.

    Attributes:
        value: None where it is missing.
        missing: why.
        seeds: of the noise, over which a clip's value is the mean.
        seed_sd: standard deviation over the seeds of the mean over clips; None for one seed.
        interval: how the interval was made, a key of `qvsr.statistics.NAMES`; empty where there is none.
    """

    backbone: str
    dataset: str
    method: str
    bits: str
    execution: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    clips: int
    frames: int
    signature: str
    limit: int | None
    missing: str = ""
    seeds: int = 1
    seed_sd: float | None = None
    interval: str = ""


Key = tuple[str, str, str, str, str, str]  # backbone, data set, method, bits, execution, metric
Group = dict[str, dict[int, Row]]  # by clip and seed


def grouped(rows: Iterable[Row]) -> dict[Key, Group]:
    """Rows that have a common mean, sorted by what they are of and by clip; the order of the rows does not matter.

    Nothing is dropped: every method must have every clip, and every clip every seed. What the noise does not reach (ground truth, bicubic,
    frames of another program) has one seed.

    Raises:
        ResultError: no rows; a clip twice; a clip or seed that one method has and another lacks; rows of several signatures, limits or
            lengths of a clip under one mean.
    """
    groups: dict[Key, Group] = {}
    clips: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for row in rows:
        key = (row.backbone, row.dataset, row.method, row.bits, row.execution, row.metric)
        by_seed = groups.setdefault(key, {}).setdefault(row.clip, {})
        if row.seed in by_seed:
            raise ResultError(f"{describe(key)}: clip {row.clip} is there twice; one file a clip and method, delete the other")
        by_seed[row.seed] = row
        frames = clips[row.backbone, row.dataset].setdefault(row.clip, row.frames)
        if frames != row.frames:
            raise ResultError(f"{describe(key)}: clip {row.clip} has {row.frames} frames, elsewhere {frames}; restore and measure it again")
    if not groups:
        raise ResultError("no result rows; measure something first")
    noisy: dict[tuple[str, str], tuple[int, ...]] = {}
    for key in sorted(groups):
        groups[key] = {clip: groups[key][clip] for clip in sorted(groups[key])}
        _check_group(key, groups[key], clips[key[0], key[1]])
        seeds = seeds_of(groups[key])
        expected = noisy.setdefault((key[0], key[1]), seeds) if key[2] not in NOISELESS and key[4] != "external" else seeds
        if seeds != expected:
            raise ResultError(
                f"{describe(key)}: {_seeds(seeds)}, another method has {_seeds(expected)}; restore and measure all with the same"
            )
    return {key: groups[key] for key in sorted(groups)}


def _check_group(key: Key, group: Group, expected: Mapping[str, int]) -> None:
    missing = sorted(set(expected) - set(group))
    if missing:
        raise ResultError(
            f"{describe(key)}: no value for clip {', '.join(missing)}, which others have; nothing is left out of a mean, measure it"
        )
    for what in ("signature", "limit"):
        found = sorted({str(getattr(row, what)) for by_seed in group.values() for row in by_seed.values()})
        if len(found) > 1:
            raise ResultError(f"{describe(key)}: rows of more than one {what}: {found[0]} and {found[1]}; they have no common mean")
    first = next(iter(group))
    for clip, by_seed in group.items():
        if set(by_seed) != set(group[first]):
            raise ResultError(
                f"{describe(key)}: clip {first} has {_seeds(sorted(group[first]))}, clip {clip} {_seeds(sorted(by_seed))}; "
                "restore and measure all with the same"
            )


def seeds_of(group: Group) -> tuple[int, ...]:
    """The noise seeds of a group, which are those of each clip."""
    return tuple(sorted(next(iter(group.values()))))


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def by_clip(group: Group) -> dict[str, float | None]:
    """A value for each clip: the mean over its seeds; None where one is missing."""
    found: dict[str, float | None] = {}
    for clip, by_seed in group.items():
        values = [row.value for row in by_seed.values() if row.value is not None]
        found[clip] = mean(values) if len(values) == len(by_seed) else None
    return found


def key_of(summary: Summary) -> Key:
    """What identifies a summary."""
    return (summary.backbone, summary.dataset, summary.method, summary.bits, summary.execution, summary.metric)


def lq_draws(rows: Iterable[Row]) -> dict[str, str]:
    """Which draw of LQ frames each data set's numbers are of, where the rows say it: recipe and digest.

    Frames that were given have a digest a clip; theirs is the digest of all.

    Raises:
        ResultError: rows of one clip that are of two draws.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        if "lq" in row.provenance:
            draw = found[row.dataset].setdefault(row.clip, row.provenance["lq"])
            if draw != row.provenance["lq"]:
                raise ResultError(
                    f"{row.dataset}/{row.clip}: LQ frames are {draw} in one row and {row.provenance['lq']} for {row.method} {row.bits}; "
                    "numbers from different LQ draws do not compare, restore and measure them again"
                )
    return {dataset: _one_draw(by_clip) for dataset, by_clip in sorted(found.items())}


def _one_draw(by_clip: Mapping[str, str]) -> str:
    draws = sorted(set(by_clip.values()))
    if len(draws) == 1:
        return draws[0]
    kinds = sorted({draw.split()[0] for draw in draws})
    return f"{' and '.join(kinds)} {hashlib.sha256(json.dumps(by_clip, sort_keys=True).encode()).hexdigest()[:16]}"


def describe(key: Sequence[str]) -> str:
    backbone, dataset, method, bits, execution, metric = key
    where = ", ".join(filter(None, (dataset, f"{method} {bits}".strip())))  # what `measure` gets by itself has no names
    return f"{where} ({backbone}, {execution}), {metric}".lstrip()


def aggregate(rows: Iterable[Row]) -> list[Summary]:
    """Mean over the seeds of a clip, then over clips, of each (backbone, data set, method, bits, execution, metric), sorted.

    Raises:
        ResultError: as :func:`grouped`.
    """
    return [_summary(key, group) for key, group in grouped(rows).items()]


def _summary(key: Key, group: Group) -> Summary:
    from qvsr import statistics  # here, since measuring does not depend on it

    seeds = seeds_of(group)
    rows = [by_seed[seeds[0]] for by_seed in group.values()]
    missing = next((row.missing for by_seed in group.values() for row in by_seed.values() if row.missing), "")
    values = [value for value in by_clip(group).values() if value is not None]
    value, within, seed_sd = None, statistics.Interval(), None
    if not missing:
        value, within = mean(values), statistics.interval(values)
        if len(seeds) > 1 and math.isfinite(value):
            of_seed = [[by_seed[seed].value for by_seed in group.values()] for seed in seeds]
            seed_sd = stdev(mean([value for value in clips if value is not None]) for clips in of_seed)
    return Summary(
        *key,
        value=value,
        low=within.low,
        high=within.high,
        clips=len(rows),
        frames=sum(row.frames for row in rows),
        signature=rows[0].signature,
        limit=rows[0].limit,
        missing=missing,
        seeds=len(seeds),
        seed_sd=seed_sd,
        interval=within.kind,
    )
