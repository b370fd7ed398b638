"""The workflow does what it promises, twice the same, and after being killed too."""

import csv
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvsr import results
from qvsr.quant import checkpoint
from tests.workflow import tiny

REFERENCES = {("ground_truth", "W32A32"), ("bicubic", "W32A32"), ("full_precision", "W32A32")}
ROWS = {*REFERENCES, ("maxmin", "W4A4"), ("rotation", "W4A4"), ("quantvsr", "W4A4")}


def test_tables_have_every_row_and_metric(finished):
    with (finished / "results" / "tables" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["method"], row["bits"]) for row in rows} == ROWS
    assert {row["metric"] for row in rows} == {"psnr", "ssim", "gmsd", "ssim_gradient", "ewarp_dis", "psnr_fp", "ssim_fp"}
    assert {(row["clips"], row["frames"]) for row in rows} == {("1", "3")}
    fidelity = {row["method"]: float(row["value"]) for row in rows if row["metric"] == "psnr_fp"}
    assert fidelity["full_precision"] == float("inf")
    assert fidelity["maxmin"] < 100  # quantization must have changed something
    assert len({fidelity[method] for method in ("maxmin", "rotation", "quantvsr")}) == 3
    ideal = {row["metric"]: float(row["value"]) for row in rows if row["method"] == "ground_truth"}
    assert (ideal["psnr"], ideal["ssim"], ideal["gmsd"]) == (float("inf"), pytest.approx(1), pytest.approx(0, abs=1e-6))
    assert ideal["ssim_gradient"] == pytest.approx(1) and ideal["ewarp_dis"] > 0
    assert not list((finished / "results" / "restored").glob("*/ground_truth*"))  # measured where it lies
    tables = {file.name for file in (finished / "results" / "tables").iterdir() if not file.name.startswith(".")}
    assert tables == {f"{table}.{form}" for table in ("metrics", "comparisons", "cost", "fairness") for form in ("csv", "md", "tex")}
    assert (finished / "results" / "figures" / "comparison.png").stat().st_size > 1000


def test_the_fairness_card_tells_how_each_row_was_made(finished):
    with (finished / "results" / "tables" / "fairness.csv").open() as file:
        card = {row["method"]: row for row in csv.DictReader(file)}
    assert list(card) == ["maxmin", "rotation", "quantvsr"]
    calibration = {tuple(row[f"calibration_{key}"] for key in ("dataset", "samples", "steps", "digest")) for row in card.values()}
    manifest = (finished / "results" / "calibration" / "manifest.json").read_bytes()
    assert calibration == {("calibration", "2", "2", hashlib.sha256(manifest).hexdigest()[:16])}  # one clip of one tile: two calls
    assert [row["reduced"] for row in card.values()] == ["false", "false", "true"]  # the variant trains nothing
    assert 4 < float(card["maxmin"]["weight_bits"]) < float(card["quantvsr"]["weight_bits"])
    assert all(float(row["seconds"]) > 0 for row in card.values())  # Snakemake's benchmark files were found
    text = (finished / "results" / "tables" / "metrics.md").read_text()
    assert "[Fairness card](fairness.md)" in text and "- quantvsr is reduced (in brackets the published default): rank_min 2 (16)" in text
    assert "| W4A4   | rotation       | shared            |" in text


