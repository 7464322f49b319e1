"""The one place where terms are weighted, counted and averaged.

    loss = (1 - alpha) * task + alpha * T^2 * D(teacher || student)

Both terms are means over supervised positions of the whole optimizer step, so a micro-batch contributes its
sum over the global count. DDP, FSDP and ZeRO average gradients over ranks, so the contribution is multiplied
by the number of ranks. The gradient of a step then depends on the examples in it and on nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .alignment import ClassMap
from .answers import Answer, Exits, logits_of, pick
from .losses.divergences import Divergence, entropy, forward_kl, log_probs, resolve_divergence
from .losses.logits import unlike_log_probs
from .losses.needs import Needs, needs_of
from .losses.tiles import SparseTeacher
from .losses.vectors import VECTOR_LOSSES
from .sparse import SPARSE_STATISTICS, SparseReader, sparse_names
from .targets import Target
from .tasks import Supervision, Task
from .tasks.base import full_precision, row_of, take
from .teachers.signal import SparseSignal


@dataclass(frozen=True)
class Counts:
    """How much supervision an optimizer step has, over all micro-batches and ranks (0-d tensors)."""

    task: Tensor
    kd: Tensor


@dataclass(frozen=True)
class Selection:
    """Indices of the positions that each term reads, `[N]`; None: all of them."""

    task: Tensor | None
    kd: Tensor | None


@dataclass(frozen=True)
class Mix:
    """The weights in force at one step."""

    alpha: float
    temperature: float
    teacher_temperature: float


@dataclass(frozen=True)
class Terms:
    """One micro-batch's share of the step's loss; `loss` carries the gradient, the others are for the log.

    `loss = ranks * ((1 - alpha) * task + alpha * kd)`, with `task` and `kd` (including `T^2`) sums over this
    micro-batch divided by global counts; a term that is not computed is None. Losses on layers
    (`features.py`) are added with their weights; `features` has them by name, without.
    """

    loss: Tensor
    task: Tensor | None
    kd: Tensor | None
    features: Mapping[str, Tensor] = field(default_factory=dict)


def counts_of(supervisions: list[Supervision]) -> Tensor:
    """`[2]` total task and distillation weight of some batches on this rank, before any gathering."""
    return torch.stack(
        [
            torch.stack([s.task_weight.sum() for s in supervisions]).sum(),
            torch.stack([s.kd_weight.sum() for s in supervisions]).sum(),
        ]
    )


def select(supervisions: list[Supervision]) -> list[Selection]:
    """Find the indices of counting positions, with one device synchronisation for all batches together."""
    masks = [(s.task_weight > 0, s.kd_weight > 0) for s in supervisions]
    sizes = torch.stack([torch.stack([m.sum() for m in pair]) for pair in masks]).tolist()
    found = []
    for supervision, (task, kd), (task_size, kd_size) in zip(supervisions, masks, sizes, strict=True):
        index = _indices(kd, int(kd_size))
        same = supervision.task_weight.data_ptr() == supervision.kd_weight.data_ptr()
        found.append(Selection(index if same else _indices(task, int(task_size)), index))
    return found


def _indices(mask: Tensor, size: int) -> Tensor | None:
    if size == mask.numel():
        return None
    return mask.nonzero_static(size=size).squeeze(-1)


@dataclass(frozen=True)
class Objective:
    """The mix of task loss and distillation for one task.

    Attributes:
        task: The head.
        divergence: `(log_q[N, C], log_p[N, C], ...) -> [N]`; for embeddings `(student[N, H], teacher[N, H])
            -> [N]`; unused for regression, which is compared by squared error.
        classes: How the teacher's classes map to the student's.
        label_smoothing: Weight of the uniform distribution in the task loss's target.
        divergence_name: What the divergence was chosen by, if it was a name.
        divergence_options: Its parameters.
        estimator: How a sparse signal is read: its certain entries and the tail, or its draws.
        target: How dense logits are corrected and positions weighted before they are compared.
    """

    task: Task
    divergence: Divergence
    classes: ClassMap = ClassMap()
    label_smoothing: float = 0.0
    divergence_name: str = ""
    divergence_options: Mapping[str, Any] = field(default_factory=dict)
    estimator: Callable[[SparseSignal], SparseTeacher] = SparseSignal.tail
    target: Target = Target()

    def __call__(
        self,
        student: Tensor,
        teacher: Answer | None,
        supervision: Supervision,
        *,
        selection: Selection,
        counts: Counts,
        mix: Mix,
        ranks: int = 1,
        task: Tensor | None = None,
        outputs: Any = None,
    ) -> Terms:
        """One micro-batch's loss.

        Args:
            student: `[P, C]` student logits, with gradient.
            teacher: What the teacher says of the same positions, None when `mix.alpha` is 0; or the student's
                exits, which the student teaches.
            supervision: What counts in this micro-batch.
            selection: Its indices.
            counts: Supervision of the whole optimizer step.
            mix: Weights and temperatures.
            ranks: Number of processes whose gradients are averaged.
            task: A task term computed elsewhere (already divided by the global count); None: computed here.
            outputs: What the student returned, for task losses that read more than logits.
        """
        student, taught = self.task.split(outputs, student)
        if selection.kd is not None and selection.task is selection.kd:
            # Both terms read the same positions: large logits are gathered once.
            index, selection = selection.kd, Selection(None, None)
            same = taught is student
            student, teacher = take(student, index), None if teacher is None else pick(teacher, index)
            taught = student if same else take(taught, index)
            supervision = replace(
                supervision,
                labels=take(supervision.labels, index),
                task_weight=take(supervision.task_weight, index),
                kd_weight=take(supervision.kd_weight, index),
            )
        if task is None and mix.alpha < 1.0 and supervision.labels is not None:
            terms = self.task.task_terms(outputs, student, supervision, selection.task, self.label_smoothing)
            task = (terms.losses * terms.weight).sum() / counts.task.clamp_min(_TINY)
        kd = None
        if teacher is not None and mix.alpha > 0.0:
            kd = self.kd_sum(taught, teacher, supervision, selection.kd, mix) / counts.kd.clamp_min(_TINY)
        weighted = [w * term for w, term in ((1.0 - mix.alpha, task), (mix.alpha, kd)) if term is not None]
        # A micro-batch with nothing to learn from is an exact zero that keeps the graph: a rank without it
        # would leave the others waiting in the gradient exchange.
        loss = sum(weighted[1:], weighted[0]) if weighted else student.flatten()[:0].sum()
        if isinstance(teacher, Exits):
            loss = loss + student.flatten()[:0].sum()  # the layers behind the exits keep their graph too
        return Terms(
            loss=loss * ranks,
            task=None if task is None else task.detach() * ranks,
            kd=None if kd is None else kd.detach() * ranks,
        )

    def kd_sum(
        self, student: Tensor, teacher: Answer, supervision: Supervision, index: Tensor | None, mix: Mix
    ) -> Tensor:
        """Weighted sum of the distillation losses, `T^2` included."""
        if isinstance(teacher, Exits):
            last = student.detach()
            sums = [self.kd_sum(one, last, supervision, index, mix) for one in teacher.said]
            return torch.stack(sums).mean()
        z = self.classes.student(take(student, index))
        weight, answer = take(supervision.kd_weight, index), pick(teacher, index)
        temperatures = {"temperature": mix.temperature, "teacher_temperature": mix.teacher_temperature}
        if isinstance(answer, SparseSignal):
            losses = self.reader.losses(z, answer, self.divergence, **temperatures)
            return (losses * weight).sum() * mix.temperature**2
        t = self.classes.teacher(logits_of(answer)).detach()
        if self.task.kind != "classes":
            return (self.distance(z, t) * weight).sum()
        labels = self._labels_of(supervision, index)
        if self.target.changes:
            t = self.target.logits(t, labels)
            weight = weight * self.target.weights(t, labels)
        values = self.compare(z, t, labels, **temperatures)
        return (values * weight).sum() * mix.temperature**2

    def compare(
        self, z: Tensor, t: Tensor, labels: Tensor | None, temperature: float, teacher_temperature: float
    ) -> Tensor:
        """`[N]` divergence of logits in the same classes, with what it reads besides (`losses/needs.py`)."""
        temperatures = {"temperature": temperature, "teacher_temperature": teacher_temperature}
        make = unlike_log_probs if self.classes.unlike else log_probs
        context = {"labels": labels, "student_logits": z, "teacher_logits": t, **temperatures}
        asked = {name: context[name] for name in self.needs.reads}
        return self.divergence(*make(z, t, **temperatures), **asked)

    @property
    def reader(self) -> SparseReader:
        """How sparse signals are read."""
        return SparseReader(self.classes, self.estimator)

    @functools.cached_property
    def needs(self) -> Needs:
        """What the divergence asks for."""
        return needs_of(self.divergence)

    def _labels_of(self, supervision: Supervision, index: Tensor | None) -> Tensor | None:
        """Classes of the selected positions, where labels are one per position."""
        labels = supervision.labels
        if not isinstance(labels, Tensor) or labels.shape != supervision.kd_weight.shape:
            return None
        return self.task.target_classes(take(labels, index))

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`[N]` distance of numbers (squared error), vectors or unlike classes (the divergence) at T = 1."""
        student, teacher = full_precision(student), full_precision(teacher)
        if self.task.kind == "regression":
            return (student - teacher).square().sum(-1)
        if self.classes.unlike:
            return self.compare(student, teacher, None, 1.0, 1.0)
        return self.divergence(student, teacher)

    @torch.no_grad()
    def evaluate(
        self, student: Tensor, teacher: Answer | None, supervision: Supervision, outputs: Any = None
    ) -> Tensor:
        """Sums per batch row, `[B, len(STATISTICS)]` in float64, at T = 1; sums add up over batches.

        What a sparse signal allows to say is said at its own temperature, under other names.
        """
        if isinstance(teacher, Exits):
            unlabelled = replace(supervision, labels=None)
            sums = [self.evaluate(one, student, unlabelled) for one in teacher.said]
            return torch.stack(sums).mean(0) + self.evaluate(student, None, supervision, outputs)
        selection = select([supervision])[0]
        # MPS has no float64; a sum of one row's terms is safe in float32 there.
        dtype = torch.float32 if student.device.type == "mps" else torch.float64
        out = torch.zeros(supervision.rows, len(STATISTICS), dtype=dtype, device=student.device)

        def add(name: str, values: Tensor, weight: Tensor, rows: Tensor) -> None:
            out[:, STATISTICS.index(name)].index_add_(0, rows, (values * weight).to(dtype))

        if supervision.labels is not None:
            terms = self.task.task_terms(outputs, student, supervision, selection.task, 0.0)
            add("task", terms.losses, terms.weight, terms.rows)
            add("task_count", torch.ones_like(terms.weight), terms.weight, terms.rows)
        if teacher is None:
            return out
        index, weight = selection.kd, take(supervision.kd_weight, selection.kd)
        rows = row_of(supervision.kd_weight, index, supervision)
        z, answer = self.classes.student(take(student, index)), pick(teacher, index)
        add("kd_count", torch.ones_like(weight), weight, rows)
        if isinstance(answer, SparseSignal):
            for name, values in self.reader.columns(z, answer).items():
                add(name, values, weight, rows)
            return out
        raw = logits_of(answer)
        t = self.classes.teacher(raw)
        if self.task.kind != "classes" or self.classes.unlike:
            add("distance", self.distance(z, t), weight, rows)
            return out
        log_q, log_p = log_probs(z, t, temperature=1.0, teacher_temperature=1.0)
        add("kl", forward_kl(log_q, log_p), weight, rows)
        add("agreement", (log_q.argmax(-1) == log_p.argmax(-1)).float(), weight, rows)
        add("teacher_entropy", entropy(log_p), weight, rows)
        if self.classes.drops:
            add("teacher_mass_dropped", self.classes.mass_dropped(raw), weight, rows)
        return out

    def summarise(self, sums: Tensor, prefix: str) -> dict[str, float]:
        """Turn added-up `evaluate` sums `[len(STATISTICS)]` into exact means, named for the log."""
        total: dict[str, float] = dict(zip(STATISTICS, sums.tolist(), strict=True))
        means: dict[str, float] = {}
        if total["task_count"] > 0:
            means[f"{prefix}_loss"] = total["task"] / total["task_count"]
        if total["kd_count"] > 0:
            for name in self._teacher_statistics(total):
                means[f"{prefix}_{name}"] = total[name] / total["kd_count"]
        return means

    def _teacher_statistics(self, total: dict[str, float]) -> tuple[str, ...]:
        if self.task.kind != "classes" or self.classes.unlike:
            return ("distance",)
        names: tuple[str, ...] = ("kl", "agreement", "teacher_entropy")
        if total["sparse_count"] > 0:
            names = sparse_names(total)
        return (*names, "teacher_mass_dropped") if self.classes.drops else names

    def describe(self, mix: Mix) -> list[tuple[str, str]]:
        """The terms of the loss and their weights, in words."""
        task = (
            "squared error to the labels"
            if self.task.kind == "regression"
            else "the head's loss on the labels"
        )
        rows = []
        if mix.alpha < 1.0:
            rows.append((f"{1 - mix.alpha:g} x task", f"{task}, mean per {self.task.position}"))
        if mix.alpha > 0.0:
            if self.task.kind == "regression":
                what = "squared error to the teacher"
            elif self.task.kind == "vectors":
                what = f"{_name(self.divergence)} distance to the teacher"
            else:
                what = f"{mix.temperature**2:g} (T^2) x {_name(self.divergence)} at T = {mix.temperature:g}"
                if mix.teacher_temperature != mix.temperature:
                    what += f", teacher's T = {mix.teacher_temperature:g}"
            rows.append((f"{mix.alpha:g} x distillation", f"{what}, mean per {self.task.position}"))
        return rows


