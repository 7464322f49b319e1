"""What a teacher's logits become before the student sees them: corrected by labels, weighted by confidence.

Applied once, between the teacher's answer and the divergence; evaluation compares with the teacher as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .findings import Report
    from .tasks import Supervision
    from .trainer import DistillationTrainer


@dataclass(frozen=True)
class Target:
    """How the teacher's distribution is used.

    Attributes:
        correction: Where there is a label and the teacher's likeliest class is another one. "swap":
            exchange the two classes' logits, so that the label is the likeliest and the rest stays as it is
            (probability shift, Wen, Lai and Qian 2021, "Preparing Lessons"). "drop": nothing is distilled
            there (conditional teacher-student learning, Meng, Li, Zhao and Gong 2019); the task term has the
            label. "none": as it is.
        weighting: Weight of a position's divergence, in [0, 1], from the teacher's entropy H at T = 1 after
            the correction. "confidence": `1 - H / log C`. "entropy": `H / log C`. "none": 1.

    A mean stays a sum over the count of supervised positions, not over the sum of these weights: a dropped or
    doubtful position adds less to the step, and the gradient depends on the examples of the step alone.
    """

    correction: str = "none"
    weighting: str = "none"

    @property
    def changes(self) -> bool:
        """Whether anything differs from the teacher's logits at equal weights."""
        return self.correction != "none" or self.weighting != "none"

    def logits(self, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """`[N, C]` corrected logits; never edited in place. Labels `[N]`, negative: none."""
        if self.correction != "swap" or labels is None:
            return teacher
        top = teacher.argmax(-1, keepdim=True)
        label = labels.long().unsqueeze(-1)
        label = torch.where((label >= 0) & (label < teacher.shape[-1]), label, top)
        highest, theirs = teacher.gather(-1, top), teacher.gather(-1, label)
        return teacher.scatter(-1, top, theirs).scatter(-1, label, highest)

    def weights(self, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """`[N]` weight of each position, for logits `[N, C]` from `logits`."""
        weights = torch.ones(teacher.shape[:-1], dtype=torch.float32, device=teacher.device)
        if self.weighting != "none":
            sure = confidence(teacher.float())
            weights = sure if self.weighting == "confidence" else 1.0 - sure
        if self.correction == "drop" and labels is not None:
            wrong = (labels >= 0) & (teacher.argmax(-1) != labels)
            weights = weights.masked_fill(wrong, 0.0)
        return weights


def confidence(logits: Tensor) -> Tensor:
    """`1 - H(p) / log C` of `softmax(logits)` over the last axis: 1 for certain, 0 for uniform.

    C counts the classes that are not at -inf.
    """
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
    classes = torch.isfinite(logits).sum(-1).clamp_min(2)
    return (1.0 - entropy / classes.to(entropy.dtype).log()).clamp(0.0, 1.0)


def check_target(trainer: DistillationTrainer, supervision: Supervision, report: Report) -> None:
    """Add what can't be asked of this head or data to the report.

    Args:
        trainer: The run.
        supervision: Of the first batch.
        report: Where problems go.
    """
    args, task = trainer.args, trainer.task
    asked = {
        "target_correction": (args.target_correction, args.target_correction != "none"),
        "kd_weighting": (args.kd_weighting, args.kd_weighting != "none"),
        "temperature": (args.temperature, args.temperature == "auto"),
        "teacher_calibration": (args.teacher_calibration, args.teacher_calibration),
    }
    for option, (value, on) in asked.items():
        if on and (task.kind != "classes" or trainer.objective.classes.unlike):
            what = "unlike vocabularies" if trainer.objective.classes.unlike else f"task {task.name!r}"
            report.add(
                option, f"{option}={value!r} reads a distribution over common classes, which {what} has not."
            )
    labels = supervision.labels
    per_position = isinstance(labels, Tensor) and labels.shape == supervision.kd_weight.shape
    if args.target_correction != "none" and not per_position:
        report.add(
            "target_correction",
            f"target_correction={args.target_correction!r} compares the teacher's class with a label at each "
            f"position, which {'this data' if labels is None else f'task {task.name!r}'} has not; set "
            "target_correction='none'.",
        )


def sparse_problems(args: object) -> list[tuple[str, str]]:
    """Options of the target, and why a sparse signal can't serve them."""
    asked = {
        "target_correction": "none",
        "kd_weighting": "none",
        "teacher_calibration": False,
    }
    return [
        (
            name,
            f"{name}={getattr(args, name)!r} needs the teacher's logits, but its signal is sparse, at one "
            f"temperature; set {name}={neutral!r}, or use a teacher that gives logits or hidden states.",
        )
        for name, neutral in asked.items()
        if getattr(args, name) != neutral
    ]
