"""A backbone from the tiny networks of a reference set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from golden import load, settings_from, under

from qvsr.config import AutoencoderSettings, BackboneSettings, StructureSettings, UNetSettings
from qvsr.models.sampler import Motion
from qvsr.models.structure import StructureEncoder
from qvsr.models.unet import InflatedUNet


def set_name(text: str) -> str:
    """The set that a description such as "unet.safetensors (same networks)" names."""
    return text.partition(".safetensors")[0]


def diffusion(name: str, context: torch.Tensor, **more: Any) -> SimpleNamespace:
    """U-Net, structure encoder, context and settings of a set; `more` are further members and settings of the backbone."""
    meta, tensors = load(name)
    unet_settings = settings_from(UNetSettings, meta["unet_config"])
    structure_settings = settings_from(StructureSettings, meta["struct_config"])
    unet, structure = InflatedUNet(unet_settings), StructureEncoder(structure_settings)
    unet.load_state_dict(under(tensors, "unet."), strict=True)
    structure.load_state_dict(under(tensors, "struct."), strict=True)
    settings = more.pop("settings", {})
    return SimpleNamespace(
        unet=unet.eval().requires_grad_(False),
        structure=structure.eval().requires_grad_(False),
        context=context,
        settings=BackboneSettings(
            name=name,
            unet=unet_settings,
            structure=structure_settings,
            **{"first_stage": AutoencoderSettings(embed_dim=unet_settings.in_channels), **settings},
        ),
        **more,
    )


def stored_motion(tensors: dict[str, torch.Tensor]) -> Motion:
    """Flows and occlusions of a set, by the reference's names."""
    return Motion(
        forward=tensors["flow_for_backward_propagation"],
        backward=tensors["flow_for_forward_propagation"],
        forward_occluded=tensors["fwd_occ"],
        backward_occluded=tensors["bwd_occ"],
    )
