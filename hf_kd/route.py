"""With logits or without: the way a trainer's loss is computed, found at its first batch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .fusing import Fusion, find_fusion, is_language_model
from .tasks import Batch

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)


def find_route(trainer: DistillationTrainer, batch: Batch) -> Fusion | str:
    """How to do without logits, or why not; the reason is logged where users would expect it.

    Raises:
        ValueError: If `fused="on"` and it can't be done.
    """
    args, inputs = trainer.args, trainer.pair.inputs(batch)
    found = find_fusion(
        args.fused,
        task=trainer.task,
        objective=trainer.objective,
        student=trainer.student,
        inputs=trainer.pair.student_inputs(inputs),
        teacher=trainer.teacher if trainer.distils else None,
        batch=inputs,
        chunk_bytes=args.fused_chunk_mib << 20,
        obstacle=_obstacle(trainer),
        inside=trainer.is_deepspeed_enabled,
    )
    if isinstance(found, str) and args.fused == "auto" and is_language_model(trainer.task):
        logger.warning("The loss is computed from full logits: %s", found)
    return found


def _obstacle(trainer: DistillationTrainer) -> str | None:
    """What in the run itself, rather than in the models, needs logits."""
    if trainer.compute_loss_func is not None:
        return "compute_loss_func reads logits."
    if trainer.objective.target.changes:
        return "target_correction and kd_weighting read whole rows of the teacher."
    if trainer.args.torch_compile:
        return "torch_compile compiles the head too (compile the body instead: model.model.compile())."
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        return "FSDP 1 keeps the output layer in pieces (FSDP 2 does not in the forward)."
    return "DataParallel copies the output layer." if trainer.args.n_gpu > 1 else None
