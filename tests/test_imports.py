"""Imports point one way: cli -> stages -> {baselines, metrics, quantvsr, report, results} -> quant, data -> models -> kernels -> config, registry."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from qvsr.provenance import ROOT

# From the bottom up; a module may import what stands in a lower row, and its own package.
ROWS = (
    ("qvsr", "qvsr.registry", "qvsr.devices", "qvsr.memory", "qvsr.progress", "qvsr.settings", "qvsr.statistics"),
    ("qvsr.method_settings",),
    ("qvsr.config", "qvsr.provenance"),
    ("qvsr.data.archives", "qvsr.data.download"),
    ("qvsr.data.assets",),
    ("qvsr.kernels", "qvsr.protocols"),
    ("qvsr.models",),
    ("qvsr.quant", "qvsr.data", "metrics"),
    ("qvsr.quantvsr", "qvsr.plan", "qvsr.training"),
    ("qvsr.results", "qvsr.forecast", "qvsr.speed"),
    ("baselines", "qvsr.report", "qvsr.measuring"),
    ("qvsr.stages",),
    ("qvsr.cli",),
    ("qvsr.__main__",),
)
PLACE = {unit: row for row, units in enumerate(ROWS) for unit in units}
OURS = ("qvsr", "baselines", "metrics")


def unit_of(module: str) -> str:
    """The longest listed prefix of a module's name."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in PLACE and (name != "qvsr" or len(parts) == 1):
            return name
    raise AssertionError(f"{module} has no place in tests/test_imports.py: say in which row it belongs")


def modules() -> dict[str, Path]:
    found = {}
    for package in OURS:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


def imported(module: str, file: Path) -> set[str]:
    """Our own modules that a file imports, inside functions too; imports for type checking alone run nothing and do not count."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for body in node.body
        for inner in ast.walk(body)
    }
    known = modules()
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where a name comes from"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in below}
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_import_points_backwards(module):
    here = unit_of(module)
    for other in imported(module, modules()[module]):
        there = unit_of(other)
        assert there == here or PLACE[there] < PLACE[here], f"{module} imports {other}: {there} is not below {here}"


def test_only_the_command_line_imports_the_plug_ins():
    for module, file in modules().items():
        if module != "qvsr.cli" and module.split(".")[0] == "qvsr":
            plugged = {name for name in imported(module, file) if name.split(".")[0] in ("baselines", "metrics")}
            assert not plugged, f"{module} imports {plugged}"


def test_a_backward_import_is_found(tmp_path):
    """The check itself can fail."""
    file = tmp_path / "affine.py"
    file.write_text("def f():\n    from qvsr.stages import restore\n")
    found = imported("qvsr.quant.affine", file)
    assert found == {"qvsr.stages.restore"}
    assert PLACE[unit_of("qvsr.stages.restore")] > PLACE[unit_of("qvsr.quant.affine")]


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import qvsr.cli, qvsr.plan, qvsr.data.datasets", ["torch", "numpy", "pandas", "cv2", "pyiqa", "matplotlib", "snakemake"]),
        (
            "import qvsr.quant, pkgutil, importlib\n"
            "for m in pkgutil.iter_modules(qvsr.quant.__path__): importlib.import_module('qvsr.quant.' + m.name)",
            ["pyiqa", "torchvision", "snakemake", "cv2", "pandas", "matplotlib", "av", "scipy"],
        ),
    ],
)
def test_heavy_packages_load_where_they_are_needed(code, heavy):
    check = f"{code}\nimport sys\nprint([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