def test_comparisons_of_one_clip_show_no_more_than_they_can(finished):
    with (finished / "results" / "tables" / "comparisons.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["method"], row["other"]) for row in rows} == {("quantvsr", "maxmin"), ("quantvsr", "rotation")}
    assert {(row["clips"], row["low"], row["p_adjusted"]) for row in rows if row["difference"]} == {("1", "", "1.0")}
    with (finished / "results" / "tables" / "metrics.csv").open() as file:
        values = {row["method"]: float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "psnr_fp"}
    of_maxmin = next(row for row in rows if (row["other"], row["metric"]) == ("maxmin", "psnr_fp"))
    assert float(of_maxmin["difference"]) == values["quantvsr"] - values["maxmin"]
    assert "[Comparisons](comparisons.md)" in (finished / "results" / "tables" / "metrics.md").read_text()
    assert "there is no interval, and no test says anything" in (finished / "results" / "tables" / "comparisons.md").read_text()


def test_a_second_seed_gives_other_frames_and_a_spread(finished, tmp_path):
    """The first seed's frames and numbers stay; fidelity is to the full-precision output of the same noise."""
    project = Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))
    done = tiny.snakemake(project, "--config", "seeds=[42, 43]", "methods=[maxmin]", "--", "results/tables")
    assert done.returncode == 0, done.stdout + done.stderr
    restored, measured = project / "results" / "restored" / "clips", project / "results" / "measured" / "clips"
    first, second = ((restored / f"full_precision-W32A32{suffix}" / "walk" / "00000000.png").read_bytes() for suffix in ("", "-seed43"))
    assert first != second and first == (finished / "results" / "restored/clips/full_precision-W32A32/walk/00000000.png").read_bytes()
    rows = {suffix: results.read(measured / f"full_precision-W32A32{suffix}.jsonl") for suffix in ("", "-seed43")}
    assert {suffix: {row.seed for row in found} for suffix, found in rows.items()} == {"": {42}, "-seed43": {43}}
    assert {row.value for found in rows.values() for row in found if row.metric == "psnr_fp"} == {float("inf")}
    one = [row.value for suffix in ("", "-seed43") for row in results.read(measured / f"maxmin-W4A4{suffix}.jsonl") if row.metric == "psnr"]
    with (project / "results" / "tables" / "metrics.csv").open() as file:
        (psnr,) = [row for row in csv.DictReader(file) if (row["method"], row["metric"]) == ("maxmin", "psnr")]
    assert one[0] != one[1] and psnr["seeds"] == "2"
    assert (float(psnr["value"]), float(psnr["seed_sd"])) == pytest.approx((sum(one) / 2, abs(one[0] - one[1]) / 2**0.5))
    assert " ± " in (project / "results" / "tables" / "metrics.md").read_text()


def test_what_is_measured_of_a_job_is_left_out_of_comparisons_and_nothing_else(tmp_path):
    card = tmp_path / "fairness.md"
    card.write_text("| a | b | Time | Peak |\n| 1 | 2 |    9 |    8 |\n\n- a note | with a bar\n")
    assert tiny.without_measured(card) == b"|a|b\n|1|2\n\n- a note | with a bar"
    card.with_suffix(".csv").write_text('a,"b, c",3,4\n')
    assert tiny.without_measured(card.with_suffix(".csv")) == b'a,"b,c"'
    card.with_suffix(".tex").write_text("a & b & 3 & 4 \\\\\nno cells\n")
    assert tiny.without_measured(card.with_suffix(".tex")) == b"a & b\nno cells"


@pytest.fixture
def asked_for(finished):
    """The finished run, where what is made on request only may be made: it is not part of a run, so other tests must not find it."""
    yield finished
    for name in ("layers", "ablation"):
        shutil.rmtree(finished / "results" / name, ignore_errors=True)


def test_the_ablation_on_request(asked_for):
    """It reads what the tables read; its row of another method's settings differs as their means do."""
    assert tiny.due(asked_for, "results/ablation") == {"ablation"}
    done = tiny.snakemake(asked_for, "results/ablation")
    assert done.returncode == 0, done.stdout + done.stderr
    with (asked_for / "results" / "ablation" / "ablation.csv").open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file) if row["metric"] == "psnr_fp"}
    with (asked_for / "results" / "tables" / "metrics.csv").open() as file:
        means = {row["method"]: float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "psnr_fp"}
    assert list(rows) == ["quantvsr", "rotation"] and {float(rows[name]["value"]) == means[name] for name in rows} == {True}
    assert float(rows["rotation"]["change"]) == means["rotation"] - means["quantvsr"]
    assert float(rows["rotation"]["weight_bits"]) < float(rows["quantvsr"]["weight_bits"])
    assert {path.name for path in (asked_for / "results" / "ablation").glob("[!.]*")} == {
        f"ablation.{form}" for form in ("csv", "md", "tex")
    }
    assert tiny.due(asked_for) == set()


