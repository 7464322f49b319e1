"""Second pass over the vocabulary: tiles become `dL/dlogits` in place and feed the gradient products at once.

Nothing of a chunk survives but its share of the gradients. The one-hot of cross-entropy and the entries of a
sparse teacher touch single elements of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .buffers import Buffers
from .statistics import Statistics
from .tiles import Projection, Tile, power

# Of its mass within a tile; below, the sum over a tile of terms of both signs has too few digits in fp32.
_SMALL_JSD = 1e-3
MIXTURES = ("jsd", "skew_kl", "skew_reverse_kl", "tvd")


@dataclass
class Gradients:
    """Where gradients gather: of hidden states and head, in the dtype of the maths, or None."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    started: bool = False  # whether weight and bias hold anything

    @property
    def wanted(self) -> bool:
        """Whether any is."""
        return self.hidden is not None or self.weight is not None or self.bias is not None


class Entries:
    """Elements `(row, class, value)` to add to a chunk's gradient, sorted so that a tile finds its own."""

    def __init__(self, parts: list[tuple[Tensor, Tensor, Tensor]], tiles: tuple[Tile, ...]) -> None:
        self.bounds: list[int] = [0] * (len(tiles) + 1)
        if not parts:
            return
        rows, classes, values = (torch.cat(column) for column in zip(*parts, strict=True))
        classes, order = classes.sort(stable=True)
        self.rows, self.classes, self.values = rows[order], classes, values[order]
        edges = torch.tensor([tile.start for tile in tiles] + [tiles[-1].stop], device=rows.device)
        self.bounds = torch.searchsorted(classes, edges).tolist()

    def positions(self, k: int, tile: Tile, n: int) -> Tensor | None:
        """Where the entries of tile `k` of `n` rows are in its memory, or None if it has none."""
        first, last = self.bounds[k], self.bounds[k + 1]
        if first == last:
            return None
        return (self.classes[first:last] - tile.start) * n + self.rows[first:last]

    def add_to(self, gradient: Tensor, k: int, tile: Tile) -> None:
        """Add this tile's entries to its gradient `[n, w]`."""
        positions = self.positions(k, tile, gradient.shape[0])
        if positions is not None:
            gradient.T.view(-1).index_add_(0, positions, self.values[self.bounds[k] : self.bounds[k + 1]])


@dataclass(frozen=True)
class Weights:
    """Factors `[n]` in float64 of what each row adds to the loss, with respect to its logits.

    `ce` multiplies cross-entropy's softmax, `kd` the divergence's slope (`T` over counts included); `rest` is
    subtracted from every class (label smoothing).
    """

    ce: Tensor | None
    kd: Tensor | None
    rest: Tensor | None = None


