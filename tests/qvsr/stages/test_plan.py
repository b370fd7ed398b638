import csv
import json
import re
from dataclasses import replace

import pytest

from qvsr import plan as planning
from qvsr.config import ConfigError
from qvsr.forecast import assumed, work
from qvsr.forecast.clips import PlanError, parse_clips
from qvsr.provenance import ROOT
from qvsr.stages import plan

PAPER = ROOT / "config" / "paper.yaml"


def settings(path=planning.DEFAULT, **overrides):
    return planning.resolve([ROOT / path], overrides)


@pytest.fixture(scope="module")
def paper():
    return plan.plan(settings(PAPER))


@pytest.fixture(scope="module")
def default():
    return plan.plan(settings())


def test_the_paper_s_clips_take_the_calls_that_its_script_makes(paper):
    """600 calls a segment of 1280x720 or 960x540 frames; 30 clips of one segment, 12 tiles and 5 of the steps are the 1,800 pairs."""
    assert paper.unet_calls == {"reds4": 48_000, "spmcs": 126_000, "mvsr4x": 90_000, "reds30": 18_000}
    assert paper.samples == 1800
    assert {dataset: sum(one.count for one in found) for dataset, found in paper.clips.items()} == {
        "reds4": 4,
        "spmcs": 30,
        "mvsr4x": 15,
        "reds30": 30,
    }


def test_hours_are_the_counted_work_over_the_throughput(paper):
    """Of full precision by hand: U-Net and structure encoder for every call; encoders and decoder for every image tile of a segment."""
    a_call = 1879.668 + 315.135 + 131.582 + 91.960
    # 736x1312 of REDS4 and MVSR4x: two image tiles of 736x960; of SPMCS 544x992: two of 544x960; in units of 512x512
    tiles = [(80 + 150, 736 * 960 / 512**2), (210, 544 * 960 / 512**2)]
    work = 264_000 * a_call + sum(segments * 2 * ((2 * 2705.747 + 10261.491) * share + 3 * 85.899 * share**2) for segments, share in tiles)
    row = next(row for row in paper.rows if row.method == "full_precision")
    loading = 49 * (assumed.START_SECONDS + paper_params() * 4 / 1e9 / assumed.READ_GB_S) / 3600
    assert row.restore == pytest.approx(work / assumed.DEVICES["a6000"].gmacs / 3600 + loading, rel=1e-4)
    twice = plan.plan(settings(PAPER), gmacs=2 * assumed.DEVICES["a6000"].gmacs)
    assert twice.rows[0].restore - loading == pytest.approx((row.restore - loading) / 2)


def paper_params() -> int:
    return 935_321_287 + 52_494_080 + 2 * 114_973_812


def test_what_quantizing_takes_is_near_what_it_took(default):
    """Seconds of the committed run, each method on one of two busy cores; within a factor of two of every one that takes 10 s or more."""
    with (ROOT / "results" / "reference" / "fairness.csv").open() as file:
        took = {(row["method"], row["bits"]): (float(row["seconds"]), float(row["peak_mib"])) for row in csv.DictReader(file)}
    planned = {(row.method, row.bits): row.quantize * 3600 for row in default.rows if row.quantize is not None}
    assert planned.keys() == took.keys()
    for row, (seconds, _) in took.items():
        if seconds >= 10:
            assert 0.5 < planned[row] / seconds < 2, (row, planned[row], seconds)
        else:
            assert planned[row] < 10
    memory = next(stage.memory_gb for stage in default.stages if stage.rule == "quantize")
    assert 0.8 < memory * 1e9 / 2**20 / max(peak for _, peak in took.values()) < 1.3


def test_the_tables_take_what_they_took(default):
    """8 s of one core, measured of a default run's 24 checkpoints."""
    tables = next(stage for stage in default.stages if stage.rule == "tables")
    assert 0.5 < tables.hours * 3600 / 8 < 2


def test_jobs_are_those_of_a_dry_run(default):
    """Counted by Snakemake for config/default.yaml without its results; `all` is no job of ours."""
    assert {stage.rule: stage.jobs for stage in default.stages} == {
        "clips": 14,
        "calibrate": 1,
        "quantize": 24,
        "restore": 208,
        "measure": 27,
        "tables": 1,
        "figures": 1,
    }


def test_gpu_jobs_and_what_they_ask_for(paper, default):
    assert {stage.rule for stage in paper.stages if stage.gpu} == {"calibrate", "quantize", "restore"}
    assert not any(stage.gpu for stage in default.stages)
    asked = {stage.rule: (stage.asked_gb, stage.asked_hours) for stage in paper.stages}
    assert asked["restore"] == (14, 12) and asked["measure"] == (4, 48) and asked["convert"] == (9, 1)
    assert not paper.remarks, "config/paper.yaml asks for less than the plan expects"
    tight = plan.plan(settings(PAPER, jobs={"restore": {"mem_mb": 9000, "runtime": 60}}))
    assert len(tight.remarks) == 2
    assert re.fullmatch(r"restore: expected to take 1\d\.\d GB, jobs\.restore\.mem_mb asks for 9\.0", tight.remarks[0])
    assert re.fullmatch(r"restore: its longest job takes \d\.\d h, jobs\.restore\.runtime ends it after 1\.0", tight.remarks[1])


