"""A student's logits against a sparse teacher: the dense counterpart of what the fused loss does.

The student's log-probabilities are gathered at the teacher's entries, and its mass outside them is one class
more. Every divergence of distributions then applies to `k + 1` classes as it does to all. Unbiased draws are
cross-entropy against a measure whose expectation is the teacher's distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .divergences import Divergence, forward_kl
from .projected import head_logits
from .tiles import LOG_MOST_RATIO, Head, HiddenTeacher, SparseTeacher

# Stands for log 0 where only one side is 0: exp underflows, and a product with 0 is still 0.
_LOG_ZERO = -800.0


@dataclass(frozen=True)
class SparseComparison:
    """What is known of each position `[N]` at the signal's temperature, without gradient.

    Attributes:
        kl_tail: KL(p, q) over the certain entries and one class for all others, nats: at most the KL.
        kl_draws: `sum w (log p - log q)` over all entries: its expectation is the KL. None without draws.
        agreement: Whether both models put the same class first.
        teacher_mass_kept: Mass that the teacher puts on the certain entries.
        student_mass_kept: Mass that the student puts on them.
    """

    kl_tail: Tensor
    kl_draws: Tensor | None
    agreement: Tensor
    teacher_mass_kept: Tensor
    student_mass_kept: Tensor


def sparse_divergence(
    logits: Tensor, teacher: SparseTeacher, divergence: Divergence, *, temperature: float
) -> Tensor:
    """A divergence between a student and a sparse teacher; differentiable.

    Args:
        logits: `[N, C]` student logits with gradient, fp32 or fp64.
        teacher: Its entries `[N, k]`, at the teacher's temperature.
        divergence: On log-probabilities of the `k + 1` classes; draws always take forward KL.
        temperature: The student's.

    Returns:
        `[N]` nats.
    """
    if teacher.weights is not None:
        return _against_draws(logits, teacher, teacher.weights, temperature)
    return divergence(*_with_tail(logits, teacher, temperature))


@torch.no_grad()
def compare(
    logits: Tensor, tail: SparseTeacher, draws: SparseTeacher | None, *, temperature: float
) -> SparseComparison:
    """Compare `[N, C]` student logits, fp32 or fp64, with a sparse teacher at its temperature."""
    log_q, log_p = _with_tail(logits, tail, temperature)
    known = tail if draws is None else draws
    best = known.log_probs.masked_fill(known.ids < 0, -torch.inf).argmax(-1, keepdim=True)
    return SparseComparison(
        kl_tail=forward_kl(log_q, log_p),
        kl_draws=None
        if draws is None or draws.weights is None
        else _against_draws(logits, draws, draws.weights, temperature),
        agreement=logits.argmax(-1) == known.ids.gather(-1, best).squeeze(-1),
        teacher_mass_kept=-torch.expm1(log_p[:, -1]),
        student_mass_kept=-torch.expm1(log_q[:, -1]),
    )


@torch.no_grad()
def compare_projected(
    hidden: Tensor,
    head: Head,
    tail: SparseTeacher,
    draws: SparseTeacher | None,
    *,
    labels: Tensor | None,
    shared: int | None,
    temperature: float,
    chunk_bytes: int,
) -> tuple[SparseComparison, Tensor]:
    """The same, and cross-entropy, for a student given by its hidden states `[N, H]`, a few rows at a time.

    Args:
        hidden: The input of the student's head.
        head: Its output layer.
        tail: The certain entries.
        draws: All entries, if there are draws.
        labels: `[N]` class per position, -100 for none; for the cross-entropy.
        shared: Compare over the first so many classes; None: all.
        temperature: The signal's.
        chunk_bytes: Most bytes of temporary memory.

    Returns:
        The comparison and `[N]` nats of cross-entropy at T = 1, 0 where there is no label.
    """
    step = max(1, chunk_bytes // (24 * head.classes))
    parts, nlls = [], []
    for first in range(0, max(len(hidden), 1), step):
        rows = slice(first, first + step)
        logits = head_logits(HiddenTeacher(hidden[rows], head))
        parts.append(
            compare(
                logits[:, :shared], rows_of(tail, rows), None if draws is None else rows_of(draws, rows),
                temperature=temperature,
            )
        )  # fmt: skip
        if labels is None:
            nlls.append(logits.new_zeros(len(logits)))
        else:
            nlls.append(torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none"))
    joined = {
        name: None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
        for name in SparseComparison.__dataclass_fields__
    }
    return SparseComparison(**joined), torch.cat(nlls)  # type: ignore[arg-type]


def rows_of(teacher: SparseTeacher, rows: slice | Tensor) -> SparseTeacher:
    """Some positions of a flat sparse teacher."""
    tail, weights = teacher.log_tail, teacher.weights
    return SparseTeacher(
        teacher.ids[rows],
        teacher.log_probs[rows],
        None if tail is None else tail[rows],
        None if weights is None else weights[rows],
        teacher.control,
    )


def _against_draws(logits: Tensor, teacher: SparseTeacher, weights: Tensor, temperature: float) -> Tensor:
    counts = (teacher.ids >= 0) & (weights != 0)
    log_q = (logits / temperature).log_softmax(-1).gather(-1, teacher.ids.long().clamp_min(0))
    gap = teacher.log_probs.to(log_q.dtype) - log_q.clamp_min(_LOG_ZERO)
    # An infinite log-probability of what isn't there would make 0 * inf.
    gap = gap.masked_fill(~counts, 0.0)
    weights = weights.to(log_q.dtype).masked_fill(~counts, 0.0)
    if not teacher.control:
        return (weights * gap).sum(-1)
    chance = (weights * (-gap).clamp_max(LOG_MOST_RATIO).exp()).sum(-1)
    return (weights * gap).sum(-1) + teacher.control * (chance - chance.detach())


def _with_tail(logits: Tensor, teacher: SparseTeacher, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[N, k + 1]` of both; entries that are not there are `-inf` on both sides.

    The student's tail is summed class by class: one minus the mass of the entries would lose all digits of a
    small tail.
    """
    assert teacher.log_tail is not None
    ids, present = teacher.ids.long(), teacher.ids >= 0
    scaled = logits / temperature
    log_q = scaled.log_softmax(-1)
    classes = logits.shape[-1]
    taken = torch.zeros(len(ids), classes + 1, dtype=torch.bool, device=ids.device)
    taken.scatter_(1, torch.where(present, ids, classes), True)
    rest = log_q.masked_fill(taken[:, :-1], -torch.inf)
    empty = torch.isneginf(rest).all(-1)
    # logsumexp of nothing has a NaN for a gradient.
    log_rest = rest.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(empty, -torch.inf)
    log_q = torch.cat([log_q.gather(-1, ids.clamp_min(0)), log_rest.unsqueeze(-1)], -1)
    log_p = torch.cat([teacher.log_probs, teacher.log_tail.unsqueeze(-1)], -1).to(log_q.dtype)
    absent = torch.cat([~present, (empty & torch.isneginf(teacher.log_tail)).unsqueeze(-1)], -1)
    return (
        log_q.clamp_min(_LOG_ZERO).masked_fill(absent, -torch.inf),
        log_p.clamp_min(_LOG_ZERO).masked_fill(absent, -torch.inf),
    )
