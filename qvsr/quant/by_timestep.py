"""One layer in several quantized forms, of which the timestep of the network call picks one.

Factors that scale the input channels by timestep also scale the weight by timestep, and integers rounded for one set of factors are wrong
for another: so every group of timesteps has integers of its own. A layer with S groups takes S times the storage of its weight, and one
form's operations a call; the cost table counts it as S layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qvsr.quant.layer import QuantError, Timestep


def row_of(timestep: int | Tensor, bounds: Sequence[int]) -> int:
    """The group of a timestep: the first whose upper bound is at least it, the last beyond all.

    Raises:
        QuantError: a tensor whose entries differ.

    >>> [row_of(t, (500, 1000)) for t in (0, 500, 501, 2000)]
    [0, 0, 1, 1]
    """
    if isinstance(timestep, Tensor):
        values = timestep.unique()
        if values.numel() != 1:
            raise QuantError(f"groups of timesteps need one timestep a call, found {values.tolist()}")
        timestep = int(values)
    return next((index for index, bound in enumerate(bounds) if timestep <= bound), len(bounds) - 1)


class ByTimestep(nn.Module):
    """S forms of one layer; :func:`qvsr.quant.apply.follow_timesteps` tells it the timestep.

    Args:
        rows: S layers; a checkpoint's loader first gives the full-precision one S times.
        bounds: S upper bounds of the timestep groups in rising order.
    """

    def __init__(self, rows: Sequence[nn.Module], bounds: Sequence[int], name: str = "layer") -> None:
        super().__init__()
        if len(rows) != len(bounds) or list(bounds) != sorted(set(bounds)):
            raise QuantError(f"{name}: {len(rows)} forms do not fit the rising timesteps {list(bounds)}")
        self.rows, self.bounds, self.name = nn.ModuleList(rows), tuple(bounds), name
        self.timestep = Timestep()

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`qvsr.quant.layer.QuantLayer.forward` of the form that belongs to the timestep."""
        if self.timestep.value is None:
            raise QuantError(f"{self.name}: its form depends on the timestep, and none was set (qvsr.quant.apply.follow_timesteps)")
        result: Tensor = self.rows[row_of(self.timestep.value, self.bounds)](x)
        return result
