"""Memory and time of `measure` by the number of frames: python benchmarks/measure_memory.py [width height]

Two clips of noise-like pictures in motion, lossless video (FFV1), 25 and 100 frames of 1280x720 by default, measured by psnr, ssim and
ewarp_dis in a process of its own each; its largest resident memory, and its time with what decoding and hashing alone take. Then the same
with values kept by content: filling the folder, and finding everything in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvsr.data.clips import PixelDigest, open_clip, read_source

ROOT = Path(__file__).resolve().parent.parent
METRICS = "psnr,ssim,ewarp_dis"


def write(path: Path, frames: int, width: int, height: int, noise: int) -> None:
    """A textured picture that moves by four pixels a frame."""
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(40, 216, (height // 8 + 1, (width + 4 * frames) // 8 + 1, 3)), np.ones((8, 8, 1), np.int64))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for t in range(frames):
            frame = picture[:height, 4 * t : 4 * t + width] + rng.integers(-noise, noise + 1, (height, width, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())


def measure(folder: Path, *more: str) -> tuple[float, float]:
    """Seconds, and gigabytes of the process at its largest."""
    line = [sys.executable, "-m", "qvsr", "measure", "--pred", "pred.mkv", "--gt", "gt.mkv", "--metrics", METRICS, "--out", "out.jsonl"]
    begun = time.perf_counter()
    process = subprocess.Popen([*line, *more], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("error: measure failed")
    return time.perf_counter() - begun, usage.ru_maxrss / 1024**2  # Linux counts in kB


def decode(folder: Path) -> float:
    """Seconds to decode and hash both clips."""
    begun = time.perf_counter()
    for name in ("pred.mkv", "gt.mkv"):
        source = open_clip(folder / name)
        for _ in read_source(source, PixelDigest(source.frames, source.size)):
            pass
    return time.perf_counter() - begun


def main(width: int, height: int) -> None:
    for frames in (25, 100):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder / "pred.mkv", frames, width, height, 6)
            write(folder / "gt.mkv", frames, width, height, 0)
            seconds, memory = measure(folder)
            print(
                f"{frames} frames of {width}x{height}: {memory:.2f} GB, {seconds:.0f} s; decoding and hashing alone {decode(folder):.1f} s"
            )
            for what in ("filling the cache", "finding everything in it"):
                seconds, memory = measure(folder, "--cache", "cache")
                print(f"  {what}: {memory:.2f} GB, {seconds:.0f} s")


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:3]) if len(sys.argv) > 2 else (1280, 720))
