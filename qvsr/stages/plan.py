"""What a run will take, before anything runs: jobs, downloads, disk, memory, hours by method.

Everything follows from the settings: the networks are built on the meta device, without weights, and counted; clips that are not here yet have the
published numbers and sizes of their set. Hours are counted multiply-accumulates over a stated throughput, to which belongs what only a measurement
can tell: how much longer simulated rounding takes than its multiply-accumulates (:mod:`qvsr.forecast.assumed`). They are good to a factor of two,
which is what one needs to choose a machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qvsr.config import Config
from qvsr.forecast import assumed, space, work
from qvsr.forecast.assumed import DEVICES, Device
from qvsr.forecast.clips import Clips, PlanError, dataset_clips
from qvsr.plan import BICUBIC, GROUND_TRUTH, UNQUANTIZED, Plan
from qvsr.registry import suggest


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
        device: a name of :data:`qvsr.forecast.assumed.DEVICES`; None: the CPU, or for `device: cuda` the paper's own RTX A6000.
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
    clips = {dataset: dataset_clips(config, dataset, given) for dataset in (*config.evaluate, config.calibration.dataset)}
    nets = work.networks(config)
    start = (assumed.START_SECONDS + nets.params * 4 / 1e9 / assumed.READ_GB_S) / 3600
    samples = work.recorded_samples(config, clips[config.calibration.dataset])
    share = work.tile_share(config, clips[config.calibration.dataset])
    read = [one for found in clips.values() for one in found]
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
            unet = assumed.SIMULATED * nets.quantized[method, bits].at(1) / nets.unet.at(1)
        of_clips = [
            (start + (0 if method == BICUBIC else work.clip_gmacs(config, nets, unet, one) / rate), one.count * seeds) for one in evaluated
        ]
        restores += of_clips
        took: float | None = None
        if method not in UNQUANTIZED:
            took = work.quantize_hours(config, nets, method, bits, samples, share, rate, start)
            (unknown if took is None else quantizes).append((took or 0.0, 1))
            if took is None:
                remarks.append(f"{method} {bits}: how long it quantizes is not known")
        if method != BICUBIC:
            rows.append(Row(method, bits, took, sum(hours * count for hours, count in of_clips)))
    recording = sum(one.count * work.clip_gmacs(config, nets, 1.0, one) for one in clips[config.calibration.dataset]) / rate + start
    official = space.official_bytes(run, nets)
    building = [found for dataset, found in clips.items() if run.unbuilt(dataset)]
    jobs = {
        **({"convert": [(work.convert_hours(official), 1)]} if official else {}),  # no rule where nothing is to be converted
        **({"dataset": [(sum(work.clip_hours(one, start) * one.count for one in found), 1) for found in building]} if building else {}),
        "clips": [(work.clip_hours(one, start), one.count) for one in read],
        "calibrate": [(recording, 1)] if run.quantized() else [],
        "quantize": quantizes + unknown,
        "restore": restores,
        "measure": [(work.measure_hours(config, clips[dataset], start), rows_of) for dataset, rows_of in _measured(run).items()],
        "tables": [(work.tables_hours(nets, start), 1)],
        "figures": [(start, 1)],
    }
    memory, gpu_memory = space.memory_by_rule(config, nets, read, official)
    stages = []
    for rule, hours in jobs.items():
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
    return Planned(
        device=f"{DEVICES[name].title}, {rate / 3600:,.0f} G multiply-accumulates a second ({'given' if gmacs else DEVICES[name].source})",
        clips=clips,
        unet_calls={dataset: work.calls(config, found) for dataset, found in clips.items()},
        samples=samples,
        stages=stages,
        rows=rows,
        downloads=space.downloads(run, clips),
        disk_gb=space.disk(config, run, nets, clips, samples * share),
        remarks=[*remarks, *_too_much(stages, DEVICES[name])],
    )


def _too_much(stages: Sequence[Stage], device: Device) -> Iterator[str]:
    """Where jobs are expected to take more than they ask for, or than the device has."""
    for stage in stages:
        if stage.jobs and stage.memory_gb > stage.asked_gb:
            yield f"{stage.rule}: expected to take {stage.memory_gb:.1f} GB, jobs.{stage.rule}.mem_mb asks for {stage.asked_gb:.1f}"
        if stage.jobs and (stage.longest or 0) > stage.asked_hours:
            yield f"{stage.rule}: its longest job takes {stage.longest:.1f} h, jobs.{stage.rule}.runtime ends it after {stage.asked_hours:.1f}"
        if stage.gpu_memory_gb and (device.memory_gb or 0) < stage.gpu_memory_gb:
            yield f"{stage.rule}: expected to take {stage.gpu_memory_gb:.0f} GB of GPU memory, a {device.title} has {device.memory_gb:.0f}"


def _measured(run: Plan) -> dict[str, int]:
    """Jobs of the rule measure by data set: one a row and noise seed."""
    files = [Path(file).parent.name for file in run.measured()]
    return {dataset: files.count(dataset) for dataset in run.config.evaluate}


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
