"""Settings of the quantization methods, a class a method; :class:`MethodSettings` holds one of each.

The defaults are those of the papers or, where a paper says nothing, of their released code; ``config/default.yaml`` reduces counts for the small model.
A field that says how much work a method does (updates, samples, iterations, ranks) is marked with ``json_schema_extra=EFFORT``: a row whose value is
below the default is called *reduced* in the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from qvsr.registry import plugins
from qvsr.settings import ReadIf, Settings, UnknownKeyError

# What a method does not read is refused, not ignored: a class whose settings count only beside others says which in `READ_IF`, keys (several
# separated by spaces) and what must hold of the others. True stands for "switched on" (true, or a number above 0); all conditions of a mapping
# must hold, and of several mappings one suffices. Refused is a key that somebody wrote (qvsr.plan.check_read), never a default, and never
# `false`, which leaves off what is off anyway.

EFFORT: Any = {"effort": True}


class QuantVSRSettings(Settings):
    """QuantVSR (arXiv 2508.04485), whose parts can be switched off, and what goes beyond it, which can be switched on."""

    READ_IF: ClassVar[ReadIf] = {
        "stca refine rank_min": ({"branch": True},),
        "rank_max rank_multiple quantile": ({"branch": True, "stca": True},),
        "refine_updates": ({"branch": True, "refine": True},),
        "lba_updates": ({"lba": True, "bias": "trained"},),
        "accumulate learning_rate weight_decay": ({"branch": True, "refine": True}, {"lba": True, "bias": "trained"}),
        "limit_ranks": ({"branch": True},),
        "act_clip_power": ({"act_clip": True},),
        "refresh_ranges": ({"branch": True, "refine": True},),
        "gptq_rows": ({"residual": "gptq"},),
        "stca_search": ({"branch": True, "stca": True},),
        "bias bias_by_step": ({"lba": True},),
        "mixed_span mixed_budget mixed_idle": tuple({"mixed": which} for which in ("weights", "activations", "both")),
    }
    channel_split: bool = Field(True, description="two halves of the input channels with a scale of their own")
    rotation: bool = Field(True, description="Hadamard rotation of the input channels before rounding")
    branch: bool = Field(True, description="the full-precision low-rank branch")
    stca: bool = Field(True, description="rank by spatio-temporal complexity; else rank_min everywhere")
    refine: bool = Field(True, description="train L1 and L2")
    lba: bool = Field(True, description="learnable bias alignment")
    rank_min: int = Field(16, ge=1, description="smallest rank of a branch", json_schema_extra=EFFORT)
    rank_max: int = Field(64, ge=1, description="largest rank of a branch", json_schema_extra=EFFORT)
    rank_multiple: int = Field(8, ge=1, description="ranks are multiples of this")
    quantile: float = Field(0.25, gt=0, lt=0.5, description="lower threshold of both complexities; the upper is 1 - quantile")
    refine_updates: int = Field(
        900, ge=0, description="optimizer steps of the refinement, each over `accumulate` samples", json_schema_extra=EFFORT
    )
    lba_updates: int = Field(
        900, ge=0, description="optimizer steps of the bias alignment, each over `accumulate` samples", json_schema_extra=EFFORT
    )
    accumulate: int = Field(4, ge=1, description="calibration samples of one optimizer step", json_schema_extra=EFFORT)
    learning_rate: float = Field(1e-3, gt=0, description="of refinement and bias alignment")
    weight_decay: float = Field(0.01, ge=0, description="of refinement and bias alignment")
    samples: int | None = Field(
        None, ge=1, description="at most this many calibration samples, evenly spaced; null: all", json_schema_extra=EFFORT
    )
    limit_ranks: bool = Field(
        False,
        description="give a layer whose weight cannot have its rank the highest it can, as the released code does; else such a rank is refused",
    )
    act_clip: bool = Field(
        False, description="beyond the paper: narrow each layer's dynamic activation range by a factor found on calibration samples"
    )
    act_clip_power: float = Field(
        3.0, ge=1, le=10, description="act_clip: of the rounding error that the factor minimises; 2 cuts off too much"
    )
    weight_ranges: Literal["minmax", "searched"] = Field(
        "minmax", description="weight ranges from minimum to maximum, or beyond the paper those of least rounding error"
    )
    refresh_ranges: bool = Field(
        False,
        description="beyond the paper: weight ranges follow the residual while L1 and L2 are trained; as published they stay, and cut it off",
    )
    residual: Literal["rtn", "gptq"] = Field(
        "rtn", description="what the branch leaves to nearest, or beyond the paper by GPTQ on rounded inputs"
    )
    gptq_rows: int = Field(512, ge=0, description="input vectors of each call of a layer that enter its Hessian; 0: all")
    stca_search: bool = Field(
        False, description="beyond the paper: both thresholds of the ranks by search, with a branch no larger than at `quantile`"
    )
    bias: Literal["trained", "measured"] = Field(
        "trained", description="the alignment by gradient steps, or beyond the paper from the mean error of each channel, layer after layer"
    )
    bias_by_step: bool = Field(False, description="beyond the paper: a bias for each recorded timestep instead of one; folds into a table")
    mixed: Literal["none", "weights", "activations", "both"] = Field(
        "none", description="beyond the paper: bits layer by layer, their average at most those of the row"
    )
    mixed_span: int = Field(2, ge=1, le=6, description="mixed: bits up to this many below and above the row's, within 2 to 8")
    mixed_budget: Literal["bits", "operations"] = Field(
        "bits",
        description="mixed: average weight bits over weights and activation bits over multiply-accumulates, each by itself (bits); "
        "or both chosen together so that the larger of the two keeps that average too, which is what the cost table counts (operations)",
    )
    mixed_idle: Literal["free", "nominal"] = Field(
        "free", description="mixed: layers that do not reach the output pay for others (free), or keep the row's bits (nominal)"
    )
    loss_weight: Literal["equal", "x0", "latent"] = Field(
        "equal",
        description="calibration samples count alike, or beyond the paper by how far an error of the output moves the clean latent or the sampler's next one",
    )
    search_samples: int = Field(
        10, ge=1, description="calibration samples, evenly spaced, that act_clip, residual, stca_search and mixed look at"
    )

    @model_validator(mode="after")
    def _ranks_ordered(self) -> QuantVSRSettings:
        if self.rank_min > self.rank_max:
            raise ValueError(f"rank_min {self.rank_min} is above rank_max {self.rank_max}")
        if self.bias_by_step and not self.lba:
            raise ValueError("bias_by_step is the bias alignment's, and lba is false: leave it out")
        return self


class MaxMinSettings(Settings):
    """Round to nearest with min/max ranges (arXiv 1712.05877)."""

    READ_IF: ClassVar[ReadIf] = {"ema": ({"activations": "static"},)}
    activations: Literal["dynamic", "static"] = Field(
        "dynamic", description="range of each call (dynamic), or an average over the calibration samples (static)"
    )
    channel_split: bool = Field(False, description="two halves of the input channels with a range of their own")
    ema: float = Field(0.95, gt=0, lt=1, description="decay of the static activation range over calibration batches")


class PassionSRSettings(Settings):
    """PassionSR (arXiv 2411.17106)."""

    READ_IF: ClassVar[ReadIf] = {
        "alpha transform_epochs": ({"transform": True},),
        "transform_learning_rate": ({"transform": True, "transform_epochs": True},),
        "bounds_learning_rate": ({"bounds_epochs": True},),
        "relative": ({"transform": True, "transform_epochs": True}, {"bounds_epochs": True}),
    }
    channel_split: bool = Field(True, description="two halves of the input channels with bounds of their own")
    transform: bool = Field(True, description="the learnable equivalent transform, a factor and an offset per input channel; else none")
    alpha: float = Field(0.3, ge=0, le=1, description="the factors start as amax^alpha / wmax^alpha")
    ema: float = Field(0.95, gt=0, lt=1, description="decay of the starting activation range over calibration samples")
    transform_epochs: float = Field(
        2, ge=0, description="passes over the calibration samples that train the transform, one sample an update", json_schema_extra=EFFORT
    )
    transform_learning_rate: float = Field(1e-5, gt=0, description="of the transform; a tenth of it in the second half of the updates")
    bounds_epochs: float = Field(
        2, ge=0, description="passes that train the bounds of weights and activations; 0: minimum and maximum", json_schema_extra=EFFORT
    )
    bounds_learning_rate: float = Field(1e-5, gt=0, description="of the bounds; a tenth of it in the second half of the updates")
    relative: bool = Field(
        False, description="learning rates count in units of each factor's or range's own size at the start, not in its own unit"
    )


class QuaRotSettings(Settings):
    """Rotate, then round (arXiv 2404.00456)."""

    READ_IF: ClassVar[ReadIf] = {"gptq_damp gptq_act_order gptq_rows": ({"weights": "gptq"},)}
    weights: Literal["rtn", "gptq"] = Field("rtn", description="weights to nearest, or by GPTQ on the calibration samples")
    granularity: Literal["shared", "native"] = Field(
        "shared",
        description="activation ranges per tensor as the other methods' (shared), or per token, before larger kernels per frame (native)",
    )
    symmetric: bool = Field(True, description="grids symmetric about 0, as published; else from minimum to maximum")
    rotation: bool = Field(True, description="Hadamard rotation of the input channels before rounding")
    gptq_damp: float = Field(0.01, gt=0, description="share of the Hessian's mean diagonal that is added to it")
    gptq_act_order: bool = Field(False, description="round the columns of the largest inputs first")
    gptq_rows: int = Field(1024, ge=0, description="input vectors of each call of a layer that enter its Hessian; 0: all")


class SVDQuantSettings(Settings):
    """SVDQuant (arXiv 2411.05007)."""

    READ_IF: ClassVar[ReadIf] = {"group_size": ({"granularity": "native"},), "gptq_rows": ({"weights": "gptq"},)}
    granularity: Literal["shared", "native"] = Field(
        "shared",
        description="shared: asymmetric weights per output channel, activations per tensor; "
        "native: symmetric weights and per-token activations in groups of input channels",
    )
    group_size: int = Field(64, ge=1, description="input channels of a group at native granularity; the last group may be smaller")
    rank: int = Field(32, ge=1, description="of every branch", json_schema_extra=EFFORT)
    limit_ranks: bool = Field(
        False,
        description="give a layer whose weight cannot have its rank the highest it can; else such a rank is refused",
    )
    smooth: bool = Field(True, description="search the smoothing factors of each layer; else none")
    iterations: int = Field(
        100, ge=0, description="most rounds of the branch after its first SVD; the first without gain ends them", json_schema_extra=EFFORT
    )
    weights: Literal["rtn", "gptq"] = Field("rtn", description="what the branch leaves to nearest, or by GPTQ on the calibration samples")
    gptq_rows: int = Field(1024, ge=0, description="input vectors of each call of a layer that enter its Hessian; 0: all")
    samples: int = Field(
        128, ge=1, description="calibration samples that the searches measure a layer's output on, evenly spaced", json_schema_extra=EFFORT
    )


class ViDiTQSettings(Settings):
    """ViDiT-Q (arXiv 2406.02540)."""

    READ_IF: ClassVar[ReadIf] = {"native_activations": ({"granularity": "native"},), "alpha ema": ({"balance": True},)}
    granularity: Literal["shared", "native"] = Field(
        "shared", description="shared: activations per tensor; native: per token or frame (native_activations)"
    )
    native_activations: Literal["token", "frame"] = Field(
        "token", description="what has an activation range of its own at native granularity; larger kernels than 1x1 take frames"
    )
    balance: bool = Field(True, description="static channel balance: scale the input channels")
    alpha: float = Field(0.5, ge=0, le=1, description="balance multiplies the input by wmax^alpha / amax^(1-alpha)")
    rotation: bool = Field(True, description="dynamic channel balance: Hadamard rotation of the scaled input")
    timestep_bounds: tuple[int, ...] = Field(
        (), description="upper bounds of timestep groups with a balance, hence integer weights, of their own; the 2024 code has [500, 1000]"
    )
    ema: float = Field(0.95, gt=0, lt=1, description="decay of the channels' ranges over calibration samples")

    @model_validator(mode="after")
    def _bounds_rise(self) -> ViDiTQSettings:
        if list(self.timestep_bounds) != sorted(set(self.timestep_bounds)):
            raise ValueError(f"timestep_bounds {list(self.timestep_bounds)} do not rise")
        if self.timestep_bounds and not self.balance:
            raise ValueError("timestep_bounds are those of the channel balance, and balance is false: leave them out")
        return self


class QDiffusionSettings(Settings):
    """Q-Diffusion (arXiv 2302.04304); counts and rates are the released code's for Stable Diffusion where it has them."""

    READ_IF: ClassVar[ReadIf] = {
        "round_learning_rate round_weight round_warmup": ({"round_updates": True},),
        "step_learning_rate": ({"step_updates": True},),
        "samples keep_outputs batch": ({"round_updates": True}, {"step_updates": True}),
    }
    shortcut_split: bool = Field(True, description="ranges of their own for the two sources of a decoder block's 1x1 skip convolution")
    range_samples: int = Field(16, ge=1, description="calibration samples that activation ranges are searched on", json_schema_extra=EFFORT)
    range_values: int | None = Field(
        None,
        ge=1,
        description="at most this many values of a layer's input, drawn at random, score its ranges; null: all",
        json_schema_extra=EFFORT,
    )
    samples: int = Field(
        128,
        ge=1,
        description="calibration samples that units are trained on, drawn at random; kept in memory unit by unit",
        json_schema_extra=EFFORT,
    )
    keep_outputs: bool = Field(
        False, description="keep all units' outputs for these samples in memory: the same result, much sooner where the network is small"
    )
    batch: int = Field(8, ge=1, description="samples (of five frames) of one optimizer step", json_schema_extra=EFFORT)
    round_updates: int = Field(
        20000, ge=0, description="optimizer steps of a unit's weight rounding; 0: round to nearest", json_schema_extra=EFFORT
    )
    round_learning_rate: float = Field(1e-3, gt=0, description="of the weight rounding")
    round_weight: float = Field(0.01, gt=0, description="weight of the regulariser that drives the rounding to 0 or 1")
    round_warmup: float = Field(0.2, ge=0, lt=1, description="share of the steps without that regulariser")
    step_updates: int = Field(
        5000, ge=0, description="optimizer steps of a unit's activation step sizes; 0: as searched", json_schema_extra=EFFORT
    )
    step_learning_rate: float = Field(4e-4, gt=0, description="of the activation step sizes; falls to 0 along a cosine")


