"""What a forecast assumes: devices, and what was measured once and is taken to hold elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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

# Time of a quantized call over that of its multiply-accumulates: rounding, ranges, unpacking; measured with the small model.
SIMULATED = 2.5
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
