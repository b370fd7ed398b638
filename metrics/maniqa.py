"""MANIQA, an image quality transformer on crops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from metrics._frames import MetricError, check_frames
from metrics._pyiqa import each_frame, fill, network, read_state, replaced
from qvsr.registry import METRICS

PLACES = ("grid", "random")


class Maniqa(nn.Module):
    """pyiqa's MANIQA, its vision transformer included in the one file."""

    def __init__(self, weights: Mapping[str, Path], crops: int, places: str, seed: int) -> None:
        super().__init__()
        import timm
        from pyiqa.archs import maniqa_arch

        def untrained(name: str, pretrained: bool) -> nn.Module:
            return timm.create_model(name, pretrained=False)  # every weight comes from the checkpoint

        with replaced(maniqa_arch, "timm", SimpleNamespace(create_model=untrained)):
            self.network = maniqa_arch.MANIQA(pretrained=False, train_dataset="koniq", scale=0.8, test_sample=crops)
        file = weights["maniqa-koniq"]
        fill("maniqa", self.network, read_state("maniqa", file), file.name)
        self.arch, self.crops = maniqa_arch, crops
        self.place = maniqa_arch.uniform_crop if places == "grid" else seeded(maniqa_arch.random_crop, seed)
        self.judged: dict[str, list[Tensor]] = {"fc_score": [], "fc_weight": []}  # of the patches of one crop after the other
        for name, outputs in self.judged.items():
            getattr(self.network, name).register_forward_hook(lambda _, given, output, outputs=outputs: outputs.append(output.flatten()))

    def forward(self, frame: Tensor) -> Tensor:
        """The network's own weighted mean over the patches of all crops, which it would hold in memory at once."""
        for outputs in self.judged.values():
            outputs.clear()
        for k in range(self.crops):
            with replaced(self.arch, "uniform_crop", lambda x, k=k, **how: self.place(x, **how)[k : k + 1]):
                self.network(frame)
        scores, weights = (torch.cat(outputs) for outputs in self.judged.values())
        return (weights * scores).sum() / (weights.sum() + 1e-8)


def seeded(crop: Callable[..., Tensor], seed: int) -> Callable[..., Tensor]:
    """pyiqa's random crops, from a seed of their own; the global generator that they draw from is left as it was."""

    def draw(x: Tensor, crop_size: int, crop_num: int) -> Tensor:
        state = np.random.get_state()  # noqa: NPY002 (pyiqa draws from the global generator)
        np.random.seed(seed)  # noqa: NPY002
        try:
            return crop(x, crop_size=crop_size, crop_num=crop_num)
        finally:
            np.random.set_state(state)  # noqa: NPY002

    return draw


@METRICS.add(
    "maniqa",
    unit="",
    higher_is_better=True,
    needs="none",
    frames="each",
    digits=4,
    licence="PolyForm-Noncommercial-1.0.0",
    weights=("maniqa-koniq",),
)
def maniqa(pred_TCHW: Tensor, *, crops: int = 20, places: str = "grid", seed: int = 0, weights: Mapping[str, Path]) -> Tensor:
    """MANIQA of each frame (Yang et al., arXiv 2204.08958), trained on KonIQ-10k, by pyiqa.

    A weighted mean over the patches of square crops of 224 pixels. A frame whose shorter side has no more is enlarged to 225 first.

    Where the crops lie decides the third digit. pyiqa 0.1.16 places them on a grid: for 20 crops the first four rows of five by five,
    so that the bottom is left out. pyiqa 0.1.10, which the paper names, draws them at random from numpy's global generator; values then
    depend on everything that drew before. Here the draws begin anew from `seed` with every frame: all frames of a size, of all methods,
    get the same crops, in any order and any chunks, and a difference between two methods is not one of crops.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1], at their own size.
        crops: how many; each is a pass through a large network, 20 take about a minute of one core.
        places: "grid" or "random".
        seed: of the random places; a grid has none to draw.
        weights: "maniqa-koniq", the authors' file.
    Returns:
        maniqa_T, float64, about 0 to 1; a constant frame has a value too.
    Raises:
        MetricError: NaN, values outside [0, 1], a damaged file of weights.
    """
    check_frames("maniqa", pred_TCHW)
    if places not in PLACES:
        raise MetricError(f"maniqa: no places {places!r}; known: {', '.join(PLACES)}")
    if crops < 1:
        raise MetricError(f"maniqa: {crops} crops; at least 1 is needed")
    return each_frame(network(Maniqa, weights, crops=crops, places=places, seed=seed), pred_TCHW)
