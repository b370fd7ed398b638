"""What the workflow runs: the settings resolved, the jobs that follow from them, a digest of what each stage reads.

The Snakefile and its rules only place what this module decides. It imports nothing heavy: a dry run takes no second of torch.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qvsr import config as settings
from qvsr.config import Config, ConfigError, VsrevalSettings, unread_message
from qvsr.method_settings import MethodSettings, unread
from qvsr.provenance import ROOT, atomic_path
from qvsr.registry import PluginError, plugins, suggest
from qvsr.settings import Settings

DEFAULT = Path("config/default.yaml")
# What is not quantized but restored: what no network at all gives, and the network as it is.
BICUBIC = "bicubic"
UNQUANTIZED = (BICUBIC, "full_precision")
# Rows for orientation, in the order of tables and pictures; the ground truth is measured itself, since it too flickers.
GROUND_TRUTH = "ground_truth"
REFERENCES = (GROUND_TRUTH, *UNQUANTIZED)
UNQUANTIZED_BITS = "W32A32"
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
ON_DEVICE = ("calibrate", "quantize", "restore")  # rules whose jobs run the networks on `device`
HEAVY_METRICS, HEAVY_METRICS_MB = {"dists", "maniqa", "dover", "fastervqa"}, 3500  # measured, see docs/weights.md
SEED_SUFFIX = "-seed"  # behind a row's bits in the names of its folders, for noise of another seed than the run's
PERMISSIVE = ("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC", "Zlib", "Unlicense", "CC0-1.0")  # by SPDX name


def resolve(files: Sequence[str | Path], overrides: Mapping[str, Any], say: Callable[[str], object] | None = None) -> Config:
    """The settings of one run.

    Args:
        files: YAML files, later ones win; each may `extends` another. None: ``config/default.yaml``.
        overrides: plain values that win over the files; as Snakemake's ``config`` they may repeat the files' values.
        say: gets one line when `licenses: permissive` leaves metrics out.
    Raises:
        ConfigError: one line that names the file and the key, an unknown method or metric included.
    """
    paths = [Path(file) for file in files] or [ROOT / DEFAULT]
    layers = [layer for file in paths for layer in settings.layers(file)]
    layers.append({key: value for key, value in overrides.items() if key != "extends"})
    data: dict[str, Any] = {}
    for layer in layers:
        data = settings.merge(data, layer)
    config = settings.validate(data, " + ".join(_short(file) for file in paths))
    check_names(config)
    check_read(config, layers)
    return _licensed(_located(config), say)


def _located(config: Config) -> Config:
    """The settings with the place of the optical flow's weights where an asset is named."""
    flow = config.backbone.flow_weights
    if flow is None or flow.suffix or len(flow.parts) > 1:  # a path; the list of assets is not read for it
        return config
    from qvsr.data.assets import read

    if str(flow) not in read():
        raise ConfigError(f"backbone.flow_weights: {suggest('asset', str(flow), read())}; a path has a folder or an extension")
    place = Path(Plan(config).asset_path(read()[str(flow)].file))
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"flow_weights": place})})


def _licensed(config: Config, say: Callable[[str], object] | None) -> Config:
    """The settings without the metrics that `licenses` leaves out."""
    if config.licenses == "any":
        return config
    licences = {name: str(facts.get("licence", "no licence")) for name, facts in declared_facts("metrics", "METRICS").items()}
    left_out = [name for name in config.metrics if licences[name] not in PERMISSIVE]
    named = ", ".join(f"{name} ({licences[name]})" for name in left_out)
    kept = tuple(name for name in config.metrics if name not in left_out)
    if not kept:
        raise ConfigError(f"licenses: permissive leaves no metric: {named}; name others in metrics, or set licenses to any")
    if left_out and say is not None:
        say(f"licenses: permissive leaves out {named}")
    return config.model_copy(update={"metrics": kept})


def _short(file: Path) -> str:
    absolute = file.resolve()
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else file)


