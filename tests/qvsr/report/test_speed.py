"""Tables of measured speed: means by hand, files there and back, what is refused, what the page and the README show."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qvsr.report import speed
from qvsr.report.speed import Speed
from qvsr.speed.timing import BenchError, Row

HEAD: dict[str, Any] = {
    "network": "mgld",
    "quick": False,
    "git": "abc",
    "cores": 2,
    "features": ["avx2", "amx_int8"],
    "reason": "integer products",
    "peaks": {"fp32_gops": 200.0, "bf16_gops": 1000.0, "int8_gops": 2000.0, "copy_gb_s": 30.5},
    "load": [0.25, 2.0],
    "minutes": 12.3,
}


def row(variant: str, seconds: float, **more: Any) -> Row:
    """A layer of 1e9 multiply-accumulates whose float32 takes 1 s."""
    values: dict[str, Any] = {
        "name": "a",
        "kind": "Conv2d",
        "shape": (4, 4, 3, 3),
        "bits": "W32A32" if variant.startswith("fp32") else "W16A16" if variant == "bf16" else "W4A4",
        "execution": variant.partition(" ")[0] if " W" in variant else "float",
        "backend": "torch",
        "seconds": seconds,
        "seconds_fp32": 1.0,
        "ratio_fp32": 1.0 / seconds,
        "error": None,
        "macs": 10**9,
        "variant": variant,
        "rank": 0,
        "input": (5, 4, 8, 8),
        "count": 1,
        "together": True,
        "rounds": 5,
        "seconds_q1": 0.9 * seconds,
        "seconds_q3": 1.1 * seconds,
        "ratio_bf16": 0.25 / seconds,
        "gops": 2 / seconds,
        "gb_s": None,
        "roofline": 0.5,
        "peak_mb": None,
        "resident_mb": None,
        "error_floor": None,
        "sqnr_db": None,
        "psnr_db": None,
        "psnr_fp_db": None,
        "path": "packed",
        "device": "Processor X",
        "threads": 2,
        "torch": "2.14",
    }
    return Row(**{**values, **more})


LAYERS = [
    row("fp32", 1.0, count=3),
    row("fp32 channels last", 2.0, count=3),
    row("packed W4A4", 0.25, count=3, error=2e-7, roofline=0.4, gb_s=12.5),
    row("fp32", 1.0, name="b", kind="Linear", shape=(4, 4), macs=5 * 10**8),
    row("packed W4A4", 2.0, name="b", kind="Linear", shape=(4, 4), macs=5 * 10**8, error=3e-6, roofline=0.1),
]
UNET = [
    row("fp32", 10.0, kind="unet", peak_mb=4000.0, resident_mb=3000.0, seconds_fp32=8.0, ratio_fp32=0.8, together=False),
    row("fp32 channels last", 8.0, kind="unet", peak_mb=5000.0, seconds_fp32=8.0, ratio_fp32=1.0),
    row("packed W4A4 r24", 2.0, kind="unet", peak_mb=1000.0, seconds_fp32=8.0, ratio_fp32=4.0, sqnr_db=40.04, error_floor=0.01),
]
CLIP = [
    row("fp32", 20.0, kind="clip", shape=(10, 3, 128, 96), seconds_fp32=20.0, ratio_fp32=1.0, name="walk"),
    row("packed W4A4", 5.0, kind="clip", shape=(10, 3, 128, 96), seconds_fp32=20.0, ratio_fp32=4.0, name="walk", psnr_db=38.44),
]
ROWS = {"layers": LAYERS, "unet": UNET, "clip": CLIP}


def write(folder: Path, kind: str, rows: list[Row] | None = None, **head: Any) -> Path:
    file = folder / f"{kind}.json"
    file.write_text(speed.rows_json(ROWS[kind] if rows is None else rows))
    (folder / f"{kind}.head.json").write_text(json.dumps({**HEAD, "kind": kind, **head}))
    return file


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path, kind) for kind in ("clip", "unet", "layers")]


def test_means_by_hand() -> None:
    """Three convolutions at 4x and one linear layer, half as large, at half the speed."""
    full, last, packed = speed.means(LAYERS)
    assert (full.variant, last.variant, packed.variant) == ("fp32", "fp32 channels last", "packed W4A4")
    assert (full.ratio, full.linear, full.conv, full.seconds, full.whole, full.error) == (1, 1, 1, 4, 1, None)  # log 1 is exact
    assert (last.linear, last.conv, last.seconds) == (None, pytest.approx(0.5), 6)
    assert packed.ratio == pytest.approx((4**3 * 0.5**0.5) ** (1 / 3.5))
    assert packed.bf16 == pytest.approx((1**3 * 0.125**0.5) ** (1 / 3.5))
    assert (packed.linear, packed.conv) == pytest.approx((0.5, 4)) and (packed.low, packed.high) == (0.5, 4)
    assert packed.seconds == 3 * 0.25 + 2 and packed.whole == pytest.approx(4 / 2.75) and packed.error == 3e-6
    assert packed.roofline == pytest.approx((0.4 * 0.75 + 0.1 * 2) / 2.75)
    assert speed.means([replace(one, ratio_bf16=None) for one in LAYERS])[2].bf16 is None


def test_rows_there_and_back(tmp_path: Path) -> None:
    head, rows = speed.read(write(tmp_path, "unet"))
    assert rows == UNET and head["kind"] == "unet"
    assert speed.read_csv(speed.rows_csv([*LAYERS, *UNET])) == [*LAYERS, *UNET]  # six digits hold these
    (first, *_) = csv.DictReader(io.StringIO(speed.rows_csv(LAYERS)))
    assert tuple(first) == speed.COLUMNS and (first["shape"], first["error"], first["seconds"], first["together"]) == (
        "4x4x3x3",
        "",
        "1",
        "True",
    )
    contract = ("name", "kind", "shape", "bits", "execution", "backend", "seconds", "seconds_fp32", "ratio_fp32", "error", "macs")
    assert speed.COLUMNS[: len(contract)] == contract
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        speed.rows_json([row("fp32", math.inf)])


def test_tables_there_and_back(files: list[Path], tmp_path: Path) -> None:
    measured = Speed.of_files(files)
    assert list(measured.rows) == ["layers", "unet", "clip"]
    measured.write(tmp_path / "tables")
    assert {file.name for file in (tmp_path / "tables").iterdir()} == {"speed.md", "layers.csv", "unet.csv", "clip.csv", "machine.json"}
    again = Speed.of_tables(tmp_path / "tables")
    assert again == measured and speed.page(again) == (tmp_path / "tables" / "speed.md").read_text()


def test_what_makes_no_tables(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="^speed tables need at least one file of `python -m qvsr bench`$"):
        Speed.of_files([])
    with pytest.raises(BenchError, match=r"^no file .*none.json; `python -m qvsr bench` writes both none.json and none.head.json$"):
        Speed.of_files([tmp_path / "none.json"])
    (tmp_path / "alone").mkdir()
    alone = write(tmp_path / "alone", "unet")
    alone.with_name("unet.head.json").unlink()
    with pytest.raises(BenchError, match=r"^no file .*unet.head.json; `python -m qvsr bench` writes both"):
        Speed.of_files([alone])
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", "unet")
    with pytest.raises(BenchError, match=r"other/unet.json is the second file of unet: give one of each kind$"):
        Speed.of_files([*files, other])
    elsewhere = write(tmp_path / "other", "layers", [replace(one, threads=1) for one in LAYERS])
    with pytest.raises(BenchError, match=r"layers.json: threads is 1, elsewhere 2: measure all on one machine, alike$"):
        Speed.of_files([files[0], elsewhere])
    old = [{key: value for key, value in one.items() if key != "gops"} for one in json.loads(files[1].read_text())]
    files[1].write_text(json.dumps(old))
    with pytest.raises(
        BenchError, match=r"unet.json was not written by this version of `python -m qvsr bench` \(gops is missing\): measure again$"
    ):
        Speed.of_files(files)
    files[1].write_text("[]")
    with pytest.raises(BenchError, match=r"unet.json holds no measurement: measure again$"):
        Speed.of_files(files)
    with pytest.raises(BenchError, match=r"other has no machine.json; `make bench` measures and writes one$"):
        Speed.of_tables(tmp_path / "other")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def lines_of(text: str, first: str) -> list[list[str]]:
    return [cells(line) for line in text.splitlines() if line.startswith("|") and cells(line)[0] == first]


def test_the_page(files: list[Path]) -> None:
    text = speed.page(Speed.of_files(files))
    assert "Machine: Processor X, 2 of its cores, 2 threads; avx2, amx_int8; torch 2.14; packed layers: packed (integer products)." in text
    assert (
        "- unet: commit abc, 12.3 minutes, load average 0.25 before and 2.00 after; peaks measured first: float32 200, bfloat16 1000, "
        "8-bit integers 2000 GOP/s, copying 30.5 GB/s" in text
    )
    assert "2 shapes, 4 layers, each by itself" in text
    mean, *_ = lines_of(text, "packed W4A4")
    assert mean == ["packed W4A4", "2.97×", "0.50×", "4.00×", "0.74×", "0.50×", "4.00×", "2.75", "1.45×", "18 %", "3.0e-06"]
    assert lines_of(text, "Conv2d 4×4×3×3") == [["Conv2d 4×4×3×3", "5×4×8×8", "3", "85.7 %", "1000.00", "2", "4.00×", "8", "12.5", "40 %"]]
    assert lines_of(text, "packed W4A4 r24") == [
        ["packed W4A4 r24", "2.00 (1.80 to 2.20)", "4.00×", "0.12×", "1", "50 %", "1,000 (25 %)", "–", "40.0 (40.0)"]
    ]
    in_unet, in_clip = lines_of(text, "fp32")[1:]
    assert in_unet[:3] == ["fp32", "10.00 (9.00 to 11.00) †", "0.80× †"] and in_unet[6:8] == ["4,000 (100 %)", "3,000"]
    assert in_clip == ["fp32", "2.000 (1.800 to 2.200)", "1.00×", "–", "–", "–", "–"]
    assert "## A whole clip: walk, 10 frames to 96×128, mgld" in text and "quick" not in text


def test_a_quick_look_is_marked(tmp_path: Path) -> None:
    text = speed.page(Speed.of_files([write(tmp_path, "clip", quick=True)]))
    assert "- clip (quick: not a result to quote): commit abc" in text and "## Layers" not in text


def test_what_the_readme_shows(files: list[Path]) -> None:
    text = speed.short(Speed.of_files(files), "there/speed.md")
    assert text.startswith("Machine: Processor X, 2 of its cores") and "](there/speed.md)" in text
    assert lines_of(text, "packed W4A4") == [
        ["packed W4A4", "2.97×", "0.50×", "4.00×", "1.45×"],
        ["packed W4A4", "4.00×", "0.500", "–"],
    ]
    assert lines_of(text, "packed W4A4 r24") == [["packed W4A4 r24", "4.00×", "2.00", "1,000 (25 %)"]]
    assert [line[1] for line in lines_of(text, "fp32")] == [
        "0.80×",
        "1.00×",
    ]  # of the layers it stands nowhere: it is what they are compared with
