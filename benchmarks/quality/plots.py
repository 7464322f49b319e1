"""Plots of the files of results: `benchmarks/results/quality_*.png`."""

from __future__ import annotations

import json
import statistics
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from arms import CANDIDATES, DEFAULT, RESULTS, spread
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, FAINT, STRONG = "#222222", "#9aa5b1", "#1f5fa8"
_FAR = 4


def load(name: str) -> dict[str, Any] | None:
    """A file of results, or None."""
    path = RESULTS / f"quality_{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def runs(data: dict[str, Any], **key: Any) -> list[dict[str, Any]]:
    """The runs with these values."""
    return [r for r in data["runs"] if all(r.get(k) == v for k, v in key.items())]


def runs_of(data: dict[str, Any], **key: Any) -> list[dict[str, float]]:
    """Scores on test rows."""
    return [r["test"] for r in runs(data, **key)]


def arms_of(data: dict[str, Any], **key: Any) -> list[str]:
    """Names of arms, in the order of their runs."""
    return list(dict.fromkeys(r["arm"] for r in data["runs"] if all(r.get(k) == v for k, v in key.items())))


def chosen(data: dict[str, Any], **where: Any) -> str:
    """The candidate with the lowest log loss on development rows, over the seeds that all of them have."""
    names = {recipe.name for recipe in CANDIDATES} | {data.get("best", {}).get("name", "")}
    there = {arm: {r["seed"]: r["dev"] for r in runs(data, arm=arm, **where)} for arm in names}
    there = {arm: found for arm, found in there.items() if found}
    seeds = set.intersection(*map(set, there.values())) if there else set()
    if not seeds:
        return ""
    return min(there, key=lambda arm: statistics.fmean(there[arm][seed]["log_loss"] for seed in seeds))


def dots(axis: Any, data: dict[str, Any], key: str, factor: float, **where: Any) -> None:
    """One row an arm: every seed, and the mean."""
    arms = arms_of(data, **where)
    best = chosen(data, **where)
    for y, arm in enumerate(reversed(arms)):
        values = [factor * run[key] for run in runs_of(data, arm=arm, **where)]
        colour = STRONG if arm == best else (FAINT if arm == "control" else INK)
        axis.plot(values, [y] * len(values), "o", color=colour, alpha=0.35, markersize=4)
        axis.plot([sum(values) / len(values)], [y], "|", color=colour, markersize=14, markeredgewidth=2.5)
    axis.set_yticks(range(len(arms)), list(reversed(arms)), fontsize=8)
    axis.set_ylim(-0.6, len(arms) - 0.4)
    means = [statistics.fmean(run[key] for run in runs_of(data, arm=arm, **where)) for arm in arms]
    if key in ("kl", "ece") and max(means) > _FAR * statistics.median(means):
        axis.set_xscale("log")  # one arm that is far off would press all others together
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
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


def plot_shapes() -> None:
    """Perplexity and KL by the student's shape, without a teacher and with the chosen recipe."""
    data = load("shakespeare")
    best = (data or {}).get("best", {}).get("name")
    if data is None or best is None:
        return
    shapes = [s for s in ("128 x 1", "96 x 2", "80 x 3", "96 x 2, cut") if runs(data, shape=s, arm=best)]
    if len(shapes) < 2:
        return
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    measures = [("perplexity", "perplexity"), ("KL to the teacher, nats", "kl")]
    for axis, (label, key) in zip(axes, measures, strict=True):
        for shift, (arm, colour) in zip((-0.1, 0.1), {"control": FAINT, best: STRONG}.items(), strict=True):
            for x, shape in enumerate(shapes):
                values = [r[key] for r in runs_of(data, shape=shape, arm=arm)]
                axis.plot([x + shift] * len(values), values, "o", color=colour, alpha=0.35, markersize=4)
                axis.plot(
                    [x + shift], [spread(values)[0]], "_", color=colour, markersize=14, markeredgewidth=2.5,
                    label=arm if x == 0 else None,
                )  # fmt: skip
        if key == "perplexity":
            axis.axhline(
                data["teacher"]["test"][key], color=STRONG, linewidth=1, linestyle=":", label="teacher"
            )
        names = [s.replace(", cut", ",\ncut from the teacher") for s in shapes]
        axis.set_xticks(range(len(shapes)), names, fontsize=8)
        axis.set_ylabel(label, fontsize=9)
        axis.grid(axis="y", color="#e5e8ec", linewidth=0.8)
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle("tinyshakespeare: width x layers at equal parameters", fontsize=10, x=0.01, ha="left")
    figure.savefig(RESULTS / "quality_shakespeare_shapes.png", dpi=130)
    plt.close(figure)
