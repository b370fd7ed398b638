"""Every metric of restored clips, of this workflow or of any other program."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvsr import measuring, protocols, results
from qvsr.config import Config
from qvsr.data.clips import ClipError, Source, find_clips, open_clip
from qvsr.provenance import head
from qvsr.registry import METRICS

log = logging.getLogger(__name__)


def run(
    config: Config,
    pred: Path,
    gt: Path | None,
    fp: Path | None,
    clips: Sequence[str],
    dataset: str,
    method: str,
    bits: str,
    execution: str | None,
    out: Path,
    *,
    backbone: str | None = None,
    per_frame: Path | None = None,
    cache: Path | None = None,
) -> list[results.Row]:
    """Measure clips and write one JSON line a clip and metric.

    Args:
        pred: restored frames, or the ground truth itself: one clip (a folder of frames or a video) or a folder of clips.
        gt: the ground truth likewise; None if no metric needs it.
        fp: the full-precision output likewise.
        clips: names of clips; empty: all, and then every side must have the same.
        dataset: name of the dataset; stands in each line, as `method`, `bits` and `execution` do; execution None: what the restored clip says, or simulated.
        backbone: likewise; None: the configuration's.
        per_frame: file with one line a clip, metric and frame; None: not written.
        cache: folder of values by content; None: everything is computed.
    Raises:
        ClipError: a clip that one side lacks, or that cannot be read.
    """
    protocol, rows = protocols.read(config.protocol), []
    opened = {
        name: {side: open_clip(path) for side, path in paths.items()}
        for name, paths in pair({"pred": pred, "gt": gt, "fp": fp}, clips).items()
    }
    for line in losses(opened):
        log.warning(line)
    for name, sides in opened.items():
        context = results.Context(
            backbone=config.backbone.name if backbone is None else backbone,
            method=method,
            bits=bits,
            execution=execution or sides["pred"].info.get("execution", "simulated"),
            seed=config.seed,
            dataset=dataset,
            clip=name,
            limit=config.datasets[dataset].limit if dataset in config.datasets else None,
            provenance=head() | ({"lq": draw} if (draw := sides["pred"].info.get("lq")) else {}),
        )
        rows += measuring.measure_clip(
            sides["pred"], sides.get("gt"), sides.get("fp"), config.metrics, context, protocol, require_all=config.require_all, cache=cache
        )
    results.write(out, rows)
    if per_frame is not None:
        results.write_frames(per_frame, rows)
    return rows


def pair(given: Mapping[str, Path | None], chosen: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Clips by name, and where each side has it.

    Two clips given by themselves belong together whatever they are called; clips of folders go by their names.

    Args:
        given: pred, gt, fp: paths; None where a side is not given.
        chosen: names; empty: all.
    Raises:
        ClipError: a side lacks a clip that another has.
    """
    sides = {side: find_clips(path) for side, path in given.items() if path is not None}
    alone = {side: next(iter(found)) for side, found in sides.items() if list(found.values()) == [given[side]]}
    if len(alone) == len(sides) and not chosen:
        return {alone["pred"]: {side: found[alone[side]] for side, found in sides.items()}}
    names = list(chosen) or list(dict.fromkeys(name for found in sides.values() for name in found))
    for name in names:
        for side, found in sides.items():
            if name not in found:
                other = next((one for one, there in sides.items() if name in there), None)
                where = f"which --{other} has" if other is not None else "which is asked for"
                has = ", ".join(sorted(found)[:8]) + (", …" if len(found) > 8 else "")
                raise ClipError(
                    f"--{side} {given[side]} has no clip {name}, {where}; it has {has}: add the clip, or choose others by --clip"
                )
    return {name: {side: found[name] for side, found in sides.items()} for name in names}


def losses(opened: Mapping[str, Mapping[str, Source]]) -> list[str]:
    """One line for each kind of input that may not hold the frames as they were made."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, sides in opened.items():
        for side, source in sides.items():
            if source.loss:
                kinds[side, source.loss].append(name)
    return [
        f"warning: --{side}: {loss} ({len(names)} of {len(opened)} clips: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}); "
        "what is measured is the file, measure lossless frames where they are there"
        for (side, loss), names in kinds.items()
    ]


def possible(metrics: Sequence[str], gt: Path | None, fp: Path | None) -> list[str]:
    """Those of some metrics that can be computed from what is given; says which are left out.

    Raises:
        ResultError: none can.
    """
    absent = {side for side, path in (("gt", gt), ("fp", fp)) if path is None}
    left = [name for name in metrics if METRICS[name].facts["needs"] in absent]
    if left:
        log.warning(f"left out without {' and '.join(f'--{side}' for side in sorted(absent))}: {', '.join(left)}")
    if len(left) == len(metrics):
        raise results.ResultError("nothing left to measure; give --gt or --fp, or name other metrics")
    return [name for name in metrics if name not in left]


def summary(rows: Sequence[results.Row]) -> str:
    """A line a metric: mean over clips, how many, and the signature."""
    lines = []
    for name in dict.fromkeys(row.metric for row in rows):
        facts, mine = METRICS[name].facts, [row for row in rows if row.metric == name]
        missing = next((row.missing for row in mine if row.missing), "")
        values = [row.value for row in mine if row.value is not None]
        shown = f"n/a ({missing})" if missing else f"{results.mean(values):.{facts['digits']}f} {facts['unit']}".rstrip()
        lines.append(f"{name}: {shown}, {len(mine)} clip{'s' * (len(mine) != 1)}, {mine[0].signature}")
    return "\n".join(lines)