def check_names(config: Config) -> None:
    """Refuse a method or metric that no file declares, and a variant that cannot work, before anything is computed."""
    own = declared("baselines", "BASELINES") + declared("qvsr", "BASELINES")
    for plugin in plugins().values():
        if plugin.name in (*own, *REFERENCES, *MethodSettings.model_fields):
            raise PluginError(
                f"{plugin}: its method {plugin.name!r} has the name of one of ours; give its entry point another, or uninstall it"
            )
        if not NAME.match(plugin.name):
            raise PluginError(f"{plugin}: {_named_badly(plugin.name)}")
    methods = [*own, *plugins()]
    quantizing = [name for name in methods if name not in REFERENCES]
    for kind, asked, known in (
        ("method", config.methods, [*methods, "bicubic", *config.variants, *config.external]),
        ("method", [name for names in config.ablation.values() for name in names], [*quantizing, *config.variants]),
        ("metric", config.metrics, declared("metrics", "METRICS")),
    ):
        for name in asked:
            if name not in known:
                raise ConfigError(suggest(kind, name, known) + f"; see {kind}s in the configuration")
    for name, variant in config.variants.items():
        if name in (*methods, *REFERENCES):
            raise ConfigError(f"variants.{name}: {name} is a row already, a variant needs a name of its own")
        if not NAME.match(name):
            raise ConfigError(f"variants.{name}: {_named_badly(name)}")
        if variant.method not in quantizing:
            raise ConfigError(f"variants.{name}.method: {suggest('method', variant.method, quantizing)}")
        config.resolve_method(name)
    for name in config.external:
        if name in (*methods, *REFERENCES, *config.variants):
            raise ConfigError(f"external.{name}: {name} is a row already, an external one needs a name of its own")
        if not NAME.match(name):
            raise ConfigError(f"external.{name}: {_named_badly(name)}")


def _named_badly(name: str) -> str:
    return f"name {name!r} is not made of letters, digits, '.', '_' and '-'; files are called by it"


