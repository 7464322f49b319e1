"""Charts of a `Results`, as SVG for a page (in the page's own colours) and as PNG for elsewhere."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hf_kd.results import Results

# Okabe and Ito's colours, which people tell apart whatever their colour vision; the arms differ in shape too.
_COLOURS = {"teacher": "#0072B2", "student": "#D55E00", "control": "#009E73"}
_OTHERS = ("#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = {"teacher": "s", "student": "o", "control": "^"}
# Stands for the page's own text colour until the SVG is written.
_INK = "#010203"
_WIDTH, _HEIGHT = 5.4, 3.3


def charts(results: Results) -> dict[str, Figure]:
    """Every chart that the results have the numbers for, by name, in reading order."""
    made: dict[str, Figure] = {}
    for name, draw in _CHARTS.items():
        with _style():
            figure = draw(results)
        if figure is not None:
            made[name] = figure
    return made


def svg(figure: Figure, name: str) -> str:
    """A chart as SVG text that takes its ink from the page around it; the same bytes for the same results."""
    out = io.StringIO()
    # The salt keeps the ids of several charts on one page apart.
    with _style({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def save_png(figure: Figure, path: Path) -> Path:
    """Write a chart as PNG, black on white."""
    with _style():
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    return path


def colour(results: Results, arm: str) -> str:
    """The colour of an arm in every chart."""
    further = [name for name in results.arms if name not in _COLOURS]
    return _COLOURS.get(arm) or _OTHERS[further.index(arm) % len(_OTHERS)]


def _style(more: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    inked = ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")
    settings: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
    settings.update({f"{name}color": _INK for name in inked})
    settings.update(more or {})
    return matplotlib.rc_context(settings)


def _figure(height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height))
    return figure, figure.add_subplot()


def _quality(results: Results) -> Figure | None:
    """Score of each arm, with its standard error where that is known."""
    names = [name for name in results.arms if _finite(results.score(name))]
    if len(names) < 2:
        return None
    figure, axes = _figure(0.9 + 0.45 * len(names))
    for row, name in enumerate(reversed(names)):
        error = results.standard_error(name)
        axes.errorbar(
            [results.score(name) or 0.0],
            [row],
            xerr=None if error is None else [error],
            fmt=_MARKERS.get(name, "D"),
            color=colour(results, name),
            markersize=8,
            capsize=4,
        )
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_ylim(-0.6, len(names) - 0.4)
    known = any(results.standard_error(name) for name in names)
    axes.set_xlabel(f"{results.primary_metric}{' ± standard error' if known else ''}")
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", alpha=0.25)
    return figure


def _cost(results: Results) -> Figure | None:
    """Quality against latency, or against parameters where latency was not measured."""
    scores = {name: score for name in results.arms if (score := results.score(name)) is not None}
    if len(scores) < 2 or not all(map(math.isfinite, scores.values())):
        return None
    timed = all(results.arms[name].latency for name in scores)
    figure, axes = _figure()
    for name, score in scores.items():
        arm = results.arms[name]
        cost = arm.latency[0].median_ms if timed else arm.parameters / 1e6
        axes.plot(
            [cost], [score], _MARKERS.get(name, "D"), color=colour(results, name), markersize=9, label=name
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    what = "latency of a batch (ms, median)" if timed else "millions of parameters"
    axes.set_xlabel(f"{what}, logarithmic")
    axes.set_ylabel(results.primary_metric or "")
    axes.margins(0.25)
    axes.grid(alpha=0.25)
    axes.legend(loc="best")
    return figure


def _loss(results: Results) -> Figure | None:
    """Every term of the training loss."""
    names = {"loss": "loss", **{n: n for row in results.training for n in row if n.startswith("loss_")}}
    return _curves(results, names, "training loss", threshold=False)


def _kl(results: Results) -> Figure | None:
    """KL to the teacher at each evaluation, and the threshold."""
    names = {n: n for row in results.training for n in row if n.startswith("eval_") and n.endswith("_kl")}
    return _curves(results, names, "KL to the teacher, T = 1 (nats)", threshold=True)


def _schedules(results: Results) -> Figure | None:
    """Learning rate, and what else moved."""
    return _curves(results, {"learning_rate": "learning rate"}, "learning rate", threshold=False)


def _curves(results: Results, names: Mapping[str, str], label: str, *, threshold: bool) -> Figure | None:
    palette = [*_COLOURS.values(), *_OTHERS]
    drawn = []
    for name, shown in names.items():
        points = [(row["step"], row[name]) for row in results.training if name in row and "step" in row]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if len(points) > 1:
            drawn.append((shown, points))
    if not drawn:
        return None
    figure, axes = _figure()
    for (shown, points), ink, line in zip(drawn, palette, ("-", "--", "-.", ":", "-", "--"), strict=False):
        axes.plot(*zip(*points, strict=True), line, color=ink, label=shown, linewidth=1.8)
    options = results.provenance.get("options") or {}
    limit = options.get("kl_threshold") if isinstance(options, dict) else None
    if threshold and isinstance(limit, int | float):
        axes.axhline(limit, color=_INK, linestyle=":", label=f"threshold {limit:g}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    if len(axes.lines) > 1:
        axes.legend(loc="best")
    return figure


def _calibration(results: Results) -> Figure | None:
    """How often an arm is right against how sure it is."""
    curves = results.behaviour.calibration if results.behaviour else {}
    if not curves:
        return None
    figure, axes = _figure(3.8)
    axes.plot([0, 1], [0, 1], ":", color=_INK, linewidth=1)
    for name, curve in curves.items():
        axes.plot(
            curve.confidence,
            curve.accuracy,
            marker=_MARKERS.get(name, "D"),
            color=colour(results, name),
            label=f"{name}, ECE {curve.ece:.3f}",
            linewidth=1.4,
        )
    axes.set_xlabel("probability of the top class")
    axes.set_ylabel("share that is right")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left")
    return figure


def _agreement(results: Results) -> Figure | None:
    """Rows by the teacher's and the student's class."""
    matrix = results.behaviour.agreement if results.behaviour else None
    if not results.behaviour or not matrix:
        return None
    counts = np.array(matrix, dtype=float)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    classes = results.behaviour.classes
    figure, axes = _figure(min(7.0, 2.2 + 0.3 * len(classes)))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ticks = [name if len(name) <= 14 else f"{name[:13]}…" for name in classes]
    axes.set_xticks(range(len(ticks)), ticks, rotation=45 if max(map(len, ticks)) > 3 else 0, ha="center")
    axes.set_yticks(range(len(ticks)), ticks)
    axes.set_xlabel("student's class")
    axes.set_ylabel("teacher's class")
    if len(classes) <= 12:
        for (i, j), count in np.ndenumerate(counts.astype(int)):
            if count:
                ink = "white" if share[i, j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=ink, fontsize=9)
    return figure


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


_CHARTS: dict[str, Callable[[Results], Figure | None]] = {
    "quality": _quality,
    "cost": _cost,
    "calibration": _calibration,
    "agreement": _agreement,
    "loss": _loss,
    "kl": _kl,
    "learning-rate": _schedules,
}
