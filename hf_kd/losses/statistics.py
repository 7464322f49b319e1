"""First pass over the vocabulary: normalisers, KL and top-1 of a chunk of tokens, tile by tile.

Every tile is exponentiated against its own largest logit, so nothing overflows at any temperature, and sums
are combined over tiles in float64. The KL follows the same hierarchy, by the chain rule: the KL within each
tile, weighted, plus the KL between the masses of the tiles. A tile's KL that is small is computed once more
in a form that keeps its digits, while the tile is still in cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .tiles import DenseSource, Plan, Projection, Tile, power

# Below this, the difference of sums that makes a KL has too few digits left in fp32.
_SMALL_KL = 2e-3


@dataclass
class Buffers:
    """All that a chunk may occupy: kept tiles of both models, and a few scratch tiles, allocated once."""

    plan: Plan
    dtype: torch.dtype
    device: torch.device
    keep_student: bool
    keep_teacher: bool
    _flat: dict[str, Tensor] = field(default_factory=dict)

    def _get(self, name: str, elements: int) -> Tensor:
        flat = self._flat.get(name)
        if flat is None:
            flat = self._flat[name] = torch.empty(elements, dtype=self.dtype, device=self.device)
        return flat

    def student(self, n: int, tile: Tile) -> Tensor:
        """What is kept of the student's tile, `[n, w]`."""
        if not self.keep_student:
            return self.scratch("student", n, tile)
        flat = self._get("kept student", self.plan.tokens * self.plan.tiles[-1].stop)
        return flat[n * tile.start : n * tile.stop].view(n, tile.width)

    def teacher(self, n: int, tile: Tile) -> Tensor:
        """What is kept of the teacher's tile, `[n, w]`."""
        if not self.keep_teacher:
            return self.scratch("teacher", n, tile)
        shared = max(part.stop for part in self.plan.tiles if part.shared)
        flat = self._get("kept teacher", self.plan.tokens * shared)
        return flat[n * tile.start : n * tile.stop].view(n, tile.width)

    def scratch(self, name: str, n: int, tile: Tile) -> Tensor:
        """A tile `[n, w]` whose content lasts until the name is used again."""
        flat = self._get("scratch " + name, self.plan.tokens * self.plan.widest)
        return flat[: n * tile.width].view(n, tile.width)


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


def _finite(value: Tensor) -> Tensor:
    return torch.where(torch.isneginf(value), torch.zeros_like(value), value)


def _weighted(log_weight: Tensor, value: Tensor) -> Tensor:
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, torch.zeros_like(value)).sum(0)


