"""``snakemake weights`` fetches what the metrics of the configuration read, and nothing else asks for it; a folder comes when it is named."""

import hashlib
import re
import subprocess
import zipfile

import yaml

from tests.qvsr.data.server import Fault, Server
from tests.workflow import tiny


def test_weights_are_fetched_when_they_are_asked_for(tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    (served / "trunk.pth").write_bytes(b"weights")
    project = tiny.make(tmp_path / "project")
    chosen = ["licenses=permissive", "metrics=[ewarp_dis, dists, lpips]"]
    with zipfile.ZipFile(served / "set.zip", "w") as packed:
        packed.writestr("GT/000/00000000.png", bytes(1_000_000))
    with Server(served, {"set.zip": Fault(drop=0.3)}) as server:
        listed = project / "config" / "assets.yaml"
        table = yaml.safe_load(listed.read_text())
        table["alexnet"] |= {
            "file": "trunk.pth",
            "urls": [f"{server.url}/trunk.pth"],
            "sha256": hashlib.sha256(b"weights").hexdigest(),
            "bytes": None,
        }
        table["reds-val"] |= {"file": "set.zip", "urls": [f"{server.url}/set.zip"]}
        listed.write_text(yaml.safe_dump(table))
        done = tiny.snakemake(project, "weights", "--config", *chosen)
        there = [file.name for file in (project / "resources" / "assets").iterdir()]
        folder = tiny.snakemake(project, "resources/assets/REDS-val_sharp", "--config", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert there == ["trunk.pth"]  # that of lpips alone
    assert folder.returncode == 0, folder.stdout + folder.stderr
    assert (project / "resources" / "assets" / "REDS-val_sharp" / "GT" / "000" / "00000000.png").stat().st_size == 1_000_000
    assert [one.status for one in server.asked if one.path == "set.zip"] == [200, 206]
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("licenses: permissive leaves out")]
    assert said == ["licenses: permissive leaves out dists (PolyForm-Noncommercial-1.0.0)"]
    assert "weights" not in tiny.due(project, "--config", *chosen)


NO_NODES = """
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import AbstractExecutor
from snakemake_interface_executor_plugins.settings import CommonSettings

common_settings = CommonSettings(non_local_exec=True, implies_no_shared_fs=False, job_deploy_sources=False)


class Executor(AbstractExecutor):
    def run_job(self, job):
        raise WorkflowError(f"{job.name} is sent to a node")

    def nothing(self, *_):
        pass

    cancel = shutdown = handle_job_success = handle_job_error = nothing
"""


def test_a_cluster_s_nodes_fetch_nothing(tmp_path):
    """With an executor of Snakemake whose cluster has no nodes: files come, other rules' jobs do not run."""
    plugin = tmp_path / "plugins" / "snakemake_executor_plugin_nonodes" / "__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(NO_NODES)
    served = tmp_path / "served"
    served.mkdir()
    (served / "trunk.pth").write_bytes(b"weights")
    with zipfile.ZipFile(served / "set.zip", "w") as packed:
        packed.writestr("GT/000/00000000.png", b"a frame")
    project = tiny.make(tmp_path / "project")
    listed = project / "config" / "assets.yaml"
    table = yaml.safe_load(listed.read_text())

    def run(*targets):
        words = tiny.snakemake_command("--executor", "nonodes", "--jobs", "1", *targets, "--config", "metrics=[lpips]")
        variables = {**tiny.environment(), "PYTHONPATH": str(tmp_path / "plugins")}
        return subprocess.run(words, cwd=project, env=variables, capture_output=True, text=True)

    with Server(served) as server:
        table["alexnet"] |= {"file": "trunk.pth", "urls": [f"{server.url}/trunk.pth"], "sha256": None, "bytes": None}
        table["reds-val"] |= {"file": "set.zip", "urls": [f"{server.url}/set.zip"]}
        listed.write_text(yaml.safe_dump(table))
        fetched = run("weights", "resources/assets/REDS-val_sharp")
        sent = run("results/calibration")
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr
    assert (project / "resources" / "assets" / "trunk.pth").read_bytes() == b"weights"
    assert (project / "resources" / "assets" / "REDS-val_sharp" / "GT" / "000" / "00000000.png").read_bytes() == b"a frame"
    assert sent.returncode != 0
    assert re.search(r"^clips is sent to a node$", sent.stdout + sent.stderr, flags=re.MULTILINE)
