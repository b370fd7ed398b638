"""Copy the tables and pictures of the last run to results/reference, the main table into the README, the ablation into docs/ablation.md.

python scripts/update_readme.py           after `make tables`; the ablation too if it was run
python scripts/update_readme.py --keys    only the table of settings in config/README.md
python scripts/update_readme.py --paper   only what docs/paper.md and the README say of the paper's size, costs and expected hours: seconds, no weights
python scripts/update_readme.py --speed   after `make bench`: only benchmarks/reference and the README's table of speed
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # so that it runs from any folder, with nothing installed
REFERENCE = ROOT / "results" / "reference"
SPEED = ROOT / "benchmarks" / "reference"
PAPER = ROOT / "config" / "paper.yaml"
COST, COST_RANK = "cost-paper", 24  # files of the costs at full size, and the rank at which they are counted
PLANNED = ("a6000", "a100", "h100")  # for which docs/paper.md has hours
CORES, SOME_METHODS = 64, ("maxmin", "quantvsr")
QUANTITIES = {"params": ("params_m", "params_m"), "macs": ("macs_g", "flops_g")}  # columns of our cost table, and of the paper's


def replace_between(file: Path, mark: str, text: str) -> None:
    """Put text between the lines `<!-- mark: begin -->` and `<!-- mark: end -->`."""
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    old = file.read_text()
    if old.count(begin) != 1 or old.count(end) != 1:
        sys.exit(f"error: {file} must have {begin.strip()} and {end} once each")
    before, after = old.split(begin)[0], old.split(end)[1]
    file.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}")


def update_keys() -> None:
    table = subprocess.run(
        [sys.executable, "-m", "qvsr", "schema", "--markdown"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    replace_between(ROOT / "config" / "README.md", "keys", table)


def update_results(results: Path) -> None:
    for name in ("tables", "figures"):
        if not (results / name).is_dir():
            sys.exit(f"error: no {results / name}; run `make tables` first")
    REFERENCE.mkdir(parents=True, exist_ok=True)
    ablated = (results / "ablation").is_dir()
    for old in REFERENCE.iterdir():
        if old.stem != COST and (ablated or old.stem != "ablation"):  # what this run has not made stays
            old.unlink()
    for folder in ("tables", "figures", *(["ablation"] if ablated else [])):
        for file in sorted((results / folder).iterdir()):
            if not file.name.startswith("."):
                shutil.copy(file, REFERENCE / file.name)
    for needed in ("metrics.md", "comparison.png"):
        if not (REFERENCE / needed).is_file():
            sys.exit(f"error: {results} has no {needed}")
    replace_between(ROOT / "README.md", "table", main_table((REFERENCE / "metrics.md").read_text()))
    if ablated:
        replace_between(ROOT / "docs" / "ablation.md", "ablation", (REFERENCE / "ablation.md").read_text())


def main_table(metrics: str) -> str:
    """What the README shows of metrics.md: all but the list of signatures, the title as a bold line, links as from the root."""
    shown, inside = [], False
    for line in metrics.splitlines():
        inside = line.startswith("- Signatures:") or (inside and line.startswith("  "))
        if not inside:
            shown.append(f"**{line.removeprefix('### ')}**" if line.startswith("### ") else line)
    return re.sub(r"\]\((\w+\.md)\)", rf"]({REFERENCE.relative_to(ROOT).as_posix()}/\1)", "\n".join(shown).strip())


def cost_lines() -> list[dict[str, Any]]:
    """Costs of QuantVSR at full size beside the paper's; counted on the meta device, without weights.

    A line is our row of the cost table, with `layer_macs_g` (without bias additions), the paper's numbers as `paper_…`, and `…_ranks`: between
    which ranks in every layer the published rule gives what the paper prints, rounded as it is there; None for full precision.
    """
    from qvsr.config import load
    from qvsr.quant.cost import FULL, cost, planned_facts
    from qvsr.report.paper import facts

    printed = {line["bits"]: line for line in facts("cost")}
    lines: list[dict[str, Any]] = []
    for method, bits, network in planned_facts(load(PAPER, {"methods": ["quantvsr"]}), COST_RANK):
        line = cost(network, method, bits).row() | {"layer_macs_g": sum(layer.macs for layer in network.layers) / 1e9}
        for what, (own, theirs) in QUANTITIES.items():
            paper = int(printed[bits][theirs])
            line |= {f"paper_{own}": paper, f"{what}_ranks": None}
            if line["quantized_layers"]:
                branchless = lines[0][own] * int(bits.partition("A")[2]) / FULL
                unit = (line[own] - branchless) / line["rank_mean"]
                line[f"{what}_ranks"] = ((paper - 0.5 - branchless) / unit, (paper + 0.5 - branchless) / unit)
        lines.append(line)
    return lines


def implied_ranks(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Between which ranks the published rule gives what the paper prints at all bits, by quantity."""
    spans = {what: [line[f"{what}_ranks"] for line in lines if line[f"{what}_ranks"]] for what in QUANTITIES}
    return {what: (max(low for low, _ in found), min(high for _, high in found)) for what, found in spans.items()}


