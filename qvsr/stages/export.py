"""A quantized checkpoint and its backbone as one file that restores by itself, with a model card."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvsr import results
from qvsr.config import Config
from qvsr.plan import REFERENCES, declared_facts
from qvsr.provenance import atomic_path

MODEL, CARD = "model.safetensors", "README.md"


class ExportError(ValueError):
    """An export that cannot be what was asked for; the message says what would work."""


def run(config: Config, checkpoint: Path, out: Path, measured: Sequence[Path] = (), branch: str = "exact", licence: str = "") -> Path:
    """Write the model and its card; returns the model's file.

    Args:
        checkpoint: written by the quantize stage with this configuration's backbone.
        out: ``NAME.safetensors``, beside which ``NAME.md`` appears; or a folder for ``model.safetensors`` and ``README.md``.
        measured: files of the measure stage whose rows of this method and bits stand in the card, bicubic and full precision beside them.
        branch: `exact` or `half`, see :mod:`qvsr.quant.exported`.
        licence: of the model; empty: that of the official weights, where the configuration names them.
    """
    from qvsr.quant import checkpoint as quantized
    from qvsr.quant import exported

    made = quantized.read_header(checkpoint)
    rows = chosen(results.read(*measured), made["backbone"], made["method"], made["bits"], measured) if measured else []
    file, card = (out, out.with_suffix(".md")) if out.suffix == ".safetensors" else (out / MODEL, out / CARD)
    if out.suffix != ".safetensors" and out.is_file():
        raise ExportError(f"{out} is a file: give a folder, or a name that ends in .safetensors")
    header = exported.write(file, config, checkpoint, branch, licence=licence or official_licence(config))  # type: ignore[arg-type]
    text = describe(header, file.name, file.stat().st_size, exported.unet_bytes(file), full_unet_bytes(config), rows)
    with atomic_path(card) as partial:
        partial.write_text(text)
    return file


def official_licence(config: Config) -> str:
    """The licence of the official weights that a backbone is made of; where it has none, that of what it was made from is said to hold."""
    from qvsr.data.assets import read
    from qvsr.plan import official_sources

    name = official_sources(config).get("weights", "")
    return f"{read()[name].licence} (of the weights {name})" if name in read() else "that of the backbone's weights"


def full_unet_bytes(config: Config) -> int:
    """Bytes of the backbone's U-Net in float32, from its shapes."""
    import torch

    from qvsr.models.unet import InflatedUNet

    with torch.device("meta"):
        return 4 * sum(one.numel() for one in InflatedUNet(config.backbone.unet).parameters())


def sizes(config: Config, rank: int | None = None) -> str:
    """The U-Net's size in an exported file for every row of a configuration, without weights: one line each.

    Args:
        rank: of every low-rank branch; None: the method's smallest.
    """
    from qvsr.quant import exported
    from qvsr.quant.cost import planned_facts

    full = full_unet_bytes(config)
    lines = [f"U-Net of {config.backbone.name} in float32: {full / 1e6:.1f} MB. In an exported file:"]
    for method, bits, facts in planned_facts(config, rank):
        if bits != "W32A32":
            exact, half = (exported.planned_unet_bytes(facts, branch) for branch in exported.BRANCHES)
            ranks = [layer.rank for layer in facts.layers if layer.quantized]
            both = f"at most {exact / 1e6:.1f} MB ({_less(exact, full)}), with --branch half {half / 1e6:.1f} MB ({_less(half, full)})"
            lines.append(
                f"{method} {bits}, rank {statistics.mean(ranks):g}: {both}"
                if any(ranks)
                else f"{method} {bits}: {half / 1e6:.1f} MB ({_less(half, full)})"
            )
    return "\n".join(lines)


def chosen(rows: Sequence[results.Row], backbone: str, method: str, bits: str, files: Sequence[Path]) -> list[results.Summary]:
    """Means of the rows that belong into a card: of the model, and of what stands for orientation.

    Raises:
        ExportError: none of them is of the model.
    """
    own = [row for row in rows if (row.backbone, row.method, row.bits) == (backbone, method, bits)]
    if not own:
        found = sorted({f"{row.backbone} {row.method} {row.bits}" for row in rows})
        raise ExportError(
            f"{', '.join(map(str, files))}: no row of {backbone} {method} {bits}; found {', '.join(found)}: give its measure file"
        )
    beside = [row for row in rows if row.backbone == backbone and row.method in REFERENCES]
    return results.aggregate([*beside, *own])


