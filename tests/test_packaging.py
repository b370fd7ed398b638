"""pyproject.toml, requirements.lock and environment.yml say the same, and the lock is what is installed."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from qvsr.provenance import ROOT


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line]
    exact = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line) for line in lines]
    assert all(exact), "every line of the lock is NAME==VERSION: no index, no URL, no range"
    pairs = [(canonical(match[1]), match[2]) for match in exact if match]
    assert len(dict(pairs)) == len(pairs), "a package stands in the lock twice"
    return dict(pairs)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[str]:
    found = project()
    return [*found["dependencies"], *(one for group in found["optional-dependencies"].values() for one in group)]


def test_what_pyproject_asks_for_is_in_the_lock():
    from packaging.requirements import Requirement

    locked = lock()
    for text in requirements():
        requirement = Requirement(text)
        assert canonical(requirement.name) in locked, f"{requirement.name} is in pyproject.toml, not in requirements.lock"
        assert requirement.specifier.contains(locked[canonical(requirement.name)]), (
            f"the lock has another {requirement.name} than pyproject.toml allows"
        )


def test_the_lock_is_what_is_installed_and_complete():
    """Every locked version is installed, and everything that a locked package needs is locked."""
    from packaging.requirements import Requirement

    locked = lock()
    for name, version in locked.items():
        assert importlib.metadata.version(name) == version, f"{name}: run make setup"
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonical(needed.name) in {*locked, "setuptools", "pip", "wheel"}, (
                    f"{name} needs {needed.name}, which is not in the lock"
                )


def test_the_lock_holds_nothing_that_nobody_asked_for():
    """Each package of the lock is reached from pyproject.toml."""
    from packaging.requirements import Requirement

    reached: set[str] = set()
    queue = [(Requirement(text).name, Requirement(text).extras) for text in requirements()]
    while queue:
        name, extras = queue.pop()
        key = canonical(name)
        if key not in lock() or (key in reached and not extras):
            continue
        reached.add(key)
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                queue.append((needed.name, needed.extras))
    assert sorted(set(lock()) - reached) == []


def test_conda_users_get_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(one for one in environment["dependencies"] if isinstance(one, dict))["pip"]
    assert pip == ["-r requirements.lock"]
    assert f"python={sys.version_info[0]}.{sys.version_info[1]}" in environment["dependencies"]
    assert project()["requires-python"] == ">=3.11"


def test_every_import_is_a_declared_dependency():
    """A package that the code imports stands in pyproject.toml by itself, not by another's favour."""
    from packaging.requirements import Requirement

    names = {canonical(Requirement(text).name) for text in project()["dependencies"]}
    of_module = {module: {canonical(one) for one in packages} for module, packages in importlib.metadata.packages_distributions().items()}
    for package in ("qvsr", "baselines", "metrics"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                roots = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                for root in (name.split(".")[0] for name in roots):
                    if root in sys.stdlib_module_names or root in ("qvsr", "baselines", "metrics"):
                        continue
                    assert of_module.get(root, set()) & names, (
                        f"{file.relative_to(ROOT)} imports {root}, which pyproject.toml does not list"
                    )


def test_make_targets_of_ci_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    asked = set(workflow["jobs"]["check"]["strategy"]["matrix"]["target"])
    assert asked <= targets
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("target", ["tables", "smoke", "dry"])
def test_the_command_of_a_make_target_is_one_that_snakemake_takes(target):
    """Snakemake's options swallow the words behind them: a target in the wrong place is no target."""
    printed = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in printed.splitlines() if "bin/snakemake" in line]
    words = command.split("#")[0].split()
    done = subprocess.run(
        [str(Path(sys.executable).with_name("snakemake")), *words[1:], "--dry-run", "--quiet", "rules"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
