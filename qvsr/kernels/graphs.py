"""CUDA graphs: a network's step is recorded once and replayed, so that a GPU need not wait for Python to start some thousand kernels.

A recording holds for fixed shapes, and for what Python decided on the way: a quantized layer with ranges by timestep reads another row of its table
at each, so a step of the sampling loop is recorded for each timestep, and segments and tiles replay it. Recordings share their memory, so
only one is replayed at a time, on one stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM = 2  # calls before a recording: layers put their weights in order, libraries choose their algorithms

log = logging.getLogger(__name__)


class Graphed:
    """A function whose calls are recorded and replayed where that is possible, and made as they are elsewhere.

    Args:
        function: of tensors, and of lists, tuples and dictionaries of them; it must not read values back from the device, and draw no random numbers.
        most: recordings that are kept; calls beyond are made as they are.
    """

    def __init__(self, function: Callable[..., Any], most: int = 128) -> None:
        self.function, self.most = function, most
        self.recorded: dict[Any, _Recording] = {}
        self.failed: str | None = None

    def __call__(self, *arguments: Any, key: Hashable = None) -> Any:
        """The function's result, in tensors of its own.

        Args:
            key: what else than shapes a recording depends on: the timestep.
        """
        tensors, structure = pytree.tree_flatten(arguments)
        if self.failed or torch.is_grad_enabled() or not all(isinstance(one, Tensor) and one.is_cuda for one in tensors):
            return self.function(*arguments)
        whole = (key, str(structure), *((tuple(one.shape), one.stride(), one.dtype, one.device) for one in tensors))
        found = self.recorded.get(whole)
        if found is None:
            if len(self.recorded) >= self.most:
                return self.function(*arguments)
            try:
                pool = next(iter(self.recorded.values())).graph.pool() if self.recorded else None
                found = self.recorded[whole] = _Recording(self.function, tensors, structure, pool)
            except RuntimeError as error:  # of CUDA, or of a function that waits for the device
                self.failed = str(error).splitlines()[0]
                log.warning("calls are not recorded as CUDA graphs: %s", self.failed)
                return self.function(*arguments)
        return found.replay(tensors)


class _Recording:
    def __init__(self, function: Callable[..., Any], tensors: list[Tensor], structure: Any, pool: Any) -> None:
        self.inputs = [one.clone(memory_format=torch.preserve_format) for one in tensors]
        arguments = pytree.tree_unflatten(self.inputs, structure)
        stream = torch.cuda.Stream(tensors[0].device)
        stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                function(*arguments)
        torch.cuda.current_stream(tensors[0].device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = function(*arguments)

    def replay(self, tensors: list[Tensor]) -> Any:
        for mine, one in zip(self.inputs, tensors, strict=True):
            mine.copy_(one)
        self.graph.replay()
        return pytree.tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, self.outputs)
