"""``python -m qvsr STAGE``: one command a stage, one output that appears whole or not at all.

The only module that imports `baselines` and `metrics` (their decorators fill the registries). Heavy packages load inside the
command that needs them, so ``--help`` is quick. What a user can do wrong ends here as one line ``error: …`` and exit code 1;
with ``QVSR_DEBUG=1`` as the full traceback.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from qvsr import memory, plan
from qvsr.config import Config, ConfigError, explain, schema
from qvsr.method_settings import PluginSettings
from qvsr.provenance import ROOT, atomic_path
from qvsr.registry import BASELINES, load_plugin, suggest

app = typer.Typer(
    name="qvsr",
    help=__doc__.splitlines()[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(no_args_is_help=True, help="Check settings, or write them out with all defaults.")
app.add_typer(config_app, name="config")
assets_app = typer.Typer(no_args_is_help=True, help="Weights and data sets from elsewhere: list, fetch, check and import them.")
app.add_typer(assets_app, name="assets")

dataset_app = typer.Typer(no_args_is_help=True, help="The paper's data sets: build them from unpacked archives, and check them.")
app.add_typer(dataset_app, name="dataset")

PAPER = Path("config/paper.yaml")
ConfigOption = Annotated[Path, typer.Option("--config", help="settings, YAML or the run's config.json")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="KEY.KEY=VALUE (YAML), wins over the file; may be repeated")]
Out = Annotated[Path, typer.Option("--out", help="appears whole or not at all")]
MethodOption = Annotated[str, typer.Option("--method", help="a name of `baselines`, or bicubic")]
BitsOption = Annotated[str, typer.Option("--bits", help="such as W4A4; W32A32 for what is not quantized")]


def main() -> None:
    """Run a stage; the one place that turns a user's error into one line."""
    memory.keep_freed()
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("QVSR_DEBUG"):
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")


def settings(path: Path, overrides: list[str] | None = None) -> Config:
    """The settings of a stage, with ``KEY.KEY=VALUE`` overrides."""
    data: dict[str, Any] = {}
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: KEY=VALUE is expected, such as --set sampling.steps=5")
        nested: Any = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        data = plan.settings.merge(data, nested)
    # the default is there from any folder, so that `measure` and `cost` are too
    config = plan.resolve([] if path == plan.DEFAULT and not path.exists() else [path], data, lambda line: typer.echo(line, err=True))
    plan.export(config)
    return config


def compute(config: Config) -> None:
    """As :func:`reproducible`, by the settings."""
    reproducible(config.threads, config.device, config.seed)


