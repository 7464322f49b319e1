"""Perplexity, KL and agreement per position, without full logits: the first pass of the fused loss alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .buffers import Buffers
from .statistics import FirstPass, Needs
from .tiles import DenseSource, DenseTeacher, Head, HiddenTeacher, Projection, make_plan

_IGNORED = -100
_EXTRA_CLASSES = 512


@dataclass(frozen=True)
class FusedEvaluation:
    """What is known of each position at T = 1, shaped as `labels`; 0 where `mask` is False.

    Attributes:
        mask: Positions that count: those asked for, else those with a label, or all without labels.
        nll: Cross-entropy in nats; 0 without labels.
        kl: KL(teacher, student) in nats over the shared classes; 0 without a teacher, like the rest.
        agreement: Whether both put the same class first.
        teacher_entropy: Nats.
        teacher_mass_dropped: The teacher's probability of classes that the student does not have.
    """

    mask: Tensor
    nll: Tensor
    kl: Tensor
    agreement: Tensor
    teacher_entropy: Tensor
    teacher_mass_dropped: Tensor


@torch.no_grad()
def fused_evaluation(
    hidden: Tensor,
    head: Head,
    *,
    teacher: HiddenTeacher | DenseTeacher | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    shared_classes: int | None = None,
    chunk_bytes: int = 256 << 20,
) -> FusedEvaluation:
    """Compare student and teacher per position.

    Args:
        hidden: `[..., H]`, the input of the student's head, aligned with `labels`.
        head: The student's output layer.
        teacher: The same positions as its hidden state and head, or as logits.
        labels: `[...]` class per position, -100 for none.
        mask: `[...]` positions to look at; by default those with a label.
        shared_classes: Compare over the first so many classes; by default those of the smaller vocabulary.
        chunk_bytes: Most bytes of temporary memory.

    Returns:
        Tensors of the shape of `labels`, never of the vocabulary's.
    """
    shape = hidden.shape[:-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    dtype = torch.promote_types(flat.dtype, torch.float32)
    count = flat.shape[0]
    target = None if labels is None else labels.reshape(count)
    if mask is not None:
        mask = mask.reshape(count).bool()
    else:
        mask = flat.new_ones(count, dtype=torch.bool) if target is None else target != _IGNORED
    names = ("nll", "kl", "entropy", "dropped")
    out = {name: torch.zeros(count, dtype=dtype, device=flat.device) for name in names}
    agreement = torch.zeros_like(mask)
    chosen = mask.nonzero().squeeze(1)
    student = Projection(head, 1.0, dtype)
    source, teacher_hidden, shared = _source(teacher, dtype, count)
    shared = min(shared, head.classes, shared_classes or shared)
    upcast = student.width if student.weight.dtype != dtype else 0
    if isinstance(source, Projection) and source.copies:
        upcast += source.width
    columns = student.width + (0 if source is None else source.width)
    plan = make_plan(
        chosen.numel(), classes=head.classes, shared=shared, kept_columns=0, chunk_bytes=chunk_bytes,
        row_bytes=dtype.itemsize * columns + head.classes // 4, scratch=6, upcast_columns=upcast, dtype=dtype,
        device=flat.device,
    )  # fmt: skip
    buffers = Buffers(plan, dtype, flat.device, keep_student=False, keep_teacher=False)
    needs = Needs(cross_entropy=target is not None, kl=source is not None, entropies=source is not None)
    first = FirstPass(buffers, student, source, needs, kd_power=1.0, ce_power=1.0)
    with torch.autocast(flat.device.type, enabled=False):
        for rows in chosen.split(plan.tokens) if chosen.numel() else ():
            prepared = student.prepare(flat, rows)
            teacher_rows = None
            if source is not None:
                teacher_rows = source.prepare(teacher_hidden, rows)
            stats = first.run(prepared, teacher_rows)
            if target is not None:
                label = target[rows]
                own = student.at(prepared, label.clamp_min(0).unsqueeze(1)).squeeze(1)
                nll = (stats.lse_ce - own.double()).to(dtype)
                out["nll"][rows] = nll.masked_fill(label == _IGNORED, 0)
            if source is not None:
                out["kl"][rows] = stats.total_kl().to(dtype)
                out["entropy"][rows] = stats.teacher_entropy().to(dtype)
                agreement[rows] = stats.agreement()
                out["dropped"][rows] = _dropped(source, teacher_rows, shared, stats.lse_p).to(dtype)
    return FusedEvaluation(
        mask.view(shape),
        out["nll"].view(shape),
        out["kl"].view(shape),
        agreement.view(shape),
        out["entropy"].view(shape),
        out["dropped"].view(shape),
    )


def _dropped(
    source: Projection | DenseSource, teacher_rows: Tensor | None, shared: int, lse_shared: Tensor
) -> Tensor:
    """`[n]` the teacher's mass on its classes from `shared` on, a few at a time."""
    classes = source.head.classes if isinstance(source, Projection) else source.logits.shape[-1]
    assert teacher_rows is not None
    extra = torch.full_like(lse_shared, -torch.inf)
    for start in range(shared, classes, _EXTRA_CLASSES):
        stop = min(start + _EXTRA_CLASSES, classes)
        room = torch.empty(len(lse_shared), stop - start, dtype=_dtype(source), device=lse_shared.device)
        tile = source.tile(teacher_rows, start, stop, room)
        extra = torch.logaddexp(extra, tile.logsumexp(-1).to(extra.dtype))
    return torch.sigmoid(extra - lse_shared)


def _dtype(source: Projection | DenseSource) -> torch.dtype:
    if isinstance(source, Projection):
        return source.dtype
    return torch.promote_types(source.logits.dtype, torch.float32)


def _source(
    teacher: HiddenTeacher | DenseTeacher | None, dtype: torch.dtype, count: int
) -> tuple[Projection | DenseSource | None, Tensor | None, int]:
    """Where the teacher's tiles come from, its hidden states `[N, H]`, and the size of its vocabulary."""
    if teacher is None:
        return None, None, 0
    if isinstance(teacher, HiddenTeacher):
        hidden = teacher.hidden.reshape(count, teacher.hidden.shape[-1])
        return Projection(teacher.head, 1.0, dtype), hidden, teacher.head.classes
    if isinstance(teacher, DenseTeacher):
        classes = teacher.logits.shape[-1]
        return DenseSource(teacher.logits.reshape(count, classes), 1.0), None, classes
    raise ValueError(
        f"Evaluation needs the teacher's hidden states or logits, not a {type(teacher).__name__}: a KL over "
        "a few entries is another quantity."
    )
