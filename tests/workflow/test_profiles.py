"""What jobs ask of a scheduler, and the profiles that hand it on."""

import re

import pytest
import yaml

from qvsr import plan
from qvsr.provenance import ROOT
from tests.workflow import tiny

PROFILES = ROOT / "workflow" / "profiles"


def test_every_job_says_what_it_asks_for(tmp_path):
    project = tiny.make(tmp_path / "project")
    done = tiny.snakemake(project, "--dry-run", "--config", "device=cuda", "jobs={restore: {mem_mb: 900}}")
    assert done.returncode == 0, done.stdout + done.stderr
    blocks = re.findall(r"^rule (\w+):$(.*?)^    resources: (.*?)$", done.stdout + done.stderr, flags=re.MULTILINE | re.DOTALL)
    asked: dict[str, set[tuple[str, ...]]] = {}
    for rule, _, resources in blocks:
        values = dict(one.split("=") for one in resources.split(", "))
        asked.setdefault(rule, set()).add(tuple(values.get(key, "") for key in ("mem_mb", "runtime", "gpu")))
    assert asked.pop("all") == {("", "", "")}  # computes nothing
    assert asked == {
        "clips": {("800", "30", "")},
        "calibrate": {("1300", "60", "1")},
        "quantize": {("1300", "120", "1")},
        "restore": {("900", "60", "1")},
        "measure": {("1400", "120", "")},
        "tables": {("1300", "60", "")},
        "figures": {("1100", "30", "")},
    }


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_a_profile_names_its_executor_s_package(name):
    """Exact versions beside the profile; the default environment has none of them."""
    profile = yaml.safe_load((PROFILES / name / "config.yaml").read_text())
    packages = (PROFILES / name / "requirements.txt").read_text().split()
    assert profile["executor"] == name and profile["retries"] > 0
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", one) for one in packages)
    assert f"snakemake-executor-plugin-{name}" in [one.partition("==")[0] for one in packages]
    locked = (ROOT / "requirements.lock").read_text()
    assert not any(one.partition("==")[0] in locked for one in packages)


def test_a_job_that_shares_no_folder_writes_the_settings_once(tmp_path):
    run = plan.Plan(plan.resolve([ROOT / plan.DEFAULT], {"output": str(tmp_path)}))
    run.settings_here()
    assert plan.resolve([run.settings_file], {}) == run.config
    (tmp_path / "config.json").write_text("as it was")
    run.settings_here()
    assert (tmp_path / "config.json").read_text() == "as it was"