def reproducible(threads: int, device: str, seed: int) -> None:
    """Everything that makes two runs the same, on a GPU to rounding: fixed numbers of threads, deterministic algorithms, a seed."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)  # numpy and torch are not loaded yet: they read these when they are
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    # use_deterministic_algorithms does the same and loads the compiler, 1.4 s a job; on a GPU the gradient of warping has no such algorithm
    torch.set_deterministic_debug_mode("error" if device == "cpu" else "default")
    torch.backends.cudnn.allow_tf32 = False  # convolutions round as the CPU's and as matrix products do
    torch.manual_seed(seed)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


def check_plugins(config: Config) -> None:
    """Load the installed packages whose methods are listed, and let their classes check the settings."""
    for name in config.methods:
        base, own = config.resolve_method(name)
        if isinstance(own, PluginSettings):
            load_plugin(base)
            config.plugin_settings(name, BASELINES[base].facts.get("settings"))


@config_app.command("check")
def config_check(path: Annotated[Path, typer.Argument(help="settings, YAML")] = plan.DEFAULT, set_: SetOption = None) -> None:
    """Say whether settings can work, and what would run."""
    config = settings(path, set_)
    plan.check_protocol(config)
    plan.check_external(config)
    check_plugins(config)
    run = plan.Plan(config)
    clips = run.pairs()
    typer.echo(f"{path}: fine; {len(run.rows())} rows, {len(clips)} clips, {len(config.metrics)} metrics, output in {config.output}")


@config_app.command("write")
def config_write(
    out: Out, path: Annotated[Path, typer.Option("--config", help="settings, YAML")] = plan.DEFAULT, set_: SetOption = None
) -> None:
    """Write settings out with all defaults, as the JSON that a run keeps."""
    text = plan.to_json(settings(path, set_))
    with atomic_path(out) as partial:
        partial.write_text(text)


@assets_app.command("status")
def assets_status(json_: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """List every file: whether it is here, what needs it, its licence and source. It looks at sizes; `verify` reads the files."""
    from qvsr.data import assets

    users = {name: plan.users_of(name) for name in assets.read()}
    if json_:
        rows = [
            {
                "name": name,
                "state": assets.glance(one),
                "path": str(one.path),
                "metrics": users[name],
                "recorded": assets.recorded(one),
                **one.model_dump(mode="json"),
            }
            for name, one in assets.read().items()
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "file", "", "size", "for", "licence", "source", title=f"Files in {assets.shown(assets.folder())}")
    for name, one in assets.read().items():
        size = f"{'' if one.bytes or not one.expected else 'about '}{assets.size(one.expected)}"
        source = one.source if one.urls else f"by hand: {one.source}"
        table.add_row(name, one.path.name, assets.glance(one), size, ", ".join(users[name]) or one.group, one.licence, source)
    Console(width=None if sys.stdout.isatty() else 250).print(table)


@assets_app.command("fetch")
def assets_fetch(
    names: Annotated[list[str] | None, typer.Argument(help="names as in `status`, or of the files")] = None,
    metrics: Annotated[str | None, typer.Option(help="what these metrics need, separated by commas")] = None,
    group: Annotated[str | None, typer.Option(help="metrics, backbone or datasets: all files of this group")] = None,
    all_: Annotated[bool, typer.Option("--all", help="every file")] = False,
    progress: Annotated[bool, typer.Option(help="draw bars")] = True,
) -> None:
    """Download files that are not here; each appears whole and checked, or not at all. What must be got by hand is named; exit code 1."""
    from qvsr.data import assets

    known = assets.read()
    groups = {name: one.group for name, one in known.items()}
    if group and group not in groups.values():
        raise ConfigError(suggest("group", group, set(groups.values())))
    of_group = [name for name in known if all_ or groups[name] == group]
    wanted = [*(names or []), *plan.assets_of(metrics.split(",") if metrics else []), *of_group]
    if not wanted:
        raise ConfigError(f"nothing to fetch: give names ({', '.join(known)}), --metrics, --group or --all")
    chosen = list(dict.fromkeys(assets.get(one)[0] for one in wanted))  # a wrong name before anything is downloaded
    failed = []
    for name in chosen:
        try:
            typer.echo(f"{name}: {assets.shown(assets.fetch(name, progress))}")
        except assets.AssetError as error:  # the others are fetched all the same
            failed.append(str(error))
    for reason in failed:
        typer.echo(f"error: {reason}", err=True)
    if failed:
        raise typer.Exit(1)


@assets_app.command("verify")
def assets_verify() -> None:
    """Read every file that is here and compare its SHA-256, or record it where none is known; exit code 1 if one is damaged."""
    from qvsr.data import assets

    states = []
    for name, one in assets.read().items():
        states.append(assets.state(one))
        reason = f": {assets.check(one)}" if states[-1] == "damaged" else ""
        typer.echo(f"{name}: {states[-1]}{reason}")
        if states[-1] == "here":
            assets.record(one)
    if "damaged" in states:
        raise typer.Exit(1)


@assets_app.command("import")
def assets_import(
    source: Annotated[Path, typer.Option("--from", help="folder with files brought from elsewhere; searched below too")],
) -> None:
    """Copy files from a folder, recognised by their names and checked, and unpack archives: for machines without network."""
    from qvsr.data import assets

    done = assets.import_from(source)
    for one in done:
        typer.echo(f"{one.name}: {one.outcome}, {one.file}{': ' + one.why if one.why else ''}")
    if any(one.outcome == "damaged" for one in done):
        raise typer.Exit(1)


@dataset_app.command("build")
def dataset_build(
    dataset: Annotated[str, typer.Argument(help="name in the settings, such as reds4")],
    source: Annotated[Path, typer.Option("--from", help="folder of unpacked archives; searched below too")],
    lq_source: Annotated[Path | None, typer.Option("--lq-from", help="that of the LQ frames, where it is another")] = None,
    config: Annotated[Path, typer.Option("--config", help="settings, YAML")] = PAPER,
    set_: SetOption = None,
) -> None:
    """Build a data set of the paper into GT/CLIP and LQ/CLIP, and record its digests."""
    from qvsr.stages import dataset as stage

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    stage.build(settings(config, set_), dataset, source, lq_source)


@dataset_app.command("check")
def dataset_check(
    datasets: Annotated[
        list[str] | None, typer.Argument(help="names in the settings; default: all of the paper's and all paired ones")
    ] = None,
    config: Annotated[Path, typer.Option("--config", help="settings, YAML")] = PAPER,
    set_: SetOption = None,
) -> None:
    """Check data sets: clips, frames, sizes, shifts between LQ and ground truth, digests; exit code 1 if one has a fault."""
    from qvsr.stages import dataset as stage

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    stage.check(settings(config, set_), datasets or [])


@app.command()
def convert(config: ConfigOption, set_: SetOption = None) -> None:
    """Convert the official checkpoints to the backbone's weight files, once, and compute the text context."""
    resolved = settings(config, set_)
    compute(resolved)
    from qvsr.stages import convert as stage

    stage.run(resolved)


