"""The pictures of docs/concepts.md: `python scripts/pictures.py` writes docs/pictures/*.svg.

Every curve is computed with the library's own divergences. The same version of matplotlib draws the same
bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hf_kd import DIVERGENCES

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
# Okabe and Ito's colours: told apart with any colour vision.
BLUE, ORANGE, GREEN, PINK, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F"
_STYLE = {"svg.hashsalt": "hf_kd", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def uses() -> Figure:
    """Three uses of relative entropy: what the student is compared with."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.9))
    cases: tuple[tuple[str, str, list[str], str], ...] = (
        ("compression", "alpha = 1, kl_threshold", ["a large model"], "until the KL is small enough"),
        ("distillation", "0 < alpha < 1", ["a teacher", "labels"], "a mix of two losses"),
        (
            "self-supervision",
            "alpha = 1, no labels",
            ["a generative model, or\nthe student's own past"],
            "its distribution is the target",
        ),
    )
    for axis, (title, option, targets, note) in zip(axes, cases, strict=True):
        axis.set(xlim=(0, 10), ylim=(0, 10))
        axis.axis("off")
        axis.set_title(title, fontweight="bold")
        _box(axis, 5, 2.6, "student", BLUE)
        for place, target in zip((5.0,) if len(targets) == 1 else (2.3, 7.7), targets, strict=True):
            _box(axis, place, 7.6, target, GRAY if target == "labels" else ORANGE)
            axis.annotate(
                "",
                (5 + (place - 5) / 4, 3.6),
                (place, 6.4),
                arrowprops={"arrowstyle": "->", "color": "black"},
            )
        axis.text(5, 1.0, note, ha="center", va="center", fontsize=9)
        axis.text(5, 0.0, option, ha="center", va="center", fontsize=8.5, family="monospace")
    figure.tight_layout()
    return figure


