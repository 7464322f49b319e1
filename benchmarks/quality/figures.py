"""Tables and plots from the files of results: `python benchmarks/quality/figures.py`.

Writes `benchmarks/results/quality_*.png` and renews the tables in `docs/quality.md`, which stand between
`<!-- name -->` and `<!-- /name -->`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import DEFAULT, spread
from plots import arms_of, chosen, load, plot_arms, plot_depth, plot_shapes, runs, runs_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quality.md"
# Column: key, factor, digits.
COLUMNS = {
    "accuracy, %": ("accuracy", 100, 1),
    "KL, nats": ("kl", 1, 3),
    "agreement, %": ("agreement", 100, 1),
    "ECE, %": ("ece", 100, 1),
}


def cell(runs: list[dict[str, float]], key: str, factor: float, digits: int) -> str:
    """Mean and spread."""
    mean, deviation = spread([factor * run[key] for run in runs])
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(runs) > 1 else "")


def table(data: dict[str, Any], columns: dict[str, tuple[str, float, int]], **key: Any) -> list[str]:
    """A row an arm."""
    best = chosen(data, **key)
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|---|--:|" + "--:|" * len(columns)]
    for arm in arms_of(data, **key):
        runs = runs_of(data, arm=arm, **key)
        name = f"{arm} (**chosen on dev**)" if arm == best else arm
        cells = [cell(runs, *column) for column in columns.values()]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def sst2_tables(data: dict[str, Any]) -> list[str]:
    """By depth, and the few labels."""
    sizes, times = data.get("sizes", {}), data.get("latency_ms", {})
    lines = ["| model | parameters, M | latency, ms | accuracy, % | KL, nats |", "|---|--:|--:|--:|--:|"]
    for name in ("teacher", "3 layers", "2 layers", "1 layers"):
        runs = [data["teacher"]["test"]]
        if name != "teacher":
            runs = runs_of(data, case="labelled", depth=int(name[0]), arm=DEFAULT.name)
        if runs and name in sizes:
            shown = name.replace("1 layers", "1 layer") + ("" if name == "teacher" else ", default")
            scores = f"{cell(runs, 'accuracy', 100, 1)} | {cell(runs, 'kl', 1, 3)}"
            lines.append(f"| {shown} | {sizes[name] / 1e6:.1f} | {times[name]:.1f} | {scores} |")
    titles = {
        "labelled": "{}, 1,200 labelled rows, cut from the teacher",
        "300 labels": "{}, 300 labelled rows, cut from the teacher; those who can learn from 2,100 more",
        "random start": "{}, 1,200 labelled rows, from random weights",
    }
    for case, title in titles.items():
        for depth in (1, 2, 3):
            if arms_of(data, case=case, depth=depth):
                layers = f"{depth} layer{'s' * (depth > 1)}"
                lines += ["", f"{title.format(layers)}:", "", *table(data, COLUMNS, case=case, depth=depth)]
    return lines


def shakespeare_tables(data: dict[str, Any]) -> list[str]:
    """By shape."""
    teacher = data["teacher"]["test"]["perplexity"]
    columns = {name: COLUMNS[name] for name in ("KL, nats", "agreement, %")}
    columns = {"perplexity": ("perplexity", 1, 2), **columns}
    lines = [f"The teacher's perplexity is {teacher:.2f}."]
    for shape in dict.fromkeys(run["shape"] for run in data["runs"]):
        size = data.get("sizes", {}).get(shape.removesuffix(", cut"))
        million = f", {size / 1e6:.2f} M parameters" if size else ""
        lines += ["", f"{shape}{million}:", "", *table(data, columns, shape=shape)]
    return lines


#: Task -> file of results, what is a run of it, and the score whose gap to the teacher is closed.
GAPS: dict[str, tuple[str, dict[str, Any], str]] = {
    "digits": ("digits", {}, "accuracy"),
    "MNIST": ("mnist", {}, "accuracy"),
    "SST-2, 1 layer": ("sst2", {"case": "labelled", "depth": 1}, "accuracy"),
    "SST-2, 2 layers": ("sst2", {"case": "labelled", "depth": 2}, "accuracy"),
    "SST-2, 3 layers": ("sst2", {"case": "labelled", "depth": 3}, "accuracy"),
    "SST-2, 300 labels, 1 layer": ("sst2", {"case": "300 labels", "depth": 1}, "accuracy"),
    "SST-2, 300 labels, 2 layers": ("sst2", {"case": "300 labels", "depth": 2}, "accuracy"),
    "tinyshakespeare, 96 x 2": ("shakespeare", {"shape": "96 x 2"}, "perplexity"),
    "tinyshakespeare, 128 x 1": ("shakespeare", {"shape": "128 x 1"}, "perplexity"),
    "tinyshakespeare, 80 x 3": ("shakespeare", {"shape": "80 x 3"}, "perplexity"),
    "tinyshakespeare, 96 x 2, cut": ("shakespeare", {"shape": "96 x 2, cut"}, "perplexity"),
}


def gap_closed(data: dict[str, Any], arm: str, key: str, where: dict[str, Any]) -> str:
    """Share of the control's distance to the teacher that an arm takes away on the same seeds, in percent."""
    values = {
        name: {r["seed"]: r["test"][key] for r in runs(data, arm=name, **where)} for name in (arm, "control")
    }
    seeds = sorted(set(values[arm]) & set(values["control"]))
    if not seeds:
        return ""
    mean, control = (spread([values[name][s] for s in seeds])[0] for name in (arm, "control"))
    return f"{100 * (mean - control) / (data['teacher']['test'][key] - control):.0f}"


