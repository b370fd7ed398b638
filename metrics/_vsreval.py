"""Video metrics of the program vsreval, which needs an environment of its own: its pins clash with ours."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from metrics._frames import MetricError
from qvsr.config import VsrevalSettings
from qvsr.data.assets import MissingError

PACKAGE, VERSION = "vsreval", "0.1.0"
PROTOCOL = "vsreval-v1"  # the program's name of how it prepares clips
SEED = 0  # of the crops, fixed in the program
VIDEOS = (".mp4", ".mkv", ".avi", ".mov")


def command() -> list[str]:
    """How the program is called: the setting vsreval.command, handed on by a variable, or else `vsreval` on the PATH.

    Raises:
        MissingError: it is not installed.
    """
    words = shlex.split(os.environ.get(VsrevalSettings.VARIABLE) or PACKAGE)
    if shutil.which(words[0]) is None:
        raise MissingError(
            f"the program {words[0]!r} is not there; {PACKAGE} {VERSION} needs an environment of its own: "
            f"`conda env create -f workflow/envs/vsreval.yaml`, or set vsreval.command to `uvx --from {PACKAGE}=={VERSION} {PACKAGE}`"
        )
    return words


def score(metric: str, pred: Path, weights: Mapping[str, Path], protocol: str, seed: int) -> float:
    """The program's value of one clip.

    Args:
        metric: as the program names it.
        pred: folder of PNG frames, or a video file.
        weights: the one file that the metric reads, under the name by which the program looks for it.
        protocol, seed: what the caller's protocol promises; the program has one of each.
    Raises:
        MissingError: no such program.
        MetricError: it failed, it is another version, it works by another protocol, or its value is none.
    """
    if protocol != PROTOCOL or seed != SEED:
        raise MetricError(f"{metric}: {PACKAGE} {VERSION} has protocol {PROTOCOL} and seed {SEED}, not {protocol} and {seed}")
    if pred.is_file() and pred.suffix.lower() not in VIDEOS:
        raise MetricError(f"{metric}: {pred.name} is no video that {PACKAGE} reads ({' '.join(VIDEOS)}); give it frames")
    called = command()
    with tempfile.TemporaryDirectory(prefix="qvsr-vsreval-") as scratch:
        clips, files, out = (Path(scratch) / name for name in ("clips", "weights", "out"))
        clips.mkdir()
        files.mkdir()
        (clips / f"clip{pred.suffix if pred.is_file() else ''}").symlink_to(pred.resolve())
        for path in weights.values():  # found there, nothing is downloaded
            (files / path.name).symlink_to(path.resolve())
        done = subprocess.run(
            [*called, "eval", "--pred", str(clips), "--metrics", metric, "--out", str(out), "--device", "cpu"],
            env={**os.environ, "VSREVAL_WEIGHTS": str(files)},
            capture_output=True,
            text=True,
        )
        result = out / "results.json"
        if done.returncode or not result.is_file():
            last = next((line for line in reversed((done.stderr or done.stdout).splitlines()) if line.strip()), "no output")
            raise MetricError(f"{metric}: {shlex.join(called)} failed with exit code {done.returncode}: {last.strip()}")
        return _value(metric, result)


def _value(metric: str, result: Path) -> float:
    try:
        data = json.loads(result.read_text())
        version, protocol, value = data["versions"][PACKAGE], data["protocol"], float(data["per_sample"]["clip"][metric])
    except (ValueError, KeyError, TypeError) as error:
        raise MetricError(f"{metric}: the results of {PACKAGE} are not as those of {VERSION}: {error!r}") from None
    if version != VERSION or protocol != PROTOCOL:
        raise MetricError(f"{metric}: computed by {PACKAGE} {version} ({protocol}), {VERSION} ({PROTOCOL}) is needed: install that version")
    if not math.isfinite(value):
        raise MetricError(f"{metric}: {PACKAGE} gives {value}; such a clip has no value")
    return value
