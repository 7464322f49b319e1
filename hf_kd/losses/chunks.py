"""The fused loss, chunk by chunk: which positions, how many at a time, and what each adds."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .buffers import Buffers
from .divergences import DIVERGENCES
from .job import Job
from .slopes import Entries, Gradients, SecondPass, Weights
from .sparse import SparseRows, sparse_terms
from .statistics import FirstPass, Needs, Statistics
from .streaming import RowSums
from .tiles import (
    DenseSource,
    DenseTeacher,
    HiddenTeacher,
    Plan,
    Projection,
    SparseTeacher,
    make_plan,
)

IGNORED = -100
# Kept tiles hold logits, not exponentials, where the slope needs the logits themselves: a log-ratio is
# unbounded.
_NEED_LOGITS = ("reverse_kl", "jeffreys")
_SCRATCH_TILES = 2
# Products of fewer tokens than this are so slow that one or two more products cost less.
_FEW_TOKENS = 96


@dataclass
class _Totals:
    """Sums over positions, in float64 on the device: task, divergence, KL at T = 1, agreement, entropies."""

    task: Tensor
    kd: Tensor
    kl_t1: Tensor
    agreement: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor


def run_job(
    job: Job, hidden: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Compute value, sums for the log, and gradients.

    Args:
        job: What to compute.
        hidden: `[N, H]`.
        wanted: Which gradients: hidden, weight, bias.

    Returns:
        The loss (0-d), the sums in the order of `FusedLoss`, the gradients in the dtype of the maths.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.shape[0]
    device = hidden.device
    labelled = None if job.labels is None else job.labels != IGNORED
    weights = _kd_weights(job, labelled, rows, device)
    task_count = _count(labelled, device)
    kd_count = weights.sum()
    ce_weight = (1 - job.alpha) * job.scale / _divisor(job.task_count, task_count)
    kd_weight = job.alpha * job.temperature**2 * job.scale / _divisor(job.kd_count, kd_count)

    gradients = Gradients(
        torch.zeros(hidden.shape, dtype=dtype, device=device) if wanted[0] else None,
        torch.empty(job.head.weight.shape, dtype=dtype, device=device) if wanted[1] else None,
        torch.empty(job.head.classes, dtype=dtype, device=device) if wanted[2] else None,
    )
    totals = _Totals(*torch.zeros(6, dtype=torch.float64, device=device).unbind())
    with_kd = weights > 0
    groups = [(with_kd, True)]
    if labelled is not None:
        groups.append((labelled & ~with_kd, False))
    for mask, distil in groups:
        chosen = mask.nonzero().squeeze(1)
        if chosen.numel():
            # Where only the label counts and has no weight, only the value for the log is left to find.
            sink = Gradients(None, None, None) if job.alpha == 1 and not distil else gradients
            _Group(job, hidden, dtype, sink, totals, distil).run(chosen, weights, ce_weight, kd_weight)
    if not gradients.started:
        for gradient in (gradients.weight, gradients.bias):
            if gradient is not None:
                gradient.zero_()

    loss = ce_weight * totals.task + kd_weight * totals.kd
    if job.alpha == 0:
        loss = ce_weight * totals.task  # 0 * a sum that may not be finite
    at_one = job.temperature == job.teacher_temperature == 1
    if not at_one or job.teacher is None or isinstance(job.teacher, SparseTeacher):
        totals.kl_t1 = totals.kl_t1 * torch.nan
    if not job.entropies or job.teacher is None or isinstance(job.teacher, SparseTeacher):
        totals.teacher_entropy = totals.student_entropy = totals.kl_t1 * torch.nan
    sums = [totals.task, task_count, totals.kd, kd_count, totals.kl_t1, totals.agreement]
    sums += [totals.teacher_entropy, totals.student_entropy]
    return (
        loss.to(dtype),
        torch.stack([value.to(dtype) for value in sums]),
        (gradients.hidden, gradients.weight, gradients.bias),
    )


def _kd_weights(job: Job, labelled: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """Weight of each position's divergence `[N]` in float64."""
    if job.teacher is None:
        return torch.zeros(rows, dtype=torch.float64, device=device)
    if job.kd_weights is not None:
        return job.kd_weights.double()
    if labelled is not None:
        return labelled.double()
    return torch.ones(rows, dtype=torch.float64, device=device)


def _count(labelled: Tensor | None, device: torch.device) -> Tensor:
    if labelled is None:
        return torch.zeros((), dtype=torch.float64, device=device)
    return labelled.sum().double()


def _divisor(given: Tensor | float | None, own: Tensor) -> Tensor:
    """A count to divide by; an empty step has an empty sum, so any divisor but 0 will do."""
    count = own if given is None else torch.as_tensor(given, dtype=own.dtype, device=own.device)
    return torch.where(count == 0, torch.ones_like(count), count)


