"""Which term moves the weights: the norms of the gradients of task and distillation, a few times in a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .measure import eval_mode

if TYPE_CHECKING:
    from .objective import Counts
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)


class Balance:
    """Measures both norms at `times` steps, evenly over the run.

    The gradients are those of a whole optimizer step, of all trained weights, in evaluation mode: dropout and
    the random numbers of training are not touched. A measurement costs two further forwards and backwards.

    Args:
        times: How often; 0: never.
    """

    def __init__(self, times: int) -> None:
        """Start with nothing measured."""
        self.times = times
        self._found: dict[str, float] = {}
        self._warned = False

    def due(self, step: int, total: int) -> bool:
        """Whether a step, counted from 0, is one of those."""
        if self.times < 1 or total < 1:
            return False
        times = min(self.times, total)
        return math.ceil(step * times / total) * total // times == step

    def measure(
        self, trainer: DistillationTrainer, batches: Sequence[Mapping[str, Any]], counts: Counts
    ) -> None:
        """Measure the step whose micro-batches are given, if it is due and both terms have weight."""
        mix = trainer.mix()
        if not self.due(trainer.state.global_step, trainer.state.max_steps) or not 0.0 < mix.alpha < 1.0:
            return
        if trainer.accelerator.num_processes > 1 or trainer.is_deepspeed_enabled:
            if not self._warned:
                logger.warning("term_gradients=%d is for one process: nothing is measured", self.times)
            self._warned = True
            return
        student = trainer.student
        weights = [p for p in [*student.parameters(), *trainer.projections.parameters()] if p.requires_grad]
        norms = {}
        with eval_mode(student):
            for name, alpha in (("task", 0.0), ("kd", 1.0)):
                trainer.fixed_mix = replace(mix, alpha=alpha)
                try:
                    norms[name] = self._norm(trainer, batches, counts, weights)
                finally:
                    trainer.fixed_mix = None
        task, kd = (1.0 - mix.alpha) * norms["task"], mix.alpha * norms["kd"]
        self._found = {"grad_norm_task": task, "grad_norm_kd": kd}
        if task > 0:
            self._found["grad_norm_ratio"] = kd / task

    def _norm(
        self,
        trainer: DistillationTrainer,
        batches: Sequence[Mapping[str, Any]],
        counts: Counts,
        weights: list[Any],
    ) -> float:
        """Norm of the gradient that the micro-batches add up to."""
        total: list[Any] = [None] * len(weights)
        for batch in batches:
            with torch.enable_grad(), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.student, dict(batch), num_items_in_batch=counts)
            parts = torch.autograd.grad(loss, weights, allow_unused=True)
            total = [a if b is None else b if a is None else a + b for a, b in zip(total, parts, strict=True)]
        squares = [part.float().square().sum() for part in total if part is not None]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def take(self) -> dict[str, float]:
        """What was measured since the last call: both norms as weighted in the loss, and kd / task."""
        found, self._found = self._found, {}
        return found