def cost_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    from qvsr.report.tables import csv_text

    columns = [
        "bits",
        "rank_mean",
        "paper_params_m",
        "params_m",
        "params_exact_m",
        "paper_macs_g",
        "macs_g",
        "macs_exact_g",
        "layer_macs_g",
    ]
    columns += ["attention_macs_g", "rotation_macs_g", "quantized_layers", "layers"]
    body = [[f"{line[name]:.6f}" if isinstance(line[name], float) else str(line[name]) for name in columns] for line in lines]
    for what in QUANTITIES:
        columns += [f"{what}_rank_from", f"{what}_rank_to"]
        for cells, line in zip(body, lines, strict=True):
            cells += [f"{end:.6f}" for end in line[f"{what}_ranks"]] if line[f"{what}_ranks"] else ["", ""]
    return csv_text(columns, body)


def cost_table(lines: Sequence[Mapping[str, Any]], short: bool) -> list[str]:
    """Lines of the table in Markdown; the short one leaves out attention, rotations and the ranks that the paper's numbers imply."""
    from qvsr.report.tables import markdown_table

    header, body = ["Bits"], [[str(line["bits"])] for line in lines]
    for title, what, unit in (("Params (M)", "params", "m"), ("MACs (G)", "macs", "g")):
        header += [f"{title}: paper", f"rank {COST_RANK}", "exact"]
        for cells, line in zip(body, lines, strict=True):
            cells += [f"{line[f'paper_{what}_{unit}']:,}", f"{line[f'{what}_{unit}']:,.1f}", f"{line[f'{what}_exact_{unit}']:,.1f}"]
    if not short:
        header += ["Attention (G)", "Rotation (G)", "Paper's rank by params", "by MACs"]
        for cells, line in zip(body, lines, strict=True):
            cells += [f"{line['attention_macs_g']:,.1f}", f"{line['rotation_macs_g']:,.1f}"]
            cells += ["{:.1f} to {:.1f}".format(*line[f"{what}_ranks"]) if line[f"{what}_ranks"] else "–" for what in QUANTITIES]
    return markdown_table([[header], body], 1)


