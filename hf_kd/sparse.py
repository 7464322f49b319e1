"""A sparse signal in a run: read by tail or draws, in the student's classes, named for what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .alignment import ClassMap
from .losses.divergences import Divergence
from .losses.entries import SparseComparison, compare, sparse_divergence
from .losses.tiles import SparseTeacher
from .tasks.base import full_precision
from .teachers.signal import SparseSignal

#: Columns of an evaluation with a sparse signal; the masses are those on the certain entries.
SPARSE_STATISTICS = (
    "sparse_count",
    "draws_count",
    "kl_tail",
    "kl_draws",
    "teacher_mass_kept",
    "student_mass_kept",
)


@dataclass(frozen=True)
class SparseReader:
    """How a run reads sparse signals.

    Attributes:
        classes: How the teacher's classes map to the student's.
        estimator: `SparseSignal.tail` or `SparseSignal.draws`.
    """

    classes: ClassMap
    estimator: Callable[[SparseSignal], SparseTeacher]

    def entries(self, signal: SparseSignal, temperature: float) -> SparseTeacher:
        """A signal as the loss reads it.

        Raises:
            ValueError: If the signal was made at another temperature than the loss is taken at.
        """
        if signal.temperature != temperature:
            raise ValueError(
                f"teacher_temperature={temperature:g}, but the teacher's sparse signal is at temperature "
                f"{signal.temperature:g}, and a few entries can't be brought to another one. Set temperature="
                f"{signal.temperature:g} (or teacher_temperature), with a constant schedule."
            )
        return self.classes.entries(self.estimator(signal))

    def losses(
        self,
        logits: Tensor,
        signal: SparseSignal,
        divergence: Divergence,
        *,
        temperature: float,
        teacher_temperature: float,
    ) -> Tensor:
        """`[N]` divergences of `[N, C]` student logits in the shared classes; differentiable."""
        entries = self.entries(signal, teacher_temperature)
        return sparse_divergence(full_precision(logits), entries, divergence, temperature=temperature)

    def both(self, signal: SparseSignal) -> tuple[SparseTeacher, SparseTeacher | None]:
        """The certain entries with the tail; the draws, if there are any."""
        tail = self.classes.entries(signal.tail())
        return tail, self.classes.entries(signal.draws()) if signal.has_draws else None

    def columns(self, logits: Tensor, signal: SparseSignal) -> dict[str, Tensor]:
        """What an evaluation can say of `[N, C]` student logits, `[N]` each, at the signal's temperature."""
        seen = compare(full_precision(logits), *self.both(signal), temperature=signal.temperature)
        return self.named(seen, signal)

    def named(self, seen: SparseComparison, signal: SparseSignal) -> dict[str, Tensor]:
        """A comparison as columns of an evaluation."""
        columns = {
            "kl_tail": seen.kl_tail,
            "agreement": seen.agreement.to(seen.kl_tail.dtype),
            "teacher_mass_kept": seen.teacher_mass_kept,
            "student_mass_kept": seen.student_mass_kept,
            "sparse_count": torch.ones_like(seen.kl_tail),
        }
        if seen.kl_draws is not None:
            columns |= {"kl_draws": seen.kl_draws, "draws_count": torch.ones_like(seen.kl_tail)}
        if self.classes.drops:
            seen_by = signal.draws() if self.classes.kept and signal.has_draws else signal.tail()
            columns["teacher_mass_dropped"] = self.classes.dropped(seen_by)
        return columns


def sparse_names(total: dict[str, float]) -> tuple[str, ...]:
    """What an evaluation with a sparse signal reports."""
    drawn = ("kl_draws",) if total["draws_count"] > 0 else ()
    return ("kl_tail", *drawn, "agreement", "teacher_mass_kept", "student_mass_kept")
