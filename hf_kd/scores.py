"""Sums over the rows of an evaluation, on all ranks: means are taken once, at its end."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .objective import STATISTICS, Objective

_TASK, _COUNT = STATISTICS.index("task"), STATISTICS.index("task_count")


class Scores:
    """What `Objective.evaluate` says of the rows seen so far."""

    def __init__(self) -> None:
        """No rows yet."""
        self._total: Tensor | None = None
        #: Set to a list: each batch adds what is said of its rows, in order.
        self.rows: list[Tensor] | None = None

    def begin(self) -> None:
        """Another evaluation."""
        self._total = None

    def add(self, accelerator: Any, sums: Tensor) -> Tensor:
        """Take in a batch, `[rows, STATISTICS]` of this rank; returns its mean loss on labels, 0-d."""
        # Gathering rows, not means, drops the rows that ranks repeat to fill their last batch.
        rows = accelerator.gather_for_metrics(sums)
        if self.rows is not None:
            self.rows.append(rows.cpu())
        total = rows.sum(0)
        self._total = total if self._total is None else self._total + total
        return (sums[:, _TASK].sum() / sums[:, _COUNT].sum().clamp_min(1e-12)).float()

    def metrics(self, objective: Objective, prefix: str) -> dict[str, float]:
        """Exact means over supervised positions; empty if there was no row."""
        return {} if self._total is None else objective.summarise(self._total, prefix)