def check_read(config: Config, layers: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a setting that its method does not read beside its others: it would be without effect.

    What a variant leaves out, or a file that extends another switches off, may still be written in what it is made from.

    Args:
        layers: the settings files that `config` was merged from and the overrides, in order. One that gives every key there is was written by
            a run: nobody chose what stands in it.
    """
    before: Mapping[str, Any] = {}
    for layer in layers:
        after = settings.merge(before, layer)
        if not set(Config.model_fields) <= set(layer):
            _check_layer(config, before.get("method") or {}, layer.get("method") or {}, after.get("method") or {})
        before = after
    for name, variant in config.variants.items():
        _, own = config.resolve_method(name)
        for key in variant.settings:
            needed = unread(type(own), key, own.model_dump()) if own is not None else None
            if needed:
                raise ConfigError(unread_message(f"variants.{name}.settings", key, needed))


def _check_layer(config: Config, before: Mapping[str, Any], layer: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Keys of methods in one file: refused is what is not read with the settings up to it, and in the end neither by the method nor a variant."""
    for name, given in layer.items():
        own = getattr(config.method, name, None)
        if not isinstance(own, Settings) or not isinstance(given, Mapping):
            continue
        rows = [own, *(config.resolve_method(row)[1] for row, variant in config.variants.items() if variant.method == name)]
        for key, value in given.items():
            old = before.get(name) or {}
            if key in old and old[key] == value:  # Snakemake's overrides repeat what the file says
                continue
            needed = unread(type(own), key, after[name])
            if needed and all(row is not None and unread(type(row), key, row.model_dump()) for row in rows):
                raise ConfigError(unread_message(f"method.{name}", key, needed))


def check_external(config: Config) -> None:
    """Refuse an external row whose rules are not there."""
    for name, external in config.external.items():
        if not external.rules.is_file():
            raise ConfigError(f"external.{name}.rules: no file {external.rules}; paths begin at the folder where snakemake runs")


def check_protocol(config: Config) -> None:
    """Refuse an unknown protocol, a metric that it does not define, and frames saved otherwise than its signatures say."""
    from qvsr import protocols  # no stage but measure depends on it

    protocol = protocols.read(config.protocol)
    protocol.check_saved(config.sampling.rounding)
    for metric in config.metrics:
        protocol.signature(metric)


def declared(package: str, registry: str) -> list[str]:
    """Names that the files of a package add to a registry, read from the source: importing them would load torch.

    >>> "psnr" in declared("metrics", "METRICS")
    True
    """
    pattern = re.compile(rf"""\b{registry}\.add\(\s*["']([^"']+)["']""")
    return sorted(
        name for file in (ROOT / package).glob("*.py") if file.name != "registry.py" for name in pattern.findall(file.read_text())
    )


@functools.cache
def declared_facts(package: str, registry: str) -> dict[str, dict[str, Any]]:
    """Facts in the decorators of a package's files, by name, read from the source as :func:`declared` does; those that are literals.

    >>> declared_facts("metrics", "METRICS")["lpips"]["weights"]
    ('alexnet',)
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((ROOT / package).glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) != f"{registry}.add" or not call.args:
                continue
            literal = {keyword.arg: _literal(keyword.value) for keyword in call.keywords if keyword.arg is not None}
            found[str(_literal(call.args[0]))] = {key: value for key, value in literal.items() if value is not None}
    return found


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def assets_of(metrics: Iterable[str]) -> list[str]:
    """Names in config/assets.yaml of the files that metrics read, each once.

    Raises:
        ConfigError: no such metric.
    """
    facts, found = declared_facts("metrics", "METRICS"), []
    for metric in metrics:
        if metric not in facts:
            raise ConfigError(suggest("metric", metric, facts))
        found += facts[metric].get("weights", ())
    return list(dict.fromkeys(found))


def users_of(asset: str) -> list[str]:
    """The metrics that read a file of weights."""
    return [metric for metric in declared_facts("metrics", "METRICS") if asset in assets_of([metric])]


def official_sources(config: Config) -> dict[str, str]:
    """Official checkpoints by their key in `official`, those that are set: an asset's name, or a path.

    Raises:
        ConfigError: neither an asset nor what looks like a path.
    """
    from qvsr.data.assets import read

    given, names = config.official, {}
    for key in ("weights", "vae_weights", "text"):
        asked = getattr(given, key)
        if asked is None or given.weights is None:
            continue
        listed = [name for name, asset in read().items() if asked in (name, asset.file)]
        if not listed and not re.search(r"[./\\]", asked):
            raise ConfigError(f"official.{key}: {suggest('asset', asked, read())}; a path has a folder or an extension")
        names[key] = (listed or [asked])[0]
    return names


def archives_of(config: Config, dataset: str) -> list[str]:
    """Assets that a dataset is built from: of the ground truth, and of the LQ frames where that is another.

    Raises:
        ConfigError: one that is not listed in config/assets.yaml, or is no archive.
    """
    from qvsr.data.assets import read

    named, folders = config.datasets[dataset].archives, [name for name, asset in read().items() if asset.unpack]
    for name in named:
        if name not in folders:
            raise ConfigError(f"datasets.{dataset}.archives: {suggest('archive', name, folders)}")
    return list(named)


def settings_digest(config: Config, *keys: str) -> str:
    """Digest of the settings that a stage reads: a change of one makes its outputs stale, a change of any other does not.

    Args:
        keys: dotted names, such as ``method.quantvsr``.
    """
    values = []
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value[part] if isinstance(value, Mapping) else getattr(value, part)
        values.append([key, value.model_dump(mode="json") if isinstance(value, Settings) else value])
    return _digest(values)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def to_json(config: Config) -> str:
    """The resolved settings, the form in which a run keeps them (``{output}/config.json``); the order of clips means something and stays."""
    return json.dumps(config.model_dump(mode="json"), indent=1) + "\n"


class Plan:
    """The jobs of one run: which files must exist for its tables."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.output = config.output
        self.remarks: list[str] = []  # for people, printed once when the workflow starts
        self.wait_for: Callable[[str], object] = lambda dataset: None  # called before the clips of a set that the run builds are listed

    @classmethod
    def from_snakemake(cls, overrides: Mapping[str, Any], files: Sequence[str | Path]) -> Plan:
        """As :func:`resolve`; what cannot work ends the program with one line, without Snakemake's traceback."""
        remarks: list[str] = []
        try:
            plan = cls(resolve(files, overrides, remarks.append))
            plan.remarks = remarks
            check_protocol(plan.config)
            check_external(plan.config)
            plan.find_clips()
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        return plan

    @property
    def settings_file(self) -> str:
        """Where the run keeps its resolved settings."""
        return str(self.output / "config.json")

    def write_settings(self) -> None:
        """Write the resolved settings, defaults and overrides in one."""
        with atomic_path(self.settings_file) as partial:
            partial.write_text(to_json(self.config))

    def settings_here(self) -> None:
        """Write the resolved settings unless they are there: a job that shares no folder with the run does not see the file of its start."""
        if not Path(self.settings_file).exists():
            self.write_settings()

    def print_remarks(self) -> None:
        """Tell people what the settings imply; on standard error, once a run."""
        for remark in self.remarks:
            print(remark, file=sys.stderr)

    def digest(self, *keys: str) -> str:
        return settings_digest(self.config, *keys)

    def method_digest(self, method: str) -> str:
        """Digest of the settings that quantizing with one method or variant reads; another's do not count."""
        base, own = self.config.resolve_method(method)
        values = [base, own.model_dump(mode="json") if own else None]
        if base in plugins():
            values.append(str(plugins()[base]))
        return _digest([values, self.digest("method.exclude", "backbone", "seed", "threads", "device")])

    def clip_digest(self, dataset: str, clip: str) -> str:
        """Digest of the settings that one clip is made from; of the dataset's other clips only where their frames are in it."""
        whole = self.config.datasets[dataset]
        if whole.kind == "photographs":  # the next photograph moves in front of this one
            return _digest([dataset, clip, whole.model_dump(mode="json")])
        own = whole.clips.get(clip)
        values = [whole.model_dump(mode="json", exclude={"clips", "limit", "archives"}), own.model_dump(mode="json") if own else None]
        return _digest([dataset, clip, values])

    def mem_mb(self, rule: str) -> int:
        """Main memory that a job of a rule asks for; measuring needs more where one of the metrics does."""
        asked = int(getattr(self.config.jobs, rule).mem_mb)
        return max(asked, HEAVY_METRICS_MB) if rule == "measure" and HEAVY_METRICS & set(self.config.metrics) else asked

    def runtime(self, rule: str) -> int:
        """Minutes that a job of a rule asks for."""
        return int(getattr(self.config.jobs, rule).runtime)

    def gpu(self, rule: str) -> int:
        """GPUs that a job of a rule asks for."""
        return int(self.config.device == "cuda" and rule in ON_DEVICE)

    def weights(self) -> list[str]:
        """Weight files of the backbone that the stages read."""
        backbone = self.config.backbone
        flow = backbone.flow_weights if self.config.sampling.flow == "raft" else None
        return [str(path) for path in (backbone.weights, backbone.vae_weights, flow) if path is not None]

    def assets(self) -> list[str]:
        """Files of weights that the metrics read, here or not."""
        from qvsr.data.assets import get

        return [self.asset_path(get(name)[1].file) for name in assets_of(self.config.metrics)]

    def official(self) -> dict[str, str]:
        """Files that the backbone's weights are converted from, here or not; none where they are given as they are."""
        from qvsr.data.assets import read

        sources = official_sources(self.config)
        return {key: self.asset_path(read()[name].file) if name in read() else name for key, name in sources.items()}

    def asset_path(self, file: str) -> str:
        """Where such a file lies, of whatever configuration; from the working directory where it is below it."""
        from qvsr.data.assets import folder

        place, here = folder().absolute() / file, Path.cwd()
        return str(place.relative_to(here) if place.is_relative_to(here) else place)

    def assets_here(self) -> list[str]:
        """Those of them that are here: a metric without its weights has no value, and gets one when they appear."""
        return [Path(path).name for path in self.assets() if Path(path).is_file()]

    def quantized(self) -> list[tuple[str, str]]:
        """(method, bits) of every quantized checkpoint of the tables."""
        named = [method for method in self.config.methods if method not in (*REFERENCES, *self.config.external)]
        return [(method, bits) for method in named for bits in self.config.bits]

    def ablated(self) -> list[tuple[str, str]]:
        """(method, bits) of every quantized checkpoint of the ablation's tables, each once."""
        names = dict.fromkeys(name for names in self.config.ablation.values() for name in names)
        return [(method, bits) for method in names for bits in self.config.bits]

    def external(self) -> list[tuple[str, str]]:
        """(method, bits) of every row whose frames a rule of the user's own writes."""
        rows = self.config.external
        return [(method, bits) for method in self.config.methods if method in rows for bits in rows[method].bits]

    def rows(self) -> list[tuple[str, str]]:
        """(method, bits) of every row of the tables, those for orientation first."""
        return [(method, UNQUANTIZED_BITS) for method in REFERENCES] + self.quantized() + self.external()

    def rules(self) -> list[str]:
        """Files of the user's own with rules that join the workflow."""
        return list(dict.fromkeys(str(external.rules.absolute()) for external in self.config.external.values()))

    def restored_here(self) -> str:
        """Pattern of the methods that the rule `restore` writes: all but external ones, for which there is another."""
        names = "|".join(re.escape(name) for name in self.config.external)
        return rf"(?!(?:{names})-W\d+A)[^/]+" if names else r"[^/]+"

    def execution(self, method: str) -> str:
        """The option that says how a row was computed, if its clips do not."""
        return "--execution external" if method in self.config.external else ""

    def suffixes(self, method: str) -> list[str]:
        """Ends of a row's folders, one a noise seed: nothing for the run's own seed, which is the first."""
        if method in (GROUND_TRUTH, BICUBIC, *self.config.external):  # no noise goes into them
            return [""]
        return ["", *(f"{SEED_SUFFIX}{seed}" for seed in self.config.seeds if seed != self.config.seed)]

    def noise_seed(self, suffix: str) -> int:
        """The seed that the end of a row's folder stands for."""
        return int(suffix.removeprefix(SEED_SUFFIX)) if suffix else self.config.seed

    def used(self) -> list[str]:
        """Datasets that the run reads."""
        return [*self.config.evaluate, self.config.calibration.dataset]

    def unbuilt(self, dataset: str) -> bool:
        """Whether the run has to build a dataset first: one of the paper's with archives that is not there whole."""
        from qvsr.data.datasets import is_built

        return bool(archives_of(self.config, dataset)) and not is_built(self.config.datasets[dataset])

    def asked(self, dataset: str) -> str:
        """Digest of the clips that the settings ask for."""
        settings = self.config.datasets[dataset]
        return _digest([settings.limit, *settings.clips])

    def built(self, dataset: str) -> str:
        """The file that says that a set was built, with these clips."""
        return str(self.output / "datasets" / f"{dataset}-{self.asked(dataset)}")

    def check_results(self, dataset: str) -> None:
        """Refuse to build a set while results of it with fewer clips are here: Snakemake would take them as they are.

        Raises:
            SystemExit: there are; one line that says what to do, without Snakemake's traceback.
        """
        places = [self.output / "measured" / dataset] + [self.output / "calibration"] * (dataset == self.config.calibration.dataset)
        for place in places:
            if place.exists():
                raise SystemExit(
                    f"error: datasets.{dataset}: the settings ask for more clips than were built, and {place} is of those: "
                    "build the set first, with the same settings and `datasets` in place of the targets, then give this command again"
                )

    def archives(self, dataset: str) -> list[str]:
        """Folders of unpacked archives that a dataset is built from, here or not."""
        from qvsr.data.assets import read

        return [self.asset_path(read()[name].unpack) for name in archives_of(self.config, dataset)]

    def find_clips(self) -> None:
        """Look for every clip, as far as the sets are built, so that what is missing is said before anything runs."""
        unbuilt = [dataset for dataset in self.used() if self.unbuilt(dataset)]
        for dataset in self.used():
            if dataset not in unbuilt:
                self.clips(dataset)
        if not unbuilt:
            self.picture()

    def clips(self, dataset: str) -> list[str]:
        """Names of a dataset's clips."""
        from qvsr.data.datasets import clip_names

        if self.unbuilt(dataset):
            self.check_results(dataset)
            self.wait_for(dataset)
        return clip_names(self.config, dataset)

    def calibration_clips(self) -> list[str]:
        """Folders of LQ frames that calibration samples are recorded from."""
        dataset = self.config.calibration.dataset
        return [str(self.output / "clips" / dataset / "LQ" / clip) for clip in self.clips(dataset)]

    def sources(self, dataset: str, clip: str) -> list[str]:
        """Files of the user's own that a clip is made from."""
        from qvsr.data.datasets import source_files

        return [str(file) for file in source_files(self.config, dataset, clip)]

    def pairs(self) -> list[tuple[str, str]]:
        """(dataset, clip) of every clip that is measured."""
        return [(dataset, clip) for dataset in self.config.evaluate for clip in self.clips(dataset)]

    def picture(self) -> tuple[str, str]:
        """(dataset, clip) shown in the comparison picture: the chosen one, or the first where its dataset is not evaluated here.

        A file that extends another and evaluates a dataset of its own need not choose again.
        """
        pairs, chosen = self.pairs(), self.config.picture
        if chosen in pairs:
            return chosen
        if chosen is None or (chosen[0] in self.config.datasets and chosen[0] not in self.config.evaluate):
            return pairs[0]
        raise ConfigError("picture: " + suggest("clip", "/".join(chosen), ("/".join(pair) for pair in pairs)))

    def picture_frames(self) -> list[str]:
        """Folders of frames that the comparison picture is made of."""
        return [self.frames(*self.picture(), method, bits) for method, bits in self.rows()]

    def row_folder(self, dataset: str, method: str, bits: str, suffix: str = "") -> str:
        """Folder of a row's clips with one noise seed; the ground truth's lie where the clips stage wrote them, and nowhere else."""
        if method == GROUND_TRUTH:
            return str(self.output / "clips" / dataset / "GT")
        return str(self.output / "restored" / dataset / f"{method}-{bits}{suffix}")

    def frames(self, dataset: str, clip: str, method: str, bits: str) -> str:
        """Folder of a row's frames of one clip."""
        return f"{self.row_folder(dataset, method, bits)}/{clip}"

    def row_frames(self, dataset: str, method: str, bits: str = UNQUANTIZED_BITS, suffix: str = "") -> list[str]:
        """Folders of a row's frames with one noise seed, clip by clip."""
        folder = self.row_folder(dataset, method, bits, suffix)
        return [f"{folder}/{clip}" for clip in self.clips(dataset)]

    def measured(self, rows: Sequence[tuple[str, str]] | None = None) -> list[str]:
        """Result files of rows, one a data set and noise seed, by default of the tables' rows."""
        return [
            str(self.output / "measured" / dataset / f"{method}-{bits}{suffix}.jsonl")
            for method, bits in (self.rows() if rows is None else rows)
            for dataset in self.config.evaluate
            for suffix in self.suffixes(method)
        ]

    def checkpoint(self, method: str, bits: str) -> list[str]:
        """The quantized checkpoint that a restoration reads; none for what is not quantized here."""
        return [] if method in (*REFERENCES, *self.config.external) else [str(self.output / "quantized" / f"{method}-{bits}.safetensors")]


def clip_name(folder: Path) -> str:
    """``dataset/clip`` of a clip folder ``…/dataset/LQ/clip``: what its noise is keyed by.

    >>> clip_name(Path("results/clips/real/LQ/bikes"))
    'real/bikes'
    """
    folder = folder.absolute()
    return f"{folder.parent.parent.name}/{folder.name}"


def export(config: Config) -> None:
    """Hand the command of vsreval on to the metrics, which know no settings: by a variable, which wins over the default."""
    if config.vsreval != VsrevalSettings():
        os.environ[VsrevalSettings.VARIABLE] = config.vsreval.command


def environment(root: Path = ROOT) -> None:
    """Let the workflow's commands find this interpreter and this package from any working directory."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), known] if known else [str(root)])