@app.command("schema")
def schema_(markdown: Annotated[bool, typer.Option(help="the table of config/README.md instead")] = False) -> None:
    """Print the JSON schema of the settings."""
    if markdown:
        rows = "".join(f"| `{key}` | {default} | {text} |\n" for key, default, text in explain())
        typer.echo("| key | default | what it does |\n|---|---|---|\n" + rows, nl=False)
    else:
        typer.echo(schema(), nl=False)


@app.command()
def clips(
    config: ConfigOption,
    dataset: Annotated[str, typer.Option()],
    clip: Annotated[str, typer.Option()],
    gt: Annotated[Path, typer.Option(help="folder for the ground truth")],
    lq: Annotated[Path, typer.Option(help="folder for the degraded frames")],
    set_: SetOption = None,
) -> None:
    """Cut one clip from its source and degrade it."""
    from qvsr.stages import clips as stage

    stage.run(settings(config, set_), dataset, clip, gt, lq)


@app.command()
def calibrate(
    config: ConfigOption,
    out: Out,
    lq: Annotated[list[Path], typer.Argument(help="folders of the calibration clips' LQ frames")],
    set_: SetOption = None,
) -> None:
    """Record calibration samples from the full-precision run; continues where it was stopped."""
    resolved = settings(config, set_)
    compute(resolved)
    from qvsr.stages import calibrate as stage

    stage.run(resolved, lq, out)


@app.command()
def quantize(
    config: ConfigOption,
    method: MethodOption,
    bits: BitsOption,
    calibration: Annotated[Path, typer.Option(help="folder written by calibrate")],
    out: Out,
    set_: SetOption = None,
) -> None:
    """Quantize the U-Net with one method at one bit width."""
    resolved = settings(config, set_)
    compute(resolved)
    import baselines  # noqa: F401  (fills the registry)
    from qvsr.stages import quantize as stage

    load_plugin(resolved.resolve_method(method)[0])

    stage.run(resolved, method, bits, calibration, out)


@app.command()
def restore(
    config: ConfigOption,
    lq: Annotated[Path, typer.Option(help="folder of LQ frames")],
    out: Out,
    method: MethodOption = "full_precision",
    bits: BitsOption = plan.UNQUANTIZED_BITS,
    checkpoint: Annotated[str, typer.Option(help="quantized checkpoint; empty for full_precision and bicubic")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="of the noise alone; default: the configuration's")] = None,
    set_: SetOption = None,
) -> None:
    """Restore one clip: LQ frames to frames of four times the size."""
    resolved = settings(config, set_)
    compute(resolved)
    from qvsr.stages import restore as stage

    stage.run(resolved, method, bits, Path(checkpoint) if checkpoint else None, lq, out, seed)


