"""Times of several ways to compute the same thing, side by side, and the rows that say what they were.

Rounds alternate between the ways, every other round in reverse order: a busy machine, or one that becomes warm, slows all of them alike.
Every ratio is one of medians of the same rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

KINDS = ("layers", "unet", "clip")
HEAD = ".head.json"  # a file NAME.json has NAME.head.json beside it
MOST_ROUNDS = 200


class BenchError(ValueError):
    """Something that cannot be measured, or a file of measurements that cannot be read; the message says what would work."""


@dataclass(frozen=True)
class Variant:
    """One way to compute.

    Attributes:
        execution: float (torch's own layers), simulated or packed.
        bits: of weights and activations; 32 and 16 for float32 and bfloat16.
        channels_last: how a convolution's input, and in `float` its weight, lies in memory.
        half: whether what is not quantized is bfloat16.
    """

    name: str
    execution: str
    bits: int
    rank: int = 0
    channels_last: bool = False
    half: bool = False

    @property
    def precision(self) -> str:
        return f"W{self.bits}A{self.bits}"

    @property
    def bfloat16(self) -> bool:
        """Whether all that is not quantized is bfloat16."""
        return self.half or (self.execution == "float" and self.bits == 16)


FP32, FP32_LAST = Variant("fp32", "float", 32), Variant("fp32 channels last", "float", 32, channels_last=True)
BF16 = Variant("bf16", "float", 16, channels_last=True)


@dataclass(frozen=True)
class Row:
    """One measurement; a line of the JSON file.

    Attributes:
        name: of the layer, the network or the clip; of layers of one shape, the first in the network's order.
        kind: Linear, Conv1d, Conv2d, Conv3d, unet or clip.
        shape: of the layer's weight, of the network's input, or (frames, 3, height, width) of the restored clip.
        bits: W32A32 is float32, W16A16 bfloat16.
        execution: float, simulated or packed; backend: torch, or who computes packed layers: cpu or reference.
        seconds: median, with the quartiles beside it; of a clip: of the whole clip.
        seconds_fp32: median of the faster float32 layout in the same rounds; ratio_fp32: that over `seconds`, above 1 is faster.
        error: norm of the difference from simulated execution over its norm; None where nothing is compared.
        macs: multiply-accumulates of the layer; of all layers and attention products of one call; of all calls of the U-Net for a clip.
        variant: the row's name in tables, which says the layout and the branch too.
        input: shape of the layer's input; count: how many layers of the network are alike.
        together: whether the rounds alternated with float32; if not, the ratios are of another process of the same run.
        gops: 1e9 operations a second, two a multiply-accumulate; gb_s: 1e9 bytes a second of input, weight and output as the variant keeps them.
        roofline: share of the speed that this machine's measured peaks allow.
        peak_mb: most memory of a process that does only this, above what it had before the network was there; resident_mb: at rest.
        error_floor: the same difference of simulated execution from itself when its input moves by 1e-7: what a last digit does to a whole network.
        sqnr_db: `error` in decibels; psnr_db: of the frames, from simulated; psnr_fp_db: of the frames, from full precision.
        path: packed, reference or simulated: the doctor's word for how packed layers compute on this machine.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: str
    execution: str
    backend: str
    seconds: float
    seconds_fp32: float
    ratio_fp32: float
    error: float | None
    macs: int
    variant: str
    rank: int
    input: tuple[int, ...]
    count: int
    together: bool
    rounds: int
    seconds_q1: float
    seconds_q3: float
    ratio_bf16: float | None
    gops: float
    gb_s: float | None
    roofline: float | None
    peak_mb: float | None
    resident_mb: float | None
    error_floor: float | None
    sqnr_db: float | None
    psnr_db: float | None
    psnr_fp_db: float | None
    path: str
    device: str
    threads: int
    torch: str


@dataclass(frozen=True)
class Times:
    """Median and quartiles of one way's rounds.

    >>> Times.of([4.0, 1.0, 2.0, 3.0, 5.0])
    Times(median=3.0, q1=2.0, q3=4.0, rounds=5)
    """

    median: float
    q1: float
    q3: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, q1, q3, len(seconds))


def alternate(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int,
    most: int = MOST_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time each call in rounds of all of them; one round before the first is not counted.

    Args:
        seconds: rounds begin for about so long.
        least, most: rounds, whatever they take.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begun = clock()
    for number in range(most):
        if number >= least and clock() - begun >= seconds:
            break
        for name in list(calls)[:: -1 if number % 2 else 1]:
            start = clock()
            calls[name]()
            spent[name].append(clock() - start)
    return {name: Times.of(values) for name, values in spent.items()}


def weighted_geometric_mean(pairs: Iterable[tuple[float, float]]) -> float:
    """Of (ratio, weight).

    >>> round(weighted_geometric_mean([(2, 3), (8, 1)]), 6)  # (2³ · 8) ** ¼
    2.828427
    """
    pairs = list(pairs)
    return math.exp(math.fsum(weight * math.log(ratio) for ratio, weight in pairs) / math.fsum(weight for _, weight in pairs))


def decibels(error: float | None) -> float | None:
    """A relative error as signal over noise; None for no error at all, which no number of decibels is.

    >>> decibels(0.001), decibels(0.0)
    (60.0, None)
    """
    return -20 * math.log10(error) if error else None
