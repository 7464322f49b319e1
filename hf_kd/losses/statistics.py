"""First pass over the vocabulary: normalisers, KL and top-1 of a chunk of tokens, tile by tile.

Every tile is exponentiated against its own largest logit, so nothing overflows at any temperature, and sums
are combined over tiles in float64. The KL follows the same hierarchy, by the chain rule: the KL within each
tile, weighted, plus the KL between the masses of the tiles. A tile's KL that is small is computed once more
in a form that keeps its digits, while the tile is still in cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .buffers import Buffers
from .tiles import DenseSource, Projection, Tile, power

# Below this, the difference of sums that makes a KL has too few digits left in fp32.
_SMALL_KL = 2e-3


@dataclass(frozen=True)
class Needs:
    """What the first pass has to find out, and in which form it keeps the tiles."""

    cross_entropy: bool
    kl: bool = False
    reverse_kl: bool = False
    mean_logit: bool = False
    entropies: bool = False
    keep_logits: bool = False  # else exponentials


class Argmax:
    """Running position of the largest value of each row."""

    def __init__(self, n: int, like: Tensor) -> None:
        self.best = like.new_full((n,), -torch.inf)
        self.index = torch.full((n,), -1, dtype=torch.long, device=like.device)

    def update(self, values: Tensor, top: Tensor, start: int) -> None:
        """Take in a tile `[n, w]` whose row maxima are `top [n]`. Only rows that improve are searched."""
        rows = (top > self.best).nonzero().squeeze(1)
        if rows.numel():
            part = values if rows.numel() == values.shape[0] else values.index_select(0, rows)
            self.index[rows] = part.argmax(-1) + start
            torch.maximum(self.best, top, out=self.best)


@dataclass
class Statistics:
    """What the first pass knows of `n` tokens and `K` tiles. Logarithms and sums are float64.

    `top` are the references `[K, n]` of the exponentials, for the student's logits over `tau` and the
    teacher's.
    """

    top: Tensor
    teacher_top: Tensor
    log_ce: Tensor
    log_q: Tensor
    log_p: Tensor
    kl: Tensor
    reverse_kl: Tensor
    logit_sum: Tensor
    teacher_mean: Tensor
    student_mean: Tensor
    student_best: Argmax
    teacher_best: Argmax
    masked: list[bool]

    @property
    def lse_ce(self) -> Tensor:
        """`[n]` log-normaliser of cross-entropy."""
        return _finite(self.log_ce.logsumexp(0))

    @property
    def lse_q(self) -> Tensor:
        """`[n]` log-normaliser of the student at the temperature, over shared classes."""
        return _finite(self.log_q.logsumexp(0))

    @property
    def lse_p(self) -> Tensor:
        """`[n]` log-normaliser of the teacher at its temperature."""
        return _finite(self.log_p.logsumexp(0))

    def total_kl(self) -> Tensor:
        """`[n]` KL(p, q)."""
        return _chain(self.log_p - self.lse_p, self.log_q - self.lse_q, self.kl)

    def total_reverse_kl(self) -> Tensor:
        """`[n]` KL(q, p)."""
        return _chain(self.log_q - self.lse_q, self.log_p - self.lse_p, self.reverse_kl)

    def teacher_entropy(self) -> Tensor:
        """`[n]` entropy of the teacher in nats."""
        return self.lse_p - _weighted(self.log_p - self.lse_p, self.teacher_mean)

    def student_entropy(self) -> Tensor:
        """`[n]` entropy of the student in nats."""
        return self.lse_q - _weighted(self.log_q - self.lse_q, self.student_mean)

    def agreement(self) -> Tensor:
        """`[n]` whether both put the same class first."""
        return self.student_best.index == self.teacher_best.index


class _Sums:
    """What the tiles add up to, `[K, n]` in the dtype of the maths: logarithms are taken of all at once."""

    def __init__(self, shape: tuple[int, int], like: Tensor) -> None:
        self.ce, self.q, self.p = like.new_zeros(3, *shape).unbind()
        self.gap_p, self.gap_q = like.new_zeros(2, *shape).unbind()
        self.teacher_mean, self.student_mean = like.new_zeros(2, *shape).unbind()
        self.exact: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def small(self, k: int, needs: Needs) -> Tensor:
        """Rows whose KL within tile `k` is too small for a difference of sums."""
        shift = (self.q[k] / self.p[k]).log_()
        found = None
        if needs.kl:
            found = self.gap_p[k] / self.p[k] + shift < _SMALL_KL
        if needs.reverse_kl:
            reverse = -self.gap_q[k] / self.q[k] - shift < _SMALL_KL
            found = reverse if found is None else found | reverse
        assert found is not None
        return found.nonzero().squeeze(1)


def _finite(value: Tensor) -> Tensor:
    return torch.where(torch.isneginf(value), torch.zeros_like(value), value)


def _weighted(log_weight: Tensor, value: Tensor) -> Tensor:
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, torch.zeros_like(value)).sum(0)


def _chain(log_a: Tensor, log_b: Tensor, within: Tensor) -> Tensor:
    return _weighted(log_a, within + log_a - log_b)


@dataclass
class _Work:
    """A chunk in progress."""

    sums: _Sums
    top: Tensor
    teacher_top: Tensor
    masked: list[bool]
    student_best: Argmax
    teacher_best: Argmax
    logit_sum: Tensor


class Sums(Protocol):
    """What may look at each tile's exponentials while they are there."""

    def add(self, name: str, tile: Tile, values: Tensor, reference: Tensor) -> None:
        """Take in exponentials `[n, w]` of `ce`, `q` or `p`, relative to `reference [n]`."""
        ...