def header(what: str, arms: Sequence[str]) -> list[str]:
    """Of a table with score and KL of each arm."""
    return [
        f"| {what} | " + " | ".join(f"{arm}: score | KL" for arm in arms) + " |",
        "|---|" + "--:|--:|" * len(arms),
    ]


def gaps() -> list[str]:
    """The gap closed by task, in the score and in KL."""
    arms = ["by hand", "TextBrewer", DEFAULT.name, "chosen on dev"]
    lines = header("gap closed, %", arms)
    for task, (name, where, key) in GAPS.items():
        data = load(name)
        if data is None or not runs_of(data, arm="control", **where):
            continue
        best = chosen(data, **where)
        cells = []
        for arm in arms:
            taught = best if arm == "chosen on dev" else arm
            cells += [gap_closed(data, taught, key, where), gap_closed(data, taught, "kl", where)]
        lines.append(f"| {task} ({key}) | " + " | ".join(cells) + " |")
    return lines


#: Mixes that could replace the default.
MIXES = (DEFAULT.name, "forward_kl, T=2", "forward_kl, T=4", "logit_mse")


def against(
    data: dict[str, Any], arm: str, key: str, factor: float, digits: int, where: dict[str, Any]
) -> str:
    """What an arm adds to the hand-written loss on the same seeds: mean and spread of the differences."""
    values = {
        name: {r["seed"]: r["test"][key] for r in runs(data, arm=name, **where)} for name in (arm, "by hand")
    }
    seeds = sorted(set(values[arm]) & set(values["by hand"]))
    if not seeds:
        return ""
    mean, deviation = spread([factor * (values[arm][s] - values["by hand"][s]) for s in seeds])
    return f"{mean:+.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(seeds) > 1 else " (1 seed)")


def mixes() -> list[str]:
    """Each mix against the hand-written loss, in the score and in KL."""
    lines = header("against by hand", MIXES)
    for task, (name, where, key) in GAPS.items():
        data = load(name)
        if data is None or not runs(data, arm="by hand", **where):
            continue
        factor = 100 if key == "accuracy" else 1
        cells = []
        for arm in MIXES:
            cells += [against(data, arm, key, factor, 1, where), against(data, arm, "kl", 1, 3, where)]
        unit = ", points" if key == "accuracy" else ""
        lines.append(f"| {task} ({key}{unit}) | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Plots, and the page's tables."""
    three = [
        ("accuracy, %", "accuracy", 100),
        ("KL to the teacher, nats", "kl", 1),
        ("calibration error, %", "ece", 100),
    ]
    plot_arms("digits", "Digits: every dot a seed, the mark their mean, dotted the teacher", three)
    plot_arms("mnist", "MNIST: every dot a seed, the mark their mean, dotted the teacher", three)
    for depth in (1, 2):
        plot_arms(
            "sst2",
            f"SST-2, {depth} of 6 layers: every dot a seed, dotted the teacher",
            three,
            case="labelled",
            depth=depth,
        )
    plot_arms(
        "sst2",
        "SST-2, 300 labelled rows, 2 of 6 layers: every dot a seed, dotted the teacher",
        three,
        case="300 labels",
    )
    perplexity = [("perplexity", "perplexity", 1), ("KL to the teacher, nats", "kl", 1)]
    title = "tinyshakespeare, a student of width 96 and 2 layers: every dot a seed, dotted the teacher"
    plot_arms("shakespeare", title, perplexity, shape="96 x 2")
    plot_shapes()
    tables: dict[str, list[str]] = {"gaps": gaps(), "mixes": mixes()}
    for name, lines in (
        ("digits", lambda data: table(data, COLUMNS)),
        ("mnist", lambda data: table(data, COLUMNS)),
        ("sst2", sst2_tables),
        ("shakespeare", shakespeare_tables),
    ):
        data = load(name)
        if data:
            tables[name] = lines(data)
    data = load("sst2")
    if data:
        plot_depth(data)
    if PAGE.exists():
        text = PAGE.read_text()
        for name, lines in tables.items():
            new = f"<!-- {name} -->\n\n" + "\n".join(lines) + f"\n\n<!-- /{name} -->"
            text = re.sub(
                f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, new=new: new, text, flags=re.DOTALL
            )
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