def test_the_report_by_layer_on_request(asked_for):
    finished = asked_for
    wanted = "results/layers/maxmin-W4A4.csv"
    assert tiny.due(finished, wanted) == {"layers"}
    done = tiny.snakemake(finished, wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    with (finished / wanted).open() as file:
        rows = list(csv.DictReader(file))
    layers = checkpoint.read_header(finished / "results" / "quantized" / "maxmin-W4A4.safetensors")["layers"]
    assert {row["layer"] for row in rows} == set(layers)
    assert [row["t"] for row in rows if row["layer"] == rows[0]["layer"]] == ["", "0", "999"]  # over all, and the two recorded steps
    assert sum(float(row["macs_pct"]) for row in rows if not row["t"]) < 100
    found = sorted(float(row["output_sqnr_db"]) for row in rows if row["output_sqnr_db"])
    assert found[0] > 0 and 10 < found[len(found) // 2] < 30, found  # 4 bits of weights and inputs: about 20 dB each
    assert (finished / "results" / "layers" / "maxmin-W4A4.png").stat().st_size > 10000
    log = (finished / "results" / "logs" / "layers" / "maxmin-W4A4.log").read_text()
    assert "maxmin W4A4, 2 of 2 calibration samples\nworst layers" in log and len(log.splitlines()) == 12
    assert tiny.due(finished) == set()  # nobody else reads it


def test_a_variant_is_its_method_with_other_settings(finished):
    """Its checkpoint says both names; quantizing by the method itself with these settings gives the same network."""
    own = checkpoint.read_header(finished / "results" / "quantized" / "rotation-W4A4.safetensors")
    whole = checkpoint.read_header(finished / "results" / "quantized" / "quantvsr-W4A4.safetensors")
    assert (own["method"], own["base"]) == ("rotation", "quantvsr") and (whole["method"], whole["base"]) == ("quantvsr", "quantvsr")
    differ = {key for key, value in whole["spec"]["settings"].items() if own["spec"]["settings"][key] != value}
    assert differ == {"branch", "refine", "lba"} and own["spec"] | {"settings": {}} == whole["spec"] | {"settings": {}}
    with (finished / "results" / "tables" / "cost.csv").open() as file:
        cost = {row["method"]: row for row in csv.DictReader(file)}
    assert float(cost["rotation"]["rank_mean"]) == 0 < float(cost["quantvsr"]["rank_mean"])
    assert "\n- rotation: quantvsr with branch=false, lba=false, refine=false.\n" in (finished / "results/tables/metrics.md").read_text()
    arguments = ["--config", "results/config.json", "--method", "quantvsr", "--bits", "W4A4", "--calibration", "results/calibration"]
    changes = [f"--set=method.quantvsr.{key}=false" for key in sorted(differ)]
    done = tiny.stage(finished, "quantize", *arguments, *changes, "--out", "other.safetensors")
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_header(finished / "other.safetensors")["content"] == own["content"]


def test_nothing_is_left_to_do_and_nothing_is_left_over(finished):
    done = tiny.snakemake(finished, "--dry-run")
    assert "Nothing to be done" in done.stdout + done.stderr
    hidden = {file.name for file in (finished / "results").rglob(".*")}
    assert hidden <= {".snakemake_timestamp"}


def test_a_dry_run_loads_nothing_heavy(finished):
    """What keeps it within a second or two: a time by itself would measure the machine."""
    code = "import sys; from snakemake.cli import main\ntry: main()\nexcept SystemExit as end: print(end.code, sorted(HEAVY & set(sys.modules)))"
    heavy = 'HEAVY = {"torch", "torchvision", "pyiqa", "cv2", "av", "matplotlib", "safetensors"}\n'
    arguments = tiny.snakemake_command("--dry-run")[3:]
    done = subprocess.run(
        [sys.executable, "-c", heavy + code, *arguments], cwd=finished, env=tiny.environment(), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr


def test_the_same_files_byte_for_byte_when_run_twice(finished, tmp_path):
    again = tiny.make(tmp_path / "project")
    done = tiny.snakemake(again)
    assert done.returncode == 0, done.stdout + done.stderr
    compare(tiny.outputs(finished), tiny.outputs(again))


def test_killed_three_times_and_resumed(finished, tmp_path):
    project = tiny.make(tmp_path / "project")
    note = kill_and_resume(project, "tiny", "results")
    compare(tiny.outputs(finished), tiny.outputs(project), note)


@pytest.mark.timeout(1800)
def test_smoke_killed_three_times_and_resumed(tmp_path):
    """The run of ``make smoke`` itself: the trained weights on a real clip."""
    whole, killed = tiny.make_smoke(tmp_path / "whole"), tiny.make_smoke(tmp_path / "killed")
    done = tiny.snakemake(whole, config="smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    note = kill_and_resume(killed, "smoke", "results/smoke")
    compare(tiny.outputs(whole, "results/smoke"), tiny.outputs(killed, "results/smoke"), note)


def kill_and_resume(project: Path, config: str, results: str) -> str:
    """Kill a run with SIGKILL at three random moments, then let it end.

    Twice everything dies at once (a machine that is switched off), once only Snakemake does and its jobs go on for a while.

    Returns:
        the seed that repeats these moments, for messages.
    """
    seed = int(os.environ.get("QVSR_KILL_SEED", random.SystemRandom().randrange(2**32)))
    note = f"QVSR_KILL_SEED={seed}"
    draw = random.Random(seed)
    jobs_done = sorted(draw.sample(range(12), 3))  # of 20 or so: each kill comes this many jobs after the first start, and a moment later
    orphans = draw.randrange(3)
    for kill in range(3):
        running = subprocess.Popen(
            tiny.snakemake_command(config=config),
            cwd=project,
            env=tiny.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while tiny.done(project / results) < jobs_done[kill] and running.poll() is None:
            time.sleep(0.05)
        time.sleep(draw.uniform(0.3, 1.5))
        assert running.poll() is None, f"it ended before it was killed for the {kill + 1}. time; {note}"
        if kill == orphans:
            os.kill(running.pid, signal.SIGKILL)
        else:
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    done = tiny.snakemake(project, config=config)
    assert done.returncode == 0, f"{note}\n{done.stdout}{done.stderr}"
    return note


def test_two_recordings_of_one_calibration_at_once(finished, tmp_path):
    """A job that outlived its workflow beside the one that replaces it: both end, in the same files."""
    out = tmp_path / "out" / "calibration"
    command = [
        sys.executable,
        "-m",
        "qvsr",
        "calibrate",
        "--config",
        "results/config.json",
        "--out",
        str(out),
        "results/clips/calibration/LQ/run",
    ]
    both = [
        subprocess.Popen(command, cwd=finished, env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for one in both:
        text, _ = one.communicate()
        assert one.returncode == 0, text
    recorded = {file.name: file.read_bytes() for file in out.iterdir()}
    assert recorded == {file.name: file.read_bytes() for file in (finished / "results" / "calibration").iterdir() if file.name[0] != "."}
    assert [file.name for file in out.parent.iterdir()] == ["calibration"]


def compare(expected: dict[str, bytes], found: dict[str, bytes], note: str = "") -> None:
    assert sorted(found) == sorted(expected), note
    assert [name for name in expected if found[name] != expected[name]] == [], note
