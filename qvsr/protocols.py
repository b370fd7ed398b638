"""How a metric is computed: a protocol fixes every option of every metric, and its signature goes with each value."""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, model_validator

from qvsr.provenance import ROOT
from qvsr.registry import METRICS, Entry, suggest
from qvsr.settings import Settings

FOLDER = ROOT / "config" / "protocols"
WEIGHTS = "weights"  # keyword by which a metric gets the paths of its files
Option = bool | int | float | str


class ProtocolError(ValueError):
    """A protocol that does not fit the metrics or what is installed."""


class MetricProtocol(Settings):
    """One metric under a protocol."""

    implementation: str = Field(
        pattern=r"^[a-z0-9_-]+==[0-9][0-9a-z.]*$",
        description="package==version that computes it; qvsr==N where we do, with N the `version` that the metric's decorator states",
    )
    options: dict[str, Option] = Field(description="every keyword of the metric's function but `weights`, none left to a default")
    weights: dict[str, str] = Field(
        {}, description="files of weights by their name in config/assets.yaml, each with the first digits of its SHA-256"
    )
    clip_digits: int | None = Field(
        None, ge=0, description="decimals to which a clip's value is rounded before the mean over clips; null: none"
    )


class Protocol(Settings):
    """A named set of conventions, read from config/protocols/NAME.yaml.

    >>> strict = read("strict-v1")
    >>> strict.metrics["ssim"].options
    {'colour': 'rgb', 'crop': 0}
    """

    name: str
    range: str = Field(description="range of the values that metrics get")
    rounding: str = Field(description="how float frames become 8 bit: round or truncate")
    frames: str = Field(
        description="all: both sides must have the same frames of the same size; common: what is longer or larger is cut (last frames, right, bottom)"
    )
    average: str = Field(description="order of the means")
    metrics: dict[str, MetricProtocol]

    @model_validator(mode="after")
    def _known_conventions(self) -> Protocol:
        offered = {"range": ("0-1",), "rounding": ("round", "truncate"), "frames": ("all", "common"), "average": ("frames-then-clips",)}
        for key, values in offered.items():
            if getattr(self, key) not in values:
                raise ValueError(f"{key} is {getattr(self, key)!r}; known: {' | '.join(values)}")
        return self

    def options(self, metric: Entry) -> dict[str, Option]:
        """Keyword arguments of a metric's function, after a check that the protocol fixes all of them and no other.

        Raises:
            ProtocolError: the protocol has no such metric, an option is missing or unknown.
        """
        if metric.name not in self.metrics:
            raise ProtocolError(f"protocol {self.name}: {suggest('metric', metric.name, self.metrics)}")
        given = self.metrics[metric.name].options
        parameters = inspect.signature(metric.function).parameters.values()
        taken = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name != WEIGHTS]
        for name in given:
            if name not in taken:
                raise ProtocolError(f"protocol {self.name}, {metric.name}: {suggest('option', name, taken)}")
        for name in taken:
            if name not in given:
                raise ProtocolError(
                    f"protocol {self.name}, {metric.name}: option {name} is not fixed; add it to config/protocols/{self.name}.yaml"
                )
        needed = metric.facts.get(WEIGHTS, ())
        if set(self.metrics[metric.name].weights) != set(needed):
            found = ", ".join(self.metrics[metric.name].weights) or "none"
            raise ProtocolError(f"protocol {self.name}, {metric.name}: weights are {found}, the metric needs {', '.join(needed) or 'none'}")
        return dict(given)

    def signature(self, metric: str) -> str:
        """One line that says how a value came about; values of different signatures are not comparable.

        >>> read("strict-v1").signature("psnr")
        'psnr|strict-v1|impl:qvsr-1|colour:rgb|crop:0|eps:0.0|range:0-1|rounding:round|frames:all|average:frames-then-clips'
        """
        if metric not in self.metrics:
            raise ProtocolError(f"protocol {self.name}: {suggest('metric', metric, self.metrics)}")
        one = self.metrics[metric]
        facts: dict[str, object] = {"impl": one.implementation.replace("==", "-"), **dict(sorted(one.options.items()))}
        if one.weights:
            facts[WEIGHTS] = "+".join(f"{name}-{digest[:8]}" for name, digest in sorted(one.weights.items()))
        if one.clip_digits is not None:
            facts["clip_digits"] = one.clip_digits
        facts |= {"range": self.range, "rounding": self.rounding, "frames": self.frames, "average": self.average}
        return "|".join([metric, self.name, *(f"{key}:{value}" for key, value in facts.items())])

    def check_saved(self, rounding: str) -> None:
        """Refuse frames that were saved otherwise than the signature says.

        Args:
            rounding: how float frames became 8 bit, as in `sampling.rounding`.
        """
        if rounding != self.rounding:
            raise ProtocolError(
                f"sampling.rounding is {rounding}, protocol {self.name} measures frames saved with {self.rounding}: make them agree"
            )

    def check_installed(self, metric: str) -> None:
        """Refuse to measure with another version than the signature says; a program is asked for its version when it has run.

        Raises:
            ProtocolError: names the package, both versions and what to do.
        """
        package, _, wanted = self.metrics[metric].implementation.partition("==")
        if METRICS[metric].facts.get("program") == package:  # it lives in an environment of its own
            return
        found = METRICS[metric].facts["version"] if package == "qvsr" else installed(package)
        if found != wanted:
            raise ProtocolError(
                f"protocol {self.name}: {metric} is defined with {package} {wanted}, found {found}: install that version, "
                f"or write a protocol of another name with {package}=={found} and set protocol to it"
            )


def installed(package: str) -> str:
    """Version of an installed package; OpenCV by its own number, since several distributions carry it."""
    if package == "opencv":
        import cv2

        return str(cv2.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def read(name: str | Path) -> Protocol:
    """A protocol by name (a file below config/protocols) or by the path of a YAML file.

    Raises:
        ProtocolError: no such protocol, or a file that is none; one line.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ProtocolError(suggest("protocol", str(name), (file.stem for file in FOLDER.glob("*.yaml"))))
    try:
        return Protocol.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ProtocolError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"{path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None
