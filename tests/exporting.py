"""A backbone of random weights, a checkpoint of it, and the exported model of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qvsr import config as settings
from qvsr.config import Config
from qvsr.models.checkpoints import Backbone, build, load_backbone, save_backbone
from qvsr.quant import apply, checkpoint
from qvsr.quant.by_timestep import ByTimestep
from qvsr.quant.layer import LayerPlan, QuantLayer, halves
from tests.workflow import tiny

EXCLUDE = ("time_embed.0", "input_blocks.0.0", "out.2")


def configured(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Config:
    """Settings whose backbone has random weights in `folder`; `changes` are keys of the backbone, or `sampling`."""
    files = {"weights": str(folder / f"w{seed}.safetensors"), "vae_weights": str(folder / f"v{seed}.safetensors")}
    sampling = changes.pop("sampling", tiny.CONFIG["sampling"])
    config = settings.validate({**tiny.CONFIG, "backbone": {**tiny.BACKBONE, **files, **changes}, "sampling": sampling}, "test")
    torch.manual_seed(seed)
    network = build(config.backbone)
    for module in (network.unet, network.structure, network.vae):
        for parameter in module.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    save_backbone(network, Path(files["weights"]), Path(files["vae_weights"]), dtype)
    return config


def quantized(config: Config, file: Path, rank: int = 2, forms: bool = False, branch: float = 1.0, rotate: bool = True) -> Backbone:
    """A checkpoint of the configuration's backbone, and that backbone quantized.

    Args:
        forms: give one layer two forms by timestep.
        branch: factor of L1.
    """
    backbone = load_backbone(config.backbone)

    def make(name: str, module: torch.nn.Module) -> QuantLayer:
        layer = QuantLayer.from_float(module, LayerPlan(4, 4, halves(module.weight.shape[1]), rotate, rank), name)
        if layer.up is not None:
            layer.up.mul_(branch)
        return layer

    layers = apply.quantize_layers(backbone.unet, EXCLUDE, make)
    if forms:
        name = next(name for name, layer in layers.items() if layer.geometry.kind == "Linear")
        rows = [QuantLayer.from_float(load_backbone(config.backbone).unet.get_submodule(name), LayerPlan(bits, 4), name) for bits in (3, 5)]
        apply.replace(backbone.unet, name, ByTimestep(rows, (400, 999), name))
    apply.freeze(backbone.unet)
    apply.follow_timesteps(backbone.unet)
    header = {"method": "maxmin", "bits": "W4A4", "backbone": "tiny", "weights": backbone.digest, "spec": {"weight_bits": 4, "act_bits": 4}}
    checkpoint.save(backbone.unet, file, header)
    return backbone
