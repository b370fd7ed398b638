"""The workflow through a real Slurm on this machine: the same files as a local run, also when a job is killed.

It starts daemons and takes minutes, so it runs when it is asked for: `make test-slurm`.
"""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.workflow import tiny
from tests.workflow.slurm import ask, cluster

PLUGINS = os.environ.get("QVSR_SLURM_PLUGINS", "")
pytestmark = [
    pytest.mark.skipif(not PLUGINS, reason="starts a Slurm cluster on this machine: make test-slurm"),
    pytest.mark.timeout(1800),
]
ARGUMENTS = (
    "--profile",
    "workflow/profiles/slurm",
    "--slurm-status-command=squeue",  # there is no accounting
    "--slurm-init-seconds-before-status-checks=3",
    "--latency-wait=5",
    "--jobs=2",
)


@pytest.fixture(scope="module")
def slurm():
    with cluster() as variables:
        yield variables


def command() -> list[str]:
    """Snakemake's command line without `--cores`, which is for local runs."""
    words = tiny.snakemake_command(*ARGUMENTS)
    at = words.index("--cores")
    return words[:at] + words[at + 2 :]


def environment(slurm: dict[str, str]) -> dict[str, str]:
    return {**tiny.environment(), **slurm, "PYTHONPATH": PLUGINS}


def jobs(slurm: dict[str, str], states: str = "all") -> dict[str, tuple[str, str]]:
    """State and comment, which names the rule, of every job that Slurm still knows, by number."""
    lines = ask(["squeue", f"--states={states}", "--noheader", "--format=%i|%T|%k"], slurm).splitlines()
    return {number: (state, comment) for number, state, comment in (line.split("|") for line in lines)}


def same_files(project: Path, other: Path) -> None:
    expected, found = tiny.outputs(other), tiny.outputs(project)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def test_the_same_files_as_a_local_run(slurm, finished, tmp_path):
    project = tiny.make(tmp_path / "project")
    before = set(jobs(slurm))
    done = subprocess.run(command(), cwd=project, env=environment(slurm), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [comment for number, (state, comment) in jobs(slurm).items() if number not in before and state == "COMPLETED"]
    for rule in ("clips", "calibrate", "quantize", "restore", "measure", "tables", "figures"):
        assert any(rule in comment for comment in ran), f"no job of the rule {rule} in {ran}"
    same_files(project, finished)


def test_a_job_killed_by_scancel_is_retried(slurm, finished, tmp_path):
    project = tiny.make(tmp_path / "project")
    before = set(jobs(slurm))
    log = tmp_path / "snakemake.log"
    with log.open("w") as out:
        running = subprocess.Popen(command(), cwd=project, env=environment(slurm), stdout=out, stderr=out)
        try:
            killed = victim(slurm, before, running, "restore", log)
            ask(["scancel", killed], slurm)
            assert running.wait(1200) == 0, log.read_text()
        finally:
            running.terminate()
            running.wait()
    found = {number: one for number, one in jobs(slurm).items() if number not in before}
    assert found[killed][0] == "CANCELLED", found
    assert [state for number, (state, _) in found.items() if number != killed] == ["COMPLETED"] * (len(found) - 1)
    assert "Trying to restart job" in log.read_text()
    same_files(project, finished)


def victim(slurm: dict[str, str], before: set[str], running: subprocess.Popen, rule: str, log: Path) -> str:
    """Number of the first job of a rule that has been running for two seconds."""
    while running.poll() is None:
        seen = [number for number, (_, comment) in jobs(slurm, "running").items() if number not in before and rule in comment]
        if seen:
            time.sleep(2)  # into its work
            if seen[0] in jobs(slurm, "running"):
                return seen[0]
        time.sleep(0.2)
    raise AssertionError(f"Snakemake ended before a job of the rule {rule} was seen running: {log.read_text()}")
