"""Charts of a `Results`, as SVG for a page (in the page's own colours) and as PNG for elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_kd import curves
from hf_kd.drawing import COLOURS, INK, MARKERS, OTHER_MARKERS, OTHERS, logarithmic, new_figure, style
from hf_kd.results import Results

# More slices than this are in the table alone.
_MOST_SLICES = 24


def charts(results: Results, names: Collection[str] | None = None) -> dict[str, Figure]:
    """Every chart (or those with these names) that the results have the numbers for, in reading order."""
    made: dict[str, Figure] = {}
    for name in _CHARTS if names is None else names:
        with style():
            figure = _CHARTS[name](results)
        if figure is not None:
            made[name] = figure
    return made


def colour(results: Results, arm: str) -> str:
    """The colour of an arm in every chart."""
    further = [name for name in results.arms if name not in COLOURS]
    return COLOURS.get(arm) or OTHERS[further.index(arm) % len(OTHERS)]


def marker(results: Results, arm: str) -> str:
    """The shape of an arm in every chart."""
    further = [name for name in results.arms if name not in MARKERS]
    return MARKERS.get(arm) or OTHER_MARKERS[further.index(arm) % len(OTHER_MARKERS)]


def _quality(results: Results) -> Figure | None:
    """Score of each arm, with its standard error where that is known."""
    names = [name for name in results.arms if _finite(results.score(name))]
    if len(names) < 2:
        return None
    figure, axes = new_figure(0.9 + 0.45 * len(names))
    for row, name in enumerate(reversed(names)):
        error = results.standard_error(name)
        axes.errorbar(
            [results.score(name) or 0.0],
            [row],
            xerr=None if error is None else [error],
            fmt=marker(results, name),
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
    # A teacher elsewhere has no latency here, and maybe no size that is known.
    scores = {name: score for name, score in scores.items() if results.arms[name].parameters is not None}
    if len(scores) < 2 or not all(map(math.isfinite, scores.values())):
        return None
    timed = all(results.arms[name].latency for name in scores)
    figure, axes = new_figure()
    for name, score in scores.items():
        arm = results.arms[name]
        cost = arm.latency[0].median_ms if timed else (arm.parameters or 0) / 1e6
        axes.plot(
            [cost], [score], marker(results, name), color=colour(results, name), markersize=9, label=name
        )
    logarithmic(axes)
    what = "latency of a batch (ms, median)" if timed else "millions of parameters"
    axes.set_xlabel(f"{what}, logarithmic")
    axes.set_ylabel(results.primary_metric or "")
    axes.margins(0.25)
    axes.grid(alpha=0.25)
    axes.legend(loc="best")
    return figure


def _calibration(results: Results) -> Figure | None:
    """How often an arm is right against how sure it is."""
    curves = results.behaviour.calibration if results.behaviour else {}
    if not curves:
        return None
    figure, axes = new_figure(4.2)
    axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
    for name, curve in curves.items():
        axes.plot(
            curve.confidence,
            curve.accuracy,
            marker=marker(results, name),
            color=colour(results, name),
            label=f"{name}, ECE {curve.ece:.3f}",
            linewidth=1.4,
        )
    axes.set_xlabel("probability of the top class")
    axes.set_ylabel("share that is right")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def _agreement(results: Results) -> Figure | None:
    """Rows by the teacher's and the student's class."""
    matrix = results.behaviour.agreement if results.behaviour else None
    if not results.behaviour or not matrix:
        return None
    counts = np.array(matrix, dtype=float)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    classes = results.behaviour.classes
    figure, axes = new_figure(min(7.0, 2.2 + 0.3 * len(classes)))
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


def _positions(results: Results) -> Figure | None:
    """KL to the teacher along the sequence."""
    if len(results.positions) < 2:
        return None
    figure, axes = new_figure()
    for name in results.positions[0].kl:
        axes.plot(
            [(part.first + part.last) / 2 for part in results.positions],
            [part.kl[name] for part in results.positions],
            marker=marker(results, name),
            color=colour(results, name),
            label=name,
            linewidth=1.6,
        )
    axes.set_xlabel("position in the sequence (tokens)")
    axes.set_ylabel("KL to the teacher (nats)")
    axes.margins(y=0.1)  # a marker on the edge would be cut
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(loc="best")
    return figure


def _slices(results: Results) -> Figure | None:
    """Each arm's quality on each slice, with its 95 % interval."""
    shown = results.slices[:_MOST_SLICES]
    if not shown:
        return None
    figure, axes = new_figure(1.1 + 0.42 * len(shown))
    names = list(shown[0].scores)
    for place, name in enumerate(names):
        for row, part in enumerate(reversed(shown)):
            score = part.scores.get(name)
            if score is None or score.value is None:
                continue
            low, high = score.low, score.high
            known = low is not None and high is not None
            axes.errorbar(
                [score.value],
                [row + 0.22 * ((len(names) - 1) / 2 - place)],
                xerr=[[score.value - low], [high - score.value]] if known else None,  # type: ignore[operator]
                fmt=marker(results, name),
                color=colour(results, name),
                markersize=5,
                capsize=2,
                label=name if row == 0 else None,
            )
    ticks = [f"{part.by}: {part.value}"[:28] + f" ({part.rows})" for part in reversed(shown)]
    axes.set_yticks(range(len(shown)), ticks, fontsize=8)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel(f"{shown[0].metric}, 95 % interval")
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


_CHARTS: dict[str, Callable[[Results], Figure | None]] = {
    "quality": _quality,
    "cost": _cost,
    "slices": _slices,
    "calibration": _calibration,
    "agreement": _agreement,
    "positions": _positions,
    **curves.CURVES,
}