def describe(header: Mapping[str, Any], name: str, size: int, unet: int, full: int, summaries: Sequence[results.Summary]) -> str:
    """The model card.

    Args:
        header: of the exported model.
        name, size: of its file.
        unet, full: bytes of the U-Net in it, and in float32.
        summaries: what :func:`chosen` gives; none: nothing was measured.
    """
    made, layers = header["quantized"], header["layers"]
    ranks = [facts["rank"] for facts in layers.values()]
    calibration = made.get("calibration_set", {})
    sampling = header["sampling"]
    spec = made.get("spec", {})
    lines = [
        f"# {made['backbone']}, {made['method']} {made['bits']}",
        "",
        f"A video super-resolution model (×{sampling['upscale']}) by diffusion, its U-Net quantized to {made['bits']}. `{name}`, {size / 1e6:.1f} MB,",
        "holds everything that restoring needs:",
        "",
        "```",
        f"python -m qvsr upscale IN.mp4 OUT.mp4 --model {name}",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| method | {made['method']}"
        + (f", a variant of {made['base']}" if made.get("base", made["method"]) != made["method"] else "")
        + " |",
        f"| bits | {made['bits']}: weights {spec.get('weight_bits', '?')}, activations {spec.get('act_bits', '?')} |",
        f"| quantized layers | {len(layers)}; at full precision: {', '.join(spec.get('exclude', ())) or 'none'}, norms, the other networks |",
    ]
    if any(ranks):
        lines.append(f"| low-rank branch | ranks {min(ranks)} to {max(ranks)}, mean {statistics.mean(ranks):.1f}; {_branch(header)} |")
    lines += [
        f"| U-Net | {unet / 1e6:.1f} MB, in float32 {full / 1e6:.1f} MB: {_less(unet, full)} |",
        f"| calibration | {calibration.get('samples', '?')} samples of data set {calibration.get('dataset', '?')} at {calibration.get('steps', '?')}"
        f" timesteps (manifest {made.get('calibration', '?')}) |",
        f"| sampling | {sampling['steps']} steps, flow {sampling['flow']}, guidance {sampling['guidance_scale']:g}; other steps: `--steps` |",
        f"| licence | {header.get('licence') or 'not stated'} |",
        f"| made from | weights {made.get('weights', '?')}, code {made.get('code', '?')}, seed {spec.get('seed', '?')} |",
        f"| SHA-256 | of the file with zeros in its place: {header['digest']} |",
        "",
        "Settings of the method:",
        "",
        "```json",
        json.dumps(spec.get("settings", {}), indent=1, sort_keys=True),
        "```",
        "",
        "## Measured",
        "",
    ]
    return "\n".join([*lines, *_measured(header, summaries)]) + "\n"


def _branch(header: Mapping[str, Any]) -> str:
    if header["branch"] == "exact":
        return "float32, the checkpoint's own numbers, compressed without loss"
    return (
        f"float16, which changes it by {header['branch_error']:.2g} of its norm: results are not byte for byte the checkpoint's "
        "(`--branch exact` keeps its numbers)"
    )


def _less(part: int, whole: int) -> str:
    return f"{100 * (1 - part / whole):.2f} % less"


def _measured(header: Mapping[str, Any], summaries: Sequence[results.Summary]) -> list[str]:
    if not summaries:
        return ["Nothing: `python -m qvsr export --measured FILE.jsonl` puts rows of the measure stage here."]
    facts = declared_facts("metrics", "METRICS")
    lines = []
    if header["branch"] == "half":
        lines += ["Of the checkpoint, whose branch is float32; this file's differs as said above.", ""]
    lines += ["| data set | metric | method | execution | mean | clips | frames |", "|---|---|---|---|---|---|---|"]
    for one in sorted(summaries, key=lambda one: (one.dataset, one.metric, one.method not in REFERENCES, one.method)):
        better = {True: " ↑", False: " ↓"}.get(facts.get(one.metric, {}).get("higher_is_better"), "")  # type: ignore[arg-type]
        value = "n/a" if one.value is None else f"{one.value:.4g}"
        between = f" [{one.low:.4g}, {one.high:.4g}]" if one.low is not None and one.high is not None else ""
        lines.append(
            f"| {one.dataset} | {one.metric}{better} | {one.method} {one.bits} | {one.execution} | {value}{between} | {one.clips} | {one.frames} |"
        )
    limits = sorted({f"{one.dataset}: limit={one.limit}" for one in summaries if one.limit is not None})
    if limits:
        lines += ["", f"Only the first clips of a data set: {', '.join(limits)}."]
    return [*lines, "", "In brackets: 95 % interval over clips."]
