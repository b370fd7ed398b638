"""Weights: the list, what is here, fetching, importing, and the commands."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from qvsr import cli, protocols
from qvsr.data import assets, download
from qvsr.data.assets import AssetError, MissingError
from qvsr.provenance import ROOT
from tests.qvsr.data.server import Server

CONTENT = {"one.pth": b"first weights", "two.pth": b"second weights"}
SHA = {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which this machine serves it."""
    root = tmp_path / "served"
    root.mkdir()
    with Server(root) as server:
        yield root, server.url


@pytest.fixture
def listed(tmp_path: Path, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of two assets, one in a zip archive, and an empty folder for them."""
    root, url = served
    (root / "one.pth").write_bytes(CONTENT["one.pth"])
    with zipfile.ZipFile(root / "models.zip", "w") as packed:
        packed.writestr("models/two.pth", CONTENT["two.pth"])
        packed.writestr("models/other.pth", b"something else")
    common = {"page": "https://example.org/weights", "licence": "MIT", "use": "tests"}
    table = {
        "one": {"file": "one.pth", "urls": [f"{url}/one.pth"], "sha256": SHA["one.pth"], "bytes": 13, **common},
        "two": {"file": "two.pth", "urls": [f"{url}/models.zip"], "member": "two.pth", "sha256": SHA["two.pth"][:8], **common},
        "three": {"file": "three.pth", "sha256": "0" * 64, **common},
    }
    file = tmp_path / "assets.yaml"
    file.write_text(yaml.safe_dump(table, sort_keys=False))
    folder = tmp_path / "here"
    monkeypatch.setattr(assets, "read", lambda path=file, real=assets.read: real(path))
    monkeypatch.setenv("QVSR_ASSETS", str(folder))
    monkeypatch.setattr(download, "WAIT", 0)
    return folder


def run(*arguments: str) -> tuple[int, str]:
    """A command as `main` runs it: its exit code and what it prints; a user's error is its message."""
    result = CliRunner().invoke(cli.app, ["assets", *arguments])
    known = isinstance(result.exception, (ValueError, OSError))
    if result.exception is not None and not known and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, f"error: {result.exception}" if known else result.output


def test_the_shipped_list_says_where_everything_comes_from() -> None:
    table = assets.read()
    assert {"alexnet", "vgg16", "dists", "clip-rn50", "musiq-koniq", "maniqa-koniq", "niqe", "raft-things", "dover", "fastervqa"} <= set(
        table
    )
    for name, one in table.items():
        assert one.page.startswith("http") and all(url.startswith("https://") for url in one.urls), name
        digits = [
            part for part in Path(one.file).stem.replace("_", "-").split("-") if len(part) == 8 and set(part) <= set("0123456789abcdef")
        ]
        assert not digits or (one.sha256 or "").startswith(digits[-1]), f"{name}: the file's name carries other digits"
        assert one.citation and one.licence and (one.urls or one.by_hand), name
        assert one.sha256 or one.group != "metrics", f"{name}: a metric's number hangs on its weights, so they are pinned"


def test_the_shipped_list_has_all_of_the_paper() -> None:
    table = assets.read()
    assert {name for name, one in table.items() if one.group == "backbone"} == {"mgldvsr-unet", "mgldvsr-vae", "openclip-vit-h"}
    assert [url.split("/")[3] for url in table["mgldvsr-unet"].urls] == ["ianyeung", "Iceclear"]
    sets = {name for name, one in table.items() if one.group == "datasets"}
    authors = {f"quantvsr-{name}" for name in ("reds4", "spmcs", "udm10", "mvsr4x", "reds30")}
    assert sets == {"reds-train", "reds-val", "reds4", "spmcs", "mvsr4x"} | authors
    assert all(table[name].unpack for name in sets) and not any(table[name].urls for name in authors)  # behind a login
    four = [f"train_sharp/{clip}/00000099.png" for clip in ("000", "011", "015", "020")]
    assert [[fnmatchcase(name, pattern) for name in four] for pattern in table["reds4"].only] == [
        [row == column for column in range(4)] for row in range(4)
    ]


@pytest.mark.parametrize("name", [file.stem for file in sorted(protocols.FOLDER.glob("*.yaml"))])
def test_protocols_pin_the_listed_files(name: str) -> None:
    for metric, one in protocols.read(name).metrics.items():
        for asset, digits in one.weights.items():
            assert len(digits) >= 8 and (assets.read()[asset].sha256 or "").startswith(digits), f"{name}, {metric}: {asset}"


def test_a_missing_file_is_named_with_its_source_and_the_commands(listed: Path) -> None:
    with pytest.raises(MissingError) as caught:
        assets.find("one")
    text = str(caught.value)
    assert text.startswith(f"one.pth is not in {listed}: it comes from http://127.0.0.1:") and "one.pth;" in text
    assert "`python -m qvsr assets fetch one`" in text and "`python -m qvsr assets import --from DIR`" in text
    with pytest.raises(MissingError, match=r"one.pth is not in .*; two.pth is not in "):
        assets.paths(["one", "two"])
    with pytest.raises(MissingError, match="three.pth is not in .* it comes from https://example.org/weights"):  # no address: its page
        assets.find("three")


def test_a_folder_of_ours_is_shown_without_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVSR_ASSETS", raising=False)
    assert assets.shown(assets.folder()) == "resources/assets"


def test_fetch_gets_the_file_once_and_find_gives_it(listed: Path, served: tuple[Path, str]) -> None:
    assert assets.fetch("one", progress=False).read_bytes() == CONTENT["one.pth"]
    assert assets.find("one") == listed / "one.pth" == assets.paths(["one"])["one"]
    (served[0] / "one.pth").unlink()
    assets.fetch("one", progress=False)  # here already: not asked for again
    assert [file.name for file in listed.iterdir()] == ["one.pth"]


def test_fetch_takes_the_file_out_of_an_archive(listed: Path) -> None:
    assert assets.fetch("two", progress=False).read_bytes() == CONTENT["two.pth"]
    assert [file.name for file in listed.iterdir()] == ["two.pth"]


def test_another_content_never_appears(listed: Path, served: tuple[Path, str]) -> None:
    (served[0] / "one.pth").write_bytes(b"FIRST weights")
    with pytest.raises(AssetError, match=r"one: one.pth could not be fetched: http.*its SHA-256 begins with .*, expected is .*by hand"):
        assets.fetch("one", progress=False)
    (served[0] / "one.pth").write_bytes(b"first weigh")
    with pytest.raises(AssetError, match="it has 11 bytes, 13 are expected"):
        assets.fetch("one", progress=False)
    (served[0] / "one.pth").unlink()
    with pytest.raises(AssetError, match="one.pth could not be fetched: http.*404"):
        assets.fetch("one", progress=False)
    assert not list(listed.iterdir())
    with pytest.raises(
        AssetError, match="three: three.pth has no address to fetch it from: get it by hand, see https://example.org/weights"
    ):
        assets.fetch("three", progress=False)


def test_the_next_address_is_tried(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = assets.read()["one"]
    broken = one.model_copy(update={"urls": ("http://127.0.0.1:9/one.pth", *one.urls)})
    monkeypatch.setattr(assets, "read", lambda: {"one": broken})
    assert assets.fetch("one", progress=False).read_bytes() == CONTENT["one.pth"]


def test_a_damaged_file_is_refused_and_replaced(listed: Path) -> None:
    listed.mkdir()
    (listed / "two.pth").write_bytes(b"half")
    with pytest.raises(
        AssetError, match=r"two.pth is damaged \(its SHA-256 begins with .*\): delete it and run `python -m qvsr assets fetch two`"
    ):
        assets.find("two")
    assert assets.fetch("two", progress=False).read_bytes() == CONTENT["two.pth"]
    assert assets.find("two")


def test_a_protocol_for_another_file_is_refused(listed: Path) -> None:
    assets.fetch("one", progress=False)
    assert assets.paths({"one": SHA["one.pth"][:8]}) == {"one": listed / "one.pth"}
    with pytest.raises(AssetError, match="one: the protocol is for a file whose SHA-256 begins with 12345678, .*one.pth has "):
        assets.paths({"one": "12345678"})


def test_import_recognises_files_by_name_and_checks_them(listed: Path, tmp_path: Path) -> None:
    source = tmp_path / "brought"
    (source / "deep").mkdir(parents=True)
    with pytest.raises(AssetError, match="none of the files that are looked for is in or below it: one.pth, three.pth, two.pth"):
        assets.import_from(source)
    (source / "one.pth").write_bytes(b"FIRST weights")
    (source / "deep" / "one.pth").write_bytes(CONTENT["one.pth"])
    (source / "two.pth").write_bytes(b"half")
    (source / "unknown.pth").write_bytes(b"?")
    outcomes = {one.name: (one.outcome, one.file.parent) for one in assets.import_from(source)}
    assert outcomes["two"] == ("damaged", source)
    assert (listed / "one.pth").read_bytes() == CONTENT["one.pth"]
    assert [file.name for file in listed.iterdir()] == ["one.pth"]
    assert {one.name: one.outcome for one in assets.import_from(source)}["one"] == "here already"
    with pytest.raises(AssetError, match="no folder"):
        assets.import_from(tmp_path / "nowhere")


def test_status_and_verify(listed: Path) -> None:
    assets.fetch("one", progress=False)
    code, text = run("status")
    assert code == 0 and "one.pth" in text and text.count("missing") == 2 and text.count(" here ") == 1
    code, text = run("status", "--json")
    rows = {row["name"]: row for row in json.loads(text)}
    assert code == 0 and [rows[name]["state"] for name in ("one", "two", "three")] == ["here", "missing", "missing"]
    assert rows["one"]["sha256"] == SHA["one.pth"] and rows["one"]["path"] == str(listed / "one.pth")
    assert run("verify") == (0, "one: here\ntwo: missing\nthree: missing\n")
    (listed / "two.pth").write_bytes(b"half")
    code, text = run("verify")
    assert code == 1 and "two: damaged: its SHA-256 begins with" in text and "one: here" in text
    (listed / "one.pth").write_bytes(b"half")
    code, text = run("status")
    assert code == 0 and text.count("damaged") == 1  # the size of the other is not known: verify reads it


def test_fetch_and_import_from_the_command_line(listed: Path, tmp_path: Path) -> None:
    assert run("fetch", "one", "two.pth", "--no-progress") == (0, f"one: {listed / 'one.pth'}\ntwo: {listed / 'two.pth'}\n")
    code, text = run("fetch")
    assert code == 1 and text == "error: nothing to fetch: give names (one, two, three), --metrics, --group or --all"
    code, text = run("fetch", "--group", "metric")
    assert code == 1 and text.startswith("error: no group 'metric'; did you mean metrics?")
    code, text = run("fetch", "one", "tow")
    assert code == 1 and text.startswith("error: no asset 'tow'; did you mean two?")
    code, text = run("fetch", "--metrics", "lpip")
    assert code == 1 and text.startswith("error: no metric 'lpip'; did you mean lpips?")
    (tmp_path / "brought").mkdir()
    (tmp_path / "brought" / "three.pth").write_bytes(b"not zeros")
    code, text = run("import", "--from", str(tmp_path / "brought"))
    assert code == 1 and text.startswith("three: damaged, ") and not (listed / "three.pth").exists()


def test_a_list_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "assets.yaml"
    good = {"file": "a.pth", "sha256": "0" * 8, "page": "p", "licence": "MIT", "use": "u"}
    for change, message in (
        ({"sha256": "XYZ"}, r"assets.yaml: sha256: String should match"),
        ({"urls": ["https://example.org/a.zip"]}, "a zip archive needs member"),
        ({"file": "../a.pth"}, "file: String should match"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"only": ["a/*"]}, "only is for an archive: give unpack"),
        ({"unpack": "a"}, r"file a.pth cannot be unpacked: .zip, .tar, .tar.gz, .tgz can"),
        ({"unpack": "a", "member": "b", "file": "a.zip"}, "give one of them"),
        ({"urls": ["file:///etc/passwd"]}, "file:///etc/passwd is no address of http or https"),
    ):
        file.write_text(yaml.safe_dump({"a": {**good, **change}}))
        with pytest.raises(AssetError, match=message):
            assets.read.__wrapped__(file)
    file.write_text(yaml.safe_dump({"a": good, "b": good}))
    with pytest.raises(AssetError, match="a.pth is listed 2 times, once is needed"):
        assets.read.__wrapped__(file)
    archive = {**good, "file": "a.zip", "unpack": "one"}
    file.write_text(yaml.safe_dump({"a": archive, "b": {**archive, "unpack": "two", "sha256": "1" * 8}}))
    with pytest.raises(AssetError, match="a.zip is listed twice, with other addresses, another digest or size"):
        assets.read.__wrapped__(file)
    file.write_text("- a\n")
    with pytest.raises(AssetError, match="not a list of assets"):
        assets.read.__wrapped__(file)


@pytest.mark.parametrize("command", [["status"], ["verify"], ["--help"]])
def test_the_commands_load_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['qvsr', 'assets', *{command!r}]\n"
        "from qvsr.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print('HEAVY', [m for m in ('torch', 'numpy', 'pandas', 'pyiqa', 'pooch', 'snakemake') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []")
