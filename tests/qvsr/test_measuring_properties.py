"""What holds for every metric and clip: a clip with itself is ideal; chunks, order and shards do not matter."""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics  # noqa: F401 (fills the registry)
from qvsr import protocols, results
from qvsr.data import clips
from qvsr.measuring import measure_clip
from qvsr.registry import METRICS
from qvsr.results import Context
from tests.qvsr.test_measuring import waves

STRICT = protocols.read("strict-v1")
COMPUTED = [name for name in METRICS if not METRICS[name].facts.get("weights") and METRICS[name].facts["frames"] != "clip"]
COMPARED = [name for name in COMPUTED if METRICS[name].facts["needs"] != "none"]
CONTEXT = Context(backbone="", method="mine", bits="W4A4", seed=42, dataset="real", clip="a")


def written(folder: Path, name: str, seed: int, frames: int) -> clips.Source:
    clips.write_clip(folder / name, waves(seed, frames), {"source": "waves"})
    return clips.open_clip(folder / name)


def ideal(name: str) -> float:
    """Of a metric that compares: infinite decibels, a similarity of 1, an error of 0."""
    facts = METRICS[name].facts
    return (math.inf if facts["unit"] == "dB" else 1.0) if facts["higher_is_better"] else 0.0


@pytest.mark.parametrize("name", COMPARED)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(2, 3))
def test_a_clip_with_itself_is_ideal(name: str, seed: int, frames: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        same = written(Path(folder), "a", seed, frames)
        (row,) = measure_clip(same, same, same, [name], CONTEXT, STRICT)
    assert row.value == pytest.approx(ideal(name), abs=1e-6)  # a deviation of float32 ones


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(2, 5), chunk=st.integers(1, 5))
def test_chunks_do_not_matter(seed: int, frames: int, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pred, gt, fp = (written(Path(folder), name, seed + index, frames) for index, name in enumerate(("pred", "gt", "fp")))
        whole = measure_clip(pred, gt, fp, COMPUTED, CONTEXT, STRICT, chunk=frames)
        assert measure_clip(pred, gt, fp, COMPUTED, CONTEXT, STRICT, chunk=chunk) == whole  # bit for bit
    assert all(len(row.per_frame) == frames - (METRICS[row.metric].facts["frames"] == "pairs") for row in whole)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), number=st.integers(2, 4), cut=st.integers(0, 4))
def test_order_and_shards_of_clips_do_not_matter(seed: int, number: int, cut: int) -> None:
    names = ["psnr", "ewarp_dis"]
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = {
            f"clip{index}": (
                written(folder / "pred", f"{index}", seed + index, 2),
                written(folder / "gt", f"{index}", seed + index + 100, 2),
            )
            for index in range(number)
        }

        def measure(chosen: list[str]) -> list[results.Row]:
            return [
                row for clip in chosen for row in measure_clip(*pairs[clip], None, names, CONTEXT.model_copy(update={"clip": clip}), STRICT)
            ]

        whole = measure(list(pairs))
        shuffled = rng.sample(list(pairs), number)
        shards = [shuffled[: min(cut, number)], shuffled[min(cut, number) :]]
        files = []
        for index, shard in enumerate(shards):
            if shard:
                files.append(folder / f"{index}.jsonl")
                results.write(files[-1], measure(shard))
        rng.shuffle(files)
        assert results.aggregate(results.read(*files)) == results.aggregate(whole)