class _Group:
    """Positions of one kind, with or without a teacher, in chunks of equal size."""

    def __init__(
        self,
        job: Job,
        hidden: Tensor,
        dtype: torch.dtype,
        gradients: Gradients,
        totals: _Totals,
        distil: bool,
    ) -> None:
        self.job, self.hidden, self.distil = job, hidden, distil
        self.gradients, self.totals = gradients, totals
        self.dtype = dtype
        self.student = Projection(job.head, job.tau, dtype)
        self.teacher: Projection | DenseSource | None = None
        self.sparse: SparseTeacher | None = None
        if distil and isinstance(job.teacher, HiddenTeacher):
            self.teacher = Projection(job.teacher.head, job.teacher_temperature, dtype)
        elif distil and isinstance(job.teacher, DenseTeacher):
            self.teacher = DenseSource(job.teacher.logits, job.teacher_temperature)
        elif distil and isinstance(job.teacher, SparseTeacher):
            self.sparse = job.teacher
        self.keep_logits = job.head.softcap is not None or (
            self.teacher is not None and job.kind in _NEED_LOGITS
        )
        self.streams = self._streams()

    def _plan(self, rows: int) -> Plan:
        job, student, teacher = self.job, self.student, self.teacher
        shared = job.shared if self.distil else 0
        item = self.dtype.itemsize
        upcast = student.width if student.weight.dtype != self.dtype else 0
        if isinstance(teacher, Projection) and teacher.copies:
            upcast += teacher.width
        columns = (7 if self.streams else 2) * student.width + (0 if teacher is None else teacher.width)
        entries = 0 if self.sparse is None else self.sparse.ids.shape[-1]
        return make_plan(
            rows,
            classes=job.head.classes,
            shared=shared,
            kept_columns=0 if self.streams else self._kept_columns(),
            chunk_bytes=job.chunk_bytes,
            # Statistics are a few float64 per tile, and a tile has 512 classes or more.
            row_bytes=item * columns + 160 * entries + job.head.classes // 4,
            scratch=_SCRATCH_TILES + (0 if self._plain() else 4) + 3 * self.streams,
            upcast_columns=upcast,
            dtype=self.dtype,
            device=self.hidden.device,
        )

    def _kept_columns(self) -> int:
        return self.job.head.classes + (self.job.shared if self.teacher is not None else 0)

    def _streams(self) -> bool:
        """Whether to keep no tile: a frozen head, and a budget of too few tokens to work in chunks."""
        job, sink = self.job, self.gradients
        if sink.hidden is None or sink.weight is not None or sink.bias is not None or self.keep_logits:
            return False
        if (
            job.label_smoothing
            or job.kind != "forward_kl"
            or (self.sparse is not None and self.sparse.weights is None)
        ):
            return False
        return job.chunk_bytes < _FEW_TOKENS * self.dtype.itemsize * self._kept_columns()

    def _sums(self, buffers: Buffers, hidden: Tensor) -> RowSums:
        job = self.job
        teacher = ("p",) if self.teacher is not None else ()
        ce, kd = job.labels is not None and job.alpha < 1, self.distil
        at_one = job.temperature == 1 and job.shared == job.head.classes and not self._may_mask()
        if ce and kd and at_one:
            return RowSums(buffers, self.student, hidden, ("both", *teacher))
        return RowSums(buffers, self.student, hidden, ("ce",) * ce + ("q",) * kd + teacher)

    def _may_mask(self) -> bool:
        return self.student.has_masked or (self.teacher is not None and self.teacher.has_masked)

    def _plain(self) -> bool:
        """Whether both softmaxes come from one exponential and a product, without one more tile."""
        return self.job.temperature in (1, 2) and self.job.kind == "forward_kl" and not self.keep_logits

    def run(self, chosen: Tensor, weights: Tensor, ce_weight: Tensor, kd_weight: Tensor) -> None:
        """Add all chosen positions to totals and gradients."""
        job = self.job
        plan = self._plan(chosen.numel())
        keep = not self.streams
        buffers = Buffers(plan, self.dtype, self.hidden.device, keep_student=keep, keep_teacher=keep)
        one = job.temperature == job.teacher_temperature == 1
        needs = Needs(
            cross_entropy=job.labels is not None,
            kl=job.kind in ("forward_kl", "jeffreys") or one,
            reverse_kl=job.kind in _NEED_LOGITS,
            mean_logit=job.label_smoothing > 0,
            entropies=job.entropies,
            keep_logits=self.keep_logits,
        )
        powers = {"kd_power": job.kd_power, "ce_power": job.ce_power}
        first = FirstPass(buffers, self.student, self.teacher, needs, **powers)
        second = SecondPass(
            buffers,
            self.student,
            self.gradients,
            job.kind,
            job.parameter,
            **powers,
            keep_logits=self.keep_logits,
        )
        for rows in chosen.split(plan.tokens):
            self._chunk(rows, first, second, weights[rows], ce_weight, kd_weight)

    def _chunk(
        self,
        rows: Tensor,
        first: FirstPass,
        second: SecondPass,
        w: Tensor,
        ce_weight: Tensor,
        kd_weight: Tensor,
    ) -> None:
        job, totals = self.job, self.totals
        hidden = self.student.prepare(self.hidden, rows)
        teacher_rows = None
        if isinstance(self.teacher, Projection):
            assert isinstance(job.teacher, HiddenTeacher)
            teacher_rows = self.teacher.prepare(job.teacher.hidden, rows)
        elif self.teacher is not None:
            teacher_rows = self.teacher.prepare(None, rows)
        sums = first.sums = self._sums(second.buffers, hidden) if self.streams else None
        stats = first.run(hidden, teacher_rows)

        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        ce = rest = None
        if job.labels is not None:
            ce, rest = self._cross_entropy(stats, hidden, job.labels[rows], ce_weight, parts)
            if job.alpha == 1:
                ce, rest, parts = None, None, []
        kd = kd_weight * w / job.temperature if self.distil else None
        if self.sparse is not None:
            assert kd is not None
            kd = self._sparse(stats, hidden, rows, w, kd, ce, rest, second, parts)
        if sums is not None and self.gradients.hidden is not None:
            elements = self._through_softcap(hidden, parts)
            self.gradients.hidden[rows] = sums.gradient(stats, Weights(ce, kd), elements)
        elif self.gradients.wanted or second.two_steps(kd is not None and self.teacher is not None):
            weights = Weights(ce, kd, rest)
            entries = Entries(self._through_softcap(hidden, parts), second.buffers.plan.tiles)
            grad, value = second.run(hidden, stats, weights, entries, teacher=self.teacher is not None)
            if grad is not None and self.gradients.hidden is not None:
                self.gradients.hidden[rows] = grad
            if value is not None:
                totals.kd += (w * value).sum()
        if self.teacher is not None:
            self._count_teacher(stats, w)

    def _cross_entropy(
        self, stats: Statistics, hidden: Tensor, labels: Tensor, ce_weight: Tensor,
        parts: list[tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Count a chunk's cross-entropy; return the factors of its softmax and of the uniform part, `[n]`."""
        job, lse = self.job, stats.lse_ce
        labelled = labels != IGNORED
        target = torch.where(labelled, labels, torch.zeros_like(labels))
        own = job.ce_power * self.student.at(hidden, target.unsqueeze(1)).squeeze(1).double()
        classes = job.head.classes
        if self.student.has_masked and job.head.bias is not None:
            classes = classes - int(torch.isneginf(job.head.bias).sum())
        smooth = job.label_smoothing
        value = lse - (1 - smooth) * own + job.z_loss * lse.square()
        if smooth:
            value = value - smooth * stats.logit_sum / classes
        self.totals.task += torch.where(labelled, value, torch.zeros_like(value)).sum()
        row = ce_weight * labelled.double()
        parts.append((torch.arange(len(target), device=target.device), target, -(1 - smooth) * row))
        return row * (1 + 2 * job.z_loss * lse), smooth * row / classes if smooth else None

    def _sparse(
        self, stats: Statistics, hidden: Tensor, rows: Tensor, w: Tensor, kd: Tensor, ce: Tensor | None, rest:
        Tensor | None,
        second: SecondPass, parts: list[tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        """Count a sparse teacher's divergence; return the factor of the student's softmax, `[n]`."""
        job = self.job
        assert self.sparse is not None
        divergence = DIVERGENCES[job.kind]
        options = {"jsd": "beta", "skew_kl": "lam", "skew_reverse_kl": "lam"}
        if job.kind in options:
            divergence = functools.partial(divergence, **{options[job.kind]: job.parameter})
        terms = sparse_terms(
            SparseRows.of(self.sparse, rows), divergence, hidden, self.student, stats, second.buffers,
            kd, ce, rest, kd_power=job.kd_power, ce_power=job.ce_power, keep_logits=self.keep_logits,
        )  # fmt: skip
        parts.append(terms.elements)
        self.totals.kd += (w * terms.value).sum()
        self.totals.agreement += (w * (stats.student_best.index == terms.teacher_best)).sum()
        return terms.softmax

    def _through_softcap(
        self, hidden: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Single elements with respect to the logits before the soft-cap, in the dtype of the maths."""
        cap = self.student.cap
        out = []
        for row, classes, value in parts:
            if cap is not None:
                x = self.student.elements(hidden, row, classes)
                value = value * (1 - (x / cap).double().square())
            out.append((row, classes, value.to(self.dtype)))
        return out

    def _count_teacher(self, stats: Statistics, w: Tensor) -> None:
        job, totals = self.job, self.totals
        if job.kind == "forward_kl":
            totals.kd += (w * stats.total_kl()).sum()
        elif job.kind == "reverse_kl":
            totals.kd += (w * stats.total_reverse_kl()).sum()
        elif job.kind == "jeffreys":
            totals.kd += (w * (stats.total_kl() + stats.total_reverse_kl())).sum() / 2
        if job.temperature == job.teacher_temperature == 1:
            totals.kl_t1 += (w * stats.total_kl()).sum()
        totals.agreement += (w * stats.agreement()).sum()
        if job.entropies:
            totals.teacher_entropy += (w * stats.teacher_entropy()).sum()
            totals.student_entropy += (w * stats.student_entropy()).sum()