class EfficientDMSettings(Settings):
    """EfficientDM (arXiv 2310.03270); counts and rates are the released code's."""

    READ_IF: ClassVar[ReadIf] = {
        "lora_learning_rate": ({"rank": True, "updates": True},),
        "weight_learning_rate act_learning_rate zero_point_learning_rate": ({"updates": True},),
        "base": ({"rank": True},),
    }
    rank: int = Field(
        32,
        ge=0,
        description="of B A in Q(W0 + B A), Linear and convolutions alike; no more than a weight can have; 0: none",
        json_schema_extra=EFFORT,
    )
    base: Literal["float", "rounded"] = Field(
        "float", description="W0: the floating-point weight (the paper's formula), or the rounded one (the released code)"
    )
    by_step: bool = Field(True, description="activation scales and zero points of their own for each recorded timestep; else one for all")
    range_samples: int = Field(
        16,
        ge=1,
        description="calibration samples that the first activation ranges are searched on, all timesteps alike",
        json_schema_extra=EFFORT,
    )
    range_values: int | None = Field(
        None,
        ge=1,
        description="at most this many values of a layer's input, drawn at random, score its ranges; null: all",
        json_schema_extra=EFFORT,
    )
    updates: int = Field(
        16000,
        ge=0,
        description="optimizer steps, each on one recorded call; published: 160 walks over 100 sampling steps; 0: as searched",
        json_schema_extra=EFFORT,
    )
    lora_learning_rate: float = Field(1 / 2500, gt=0, description="of B and A, in units of the layer's mean weight scale")
    weight_learning_rate: float = Field(1e-6, ge=0, description="of the weights' scales")
    act_learning_rate: float = Field(5e-4, ge=0, description="of the activations' scales")
    zero_point_learning_rate: float = Field(5e-4, ge=0, description="of the activations' zero points, in levels; published: as the scales'")


