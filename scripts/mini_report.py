"""What is known of the small model's weights: learning curves, what each part does, and the shape of its activations.

python scripts/mini_report.py             about ten minutes on one core; writes docs/mini and two tables of docs/mini.md
python scripts/mini_report.py --study results/mini-quantization/tables/metrics.csv
                                          the third table, after `snakemake --cores 2 --configfile config/mini-quantization.yaml`

Two runs on one machine write the same bytes. Times are printed only, as a ratio to the full model of the same run.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # so that it runs from any folder, with nothing installed

from tabulate import tabulate  # noqa: E402
from update_readme import replace_between  # noqa: E402

from qvsr.config import Config, SamplingSettings  # noqa: E402
from qvsr.data.datasets import build_clip, clip_names  # noqa: E402
from qvsr.plan import UNQUANTIZED_BITS  # noqa: E402

if TYPE_CHECKING:  # torch and pandas load when the numbers of threads are set
    from pandas import DataFrame
    from torch import Tensor

    from qvsr.models.checkpoints import Backbone

STAGES = ("autoencoder", "diffusion", "decoder")
METRICS_SHOWN = ("psnr", "ssim", "gmsd", "ssim_gradient", "ewarp_dis")
STEPS = (1, 5, 20, 50)
FULL = "full model"
FAR = 6  # standard deviations from the mean beyond which a value counts as far out
# Kinds of layer, by what their names contain; the first that fits.
KINDS = {
    "temporal": r"temporal_",
    "SPADE": r"\.spade\.",
    "time embedding": r"emb_layers|^time_embed",
    "skip connection": r"skip_connection",
    "feed-forward": r"\.ff\.",
    "attention": r"attn|proj_in|proj_out",
    "convolution": r"",
}
FACTS = ("kurtosis", "min", "max", "std", "max_over_std", "beyond_6_std", "channel_range_ratio")


# --- curves -----------------------------------------------------------------------------------------------------------


def draw_curves(folder: Path, out: Path) -> None:
    """Loss and PSNR of the three stages of training.

    Args:
        folder: holds STAGE.csv, a line every so many steps, each of a single batch.
        out: PNG to write.
    """
    import pandas as pd
    from matplotlib.ticker import MaxNLocator, NullLocator

    from qvsr.report.figures import COLOURS, STYLE, _pyplot, _save

    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, len(STAGES), figsize=(10, 5), sharex="col", layout="constrained")
        for (above, below), stage in zip(grid.T, STAGES, strict=True):
            curve = pd.read_csv(folder / f"{stage}.csv")
            window = max(5, len(curve) // 20)
            for axes, column, label in ((above, "loss", "loss"), (below, "psnr", "PSNR of the batch (dB)")):
                if column not in curve:
                    axes.set_axis_off()
                    axes.text(0.5, 0.5, "no PSNR logged:\nthis stage sees latents only", ha="center", va="center", transform=axes.transAxes)
                    above.tick_params(labelbottom=True)
                    continue
                smooth = curve[column].rolling(window, center=True, min_periods=1).mean()
                axes.plot(curve["step"], curve[column], color=COLOURS[0], alpha=0.3, linewidth=0.8, label="a logged batch")
                axes.plot(curve["step"], smooth, color=COLOURS[0], linewidth=1.8, label="running mean of logged batches")
                axes.set_ylabel(label)
                axes.grid(which="both", color="#e6e6e6", linewidth=0.6)
                axes.spines[["top", "right"]].set_visible(False)
            above.set_yscale("log")
            above.yaxis.set(major_locator=MaxNLocator(6), minor_locator=NullLocator(), major_formatter="{x:.3g}")
            above.set_title(f"{stage} (thick: mean of {window})", loc="left")
            (below if "psnr" in curve else above).set_xlabel("step")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        _save(figure, out)


# --- one part switched off --------------------------------------------------------------------------------------------


def temporal_off(network: Any) -> None:
    """Temporal layers with weight 0 return their input."""
    from qvsr.models.layers import TemporalConv
    from qvsr.models.unet import TemporalAttention

    for module in network.modules():
        if isinstance(module, (TemporalConv, TemporalAttention)):
            module.temporal_alpha.zero_()


def fusion_off(backbone: Backbone) -> None:
    backbone.vae.settings = backbone.vae.settings.model_copy(update={"fusion_w": 0.0})


def structure_off(backbone: Backbone) -> None:
    backbone.structure.register_forward_hook(lambda _module, _inputs, maps: {width: x.new_zeros(x.shape) for width, x in maps.items()})


def lq_latent_off(backbone: Backbone) -> None:
    latent = backbone.settings.unet.out_channels

    def without(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        x = x.clone()
        x[:, latent:] = 0
        return x, *others

    backbone.unet.register_forward_pre_hook(without)


@dataclass(frozen=True)
class Variant:
    """A row: the trained model with one thing changed.

    Attributes:
        change: gets networks that were loaded for this row alone.
        sampling: settings of the sampler that differ.
    """

    name: str
    change: Callable[[Backbone], None] = lambda _backbone: None
    sampling: dict[str, Any] = field(default_factory=dict)


def variants(config: Config) -> list[Variant]:
    released = SamplingSettings()
    rows = [
        Variant(FULL),
        Variant("motion guidance off", sampling={"flow": "none"}),
        Variant("motion guidance as released", sampling={key: getattr(released, key) for key in ("guidance_pairs", "guidance_scale")}),
        Variant("temporal layers of the U-Net off", lambda backbone: temporal_off(backbone.unet)),
        Variant("temporal layers of the decoder off", lambda backbone: temporal_off(backbone.vae)),
        Variant("feature fusion off", fusion_off),
        Variant("structure maps zero", structure_off),
    ]
    if config.backbone.concat_lq:
        rows.append(Variant("LQ latent zero", lq_latent_off))
    plural = {1: "1 step"}
    return rows + [Variant(plural.get(n, f"{n} steps"), sampling={"steps": n}) for n in STEPS if n != config.sampling.steps]


@dataclass(frozen=True)
class Pair:
    """A clip: its name as its noise is keyed, ground truth and LQ frames (T, 3, H, W) in [0, 1]."""

    name: str
    gt: Tensor
    lq: Tensor


def read_pairs(config: Config, folder: Path) -> list[Pair]:
    """Every clip that the configuration evaluates, made below `folder`."""
    from qvsr.data.clips import read_frames_TCHW
    from qvsr.plan import clip_name

    pairs = []
    for dataset in config.evaluate:
        for clip in clip_names(config, dataset):
            gt, lq = (folder / dataset / part / clip for part in ("GT", "LQ"))
            build_clip(config, dataset, clip, gt, lq)
            pairs.append(Pair(clip_name(lq), read_frames_TCHW(gt), read_frames_TCHW(lq)))
    return pairs


def restored(config: Config, variant: Variant, pairs: Iterable[Pair]) -> Iterator[Tensor]:
    """Frames of every clip in [0, 1], by a variant of the full model."""
    from qvsr.models.checkpoints import load_backbone
    from qvsr.models.flow import estimator
    from qvsr.models.noise import KeyedNoise
    from qvsr.models.pipeline import restore

    backbone = load_backbone(config.backbone)
    variant.change(backbone)
    sampling = config.sampling.model_copy(update=variant.sampling)
    flow = estimator(sampling.flow, config.backbone.flow_weights)
    for pair in pairs:
        yield restore(backbone, pair.lq, sampling, KeyedNoise(config.seed, pair.name), flow, clip=pair.name)


def reconstructed(config: Config, pairs: Iterable[Pair]) -> Iterator[Tensor]:
    """Ground truth encoded (mean of the posterior) and decoded, the LQ frames' features fused in as in the full model."""
    import torch

    from qvsr.models.checkpoints import load_backbone
    from qvsr.models.pipeline import network_frames, segments

    backbone = load_backbone(config.backbone)
    for pair in pairs:
        pieces = []
        for numbers in segments(len(pair.gt), config.sampling.frames_per_segment):
            with torch.no_grad():
                latent = backbone.first_stage.encode(pair.gt[numbers] * 2 - 1)[0].mean
                features = backbone.vae.encode(network_frames(pair.lq[numbers], config.sampling.upscale))[1]
                pieces.append(backbone.vae.decode(latent, features)[: len(set(numbers))])
        yield ((torch.cat(pieces) + 1) / 2).clamp(0, 1)


