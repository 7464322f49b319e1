"""Language models without `[tokens, vocabulary]` logits: from a trainer's batch to the fused loss.

The models' own forwards run, wrapped and under their own autocast; only their output layers stand aside and
hand over their input. What cannot be done that way is said once and computed densely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .alignment import ClassMap
from .answers import Answer, Exits
from .losses.entries import compare_projected
from .losses.evaluation import fused_evaluation
from .losses.fused import FUSED_DIVERGENCES, fused_distillation
from .losses.heads import HeadSpec, UnsupportedHead, find_head, head_inputs, tied
from .losses.tiles import DenseTeacher, Head, HiddenTeacher
from .losses.tiles import Teacher as FusedTeacher
from .objective import STATISTICS, Counts, Mix, Objective, Terms
from .tasks import Supervision, Task
from .tasks.text import CausalLM, Seq2SeqLM
from .teachers.deeper import DeeperTeacher
from .teachers.models import ModelTeacher
from .teachers.signal import SparseSignal, Teacher, TeacherSignal

Result = TypeVar("Result")


@dataclass(frozen=True)
class HiddenStudent:
    """What the student's head was given, `[B, L, H]`, and the head."""

    hidden: Tensor
    head: Head

    def taught(self) -> HiddenTeacher:
        """The same as a teacher of the positions `[P, H]`: without gradient."""
        bias = None if self.head.bias is None else self.head.bias.detach()
        head = replace(self.head, weight=self.head.weight.detach(), bias=bias)
        return HiddenTeacher(self.hidden.detach().reshape(-1, self.hidden.shape[-1]), head)