class SecondPass:
    """The pass itself. Consumes the kept tiles."""

    def __init__(
        self, buffers: Buffers, student: Projection, gradients: Gradients, kind: str, parameter: float, *,
        kd_power: float, ce_power: float, keep_logits: bool,
    ) -> None:  # fmt: skip
        self.buffers = buffers
        self.student = student
        self.gradients = gradients
        self.kind = kind
        self.parameter = parameter
        self.kd_power = kd_power
        self.ce_power = ce_power
        self.keep_logits = keep_logits

    def two_steps(self, teacher: bool) -> bool:
        """Whether the slope has to be summed before it can be used, and the value is found here."""
        return teacher and self.kind in MIXTURES

    def run(
        self, hidden: Tensor, stats: Statistics, weights: Weights, entries: Entries, *, teacher: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Add a chunk to the gradients.

        Args:
            hidden: `[n, H]` as the projection prepared it.
            stats: From the first pass.
            weights: Of each row.
            entries: Single elements of the gradient.
            teacher: Whether tiles of a teacher were kept.

        Returns:
            The gradient of `hidden` before preparation `[n, H]` if wanted, and the divergence `[n]` where
            this pass is the one that finds it.
        """
        dtype = hidden.dtype
        tiles = self.buffers.plan.tiles
        a_ce = a_kd = a_t = None
        if weights.ce is not None:
            a_ce = (
                (weights.ce * (self.ce_power * stats.top.double() - stats.lse_ce).exp())
                .to(dtype)
                .unsqueeze(-1)
            )
        if weights.kd is not None:
            share = (self.kd_power * stats.top.double() - stats.lse_q).exp()
            if self.kind not in MIXTURES or not teacher:
                share = weights.kd * share
            a_kd = share.to(dtype).unsqueeze(-1)
            if teacher:
                share = (stats.teacher_top.double() - stats.lse_p).exp()
                a_t = (share if self.kind in MIXTURES else weights.kd * share).to(dtype).unsqueeze(-1)
        two_steps = weights.kd is not None and self.two_steps(teacher)
        row = _Row(a_ce, a_kd, a_t, weights, stats, self.parameter)
        grad_hidden = torch.zeros_like(hidden) if self.gradients.hidden is not None else None
        value = slope_sum = None
        if two_steps:
            value, slope_sum = self._mixtures(row, hidden.shape[0])
            if not self.gradients.wanted:
                return None, value
        correction = None
        if slope_sum is not None:
            assert weights.kd is not None
            correction = (-weights.kd * slope_sum).to(dtype).unsqueeze(-1)
        for k, tile in enumerate(tiles):
            if correction is None:
                gradient = self._direct(row, k, tile, hidden.shape[0])
            else:
                gradient = self.buffers.student(hidden.shape[0], tile)
                if tile.shared:
                    gradient.addcmul_(self.buffers.teacher(hidden.shape[0], tile), correction)
                else:
                    gradient = self._direct(row, k, tile, hidden.shape[0])
            entries.add_to(gradient, k, tile)
            self._products(tile, gradient, hidden, grad_hidden)
        self.gradients.started = True
        return grad_hidden, value

    def _products(self, tile: Tile, gradient: Tensor, hidden: Tensor, grad_hidden: Tensor | None) -> None:
        sink, part = self.gradients, slice(tile.start, tile.stop)
        if grad_hidden is not None:
            grad_hidden.addmm_(
                gradient, self.student.rows_of_weight(tile.start, tile.stop), alpha=self.student.head.scale
            )
        # The first chunk writes, the others add: no pass to fill with zeros.
        if sink.weight is not None:
            sink.weight[part].addmm_(
                gradient.T, hidden, beta=1 if sink.started else 0, alpha=self.student.divisor
            )
        if sink.bias is not None:
            total = gradient.sum(0).mul_(self.student.head.scale)
            sink.bias[part] = sink.bias[part] + total if sink.started else total

    def _softcap_slope(self, x: Tensor, top: Tensor) -> Tensor | None:
        """`d softcap(z) / dz` `[n, w]` from kept logits."""
        cap = self.student.cap
        if cap is None:
            return None
        slope = torch.add(x, top.unsqueeze(1), out=torch.empty_like(x))
        return slope.div_(cap).square_().neg_().add_(1).clamp_(min=0)

    def _direct(self, row: _Row, k: int, tile: Tile, n: int) -> Tensor:
        """Gradient of a tile whose slope needs no sum over the vocabulary beyond the statistics."""
        e = self.buffers.student(n, tile)
        slope = self._softcap_slope(e, row.stats.top[k]) if self.keep_logits else None
        e_t = dead = factor = None
        if row.a_t is not None and tile.shared:
            e_t = self.buffers.teacher(n, tile)
            if row.stats.masked[k]:
                dead = torch.isneginf(e_t) if self.keep_logits else e_t < 0
            if self.kind in ("reverse_kl", "jeffreys"):
                factor = self._log_ratio(row, k, tile, n, dead)
            if self.keep_logits:
                e_t.exp_()
            elif dead is not None:
                e_t.clamp_(min=0)
        if self.keep_logits:
            e.exp_()
        a_kd = row.a_kd[k] if row.a_kd is not None and tile.shared else None
        a_ce = row.a_ce[k] if row.a_ce is not None else None
        self._combine(e, a_ce, a_kd, factor, dead, tile, n)
        if e_t is not None and self.kind != "reverse_kl":
            assert row.a_t is not None
            e.addcmul_(e_t, row.a_t[k], value=-0.5 if self.kind == "jeffreys" else -1)
        self._finish(e, row, tile, slope)
        return e

    def _log_ratio(self, row: _Row, k: int, tile: Tile, n: int, dead: Tensor | None) -> Tensor:
        """What multiplies q in the slope: `log q - log p - KL(q, p)`; for Jeffreys, its mean with 1."""
        stats, a = row.stats, self.kd_power
        x, t = self.buffers.student(n, tile), self.buffers.teacher(n, tile)
        shift = a * stats.top[k].double() - stats.lse_q - stats.teacher_top[k].double() + stats.lse_p
        shift = shift - row.reverse_kl + (1 if self.kind == "jeffreys" else 0)
        ratio = torch.mul(x, a, out=self.buffers.scratch("gap", n, tile))
        ratio.sub_(t).add_(shift.to(x.dtype).unsqueeze(1))
        if self.kind == "jeffreys":
            ratio.mul_(0.5)
        return ratio if dead is None else ratio.masked_fill_(dead, 0)

    def _combine(
        self, e: Tensor, a_ce: Tensor | None, a_kd: Tensor | None, factor: Tensor | None, dead: Tensor | None,
        tile: Tile, n: int,
    ) -> None:  # fmt: skip
        """Turn exponentials `e` into `a_ce * e^ce_power + a_kd * e^kd_power * factor`, in place."""
        scratch = self.buffers.scratch("x", n, tile)
        if a_kd is None:
            if a_ce is None:
                e.zero_()
            else:
                self._raise(e, self.ce_power, scratch).mul_(a_ce)
            return
        plain = dead is None and factor is None and {self.kd_power, self.ce_power} <= {1, 2}
        if a_ce is not None and plain:
            if self.kd_power == self.ce_power:
                e.mul_(a_ce + a_kd)
            else:  # one of the two is e, the other e^2
                high, low = (a_kd, a_ce) if self.kd_power == 2 else (a_ce, a_kd)
                e.mul_(torch.mul(e, high, out=scratch).add_(low))
            return
        kd = power(e, self.kd_power, scratch).mul_(a_kd)
        if factor is not None:
            kd.mul_(factor)
        if dead is not None:
            kd.masked_fill_(dead, 0)
        if a_ce is None:
            e.copy_(kd)
        else:
            self._raise(e, self.ce_power, self.buffers.scratch("power", n, tile)).mul_(a_ce).add_(kd)

    @staticmethod
    def _raise(e: Tensor, exponent: float, scratch: Tensor) -> Tensor:
        return e if exponent == 1 else e.copy_(power(e, exponent, scratch))

    def _finish(self, gradient: Tensor, row: _Row, tile: Tile, slope: Tensor | None) -> None:
        if row.rest is not None:
            gradient.sub_(row.rest)
            if self.student.has_masked:
                assert self.student.bias is not None
                gradient[:, torch.isneginf(self.student.bias[tile.start : tile.stop])] = 0
        if slope is not None:
            gradient.mul_(slope)

    def _mixtures(self, row: _Row, n: int) -> tuple[Tensor, Tensor]:
        """Divergences whose slope has to be summed over the vocabulary first.

        Leaves the slope in the student's tiles and `q` in the teacher's.

        Returns:
            The divergence `[n]` and the sum of its slope `[n]`.
        """
        value = torch.zeros(n, dtype=torch.float64, device=self.buffers.device)
        slope_sum = torch.zeros_like(value)
        assert row.a_kd is not None and row.a_t is not None and row.weights.kd is not None
        for k, tile in enumerate(self.buffers.plan.tiles):
            if not tile.shared:
                continue
            e, e_t = self.buffers.student(n, tile), self.buffers.teacher(n, tile)
            slope = dead = None
            if self.keep_logits:
                slope = self._softcap_slope(e, row.stats.top[k])
                dead = torch.isneginf(e_t) if row.stats.masked[k] else None
                e.exp_()
                e_t.exp_()
            elif row.stats.masked[k]:
                dead = e_t < 0
                e_t.clamp_(min=0)
            p = torch.mul(e_t, row.a_t[k], out=self.buffers.scratch("x", n, tile))
            q = e_t
            if self.kd_power == 1:
                torch.mul(e, row.a_kd[k], out=q)
            else:
                power(e, self.kd_power, q).mul_(row.a_kd[k])
            if dead is not None:
                q.masked_fill_(dead, 0)
            g, tile_value = self._mixture(p, q, n, tile)
            value += tile_value
            slope_sum += g.sum(-1)
            kd = row.weights.kd.to(e.dtype).unsqueeze(1)
            if row.a_ce is None:
                torch.mul(g, kd, out=e)
            else:
                self._raise(e, self.ce_power, self.buffers.scratch("power", n, tile)).mul_(row.a_ce[k])
                e.addcmul_(g, kd)
            self._finish(e, row, tile, slope)
            if slope is not None:
                q.mul_(slope)
        return value, slope_sum

    def _mixture(self, p: Tensor, q: Tensor, n: int, tile: Tile) -> tuple[Tensor, Tensor]:
        """Slope `q dD/dq` `[n, w]` (up to a multiple of q) and value `[n]` of a tile. Overwrites `p`.

        All from `s = (p - q) / m`, where m is the mixture: `q / m` and `p / m` are 1 plus a multiple of s, so
        the logarithms keep their digits where p and q are almost equal, and stay bounded where one of them is
        0.
        """
        if self.kind == "jsd":
            return self._jensen_shannon(p, q, n, tile)
        gap = torch.sub(p, q, out=self.buffers.scratch("gap", n, tile))
        if self.kind == "tvd":
            value = 0.5 * gap.abs().sum(-1)
            return gap.sign_().mul_(q).mul_(-0.5), value
        lam = self.parameter
        share = 1 - lam if self.kind == "skew_reverse_kl" else lam  # of p in the mixture
        mix = torch.lerp(q, p, share, out=self.buffers.scratch("t", n, tile))
        mix.clamp_(min=torch.finfo(mix.dtype).tiny)
        log = self.buffers.scratch("product", n, tile)
        s = torch.div(gap, mix, out=mix)
        if self.kind == "skew_kl":
            term = _log1p(s, 1 - share, out=log).mul_(p)
            value = term.sub_(gap, alpha=1 - lam).sum(-1)
            return s.mul_(q).mul_(-((1 - lam) ** 2)), value
        logs = _log1p(s, -share, out=log)
        value = torch.addcmul(gap.mul_(share), logs, q, out=p).sum(-1)
        return logs.add_(s, alpha=lam * share).mul_(q), value

    def _jensen_shannon(self, p: Tensor, q: Tensor, n: int, tile: Tile) -> tuple[Tensor, Tensor]:
        """The same for `jsd`, from two logarithms; rows that are almost equal are done again with `log1p`.

        A logarithm near 1 has the error of its argument, which is that of p and q themselves: it is good
        enough for the slope, but not for a value of second order in it.
        """
        share, tiny = self.parameter, torch.finfo(p.dtype).tiny
        p.clamp_(min=tiny)
        q.clamp_(min=tiny)
        mix = torch.lerp(q, p, share, out=self.buffers.scratch("t", n, tile))
        slope = torch.div(q, mix, out=self.buffers.scratch("product", n, tile)).log_().mul_(q)
        value = slope.sum(-1).mul_(1 - share)
        term = torch.div(p, mix, out=self.buffers.scratch("gap", n, tile)).log_().mul_(p)
        value.add_(term.sum(-1), alpha=share)
        rows = (value < _SMALL_JSD * mix.sum(-1)).nonzero().squeeze(1)
        if rows.numel():
            a, b = p.index_select(0, rows), q.index_select(0, rows)
            s = (a - b).div_(mix.index_select(0, rows))
            logs = [_log1p(s, factor, out=torch.empty_like(s)) for factor in (-share, 1 - share)]
            slope[rows] = logs[0].mul_(b)
            value[rows] = logs[1].mul_(a).mul_(share).add_(logs[0], alpha=1 - share).sum(-1)
        return slope.mul_(1 - share), value


@dataclass
class _Row:
    """Factors of a chunk's rows: `[K, n, 1]` per tile, `[n, 1]` for all."""

    a_ce: Tensor | None
    a_kd: Tensor | None
    a_t: Tensor | None
    weights: Weights
    stats: Statistics
    parameter: float

    def __post_init__(self) -> None:
        rest = self.weights.rest
        self.rest = None if rest is None else rest.to(self.stats.top.dtype).unsqueeze(1)
        self.reverse_kl = self.stats.total_reverse_kl()


def _log1p(s: Tensor, factor: float, out: Tensor) -> Tensor:
    """`log(1 + factor * s)`, where rounding may put the argument just below 0."""
    return torch.mul(s, factor, out=out).clamp_(min=-1 + 2 * torch.finfo(s.dtype).eps).log1p_()