def ablation(config: Config, folder: Path) -> tuple[DataFrame, dict[str, float]]:
    """Every row of the table of parts, and the processor seconds that the rows of the model took.

    Args:
        folder: clips are made here.
    Returns:
        a row for each of ground truth, bicubic, autoencoder and :func:`variants`, means over clips: the metrics, gradient energy
        relative to the ground truth, and PSNR less that of the full model with its 95 % interval over clips (paired; none for ground truth).
    """
    import pandas as pd

    from metrics.ssim_gradient import gradient_magnitude
    from qvsr import measuring, protocols, results
    from qvsr.models.pipeline import bicubic_upscale, to_uint8
    from qvsr.statistics import interval

    pairs, protocol = read_pairs(config, folder), protocols.read(config.protocol)
    rows: dict[str, Callable[[], Iterable[Tensor]]] = {
        "ground truth": lambda: (pair.gt for pair in pairs),
        "bicubic": lambda: (bicubic_upscale(pair.lq, config.sampling.upscale) for pair in pairs),
        "autoencoder alone": lambda: reconstructed(config, pairs),
    }
    rows |= {variant.name: partial(restored, config, variant, pairs) for variant in variants(config)}
    by_clip: dict[str, list[dict[str, float]]] = {}
    seconds: dict[str, float] = {}
    for name, frames in rows.items():
        began = time.process_time()
        saved = [to_uint8(one, config.sampling.rounding).permute(0, 3, 1, 2).float() / 255 for one in frames()]
        seconds[name] = time.process_time() - began
        print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
        by_clip[name] = []
        for pair, pred in zip(pairs, saved, strict=True):
            context = results.Context(backbone=config.backbone.name, method=name, bits="", seed=config.seed, dataset="", clip=pair.name)
            measured = measuring.measure_clip(pred, pair.gt, None, METRICS_SHOWN, context, protocol)
            energy = (gradient_magnitude(pred).square().sum() / gradient_magnitude(pair.gt).square().sum()).item()
            by_clip[name].append({row.metric: row.value for row in measured} | {"gradient_energy": energy})
    table = []
    for name, clips in by_clip.items():
        changes = [clip["psnr"] - full["psnr"] for clip, full in zip(clips, by_clip[FULL], strict=True)]
        within = interval(changes)
        means = {key: results.mean([clip[key] for clip in clips]) for key in clips[0]}
        table.append({"row": name, **means, "psnr_change": results.mean(changes), "change_low": within.low, "change_high": within.high})
    model = [variant.name for variant in variants(config)]
    return pd.DataFrame(table).astype({"change_low": float, "change_high": float}), {name: seconds[name] for name in model}


