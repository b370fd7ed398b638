"""A finished run of a tiny project: made once, by one of the processes that run the tests, then copied for each of them."""

import shutil
import time
from pathlib import Path

import pytest

from tests.workflow import tiny


@pytest.fixture(scope="session")
def finished(tmp_path_factory, request) -> Path:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    project, failed, ready = shared / "finished", shared / "finished.failed", shared / "finished.ready"
    try:
        (shared / "finished.begun").mkdir()
    except FileExistsError:
        while not ready.exists():
            assert not failed.exists(), "another process could not make the project: see its tests"
            time.sleep(0.1)
    else:
        try:
            done = tiny.snakemake(tiny.make(project))
            assert done.returncode == 0, done.stdout + done.stderr
            ready.touch()
        except BaseException:
            failed.touch()
            raise
    # with its times, so that nothing in the copy looks newer than what was made from it
    return Path(shutil.copytree(project, base / "own" / "project", symlinks=True))
