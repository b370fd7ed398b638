"""Time and memory of loading and converting a model of full size: python benchmarks/load.py [folder]

Random weights under the official key names, in float16 and in float32, are written to a temporary folder (11 GB at most, removed
afterwards). Each is read in a process of its own, the file's pages dropped from memory before: the U-Net alone, then all networks with the
digest of both files. The peak of resident memory beyond what the imports took stands beside the size of the networks in float32. Then a
``.ckpt``, text tower and all, is converted; to write one takes as much memory as it has bytes.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvsr.config import BackboneSettings
from qvsr.models import checkpoints
from qvsr.models.convert import CONTEXT, TEXT, convert, official_keys, random_checkpoint, vae_keys

LOADED = ("model.", "structcond_stage_model.", "first_stage_model.encoder.", "first_stage_model.quant_conv.")


def settings(folder: Path) -> BackboneSettings:
    return BackboneSettings(weights=folder / "unet.safetensors", vae_weights=folder / "vae.safetensors")


def drop(*files: Path) -> None:
    """Let the next read come from the disk."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(kind: str) -> float:
    """Gigabytes of this process now: VmRSS with what is mapped, RssAnon without."""
    return int(re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) / 1e6  # type: ignore[index]


def child(what: str, folder: Path) -> None:
    """Load or convert, and print what it took."""
    chosen, anonymous, done = settings(folder), [0.0], threading.Event()
    before = resident("VmRSS")

    def watch() -> None:
        while not done.wait(0.02):
            anonymous[0] = max(anonymous[0], resident("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    begun, worked, size = time.perf_counter(), time.process_time(), 0
    if what == "convert":
        convert(chosen, folder / "unet.ckpt", folder / "vae.ckpt", say=lambda line: print(line, file=sys.stderr))
    elif what == "unet":
        with torch.device("meta"):
            networks = [checkpoints.build(chosen).unet]
        checkpoints.WeightFile(chosen.weights, "weights").fill(networks[0], checkpoints.UNET)
    else:
        backbone = checkpoints.load_backbone(chosen)
        networks = [backbone.unet, backbone.structure, backbone.first_stage, backbone.vae]
    seconds, worked = time.perf_counter() - begun, time.process_time() - worked
    done.set()
    thread.join()
    if what != "convert":
        size = sum(value.numel() * 4 for network in networks for value in network.state_dict().values()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 - before
    print(json.dumps({"seconds": seconds, "worked": worked, "peak": peak, "anonymous": anonymous[0], "size": size}))


def measure(what: str, folder: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, what, str(folder)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {what} failed: {done.stderr[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(parent: str | None) -> None:
    full = BackboneSettings()
    for name, dtype in (("float16", torch.float16), ("float32", torch.float32)):
        with tempfile.TemporaryDirectory(dir=parent) as temporary:
            folder = Path(temporary)
            shapes = {key: shape for key, shape in official_keys(full).items() if key.startswith(LOADED)}
            shapes[CONTEXT] = (1, full.context_tokens, full.unet.context_dim)
            random_checkpoint(folder / "unet.safetensors", shapes, dtype)
            random_checkpoint(folder / "vae.safetensors", vae_keys(full), dtype)
            for what in ("unet", "all"):
                drop(folder / "unet.safetensors", folder / "vae.safetensors")
                found = measure(what, folder)
                print(
                    f"{name}, {what}: {found['seconds']:.1f} s ({found['worked']:.1f} s of a core), {found['peak']:.2f} GB at the peak, "
                    f"{found['peak'] / found['size']:.2f} times its {found['size']:.2f} GB; {found['anonymous']:.2f} GB not mapped",
                    flush=True,
                )
        with tempfile.TemporaryDirectory(dir=parent) as temporary:
            folder = Path(temporary)
            shapes = official_keys(full)
            random_checkpoint(folder / "unet.ckpt", shapes, dtype)
            random_checkpoint(folder / "vae.ckpt", vae_keys(full), dtype)
            source = (folder / "unet.ckpt").stat().st_size / 1e9
            drop(folder / "unet.ckpt", folder / "vae.ckpt")
            found = measure("convert", folder)
            tower = sum(torch.Size(shape).numel() for key, shape in shapes.items() if key.startswith(TEXT)) * 4 / 1e9
            print(
                f"{name}, convert: {found['seconds']:.1f} s ({found['worked']:.1f} s of a core) from a file of {source:.2f} GB, "
                f"{found['peak']:.2f} GB at the peak, {found['anonymous']:.2f} GB not mapped (the text tower in float32 is {tower:.2f} GB)",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        child(sys.argv[1], Path(sys.argv[2]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
