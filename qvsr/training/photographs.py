"""Photographs to train on: real photographs from Debian packages under free licences, or a folder of one's own.

Debian's background packages are small, versioned, checked for licences and fetched without an account. Most of what they hold
are drawings, so the list below names the photographs one by one, with author and licence as the package states them. Packages
come through ``apt-get download`` and are unpacked with ``dpkg-deb -x``: no root, nothing is installed. The photographs are
reduced and written as JPEG beside a ``photographs.csv``; they are not redistributed, only what is trained on them is.
"""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SHORT_SIDE = 900
QUALITY = 92
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COLUMNS = ("file", "package", "version", "author", "licence", "sha256")


class PhotographError(ValueError):
    """Photographs that cannot be had; the message says what is missing and what would work."""


@dataclass(frozen=True)
class Source:
    """One Debian package: the release it is taken from, the folder inside, and its photographs as file -> (author, licence)."""

    release: str
    folder: str
    files: dict[str, tuple[str, str]]


def _same(author: str, licence: str, *names: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(names, (author, licence))


PACKAGES: dict[str, Source] = {
    "gnome-backgrounds": Source(
        "bullseye",
        "usr/share/backgrounds/gnome",
        {
            "Acrylic.jpg": ("Steve Johnson", "CC0-1.0"),
            "ColdWarm.jpg": ("invisiblepower", "CC0-1.0"),
            "Dark_Ivy.jpg": ("Garrett LeSage", "CC-BY-SA-3.0"),
            "Road.jpg": ("Joshua Welch", "CC0-1.0"),
            "SeaSunset.jpg": ("Sebastian Voortman", "CC0-1.0"),
        },
    ),
    "mate-backgrounds": Source(
        "bookworm",
        "usr/share/backgrounds/mate/nature",
        {
            **_same("Charles Barbin", "GPL-2+", "Aqua.jpg", "LadyBird.jpg", "YellowFlower.jpg", "Garden.jpg"),
            "Blinds.jpg": ("Lennart Poettering, Andrea Cimitan", "GPL-2+"),
            "Dune.jpg": ("Marco Cogoni, Hylke Bons", "GPL-2+"),
            "FreshFlower.jpg": ("Jens Ansorg", "GPL-2+"),
            "GreenMeadow.jpg": ("Timothy Schellhase, Lapo Calamandrei", "GPL-2+"),
            "RainDrops.jpg": ("blackcombwhistler07", "GPL-2+"),
            "Storm.jpg": ("Sergey Nazarov", "GPL-2+"),
            "TwoWings.jpg": ("Charles Barbin, Hylke Bons", "GPL-2+"),
            "Wood.jpg": ("Jean-François Fortin Tam", "GPL-2+"),
        },
    ),
    "plasma-workspace-wallpapers": Source(
        "bookworm",
        "usr/share/wallpapers",
        {
            "BytheWater/contents/images/2560x1600.jpg": ("Maciej Wiklo", "LGPL-3"),
            "ColorfulCups/contents/images/2560x1600.jpg": ("Dmitri Popov", "LGPL-3"),
            "EveningGlow/contents/images/2560x1600.jpg": ("Ian Hex", "LGPL-3"),
            "FallenLeaf/contents/images/2560x1600.jpg": ("Martin Klapetek", "LGPL-3"),
            "Grey/contents/images/2560x1600.jpg": ("Sigi Sagi", "LGPL-3"),
            "Volna/contents/images/5120x2880.jpg": ("Nikita Babin", "CC-BY-SA-4.0"),
            **_same(
                "Risto Saukonpää",
                "LGPL-3",
                "ColdRipple/contents/images/2560x1600.jpg",
                "Kite/contents/images/2560x1600.jpg",
                "OneStandsOut/contents/images/2560x1600.jpg",
                "Path/contents/images/2560x1600.jpg",
                "summer_1am/contents/images/2560x1600.jpg",
            ),
        },
    ),
    "lomiri-wallpapers-16.04": Source(
        "bookworm",
        "usr/share/backgrounds",
        {
            "Bridge_by_Sander_Klootwijk.jpg": ("Sander Klootwijk", "CC-BY-SA-4.0"),
            "Dragonfly_by_Bolly.jpg": ("Bolly", "CC-BY-SA-4.0"),
            "Wine_by_Jakkub_Mede.jpg": ("Jakub Mede", "CC-BY-4.0"),
            "seeding_by_Clements_Engelhardt.jpg": ("Clemens Engelhardt", "CC0-1.0"),
            **_same("Trevor Freespace", "CC-BY-4.0", "Picture_0B_by_freespace.jpg", "Picture_1A_by_freespace.jpg"),
            **_same("Peter Nerlich", "CC-BY-SA-4.0", "free_by_Peter_Nerlich.jpg", "greentock_by_Peter_Nerlich.jpg"),
            **_same(
                "Aitzol Berasategi",
                "CC-BY-4.0",
                "aitzgorri_by_Aitzol_Berasategi.jpg",
                "friends_by_Aitzol_Berasategi.jpg",
                "life_by_Aitzol_Berasategi.jpg",
                "picosdeeuropa_by_Aitzol_Berasategi.jpg",
                "sunset_by_Aitzol_Berasategi.jpg",
            ),
        },
    ),
    "lomiri-wallpapers-20.04": Source(
        "bookworm", "usr/share/backgrounds", {"Kleiber_by_Lukas_Baubkus.jpg": ("Lukas Baubkus", "CC-BY-SA-3.0")}
    ),
    "budgie-backgrounds": Source(
        "trixie",
        "usr/share/backgrounds/budgie",
        _same(
            "Budgie Desktop Developers",
            "CC0-1.0",
            "abstract-spiral.jpg",
            "beacon-street-sunset.jpg",
            "blue-periwinkle.jpg",
            "canyon-wren.jpg",
            "casa-mila.jpg",
            "extreme-desert-hike.jpg",
            "high-trestle-trail.jpg",
            "lake-sherburne.jpg",
            "oakland-zoo-otters.jpg",
            "perched-osprey.jpg",
            "piazza-gae-aulenti.jpg",
            "roman-colosseum.jpg",
            "singaporean-cityscape.jpg",
            "tea-gardens.jpg",
        ),
    ),
    "lxqt-themes": Source(
        "bookworm",
        "usr/share/lxqt/wallpapers",
        _same(
            "LXQt team",
            "LGPL-2.1+",
            "Butterfly-Kenneth-Wimer.jpg",
            "after-the-rain.jpg",
            "appleflower.png",
            "butterfly.png",
            "cloud.png",
            "drop.png",
            "flowers.png",
            "fog.jpg",
            "this-is-not-windows.jpg",
        ),
    ),
    "ukui-wallpapers": Source(
        "sid",
        "usr/share/backgrounds",
        _same(
            "Ubuntu Kylin community",
            "CC-BY-SA-3.0",
            "bluebird.jpg",
            "bridgecity.jpg",
            "bridgecity2.jpg",
            "flamingos.jpg",
            "horse.jpg",
            "house.jpg",
            "look.jpg",
            "mountain-range.jpg",
            "mountain.jpg",
            "mountain2.jpg",
            "sea.jpg",
            "sky.jpg",
            "snowy-mountains.jpg",
            "still-life.jpg",
            "sunf.jpg",
        ),
    ),
    "palapeli-data": Source(
        "bookworm",
        "usr/share/palapeli/collection",
        {
            "castle-maintenon.jpg": ("Eric Pouhier", "GFDL"),
            "cincinnati-bridge.jpg": ("Derek Jensen", "public domain"),
            "citrus-fruits.jpg": ("US Department of Agriculture", "public domain"),
            "european-honey-bee.jpg": ("John Severns", "public domain"),
            "panther-chameleon-female.jpg": ("B. Navez and others", "GFDL"),
        },
    ),
    "python-kivy-examples": Source(
        "trixie",
        "usr/share/kivy-examples/demo/pictures/images",
        _same("Kivy Team and other contributors", "MIT", "Wall.jpg", "faust_github.jpg"),
    ),
    "python3-sklearn": Source(
        "trixie",
        "usr/lib/python3/dist-packages/sklearn/datasets/images",
        {"china.jpg": ("danielbuechele", "CC-BY-2.0"), "flower.jpg": ("vultilion", "CC-BY-2.0")},
    ),
}


def collect(folder: Path, packages: Iterable[str] = tuple(PACKAGES), *, progress: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Download the packages and write their photographs as JPEG, with ``photographs.csv`` (file, origin, author, licence, sha256).

    Downloads are kept in ``debs`` beside ``folder`` and used again. Needs a Debian machine (apt-get, dpkg-deb); elsewhere use :func:`collect_folder`.

    Args:
        folder: where the photographs go; made if missing.
        packages: names in :data:`PACKAGES`.
        progress: gets one line per package.

    Returns:
        The written files, sorted.

    Raises:
        PhotographError: an unknown package, no apt-get, a failed download, or a photograph that is not in the package.
    """
    names = list(packages)
    unknown = [name for name in names if name not in PACKAGES]
    if unknown:
        raise PhotographError(f"no photographs known in package {unknown[0]!r}; known: {', '.join(PACKAGES)}")
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise PhotographError(f"{tool} is missing: packages come from Debian; on another system give a folder of your own photographs")
    folder.mkdir(parents=True, exist_ok=True)
    debs = folder.resolve().parent / "debs"
    apt = Apt(debs, sorted({PACKAGES[name].release for name in names}))
    rows: list[dict[str, str]] = []
    for name in names:
        source = PACKAGES[name]
        deb, version = apt.download(name, source.release)
        unpacked = debs / name
        _run(["dpkg-deb", "-x", str(deb), str(unpacked)])
        for file, (author, licence) in source.files.items():
            path = unpacked / source.folder / file
            if not path.is_file():
                raise PhotographError(
                    f"{name} {version} from {source.release} has no {source.folder}/{file}; drop it from the list in {__name__}"
                )
            target = folder / f"{name}-{_slug(file)}.jpg"
            digest = reduce_photograph(path, target)
            rows.append(dict(zip(COLUMNS, (target.name, name, version, author, licence, digest), strict=True)))
        shutil.rmtree(unpacked)
        progress(f"{name} {version}: {len(source.files)} photographs")
    _write_table(folder, rows)
    return sorted(folder / row["file"] for row in rows)


def collect_folder(source: Path, folder: Path) -> list[Path]:
    """The same from a folder of one's own photographs, searched with its subfolders; images under 256 pixels are left out.

    Raises:
        PhotographError: no photographs found, or an unreadable one.
    """
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for path in files:
        try:
            with Image.open(path) as image:
                if min(image.size) < 256:
                    continue
        except OSError as error:
            raise PhotographError(f"{path} cannot be read as an image: {error}; remove it") from None
        target = folder / f"{_slug(str(path.relative_to(source)))}.jpg"
        rows.append(dict(zip(COLUMNS, (target.name, str(source), "", "", "", reduce_photograph(path, target)), strict=True)))
    if not rows:
        raise PhotographError(f"{source} holds no photographs of at least 256 pixels ({', '.join(SUFFIXES)})")
    _write_table(folder, rows)
    return sorted(folder / row["file"] for row in rows)


def reduce_photograph(source: Path, target: Path) -> str:
    """Write ``source`` as RGB JPEG whose shorter side is at most 900 pixels; returns the sha256 of the written file."""
    Image.MAX_IMAGE_PIXELS = None  # the packages hold images of 40 megapixels, above Pillow's warning level
    with Image.open(source) as opened:
        image = opened.convert("RGB")
        factor = min(image.size) / SHORT_SIDE
        if factor > 1:
            image = image.resize((round(image.width / factor), round(image.height / factor)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    data = buffer.getvalue()
    temporary = target.with_name(f".{target.name}.part")
    temporary.write_bytes(data)
    temporary.replace(target)
    return hashlib.sha256(data).hexdigest()


def read_table(folder: Path) -> list[dict[str, str]]:
    """Rows of ``photographs.csv``.

    Raises:
        PhotographError: the table is missing, or a file is missing or changed.
    """
    path = folder / "photographs.csv"
    if not path.is_file():
        raise PhotographError(f"{path} is missing; collect photographs first")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        photograph = folder / row["file"]
        if not photograph.is_file():
            raise PhotographError(f"{photograph} is listed in {path} but missing; collect photographs again")
        if hashlib.sha256(photograph.read_bytes()).hexdigest() != row["sha256"]:
            raise PhotographError(
                f"{photograph} has changed since it was collected (sha256 differs from {path}); collect photographs again"
            )
    return rows


class Apt:
    """apt with lists of its own, so that any Debian release can be asked without touching the machine's settings."""

    def __init__(self, folder: Path, releases: list[str]) -> None:
        self.folder = folder.resolve()
        for part in ("lists/partial", "cache/archives/partial"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        mirror = _mirror()
        keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
        lines = [f"deb [signed-by={keyring}] {mirror} {release} main" for release in releases]
        (self.folder / "sources.list").write_text("\n".join(lines) + "\n")
        self.options = [
            f"-oDir::Etc::SourceList={self.folder}/sources.list",
            "-oDir::Etc::SourceParts=/dev/null",
            f"-oDir::State::Lists={self.folder}/lists",
            f"-oDir::State::Status={self.folder}/status",
            f"-oDir::Cache={self.folder}/cache",
            "-oAPT::Sandbox::User=",
        ]
        _run(["apt-get", *self.options, "-qq", "update"])

    def download(self, package: str, release: str) -> tuple[Path, str]:
        """The package's file and version; downloaded once."""
        lines = _run(["apt-cache", *self.options, "madison", package]).splitlines()
        versions = [line.split("|")[1].strip() for line in lines if f" {release}/" in line]
        if not versions:
            raise PhotographError(f"Debian {release} has no package {package}; is the mirror complete?")
        pattern = f"{package}_{versions[0].replace(':', '%3a')}_*.deb"
        if not list(self.folder.glob(pattern)):
            _run(["apt-get", *self.options, "download", f"{package}={versions[0]}"], cwd=self.folder)
        return next(self.folder.glob(pattern)), versions[0]


def _mirror() -> str:
    """The Debian mirror that this machine already uses."""
    lines = _run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages", "Origin: Debian"]).splitlines()
    mirrors = [uri for uri, codename in (line.split(maxsplit=1) for line in lines if " " in line) if "security" not in uri + codename]
    if not mirrors:
        raise PhotographError(
            "apt knows no Debian mirror: run apt-get update on a Debian machine, or give a folder of your own photographs"
        )
    return mirrors[0]


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise PhotographError(f"{' '.join(command[:1] + command[-2:])} failed: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout


def _slug(file: str) -> str:
    """A flat file name: plasma's ``Kite/contents/images/2560x1600.jpg`` is called ``kite``."""
    name = file.split("/contents/")[0] if "/contents/" in file else file.rsplit(".", 1)[0]
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def _write_table(folder: Path, rows: list[dict[str, str]]) -> None:
    temporary = folder / ".photographs.csv.part"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["file"]))
    temporary.replace(folder / "photographs.csv")
