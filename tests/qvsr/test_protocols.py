"""Protocols fix every option of every metric, and say so in a signature."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import metrics  # noqa: F401 (fills the registry)
from qvsr import protocols
from qvsr.protocols import ProtocolError
from qvsr.registry import METRICS
from scripts.protocol_effects import switched, switches


def changed(tmp_path: Path, **changes: object) -> protocols.Protocol:
    data = yaml.safe_load((protocols.FOLDER / "strict-v1.yaml").read_text())
    for key, value in changes.items():
        if key == "name":
            data["name"] = value
        else:
            data["metrics"][key] |= value
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(data))
    return protocols.read(file)


def test_strict_v1_covers_every_metric_and_fits_what_is_installed() -> None:
    strict = protocols.read("strict-v1")
    assert set(strict.metrics) == set(METRICS)
    for name in METRICS:
        strict.options(METRICS[name])
        strict.check_installed(name)


def test_signatures_differ_where_options_do(tmp_path: Path) -> None:
    strict, other = protocols.read("strict-v1"), changed(tmp_path, ssim={"options": {"colour": "y", "crop": 0}})
    differ = [name for name in METRICS if strict.signature(name) != other.signature(name)]
    assert differ == ["ssim"] and "|colour:y|" in other.signature("ssim")


def test_options_are_complete_and_known(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="strict-v1, psnr: option eps is not fixed; add it to config/protocols/strict-v1.yaml"):
        changed(tmp_path, psnr={"options": {"colour": "rgb", "crop": 0}}).options(METRICS["psnr"])
    with pytest.raises(ProtocolError, match="strict-v1, gmsd: no option 'color'"):
        changed(tmp_path, gmsd={"options": {"color": "rgb"}}).options(METRICS["gmsd"])


def test_frames_saved_in_another_way_are_refused() -> None:
    strict = protocols.read("strict-v1")
    strict.check_saved("round")
    with pytest.raises(ProtocolError, match="sampling.rounding is truncate, protocol strict-v1 measures frames saved with round"):
        strict.check_saved("truncate")


def test_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ProtocolError, match=r"psnr is defined with pyiqa 0.1.10, found \d.*: install that version, or write a protocol of another name"
    ):
        changed(tmp_path, psnr={"implementation": "pyiqa==0.1.10"}).check_installed("psnr")


def test_what_is_no_protocol(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="no protocol 'strict-v2'; did you mean strict-v1"):
        protocols.read("strict-v2")
    file = tmp_path / "broken.yaml"
    file.write_text("name: x\nrange: '0-255'\nrounding: round\nframes: all\naverage: frames-then-clips\nmetrics: {}\n")
    with pytest.raises(ProtocolError, match="broken.yaml: range is '0-255'; known: 0-1"):
        protocols.read(file)
    file.write_text("a: [")
    with pytest.raises(ProtocolError, match="broken.yaml: not YAML"):
        protocols.read(file)


# Every quirk of the released scripts, and nothing else: (metric, "" for all of them; key): strict-v1's value, paper-v1's.
SWITCHES = {
    ("", "rounding"): ("round", "truncate"),
    ("", "frames"): ("all", "common"),
    ("psnr", "options.eps"): (0.0, 1e-8),
    ("psnr_fp", "options.eps"): (0.0, 1e-8),
    ("ssim", "options.colour"): ("rgb", "y"),
    ("ssim_fp", "options.colour"): ("rgb", "y"),
    ("ewarp", "options.images"): ("0-255", "0-1"),
    ("ewarp", "options.unseen"): ("refuse", "zero"),
    ("ewarp_dis", "options.unseen"): ("refuse", "zero"),
    ("maniqa", "options.places"): ("grid", "random"),
    ("maniqa", "options.seed"): (0, 123),
    **{
        (metric, "clip_digits"): (None, 4)
        for metric in ("psnr", "ssim", "psnr_fp", "ssim_fp", "lpips", "dists", "clipiqa", "musiq", "maniqa", "niqe")
    },
}


def test_the_two_protocols_differ_in_the_named_switches_alone() -> None:
    strict, paper = (yaml.safe_load((protocols.FOLDER / f"{name}.yaml").read_text()) for name in ("strict-v1", "paper-v1"))
    assert set(strict["metrics"]) == set(paper["metrics"]) == set(METRICS)
    assert {(s.metric, s.key): (s.strict, s.paper) for s in switches(strict, paper)} == SWITCHES


def test_signatures_of_the_two_protocols_differ_where_the_files_do() -> None:
    strict, paper = protocols.read("strict-v1"), protocols.read("paper-v1")
    for metric in METRICS:
        parts = [dict(part.partition(":")[::2] for part in one.signature(metric).split("|")[2:]) for one in (strict, paper)]
        differ = {key for key in {**parts[0], **parts[1]} if parts[0].get(key) != parts[1].get(key)}
        assert differ == {key.removeprefix("options.") for name, key in SWITCHES if name in ("", metric)}, metric


def test_every_quirk_is_explained() -> None:
    text = (protocols.ROOT / "docs" / "protocols.md").read_text().split("## The quirks, one by one")[1].split("## ")[0]
    for metric, key in SWITCHES:
        if key != "clip_digits" and not metric.endswith(("_fp", "_dis")) and (metric, key) != ("maniqa", "options.seed"):
            name = key.removeprefix("options.")
            assert (f"| `{metric}` `{name}` |" if metric else f"| `{name}` |") in text
    assert "| `clip_digits` |" in text


def test_a_switched_protocol_differs_in_that_switch_alone(tmp_path: Path) -> None:
    strict, paper = (yaml.safe_load((protocols.FOLDER / f"{name}.yaml").read_text()) for name in ("strict-v1", "paper-v1"))
    for switch in switches(strict, paper):
        changed = switched(strict, switch)
        assert list(switches(strict, changed)) == [switch]
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(changed))
        protocols.read(tmp_path / "one.yaml")
