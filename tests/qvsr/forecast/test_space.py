from pathlib import Path
from types import SimpleNamespace

import pytest

from qvsr.data.published import write_manifest
from qvsr.forecast import space
from qvsr.forecast.clips import Clips
from qvsr.plan import DEFAULT, Plan, resolve
from qvsr.provenance import ROOT

PAPER = ROOT / "config" / "paper.yaml"
RAFT = ("raft-things", None)  # its size is stated nowhere


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder that the paths of a configuration begin at, with one for assets in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QVSR_ASSETS", str(tmp_path / "resources" / "assets"))
    (tmp_path / "resources" / "assets").mkdir(parents=True)
    return tmp_path


def downloads(file=PAPER, clips=None, **overrides):
    return space.downloads(Plan(resolve([file], overrides)), clips or {})


def test_what_the_metrics_read_is_listed_until_it_is_here(here):
    (here / "weights").symlink_to(ROOT / "weights")
    chosen = {"file": ROOT / DEFAULT, "metrics": ["psnr", "lpips"]}
    assert downloads(**chosen) == [("alexnet", 244_408_911)]
    (here / "resources" / "assets" / "alexnet-owt-7be5be79.pth").touch()
    assert downloads(**chosen) == []


def test_a_data_set_that_is_not_here_is_estimated(here):
    """PNG of video takes 1.6 bytes a pixel."""
    reds4 = {"reds4": [Clips(4, 100, 180, 320)]}
    assert dict(downloads(clips=reds4))["quantvsr-reds4"] == pytest.approx(400 * (1280 * 720 + 320 * 180) * 1.6)
    write_manifest(here / "resources" / "REDS4", {"format": 1, "clips": {clip: {} for clip in ("000", "011", "015", "020")}})
    assert "quantvsr-reds4" not in dict(downloads(clips=reds4))
    found = dict(downloads(clips={"reds30": [Clips(30, 5, 180, 320)]}))  # a whole archive, of which five frames a clip are read
    assert found["reds-val"] == pytest.approx(3000 * 1280 * 720 * 1.6)
    assert found["quantvsr-reds30"] == pytest.approx(3000 * 320 * 180 * 1.6)


def test_a_data_set_without_archives_is_listed_by_its_path(here):
    udm10 = {"datasets": {"udm10": {"archives": []}}}
    found = dict(downloads(clips={"udm10": [Clips(10, 32, 180, 318)]}, **udm10))
    assert found["resources/UDM10"] == pytest.approx(320 * (1272 * 720 + 318 * 180) * 1.6)
    (here / "resources" / "UDM10").mkdir()
    assert "resources/UDM10" not in dict(downloads(clips={"udm10": [Clips(10, 32, 180, 318)]}, **udm10))


def test_official_checkpoints_are_listed_until_what_is_made_of_them_is_here(here):
    """Never the converted files; sizes as the page rounds them."""
    official = [("mgldvsr-unet", 6_680_000_000), ("mgldvsr-vae", 803_000_000)]
    assert downloads(metrics=["psnr"]) == [RAFT, *official]
    unet, vae = here / "resources" / "mgldvsr-unet.safetensors", here / "resources" / "mgldvsr-video-vae.safetensors"
    unet.touch()
    assert downloads(metrics=["psnr"]) == [RAFT, *official], "one command makes both"
    vae.touch()
    assert downloads(metrics=["psnr"]) == [RAFT]


def test_weights_that_nobody_converts_are_listed_by_their_path(here):
    alone = {"official": {"weights": None, "vae_weights": None}, "metrics": ["psnr"]}
    assert downloads(**alone) == [
        ("resources/mgldvsr-unet.safetensors", None),
        ("resources/mgldvsr-video-vae.safetensors", None),
        RAFT,
    ]
    mine = {"official": {"weights": "mine/unet.ckpt", "vae_weights": "mgldvsr-vae"}, "metrics": ["psnr"]}
    assert downloads(**mine)[1:] == [("mine/unet.ckpt", None), ("mgldvsr-vae", 803_000_000)]


def test_a_file_that_two_settings_name_is_listed_once(here):
    """The flow network is that of the metric `ewarp` too."""
    names = [name for name, _ in downloads(metrics=["psnr", "ewarp"])]
    assert names.count("raft-things") == 1
    both = {"weights": "mine/all.ckpt", "vae_weights": "mine/all.ckpt"}
    assert [name for name, _ in downloads(metrics=["psnr"], official=both)] == ["raft-things", "mine/all.ckpt"]


def test_sizes_of_official_checkpoints_are_those_of_the_files_or_listed_or_guessed(here):
    run = Plan(resolve([PAPER], {"official": {"weights": "mine/unet.ckpt", "vae_weights": "mgldvsr-vae"}}))
    nets = SimpleNamespace(params=1_000)
    assert space.official_bytes(run, nets) == [4_000, 803_000_000]
    (here / "mine").mkdir()
    (here / "mine" / "unet.ckpt").write_bytes(bytes(123))
    assert space.official_bytes(run, nets) == [123, 803_000_000]
