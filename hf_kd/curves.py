"""Charts of what training logged: every term of the loss, KL, schedules, and what moved besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from matplotlib.figure import Figure

from hf_kd.drawing import COLOURS, INK, OTHERS, logarithmic, new_figure
from hf_kd.results import Results

# Names in the log, beside the terms of the loss.
_RATIO, _MASSES = "grad_norm_ratio", ("teacher_mass_kept", "student_mass_kept")


def _loss(results: Results) -> Figure | None:
    """Every term of the training loss."""
    names = {"loss": "loss", **{n: n for row in results.training for n in row if n.startswith("loss_")}}
    return _curves(results, names, "training loss")


def _kl(results: Results) -> Figure | None:
    """KL to the teacher at each evaluation, and the threshold."""
    ends = ("_kl", "_kl_tail", "_kl_draws")
    names = {n: n for row in results.training for n in row if n.startswith("eval_") and n.endswith(ends)}
    return _curves(results, names, "KL to the teacher (nats)", threshold=True)


def _schedules(results: Results) -> Figure | None:
    """The weight of distillation and the temperature, where they moved."""
    return _curves(results, {"alpha": "alpha", "temperature": "temperature"}, "alpha, temperature")


def _learning_rate(results: Results) -> Figure | None:
    return _curves(results, {"learning_rate": "learning rate"}, "learning rate")


def _balance(results: Results) -> Figure | None:
    """Norm of the gradient of the distillation term over that of the task term, as they are weighted."""
    return _curves(results, {_RATIO: "ratio"}, "gradient norm, distillation / task", ratio=True)


def _mass(results: Results) -> Figure | None:
    """Mass on the entries that a sparse teacher gives."""
    names = {n: n for row in results.training for n in row if n.endswith(_MASSES)}
    return _curves(results, names, "mass on the teacher's entries")


def _curves(
    results: Results,
    names: Mapping[str, str],
    label: str,
    *,
    threshold: bool = False,
    ratio: bool = False,
) -> Figure | None:
    palette = [*COLOURS.values(), *OTHERS]
    drawn = []
    for name, shown in names.items():
        points = [(row["step"], row[name]) for row in results.training if name in row and "step" in row]
        points = [
            (step, value) for step, value in points if math.isfinite(value) and (value > 0 or not ratio)
        ]
        if len(points) > 1:
            drawn.append((shown, points))
    if not drawn:
        return None
    figure, axes = new_figure()
    for (shown, points), ink, line in zip(drawn, palette, ("-", "--", "-.", ":", "-", "--"), strict=False):
        axes.plot(*zip(*points, strict=True), line, color=ink, label=shown, linewidth=1.8)
    options = results.provenance.get("options") or {}
    limit = options.get("kl_threshold") if isinstance(options, dict) else None
    if threshold and isinstance(limit, int | float):
        axes.axhline(limit, color=INK, linestyle=":", label=f"threshold {limit:g}")
    if ratio:
        axes.axhline(1.0, color=INK, linestyle=":", label="the same")
        logarithmic(axes, "y")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.margins(y=0.1)  # a marker on the edge would be cut
    if not ratio:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    if len(axes.lines) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)  # never over a curve
    return figure


CURVES: dict[str, Callable[[Results], Figure | None]] = {
    "loss": _loss,
    "kl": _kl,
    "schedules": _schedules,
    "learning-rate": _learning_rate,
    "balance": _balance,
    "mass": _mass,
}
