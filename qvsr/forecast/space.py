"""Where it has to fit: main memory and GPU memory by rule, downloads, disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qvsr.config import Config
from qvsr.forecast.assumed import KEPT_FOR_BACKWARD, LIVE_MAPS, PAIR, PNG_BYTES_A_PIXEL, TEXT_TOWER_GB, TORCH_MB
from qvsr.forecast.clips import Clips, published
from qvsr.forecast.work import Networks
from qvsr.plan import GROUND_TRUTH, Plan


def official_bytes(run: Plan, nets: Networks) -> list[int]:
    """Sizes of the official checkpoints that the weights are converted from; of one that nobody knows, that of all networks in float32."""
    sizes = [Path(path).stat().st_size if Path(path).is_file() else download(path)[1] for path in run.official().values()]
    return [size or nets.params * 4 for size in sizes]


def memory_by_rule(
    config: Config, nets: Networks, clips: Sequence[Clips], official: Sequence[int]
) -> tuple[dict[str, float], dict[str, float]]:
    """GB of main memory and of GPU memory that a job of each rule is expected to take; pages of mapped files count, as some clusters count them."""
    weights = nets.params * 4 / 1e9
    pixels = max(min(one.height * 4, config.sampling.image_tile) * min(one.width * 4, config.sampling.image_tile) for one in clips)
    maps = LIVE_MAPS * config.backbone.unet.num_frames * pixels * config.backbone.vae.ch * 4 / 1e9
    frames = max(one.frames * one.height * one.width for one in clips) * 16 * 3 / 1e9  # bytes of 8 bit
    torch_gb = TORCH_MB / 1e3
    training = nets.unet.outputs * 4 * KEPT_FOR_BACKWARD / 1e9
    on_gpu = config.device != "cpu"
    # three copies while a method works on all layers: as they were, smoothed or not yet rotated, and rotated; 14.7 GB of 4.55 were measured.
    # A restoring job has the weights as they were, the rounded ones and rotations: 13.8 GB
    recording, restoring, quantizing = weights + maps, weights * 3 + maps, weights * 3 + training
    host = {
        "convert": torch_gb + TEXT_TOWER_GB + max(official, default=0) / 1e9,
        "dataset": 0.4 + 6 * frames,
        "clips": 0.4 + 6 * frames,
        "calibrate": torch_gb + weights * 2 + (0 if on_gpu else maps),
        "quantize": torch_gb + weights * 2 + (0 if on_gpu else weights + training),
        "restore": torch_gb + weights * 2 + frames * 5 + (0 if on_gpu else weights + maps),
        "measure": Plan(config).mem_mb("measure") / 1e3,  # as measured of the metrics: they stream
        "tables": torch_gb + weights * 2,
        "figures": torch_gb + 2 * frames,
    }
    return host, {"calibrate": recording, "quantize": quantizing, "restore": restoring}


def downloads(run: Plan, clips: Mapping[str, Sequence[Clips]]) -> list[tuple[str, int | None]]:
    """Files and data sets that the configuration needs and that are not here, with their sizes in bytes where they are known; a set's is estimated."""
    backbone = run.config.backbone
    made = [str(backbone.weights), str(backbone.vae_weights)] if run.official() else []
    needed = [path for path in run.weights() if path not in made]
    if not all(Path(path).is_file() for path in made):
        needed += run.official().values()
    # a file may be named by several settings
    missing = dict(download(path) for path in (*run.assets(), *needed) if not Path(path).exists())
    for dataset, found in clips.items():
        place, archives = run.config.datasets[dataset].path, run.archives(dataset)
        if archives and run.unbuilt(dataset):
            whole = published(run.config.datasets[dataset].kind, run.config.sampling.upscale)
            shares = (PAIR,) if len(archives) == 1 else (1, PAIR - 1)  # the second one has the LQ frames
            for path, share in zip(archives, shares, strict=True):
                name, size = download(path)
                if not Path(path).exists():
                    missing[name] = size or round(pixels([whole] if whole else found) * share * PNG_BYTES_A_PIXEL)
        elif place is not None and not place.exists():
            missing[str(place)] = round(pixels(found) * PAIR * PNG_BYTES_A_PIXEL)
    return list(missing.items())


def download(path: str) -> tuple[str, int | None]:
    """What a file is called in the list of downloads, and its size in bytes where it is known: a listed asset, or one that somebody must bring."""
    from qvsr.data import assets

    for name, asset in assets.read().items():
        if asset.path.absolute() == Path(path).absolute():
            return name, asset.expected
    return path, None


def pixels(clips: Sequence[Clips]) -> int:
    """Of all restored frames of the clips."""
    return sum(one.count * one.frames * one.height * one.width * 16 for one in clips)


def disk(config: Config, run: Plan, nets: Networks, clips: Mapping[str, Sequence[Clips]], samples: float) -> dict[str, float]:
    """GB that a run writes, by kind; `samples` of whole tiles."""
    unet, tile = config.backbone.unet, config.sampling.tile**2
    a_sample = unet.num_frames * (unet.in_channels + unet.out_channels + config.backbone.vae.embed_dim) * tile * 4
    restored = sum(len(run.suffixes(method)) for method, _ in run.rows() if method != GROUND_TRUTH) * sum(
        pixels(clips[dataset]) for dataset in config.evaluate
    )
    converted = nets.params * (2 if config.official.precision == "half" else 4) if run.official() else 0
    return {
        **({"converted": converted / 1e9} if converted else {}),
        "clips": sum(pixels(found) for found in clips.values()) * PAIR * PNG_BYTES_A_PIXEL / 1e9,
        "calibration": samples * a_sample / 1e9,
        "quantized": sum(nets.file_bytes.values()) / 1e9,
        "restored": restored * PNG_BYTES_A_PIXEL / 1e9,
    }