def ablation_markdown(table: DataFrame, times: Mapping[str, float] | None = None) -> str:
    """The table as shown in docs/mini.md; with `times` also seconds relative to the full model."""
    import metrics  # noqa: F401
    from qvsr.registry import METRICS
    from qvsr.report.tables import number

    def change(row: Any) -> str:
        if row["row"] in (FULL, "ground truth"):
            return ""
        mean, low, high = (f"{row[key]:+.2f}" for key in ("psnr_change", "change_low", "change_high"))
        return mean if row["change_low"] != row["change_low"] else f"{mean} ({low} to {high})"  # NaN: a single clip has no interval

    shown = table[["row"]].copy()
    for name in METRICS_SHOWN:
        facts = METRICS[name].facts
        unit = f" ({facts['unit']})" if facts["unit"] else ""
        shown[f"{name}{unit} {'↑' if facts['higher_is_better'] else '↓'}"] = [number(v, facts.get("digits", 2)) for v in table[name]]
    shown["gradient energy (1 = truth)"] = [f"{v:.2f}" for v in table["gradient_energy"]]
    shown["psnr less full model's (95 %)"] = [change(row) for _, row in table.iterrows()]
    if times is not None:
        shown["time / full"] = [f"{times[name] / times[FULL]:.2f}" if name in times else "" for name in table["row"]]
    return str(shown.rename(columns={"row": ""}).to_markdown(index=False, disable_numparse=True))


# --- activations ------------------------------------------------------------------------------------------------------


