"""Write a new method that runs as it is: baselines/NAME.py, its test and a configuration with it beside MaxMin.

make new-baseline NAME=mine
"""

import keyword
import re
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this copy of the code, from any folder

from qvsr import config, plan  # noqa: E402
from qvsr.provenance import atomic_path  # noqa: E402
from qvsr.registry import plugins  # noqa: E402

METHOD = '''"""NAME: round to nearest, a start. Say here: source (arXiv id), what is kept, what the video U-Net forces, cost, every deviation."""

from __future__ import annotations

from torch import nn

from qvsr.config import QuantSpec
from qvsr.quant import apply
from qvsr.quant.layer import LayerPlan, QuantLayer
from qvsr.quant.refine import Samples
from qvsr.registry import BASELINES


@BASELINES.add("NAME", title="NAME", source="")
def NAME(unet: nn.Module, calibration: Samples, spec: QuantSpec) -> nn.Module:
    """Quantize a U-Net in place; `calibration[i]` has x, t, context, struct and out of one full-precision call."""
    plan = LayerPlan(spec.weight_bits, spec.act_bits)
    apply.quantize_layers(unet, spec.exclude, lambda name, module: QuantLayer.from_float(module, plan, name, spec.seed))
    apply.freeze(unet)
    return unet
'''
TEST = '''"""NAME: what every method must do; then a value from outside (the paper, its formula in float64, another library)."""

import pytest

import baselines  # noqa: F401
from tests.baselines import conformance


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_conformance(check):
    check("NAME", {})
'''
CONFIG = """# NAME beside MaxMin on the clips of the main job, in results of its own.
extends: default.yaml
output: results/NAME
methods: [maxmin, NAME]
"""


def refusal(name: str) -> str | None:
    """Why a name cannot be that of a new method; None if it can."""
    if not name:
        return "no name; write make new-baseline NAME=mine"
    if not (name.isidentifier() and name.isascii() and plan.NAME.match(name)):
        return f"name {name!r} is not made of letters, digits and _, with a letter first; a file and a function are called by it"
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        return f"name {name!r} is a keyword of Python; a function is called by it"
    imported = ", ".join(re.findall(r"^from .* import (.+)$", METHOD, re.MULTILINE)).split(", ")
    if name in imported:
        return f"name {name!r} is one that the file imports; choose another"
    taken = {*plan.declared("baselines", "BASELINES"), *plan.declared("qvsr", "BASELINES"), *plan.REFERENCES, *plugins(), "exclude"}
    if name.lower() in (one.lower() for one in taken):  # two files that differ in case only are one on some systems
        return f"name {name!r} is taken; taken are {', '.join(sorted(taken))}"
    for file in sorted((ROOT / "config").glob("*.yaml")):
        data = config.read(file)
        for key in ("variants", "external"):
            if name in (data.get(key) or {}):
                return f"name {name!r} is taken by {key}.{name} in {file.relative_to(ROOT)}"
    for path in files(name):
        if path.exists():
            return f"{path.relative_to(ROOT)} is there already; choose another name"
    return None


def files(name: str) -> dict[Path, str]:
    """What is written: paths and contents."""
    templates = {f"baselines/{name}.py": METHOD, f"tests/baselines/test_{name}.py": TEST, f"config/{name}.yaml": CONFIG}
    return {ROOT / path: text.replace("NAME", name) for path, text in templates.items()}


def main(name: str) -> None:
    reason = refusal(name)
    if reason is not None:
        sys.exit(f"error: {reason}")
    with ExitStack() as stack:  # they appear together, when all of them are written
        for path, text in files(name).items():
            stack.enter_context(atomic_path(path)).write_text(text)
    for path in files(name):
        print(f"written: {path.relative_to(ROOT)}")
    print(f"next: .venv/bin/python -m pytest tests/baselines/test_{name}.py")
    print(f"      .venv/bin/snakemake --cores 2 --configfile config/{name}.yaml")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
