"""The tables of the ablation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qvsr import results
from qvsr.config import Config
from qvsr.provenance import atomic_path
from qvsr.stages.tables import described


class AblationStageError(ValueError):
    """There is nothing to compare; the message says what would be needed."""


def run(config: Config, measured: Sequence[Path], checkpoints: Sequence[Path], out: Path) -> None:
    """Write the tables of the ablation into one folder.

    Args:
        measured: JSON-lines files of the measure stage, every clip of every row that `ablation` names.
        checkpoints: of these rows; their bits are counted on themselves.
    """
    from qvsr.report.ablation import Variant, build, write
    from qvsr.report.fairness import Measured, fairness

    if not config.ablation:
        raise AblationStageError("the configuration has no `ablation`: name its tables and rows, as config/ablation.yaml does")
    variants = {}
    for name in {name for names in config.ablation.values() for name in names}:
        method, own = config.resolve_method(name)
        variants[name] = Variant(method, own.model_dump(mode="json") if own is not None else {})
    full, quantized = described(config, checkpoints)
    cards = {(header["method"], header["bits"]): fairness(header, facts, full, Measured()) for header, facts in quantized}
    tables = build(config.ablation, variants, results.read(*measured), config.metrics)
    with atomic_path(out) as partial:
        write(partial, tables, variants, cards, config.metrics)
