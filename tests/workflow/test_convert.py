"""Official checkpoints are converted by the workflow, once, where the configuration names them and nowhere else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from qvsr import config as settings
from qvsr.models.checkpoints import load_backbone
from qvsr.models.convert import official_keys, random_checkpoint, vae_keys
from tests.workflow import tiny
from tests.workflow.test_stale import COMMON, LOADED, named


def test_weights_come_from_the_official_files(tmp_path: Path) -> None:
    project = tiny.make(tmp_path / "project")
    assert "convert" not in tiny.due(project)
    backbone = {**tiny.BACKBONE, "unet": {**tiny.BACKBONE["unet"], "context_dim": 64}}
    backbone |= {"weights": "resources/a.safetensors", "vae_weights": "resources/b.safetensors"}
    chosen = settings.BackboneSettings.model_validate(backbone)
    random_checkpoint(project / "official" / "unet.ckpt", official_keys(chosen, text_layers=2))
    random_checkpoint(project / "official" / "vae.ckpt", vae_keys(chosen))
    official = {"weights": "official/unet.ckpt", "vae_weights": "official/vae.ckpt"}
    tiny.write_config(project / "config" / "tiny.yaml", {**tiny.CONFIG, "backbone": backbone, "official": official})
    assert {"convert", "calibrate", "restore"} <= tiny.due(project)
    asked = tiny.snakemake(project, "resources/a.safetensors", "--dry-run", "--config", "jobs={convert: {mem_mb: 700}}")
    resources = re.findall(r"^    resources: (.*)$", asked.stdout + asked.stderr, flags=re.MULTILINE)
    assert len(resources) == 1 and {"mem_mb=700", "runtime=60"} <= set(resources[0].split(", "))
    done = tiny.snakemake(project, "resources/a.safetensors")  # as a job runs it, log and all
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unet.ckpt: " in (project / "results" / "logs" / "convert.log").read_text()
    written = {key: project / value for key, value in backbone.items() if key.endswith("weights")}
    assert load_backbone(chosen.model_copy(update=written)).context.shape == (1, 3, 64)
    assert tiny.due(project, "resources/b.safetensors") == set()
    tiny.write_config(project / "config" / "tiny.yaml", {**tiny.CONFIG, "backbone": backbone, "official": official | {"precision": "half"}})
    assert "convert" in tiny.due(project, "resources/b.safetensors")
    command = [sys.executable, "-c", LOADED, "convert", "--config", "config/tiny.yaml"]
    again = subprocess.run(command, cwd=project, env=tiny.environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    # the list of assets says where a file is: its content is an input of the rule
    assert set(again.stdout.split("LOADED")[1].split()) - COMMON - named("convert") == {"qvsr.data", "qvsr.data.assets"}
