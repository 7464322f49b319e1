r"""Distillation from hidden states and heads, without the `[tokens, vocabulary]` logits of either model.

    loss = (1 - alpha) * sum_i CE_i / task_count + alpha * T^2 * sum_i w_i D(p_i, q_i) / kd_count

Equal to the dense computation in value and gradient. It is made from chunks of tokens, as many as a byte
budget holds, and tiles of the vocabulary that stay in cache. The first pass projects both models' tiles,
exponentiates them and finds the normalisers; the second turns them in place into `dL/dlogits` of the whole
mix and feeds the two gradient products. So the cost is that of the four matrix products that no method can
avoid, and the memory is the gradients plus the budget. The gradient is made in the forward pass; backward
scales it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import run_job
from .evaluation import FusedEvaluation, fused_evaluation
from .job import Job
from .tiles import DenseTeacher, Head, HiddenTeacher, SparseTeacher, Teacher

__all__ = [
    "DenseTeacher",
    "FUSED_DIVERGENCES",
    "FusedEvaluation",
    "FusedLoss",
    "Head",
    "HiddenTeacher",
    "SparseTeacher",
    "fused_distillation",
    "fused_evaluation",
]

# The options of each divergence, with their defaults.
FUSED_DIVERGENCES: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "jsd": {"beta": 0.5},
    "skew_kl": {"lam": 0.1},
    "skew_reverse_kl": {"lam": 0.1},
    "tvd": {},
}


@dataclass(frozen=True)
class FusedLoss:
    """The loss and what is known at no extra pass; sums are over this call's positions, without gradient.

    Attributes:
        loss: 0-d, differentiable once: the mix.
        task_sum: Cross-entropy (smoothing and z-loss included), in nats.
        task_count: Positions with a label.
        kd_sum: Weighted divergence, without `T^2`.
        kd_count: Sum of the weights.
        kl_t1_sum: KL(p, q) at T = 1 where `temperature = 1`, weighted; NaN at another temperature or with a
            sparse teacher.
        agreement_sum: Weighted positions where both models put the same class first.
        teacher_entropy_sum: Weighted entropy of the teacher at its temperature, NaN unless `entropies`.
        student_entropy_sum: The same of the student, over the shared classes.
    """

    loss: Tensor
    task_sum: Tensor
    task_count: Tensor
    kd_sum: Tensor
    kd_count: Tensor
    kl_t1_sum: Tensor
    agreement_sum: Tensor
    teacher_entropy_sum: Tensor
    student_entropy_sum: Tensor


def fused_distillation(
    hidden: Tensor,
    head: Head,
    *,
    teacher: Teacher | None = None,
    labels: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 2.0,
    teacher_temperature: float | None = None,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, float] | None = None,
    kd_weights: Tensor | None = None,
    task_count: Tensor | float | None = None,
    kd_count: Tensor | float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shared_classes: int | None = None,
    chunk_bytes: int = 256 << 20,
    entropies: bool = False,
) -> FusedLoss:
    """Cross-entropy and distillation of a linear head, in one pass.

    Maths is in fp32 (float64 for float64 inputs) whatever the inputs' dtype, also under autocast. Gradients
    flow to `hidden`, `head.weight` and `head.bias` if these require them; a frozen head gets none and costs
    none. Positions with neither label nor weight are dropped before the first product.

    Args:
        hidden: `[..., H]`, the input of the student's head, aligned with `labels`: a causal model's labels
            are shifted before.
        head: The student's output layer.
        teacher: What the teacher knows of the same positions; None only with `alpha = 0`.
        labels: `[...]` class per position, -100 for none; None only with `alpha = 1`.
        alpha: Weight of distillation, 0 to 1. At 0 the teacher is not touched.
        temperature: T, of the student, and of the factor `T^2`.
        teacher_temperature: The teacher's, if another. A sparse teacher is at its temperature already.
        divergence: One of `FUSED_DIVERGENCES`.
        divergence_options: `beta` of jsd, `lam` of the skew KLs.
        kd_weights: `[...]` weight of each position's divergence, boolean or not negative; by default 1 where
            there is a label.
        task_count: What cross-entropy's sum is divided by: labels of the whole optimizer step, over all
            ranks. By default, those of this call.
        kd_count: The same for the divergence; by default the sum of weights.
        scale: Factor of the loss: the number of ranks where gradients are averaged.
        label_smoothing: Share of the target spread over all classes (over those that aren't masked).
        z_loss: Factor of the squared log-normaliser, added to cross-entropy.
        shared_classes: Distil over the first so many classes only, both sides renormalised. By default the
            smaller of the two vocabularies; cross-entropy always has the student's whole vocabulary.
        chunk_bytes: Most bytes of temporary memory, beyond the gradients.
        entropies: Whether to find both entropies too.

    Returns:
        The loss, differentiable, and sums for the log.

    Raises:
        ValueError: If shapes, options or classes don't fit together.
    """
    rows = hidden.shape[:-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    if flat.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"hidden has {flat.shape[1]} columns, head.weight {head.weight.shape[1]}; give the head's input."
        )
    if head.rows is not None:
        raise ValueError("head.rows is for a teacher: a student's classes are all rows of its own head.")
    teacher = None if alpha == 0 else teacher
    kind, parameter = _divergence(divergence, divergence_options or {})
    shared = _shared(shared_classes, head, teacher)
    job = Job(
        head=head,
        teacher=_flatten_teacher(teacher, rows, shared),
        labels=None if labels is None else _flatten("labels", labels, rows),
        kd_weights=None if kd_weights is None else _flatten("kd_weights", kd_weights, rows),
        alpha=alpha,
        temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        kind=kind,
        parameter=parameter,
        task_count=task_count,
        kd_count=kd_count,
        scale=scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        shared=shared,
        chunk_bytes=chunk_bytes,
        entropies=entropies,
    )
    _check(job)
    job = replace(job, with_gradient=torch.is_grad_enabled())
    loss, sums = _FusedDistillation.apply(flat, head.weight, head.bias, job)
    return FusedLoss(loss, *sums.unbind())


class _FusedDistillation(torch.autograd.Function):
    """Makes the gradient while it makes the value; backward scales it by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor]:
        wanted = [job.with_gradient and need for need in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            loss, sums, gradients = run_job(job, hidden, wanted)
        ctx.gradients = [
            None if gradient is None or like is None else gradient.to(like.dtype)
            for gradient, like in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The fused loss holds its gradient once: call backward once, or compute the loss again "
                "(retain_graph is not supported)."
            )
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in gradients), None)


