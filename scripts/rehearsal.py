"""The paper's setting on synthetic files: python scripts/rehearsal.py [folder]

Everything that a group with the real files does runs here at full size, without them: `config/paper.yaml`, from downloads to tables, on the CPU.

- A server on this machine has archives of the data sets' form (every clip, synthetic frames of the published size, only the first few), and the
  diffusion model's checkpoints under the official key names with random weights, in float16. It drops every connection once.
- One archive is imported by hand, as those behind a login are.
- The cut: one clip a data set, 5 frames, 2 sampling steps, 128x128 pixels out of each frame, two calibration samples, W4A4, one round of each
  method's training and searches (SVDQuant's search for smoothing factors, 39 decompositions of every weight, is off). Networks and layers are
  of full size. What cannot be had (trained weights of metrics) is n/a in the tables.

Numbers in these tables mean nothing. What is checked: that the run ends, that the tables have every row, that counted costs are the model's.
Time and memory by stage are printed; memory is the proportional set size of all processes of the run, sampled every second.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvsr import config as settings
from qvsr.data.published import PUBLISHED
from qvsr.models.convert import official_keys, random_checkpoint, vae_keys
from qvsr.provenance import ROOT, atomic_path
from tests.qvsr.data.server import Fault, Server

FRAMES = 5
CROP = (296, 576, 128, 128)
DISK_GB = 25
# archive: set, and what is in it: a folder's name with {part} and {clip}, and which parts
ARCHIVES = {
    "quantvsr-REDS4.zip": ("reds4", "REDS4/{part}/{clip}", ("GT", "LQ")),
    "quantvsr-SPMCS.zip": ("spmcs", "SPMCS/{part}/{clip}", ("GT", "LQ")),
    "quantvsr-MVSR4x.zip": ("mvsr4x", "MVSR4x/{part}/{clip}", ("GT", "LQ")),
    "val_sharp.zip": ("reds30", "val/val_sharp/{clip}", ("GT",)),
    "quantvsr-REDS30.zip": ("reds30", "REDS30/{part}/{clip}", ("LQ",)),
}
BY_HAND = "quantvsr-MVSR4x.zip"
CUT: dict[str, Any] = {
    "output": "results/paper",
    "device": "cpu",
    "backbone": {"flow_weights": "resources/raft-random.pth"},
    "sampling": {"steps": 2},
    "datasets": {name: {"limit": 1, "frames": FRAMES, "crop": list(CROP)} for name in ("reds4", "spmcs", "mvsr4x", "reds30")},
    "calibration": {"steps": 2, "samples": 2},
    "bits": ["W4A4"],
    "method": {
        "q_diffusion": {"range_samples": 1, "range_values": 4096, "samples": 1, "batch": 1, "round_updates": 1, "step_updates": 1},
        "svdquant": {"samples": 1, "smooth": False, "iterations": 1},
        "quantvsr": {"refine_updates": 1, "lba_updates": 1, "accumulate": 1},
    },
    "official": {"precision": "single"},  # mapped by all jobs, in memory once
    # so much that 20 GB hold one of them at a time, with the mapped weights: a restoring job takes up to 9 GB beside these, a quantizing one 10
    "jobs": {"calibrate": {"mem_mb": 11000}, "quantize": {"mem_mb": 14000}, "restore": {"mem_mb": 11000}},
}


def main() -> None:
    if len(sys.argv) > 2 or (len(sys.argv) == 2 and sys.argv[1].startswith("-")):
        sys.exit("usage: python scripts/rehearsal.py [folder]")
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else ROOT / "results" / "rehearsal").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < DISK_GB and not (folder / "results").exists():
        sys.exit(f"error: {folder} has {free:.0f} GB of free disk, {DISK_GB} are needed; name a folder on another disk")
    begun = time.monotonic()
    served = prepare(folder)
    said(begun, f"archives and checkpoints of {sum(file.stat().st_size for file in served.iterdir()) / 1e9:.1f} GB are ready to be served")
    with Server(served, {file.name: Fault(drop=0.3) for file in served.iterdir()}) as server, Watch() as watch:
        environment = {**os.environ, "QVSR_ASSETS": str(folder / "resources" / "assets"), "QVSR_MIRROR": server.url}
        run([sys.executable, "-m", "qvsr", "assets", "import", "--from", str(folder / "by-hand")], folder, environment)
        said(begun, f"{BY_HAND} is imported")
        run(snakemake(folder, "results/paper/tables", "results/paper/figures"), ROOT, environment)
        resumed = {one.path for one in server.asked if one.status == 206}
        broken = {one.path for one in server.asked} - resumed
    said(begun, "the tables are there")
    print(watch.table())
    found = (folder / "results" / "paper" / "tables" / "metrics.md").read_text()
    print(f"\n{found}\nThese numbers mean nothing: weights are random, frames synthetic.")
    faults = check(folder) + [f"{path} was not resumed after its connection was dropped" for path in sorted(broken)]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    took = time.monotonic() - begun
    print(
        f"{took / 60:.0f} minutes, {watch.peak / 1e9:.1f} GB of memory at the most ({watch.at_peak}), {disk(folder) / 1e9:.0f} GB of disk"
    )
    sys.exit(bool(faults))


def said(begun: float, text: str) -> None:
    print(f"{(time.monotonic() - begun) / 60:5.1f} min  {text}", flush=True)


def run(command: list[str], place: Path, environment: dict[str, str]) -> None:
    path = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    code = subprocess.run(command, cwd=place, env={**environment, "PYTHONPATH": path}).returncode
    if code:
        sys.exit(f"error: {' '.join(command[:6])} … ended with {code}; the same command goes on where it stopped")


def snakemake(folder: Path, *targets: str) -> list[str]:
    """The run, with cores and memory as the Makefile hands them on; targets come first, since options take all words that follow."""
    files = [str(ROOT / "config" / "paper.yaml"), str(folder / "cut.yaml")]
    limits = ["--cores", os.environ.get("CORES", str(os.cpu_count())), "--resources", f"mem_mb={os.environ.get('MEMORY_MB', '20000')}"]
    return [sys.executable, "-m", "snakemake", *targets, "--directory", str(folder), "--configfile", *files, *limits, "--quiet", "rules"]


# --- what the world would have ----------------------------------------------------------------------------------------


def prepare(folder: Path) -> Path:
    """The served files, what is brought by hand, and the cut settings; what is there from an earlier call stays."""
    served, by_hand = folder / "served", folder / "by-hand"
    for place in (served, by_hand, folder / "resources"):
        place.mkdir(exist_ok=True)
    with atomic_path(folder / "cut.yaml") as partial:
        partial.write_text(yaml.safe_dump(CUT))
    backbone = settings.BackboneSettings()
    for name, keys in (("mgldvsr_unet.ckpt", official_keys(backbone)), ("video_vae_cfw.ckpt", vae_keys(backbone))):
        if not (served / name).exists():
            random_checkpoint(served / name, keys)
    for name, (kind, place, parts) in ARCHIVES.items():
        file = (by_hand if name == BY_HAND else served) / name
        if not file.exists():
            with atomic_path(file) as partial:
                archive(partial, kind, place, parts)
    flow = folder / "resources" / "raft-random.pth"
    if not flow.exists():
        from torchvision.models.optical_flow import raft_large

        torch.manual_seed(0)
        with atomic_path(flow) as partial:
            torch.save(raft_large(weights=None).state_dict(), partial)
    return served


def archive(file: Path, kind: str, place: str, parts: tuple[str, ...]) -> None:
    """A zip with every clip of a set; PNG is compressed already."""
    published = PUBLISHED[kind]
    width, height = published.size or (1280, 720)
    names = published.clips or tuple(f"clip_{index:02d}" for index in range(published.count))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        for seed, name in enumerate(names):
            for index, frame in enumerate(frames(seed, width, height)):
                small = cv2.resize(frame, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
                low = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC) if published.lq_at_gt_size else small
                for part, picture in (("GT", frame), ("LQ", low)):
                    if part in parts:
                        packed.writestr(f"{place.format(part=part, clip=name)}/{index:08d}.png", cv2.imencode(".png", picture)[1].tobytes())


def frames(seed: int, width: int, height: int) -> list[np.ndarray]:
    """A smooth random picture that moves by two pixels a frame."""
    noise = np.random.default_rng(seed).uniform(0, 255, (height // 12, width // 12, 3)).astype(np.float32)
    picture = cv2.resize(noise, (width + 2 * FRAMES, height), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    return [np.ascontiguousarray(picture[:, 2 * frame : 2 * frame + width]) for frame in range(FRAMES)]


# --- what is looked at ------------------------------------------------------------------------------------------------


class Watch:
    """Memory of this process and of all below it, and the time of each stage's commands, as long as the block runs."""

    def __init__(self) -> None:
        self.peak, self.at_peak = 0, ""
        self.seen: dict[int, tuple[str, float, float]] = {}  # process: stage, first and last seen
        self.memory: dict[int, int] = defaultdict(int)
        self._end = threading.Event()

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._end.wait(1):
            whole, running = 0, []
            for process in [me, *me.children(recursive=True)]:
                try:
                    size, line = process.memory_full_info().pss, process.cmdline()
                except psutil.Error:  # it has ended
                    continue
                whole += size
                if line[1:3] == ["-m", "qvsr"]:
                    running.append(f"{line[3]} {size / 1e9:.1f}")
                    now = time.monotonic()
                    self.seen[process.pid] = (line[3], self.seen.get(process.pid, ("", now, now))[1], now)
                    self.memory[process.pid] = max(self.memory[process.pid], size)
            if whole > self.peak:
                self.peak, self.at_peak = whole, ", ".join(running)

    def table(self) -> str:
        """Jobs, minutes and gigabytes by stage."""
        from qvsr.report.tables import markdown_table

        rows = [["stage", "jobs", "all jobs", "longest", "memory of one"]]
        for stage in dict.fromkeys(one[0] for one in self.seen.values()):
            took = [(last - first) / 60 for name, first, last in self.seen.values() if name == stage]
            memory = max(self.memory[process] for process, one in self.seen.items() if one[0] == stage) / 1e9
            rows.append([stage, str(len(took)), f"{sum(took):.1f} min", f"{max(took):.1f} min", f"{memory:.1f} GB"])
        return "\n".join(markdown_table([rows], 1))


def check(folder: Path) -> list[str]:
    """What is not as it should be."""
    tables, faults = folder / "results" / "paper" / "tables", []
    paper = settings.load(ROOT / "config" / "paper.yaml", CUT)
    with (tables / "metrics.csv").open() as file:
        measured = {
            (row["dataset"], row["method"], row["bits"]) for row in csv.DictReader(file) if row["metric"] == "psnr_fp" and row["value"]
        }
    expected = {(dataset, method, bits) for dataset in paper.evaluate for method in paper.methods for bits in paper.bits}
    faults += [f"metrics.csv has no psnr_fp of {' '.join(row)}" for row in sorted(expected - measured)]
    with (tables / "cost.csv").open() as file:
        full = next(row for row in csv.DictReader(file) if row["method"] == "full_precision")
    if round(float(full["params_m"]), 3) != 935.321:
        faults.append(f"cost.csv: full precision has {full['params_m']} million parameters, the published model has 935.321")
    half = [file for file in (folder / "resources").rglob("*") if ".partial" in file.name or file.name.startswith(".fetch-")]
    faults += [f"{file} is left over" for file in half]
    return faults


def disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


if __name__ == "__main__":
    main()
