"""Which term moves the weights: the norms of the gradients of task and distillation, a few times in a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .measure import eval_mode
from .options.layers import FEATURE_WEIGHTS
from .sharding import in_pieces

if TYPE_CHECKING:
    from transformers import TrainerState

    from .config import DistillationArguments
    from .objective import Counts
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)

# Unless the option says how often: no more than this, and a measurement (two steps' work, at most) in so many
# steps, which is 1 % of a run.
_MOST, _STEPS_EACH = 20, 200


class Balance:
    """Measures both norms at some steps, evenly over the run.

    The gradients are those of a whole optimizer step over all ranks, of all trained weights, in evaluation
    mode: dropout and the random numbers of training are not touched. A measurement costs two further forwards
    and backwards.

    Args:
        times: How often; 0: never; None: up to 20 times, as far as that is at most 1 % of the run, each is
            logged, and nothing is in the way.
    """

    def __init__(self, times: int | None) -> None:
        """Start with nothing measured."""
        self.times = times
        self._found: dict[str, float] = {}
        self._stopped = False

    def due(self, step: int, total: int, logs: int) -> bool:
        """Whether a step, counted from 0, is one of those.

        Args:
            step: The step.
            total: Steps of the run.
            logs: How often the run logs.
        """
        times = min(_MOST, total // _STEPS_EACH, logs) if self.times is None else min(self.times, total)
        return times > 0 and math.ceil(step * times / total) * total // times == step

    def measure(
        self, trainer: DistillationTrainer, batches: Sequence[Mapping[str, Any]], counts: Counts
    ) -> None:
        """Measure the step whose micro-batches are given, if it is due and both terms have weight.

        Raises:
            RuntimeError: If it fails, and the option asked for it.
        """
        mix, state = trainer.mix(), trainer.state
        due = self.due(state.global_step, state.max_steps, _logs(trainer.args, state))
        if self._stopped or not due or not 0.0 < mix.alpha < 1.0:
            return
        reason = self._obstacle(trainer)
        if reason is not None:
            self._stop(reason, logging.INFO if self.times is None else logging.WARNING)
            return
        student, device = trainer.student, trainer.args.device
        weights = [p for p in [*student.parameters(), *trainer.projections.parameters()] if p.requires_grad]
        norms = {}
        # A teacher may draw random numbers too.
        with eval_mode(student), torch.random.fork_rng([device] if device.type == "cuda" else []):
            for name, alpha in (("task", 0.0), ("kd", 1.0)):
                trainer.fixed_mix = replace(mix, alpha=alpha)
                problem, total = None, []
                try:
                    total = _gradients(trainer, batches, counts, weights)
                except RuntimeError as error:
                    problem = error
                finally:
                    trainer.fixed_mix = None
                failed = torch.tensor(float(problem is not None), device=device)
                if float(trainer.accelerator.reduce(failed, reduction="sum")) > 0:
                    if self.times is not None and problem is not None:
                        raise problem
                    self._stop(f"it failed ({problem or 'on another rank'})", logging.WARNING)
                    return
                norms[name] = _norm(trainer, total, weights)
        task, kd = (1.0 - mix.alpha) * norms["task"], mix.alpha * norms["kd"]
        self._found = {"grad_norm_task": task, "grad_norm_kd": kd}
        if task > 0:
            self._found["grad_norm_ratio"] = kd / task

    def _obstacle(self, trainer: DistillationTrainer) -> str | None:
        """Why nothing can be measured, or not unasked."""
        args = trainer.args
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or in_pieces(trainer.student):
            return "no rank has whole gradients with DeepSpeed and FSDP"
        if self.times is None and (args.gradient_checkpointing or args.self_teacher == "deeper"):
            return "gradient checkpointing, or a student that is its own teacher, is not measured unasked"
        if any(getattr(args, f"{name}_weight") > 0 for name in FEATURE_WEIGHTS):
            return "losses on layers are no part of either term"
        return None

    def _stop(self, reason: str, level: int) -> None:
        """Say once that nothing is measured."""
        self._stopped = True
        logger.log(level, "term_gradients=%s: nothing is measured: %s", self.times, reason)

    def take(self) -> dict[str, float]:
        """What was measured since the last call: both norms as weighted in the loss, and kd / task."""
        found, self._found = self._found, {}
        return found


def _logs(args: DistillationArguments, state: TrainerState) -> int:
    """How often a run logs its loss."""
    strategy = str(getattr(args.logging_strategy, "value", args.logging_strategy))
    if strategy == "epoch":
        return math.ceil(args.num_train_epochs)
    return int(state.max_steps // state.logging_steps) if strategy == "steps" else 0


def _gradients(
    trainer: DistillationTrainer,
    batches: Sequence[Mapping[str, Any]],
    counts: Counts,
    weights: list[Any],
) -> list[Tensor | None]:
    """The gradient that this rank's micro-batches add up to."""
    total: list[Tensor | None] = [None] * len(weights)
    for batch in batches:
        with torch.enable_grad(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.student, dict(batch), num_items_in_batch=counts)
        # Not `backward`, which would touch what training accumulates, and the hooks on it.
        parts = torch.autograd.grad(loss, weights, allow_unused=True)
        total = [a if b is None else b if a is None else a + b for a, b in zip(total, parts, strict=True)]
    return total


def _norm(trainer: DistillationTrainer, total: list[Tensor | None], weights: list[Any]) -> float:
    """Norm of a gradient over all ranks, as DDP averages it."""
    ranks, squares = trainer.accelerator.num_processes, []
    for part, weight in zip(total, weights, strict=True):
        if ranks > 1:  # a weight that is used on one rank alone is reduced on all
            part = torch.zeros_like(weight) if part is None else part
            part = trainer.accelerator.reduce(part, reduction="mean")
        if part is not None:
            squares.append(part.float().square().sum().to(trainer.args.device))
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