def test_converting_is_a_stage_where_official_checkpoints_are_named(paper, default):
    """Measured: 1.8 GB beside the mapped file, which has 6.68 GB here; the files written are float32 as the ones read."""
    convert = paper.stages[0]
    assert (convert.rule, convert.jobs, convert.gpu) == ("convert", 1, False)
    assert convert.memory_gb == pytest.approx(1.8 + 6.68, rel=0.02)
    assert paper.disk_gb["converted"] == pytest.approx(paper_params() * 4 / 1e9)
    alone = plan.plan(settings(PAPER, official={"weights": None, "vae_weights": None}))
    for found in (alone, default):
        assert "convert" not in [stage.rule for stage in found.stages] and "converted" not in found.disk_gb
    half = plan.plan(settings(PAPER, official={"precision": "half"}, jobs={"convert": {"mem_mb": 8000}}))
    assert half.disk_gb["converted"] == paper.disk_gb["converted"] / 2
    assert half.remarks == ["convert: expected to take 8.5 GB, jobs.convert.mem_mb asks for 8.0"]


def test_more_devices_shorten_what_can_be_shared_out(paper):
    one, eight, many = (paper.wall_hours(devices, 64) for devices in (1, 8, 10_000))
    assert one > eight > many
    longest = sum(stage.longest for stage in paper.stages if stage.gpu)
    assert longest < many < one
    assert one - eight == pytest.approx(sum(max(s.hours, s.longest) - max(s.hours / 8, s.longest) for s in paper.stages if s.gpu), rel=1e-9)


def test_a_method_of_somebody_else_is_counted_without_its_hours(monkeypatch):
    monkeypatch.setattr(work, "method_calls", lambda *_: None)
    found = plan.plan(settings("config/smoke.yaml"))
    quantize = next(stage for stage in found.stages if stage.rule == "quantize")
    assert (quantize.jobs, quantize.hours, quantize.longest) == (2, None, None)
    assert "maxmin W4A4: how long it quantizes is not known" in found.remarks
    assert "| quantize  |    2 |     CPU |        ? |" in plan.show(found, 1, 2)


def test_no_quantized_row_needs_no_calibration():
    found = plan.plan(settings("config/smoke.yaml", methods=[]))
    assert {stage.rule: stage.jobs for stage in found.stages if stage.rule in ("calibrate", "quantize", "restore")} == {
        "calibrate": 0,
        "quantize": 0,
        "restore": 2,
    }


def test_a_dataset_of_unknown_size_is_told_or_refused(tmp_path):
    mine = {"datasets": {"mine": {"kind": "folder", "path": str(tmp_path / "none"), "frames": 50}}, "evaluate": ["mine"]}
    config = settings(PAPER, **mine)
    with pytest.raises(PlanError, match=r"no folder .*none; its size is not published either: tell it with --clips mine=COUNTxFRAMESx"):
        plan.plan(config)
    found = plan.plan(config, given=dict([parse_clips("mine=3x50x180x320")]))
    assert found.unet_calls["mine"] == 3 * 10 * 600
    with pytest.raises(PlanError, match=r"--clips: no dataset 'mein'; did you mean mine\?"):
        plan.plan(config, given=dict([parse_clips("mein=3x50x180x320")]))


def test_devices_that_do_not_fit():
    with pytest.raises(PlanError, match=r"no device 'h10'; did you mean h100\?"):
        plan.plan(settings(PAPER), "h10")
    with pytest.raises(PlanError, match=r"--device cpu: the settings have device cuda; change one of them"):
        plan.plan(settings(PAPER), "cpu")


def test_a_gpu_that_is_too_small_is_named(monkeypatch):
    monkeypatch.setattr(plan, "DEVICES", {**assumed.DEVICES, "a6000": replace(assumed.DEVICES["a6000"], memory_gb=12)})
    found = plan.plan(settings(PAPER)).remarks
    assert len(found) == 3 and re.fullmatch(
        r"quantize: expected to take \d\d GB of GPU memory, a RTX A6000 has 12", next(one for one in found if one.startswith("quantize"))
    )


def test_what_is_written_fills_as_much_as_it_filled(default):
    """The default run's folders, measured: 110 PNG of ground truth 3.0 MB with LQ 3.5 MB, 30 samples 19.7 MB."""
    assert default.disk_gb["clips"] * 1e3 == pytest.approx(3.46, rel=0.1)
    assert default.disk_gb["calibration"] * 1e3 == pytest.approx(19.7, rel=0.1)


def test_the_text_and_the_json_say_the_same(paper):
    text, values = plan.show(paper, 8, 64), json.loads(json.dumps(paper.json()))
    assert "| reds4    | what is published" in text and "48,000" in text
    assert f"In all {sum(stage['jobs'] for stage in values['stages'])} jobs, " in text and "with 8 GPUs and 64 cores" in text
    assert values["samples"] == 1800 and values["total_hours"] == paper.total_hours


def test_a_rule_s_memory_and_runtime_are_settings():
    run = planning.Plan(settings(jobs={"restore": {"mem_mb": 5}}))
    assert (run.mem_mb("restore"), run.runtime("restore"), run.gpu("restore")) == (5, 60, 0)
    heavy = planning.Plan(settings(metrics=["psnr", "dists"]))
    assert (heavy.mem_mb("measure"), planning.Plan(settings()).mem_mb("measure")) == (3500, 1400)
    on_gpu = planning.Plan(settings(device="cuda"))
    assert [on_gpu.gpu(rule) for rule in ("calibrate", "quantize", "restore", "measure")] == [1, 1, 1, 0]
    with pytest.raises(ConfigError, match=r"unknown key jobs\.restor: no key 'restor'; did you mean restore\?"):
        settings(jobs={"restor": {"mem_mb": 5}})
