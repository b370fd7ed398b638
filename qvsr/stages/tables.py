"""The tables of a run: metrics, comparisons, cost and fairness card of every row, as csv, Markdown and LaTeX."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsr import results
from qvsr.config import Config
from qvsr.provenance import atomic_path

if TYPE_CHECKING:
    from qvsr.quant.cost import Facts


def run(config: Config, measured: Sequence[Path], checkpoints: Sequence[Path], out: Path, benchmarks: Path | None = None) -> None:
    """Write all tables into one folder.

    Args:
        measured: JSON-lines files of the measure stage, every clip of every row.
        checkpoints: quantized U-Nets; their cost is counted on themselves.
        benchmarks: folder with ``{method}-{bits}.tsv`` of what quantizing took, as Snakemake writes them; None or without a file: not measured.
    """
    from qvsr.quant.cost import cost
    from qvsr.report import comparisons, paper
    from qvsr.report.fairness import Measured, fairness, read_benchmark, write_fairness
    from qvsr.report.tables import one_call, ordered, row_setting, write_cost, write_metrics

    rows = results.read(*measured)
    summaries = ordered(rows, config.methods, config.metrics)
    compared = comparisons.compare(rows, config.methods, config.metrics)
    published, left_out = paper.against(summaries, config.methods)
    for note in left_out:
        logging.getLogger(__name__).info(note)
    links = ([comparisons.LINK] if compared else []) + ([paper.LINK] if published else [])
    full, quantized = described(config, checkpoints)
    costs, cards, settings = [cost(full, "full_precision", "W32A32")], [], {}
    for header, facts in quantized:
        method, bits = header["method"], header["bits"]
        costs.append(cost(facts, method, bits))
        took = read_benchmark(benchmarks / f"{method}-{bits}.tsv") if benchmarks is not None else Measured()
        cards.append(fairness(header, facts, full, took))
        settings[method, bits] = row_setting(header)
    with atomic_path(out) as partial:
        write_metrics(partial, summaries, [*variant_notes(config), *lq_notes(rows)], settings, links)
        if compared:
            comparisons.write(partial, compared)
        if published:
            paper.write(partial, published, [*left_out, *lq_notes(rows)])
        write_cost(partial, costs, one_call(config), config.methods)
        if cards:
            write_fairness(partial, cards, config.methods)


def described(config: Config, checkpoints: Sequence[Path]) -> tuple[Facts, list[tuple[dict[str, Any], Facts]]]:
    """What the full-precision U-Net is made of; and the header of each checkpoint, with what the U-Net with its layers is made of."""
    from qvsr.quant.cost import checkpoint_facts, full_facts

    full = full_facts(config.backbone.unet, config.sampling.tile, config.backbone.context_tokens)
    return full, [checkpoint_facts(checkpoint, config) for checkpoint in checkpoints]


def lq_notes(rows: Sequence[results.Row]) -> list[str]:
    """Which draw of LQ frames the numbers are of."""
    draws = ", ".join(f"{dataset} {draw}" for dataset, draw in results.lq_draws(rows).items())
    return [f"LQ frames (recipe and digest): {draws}. Numbers from different LQ draws do not compare."] if draws else []


def variant_notes(config: Config) -> list[str]:
    """A line for each variant in the tables: what it is made of."""
    listed = {name: config.variants[name] for name in config.methods if name in config.variants}
    return [
        f"{name}: {variant.method} with {', '.join(f'{key}={json.dumps(value)}' for key, value in variant.settings.items()) or 'its settings'}."
        for name, variant in listed.items()
    ]