def cost_markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The whole table, and by which rules its columns are counted."""
    full, last = lines[0], lines[-1]
    by = {what: "{:.1f} ({:.2f} to {:.2f})".format(sum(ends) / 2, *ends) for what, ends in implied_ranks(lines).items()}
    notes = [
        "Paper: the cost table of arXiv 2508.04485; what it calls FLOPs are multiply-accumulates. The others: the U-Net of `config/paper.yaml` alone, "
        f"one call on a segment of 5 frames of a 64×64 latent tile; {last['quantized_layers']} of {last['layers']} layers are quantized.",
        f"Full precision: {full['params_m'] * 1e6:,.0f} parameters; {full['layer_macs_g']:,.3f} G multiply-accumulates of linear and convolution layers "
        f"and {full['macs_g'] - full['layer_macs_g']:,.3f} G bias additions.",
        f"Rank {COST_RANK}: as published, everything × b/32 plus a 32-bit low-rank branch, here of rank {COST_RANK} in every quantized layer; bias "
        "additions counted, attention products and rotations not.",
        "Exact: every number at the precision it is kept or multiplied in, in 32-bit equivalents; unquantized layers, scales, attention products "
        "and rotations counted. Rotations as dense matrices; a fast transform takes less.",
        f"The paper's rows imply an effective rank of {by['params']} by parameters and of {by['macs']} by multiply-accumulates; in brackets what "
        "fits all three rows as they are rounded. No one rank in every layer fits both. QuantVSR allocates ranks by layer, and layers at high "
        "resolution, which weigh more in multiply-accumulates, seem to get lower ones; which, only the calibrated network tells.",
        "A run counts its own checkpoints with the ranks that they have: `results/paper/tables/cost.md`.",
    ]
    return "\n".join([*cost_table(lines, short=False), "", *(f"- {note}" for note in notes), ""])


def cost_in_readme(lines: Sequence[Mapping[str, Any]]) -> str:
    by = {what: f"{(low + high) / 2:.1f}" for what, (low, high) in implied_ranks(lines).items()}
    note = (
        f"Rank {COST_RANK}: by the paper's rule, with that rank in every layer; the paper's own rows imply {by['params']} by parameters and {by['macs']} by "
        "multiply-accumulates.\nExact: every number at the precision it is kept or multiplied in, attention and rotations counted. "
        f"[All columns and the rules]({(REFERENCE / COST).relative_to(ROOT).as_posix()}.md)."
    )
    return "\n".join([*cost_table(lines, short=True), "", note])


def update_cost() -> None:
    """Write the costs at full size to results/reference, and the short table of them into the README."""
    lines = cost_lines()
    REFERENCE.mkdir(parents=True, exist_ok=True)
    (REFERENCE / f"{COST}.csv").write_text(cost_csv(lines))
    (REFERENCE / f"{COST}.md").write_text(cost_markdown(lines))
    replace_between(ROOT / "README.md", "cost", cost_in_readme(lines))


def hours_table() -> str:
    """Expected hours of config/paper.yaml on GPUs in Markdown, as `python -m qvsr plan` says them where none of the data is here."""
    from qvsr.config import load
    from qvsr.report.tables import markdown_table
    from qvsr.stages.plan import plan

    config = load(PAPER)
    config = load(PAPER, {"datasets": {name: {"path": "not/here"} for name in config.datasets}})
    header = ["", "GPU hours", "1 GPU", "8 GPUs", f"{' and '.join(SOME_METHODS)}: GPU hours", "1 GPU", "8 GPUs"]
    body = []
    for device in PLANNED:
        cells: list[str] = []
        for methods in (config.methods, SOME_METHODS):
            planned = plan(config.model_copy(update={"methods": methods}), device)
            hours = (planned.total_hours, planned.wall_hours(1, CORES), planned.wall_hours(8, CORES))
            cells += [f"{float(f'{value:.2g}'):,.0f}" for value in hours]  # they are good to a factor of two
        body.append([planned.device.partition(",")[0], *cells])
    return "\n".join(markdown_table([[header], body], 1))


def update_speed(results: Path) -> None:
    """Copy the tables of `make bench` to benchmarks/reference, and write their short form into the README."""
    from qvsr.report.speed import Speed

    tables = results / "speed" / "tables"
    if not (tables / "machine.json").is_file():
        sys.exit(f"error: no {tables}; run `make bench` first")
    quick = [kind for kind, head in Speed.of_tables(tables).heads.items() if head["quick"]]
    if quick:
        sys.exit(f"error: {', '.join(quick)} of {tables} were measured with --quick, which is no result: run `make bench`")
    SPEED.mkdir(parents=True, exist_ok=True)
    for old in SPEED.iterdir():
        if old.name != "README.md":
            old.unlink()
    for file in sorted(tables.iterdir()):
        if not file.name.startswith("."):
            shutil.copy(file, SPEED / file.name)
    replace_between(ROOT / "README.md", "speed", speed_in_readme())


def speed_in_readme() -> str:
    from qvsr.report.speed import PAGE, Speed, short

    return short(Speed.of_tables(SPEED), (SPEED / PAGE).relative_to(ROOT).as_posix())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", action="store_true", help="only the table of settings in config/README.md")
    parser.add_argument("--paper", action="store_true", help="only the costs and expected hours at the paper's size")
    parser.add_argument("--speed", action="store_true", help="only the table of measured speed, after `make bench`")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    everything = not (arguments.keys or arguments.paper or arguments.speed)
    if everything or arguments.keys:
        update_keys()
    if everything or arguments.paper:
        update_cost()
        replace_between(ROOT / "docs" / "paper.md", "hours", hours_table())
    if everything:
        update_results(arguments.results)
    if arguments.speed:
        update_speed(arguments.results)


if __name__ == "__main__":
    main()