def _name(function: Any) -> str:
    inner = getattr(function, "func", function)
    return getattr(inner, "__name__", "divergence")


#: Columns of `Objective.evaluate`.
STATISTICS = (
    "task",
    "task_count",
    "kd_count",
    "kl",
    "agreement",
    "teacher_entropy",
    "teacher_mass_dropped",
    "distance",
    *SPARSE_STATISTICS,
)
_TINY = 1e-12


def resolve_objective(
    task: Task, *, divergence: Any, divergence_options: Any, classes: ClassMap, label_smoothing: float
) -> Objective:
    """The objective of a task from its options.

    Raises:
        ValueError: If a divergence is named for a head that gives no distribution.
    """
    name: Any
    if task.kind == "regression" and divergence != "auto":
        raise ValueError(
            f"divergence={divergence!r} compares distributions, but the head of task {task.name!r} with "
            "problem_type='regression' gives numbers, which are compared by squared error. Leave "
            "divergence='auto'."
        )
    if task.kind == "vectors":
        name = "cosine" if divergence == "auto" else divergence
        chosen = name if callable(name) else VECTOR_LOSSES.get(name)
        if chosen is None or divergence_options:
            raise ValueError(
                f"divergence={divergence!r} with divergence_options={divergence_options} does not compare "
                f"vectors; for task {task.name!r} choose one of {sorted(VECTOR_LOSSES)}, or "
                "task='embedding-similarity' for a KL."
            )
    else:
        name = "forward_kl" if divergence == "auto" else divergence
        chosen = resolve_divergence(name, divergence_options or {})
    return Objective(
        task=task,
        divergence=chosen,
        classes=classes,
        label_smoothing=label_smoothing,
        divergence_name=name if isinstance(name, str) else "",
        divergence_options=divergence_options or {},
    )
