"""What the documents say is there: files that links name, commands, settings, and nothing of a stranger's machine."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

from qvsr.provenance import ROOT
from tests import plugin


def documents():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "*.md"], capture_output=True, text=True).stdout.split()
    return sorted(listed) or sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("*.md"))


@pytest.mark.parametrize("document", documents())
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file = (ROOT / document).parent / target if target else ROOT / document
        assert file.exists(), f"{document} links to {target}"
        if anchor:
            heads = [
                re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-")
                for head in re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            ]
            assert anchor[1:] in heads, f"{document} links to {target}{anchor}"


@pytest.mark.parametrize("document", documents())
def test_paths_in_backticks_exist(document):
    """Paths of our own tree; what a run writes, or an example adds, is not there."""
    text = (ROOT / document).read_text()
    for path in re.findall(r"`((?:qvsr|baselines|metrics|workflow|config|tests|docs|scripts)/[\w./-]+)`", text):
        if not path.startswith(("baselines/mine", "config/mine", "metrics/mae", "tests/metrics/test_mae")):
            assert (ROOT / path).exists(), f"{document} names {path}"


def test_commands_of_the_readme_are_known():
    from typer.main import get_command

    from qvsr.cli import app

    text = "".join((ROOT / name).read_text() for name in ("README.md", "config/README.md", "CONTRIBUTING.md"))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in re.findall(r"^make ([a-z -]+?)(?:\s*#.*)?$", text, flags=re.MULTILINE):
        assert set(line.split()) <= targets, line
    stages = set(get_command(app).commands)
    for stage in re.findall(r"python -m qvsr (\w+)", text):
        assert stage in stages, stage


def test_targets_of_commands_are_not_taken_for_files_of_settings():
    """Snakemake's --configfile takes every word behind it up to the next option."""
    commands = []
    for name in (*documents(), "config/ablation.yaml", "config/mini-quantization.yaml", "workflow/profiles/slurm/config.yaml"):
        commands += re.findall(r"snakemake ([^\n`#\\]*--configfile[^\n`#\\]*)", (ROOT / name).read_text())
    assert len(commands) > 10
    for command in commands:
        words = command.split("--configfile", 1)[1].split()
        options = [index for index, word in enumerate(words) if word.startswith("-")]
        assert all(word.endswith(".yaml") for word in words[: options[0] if options else None]), command


def test_the_readme_shows_table_picture_and_the_two_commands_first():
    first = (ROOT / "README.md").read_text().splitlines()[:60]
    text = "\n".join(first)
    assert "results/reference/comparison.png" in text
    assert "<!-- table: begin -->" in text
    assert text.index("make tables") < text.index("make test")


def test_the_readme_table_is_the_committed_one():
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    table = (ROOT / "README.md").read_text().split("<!-- table: begin -->\n")[1].split("<!-- table: end -->")[0]
    expected = script["main_table"]((ROOT / "results" / "reference" / "metrics.md").read_text())
    assert table.strip() == expected, "run: make reference"


def test_what_the_readme_shows_of_a_table():
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    metrics = "### a, b: 1 clip\n\n| x |\n|---|\n| 1 |\n\n[Card](fairness.md): x.\n\n- A note.\n- Signatures:\n  - `one`\n  - `two`\n"
    assert (
        script["main_table"](metrics) == "**a, b: 1 clip**\n\n| x |\n|---|\n| 1 |\n\n[Card](results/reference/fairness.md): x.\n\n- A note."
    )


def test_text_between_marks_is_replaced_and_nothing_else(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    file = tmp_path / "a.md"
    file.write_text("before\n<!-- t: begin -->\nold\n<!-- t: end -->\nafter\n")
    script["replace_between"](file, "t", "new")
    assert file.read_text() == "before\n<!-- t: begin -->\nnew\n<!-- t: end -->\nafter\n"
    with pytest.raises(SystemExit, match="must have <!-- u: begin --> and <!-- u: end --> once each"):
        script["replace_between"](file, "u", "new")


def blocks(document, language):
    """Code of a document, in its order."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / document).read_text(), re.DOTALL)


def test_the_example_of_a_metric_runs():
    """The metric of docs/add-a-metric.md, as it stands there."""
    import torch

    import metrics  # noqa: F401
    from qvsr.registry import METRICS

    exec(compile(blocks("add-a-metric.md", "python")[0], "add-a-metric", "exec"), {"__name__": "add-a-metric"})
    try:
        assert METRICS["mae"](torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)).tolist() == [0.5]
    finally:
        METRICS.entries.pop("mae", None)


def test_the_examples_of_methods_pass_the_conformance_kit(tmp_path):
    """The file and the package of docs/add-a-baseline.md, as they stand there, by the command that it gives."""
    method, package, _ = blocks("add-a-baseline.md", "python")
    for folder in ("qvsr", "baselines", "metrics", "config", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "baselines" / "half.py").write_text(method)
    project = tomllib.loads(blocks("add-a-baseline.md", "toml")[0])["project"]
    ((name, module),) = project["entry-points"]["qvsr.baselines"].items()
    assert package.startswith(f'"""{module}.py: ') and project["name"].replace("-", "_") == module
    installed = plugin.install(tmp_path / "installed", name, package, project["name"], project["version"])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    command = re.search(r"`python (-m tests.baselines.conformance halves '.*?')`", (ROOT / "docs" / "add-a-baseline.md").read_text())[1]
    for arguments in (["-m", "tests.baselines.conformance", "half"], shlex.split(command)):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("passed") == 6, done.stdout + done.stderr


def test_notice_names_every_source_of_data():
    notice = (ROOT / "NOTICE").read_text()
    for word in (
        "bigbuckbunny.mp4",
        "Blender Foundation",
        "Creative Commons Attribution 3.0",
        "bikes.mp4",
        "carphone_pristine.mp4",
        "scikit-image",
    ):
        assert word in notice
    photographs = notice.split("photographs: begin -->")[1].split("<!-- photographs: end")[0]
    assert "licence" in photographs


def test_the_ablation_of_the_documents_is_the_committed_one():
    text = (ROOT / "docs" / "ablation.md").read_text().split("<!-- ablation: begin -->\n")[1].split("<!-- ablation: end -->")[0]
    assert text.strip() == (ROOT / "results" / "reference" / "ablation.md").read_text().strip(), "run the ablation, then make reference"