def _divergence(name: str, options: Mapping[str, float]) -> tuple[str, float]:
    """Name and parameter, with the ends of the families as what they are."""
    if name not in FUSED_DIVERGENCES:
        raise ValueError(
            f"divergence={name!r} has no fused form; choose one of {', '.join(FUSED_DIVERGENCES)}, "
            "or fused='off'."
        )
    known = FUSED_DIVERGENCES[name]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"divergence_options of {name!r} are {sorted(known)}; got {unknown}.")
    if not known:
        return name, 0.0
    option, default = next(iter(known.items()))
    value = float(options.get(option, default))
    ends = {"jsd": {0.0: "forward_kl", 1.0: "reverse_kl"}, "skew_kl": {0.0: "forward_kl"}}
    ends["skew_reverse_kl"] = {0.0: "reverse_kl"}
    if value in ends[name]:
        return ends[name][value], 0.0
    if not 1e-4 <= value <= 1 - 1e-4:
        raise ValueError(
            f"divergence_options: {option}={value} of {name!r} must be from 0.0001 to 0.9999, "
            f"or in {sorted(ends[name])}."
        )
    return name, value


def _shared(wanted: int | None, head: Head, teacher: Teacher | None) -> int:
    """Number of classes that the divergence is over."""
    most = head.classes
    if isinstance(teacher, HiddenTeacher):
        most = min(most, teacher.head.classes)
    elif isinstance(teacher, DenseTeacher):
        most = min(most, teacher.logits.shape[-1])
    if wanted is None:
        return most
    if not 1 <= wanted <= most:
        raise ValueError(
            f"shared_classes={wanted} must be from 1 to {most}, the smaller of the two vocabularies."
        )
    return wanted


def _flatten(name: str, values: Tensor, rows: torch.Size) -> Tensor:
    if values.shape[: len(rows)] != rows:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, hidden {tuple(rows)} positions; they must match."
        )
    return values.detach().reshape(rows.numel(), *values.shape[len(rows) :])


def _flatten_teacher(teacher: Teacher | None, rows: torch.Size, classes: int) -> Teacher | None:
    if isinstance(teacher, HiddenTeacher):
        return replace(teacher, hidden=_flatten("teacher.hidden", teacher.hidden, rows))
    if isinstance(teacher, DenseTeacher):
        return replace(teacher, logits=_flatten("teacher.logits", teacher.logits, rows))
    if isinstance(teacher, SparseTeacher):
        if teacher.ids.numel() and int(teacher.ids.max()) >= classes:
            raise ValueError(
                f"SparseTeacher.ids go up to {int(teacher.ids.max())}, the shared classes are {classes}; "
                "drop the other entries and add their mass to log_tail."
            )
        tail, weights = teacher.log_tail, teacher.weights
        return SparseTeacher(
            _flatten("teacher.ids", teacher.ids, rows),
            _flatten("teacher.log_probs", teacher.log_probs, rows),
            None if tail is None else _flatten("teacher.log_tail", tail, rows),
            None if weights is None else _flatten("teacher.weights", weights, rows),
            teacher.control,
        )
    return None


def _check(job: Job) -> None:
    """Every problem with the numbers, in one message."""
    problems = []
    if not 0 <= job.alpha <= 1:
        problems.append(f"alpha={job.alpha} must be from 0 to 1")
    for name in ("temperature", "teacher_temperature"):
        if not getattr(job, name) > 0:
            problems.append(f"{name}={getattr(job, name)} must be positive")
    if not 0 <= job.label_smoothing < 1:
        problems.append(f"label_smoothing={job.label_smoothing} must be from 0 to below 1")
    if job.z_loss < 0:
        problems.append(f"z_loss={job.z_loss} must not be negative")
    if job.chunk_bytes < 1 << 20:
        problems.append(f"chunk_bytes={job.chunk_bytes} must be at least {1 << 20}, one MiB")
    if job.alpha < 1 and job.labels is None:
        problems.append(f"alpha={job.alpha} needs labels; give them, or alpha=1")
    if job.alpha > 0 and job.teacher is None:
        problems.append(f"alpha={job.alpha} needs a teacher; give one, or alpha=0")
    drawn = isinstance(job.teacher, SparseTeacher) and job.teacher.weights is not None
    if drawn and job.kind != "forward_kl":
        problems.append(f"divergence={job.kind!r} has no unbiased estimate; use forward_kl, or log_tail")
    if problems:
        raise ValueError("; ".join(problems) + ".")