def reduced(settings: Settings) -> dict[str, tuple[Any, Any]]:
    """Effort fields that are read and below the defaults of their class, as ``{name: (value, default)}``; None stands for all there is.

    >>> reduced(SVDQuantSettings(rank=8, samples=256))
    {'rank': (8, 32)}
    """
    found = {}
    values = settings.model_dump()
    for name, field in type(settings).model_fields.items():
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or not extra.get("effort") or unread(type(settings), name, values):
            continue
        value, default = values[name], field.default
        if value is not None and (default is None or value < default):
            found[name] = (value, default)
    return found


class PluginSettings(Settings):
    """Settings of an installed package's method as they were given; its own class checks them when the package is loaded."""

    model_config = ConfigDict(frozen=True, extra="allow")


class MethodSettings(Settings):
    """Settings of the methods, by method name; `exclude` and the seed are shared by all.

    Beside the methods of our own there may be those that installed packages offer.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, PluginSettings] = Field(init=False)

    exclude: tuple[str, ...] = Field(
        ("time_embed.0", "input_blocks.0.0", "out.2"), description="layers left at full precision, by name prefix"
    )
    efficientdm: EfficientDMSettings = EfficientDMSettings()
    maxmin: MaxMinSettings = MaxMinSettings()
    passionsr: PassionSRSettings = PassionSRSettings()
    quarot: QuaRotSettings = QuaRotSettings()
    q_diffusion: QDiffusionSettings = QDiffusionSettings()
    quantvsr: QuantVSRSettings = QuantVSRSettings()
    svdquant: SVDQuantSettings = SVDQuantSettings()
    vidit_q: ViDiTQSettings = ViDiTQSettings()

    @model_validator(mode="before")
    @classmethod
    def _methods_known(cls, given: Any) -> Any:
        for name in given if isinstance(given, Mapping) else ():
            if name not in cls.model_fields and name not in plugins():
                raise UnknownKeyError(str(name), [*cls.model_fields, *plugins()])
        return given


def unread(owner: Any, key: str, values: Mapping[str, Any]) -> str | None:
    """What would have to hold for a setting to be read, if it is not read beside `values`; None if it is.

    Args:
        owner: the class of the settings; those of a plug-in need no `READ_IF`.
        values: the settings, by key; what is absent has its default.

    >>> unread(QuaRotSettings, "gptq_damp", {"gptq_damp": 0.1}), unread(QuaRotSettings, "gptq_damp", {"gptq_damp": 0.1, "weights": "gptq"})
    ('weights: gptq', None)
    """
    read_if: ReadIf = getattr(owner, "READ_IF", {})
    alternatives = next((conditions for keys, conditions in read_if.items() if key in keys.split()), ())
    if values.get(key) is False or not alternatives:
        return None

    def holds(name: str, wanted: Any) -> bool:
        found = values.get(name, owner.model_fields[name].get_default(call_default_factory=True))
        return bool(found) if wanted is True else bool(found == wanted)

    def shown(name: str, wanted: Any) -> str:
        on = "true" if owner.model_fields[name].annotation is bool else "above 0"
        return f"{name} {on}" if wanted is True and on != "true" else f"{name}: {on if wanted is True else wanted}"

    if any(all(holds(name, wanted) for name, wanted in one.items()) for one in alternatives):
        return None
    return " or ".join(" and ".join(shown(name, wanted) for name, wanted in one.items()) for one in alternatives)