@dataclass(frozen=True)
class Fusion:
    """Where the two models' heads are.

    Attributes:
        student: The student's head.
        teacher: The head of a teacher that is a model; None: its signal is used, as it comes.
        chunk_bytes: Temporary memory of the loss.
        inside: The student's head is whole only during its own forward (ZeRO-3): all that needs it happens
            there, gathered once, and the teacher is asked before.
    """

    student: HeadSpec
    teacher: HeadSpec | None
    chunk_bytes: int
    inside: bool = False

    def run(
        self,
        forward: Callable[[], Any],
        ask: Callable[[], Answer | None],
        use: Callable[[HiddenStudent, Answer | None], Result],
    ) -> Result:
        """Run both models, and then `use`, where the student's head is whole.

        Args:
            forward: One call of the student's forward.
            ask: One call of the teacher.
            use: What is made of the student's hidden states `[B, L, H]` and head, and the answer.
        """
        if not self.inside:
            return use(self.run_student(forward), ask())
        answer = ask()
        with head_inputs(self.student, lambda *seen: use(HiddenStudent(*seen), answer)) as captured:
            outputs = forward()
        found: Any = captured[-1]
        if isinstance(found, Terms):
            found = replace(found, loss=tied(found.loss, outputs.logits))
        return found

    def run_student(self, forward: Callable[[], Any]) -> HiddenStudent:
        """The head's input `[B, L, H]`, and the head, for one call of the student's forward."""
        with head_inputs(self.student) as captured:
            forward()
        return HiddenStudent(*captured[-1])

    def ask(self, teacher: Teacher, batch: Mapping[str, Any]) -> TeacherSignal:
        """The teacher's signal; a model's is what its head reads."""
        if self.teacher is None:
            return teacher(batch)
        with head_inputs(self.teacher) as captured:
            teacher(batch)
        return TeacherSignal(hidden=HiddenTeacher(*captured[-1]))

    def terms(
        self,
        objective: Objective,
        student: HiddenStudent,
        teacher: Answer | None,
        supervision: Supervision,
        *,
        counts: Counts,
        mix: Mix,
        ranks: int,
    ) -> Terms:
        """One micro-batch's share of the loss; equal to `Objective.__call__` on the two models' logits."""
        if isinstance(teacher, Exits):
            return self._exit_terms(
                objective, student, teacher, supervision, counts=counts, mix=mix, ranks=ranks
            )
        labels = supervision.labels
        if labels is None and mix.alpha < 1.0:
            labels = torch.full(supervision.kd_weight.shape, -100, device=student.hidden.device)
        fused = fused_distillation(
            student.hidden.reshape(-1, student.hidden.shape[-1]),
            student.head,
            teacher=None if mix.alpha == 0 else _fused_teacher(objective, teacher, mix.teacher_temperature),
            labels=labels,
            alpha=mix.alpha,
            temperature=mix.temperature,
            teacher_temperature=mix.teacher_temperature,
            divergence=objective.divergence_name,
            divergence_options=objective.divergence_options,
            kd_weights=supervision.kd_weight,
            task_count=counts.task.clamp_min(1e-12),
            kd_count=counts.kd.clamp_min(1e-12),
            scale=float(ranks),
            label_smoothing=objective.label_smoothing,
            shared_classes=objective.classes.shared,
            chunk_bytes=self.chunk_bytes,
        )
        task = kd = None
        if supervision.labels is not None and mix.alpha < 1.0:
            task = fused.task_sum / counts.task.clamp_min(1e-12) * ranks
        if teacher is not None and mix.alpha > 0.0:
            kd = fused.kd_sum / counts.kd.clamp_min(1e-12) * mix.temperature**2 * ranks
        return Terms(loss=fused.loss, task=task, kd=kd)

    def _exit_terms(
        self,
        objective: Objective,
        student: HiddenStudent,
        teacher: Exits,
        supervision: Supervision,
        *,
        counts: Counts,
        mix: Mix,
        ranks: int,
    ) -> Terms:
        """Labels teach the last layer, and it teaches the exits; their mean is the distillation."""
        shared: dict[str, Any] = {"counts": counts, "ranks": ranks}
        # The layers behind the exits keep their graph whatever the weights are.
        loss, task = student.hidden.flatten()[:0].sum().float(), None
        if mix.alpha < 1.0:
            own = self.terms(objective, student, None, supervision, mix=replace(mix, alpha=0.0), **shared)
            loss, task = loss + (1.0 - mix.alpha) * own.loss, own.task
        last, alone = student.taught(), replace(mix, alpha=1.0)
        found = [self.terms(objective, one, last, supervision, mix=alone, **shared) for one in teacher.said]
        if mix.alpha > 0.0:
            loss = loss + mix.alpha * torch.stack([one.loss for one in found]).mean()
        kds = [one.kd for one in found if one.kd is not None]
        return Terms(loss=loss, task=task, kd=torch.stack(kds).mean())

    def sums(
        self,
        objective: Objective,
        student: HiddenStudent,
        teacher: Answer | None,
        supervision: Supervision,
    ) -> Tensor:
        """Sums per batch row, as `Objective.evaluate` gives them."""
        if isinstance(teacher, Exits):
            alone = replace(supervision, labels=None)
            found = [self.sums(objective, one, student.taught(), alone) for one in teacher.said]
            return torch.stack(found).mean(0) + self.sums(objective, student, None, supervision)
        hidden = student.hidden.reshape(-1, student.hidden.shape[-1])
        counted = (supervision.kd_weight > 0) | (supervision.task_weight > 0)
        if isinstance(teacher, SparseSignal):
            columns = self._sparse_columns(objective, hidden, student.head, teacher, supervision, counted)
        else:
            columns = self._columns(objective, hidden, student.head, teacher, supervision, counted)
        dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
        out = torch.zeros(supervision.rows, len(STATISTICS), dtype=dtype, device=hidden.device)
        for name, values in columns.items():
            out[:, STATISTICS.index(name)] = values.to(dtype).view(supervision.rows, -1).sum(-1)
        return out

    def _columns(
        self,
        objective: Objective,
        hidden: Tensor,
        head: Head,
        teacher: Tensor | HiddenTeacher | None,
        supervision: Supervision,
        counted: Tensor,
    ) -> dict[str, Tensor]:
        """Statistics of each position `[P]`, weighted."""
        seen = None if teacher is None else _in_classes(objective.classes, teacher, whole=True)
        found = fused_evaluation(
            hidden,
            head,
            teacher=DenseTeacher(seen) if isinstance(seen, Tensor) else seen,
            labels=supervision.labels,
            mask=counted,
            shared_classes=objective.classes.shared,
            chunk_bytes=self.chunk_bytes,
        )
        task, kd = supervision.task_weight, supervision.kd_weight if teacher is not None else None
        columns: dict[str, Tensor] = {}
        if supervision.labels is not None:
            columns |= {"task": found.nll * task, "task_count": task}
        if kd is not None:
            columns |= {"kl": found.kl * kd, "kd_count": kd, "agreement": found.agreement * kd}
            columns["teacher_entropy"] = found.teacher_entropy * kd
            columns["teacher_mass_dropped"] = found.teacher_mass_dropped * kd
        return columns

    def _sparse_columns(
        self,
        objective: Objective,
        hidden: Tensor,
        head: Head,
        signal: SparseSignal,
        supervision: Supervision,
        counted: Tensor,
    ) -> dict[str, Tensor]:
        """The same for a sparse signal, under its own names."""
        index = counted.nonzero().squeeze(-1)
        signal, labels = signal.select(index), supervision.labels
        tail, draws = objective.reader.both(signal)
        seen, nll = compare_projected(
            hidden.index_select(0, index),
            head,
            tail,
            draws,
            labels=None if labels is None else labels[index],
            shared=objective.classes.shared,
            temperature=signal.temperature,
            chunk_bytes=self.chunk_bytes,
        )
        found = objective.reader.named(seen, signal)
        task, kd = supervision.task_weight, supervision.kd_weight
        columns = {
            name: kd * torch.zeros_like(kd).index_copy(0, index, values.to(kd.dtype))
            for name, values in found.items()
        }
        columns["kd_count"] = kd
        if labels is not None:
            columns["task"] = task * torch.zeros_like(task).index_copy(0, index, nll.to(task.dtype))
            columns["task_count"] = task
        return columns