class Distribution:
    """Facts about the values of a tensor that comes in parts, each part shown twice: :meth:`first` for all, then :meth:`second`.

    Args:
        axis: of the channels.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.count, self.sum, self.squares = 0, 0.0, 0.0
        self.fourth, self.far = 0.0, 0
        self.low: Any = None
        self.high: Any = None

    def first(self, x: Tensor) -> None:
        rows = x.movedim(self.axis, 0).flatten(1)
        low, high = rows.amin(1), rows.amax(1)
        self.low = low if self.low is None else low.minimum(self.low)
        self.high = high if self.high is None else high.maximum(self.high)
        wide = x.double()
        self.count += x.numel()
        self.sum += wide.sum().item()
        self.squares += wide.square().sum().item()

    @property
    def mean(self) -> float:
        return self.sum / self.count

    @property
    def std(self) -> float:
        return max(self.squares / self.count - self.mean**2, 0.0) ** 0.5

    def second(self, x: Tensor) -> None:
        squared = ((x.double() - self.mean) / max(self.std, 1e-30)).square()
        self.fourth += squared.square().sum().item()
        self.far += int((squared > FAR**2).sum())

    def facts(self) -> dict[str, float]:
        """See :func:`activations`; NaN where there is no spread."""
        low, high = self.low.min().item(), self.high.max().item()
        spread = self.std or float("nan")
        ranges = (self.high - self.low).double()
        values = (
            self.fourth / self.count if self.std else float("nan"),
            low,
            high,
            self.std,
            max(high - self.mean, self.mean - low) / spread,
            self.far / self.count,
            (ranges.max() / ranges.quantile(0.5)).item(),
        )
        return dict(zip(FACTS, values, strict=True))


def kind_of(layer: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, layer))


def activations(config: Config, folder: Path) -> DataFrame:
    """Inputs and weights of every quantizable layer of the U-Net, over the calibration samples that the workflow records.

    Args:
        folder: clips and samples are made here.
    Returns:
        two rows a layer, ``tensor`` input and weight: Pearson's kurtosis (normal: 3), min, max, standard deviation, the largest
        distance from the mean in standard deviations, the share of values more than 6 of them away, and the largest range of a
        channel (input channels of an input, output channels of a weight) divided by the median one.
    """
    import pandas as pd
    import torch

    from qvsr.data.calibration import CalibrationSet
    from qvsr.models.checkpoints import load_backbone
    from qvsr.quant.apply import quantizable
    from qvsr.quant.observe import observe_inputs
    from qvsr.stages import calibrate

    dataset = config.calibration.dataset
    lq = [folder / dataset / "LQ" / clip for clip in clip_names(config, dataset)]
    for one in lq:
        build_clip(config, dataset, one.name, folder / dataset / "GT" / one.name, one)
    calibrate.run(config, lq, folder / "calibration")
    backbone = load_backbone(config.backbone)
    samples = CalibrationSet(folder / "calibration", backbone.structure)
    layers = quantizable(backbone.unet, config.method.exclude)
    inputs = {name: Distribution(-1 if isinstance(layer, torch.nn.Linear) else 1) for name, layer in layers.items()}
    for see in (lambda name, x: inputs[name].first(x), lambda name, x: inputs[name].second(x)):
        with torch.no_grad(), observe_inputs(layers, see):
            for index in range(len(samples)):
                sample = samples[index]
                backbone.unet(sample.x, sample.t, sample.context, sample.struct)
    rows = []
    for name, layer in layers.items():
        weight = Distribution(0)
        weight.first(layer.get_parameter("weight"))
        weight.second(layer.get_parameter("weight"))
        for tensor, distribution in (("input", inputs[name]), ("weight", weight)):
            rows.append({"layer": name, "kind": kind_of(name), "tensor": tensor, **distribution.facts()})
    return pd.DataFrame(rows)


def activations_markdown(table: DataFrame) -> str:
    """The table by kind of layer: median over layers, and the largest."""

    def cell(values: Any) -> str:
        return f"{values.median():.1f} / {values.max():.1f}"

    rows = []
    present = [kind for kind in KINDS if kind in set(table["kind"])]
    for kind in [*present, "all"]:
        own = table if kind == "all" else table[table["kind"] == kind]
        row = {"layers": kind, "number": str(own["layer"].nunique())}
        for tensor in ("input", "weight"):
            part = own[own["tensor"] == tensor]
            row[f"{tensor}: kurtosis"] = cell(part["kurtosis"])
            row[f"{tensor}: max/std"] = cell(part["max_over_std"])
            row[f"{tensor}: widest channel"] = cell(part["channel_range_ratio"])
        rows.append(row)
    import pandas as pd

    return str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


def draw_activations(table: DataFrame, out: Path) -> None:
    """Kurtosis and max/std of every layer in the network's order, a column for inputs and one for weights."""
    from matplotlib.ticker import LogLocator, NullLocator

    from qvsr.report.figures import COLOURS, INK, MARKERS, SOFT, STYLE, _pyplot, _save

    plt = _pyplot()
    order = {name: number for number, name in enumerate(table["layer"].unique())}
    parts = {part: [n for name, n in order.items() if name.startswith(part)] for part in ("input_blocks", "middle_block", "output_blocks")}
    looks = dict(zip(KINDS, zip((*COLOURS, INK), (*MARKERS, "X"), strict=True), strict=True))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(11, 6.4), sharex=True, sharey="row", layout="constrained")
        for column, tensor in enumerate(("input", "weight")):
            for axes, fact, label in zip(
                grid[:, column], ("kurtosis", "max_over_std"), ("kurtosis (Pearson; normal = 3)", "max |x − mean| / std"), strict=True
            ):
                for kind, (colour, marker) in looks.items():
                    own = table[(table["tensor"] == tensor) & (table["kind"] == kind)]
                    axes.scatter(own["layer"].map(order), own[fact], s=20, color=colour, marker=marker, linewidth=0, label=kind, zorder=3)
                axes.set_yscale("log")
                axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
                axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
                axes.spines[["top", "right"]].set_visible(False)
                if fact == "kurtosis":
                    axes.axhline(3, color=INK, linewidth=0.8, linestyle=":")
                    axes.set_title({"input": "inputs of the layers", "weight": "weights"}[tensor], loc="left")
                if column == 0:
                    axes.set_ylabel(label)
                for numbers in filter(None, parts.values()):
                    axes.axvline(numbers[0] - 0.5, color=SOFT, linewidth=0.6)
            for part, numbers in parts.items():
                if numbers:
                    where = sum(numbers) / len(numbers)
                    grid[1, column].text(
                        where, -0.04, part, ha="center", va="top", color=SOFT, fontsize=8, transform=grid[1, column].get_xaxis_transform()
                    )
            grid[1, column].set_xticks([])
            grid[1, column].set_xlabel("layers in the network's order", labelpad=16)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        _save(figure, out)


