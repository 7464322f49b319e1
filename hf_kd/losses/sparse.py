"""What a sparse teacher adds to the fused loss: a few entries per row, and one number for all other classes.

With the tail as one class more, divergence and slope live on `k + 1` classes, where the dense functions and
autograd serve; the slope of the tail is shared out among its classes by the student's own probabilities.
Unbiased draws are cross-entropy against a measure whose expectation is the teacher's distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .buffers import Buffers
from .divergences import Divergence
from .slopes import Entries
from .statistics import Statistics
from .tiles import LOG_MOST_RATIO, Projection, SparseTeacher, power

# Stands for log 0 where only one side is 0: exp underflows even in float64, and a product with 0 is still 0.
_LOG_ZERO = -800.0


@dataclass(frozen=True)
class SparseTerms:
    """Value, factor of the student's softmax and the teacher's top-1, `[n]`; elements of the gradient."""

    value: Tensor
    softmax: Tensor
    elements: tuple[Tensor, Tensor, Tensor]
    teacher_best: Tensor


@dataclass(frozen=True)
class SparseRows:
    """A sparse signal's rows for one chunk, in float64; a missing entry has class 0 and `present` False."""

    ids: Tensor
    log_p: Tensor
    log_tail: Tensor | None
    weights: Tensor | None
    present: Tensor
    control: float = 0.0

    @staticmethod
    def of(teacher: SparseTeacher, rows: Tensor) -> SparseRows:
        """Pick rows."""
        ids = teacher.ids.index_select(0, rows).long()
        present = ids >= 0
        pick = [
            None if part is None else part.detach().index_select(0, rows).double()
            for part in (teacher.log_probs, teacher.log_tail, teacher.weights)
        ]
        assert pick[0] is not None
        weights = None if pick[2] is None else pick[2] * present
        return SparseRows(ids.clamp_min(0), pick[0], pick[1], weights, present, teacher.control)


def sparse_terms(
    signal: SparseRows,
    divergence: Divergence,
    hidden: Tensor,
    student: Projection,
    stats: Statistics,
    buffers: Buffers,
    kd: Tensor,
    ce: Tensor | None,
    rest: Tensor | None,
    *,
    kd_power: float,
    ce_power: float,
    keep_logits: bool,
) -> SparseTerms:
    """Value and slope of a chunk with a sparse teacher.

    Args:
        signal: The teacher's rows.
        divergence: On `k + 1` classes; draws always take forward KL.
        hidden: `[n, H]` prepared.
        student: Its projection.
        stats: From the first pass.
        buffers: Kept tiles; with a tail, the entries' elements are taken out of them.
        kd: `[n]` factor of the divergence's slope.
        ce: `[n]` factor of cross-entropy's softmax, None for none.
        rest: `[n]` what is subtracted from every class, None for none.
        kd_power: Exponent that turns kept exponentials into the student's at the temperature.
        ce_power: The same for temperature 1.
        keep_logits: Whether tiles hold logits.
    """
    n, k = signal.ids.shape
    x = student.at(hidden, signal.ids).double()
    log_q = kd_power * x - stats.lse_q.unsqueeze(1)
    rows = torch.arange(n, device=x.device).unsqueeze(1).expand(n, k)
    best = torch.where(signal.present, signal.log_p, -torch.inf).argmax(-1, keepdim=True)
    teacher_best = signal.ids.gather(1, best).squeeze(1)
    if signal.weights is not None:
        gap = torch.where(signal.weights != 0, signal.log_p - log_q, torch.zeros_like(log_q))
        value, weights = (signal.weights * gap).sum(-1), signal.weights
        if signal.control:
            chance = signal.control * weights * (-gap).clamp_max(LOG_MOST_RATIO).exp()
            weights = weights - chance.masked_fill(-gap > LOG_MOST_RATIO, 0.0)
        elements = (rows.reshape(-1), signal.ids.reshape(-1), (-kd.unsqueeze(1) * weights).reshape(-1))
        return SparseTerms(value, kd * weights.sum(-1), elements, teacher_best)

    assert signal.log_tail is not None
    keep = signal.present.reshape(-1)
    where = (rows.reshape(-1)[keep], signal.ids.reshape(-1)[keep])
    log_tail = _log_tail(where, stats, buffers, n, kd_power, keep_logits)
    log_q = torch.cat([log_q, (log_tail - stats.lse_q).unsqueeze(1)], 1)
    log_p = torch.cat([signal.log_p, signal.log_tail.unsqueeze(1)], 1)
    absent = torch.cat([~signal.present, torch.isneginf(log_q[:, -1:]) & torch.isneginf(log_p[:, -1:])], 1)
    log_q = log_q.clamp_min(_LOG_ZERO).masked_fill(absent, -torch.inf)
    log_p = log_p.clamp_min(_LOG_ZERO).masked_fill(absent, -torch.inf)
    with torch.enable_grad():
        leaf = log_q.requires_grad_()
        value = divergence(leaf, log_p)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    q = log_q.detach().exp()
    total = slope.sum(-1)
    tail = torch.where(q[:, -1] > 0, slope[:, -1] / _nonzero(q[:, -1]), torch.zeros_like(total))
    single = kd.unsqueeze(1) * (slope[:, :-1] - q[:, :-1] * total.unsqueeze(1))
    if ce is not None:  # their share of cross-entropy left the tiles too
        single = single + ce.unsqueeze(1) * (ce_power * x - stats.lse_ce.unsqueeze(1)).exp()
    if rest is not None and keep_logits:
        single = single - rest.unsqueeze(1)
    elements = (*where, single.reshape(-1)[keep])
    return SparseTerms(value.detach(), kd * (tail - total), elements, teacher_best)


def _log_tail(
    where: tuple[Tensor, Tensor],
    stats: Statistics,
    buffers: Buffers,
    n: int,
    kd_power: float,
    keep_logits: bool,
) -> Tensor:
    """Log of the student's mass outside the entries, not normalised; takes them out of the kept tiles.

    One minus the mass of the entries would lose all digits of a small tail.
    """
    tiles = buffers.plan.tiles
    found = Entries([(*where, torch.zeros_like(where[0], dtype=torch.float64))], tiles)
    logs = []
    for k, tile in enumerate(tiles):
        kept = buffers.student(n, tile)
        positions = found.positions(k, tile, n)
        if positions is not None:
            # Far below every logit; the slope of a soft-cap is 0 there.
            kept.T.view(-1)[positions] = -1e4 if keep_logits else 0.0
        if not tile.shared:
            continue
        e = torch.exp(kept, out=buffers.scratch("x", n, tile)) if keep_logits else kept
        if kd_power != 1:
            e = power(e, kd_power, buffers.scratch("power", n, tile))
        logs.append(kd_power * stats.top[k].double() + e.sum(-1).double().log())
    return torch.stack(logs).logsumexp(0)


def _nonzero(mass: Tensor) -> Tensor:
    return mass.masked_fill(mass == 0, 1)