def find_fusion(
    mode: str,
    *,
    task: Task,
    objective: Objective,
    student: nn.Module,
    inputs: Mapping[str, Any],
    teacher: Teacher | None,
    batch: Mapping[str, Any],
    chunk_bytes: int,
    obstacle: str | None,
    inside: bool = False,
) -> Fusion | str:
    """Whether the fused loss applies to a run.

    Args:
        mode: The option `fused`: "auto", "on" or "off".
        task: The head.
        objective: The loss.
        student: The student, not wrapped.
        inputs: Its arguments for some batch.
        teacher: The teacher, if it is asked.
        batch: What the teacher reads of that batch.
        chunk_bytes: Temporary memory of the loss.
        obstacle: A reason against it that the caller knows.
        inside: See `Fusion`.

    Returns:
        The heads, or why the dense path is taken.

    Raises:
        ValueError: If `mode` is "on" and it does not apply.
    """
    if mode == "off":
        return "fused='off'"
    reason = obstacle or _reason(task, objective)
    if reason is None:
        row = {k: v[:1] if isinstance(v, Tensor) and v.ndim > 0 else v for k, v in inputs.items()}
        try:
            spec = find_head(student, row)
            if inside and isinstance(teacher, DeeperTeacher):
                raise UnsupportedHead("DeepSpeed gathers the output layer once, the exits need it again.")
            if inside and type(spec.linear) is not nn.Linear:
                kind = type(spec.linear).__name__
                raise UnsupportedHead(f"DeepSpeed gathers the parts of the output layer ({kind}) one by one.")
            return Fusion(spec, _teacher_spec(teacher, batch), chunk_bytes, inside)
        except UnsupportedHead as error:
            reason = str(error)
    if mode == "on":
        raise ValueError(
            f"fused='on' is not possible: {reason} Set fused='auto' to compute such runs densely."
        )
    return reason


def is_language_model(task: Task) -> bool:
    """Whether the head predicts one token of a vocabulary per position."""
    return isinstance(task, CausalLM | Seq2SeqLM) or task.name == "masked-lm"


def _reason(task: Task, objective: Objective) -> str | None:
    if not is_language_model(task):
        return f"task {task.name!r} has no vocabulary."
    if objective.divergence_name not in FUSED_DIVERGENCES:
        return f"divergence={objective.divergence_name!r} needs whole rows of logits."
    return None


def _teacher_spec(teacher: Teacher | None, batch: Mapping[str, Any]) -> HeadSpec | None:
    """The teacher's head; a teacher that has none that is known gives its logits."""
    if not isinstance(teacher, ModelTeacher):
        return None
    inputs = teacher.inputs(
        {k: v[:1] if isinstance(v, Tensor) and v.ndim > 0 else v for k, v in batch.items()}
    )
    try:
        return find_head(teacher.model, inputs)
    except UnsupportedHead:
        return None


def _fused_teacher(objective: Objective, teacher: Answer | None, temperature: float) -> FusedTeacher | None:
    """What the fused loss takes for an answer."""
    assert not isinstance(teacher, Exits)  # taken one by one
    if isinstance(teacher, Tensor | HiddenTeacher):
        teacher = _in_classes(objective.classes, teacher)
    if isinstance(teacher, Tensor):
        return DenseTeacher(teacher)
    return objective.reader.entries(teacher, temperature) if isinstance(teacher, SparseSignal) else teacher


def _in_classes(
    classes: ClassMap, teacher: Tensor | HiddenTeacher, *, whole: bool = False
) -> Tensor | HiddenTeacher:
    """The teacher with its classes in the order of a student whose vocabulary was trimmed.

    Args:
        classes: How the classes correspond.
        teacher: Logits `[P, C_t]`, or hidden states and a head of `C_t` classes.
        whole: Keep the classes that the student has not, behind the others: their mass is asked for.
    """
    if not classes.kept:
        return teacher
    size = teacher.shape[-1] if isinstance(teacher, Tensor) else teacher.head.classes
    index = classes.places(size if whole else 0)
    if isinstance(teacher, Tensor):
        return teacher[:, index.to(teacher.device)]
    return replace(teacher, head=replace(teacher.head, rows=index))