def _box(axis: Axes, x: float, y: float, text: str, colour: str) -> None:
    axis.text(
        x, y, text, ha="center", va="center", color="white",
        bbox={"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "none"},
    )  # fmt: skip


def gradients() -> Figure:
    """Gradients that vanish, by the student's logit, and that explode, by its probability."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    gap = torch.linspace(-10, 10, 201, dtype=torch.float64)
    for name, colour in (("forward_kl", BLUE), ("reverse_kl", ORANGE), ("jsd", GREEN)):
        left.plot(gap, _slope(DIVERGENCES[name], gap, 4.0).abs(), color=colour, label=name)
    left.axvline(4, color=GRAY, linestyle=":")
    left.text(4.3, 0.8, "the\nteacher", color=GRAY, fontsize=9)
    left.set(
        title="sure of the wrong class: who still teaches?", xlabel="student's logit of the right class",
        ylabel="size of the gradient",
    )  # fmt: skip
    left.legend(frameon=False, fontsize=9)
    q = torch.logspace(-6, 0, 121, dtype=torch.float64)[:-1]
    for name, colour in (("forward_kl", BLUE), ("skew_kl", PINK)):
        right.loglog(q, _slope_by_probability(DIVERGENCES[name], q).abs(), color=colour, label=name)
    right.set(
        title="a class that the student has forgotten", xlabel="student's probability q of the class",
        ylabel="size of dD/dq",
    )  # fmt: skip
    right.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure


def _slope(divergence: Callable[..., Tensor], gap: Tensor, teacher: float) -> Tensor:
    """Gradient for a two-class student's logit, whose other logit is 0."""
    z = gap.clone().requires_grad_()
    log_q = torch.stack([z, torch.zeros_like(z)], -1).log_softmax(-1)
    log_p = torch.tensor([teacher, 0.0], dtype=z.dtype).log_softmax(-1).expand(len(z), 2)
    return torch.autograd.grad(divergence(log_q, log_p).sum(), z)[0]


def _slope_by_probability(divergence: Callable[..., Tensor], q: Tensor) -> Tensor:
    """Gradient for the probability of one of two classes, which the teacher gives 0.9."""
    q = q.clone().requires_grad_()
    log_q = torch.stack([q, 1 - q], -1).log()
    log_p = torch.tensor([0.9, 0.1], dtype=q.dtype).log().expand(len(q), 2)
    return torch.autograd.grad(divergence(log_q, log_p).sum(), q)[0]


def targets() -> Figure:
    """What temperature makes of a teacher, and what a too small student does with two modes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    names = ["cat", "dog", "fox", "car", "bus"]
    logits = torch.tensor([9.0, 6.0, 5.0, 0.0, -1.0], dtype=torch.float64)
    for place, (temperature, colour) in enumerate(((1, BLUE), (2, ORANGE), (4, GREEN))):
        where = [i + 0.27 * (place - 1) for i in range(5)]
        left.bar(
            where, (logits / temperature).softmax(-1), width=0.25, color=colour, label=f"T = {temperature}"
        )
    left.set(title="the same teacher at three temperatures", ylabel="probability")
    left.set_xticks(range(5), names)
    left.legend(frameon=False)
    x = torch.linspace(-6, 6, 121, dtype=torch.float64)
    bump = torch.logaddexp(-((x + 2.5) ** 2) / 0.8 + 0.4, -((x - 2.5) ** 2) / 0.8)
    log_p = bump.log_softmax(-1)
    right.fill_between(x, log_p.exp(), color=GRAY, alpha=0.35, label="teacher", linewidth=0)
    for name, colour in (("forward_kl", BLUE), ("reverse_kl", ORANGE)):
        right.plot(x, _best_bell(DIVERGENCES[name], x, log_p).exp(), color=colour, label=name)
    right.set(title="a student that can only be one bell", xlabel="class", ylabel="probability")
    right.set_xticks([])
    right.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure


def _best_bell(divergence: Callable[..., Tensor], x: Tensor, log_p: Tensor) -> Tensor:
    """The log-probabilities of the bell that is nearest to the teacher, found on a grid."""
    middle = torch.linspace(-4, 4, 81, dtype=x.dtype)[:, None, None]
    width = torch.linspace(0.3, 5, 95, dtype=x.dtype)[None, :, None]
    log_q = (-((x - middle) ** 2) / (2 * width**2)).log_softmax(-1).flatten(0, 1)
    return log_q[divergence(log_q, log_p.expand_as(log_q)).argmin()]


def dimensions() -> Figure:
    """What a large vocabulary costs, and how much of a teacher a few entries hold."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    sizes = torch.tensor([1_000, 32_000, 151_936, 262_144], dtype=torch.float64)
    # Teacher, student, and the student's gradient: three arrays of 4 bytes a number.
    left.plot(sizes / 1000, 3 * 4 * 2048 * sizes / 2**30, color=BLUE, marker="o")
    left.set(
        title="logits of 2,048 tokens in memory", xlabel="classes, thousands", ylabel="GiB", ylim=(0, None)
    )  # fmt: skip
    rank = torch.arange(1, 151_937, dtype=torch.float64)
    for power, colour in ((1.0, ORANGE), (1.5, GREEN), (2.0, BLUE)):
        mass = rank**-power
        mass = (mass / mass.sum()).cumsum(0)
        right.semilogx(rank, 100 * mass, color=colour, label=f"1 / rank^{power:g}")
    right.axvline(28, color=GRAY, linestyle=":")
    right.text(32, 3, "28 entries", color=GRAY, fontsize=9)
    right.set(title="mass of the likeliest of 151,936", xlabel="entries kept", ylabel="%", ylim=(0, 101))
    right.legend(frameon=False, fontsize=9, loc="lower right")
    figure.tight_layout()
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "uses": uses,
    "gradients": gradients,
    "targets": targets,
    "dimensions": dimensions,
}


def draw(folder: Path) -> list[Path]:
    """Write all pictures; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(_STYLE):
        for name, make in PICTURES.items():
            figure = make()
            written.append(folder / f"{name}.svg")
            figure.savefig(written[-1], metadata={"Date": None, "Creator": None}, facecolor="white")
            plt.close(figure)
    return written


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
        sys.stdout.write(f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}\n")
