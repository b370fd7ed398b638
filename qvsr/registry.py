"""Named plug-ins: one decorator to add, one error message when a name is unknown.

Methods of other packages are found by their entry points, which name a module in the group ``qvsr.baselines``: reading the names imports
nothing, :func:`load_plugin` imports one when it is needed.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

PLUGINS = "qvsr.baselines"


class UnknownNameError(ValueError):
    """A name that is in no list; the message says what would have worked."""


class PluginError(ValueError):
    """An installed package whose method cannot be used; the message names the package."""


def suggest(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that is not known.

    >>> suggest("metric", "psrn", ["psnr", "ssim"])
    "no metric 'psrn'; did you mean psnr? known: psnr, ssim"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"no {kind} {name!r}; {hint}known: {', '.join(names) or 'none'}"


@dataclass(frozen=True)
class Entry:
    """A registered function and the facts given in its decorator."""

    name: str
    function: Callable[..., Any]
    facts: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@dataclass
class Registry:
    """Maps names to functions, with facts about each.

    >>> SHAPES = Registry("shape")
    >>> @SHAPES.add("square", sides=4)
    ... def square(): return "four"
    >>> SHAPES["square"](), SHAPES["square"].facts["sides"]
    ('four', 4)
    """

    kind: str
    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, name: str, **facts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            if name in self.entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice; give one of them another name")
            self.entries[name] = Entry(name, function, facts)
            return function

        return register

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            raise UnknownNameError(suggest(self.kind, name, self.entries))
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)


BASELINES = Registry("method")
METRICS = Registry("metric")


@dataclass(frozen=True)
class Plugin:
    """A method that an installed package offers; its module is not imported."""

    name: str
    package: str
    version: str
    entry: importlib.metadata.EntryPoint

    def __str__(self) -> str:
        return f"package {self.package} {self.version}"


@functools.cache
def plugins() -> dict[str, Plugin]:
    """Methods of installed packages by name.

    Raises:
        PluginError: two packages offer one name.
    """
    found: dict[str, Plugin] = {}
    for entry in importlib.metadata.entry_points(group=PLUGINS):
        package, version = (entry.dist.name, entry.dist.version) if entry.dist is not None else ("of no name", "")
        one = Plugin(entry.name, package, version, entry)
        other = found.setdefault(entry.name, one)
        if other.package != package:
            raise PluginError(f"{one}: its method {entry.name!r} is also that of {other}; uninstall one of them")
    return found


def load_plugin(name: str) -> None:
    """Import the package that offers a method, which registers it; nothing for a method of our own.

    Raises:
        PluginError: the package cannot be imported, or does not register what its entry point promises.
    """
    plugin = plugins().get(name)
    if plugin is None or name in BASELINES:
        return
    try:
        plugin.entry.load()
    except Exception as error:  # whatever a stranger's module does while it is imported
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise PluginError(
            f"{plugin}: its method {name!r} cannot be loaded from {plugin.entry.value} ({reason}); repair or uninstall it"
        ) from error
    if name not in BASELINES:
        raise PluginError(
            f"{plugin}: loading {plugin.entry.value} registers no method {name!r}; its decorator must be @BASELINES.add({name!r})"
        )
