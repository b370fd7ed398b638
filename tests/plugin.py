"""A package that offers a method, as pip would have installed it: a module and its metadata in a folder that is on the path."""

from __future__ import annotations

from pathlib import Path

METHOD = '''"""Round to nearest."""

from qvsr.quant import apply
from qvsr.quant.layer import LayerPlan, QuantLayer
from qvsr.registry import BASELINES
from qvsr.settings import Settings


class MineSettings(Settings):
    READ_IF = {"scale_floor": ({"floored": True},)}
    floored: bool = False
    scale_floor: float = 1e-4


@BASELINES.add("NAME", title="Mine", source="here", settings=MineSettings)
def mine(unet, calibration, spec):
    plan = LayerPlan(spec.weight_bits, spec.act_bits, scale_floor=spec.settings["scale_floor"])
    apply.quantize_layers(unet, spec.exclude, lambda name, module: QuantLayer.from_float(module, plan, name))
    apply.freeze(unet)
    return unet
'''


def install(
    folder: Path, name: str = "mine", code: str = METHOD, package: str = "qvsr-mine", version: str = "1.0", target: str | None = None
) -> Path:
    """A package whose module, called like the package, registers one method; returns the folder.

    Args:
        name: of the entry point; stands for NAME in the code.
        target: what the entry point names, where it is not the module.
    """
    module = package.replace("-", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(code.replace("NAME", name))
    for old in folder.glob(f"{module}-*.dist-info"):
        old.rename(folder / f"{module}-{version}.dist-info")
    metadata = folder / f"{module}-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(f"[qvsr.baselines]\n{name} = {target or module}\n")
    return folder
