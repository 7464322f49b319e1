"""Tables and plots from the files of results: `python benchmarks/quality/figures.py`.

Writes `benchmarks/results/quality_*.png` and renews the tables in `docs/quality.md`, which stand between
`<!-- name -->` and `<!-- /name -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from arms import DEFAULT, RESULTS, spread
from matplotlib.ticker import MaxNLocator

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quality.md"
# Column: key, factor, digits.
COLUMNS = {
    "accuracy, %": ("accuracy", 100, 1),
    "KL, nats": ("kl", 1, 3),
    "agreement, %": ("agreement", 100, 1),
    "ECE, %": ("ece", 100, 1),
}
INK, FAINT, STRONG = "#222222", "#9aa5b1", "#1f5fa8"


def load(name: str) -> dict[str, Any] | None:
    """A file of results, or None."""
    path = RESULTS / f"quality_{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def runs_of(data: dict[str, Any], **key: Any) -> list[dict[str, float]]:
    """Scores on test rows."""
    return [r["test"] for r in data["runs"] if all(r.get(k) == v for k, v in key.items())]


def arms_of(data: dict[str, Any], **key: Any) -> list[str]:
    """Names of arms, in the order of their runs."""
    return list(dict.fromkeys(r["arm"] for r in data["runs"] if all(r.get(k) == v for k, v in key.items())))


def cell(runs: list[dict[str, float]], key: str, factor: float, digits: int) -> str:
    """Mean and spread."""
    mean, deviation = spread([factor * run[key] for run in runs])
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(runs) > 1 else "")


def table(data: dict[str, Any], columns: dict[str, tuple[str, float, int]], **key: Any) -> list[str]:
    """A row an arm."""
    best = data.get("best", {}).get("name")
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
}


def gap_closed(data: dict[str, Any], arm: str, key: str, where: dict[str, Any]) -> str:
    """Share of the control's distance to the teacher that an arm takes away, in percent."""
    values = {name: [run[key] for run in runs_of(data, arm=name, **where)] for name in (arm, "control")}
    if not values[arm]:
        return ""
    mean, control = spread(values[arm])[0], spread(values["control"])[0]
    return f"{100 * (mean - control) / (data['teacher']['test'][key] - control):.0f}"


def gaps() -> list[str]:
    """The gap closed by task, in the score and in KL."""
    arms = ["by hand", "TextBrewer", DEFAULT.name, "chosen on dev"]
    lines = ["| gap closed, % | " + " | ".join(f"{arm}: score | KL" for arm in arms) + " |"]
    lines.append("|---|" + "--:|--:|" * len(arms))
    for task, (name, where, key) in GAPS.items():
        data = load(name)
        if data is None or not runs_of(data, arm="control", **where):
            continue
        best = data.get("best", {}).get("name", "")
        cells = []
        for arm in arms:
            taught = best if arm == "chosen on dev" else arm
            cells += [gap_closed(data, taught, key, where), gap_closed(data, taught, "kl", where)]
        lines.append(f"| {task} ({key}) | " + " | ".join(cells) + " |")
    return lines


def dots(axis: Any, data: dict[str, Any], key: str, factor: float, **where: Any) -> None:
    """One row an arm: every seed, and the mean."""
    arms = arms_of(data, **where)
    best = data.get("best", {}).get("name")
    for y, arm in enumerate(reversed(arms)):
        values = [factor * run[key] for run in runs_of(data, arm=arm, **where)]
        colour = STRONG if arm == best else (FAINT if arm == "control" else INK)
        axis.plot(values, [y] * len(values), "o", color=colour, alpha=0.35, markersize=4)
        axis.plot([sum(values) / len(values)], [y], "|", color=colour, markersize=14, markeredgewidth=2.5)
    axis.set_yticks(range(len(arms)), list(reversed(arms)), fontsize=8)
    axis.set_ylim(-0.6, len(arms) - 0.4)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.grid(axis="x", color="#e5e8ec", linewidth=0.8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)


def plot_arms(name: str, title: str, columns: list[tuple[str, str, float]], **where: Any) -> None:
    """Some measures side by side."""
    data = load(name)
    if data is None or not arms_of(data, **where):
        return
    rows = len(arms_of(data, **where))
    figure, axes = plt.subplots(
        1, len(columns), figsize=(9, 1.3 + 0.28 * rows), sharey=True, layout="constrained"
    )
    for axis, (label, key, factor) in zip(axes, columns, strict=True):
        dots(axis, data, key, factor, **where)
        axis.set_xlabel(label, fontsize=9)
        if key in data["teacher"]["test"] and key in ("accuracy", "perplexity"):
            axis.axvline(factor * data["teacher"]["test"][key], color=STRONG, linewidth=1, linestyle=":")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    suffix = "_".join(str(v).replace(" ", "_") for v in where.values())
    figure.savefig(RESULTS / f"quality_{name}{'_' if suffix else ''}{suffix}.png", dpi=130)
    plt.close(figure)


def plot_depth(data: dict[str, Any]) -> None:
    """Accuracy and KL over latency, once there is more than one depth."""
    depths = [depth for depth in (1, 2, 3) if runs_of(data, case="labelled", depth=depth)]
    if "latency_ms" not in data or len(depths) < 2:
        return
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    arms = {"control": FAINT, DEFAULT.name: INK, data.get("best", {}).get("name", ""): STRONG}
    for axis, (label, key, factor) in zip(
        axes, [("accuracy, %", "accuracy", 100), ("KL, nats", "kl", 1)], strict=True
    ):
        for arm, colour in arms.items():
            points = []
            for depth in depths:
                runs = runs_of(data, case="labelled", depth=depth, arm=arm)
                if runs:
                    points.append(
                        (data["latency_ms"][f"{depth} layers"], spread([factor * r[key] for r in runs]))
                    )
            if points:
                axis.errorbar(
                    [x for x, _ in points],
                    [mean for _, (mean, _) in points],
                    [deviation for _, (_, deviation) in points],
                    fmt="o-",
                    color=colour,
                    label=arm,
                    capsize=3,
                    linewidth=1.2,
                    markersize=4,
                )
        axis.plot(
            [data["latency_ms"]["teacher"]],
            [factor * data["teacher"]["test"][key]],
            "s",
            color=STRONG,
            label="teacher",
        )
        axis.set_xlabel("latency of 8 sentences, ms", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
        axis.grid(color="#e5e8ec", linewidth=0.8)
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"SST-2: students of {', '.join(map(str, depths))} layers, and their teacher of 6",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    figure.savefig(RESULTS / "quality_sst2_depth.png", dpi=130)
    plt.close(figure)


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
    title = "tinyshakespeare, a student of 96 x 2: every dot a seed, dotted the teacher"
    plot_arms("shakespeare", title, perplexity, shape="96 x 2")
    tables: dict[str, list[str]] = {"gaps": gaps()}
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
