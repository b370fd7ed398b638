"""The paper's data sets: built from unpacked archives, and checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from qvsr.config import Config
from qvsr.data import build as builder
from qvsr.data.published import PUBLISHED, DatasetError

log = logging.getLogger(__name__)


def build(config: Config, dataset: str, source: Path, lq_source: Path | None) -> None:
    """Build one data set into the path that the settings give it.

    Args:
        dataset: its name in the settings.
        source: folder of unpacked archives with the ground truth.
        lq_source: folder of those with the LQ frames; None: the same.
    """
    report = builder.build(config, dataset, source, lq_source, log.info)
    for remark in report.remarks:
        log.warning(f"warning: {remark}")


def check(config: Config, datasets: Sequence[str]) -> None:
    """Check data sets; every fault is told before the last line says how many there are.

    Args:
        datasets: names in the settings; empty: all that can be checked.
    Raises:
        DatasetError: one or more are not as they should be.
    """
    known = [name for name, settings in config.datasets.items() if settings.kind in (*PUBLISHED, "paired")]
    if not (datasets or known):
        raise DatasetError(f"nothing to check: the settings have no dataset of kind {', '.join(PUBLISHED)} or paired")
    faults = 0
    for name in datasets or known:
        try:
            report = builder.check(config, name)
        except DatasetError as error:
            report = builder.Report(name, errors=[str(error)])
        for remark in report.remarks:
            log.warning(f"warning: {remark}")
        for fault in report.errors:
            log.error(f"fault: {fault}")
        faults += len(report.errors)
        log.info(f"{name}: {_counted(report.clips, 'clip')}, {_counted(len(report.errors), 'fault')}")
    if faults:
        raise DatasetError(f"{_counted(faults, 'fault')} in {', '.join(datasets or known)}, named above")


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'s' * (count != 1)}"
