"""Deep image structure and texture similarity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from metrics._frames import MetricError, check_pair
from metrics._pyiqa import check_size, each_frame, fill, network, read_state, replaced
from qvsr.registry import METRICS

SMALLEST = 32  # pixels of a side; the features of the last stage are 16 times smaller


def build(weights: Mapping[str, Path]) -> nn.Module:
    """pyiqa's DISTS around a VGG16 of torchvision's, from its file; alpha and beta from theirs."""
    from pyiqa.archs import dists_arch
    from torchvision.models import vgg16

    state = read_state("dists", weights["vgg16"])
    with torch.device("meta"):  # its classifier is never used: 120 of 138 million parameters need no memory
        trunk = vgg16(weights=None)
    features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    fill("dists", trunk.features, features, weights["vgg16"].name, assign=True)
    with replaced(dists_arch, "models", SimpleNamespace(vgg16=lambda weights: trunk)):
        built = dists_arch.DISTS(pretrained=False)
    own = read_state("dists", weights["dists"])
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    if shapes != {"alpha": tuple(built.alpha.shape), "beta": tuple(built.beta.shape)}:
        raise MetricError(f"dists: {weights['dists'].name} holds {shapes}; alpha and beta of {tuple(built.alpha.shape)} are needed")
    built.load_state_dict(own, strict=False)  # the rest is the trunk
    return built


@METRICS.add(
    "dists",
    unit="",
    higher_is_better=False,
    needs="gt",
    frames="each",
    digits=4,
    licence="PolyForm-Noncommercial-1.0.0",
    weights=("vgg16", "dists"),
)
def dists(pred_TCHW: Tensor, target_TCHW: Tensor, *, weights: Mapping[str, Path]) -> Tensor:
    """Dissimilarity of structure and texture of each frame (Ding et al., arXiv 2004.07728), by pyiqa.

    One minus a weighted sum, over the channels of the image and of five stages of VGG16, of an SSIM-like comparison of means and of
    variances over all positions. Texture that is moved or redrawn costs little.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1]. Nothing is resized: the authors' own script shrinks the shorter side to 256, pyiqa
            and the papers that use it do not.
        target_TCHW: ground truth, same shape and range.
        weights: "vgg16", torchvision's file; "dists", the authors' alpha and beta.
    Returns:
        dists_T, float64; 0 where a frame is reproduced exactly, to float32 rounding of a sum close to 1 (about 1e-7 of either sign).
    Raises:
        MetricError: shapes differ, NaN, values outside [0, 1], frames below 32x32, a damaged file of weights.
    """
    check_pair("dists", pred_TCHW, target_TCHW)
    check_size("dists", pred_TCHW, SMALLEST, SMALLEST)
    return each_frame(network(build, weights), pred_TCHW, target_TCHW)
