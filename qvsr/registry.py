"""Named plug-ins: one decorator to add, one error message when a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


class UnknownNameError(ValueError):
    """A name that is in no list; the message says what would have worked."""


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
