"""CLIP-IQA: how much a frame looks like "a good image" to CLIP."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from metrics._frames import check_frames
from metrics._pyiqa import check_size, each_frame, network, read_state, replaced
from qvsr.registry import METRICS

SMALLEST = 32  # pixels of a side; the network reduces by 32


def read_clip(path: Path) -> dict[str, Tensor]:
    """Tensors of CLIP. OpenAI publishes a TorchScript archive, which `torch.load` refuses with weights_only; it holds no pickled Python."""
    try:
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except RuntimeError:  # a table of tensors, as other programs save it
        return read_state("clipiqa", path)


@contextmanager
def packaging_found() -> Iterator[None]:
    """The package clip takes `packaging` from pkg_resources, which setuptools has no more since 82: it gets it all the same."""
    if importlib.util.find_spec("pkg_resources") is not None:
        yield
        return
    import packaging.version

    sys.modules["pkg_resources"] = ModuleType("pkg_resources")
    sys.modules["pkg_resources"].packaging = packaging  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]


def build(weights: Mapping[str, Path]) -> nn.Module:
    """pyiqa's CLIP-IQA around a CLIP of ours."""
    with packaging_found():
        from pyiqa.archs import clip_model, clipiqa_arch

    clip = clip_model.build_model(read_clip(weights["clip-rn50"])).float()
    with replaced(clipiqa_arch, "load", lambda *_: clip):
        return clipiqa_arch.CLIPIQA()


@METRICS.add(
    "clipiqa",
    unit="",
    higher_is_better=True,
    needs="none",
    frames="each",
    digits=4,
    licence="PolyForm-Noncommercial-1.0.0",
    weights=("clip-rn50",),
)
def clipiqa(pred_TCHW: Tensor, *, weights: Mapping[str, Path]) -> Tensor:
    """CLIP-IQA of each frame (Wang et al., arXiv 2207.12396), by pyiqa: CLIP with a ResNet-50, without its positional embedding.

    The probability of the first of two opposite prompts, averaged over five pairs (good/bad, sharp/blurry, sharp/blurry edges, high/low
    resolution, noise-free/noisy): pyiqa's choice, the paper's is one pair. Very sensitive to small changes of colour: frames that went
    through a video of YUV score differently.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1], at their own size.
        weights: "clip-rn50", OpenAI's file.
    Returns:
        clipiqa_T in [0, 1], float64; a constant frame has a value too.
    Raises:
        MetricError: NaN, values outside [0, 1], frames below 32x32, a damaged file of weights.
    """
    check_frames("clipiqa", pred_TCHW)
    check_size("clipiqa", pred_TCHW, SMALLEST, SMALLEST)
    return each_frame(network(build, weights), pred_TCHW)
