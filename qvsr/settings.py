"""The base of all settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

ReadIf = Mapping[str, tuple[Mapping[str, Any], ...]]


class UnknownKeyError(ValueError):
    """A key that is none of a class whose keys are not its fields alone."""

    def __init__(self, key: str, known: Sequence[str]) -> None:
        super().__init__(f"unknown key {key}")
        self.key, self.known = key, known


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    READ_IF: ClassVar[ReadIf] = {}  # keys that are read beside other settings only, see qvsr/method_settings.py