class FirstPass:
    """The pass itself, over the tiles of a plan."""

    def __init__(
        self,
        buffers: Buffers,
        student: Projection,
        teacher: Projection | DenseSource | None,
        needs: Needs,
        *,
        kd_power: float,
        ce_power: float,
    ) -> None:
        self.buffers = buffers
        self.student = student
        self.teacher = teacher
        self.needs = needs
        self.kd_power = kd_power
        self.ce_power = ce_power
        self.sums: Sums | None = None

    def run(self, hidden: Tensor, teacher_rows: Tensor | None) -> Statistics:
        """Fill the buffers with a chunk's tiles and return its statistics."""
        tiles = self.buffers.plan.tiles
        n = hidden.shape[0]
        shape = (len(tiles), n)
        sums = _Sums(shape, hidden)
        top, teacher_top = hidden.new_zeros(2, *shape).unbind()
        masked = [False] * len(tiles)
        best = Argmax(n, hidden), Argmax(n, hidden)
        logit_sum = torch.zeros(n, dtype=torch.float64, device=hidden.device)
        work = _Work(sums, top, teacher_top, masked, *best, logit_sum)
        for k, tile in enumerate(tiles):
            self._tile(work, k, tile, hidden, teacher_rows)
        return self._finish(work)

    def _finish(self, work: _Work) -> Statistics:
        """Logarithms and ratios of all tiles, in float64."""
        sums = work.sums
        tops, teacher_tops = work.top.double(), work.teacher_top.double()
        log_q, log_p = sums.q.double().log(), sums.p.double().log()
        shift = torch.where((sums.q > 0) & (sums.p > 0), log_q - log_p, torch.zeros_like(log_q))
        kl = _ratio(sums.gap_p, sums.p) + shift
        reverse_kl = -_ratio(sums.gap_q, sums.q) - shift
        for k, rows, forward, reverse in sums.exact:
            kl[k, rows] = forward
            reverse_kl[k, rows] = reverse
        return Statistics(
            top=work.top,
            teacher_top=work.teacher_top,
            log_ce=self.ce_power * tops + sums.ce.double().log(),
            log_q=self.kd_power * tops + log_q,
            log_p=teacher_tops + log_p,
            kl=kl,
            reverse_kl=reverse_kl,
            logit_sum=work.logit_sum,
            teacher_mean=teacher_tops + _ratio(sums.teacher_mean, sums.p),
            student_mean=self.kd_power * (tops + _ratio(sums.student_mean, sums.q)),
            student_best=work.student_best,
            teacher_best=work.teacher_best,
            masked=work.masked,
        )

    def _tile(self, work: _Work, k: int, tile: Tile, hidden: Tensor, teacher_rows: Tensor | None) -> None:
        n, buffers, keep, sums = hidden.shape[0], self.buffers, self.needs.keep_logits, work.sums
        kept, other = buffers.student(n, tile), buffers.scratch("x", n, tile)
        x, e = (kept, other) if keep else (other, kept)
        self.student.tile(hidden, tile.start, tile.stop, x)
        if self.needs.mean_logit:
            finite = x.masked_fill(torch.isneginf(x), 0) if self.student.has_masked else x
            work.logit_sum += finite.sum(-1).double() * self.ce_power
        highest = x.amax(-1)
        top = work.top[k].copy_(self._reference(highest))

        t = dead = None
        if self.teacher is not None and tile.shared:
            assert teacher_rows is not None
            kept_t, other_t = buffers.teacher(n, tile), buffers.scratch("t", n, tile)
            t, e_t = (kept_t, other_t) if keep else (other_t, kept_t)
            self.teacher.tile(teacher_rows, tile.start, tile.stop, t)
            dead = self._dead(x, t)
            if dead is not None:
                work.masked[k] = True
                t.masked_fill_(dead, -torch.inf)
            highest_t = t.amax(-1)
            work.teacher_best.update(t, highest_t, tile.start)
            t.sub_(work.teacher_top[k].copy_(self._reference(highest_t)).unsqueeze(1))
        if tile.shared:
            visible = x if dead is None else x.masked_fill(dead, -torch.inf)
            work.student_best.update(visible, highest if dead is None else visible.amax(-1), tile.start)

        x.sub_(top.unsqueeze(1))
        torch.exp(x, out=e)
        if tile.shared:
            e_q = e
            if self.kd_power != 1:
                e_q = power(e, self.kd_power, buffers.scratch("power", n, tile))
            if dead is not None:
                e_q = e_q.masked_fill(dead, 0)
            torch.sum(e_q, -1, out=sums.q[k])
            self._stream("q", tile, e_q, top, self.kd_power)
        if t is not None:
            torch.exp(t, out=e_t)
            torch.sum(e_t, -1, out=sums.p[k])
            self._stream("p", tile, e_t, work.teacher_top[k], 1.0)
            self._compare(sums, k, tile, (x, e_q), (t, e_t), dead)
            if dead is not None and not keep:
                e_t.masked_fill_(dead, -1)  # told from a probability that underflowed
        if self.needs.cross_entropy:
            e_ce = e
            if self.ce_power != 1:
                e_ce = power(e, self.ce_power, self._spare(x, "product", n, tile))
            torch.sum(e_ce, -1, out=sums.ce[k])
            self._stream("ce", tile, e_ce, top, self.ce_power)

    def _reference(self, highest: Tensor) -> Tensor:
        """What to subtract from a row: its largest value `[n]`; 0 if that is `-inf`, so the row stays so."""
        if self.student.has_masked or (self.teacher is not None and self.teacher.has_masked):
            return highest.masked_fill(torch.isneginf(highest), 0)
        return highest

    def _spare(self, used: Tensor, name: str, n: int, tile: Tile) -> Tensor:
        """A tile to write to: one that is used up, still in cache, or scratch where tiles keep the logits."""
        return self.buffers.scratch(name, n, tile) if self.needs.keep_logits else used

    def _dead(self, x: Tensor, t: Tensor) -> Tensor | None:
        """Classes `[n, w]` that either model has masked, or None."""
        assert self.teacher is not None
        dead = None
        if self.student.has_masked:
            dead = torch.isneginf(x)
        if self.teacher.has_masked and bool(torch.isneginf(t.amin())):
            dead = torch.isneginf(t) if dead is None else dead | torch.isneginf(t)
        return dead if dead is not None and bool(dead.any()) else None

    def _stream(self, name: str, tile: Tile, values: Tensor, top: Tensor, exponent: float) -> None:
        if self.sums is not None:
            self.sums.add(name, tile, values, exponent * top.double())

    def _compare(
        self,
        sums: _Sums,
        k: int,
        tile: Tile,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
        dead: Tensor | None,
    ) -> None:
        """KLs and entropies within one tile. Uses up the logits, unless they are kept."""
        (x, e_q), (t, e_t), needs = student, teacher, self.needs
        n = x.shape[0]
        if needs.entropies:
            product = self.buffers.scratch("product", n, tile)
            for e, values, mean in ((e_t, t, sums.teacher_mean), (e_q, x, sums.student_mean)):
                torch.mul(e, values, out=product)
                if dead is not None:
                    product.masked_fill_(dead, 0)
                torch.sum(product, -1, out=mean[k])
        if not (needs.kl or needs.reverse_kl):
            return
        gap = torch.sub(t, x, alpha=self.kd_power, out=self._spare(t, "gap", n, tile))
        product = self._spare(x, "product", n, tile)
        if dead is not None:
            gap.masked_fill_(dead, 0)
        if needs.kl:
            torch.sum(torch.mul(gap, e_t, out=product), -1, out=sums.gap_p[k])
        if needs.reverse_kl:
            torch.sum(torch.mul(gap, e_q, out=product), -1, out=sums.gap_q[k])
        rows = sums.small(k, needs)
        if rows.numel():
            sums.exact.append((k, rows, *self._exact(rows, gap, (e_q, sums.q[k]), (e_t, sums.p[k]))))

    @staticmethod
    def _exact(
        rows: Tensor,
        gap: Tensor,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Both KLs within a tile for some rows, as `sum p (expm1(d) - d)`: no difference of large numbers."""
        (e_q, sum_q), (e_t, sum_p) = student, teacher
        shift = sum_q[rows].double().log() - sum_p[rows].double().log()
        d = -(gap[rows] + shift.to(gap.dtype).unsqueeze(1))
        q, p = e_q[rows] / sum_q[rows].unsqueeze(1), e_t[rows] / sum_p[rows].unsqueeze(1)
        near = d.abs() < 1
        forward = torch.where(near, p * (torch.expm1(d) - d), q - p - p * d)
        reverse = torch.where(near, q * (torch.expm1(-d) + d), p - q + q * d)
        return forward.sum(-1).double(), reverse.sum(-1).double()


def _ratio(total: Tensor, mass: Tensor) -> Tensor:
    ratio = total.double() / mass.double()
    return torch.where(mass > 0, ratio, torch.zeros_like(ratio))
