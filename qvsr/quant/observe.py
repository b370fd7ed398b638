"""Look at the inputs of layers while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def observe_inputs(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the block, `see(name, input)` is called before each call of each layer; the hooks are removed at its end.

    Args:
        layers: modules by name, such as :func:`qvsr.quant.apply.quantizable` returns.
        see: gets the layer's name and its input, detached; it must not change the input.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: see(name, inputs[0].detach())

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
