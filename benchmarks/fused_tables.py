"""Markdown tables of what `benchmarks/fused_loss.py` and `benchmarks/lm_step.py` recorded.

    python benchmarks/fused_tables.py --write      # between the marks in docs/large-vocabularies.md

Without `--write` the tables are printed. No figure of that section is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "large-vocabularies.md"
MARKS = ("<!-- tables: python benchmarks/fused_tables.py --write -->", "<!-- end of tables -->")
MIB = 1 << 20


def command(run: dict[str, Any]) -> str:
    """What made a run."""
    given = f"--tokens {run['tokens']} --vocabulary {run['vocabulary']} --widths {run['widths']}"
    if run["threads"] != 1:
        given += f" --threads {run['threads']}"
    if run["masked"]:
        given += f" --masked {run['masked']}"
    if run["dtype"] != "float32":
        given += f" --dtype {run['dtype']}"
    if run["frozen"]:
        given += " --frozen"
    methods = ";".join(row["method"] for row in run["rows"])
    return f'python benchmarks/fused_loss.py --repeats {run["repeats"]} {given} --methods "{methods}"'


def title(run: dict[str, Any]) -> str:
    """The size, and what is special."""
    special = [
        f"N = {run['tokens']:,}, V = {run['vocabulary']:,}, widths {run['widths'].replace(',', ' and ')}"
    ]
    if run["threads"] != 1:
        special.append(f"{run['threads']} threads")
    if run["masked"]:
        special.append(f"{run['masked']:.0%} of the positions masked")
    if run["frozen"]:
        special.append("frozen head")
    if run["dtype"] != "float32":
        special.append(f"{run['dtype']} weights")
    return ", ".join(special)


def table(run: dict[str, Any]) -> str:
    """One run as a table."""
    first = run["rows"][0]["method"]
    lines = [f"**{title(run)}** ({run['repeats']} repeats; `{command(run)}`):", ""]
    lines += [f"| | CPU seconds | / {first} | MiB beyond the gradients |", "|---|---|---|---|"]
    for row in run["rows"]:
        extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / MIB:,.0f}"
        lines.append(f"| {row['method']} | {row['seconds']:.2f} | {row['over_first']:.2f} | {extra} |")
    return "\n".join(lines)


def step_table(found: dict[str, Any]) -> str:
    """The whole training step."""
    size = f"--vocabulary {found['vocabulary']} --batch {found['batch']} --length {found['length']}"
    lines = [
        f"**A whole training step** (`python benchmarks/lm_step.py {size} --steps {found['steps']}`):",
        "",
    ]
    lines += ["| | CPU seconds a step | / fused | MiB |", "|---|---|---|---|"]
    base = found["ways"]["hf_kd, fused"]["median"]
    for name, way in found["ways"].items():
        lines.append(
            f"| {name} | {way['median']:.2f} | {way['median'] / base:.2f} | {way['bytes'] / MIB:,.0f} |"
        )
    return "\n".join(lines)


def tables() -> str:
    """All of them, in the order of the size."""
    runs = json.loads((RESULTS / "fused_loss.json").read_text())["runs"]
    special = ("threads", "dtype", "frozen", "masked", "widths", "vocabulary", "tokens")
    runs.sort(key=lambda run: [run[name] != "float32" if name == "dtype" else run[name] for name in special])
    parts = [table(run) for run in runs]
    return "\n\n".join([*parts, step_table(json.loads((RESULTS / "lm_step.json").read_text()))])


def page(text: str) -> str:
    """The page with the tables as they are recorded."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{tables()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    """Print, or write into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/large-vocabularies.md")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(tables())  # noqa: T201


if __name__ == "__main__":
    main()
