"""The metrics of the program vsreval, with another program in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from metrics import _vsreval
from metrics._frames import MetricError
from metrics.dover import dover
from metrics.fastervqa import fastervqa
from qvsr import protocols
from qvsr.data.assets import MissingError
from qvsr.registry import METRICS

PROGRAM = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("command")
for name in ("--pred", "--metrics", "--out", "--device"):
    parser.add_argument(name, required=True)
asked = parser.parse_args()
pathlib.Path({record!r}).write_text(json.dumps({{
    "arguments": vars(asked), "weights": sorted(os.listdir(os.environ["VSREVAL_WEIGHTS"])),
    "clips": {{one.name: sorted(os.listdir(one)) if one.is_dir() else one.read_bytes().decode() for one in pathlib.Path(asked.pred).iterdir()}},
}}))
result = {result!r}
if result is None:
    sys.exit("some lines\\nvsreval: cannot read the video stream")
out = pathlib.Path(asked.out)
out.mkdir()
(out / "results.json").write_text(result)
"""


def results(metric: str = "dover", value: float = 0.625, version: str = "0.1.0", protocol: str = "vsreval-v1") -> str:
    return json.dumps({"protocol": protocol, "versions": {"vsreval": version}, "per_sample": {"clip": {metric: value}}})


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: str | None) -> Path:
    """A program `vsreval` on the PATH, and where it writes what it was asked."""
    folder, record = tmp_path / "bin", tmp_path / "asked.json"
    folder.mkdir(exist_ok=True)
    program = folder / "vsreval"
    program.write_text(f"#!{sys.executable}\n" + PROGRAM.format(record=str(record), result=result))
    program.chmod(0o755)
    monkeypatch.delenv("QVSR_VSREVAL", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    return record


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    folder = tmp_path / "bikes"
    folder.mkdir()
    for t in range(2):
        cv2.imwrite(str(folder / f"{t:08d}.png"), np.full((8, 8, 3), t, np.uint8))
    (folder / "clip.json").write_text("{}")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Path]:
    files = {"dover": tmp_path / "DOVER.pth", "fastervqa": tmp_path / "FAST_VQA_3D_1_1.pth"}
    for file in files.values():
        file.write_bytes(b"weights")
    return files


def test_the_program_gets_the_clip_and_the_weights(
    tmp_path: Path, clip: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = install(tmp_path, monkeypatch, results())
    assert dover(clip, weights={"dover": weights["dover"]}) == 0.625
    asked = json.loads(record.read_text())
    assert asked["arguments"]["command"] == "eval" and asked["arguments"]["metrics"] == "dover" and asked["arguments"]["device"] == "cpu"
    assert asked["weights"] == ["DOVER.pth"]
    assert asked["clips"] == {"clip": ["00000000.png", "00000001.png", "clip.json"]}
    assert not Path(asked["arguments"]["pred"]).exists()  # the temporary folder is gone
    install(tmp_path, monkeypatch, results("fastervqa", 0.25))
    assert fastervqa(clip, weights={"fastervqa": weights["fastervqa"]}) == 0.25
    assert json.loads(record.read_text())["weights"] == ["FAST_VQA_3D_1_1.pth"]


def test_a_video_keeps_its_suffix(tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    record = install(tmp_path, monkeypatch, results())
    video = tmp_path / "bikes.mp4"
    video.write_text("frames")
    dover(video, weights={"dover": weights["dover"]})
    assert json.loads(record.read_text())["clips"] == {"clip.mp4": "frames"}
    with pytest.raises(MetricError, match=r"dover: bikes.y4m is no video that vsreval reads \(.mp4 .mkv .avi .mov\); give it frames"):
        (tmp_path / "bikes.y4m").write_text("frames")
        dover(tmp_path / "bikes.y4m", weights={"dover": weights["dover"]})


def test_the_command_may_be_a_longer_one(tmp_path: Path, clip: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, results())
    monkeypatch.setenv("QVSR_VSREVAL", f"{sys.executable} -I '{tmp_path / 'bin' / 'vsreval'}'")
    assert dover(clip, weights={"dover": weights["dover"]}) == 0.625


def test_no_program_is_missing_not_wrong(clip: Path, weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVSR_VSREVAL", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        MissingError, match="the program 'vsreval' is not there; vsreval 0.1.0 needs an environment of its own: `conda env create"
    ):
        dover(clip, weights=weights)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"dover: \S*vsreval failed with exit code 1: vsreval: cannot read the video stream"),
        (
            results(version="0.2.0"),
            r"dover: computed by vsreval 0.2.0 \(vsreval-v1\), 0.1.0 \(vsreval-v1\) is needed: install that version",
        ),
        (results(protocol="vsreval-v2"), r"dover: computed by vsreval 0.1.0 \(vsreval-v2\)"),
        (results(metric="fastervqa"), r"dover: the results of vsreval are not as those of 0.1.0: KeyError\('dover'\)"),
        ("{", "dover: the results of vsreval are not as those of 0.1.0"),
        (results(value=float("nan")), "dover: vsreval gives nan; such a clip has no value"),
    ],
)
def test_a_failed_run_is_an_error(
    result: str | None, message: str, tmp_path: Path, clip: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, result)
    with pytest.raises(MetricError, match=message):
        dover(clip, weights=weights)


def test_a_protocol_that_the_program_does_not_have(clip: Path, weights: dict[str, Path]) -> None:
    with pytest.raises(MetricError, match="dover: vsreval 0.1.0 has protocol vsreval-v1 and seed 0, not vsreval-v1 and 7"):
        dover(clip, seed=7, weights=weights)


@pytest.mark.parametrize("name", ["strict-v1", "paper-v1"])
@pytest.mark.parametrize("metric", ["dover", "fastervqa"])
def test_protocols_name_the_program_that_is_called(name: str, metric: str) -> None:
    import metrics  # noqa: F401 (fills the registry)

    protocol = protocols.read(name)
    assert protocol.metrics[metric].implementation == f"{_vsreval.PACKAGE}=={_vsreval.VERSION}"
    assert protocol.options(METRICS[metric]) == {"protocol": _vsreval.PROTOCOL, "seed": _vsreval.SEED}
    protocol.check_installed(metric)  # not installed here, and need not be
