"""Learned perceptual image patch similarity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from metrics._frames import MetricError, check_pair
from metrics._pyiqa import check_size, each_frame, fill, network, read_state
from qvsr.registry import METRICS

TRUNKS = {"alex": "alexnet"}
VERSIONS = ("0.1", "0.0")
SMALLEST = 32  # pixels of a side; the last pooling has nothing left below 31


class Lpips(nn.Module):
    """The lpips package's network for frames in [0, 1]; its linear heads lie in the package, the trunk in a file of torchvision's."""

    def __init__(self, weights: Mapping[str, Path], net: str, version: str) -> None:
        super().__init__()
        import lpips as package

        self.network = package.LPIPS(net=net, version=version, pnet_rand=True, verbose=False)  # pnet_rand: the trunk is not downloaded
        file = weights[TRUNKS[net]]
        state = read_state("lpips", file)
        names = {key: f"features.{key.split('.', 1)[1]}" for key in self.network.net.state_dict()}  # slice2.3.weight: features.3.weight
        fill("lpips", self.network.net, {key: state[name] for key, name in names.items() if name in state}, file.name)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.network(2 * pred - 1, 2 * target - 1)


@METRICS.add("lpips", unit="", higher_is_better=False, needs="gt", frames="each", digits=4, licence="BSD-3-Clause", weights=("alexnet",))
def lpips(pred_TCHW: Tensor, target_TCHW: Tensor, *, net: str = "alex", version: str = "0.1", weights: Mapping[str, Path]) -> Tensor:
    """Distance of each frame from the target in the features of a classifier (Zhang et al., arXiv 1801.03924), by the lpips package.

    Features after five ReLUs, each divided by its norm over the channels; squared differences, weighted per channel by heads that
    were fitted to human judgements, averaged over positions and summed over the five. pyiqa's `lpips` has the same heads and gives
    the same values to float rounding; this package is the authors' own and its licence (BSD-2-Clause) is permissive.

    Args:
        pred_TCHW: restored frames, RGB in [0, 1]; scaled to [-1, 1] here. Nothing is resized or cropped.
        target_TCHW: ground truth, same shape and range.
        net: trunk; "alex" (AlexNet) is what papers report.
        version: of the heads, "0.1"; "0.0" is the first release, which did not scale its input.
        weights: "alexnet", torchvision's file of the trunk; a whole AlexNet or its `features` alone.
    Returns:
        lpips_T >= 0, float64; 0 where a frame is reproduced exactly, also a constant one.
    Raises:
        MetricError: shapes differ, NaN, values outside [0, 1], frames below 32x32, a damaged file of weights.
    """
    check_pair("lpips", pred_TCHW, target_TCHW)
    check_size("lpips", pred_TCHW, SMALLEST, SMALLEST)
    for what, value, known in (("net", net, TRUNKS), ("version", version, VERSIONS)):
        if value not in known:
            raise MetricError(f"lpips: no {what} {value!r}; known: {', '.join(known)}")
    return each_frame(network(Lpips, weights, net=net, version=version), pred_TCHW, target_TCHW)
