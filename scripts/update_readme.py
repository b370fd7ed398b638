"""Copy the tables and pictures of the last run to results/reference, the main table into the README, the ablation into docs/ablation.md.

python scripts/update_readme.py           after `make tables`; the ablation too if it was run
python scripts/update_readme.py --keys    only the table of settings in config/README.md
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "results" / "reference"


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
        if ablated or not old.name.startswith("ablation."):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", action="store_true", help="only the table of settings in config/README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    update_keys()
    if not arguments.keys:
        update_results(arguments.results)


if __name__ == "__main__":
    main()
