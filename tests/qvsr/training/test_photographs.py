"""Collecting photographs: from a package that the test builds itself and an apt that only knows it, and from a folder."""

import csv
import hashlib
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from qvsr.training import photographs
from qvsr.training.photographs import PACKAGES, PhotographError, Source, collect, collect_folder, read_table, reduce_photograph

FREE = ("CC0", "CC-BY", "GPL", "LGPL", "GFDL", "MIT", "public domain")


def test_every_known_photograph_has_author_and_free_licence():
    for name, source in PACKAGES.items():
        assert source.files, name
        assert source.release in ("bullseye", "bookworm", "trixie", "sid")
        for file, (author, licence) in source.files.items():
            assert author, file
            assert licence.startswith(FREE), f"{name} {file}: {licence}"
            assert file.endswith((".jpg", ".png"))


def test_no_two_photographs_get_one_name():
    names = [f"{name}-{photographs._slug(file)}" for name, source in PACKAGES.items() for file in source.files]
    assert len(names) == len(set(names)) >= 85


def test_reduction_to_900_is_close_to_the_original_reduced(tmp_path):
    big = Image.fromarray(np.tile(data.astronaut(), (4, 5, 1)))
    big.save(tmp_path / "big.png")
    digest = reduce_photograph(tmp_path / "big.png", tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.size == (1125, 900)
        expected = np.asarray(big.resize((1125, 900), Image.Resampling.LANCZOS))
        assert peak_signal_noise_ratio(expected, np.asarray(image.convert("RGB"))) > 36  # JPEG of quality 92, full colour
    assert digest == hashlib.sha256((tmp_path / "out.jpg").read_bytes()).hexdigest()
    assert digest == reduce_photograph(tmp_path / "big.png", tmp_path / "again.jpg")


def test_small_photographs_keep_their_size(tmp_path):
    Image.fromarray(data.chelsea()).save(tmp_path / "cat.png")
    reduce_photograph(tmp_path / "cat.png", tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.size == (451, 300)


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """A Debian archive of one package, built here, behind commands that answer as apt does."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb builds and unpacks the package; it exists on Debian and Ubuntu only")
    tree = tmp_path / "tree"
    (tree / "usr/share/backgrounds").mkdir(parents=True)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: walls\nVersion: 1:2-3\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: x\n"
    )
    for name, image in (("cat.jpg", data.chelsea()), ("cup.png", data.coffee()), ("logo.png", data.coffee())):
        Image.fromarray(image).save(tree / "usr/share/backgrounds" / name)
    deb = tmp_path / "walls_1%3a2-3_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(deb)], check=True, capture_output=True)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "apt-get").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in\n*indextargets*) echo "http://mirror.example/debian/ bookworm";;\n'
        f'*" download walls=1:2-3"*) cp "{deb}" .;;\n*" download "*) echo "E: cannot download" >&2; exit 100;;\nesac\n'
    )
    (commands / "apt-cache").write_text(
        '#!/bin/sh\ncase "$*" in *walls*) echo "walls | 1:2-3 | http://mirror.example/debian bookworm/main amd64 Packages";; esac\n'
    )
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    files = {"cat.jpg": ("A. Uthor", "CC0-1.0"), "cup.png": ("B. Uthor", "CC-BY-4.0")}
    monkeypatch.setattr(photographs, "PACKAGES", {"walls": Source("bookworm", "usr/share/backgrounds", files)})
    return tmp_path


def test_photographs_of_a_package(apt):
    folder = apt / "resources" / "photographs"
    lines = []
    files = collect(folder, ["walls"], progress=lines.append)
    assert [file.name for file in files] == ["walls-cat.jpg", "walls-cup.jpg"]  # the logo is not listed
    assert lines == ["walls 1:2-3: 2 photographs"]
    rows = read_table(folder)
    assert [(row["package"], row["version"], row["author"], row["licence"]) for row in rows] == [
        ("walls", "1:2-3", "A. Uthor", "CC0-1.0"),
        ("walls", "1:2-3", "B. Uthor", "CC-BY-4.0"),
    ]
    table = (folder / "photographs.csv").read_bytes()
    collect(folder, ["walls"])
    assert (folder / "photographs.csv").read_bytes() == table
    calls = (apt / "calls").read_text()
    assert calls.count("download walls=1:2-3") == 1  # kept from the first time
    assert sorted(path.name for path in folder.iterdir()) == ["photographs.csv", "walls-cat.jpg", "walls-cup.jpg"]


def test_package_errors(apt, monkeypatch):
    with pytest.raises(PhotographError, match="no photographs known in package 'wall'; known: walls"):
        collect(apt / "out", ["wall"])
    known = photographs.PACKAGES["walls"]
    monkeypatch.setitem(photographs.PACKAGES, "walls", Source("bookworm", known.folder, {"gone.jpg": ("A", "MIT")}))
    with pytest.raises(PhotographError, match=r"walls 1:2-3 from bookworm has no usr/share/backgrounds/gone.jpg"):
        collect(apt / "out", ["walls"])
    monkeypatch.setitem(photographs.PACKAGES, "walls", Source("sid", known.folder, known.files))
    with pytest.raises(PhotographError, match="Debian sid has no package walls"):
        collect(apt / "out", ["walls"])


def test_failed_download_is_one_line(apt, monkeypatch):
    (apt / "bin" / "apt-cache").write_text('#!/bin/sh\necho "walls | 9 | http://mirror.example/debian bookworm/main amd64 Packages"\n')
    with pytest.raises(PhotographError, match=r"apt-get download walls=9 failed: E: cannot download") as caught:
        collect(apt / "out", ["walls"])
    assert "\n" not in str(caught.value)


def test_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PhotographError, match="apt-get is missing: packages come from Debian; on another system give a folder of your own"):
        collect(tmp_path / "out")


def test_a_folder_of_ones_own(tmp_path):
    source = tmp_path / "mine"
    (source / "trip").mkdir(parents=True)
    Image.fromarray(data.coffee()).save(source / "trip" / "A cup.PNG")
    Image.fromarray(data.chelsea()[:100, :100]).save(source / "icon.png")
    files = collect_folder(source, tmp_path / "out")
    assert [file.name for file in files] == ["trip-a-cup.jpg"]  # the icon is too small
    assert read_table(tmp_path / "out")[0]["package"] == str(source)


def test_folder_errors(tmp_path):
    with pytest.raises(PhotographError, match="holds no photographs of at least 256 pixels"):
        collect_folder(tmp_path, tmp_path / "out")
    (tmp_path / "broken.jpg").write_text("no image")
    with pytest.raises(PhotographError, match=r"broken.jpg cannot be read as an image"):
        collect_folder(tmp_path, tmp_path / "out")


def test_table_errors(tmp_path):
    with pytest.raises(PhotographError, match="photographs.csv is missing; collect photographs first"):
        read_table(tmp_path)
    Image.fromarray(data.coffee()).save(tmp_path / "cup.png")
    collect_folder(tmp_path, tmp_path / "out")
    photograph = tmp_path / "out" / next(csv.DictReader((tmp_path / "out" / "photographs.csv").open()))["file"]
    photograph.write_bytes(photograph.read_bytes() + b"x")
    with pytest.raises(PhotographError, match="cup.jpg has changed since it was collected"):
        read_table(tmp_path / "out")
    photograph.unlink()
    with pytest.raises(PhotographError, match="cup.jpg is listed in .* but missing"):
        read_table(tmp_path / "out")
