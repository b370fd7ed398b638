"""A whole clip from uint8 to uint8 against the reference's, and its intermediate values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from golden import assert_close, load, matching, settings_from, under
from networks import diffusion, set_name

from qvsr.config import AutoencoderSettings, SamplingSettings
from qvsr.models.autoencoder import AutoencoderKL, VideoAutoencoder
from qvsr.models.pipeline import PatchResult, network_frames, restore, to_uint8


class Replay:
    """Stored noise in the published order of draws."""

    def __init__(self, noises: list[torch.Tensor]) -> None:
        self.noises = noises
        self.drawn = 0

    def draw(self, kind: str, shape: Sequence[int], *, segment: int, patch: int, step: int) -> torch.Tensor:
        noise = self.noises[self.drawn]
        assert tuple(noise.shape) == tuple(shape), f"draw {self.drawn}"
        self.drawn += 1
        return noise


def backbone_of(meta: dict, tensors: dict[str, torch.Tensor]):
    networks = {}
    for name, prefix, cls in (("first_stage", "first_stage.", AutoencoderKL), ("vae", "vae.", VideoAutoencoder)):
        weights = under(tensors, prefix)
        settings = settings_from(AutoencoderSettings, meta[f"{name}_ddconfig"], embed_dim=weights["quant_conv.weight"].shape[0] // 2)
        network = cls(settings)
        result = network.load_state_dict(weights, strict=False)
        assert not result.unexpected_keys
        # Of the image autoencoder the set holds the encoder only.
        assert all(name == "first_stage" and key.startswith(("decoder.", "post_quant_conv.")) for key in result.missing_keys)
        networks[name] = network.eval().requires_grad_(False)
    settings = {name: network.settings for name, network in networks.items()} | {"scale_factor": meta["scale_factor"]}
    return diffusion(set_name(meta["networks"]), tensors["context"], settings=settings, **networks)


def test_pipeline() -> None:
    meta, tensors = load("pipeline")
    backbone = backbone_of(meta, tensors)
    sampling = SamplingSettings(
        steps=meta["steps"],
        guidance_scale=meta["guidance_scale"],
        tile=meta["canvas_tile_size"],
        tile_overlap=meta["canvas_tile_overlap"],
        image_tile=meta["image_tile"],
        image_tile_stride=meta["image_tile_stride"],
        frames_per_segment=meta["frames_per_segment"],
        upscale=meta["upscale"],
        colour_fix=meta["colour_fix"],
        rounding="truncate",
    )
    lq = tensors["lq"].permute(0, 3, 1, 2).float() / 255
    for (frame,), expected in matching(tensors, r"upscaled_frame(\d+)").items():
        assert_close(network_frames(lq[[int(frame)]], sampling.upscale)[0].permute(1, 2, 0), expected, meta, f"frame {frame}")

    flow_inputs: list[torch.Tensor] = []

    def stored_flow(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        number = len(flow_inputs)
        flow_inputs.append(frames)
        return tensors[f"flow_for_backward_propagation.{number}"], tensors[f"flow_for_forward_propagation.{number}"]

    patches: list[PatchResult] = []
    noise = Replay([x for _, x in sorted(under(tensors, "noise.").items(), key=lambda item: int(item[0]))])
    assert [list(x.shape) for x in noise.noises] == meta["noise_order"]
    restored = restore(backbone, lq, sampling, noise, stored_flow, on_patch=patches.append)

    assert noise.drawn == len(noise.noises)
    assert len(flow_inputs) == len(matching(tensors, r"flow_for_forward_propagation\.(\d+)"))
    compared = {name for name in tensors if name.startswith(("latents.", "init_latent.", "colour_fixed.", "flow_input."))}
    for name in sorted(compared):
        kind, number = name.split(".")[:2]
        if kind == "flow_input":
            actual = flow_inputs[int(number)][: tensors[name].shape[0]]
        elif kind == "colour_fixed":
            actual = patches[int(number)].frames[int(name.rpartition("frame")[2])]
        else:
            actual = patches[int(number)].latent if kind == "latents" else patches[int(number)].lq_latent
        assert_close(actual, tensors[name], meta, name)
    assert sum(name.startswith("latents.") for name in compared) == len(patches)

    output = to_uint8(restored, sampling.rounding)
    assert output.shape == tensors["output"].shape
    difference = (output.int() - tensors["output"].int()).abs()
    # As many values as lie at a rounding boundary flip: the set counts them for the same computation in float64, where errors are smaller.
    assert difference.max() <= 1
    assert difference.count_nonzero() <= 20 + 10 * meta["values_of_output_that_differ_in_float64"]
