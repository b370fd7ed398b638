"""A bar where somebody watches, a few plain lines where a log is written."""

import os
import pty
import subprocess
import sys

import pytest

from qvsr.progress import progress
from qvsr.provenance import ROOT


@pytest.mark.parametrize(("parts", "expected"), [(4, ["work: 3/12", "work: 6/12", "work: 9/12", "work: 12/12"]), (0, [])])
def test_plain_lines_in_a_log(capfd, parts, expected):
    with progress("work", parts) as report:
        for done in range(1, 13):
            report(done, 12)
    assert capfd.readouterr().err.splitlines() == expected


def test_a_bar_on_a_terminal():
    code = "from qvsr.progress import progress\nwith progress('work') as report:\n for done in range(1, 13): report(done, 12)\n"
    here, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], stderr=terminal, env=environment, check=True)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(here, 4096):
            shown += part
    except OSError:  # Linux tells the end of a terminal by an error
        pass
    os.close(here)
    text = shown.decode()
    assert "━" in text and "12/12" in text
    assert "work: 12/12" not in text