@app.command()
def measure(
    pred: Annotated[Path, typer.Option(help="what is measured: a folder of frames, a video, or a folder of such clips")],
    out: Out,
    gt: Annotated[Path | None, typer.Option(help="the ground truth likewise; without it, only metrics that need none")] = None,
    fp: Annotated[Path | None, typer.Option(help="the full-precision output likewise, for metrics that compare with it")] = None,
    clip: Annotated[
        list[str] | None, typer.Option(help="a clip of folders; may be repeated; default: all, and all sides have the same")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="names, separated by commas; default: those of the configuration")] = None,
    protocol: Annotated[str | None, typer.Option(help="how they are computed: a name such as paper-v1, or a YAML file")] = None,
    require_all: Annotated[
        bool, typer.Option("--require-all", help="missing weights of a metric are an error, not a row without value")
    ] = False,
    per_frame: Annotated[Path | None, typer.Option(help="file for one JSON line a clip, metric and frame")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps values by the frames' content")] = None,
    config: Annotated[Path | None, typer.Option(help="settings, YAML or the run's config.json; default: none are needed")] = None,
    dataset: Annotated[str, typer.Option()] = "",
    method: MethodOption = "",
    bits: BitsOption = "",
    execution: Annotated[
        str | None, typer.Option(help="how the frames were made; default: what the clip says, or external without --config")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Measure restored clips of any program: one JSON line a clip and metric."""
    overrides = [*(set_ or []), *([f"metrics=[{metrics}]"] if metrics else []), *([f"protocol={protocol}"] if protocol else [])]
    resolved = settings(config or plan.DEFAULT, [*overrides, *(["require_all=true"] if require_all else [])])
    compute(resolved)
    import metrics as registered  # noqa: F401  (fills the registry)
    from qvsr.stages import measure as stage

    alone = config is None
    if alone and not metrics:
        resolved = resolved.model_copy(update={"metrics": tuple(stage.possible(resolved.metrics, gt, fp))})
    rows = stage.run(
        resolved,
        pred,
        gt,
        fp,
        clip or [],
        dataset,
        method,
        bits,
        execution or ("external" if alone else None),
        out,
        backbone="" if alone else None,  # frames of another program are not of the default network
        per_frame=per_frame,
        cache=cache,
    )
    if alone:
        typer.echo(stage.summary(rows))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="file written by measure")],
    b: Annotated[Path, typer.Argument(help="another, of the same clips")],
    metrics: Annotated[str | None, typer.Option(help="names, separated by commas; default: all that both files have")] = None,
    row_a: Annotated[str, typer.Option(help="METHOD-BITS, the row of A that is meant where it has several")] = "",
    row_b: Annotated[str, typer.Option(help="the row of B likewise")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="csv; appears whole or not at all")] = None,
) -> None:
    """Compare two files of measure clip by clip: differences B - A with intervals and tests."""
    import metrics as registered  # noqa: F401  (the table needs the metrics' facts)
    from qvsr.stages import compare as stage

    names = [name.strip() for name in metrics.split(",") if name.strip()] if metrics else []
    typer.echo(stage.run(a, b, names, row_a, row_b, out))


@app.command()
def tables(
    config: ConfigOption,
    out: Out,
    measured: Annotated[list[Path], typer.Argument(help="files written by measure")],
    checkpoint: Annotated[list[Path] | None, typer.Option(help="quantized checkpoint whose cost is counted; may be repeated")] = None,
    benchmarks: Annotated[
        Path | None, typer.Option(help="folder of {method}-{bits}.tsv: time and memory of quantizing, by Snakemake")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Write the tables: metrics, cost and fairness card as csv, Markdown and LaTeX."""
    resolved = settings(config, set_)
    compute(resolved)
    import metrics as registered  # noqa: F401  (the tables need the metrics' facts)
    from qvsr.stages import tables as stage

    stage.run(resolved, measured, checkpoint or [], out, benchmarks)


@app.command()
def ablation(
    config: ConfigOption,
    out: Out,
    measured: Annotated[list[Path], typer.Argument(help="files written by measure")],
    checkpoint: Annotated[list[Path] | None, typer.Option(help="quantized checkpoints of the rows")] = None,
    set_: SetOption = None,
) -> None:
    """Compile the tables of the ablation."""
    resolved = settings(config, set_)
    compute(resolved)
    import metrics as registered  # noqa: F401  (the tables need the metrics' facts)
    from qvsr.stages import ablation as stage

    stage.run(resolved, measured, checkpoint or [], out)


@app.command()
def figures(
    config: ConfigOption,
    out: Out,
    measured: Annotated[list[Path], typer.Argument(help="files written by measure")],
    set_: SetOption = None,
) -> None:
    """Draw the pictures from a run's frames and result rows."""
    resolved = settings(config, set_)
    compute(resolved)
    import metrics as registered  # noqa: F401  (the pictures need the metrics' facts)
    from qvsr.stages import figures as stage

    stage.run(resolved, measured, out)


@app.command()
def layers(
    config: ConfigOption,
    checkpoint: Annotated[Path, typer.Option(help="quantized checkpoint")],
    calibration: Annotated[Path, typer.Option(help="folder written by calibrate")],
    out: Annotated[Path, typer.Option("--out", help="csv; the figure appears beside it as png, each whole or not at all")],
    samples: Annotated[int, typer.Option(min=1, help="calibration samples that are looked at, spread over timesteps and clips")] = 10,
    set_: SetOption = None,
) -> None:
    """Report signal to quantization noise, ranges and complexity of every quantized layer."""
    resolved = settings(config, set_)
    compute(resolved)
    from qvsr.stages import layers as stage

    stage.run(resolved, checkpoint, calibration, out, samples)


@app.command()
def cost(
    out: Annotated[Path | None, typer.Option(help="write all columns as csv, too")] = None,
    config: ConfigOption = plan.DEFAULT,
    rank: Annotated[int | None, typer.Option(help="of every low-rank branch; default: the method's smallest")] = None,
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="a quantized checkpoint, counted as it is instead of the settings' rows; may be repeated")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Parameters and operations of every row, without weights, and what they count."""
    if checkpoint and rank is not None:
        raise ConfigError("--rank is for rows without a checkpoint: a checkpoint has ranks of its own; leave one of them out")
    resolved = settings(config, set_)
    from qvsr.quant.cost import planned_costs, stored_costs
    from qvsr.report.tables import cost_csv, cost_lines, cost_markdown, one_call

    costs = stored_costs(checkpoint, resolved) if checkpoint else planned_costs(resolved, rank)
    lines = cost_lines(costs, resolved.methods)
    typer.echo(cost_markdown(lines, one_call(resolved)), nl=False)
    if out is not None:
        with atomic_path(out) as partial:
            partial.write_text(cost_csv(lines))


@app.command()
def export(
    config: ConfigOption = plan.DEFAULT,
    checkpoint: Annotated[Path | None, typer.Option(help="quantized checkpoint, made from this configuration's backbone")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="NAME.safetensors, beside which NAME.md appears; or a folder for model and card")
    ] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="file of measure whose rows of this model stand in its card; may be repeated")
    ] = None,
    branch: Annotated[
        str, typer.Option(help="low-rank branches: exact (the checkpoint's numbers) or half (float16: smaller, other numbers)")
    ] = "exact",
    licence: Annotated[str, typer.Option(help="of the model, for its card; default: that of the official weights")] = "",
    sizes: Annotated[
        bool, typer.Option("--sizes", help="only say what the U-Net of each row would take on disk; needs no weights")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="with --sizes: of every low-rank branch; default: the method's smallest")] = None,
    set_: SetOption = None,
) -> None:
    """Write a quantized model as one file that restores by itself, with a model card."""
    resolved = settings(config, set_)
    if sizes:
        from qvsr.stages import export as stage

        typer.echo(stage.sizes(resolved, rank))
        return
    if checkpoint is None or out is None:
        raise ConfigError("export needs --checkpoint, the file that quantize wrote, and --out; or --sizes")
    compute(resolved)
    from qvsr.stages import export as stage

    typer.echo(f"written: {stage.run(resolved, checkpoint, out, measured or [], branch, licence)}")


@app.command()
def upscale(
    source: Annotated[Path, typer.Argument(metavar="IN", help="a video, or a folder of PNG or JPEG frames")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a video (.mp4, .mkv, .mov, .m4v, .webm), or a folder of PNG frames")],
    model: Annotated[Path | None, typer.Option(help="written by export; default: the small W4A4 model of this repository")] = None,
    execution: Annotated[
        str, typer.Option(help="packed, simulated, or auto: packed where this machine has integer kernels; the frames are the same")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="float32, or bfloat16 for what the U-Net does not quantize: faster where the processor multiplies it (AMX)")
    ] = "float32",
    seed: Annotated[int | None, typer.Option(min=0, help="of the noise; default: that of the model's run")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="of sampling; default: the model's")] = None,
    clip: Annotated[str, typer.Option(help="what the noise is keyed by; default: the name of IN, without extension")] = "",
    fps: Annotated[float | None, typer.Option(min=0.01, help="frames a second of a video made of a folder that does not say it")] = None,
    audio: Annotated[bool, typer.Option(help="copy the sound of a video")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT, and a stopped run that was given other options")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="of torch; another number rounds otherwise; default: that of the model's run, mostly 1")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Restore a video or a folder of frames at four times the size; continues where it was stopped."""
    from qvsr.stages import upscale as stage

    if device not in ("cpu", "cuda"):
        raise ConfigError(suggest("device", device, ("cpu", "cuda")))
    stage.check_out(source, out, overwrite)  # before torch is loaded
    from qvsr.quant.exported import read_header

    file = model or stage.DEFAULT_MODEL
    run = read_header(file)["run"]
    reproducible(threads or run["threads"], device, run["seed"])
    try:
        execution = stage.run(
            source,
            out,
            file,
            execution=execution,
            precision=precision,
            seed=run["seed"] if seed is None else seed,
            steps=steps,
            clip=clip,
            fps=fps,
            audio=audio,
            overwrite=overwrite,
            device=device,
        )
    except stage.StoppedError as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(130) from None
    typer.echo(f"written: {out} ({execution})")


@app.command()
def doctor(
    require: Annotated[
        list[str] | None, typer.Option(help="packed or cuda: exit code 1 where this machine does not have it; may be repeated")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say what is on this machine, which path each kind of layer takes, and why."""
    from qvsr.stages import doctor as stage

    found = stage.report()
    typer.echo(json.dumps(found, indent=1) if json_ else stage.show(found))
    stage.require(found, require or [])


@app.command()
def bench(
    kind: Annotated[str, typer.Argument(help="layers (each by itself), unet (one step), or clip (a whole one, with the exported model)")],
    out: Annotated[Path, typer.Option("--out", help="json; what holds for all rows appears beside it as NAME.head.json")],
    quick: Annotated[
        bool, typer.Option("--quick", help="few layers and rounds, the small network, one segment: a look, no result")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="settings; default: the paper's network, the small one for clip and for unet --quick")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.01, help="about, for the rounds of each layer, of the U-Net, of the clip")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: as many as there are cores")] = None,
    model: Annotated[
        Path | None, typer.Option(help="for clip, written by export; default: the small W4A4 model of this repository")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Measure speed and memory of packed layers beside full precision, in one run: ratios, GOP/s, errors."""
    from qvsr.stages import bench as stage

    stage.check(kind, out)  # before torch is loaded
    small = kind == "clip" or (quick and kind == "unet")
    resolved = settings(config or (plan.DEFAULT if small else PAPER if PAPER.exists() else ROOT / PAPER), set_)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    more = {} if model is None else {"model": model}
    typer.echo(stage.summary(stage.run(resolved, kind, out, quick=quick, threads=threads, seconds=seconds, **more)))


@app.command()
def speed(
    out: Out,
    files: Annotated[list[Path], typer.Argument(help="files written by bench, one of each kind at most")],
) -> None:
    """Write the tables of measured speed: a page in Markdown, a csv of each kind, and the machine."""
    from qvsr.stages import bench as stage

    stage.tables(files, out)


@app.command("plan")
def plan_(
    config: ConfigOption = plan.DEFAULT,
    device: Annotated[str | None, typer.Option(help="cpu, a6000, a100 or h100; default: by the settings' device, a6000 for cuda")] = None,
    gmacs: Annotated[
        float | None, typer.Option(min=1e-3, help="its 1e9 multiply-accumulates a second in float32, of a CPU for a thread")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="GPUs that may be used at once")] = 1,
    cores: Annotated[int, typer.Option(min=1, help="CPU cores likewise")] = 8,
    clips: Annotated[
        list[str] | None, typer.Option(help="NAME=COUNTxFRAMESxHEIGHTxWIDTH (LQ) of a dataset that is not here; may be repeated")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    set_: SetOption = None,
) -> None:
    """Say what a run will take before anything runs: jobs, downloads, disk, memory, hours by method."""
    resolved = settings(config, set_)
    from qvsr.forecast.clips import parse_clips
    from qvsr.stages import plan as stage

    planned = stage.plan(resolved, device, gmacs, dict(parse_clips(one) for one in clips or []))
    typer.echo(json.dumps(planned.json(), indent=1) if json_ else stage.show(planned, devices, cores))


@app.command()
def train(
    weights: Annotated[Path, typer.Option(help="safetensors to write: U-Net, structure encoder, context")],
    vae_weights: Annotated[Path, typer.Option(help="safetensors to write: the video autoencoder")],
    state: Annotated[Path, typer.Option(help="folder of states and curves; the same folder resumes")],
    config: ConfigOption = plan.DEFAULT,
    seconds: Annotated[float | None, typer.Option(help="stop after about this time with everything saved")] = None,
    set_: SetOption = None,
) -> None:
    """Train the small backbone; continues where it was stopped."""
    resolved = settings(config, set_)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from qvsr.stages import train as stage

    stage.run(resolved, weights, vae_weights, state, seconds)
