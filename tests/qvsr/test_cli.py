import json
import re
import subprocess
import sys

import pytest

from qvsr import cli
from qvsr.provenance import ROOT

STAGES = (
    "clips",
    "calibrate",
    "quantize",
    "restore",
    "measure",
    "compare",
    "tables",
    "figures",
    "layers",
    "cost",
    "plan",
    "schema",
    "config",
    "train",
    "convert",
    "export",
    "upscale",
    "doctor",
    "bench",
    "speed",
)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    import os

    command = [sys.executable, "-m", "qvsr", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables})


def test_help_names_every_stage():
    done = run("--help")
    assert done.returncode == 0
    assert set(STAGES) <= set(re.findall(r"^  (\w+) ", done.stdout, flags=re.MULTILINE))


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_a_stage_loads_nothing_heavy(stage):
    code = (
        "import sys\n"
        f"sys.argv = ['qvsr', {stage!r}, '--help']\n"
        "from qvsr.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print('HEAVY', [m for m in ('torch', 'numpy', 'pandas', 'cv2', 'pyiqa', 'matplotlib', 'snakemake', 'av') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert done.stdout.rstrip().endswith("HEAVY []")


def test_schema_is_that_of_the_settings():
    assert json.loads(run("schema").stdout)["title"] == "Config"


def test_schema_as_a_table_has_a_line_for_each_key():
    assert "| `sampling.steps` | 50 | " in run("schema", "--markdown").stdout


def test_config_check_says_what_would_run():
    done = run("config", "check", "config/default.yaml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"config/default\.yaml: fine; \d+ rows, \d+ clips, \d+ metrics, output in results", done.stdout)


def test_config_write_reads_back(tmp_path):
    out = tmp_path / "config.json"
    assert run("config", "write", "--set", "sampling.steps=7", "--out", str(out)).returncode == 0
    assert json.loads(out.read_text())["sampling"]["steps"] == 7
    assert cli.settings(out).sampling.steps == 7


def test_an_error_is_one_line_and_the_traceback_is_there_on_request():
    done = run("config", "check", "none.yaml")
    assert (done.returncode, done.stderr) == (1, "error: no configuration none.yaml; try config/default.yaml\n")
    assert "Traceback" in run("config", "check", "none.yaml", QVSR_DEBUG="1").stderr


def test_an_unknown_stage_or_option_is_refused():
    assert run("restor").returncode == 2
    assert "No such option" in run("tables", "--nothing").stderr


def test_cost_needs_no_weights(tmp_path):
    out = tmp_path / "cost.csv"
    done = run("cost", "--config", "config/default.yaml", "--set", "backbone.weights=none.safetensors", "--out", str(out))
    assert done.returncode == 0, done.stderr
    header, *rows = out.read_text().splitlines()
    assert header.startswith("method,bits,params_m")
    assert rows[0].startswith("full_precision,W32A32,")
    assert "| W4A4   | quantvsr       |" in done.stdout
    assert "- Params and MACs as published: everything × b/32 plus the 32-bit low-rank branch" in done.stdout
    assert run("cost", "--config", "config/default.yaml").stdout == done.stdout  # without a file too
    both = run("cost", "--rank", "4", "--checkpoint", "q.safetensors")
    assert both.returncode == 1 and "--rank is for rows without a checkpoint" in both.stderr


def test_the_default_settings_are_there_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.settings(cli.plan.DEFAULT).backbone.name == "mgld-mini"
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "default.yaml").write_text(f"extends: {ROOT / 'config' / 'default.yaml'}\nseed: 5\n")
    assert cli.settings(cli.plan.DEFAULT).seed == 5, "a file of that name in the folder is the one that is meant"


def test_the_same_numbers_of_threads_everywhere():
    code = (
        "from qvsr import cli\n"
        "config = cli.settings('config/default.yaml', ['threads=1'])\n"
        "cli.compute(config)\n"
        "import torch\n"
        "print(torch.get_num_threads(), torch.get_num_interop_threads(), torch.are_deterministic_algorithms_enabled())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1", "True"], done.stderr
