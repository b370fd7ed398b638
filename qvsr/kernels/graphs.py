"""CUDA graphs: a network's call is recorded once and replayed, so that a GPU need not wait for Python to start some thousand kernels.

A recording holds for fixed shapes, for the tensors that the network has, and for what Python decided on the way: a quantized layer with ranges
by timestep reads another row of its table at each, so there is a recording for each stretch of timesteps that share their rows. Segments and tiles
of a clip replay it. Recordings share their memory, so only one is replayed at a time, on one stream.

:func:`recorded` decides for a network; :class:`Graphed` does it. A call that cannot be recorded is made as it is, and that is said once.
"""

from __future__ import annotations

import logging
import weakref
from bisect import bisect_left
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- networks


def recorded(network: Any) -> Callable[..., Any]:
    """A network's calls, ``(…, timestep=…)``: replays where it is packed on a GPU and nobody looks into it, plain calls elsewhere.

    Recordings are kept with the network and used as long as its tensors are what they were: ask again after changing it.
    """

    def plain(*arguments: Any, timestep: int) -> Any:
        return network(*arguments)

    bounds = _bounds(network)
    if bounds is None:
        return plain
    found = _recorded.get(network)
    if found is None or not found[0].is_of(network):
        this = weakref.proxy(network)  # the recordings must not keep it alive
        found = _recorded[network] = _Tensors(network), Graphed(lambda *arguments: this(*arguments))
    graphed = found[1]
    return lambda *arguments, timestep: graphed(*arguments, key=bisect_left(bounds, timestep))


def _bounds(network: Any) -> list[int] | None:
    """The last timesteps of the stretches in which calls differ in nothing but numbers; None: they are not to be recorded.

    A hook would not see what is replayed. That of :func:`qvsr.quant.apply.follow_timesteps` need not: it names the bounds of its tables.
    """
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    if first is None or not first.is_cuda:
        return None
    modules = list(network.modules())
    hooks = [hook for one in modules for hook in (*one._forward_pre_hooks.values(), *one._forward_hooks.values())]
    if not any(getattr(one, "execution", None) == "packed" for one in modules) or not all(hasattr(hook, "bounds") for hook in hooks):
        return None
    return sorted({bound for hook in hooks for bound in hook.bounds})  # type: ignore[attr-defined]


class _Tensors:
    """Which tensors a network has, where they lie, and how often they were written to: recordings read from there."""

    def __init__(self, network: nn.Module) -> None:
        tensors = self._list(network)
        self.them = [weakref.ref(one) for one in tensors]
        self.facts = [(one.data_ptr(), one._version) for one in tensors]

    def is_of(self, network: nn.Module) -> bool:
        tensors = self._list(network)
        return (
            len(tensors) == len(self.them)
            and all(ref() is one for ref, one in zip(self.them, tensors, strict=True))
            and [(one.data_ptr(), one._version) for one in tensors] == self.facts
        )

    @staticmethod
    def _list(network: nn.Module) -> list[Tensor]:
        return [*network.parameters(), *network.buffers()]


# ---------------------------------------------------------------- calls


class Graphed:
    """A function whose calls are recorded and replayed where that is possible, and made as they are elsewhere.

    The first call of a kind is made as it is; so nothing is recorded that is not called again. The second one is recorded.

    Args:
        function: of tensors, and of lists, tuples and dictionaries of them; it must not read values back from the device, and draw no random numbers.
        most: recordings that are kept; calls beyond are made as they are.
    """

    def __init__(self, function: Callable[..., Any], most: int = 128) -> None:
        self.function, self.most = function, most
        self.recordings: dict[Any, tuple[Any, Any]] = {}  # graph and outputs
        self.inputs: dict[Any, list[Tensor]] = {}  # by shapes: recordings read the same ones
        self.met: set[Any] = set()
        self.stream: Any = None
        self.pool: Any = None
        self.failed: str | None = None

    def __call__(self, *arguments: Any, key: Hashable = None) -> Any:
        """The function's result, in tensors of its own.

        Args:
            key: what else than shapes a recording depends on.
        """
        tensors, structure = pytree.tree_flatten(arguments)
        if self.failed or torch.is_grad_enabled() or not all(isinstance(one, Tensor) and one.is_cuda for one in tensors):
            return self.function(*arguments)
        shapes = (str(structure), *((tuple(one.shape), one.stride(), one.dtype, one.device) for one in tensors))
        kind = (key, shapes)
        if kind not in self.recordings:
            if kind not in self.met or len(self.recordings) >= self.most:
                self.met.add(kind)
                return self.function(*arguments)
            if shapes not in self.inputs:
                self.inputs[shapes] = [torch.empty_like(one) for one in tensors]
        for mine, one in zip(self.inputs[shapes], tensors, strict=True):
            mine.copy_(one)
        if kind not in self.recordings:
            try:
                self.recordings[kind] = self._record(pytree.tree_unflatten(self.inputs[shapes], structure), tensors[0].device)
            except (RuntimeError, ValueError) as error:  # of CUDA, or of a layer that is not ready
                self._give_up(error)
                return self.function(*arguments)
        graph, outputs = self.recordings[kind]
        graph.replay()
        return pytree.tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, outputs)

    def _record(self, arguments: Any, device: torch.device) -> tuple[Any, Any]:
        """On a stream of our own, as it must be. The call before the recording makes what is made once: layers' tables, libraries' plans."""
        here = torch.cuda.current_stream(device)
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):  # which is left again when a recording fails: torch.cuda.graph would stay in it
            self.function(*arguments)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                outputs = self.function(*arguments)
        here.wait_stream(self.stream)
        self.pool = graph.pool()
        return graph, outputs

    def _give_up(self, error: BaseException) -> None:
        while error.__context__ is not None:  # the end of a recording that failed fails as well, and says less
            error = error.__context__
        self.failed = (str(error).splitlines() or [type(error).__name__])[0]
        self.recordings.clear()
        self.inputs.clear()
        log.warning("calls are not recorded as CUDA graphs: %s", self.failed)


_recorded: weakref.WeakKeyDictionary[nn.Module, tuple[_Tensors, Graphed]] = weakref.WeakKeyDictionary()
