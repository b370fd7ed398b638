"""Progress of long work: a bar where somebody watches a terminal, a plain line now and then where a log is written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]
"""Called with (done, all)."""


@contextmanager
def progress(what: str, parts: int = 10) -> Iterator[Report]:
    """Reports the progress of one piece of work on stderr.

    Args:
        what: stands before the bar or the line.
        parts: how many plain lines the whole work gets when stderr is no terminal; 0: none, where the work writes lines of its own.
    """
    if not sys.stderr.isatty():
        shown = 0

        def line(done: int, total: int) -> None:
            nonlocal shown
            part = done * parts // max(total, 1)
            if part > shown:
                shown = part
                print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

        yield line
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