# --- all of it --------------------------------------------------------------------------------------------------------


def write(table: DataFrame, file: Path) -> DataFrame:
    """The table as it stands in the file, with 6 digits: pictures and documents show what is kept."""
    import pandas as pd

    table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
    return pd.read_csv(file)


# --- study ------------------------------------------------------------------------------------------------------------


def study(file: Path) -> DataFrame:
    """What a run's metrics.csv says of its quantized rows: method, bits, metric, value and its interval over clips."""
    import pandas

    table = pandas.read_csv(file)
    return table[table["bits"] != UNQUANTIZED_BITS][["method", "bits", "metric", "value", "low", "high"]]


def study_markdown(table: DataFrame) -> str:
    """A line per method and a column per bit width, `psnr_fp / psnr`, in the order of the run."""
    methods, bits = (list(dict.fromkeys(table[key])) for key in ("method", "bits"))
    values = table.set_index(["metric", "method", "bits"])["value"]
    rows = [
        [method, *(f"{values['psnr_fp', method, width]:.2f} / {values['psnr', method, width]:.2f}" for width in bits)] for method in methods
    ]
    return str(tabulate(rows, headers=["psnr_fp / psnr (dB)", *bits], tablefmt="pipe", disable_numparse=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "config" / "default.yaml")
    parser.add_argument("--curves", type=Path, default=ROOT / "docs" / "mini", help="folder of the learning curves, STAGE.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "mini")
    parser.add_argument("--study", type=Path, help="metrics.csv of config/mini-quantization.yaml: only the table of methods and bits")
    chosen = parser.parse_args(arguments)
    if chosen.study is not None:
        table = write(study(chosen.study), chosen.out / "quantization.csv")
        print(study_markdown(table))
        if chosen.out.resolve() == (ROOT / "docs" / "mini").resolve():
            replace_between(ROOT / "docs" / "mini.md", "quantization", study_markdown(table))
        return

    from qvsr.cli import compute, settings

    config = settings(chosen.config)
    compute(config)
    chosen.out.mkdir(parents=True, exist_ok=True)
    draw_curves(chosen.curves, chosen.out / "curves.png")
    with TemporaryDirectory() as folder:
        layers = activations(config, Path(folder))
        parts, times = ablation(config, Path(folder))
    layers, parts = (write(table, chosen.out / name) for table, name in ((layers, "activations.csv"), (parts, "ablation.csv")))
    draw_activations(layers, chosen.out / "activations.png")
    print(ablation_markdown(parts, times), activations_markdown(layers), sep="\n\n")
    if chosen.out.resolve() == (ROOT / "docs" / "mini").resolve():
        replace_between(ROOT / "docs" / "mini.md", "ablation", ablation_markdown(parts))
        replace_between(ROOT / "docs" / "mini.md", "activations", activations_markdown(layers))


if __name__ == "__main__":
    main()
