"""Trains the small backbone again."""

from __future__ import annotations

from pathlib import Path

from qvsr.config import Config
from qvsr.provenance import atomic_path


class TrainStageError(ValueError):
    """Training that did not come to its end."""


def run(config: Config, weights: Path, vae_weights: Path, state: Path, seconds: float | None) -> None:
    """Train all stages and write the weights; what a stopped run has done is kept.

    Args:
        weights, vae_weights: safetensors to write, official key names.
        state: folder of photographs, prepared clips, states, curves and ``evaluation.json``; the same folder resumes.
        seconds: stop after about this time with everything saved; None trains to the end.
    """
    from qvsr.training.photographs import collect, collect_folder, read_table
    from qvsr.training.train import train

    photographs = state / "photographs"
    if config.training.photographs is not None:  # again at each call: somebody may have added some
        with atomic_path(photographs) as partial:
            collect_folder(config.training.photographs, partial)
    elif (photographs / "photographs.csv").is_file():
        read_table(photographs)
    else:
        collect(photographs, progress=print)
    backbone = config.backbone.model_copy(update={"weights": weights, "vae_weights": vae_weights})
    if not train(backbone, config.training, photographs, state, seconds):
        raise TrainStageError(f"training stopped after {seconds:g} s with its state saved in {state}; the same command goes on")