def _chain(log_a: Tensor, log_b: Tensor, within: Tensor) -> Tensor:
    return _weighted(log_a, within + log_a - log_b)


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
        zero = torch.zeros(shape, dtype=torch.float64, device=hidden.device)
        empty = torch.full_like(zero, -torch.inf)
        out = Statistics(
            top=hidden.new_zeros(shape),
            teacher_top=hidden.new_zeros(shape),
            log_ce=empty,
            log_q=empty.clone(),
            log_p=empty.clone(),
            kl=zero,
            reverse_kl=zero.clone(),
            logit_sum=zero[0].clone(),
            teacher_mean=zero.clone(),
            student_mean=zero.clone(),
            student_best=Argmax(n, hidden),
            teacher_best=Argmax(n, hidden),
            masked=[False] * len(tiles),
        )
        for k, tile in enumerate(tiles):
            self._tile(out, k, tile, hidden, teacher_rows)
        return out

    def _tile(self, out: Statistics, k: int, tile: Tile, hidden: Tensor, teacher_rows: Tensor | None) -> None:
        n, buffers, keep = hidden.shape[0], self.buffers, self.needs.keep_logits
        kept, other = buffers.student(n, tile), buffers.scratch("x", n, tile)
        x, e = (kept, other) if keep else (other, kept)
        self.student.tile(hidden, tile.start, tile.stop, x)
        if self.needs.mean_logit:
            finite = x.masked_fill(torch.isneginf(x), 0) if self.student.has_masked else x
            out.logit_sum += finite.sum(-1).double() * self.ce_power
        highest = x.amax(-1)
        top = out.top[k] = _reference(highest)

        t = dead = None
        if self.teacher is not None and tile.shared:
            assert teacher_rows is not None
            kept_t, other_t = buffers.teacher(n, tile), buffers.scratch("t", n, tile)
            t, e_t = (kept_t, other_t) if keep else (other_t, kept_t)
            self.teacher.tile(teacher_rows, tile.start, tile.stop, t)
            dead = self._dead(x, t)
            out.masked[k] = dead is not None
            if dead is not None:
                t.masked_fill_(dead, -torch.inf)
            highest_t = t.amax(-1)
            out.teacher_best.update(t, highest_t, tile.start)
            out.teacher_top[k] = _reference(highest_t)
            t.sub_(out.teacher_top[k].unsqueeze(1))
        if tile.shared:
            visible = x if dead is None else x.masked_fill(dead, -torch.inf)
            out.student_best.update(visible, highest if dead is None else visible.amax(-1), tile.start)

        x.sub_(top.unsqueeze(1))
        torch.exp(x, out=e)
        tops = top.double()
        if tile.shared:
            e_q = e
            if self.kd_power != 1:
                e_q = power(e, self.kd_power, buffers.scratch("power", n, tile))
            if dead is not None:
                e_q = e_q.masked_fill(dead, 0)
            sum_q = e_q.sum(-1).double()
            out.log_q[k] = self.kd_power * tops + sum_q.log()
            self._stream("q", tile, e_q, self.kd_power * tops)
        if t is not None:
            torch.exp(t, out=e_t)
            sum_p = e_t.sum(-1).double()
            out.log_p[k] = out.teacher_top[k].double() + sum_p.log()
            self._stream("p", tile, e_t, out.teacher_top[k].double())
            self._compare(out, k, tile, (x, e_q, sum_q), (t, e_t, sum_p), dead)
            if dead is not None and not keep:
                e_t.masked_fill_(dead, -1)  # told from a probability that underflowed
        if self.needs.cross_entropy:
            e_ce = e
            if self.ce_power != 1:
                e_ce = power(e, self.ce_power, self._spare(x, "product", n, tile))
            out.log_ce[k] = self.ce_power * tops + e_ce.sum(-1).double().log()
            self._stream("ce", tile, e_ce, self.ce_power * tops)

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

    def _stream(self, name: str, tile: Tile, values: Tensor, reference: Tensor) -> None:
        if self.sums is not None:
            self.sums.add(name, tile, values, reference)

    def _compare(
        self,
        out: Statistics,
        k: int,
        tile: Tile,
        student: tuple[Tensor, Tensor, Tensor],
        teacher: tuple[Tensor, Tensor, Tensor],
        dead: Tensor | None,
    ) -> None:
        """KLs and entropies within one tile."""
        (x, e_q, sum_q), (t, e_t, sum_p), needs = student, teacher, self.needs
        n = x.shape[0]
        if needs.entropies:
            product = self.buffers.scratch("product", n, tile)
            for e, total, values, factor, top, mean in (
                (e_t, sum_p, t, 1.0, out.teacher_top[k], out.teacher_mean),
                (e_q, sum_q, x, self.kd_power, out.top[k], out.student_mean),
            ):
                torch.mul(e, values, out=product)
                if dead is not None:
                    product.masked_fill_(dead, 0)
                mean[k] = factor * (top.double() + _ratio(product.sum(-1), total))
        if not (needs.kl or needs.reverse_kl):
            return
        gap = torch.sub(t, x, alpha=self.kd_power, out=self._spare(t, "gap", n, tile))
        product = self._spare(x, "product", n, tile)
        if dead is not None:
            gap.masked_fill_(dead, 0)
        shift = torch.where((sum_p > 0) & (sum_q > 0), sum_q.log() - sum_p.log(), torch.zeros_like(sum_p))
        small: Tensor | None = None
        if needs.kl:
            out.kl[k] = _ratio(torch.mul(gap, e_t, out=product).sum(-1), sum_p) + shift
            small = out.kl[k] < _SMALL_KL
        if needs.reverse_kl:
            out.reverse_kl[k] = -_ratio(torch.mul(gap, e_q, out=product).sum(-1), sum_q) - shift
            small = (
                out.reverse_kl[k] < _SMALL_KL if small is None else small | (out.reverse_kl[k] < _SMALL_KL)
            )
        assert small is not None
        rows = small.nonzero().squeeze(1)
        if rows.numel():
            forward, reverse = self._exact(rows, gap, (e_q, sum_q), (e_t, sum_p), shift)
            out.kl[k, rows] = forward
            out.reverse_kl[k, rows] = reverse

    @staticmethod
    def _exact(
        rows: Tensor,
        gap: Tensor,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
        shift: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Both KLs within a tile for some rows, as `sum p (expm1(d) - d)`: no difference of large numbers."""
        d = -(gap[rows] + shift[rows].to(gap.dtype).unsqueeze(1))
        q, p = (e[rows] / _nonzero(total[rows]).to(e.dtype).unsqueeze(1) for e, total in (student, teacher))
        near = d.abs() < 1
        forward = torch.where(near, p * (torch.expm1(d) - d), q - p - p * d)
        reverse = torch.where(near, q * (torch.expm1(-d) + d), p - q + q * d)
        return forward.sum(-1).double(), reverse.sum(-1).double()


def _reference(highest: Tensor) -> Tensor:
    """What to subtract from a row: its largest value `[n]`; 0 if that is `-inf`, so the row stays so."""
    return highest.masked_fill(torch.isneginf(highest), 0)


def _nonzero(mass: Tensor) -> Tensor:
    return mass.masked_fill(mass == 0, 1)


def _ratio(total: Tensor, mass: Tensor) -> Tensor:
    return torch.where(mass > 0, total.double() / mass, torch.zeros_like(mass))
