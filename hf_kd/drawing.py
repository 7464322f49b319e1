"""How every chart looks: colours that people tell apart, ink that follows the page, SVG and PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, NullLocator

# Okabe and Ito's colours, which people tell apart whatever their colour vision; the arms differ in shape too.
COLOURS = {"teacher": "#0072B2", "student": "#D55E00", "control": "#009E73"}
OTHERS = ("#CC79A7", "#E69F00", "#56B4E9")
MARKERS = {"teacher": "s", "student": "o", "control": "^"}
OTHER_MARKERS = ("D", "P", "X")
# Stands for the page's own text colour until the SVG is written.
INK = "#010203"
# Small, so that a label of this size can be read where a phone shrinks the chart.
_WIDTH, _HEIGHT = 4.8, 3.1


def svg(figure: Figure, name: str) -> str:
    """A chart as SVG text that takes its ink from the page around it; the same bytes for the same results."""
    out = io.StringIO()
    # The salt keeps the ids of several charts on one page apart.
    with style({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def save_png(figure: Figure, path: Path) -> Path:
    """Write a chart as PNG, black on white."""
    with style():
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    return path


def style(more: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    """Settings of matplotlib for the time of a drawing."""
    inked = ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")
    settings: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
    settings.update({f"{name}color": INK for name in inked})
    settings.update(more or {})
    return matplotlib.rc_context(settings)


def new_figure(height: float = _HEIGHT) -> tuple[Figure, Axes]:
    """An empty chart."""
    figure = Figure(figsize=(_WIDTH, height))
    return figure, figure.add_subplot()


def logarithmic(axes: Axes, which: Literal["x", "y"] = "x") -> None:
    """A logarithmic axis with numbers that a person would write, however much or little it spans."""
    axes.set(**{f"{which}scale": "log"})
    axis: Axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(_RoundNumbers())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


class _RoundNumbers(Locator):
    """The roundest numbers of which at least three are in view, and few enough for a phone."""

    _MARKS = (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 4, 5, 7),
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8),
    )
    _FEWEST, _MOST = 3, 6

    def __call__(self) -> list[float]:
        """Those of the axis as it is."""
        return self.tick_values(*self.axis.get_view_interval())  # type: ignore[union-attr]

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Those between two numbers above 0."""
        low, high = sorted((vmin, vmax))
        decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        for marks in self._MARKS:
            numbers = (float(f"{mark}e{decade}") for decade in decades for mark in marks)
            found = [value for value in numbers if low <= value <= high]
            if len(found) >= self._FEWEST:
                return found[:: math.ceil(len(found) / self._MOST)]
        return [value for value in MaxNLocator(3).tick_values(low, high) if low <= value <= high]
