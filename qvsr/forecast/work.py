"""How much there is to compute: multiply-accumulates of the networks, calls of them by clip and by method, and the hours that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvsr.config import Config
from qvsr.forecast.assumed import (
    ANY_SIZE,
    BACKWARD,
    CONVERT_GB_S,
    HD,
    METRIC_SECONDS,
    OTHER_METRIC_SECONDS,
    READ_GB_S,
    SECONDS_A_FRAME,
    SIMULATED,
    START_SECONDS,
)
from qvsr.forecast.clips import Clips
from qvsr.plan import UNQUANTIZED
from qvsr.settings import Settings


@dataclass(frozen=True)
class Network:
    """What one call of a network takes, on 5 frames of a latent tile of the configured size.

    Attributes:
        gmacs, attention: multiply-accumulates in 1e9, of layers and of attention products; the latter grow with the square of the tile's area.
        params: parameters in all.
        outputs: values that its layers put out.
    """

    gmacs: float
    attention: float
    params: int
    outputs: int = 0

    def at(self, share: float) -> float:
        """1e9 multiply-accumulates of a call on a tile of `share` times the area."""
        return self.gmacs * share + self.attention * share**2


@dataclass(frozen=True)
class Networks:
    """The networks of a backbone at full precision, and the U-Net of each quantized row with what its file takes."""

    unet: Network
    structure: Network
    encode: Network
    decode: Network
    quantized: Mapping[tuple[str, str], Network]
    file_bytes: Mapping[tuple[str, str], int]
    encoders: int  # how many encoders see a segment: one where both autoencoders share it

    @property
    def params(self) -> int:
        """Of all networks that a job loads; the two autoencoders' decoders are one."""
        return self.unet.params + self.structure.params + self.encoders * self.encode.params


