"""What a divergence asks of the data, looked at before step 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .findings import Report
from .tasks import TEXT_ENDS, Supervision
from .teachers.models import TEACHER_PREFIX

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


def check_coupling(trainer: DistillationTrainer, report: Report) -> None:
    """Losses that compare the rows of a micro-batch depend on its size."""
    args = trainer.args
    spread = args.gradient_accumulation_steps * trainer.accelerator.num_processes
    coupled = f"Task {trainer.task.name!r}" if trainer.task.batch_coupled else ""
    if trainer.distils and trainer.objective.needs.couples_rows:
        coupled = f"divergence={args.divergence!r}"
    if coupled and spread > 1:
        report.warnings.append(
            f"{coupled} compares the rows of a micro-batch with each other, so its loss "
            f"depends on per_device_train_batch_size={args.per_device_train_batch_size}: {spread} "
            "micro-batches per step are not one batch of that many rows."
        )


def check_divergence(
    trainer: DistillationTrainer, batch: dict[str, Any], supervision: Supervision, report: Report
) -> None:
    """What a divergence reads beside logits: labels, and where unlike tokens end."""
    if not trainer.distils:
        return
    needs, name = trainer.objective.needs, trainer.args.divergence
    if "labels" in needs.reads:
        per_position = supervision.task_weight.shape == supervision.kd_weight.shape
        bare = (supervision.kd_weight > 0) & (supervision.task_weight == 0) if per_position else None
        if supervision.labels is None or bare is None or bool(bare.any()):
            report.warnings.append(
                f"divergence={name!r} looks at the labelled class; positions without a label take the "
                "teacher's most likely class in its place."
            )
    needed = (*TEXT_ENDS, f"{TEACHER_PREFIX}input_ids")
    absent = [column for column in needed if column not in batch]
    if trainer.objective.classes.unlike and absent:
        report.add(
            "train_dataset",
            f"Student and teacher have unlike tokenizers, so divergence={name!r} needs the columns "
            f"{', '.join(needed)}, but {', '.join(absent)} are missing: hf_kd.data.unlike.encode_texts makes "
            "them.",
        )


def check_features(trainer: DistillationTrainer, batch: dict[str, Any], report: Report) -> None:
    """Losses on layers: what the run does not allow, and one look into both models."""
    seen = trainer.features.seen()
    if seen is None:
        return
    report.terms += trainer.features.describe()
    option = f"{next(iter(trainer.features.weights))}_weight"
    problems = trainer.features.problems(trainer.accelerator)
    for text in problems:
        report.add(option, text)
    if problems or report.problems:
        return
    training = trainer.student.training
    trainer.student.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(), trainer.features.ready():
            trainer.pair.dense(trainer.student, batch, distil=True, seen=seen)
            trainer.features.sums(seen, batch, trainer.task.supervise_batch(batch))
    except ValueError as error:
        report.add(option, str(error))
    finally:
        trainer.student.train(training)
