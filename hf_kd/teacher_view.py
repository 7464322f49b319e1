"""A teacher that is scored through the student's eyes: on its batches, in its classes, wherever it is."""

from __future__ import annotations

import dataclasses
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor, nn

from hf_kd import evaluating
from hf_kd.alignment import ClassMap
from hf_kd.evaluating import Evaluation
from hf_kd.losses.projected import head_logits
from hf_kd.tasks import Task
from hf_kd.teachers import Teacher
from hf_kd.trainer import DistillationTrainer

#: Of a teacher, which is compared with itself.
KNOWN = {"eval_kl": 0.0, "eval_agreement": 1.0}


def evaluate_teacher(against: DistillationTrainer, rows: Any, primary: str | None) -> Evaluation | None:
    """The teacher's metrics on the student's own rows, its classes in the student's order.

    Args:
        against: What evaluated the student against this teacher.
        rows: The evaluation rows.
        primary: The metric that decides.

    Returns:
        None where it gives some entries of its distribution alone, which can't be scored.
    """
    if against.sparse:
        return None
    classes = against.objective.classes
    if classes.unlike or against.task.kind == "vectors":
        return Evaluation(dict(KNOWN))  # what it predicts has no place among the student's labels
    assert against.teacher is not None
    view = TeacherView(against.teacher, classes, against.task, getattr(against.student, "config", None))
    args = dataclasses.replace(against.args, alpha=0.0)
    own = DistillationTrainer(view, args, **evaluating.wiring_of(against))
    return evaluating.evaluate(own, rows, known=KNOWN, primary=primary)


class TeacherView(nn.Module):
    """A teacher as a model that takes the student's batches and answers in the student's classes."""

    def __init__(self, teacher: Teacher, classes: ClassMap, task: Task, config: Any) -> None:
        """Ask nothing yet."""
        super().__init__()
        self.config = config
        names = dict.fromkeys(teacher.columns)
        signature = Signature([Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in names])

        def forward(**batch: Any) -> dict[str, Tensor]:
            signal = teacher(batch)
            if signal.logits:
                logits = dict(signal.logits)
            elif signal.hidden is not None:
                logits = {task.logits[0]: head_logits(signal.hidden).movedim(-1, task.class_axis)}
            else:
                logits = dict(signal.dense())  # says why not
            return {name: _in_order(value, classes, task.class_axis) for name, value in logits.items()}

        model: Any = getattr(teacher, "model", None)
        if hasattr(model, "generate"):  # for metrics of generated text
            self.generate, self.generation_config = model.generate, model.generation_config
        forward.__signature__ = signature  # type: ignore[attr-defined]  # the columns that the teacher reads
        self.forward = forward


def _in_order(logits: Tensor, classes: ClassMap, axis: int) -> Tensor:
    if classes.order is None and classes.shared is None:
        return logits
    moved = logits.movedim(axis, -1)
    flat = classes.teacher(moved.reshape(-1, moved.shape[-1]))
    return flat.reshape(*moved.shape[:-1], flat.shape[-1]).movedim(-1, axis)
