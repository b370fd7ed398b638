"""pyiqa's learned metrics, built from files that are given: nothing is downloaded, nothing unpickled."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from metrics._frames import MetricError

Options = tuple[tuple[str, Any], ...]
Builder = Callable[..., nn.Module]


def network(build: Builder, weights: Mapping[str, Path], **options: Any) -> nn.Module:
    """A network in evaluation mode, built once as long as its files stay the same.

    Args:
        build: gets the paths by name and the options.
        weights: files by their name in config/assets.yaml.
    """
    files = tuple((name, str(path), path.stat().st_size, path.stat().st_mtime_ns) for name, path in sorted(weights.items()))
    return _network(build, files, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=8)
def _network(build: Builder, files: tuple[tuple[str, str, int, int], ...], options: Options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that call each other in ways that are deprecated
        built = build({name: Path(path) for name, path, _, _ in files}, **dict(options))
    return built.requires_grad_(False).eval()


def read_state(metric: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without the prefix that parallel training leaves.

    Raises:
        MetricError: no file of torch, or one that holds more than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zipfile or torch, by what is wrong
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise MetricError(f"{metric}: {path.name} cannot be read as weights ({reason}); get it again") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MetricError(f"{metric}: {path.name} is not a table of tensors; get it again")
    return {key.removeprefix("module."): value for key, value in state.items()}


def fill(metric: str, target: nn.Module, state: Mapping[str, Tensor], file: str, **how: Any) -> None:
    """Load all tensors of a network.

    Raises:
        MetricError: one is missing, unknown or of another shape; names the file and the first.
    """
    own = target.state_dict()
    for key in (*own, *state):
        if key not in state or key not in own or own[key].shape != state[key].shape:
            here, there = (tuple(one[key].shape) if key in one else "none" for one in (own, state))
            raise MetricError(f"{metric}: {file} does not fit the network: {key} is {there}, {here} is needed")
    target.load_state_dict(state, **how)


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Another value for a name of a module: how pyiqa's constructors, which download, get what they would have downloaded."""
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)


def each_frame(metric: nn.Module, *clips_TCHW: Tensor) -> Tensor:
    """A network's value of one frame after the other, so that values do not depend on how a clip is cut; value_T in float64."""
    with torch.inference_mode():
        values = [metric(*(clip[t : t + 1].float() for clip in clips_TCHW)).reshape(()).double() for t in range(len(clips_TCHW[0]))]
    return torch.stack(values)


def check_size(metric: str, frames_TCHW: Tensor, height: int, width: int) -> None:
    """Refuse frames that a network cannot take."""
    if frames_TCHW.shape[-2] < height or frames_TCHW.shape[-1] < width:
        raise MetricError(f"{metric}: frames are {frames_TCHW.shape[-2]}x{frames_TCHW.shape[-1]}, at least {height}x{width} is needed")


def check_values(metric: str, value_T: Tensor, why: str) -> Tensor:
    """Refuse NaN, naming the first frame that gives it."""
    bad = value_T.isnan().nonzero()
    if len(bad):
        raise MetricError(f"{metric}: frame {int(bad[0])} has no value: {why}")
    return value_T