def networks(config: Config) -> Networks:
    """Counts of a configuration's networks on the meta device; needs no weights."""
    import torch
    from torch import Tensor, nn

    from qvsr.models.checkpoints import build
    from qvsr.quant.cost import Facts, count, example_inputs, planned_facts

    class Encode(nn.Module):
        def __init__(self, autoencoder: Any) -> None:
            super().__init__()
            self.autoencoder = autoencoder

        def forward(self, x: Tensor) -> Any:
            return self.autoencoder.encode(x)[1]

    class Decode(Encode):
        def forward(self, z: Tensor, features: list[Tensor]) -> Any:  # type: ignore[override]
            return self.autoencoder.decode(z, features)

    def network(facts: Facts) -> Network:
        macs = sum(layer.macs + layer.branch_macs + layer.rotation_macs for layer in facts.layers)
        params = sum(layer.weights + layer.bias for layer in facts.layers) + facts.other_params
        return Network(
            macs / 1e9, facts.attention_macs / 1e9, params, sum(layer.positions * layer.weight_shape[0] for layer in facts.layers)
        )

    settings, tile = config.backbone, config.sampling.tile
    with torch.device("meta"):
        backbone = build(settings)
        frames, side = settings.unet.num_frames, tile * settings.vae.factor
        latent, image = torch.zeros(frames, settings.vae.embed_dim, tile, tile), torch.zeros(frames, 3, side, side)
        features = backbone.vae.encode(image)[1]
    inputs = example_inputs(settings.unet, tile, settings.context_tokens, "meta")
    rows = planned_facts(config)
    quantized = {(method, bits): facts for method, bits, facts in rows if method not in UNQUANTIZED}
    return Networks(
        unet=network(rows[0][2]),
        structure=network(count(backbone.structure, latent[:, : settings.structure.in_channels], inputs[1])),
        encode=network(count(Encode(backbone.vae), image)),
        decode=network(count(Decode(backbone.vae), latent, features)),
        quantized={row: network(facts) for row, facts in quantized.items()},
        file_bytes={row: sum(layer.stored_bits for layer in facts.layers if layer.quantized) // 8 for row, facts in quantized.items()},
        encoders=1 if settings.share_encoder else 2,
    )


def clip_gmacs(config: Config, nets: Networks, unet: float, clip: Clips) -> float:
    """1e9 multiply-accumulates of restoring one clip.

    Args:
        unet: how many times the full-precision U-Net's a call of the U-Net counts.
    """
    from qvsr.models.pipeline import segments

    total = 0.0
    for image_tile, latent_tiles in tiles(config, clip):
        total += nets.encoders * nets.encode.at(image_tile) + nets.decode.at(image_tile)
        total += config.sampling.steps * sum(unet * nets.unet.at(tile) + nets.structure.at(tile) for tile in latent_tiles)
    return len(segments(clip.frames, config.sampling.frames_per_segment)) * total


def tiles(config: Config, clip: Clips) -> list[tuple[float, list[float]]]:
    """Area of each image tile of a segment, and of the latent tiles in it, in units of the configured latent tile's."""
    from qvsr.models.tiling import boxes, latent_boxes, padded_size

    sampling, factor = config.sampling, config.backbone.vae.factor
    rows, columns = padded_size(clip.height * sampling.upscale, clip.width * sampling.upscale, sampling.pad_multiple)
    found = []
    for box in boxes(rows, columns, sampling.image_tile, sampling.image_tile_stride):
        height, width = (min(box.bottom, rows) - box.top) // factor, (min(box.right, columns) - box.left) // factor
        inner = latent_boxes(height, width, sampling.tile, sampling.tile_overlap)
        whole = sampling.tile**2
        found.append((height * width / whole, [(one.bottom - one.top) * (one.right - one.left) / whole for one in inner]))
    return found


def tile_share(config: Config, clips: Sequence[Clips]) -> float:
    """Mean area of the recorded calls' tiles over that of the configured one: small clips have smaller tiles."""
    shares = [share for one in clips for _, shares in tiles(config, one) for share in shares]
    return sum(shares) / len(shares)


def calls(config: Config, clips: Sequence[Clips]) -> int:
    """Calls of the U-Net that restoring clips takes."""
    from qvsr.models.pipeline import network_calls

    factor = config.backbone.first_stage.factor
    return sum(one.count * network_calls(one.height, one.width, one.frames, config.sampling, factor) for one in clips)


def recorded_samples(config: Config, clips: Sequence[Clips]) -> int:
    """Calibration samples that a recording gives: no more than asked for, and than the recorded steps have calls."""
    return min(config.calibration.samples, calls(config, clips) * config.calibration.steps // config.sampling.steps)


def method_calls(base: str, own: Settings | None, samples: int, units: int = 60) -> tuple[float, float] | None:
    """Forward calls of the full-precision and of the quantized U-Net that quantizing takes, training counted by :data:`BACKWARD`; None: not known.

    Args:
        base: a method; `own` its settings.
        samples: in the calibration set.
        units: blocks that a method goes through one after the other.
    """
    get: dict[str, Any] = own.model_dump() if own is not None else {}
    if base == "maxmin":
        return (float(samples) if get["activations"] == "static" else 0.0), 0.0
    if base == "quarot":
        return (float(samples) if get["weights"] == "gptq" else 0.0), 0.0
    if base == "vidit_q":
        return (float(samples) if get["balance"] else 0.0), 0.0
    if base == "svdquant":
        looked = min(samples, get["samples"])
        tries = (39 if get["smooth"] else 1) + min(5, get["iterations"])  # the branch's rounds end with the first that gains nothing
        return float(looked), float(looked * tries)
    if base == "passionsr":
        return float(samples * (1 + get["transform"])), BACKWARD * samples * (
            get["transform"] * get["transform_epochs"] + get["bounds_epochs"]
        )
    if base == "efficientdm":
        return float(min(samples, get["range_samples"])), BACKWARD * get["updates"]
    if base == "q_diffusion":
        looked, phases = min(samples, get["samples"]), (get["round_updates"] > 0) + (get["step_updates"] > 0)
        replayed = phases * looked * 2 * (1 if get["keep_outputs"] else units / 2)  # half of the network before a unit, on average
        return replayed / 2 + get["range_samples"], replayed / 2 + BACKWARD * get["batch"] * (get["round_updates"] + get["step_updates"])
    if base == "quantvsr":
        kept = min(samples, get["samples"] or samples)
        trained = get["branch"] * get["refine"] * get["refine_updates"] + get["lba"] * (get["bias"] == "trained") * get["lba_updates"]
        searches = get["act_clip"] + (get["residual"] == "gptq") + 9 * get["stca_search"] + (get["mixed"] != "none") * BACKWARD
        measured = kept * get["lba"] * (get["bias"] == "measured")
        return float(kept * get["branch"] * get["stca"]) + measured, (
            BACKWARD * get["accumulate"] * trained + searches * min(kept, get["search_samples"]) + measured
        )
    return None


def quantize_hours(
    config: Config, nets: Networks, method: str, bits: str, samples: int, share: float, rate: float, start: float
) -> float | None:
    """Hours of quantizing one row; None: not known.

    Args:
        samples, share: recorded calls, and the mean area of their tiles over that of the configured one.
        rate: 1e9 multiply-accumulates an hour.
        start: hours until a job computes.
    """
    base, own = config.resolve_method(method)
    needed = method_calls(base, own, samples)
    if needed is None:
        return None
    full, quantized = needed
    simulated = SIMULATED * nets.quantized[method, bits].at(share)
    return start + (full * nets.unet.at(share) + quantized * simulated + (full + quantized) * nets.structure.at(share)) / rate


def convert_hours(official: Sequence[int]) -> float:
    """Hours of converting checkpoints of so many bytes."""
    return (START_SECONDS + sum(official) / 1e9 * (1 / READ_GB_S + 1 / CONVERT_GB_S)) / 3600


def clip_hours(clip: Clips, start: float) -> float:
    """Hours of making a clip; no network is loaded for it."""
    return start / 2 + SECONDS_A_FRAME["clips"] * clip.frames * hd(clip) / 3600


def tables_hours(nets: Networks, start: float) -> float:
    """Hours of making the tables: the weights are compared with every quantized checkpoint, which is read; statistics take as long as a start."""
    return 2 * start + sum(nets.unet.params * 4 + size for size in nets.file_bytes.values()) / 1e9 / READ_GB_S / 3600


def measure_hours(config: Config, clips: Sequence[Clips], start: float) -> float:
    """Hours of measuring one row on a data set."""
    seconds = 0.0
    for one in clips:
        for metric in config.metrics:
            a_frame = METRIC_SECONDS.get(metric, OTHER_METRIC_SECONDS)
            seconds += one.count * one.frames * a_frame * (1 if metric in ANY_SIZE else hd(one))
    return start + seconds / 3600


def hd(clip: Clips) -> float:
    """Pixels of a restored frame, in units of 1280x720."""
    return clip.height * clip.width * 16 / HD
