"""No quantization: the row that the others are compared with."""

from __future__ import annotations

from torch import nn

from qvsr.config import QuantSpec
from qvsr.quant.refine import Samples
from qvsr.registry import BASELINES


@BASELINES.add("full_precision", title="full precision", source="")
def full_precision(unet: nn.Module, calibration: Samples | None, spec: QuantSpec | None) -> nn.Module:
    """The network as it is; calibration and spec are not read."""
    return unet
