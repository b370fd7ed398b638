"""A set of the paper is built by the run itself from the archives that its settings name, clip names and all; a built one is taken as it is."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from tests.qvsr.data.server import Fault, Server
from tests.workflow import tiny


def archive(file: Path, folder: Path) -> None:
    """SPMCS as its authors' copy has it: SPMCS/GT/CLIP and SPMCS/LQ/CLIP."""
    import cv2

    with zipfile.ZipFile(file, "w") as packed:
        for seed, clip in enumerate(("car", "tree")):
            tiny.write_frames(folder / clip, seed, size=128)
            for frame in sorted((folder / clip).iterdir()):
                small = cv2.resize(cv2.imread(str(frame)), (32, 32), interpolation=cv2.INTER_AREA)
                packed.write(frame, f"SPMCS/GT/{clip}/{frame.name}")
                packed.writestr(f"SPMCS/LQ/{clip}/{frame.name}", cv2.imencode(".png", small)[1].tobytes())


def test_from_archive_to_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served"
    served.mkdir()
    archive(served / "quantvsr-SPMCS.zip", tmp_path / "frames")
    project = tiny.make(tmp_path / "project")
    spmcs = {"kind": "spmcs", "path": "resources/SPMCS", "frames": 3, "limit": 1, "archives": ["quantvsr-spmcs"], "crop": [0, 0, 64, 64]}
    changed = {"datasets": {**tiny.CONFIG["datasets"], "spmcs": spmcs}, "evaluate": ["spmcs"], "methods": ["maxmin"], "ablation": {}}
    tiny.write_config(project / "config" / "tiny.yaml", {**tiny.CONFIG, **changed})
    monkeypatch.setenv("QVSR_ASSETS", str(project / "resources" / "assets"))
    assert {"asset_folder", "dataset", "calibrate"} <= tiny.due(project)
    walled = tiny.snakemake(project)
    assert walled.returncode != 0
    assert "quantvsr-SPMCS.zip has no address to fetch it from: get it by hand" in walled.stdout + walled.stderr
    with Server(served, {"quantvsr-SPMCS.zip": Fault(drop=0.3)}) as server:
        monkeypatch.setenv("QVSR_MIRROR", server.url)
        done = tiny.snakemake(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one.status for one in server.asked] == [200, 206]
    metrics = (project / "results" / "tables" / "metrics.csv").read_text()
    assert "tiny,spmcs,maxmin,W4A4" in metrics
    assert [clip.name for clip in (project / "results" / "restored" / "spmcs" / "maxmin-W4A4").iterdir()] == ["car"]
    shutil.rmtree(project / "resources" / "assets")
    assert tiny.due(project) == set() and tiny.due(project, "datasets") == {"datasets"}  # with nothing to build
    wanted = {**changed, "datasets": {**changed["datasets"], "spmcs": {**spmcs, "limit": 2}}}
    tiny.write_config(project / "config" / "tiny.yaml", {**tiny.CONFIG, **wanted})
    more = tiny.snakemake(project, "--dry-run")
    assert more.returncode != 0
    assert (
        "datasets.spmcs: the settings ask for more clips than were built, and results/measured/spmcs is of those"
        in more.stdout + more.stderr
    )
    assert {"asset_folder", "dataset"} <= tiny.due(project, "datasets")
