"""What is on this machine, which path each kind of layer takes on it, and why."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvsr import provenance
from qvsr.registry import suggest

REQUIREMENTS = ("packed", "cuda")
CPU_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm")
ENCODERS = ("libx264", "libvpx-vp9")


class DoctorError(ValueError):
    """Something is required of this machine that it does not have; the message says why."""


@dataclass(frozen=True)
class LayerPath:
    """How layers of one kind compute.

    Attributes:
        kind: Linear, Conv1d, Conv2d or Conv3d.
        execution: packed, simulated, or reference: packed without integer instructions, which is right and slow; on a GPU also fallback,
            packed without the kernels, and none.
        reason: one line.
    """

    kind: str
    execution: str
    reason: str


def layer_paths() -> list[LayerPath]:
    """The path of each kind of layer on this machine: the one place that asks the kernels, which have one answer for all kinds."""
    from qvsr.quant.layer import EXECUTIONS, KINDS

    if "packed" not in EXECUTIONS:
        found = ("simulated", "this version has no packed execution")
    elif reason := importlib.import_module("qvsr.kernels.cpu").missing():
        found = ("reference", reason)
    else:
        found = ("packed", importlib.import_module("qvsr.kernels.native").described())
    return [LayerPath(kind, *found) for kind in KINDS.values()]


def gpu_paths() -> list[LayerPath]:
    """The path of each kind of layer on the GPU: the kernels of csrc/, PyTorch's own operators, or none where there is no GPU."""
    from qvsr.quant.layer import KINDS

    gpu = importlib.import_module("qvsr.kernels.cuda")
    available, reason = _cuda()["available"], gpu.missing()
    if reason is None:
        found = ("packed", f"8-bit and 4-bit integer products on tensor cores, {gpu.described()}")
    elif available:
        found = ("fallback", f"torch._int_mm and float32 convolutions by PyTorch, more slowly: {reason}")
    else:
        found = ("none", reason)
    return [LayerPath(kind, *found) for kind in KINDS.values()]


def report(folder: Path = Path()) -> dict[str, Any]:
    """Everything that is looked at, as plain values.

    Args:
        folder: on whose disk results are going to lie.
    """
    import torch

    from qvsr.data import assets
    from qvsr.stages.upscale import DEFAULT_MODEL

    memory = _memory()
    return {
        "cpu": {
            "name": provenance.device(),
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "features": cpu_features(),
            "torch_uses": torch.backends.cpu.get_cpu_capability(),
        },
        "memory": memory,
        "disk": {"folder": str(folder.resolve()), "free_gb": round(shutil.disk_usage(folder).free / 1e9, 1)},
        "torch": {
            "version": torch.__version__,
            "onednn": torch.backends.mkldnn.is_available(),
            "int_mm": hasattr(torch, "_int_mm"),
        },
        "cuda": _cuda(),
        "video": _video(),
        "model": {"file": DEFAULT_MODEL.name, "here": DEFAULT_MODEL.is_file()},
        "assets": {name: assets.glance(one) for name, one in assets.read().items()},
        "layers": [asdict(path) for path in layer_paths()],
        "gpu_layers": [asdict(path) for path in gpu_paths()],
    }


def cpu_features() -> list[str]:
    """Those of :data:`CPU_FEATURES` that the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), [])
    return [name for name in CPU_FEATURES if name in flags]


def _memory() -> dict[str, float]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"total_gb": round(values["MemTotal"] * 1024 / 1e9, 1), "available_gb": round(values["MemAvailable"] * 1024 / 1e9, 1)}


def _cuda() -> dict[str, Any]:
    import torch

    if not torch.backends.cuda.is_built():
        return {"available": False, "reason": f"torch {torch.__version__} is built without CUDA"}
    if not torch.cuda.is_available():
        return {"available": False, "reason": "torch finds no GPU, or no driver for it"}
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    devices = [{"name": one.name, "capability": f"{one.major}.{one.minor}", "memory_gb": round(one.total_memory / 1e9, 1)} for one in found]
    return {"available": True, "version": torch.version.cuda, "devices": devices}


def _video() -> dict[str, Any]:
    try:
        import av
    except ImportError:
        return {"pyav": None, "encoders": []}
    return {"pyav": av.__version__, "encoders": [name for name in ENCODERS if name in av.codecs_available]}


def show(found: dict[str, Any]) -> str:
    """The report for people, a line for each thing and each kind of layer."""
    cpu, torch, cuda, video, assets = (found[key] for key in ("cpu", "torch", "cuda", "video", "assets"))
    memory = found["memory"]
    here = sum(state == "here" for state in assets.values())
    if cuda["available"]:
        gpus = "; ".join(f"{one['name']}, capability {one['capability']}, {one['memory_gb']} GB" for one in cuda["devices"])
        cuda_line = f"CUDA {cuda['version']}: {gpus}"
    else:
        cuda_line = f"no: {cuda['reason']}"
    lines = [
        ("processor", f"{cpu['name']} ({cpu['machine']}), {cpu['cores']} cores for this process"),
        ("features", f"{', '.join(cpu['features']) or 'none known'}; torch uses {cpu['torch_uses']}"),
        ("memory", f"{memory['available_gb']} of {memory['total_gb']} GB available" if memory else "not known on this system"),
        ("disk", f"{found['disk']['free_gb']} GB free in {found['disk']['folder']}"),
        (
            "torch",
            f"{torch['version']}, {'with' if torch['onednn'] else 'without'} oneDNN, {'with' if torch['int_mm'] else 'without'} _int_mm",
        ),
        ("GPU", cuda_line),
        (
            "video",
            f"PyAV {video['pyav']}, encoders {', '.join(video['encoders']) or 'none'}" if video["pyav"] else "no PyAV: pip install av",
        ),
        ("model", f"{found['model']['file']}: {'here' if found['model']['here'] else 'missing, upscale needs --model'}"),
        ("assets", f"{here} of {len(assets)} files from elsewhere are here (python -m qvsr assets status)"),
    ]
    width = max(len(name) for name, _ in lines)
    text = [f"{name:<{width}}  {value}" for name, value in lines]
    text += ["", "quantized layers:"]
    text += [f"{path['kind']:<{width}}  {path['execution']}: {path['reason']}" for path in found["layers"]]
    text += ["", "the same on a GPU:"]
    text += [f"{path['kind']:<{width}}  {path['execution']}: {path['reason']}" for path in found["gpu_layers"]]
    return "\n".join(text)


def require(found: dict[str, Any], wanted: Sequence[str]) -> None:
    """Refuse a machine that lacks what is wanted.

    Raises:
        DoctorError: what is missing, and why; or a requirement that is not known.
    """
    for name in wanted:
        if name not in REQUIREMENTS:
            raise DoctorError(f"--require: {suggest('requirement', name, REQUIREMENTS)}")
    if "packed" in wanted:
        for path in found["layers"]:
            if path["execution"] != "packed":
                raise DoctorError(f"packed is required, but {path['kind']} layers are {path['execution']} here: {path['reason']}")
    if "cuda" in wanted and not found["cuda"]["available"]:
        raise DoctorError(f"cuda is required, but there is none: {found['cuda']['reason']}")
