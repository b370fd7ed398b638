"""One finished run of a tiny project, made once; tests that change something put it back."""

from pathlib import Path

import pytest

from tests.workflow import tiny


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    project = tiny.make(tmp_path_factory.mktemp("finished") / "project")
    done = tiny.snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    return project
