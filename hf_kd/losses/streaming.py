"""Gradient of the hidden states alone, in one pass that keeps no tile: for a frozen head and a small budget.

The gradient is a difference of expectations of the head's rows, under the student's softmax and the
teacher's. Each is a running sum, rescaled when a larger logit turns up, divided by its normaliser at the
end. That takes a product more than keeping the tiles does (two at `T != 1`), but the memory depends on
neither the tokens nor the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .buffers import Buffers
from .slopes import Weights
from .statistics import Statistics
from .tiles import Projection, Tile


class _WeightedRows:
    """`sum_v exp(values_v) W_v` of each token `[n, H]`, relative to `exp(reference)` `[n]`."""

    def __init__(self, n: int, student: Projection, like: Tensor) -> None:
        self.total = like.new_zeros(n, student.width)
        self.reference = torch.full((n,), -torch.inf, dtype=torch.float64, device=like.device)

    def add(self, scaled: Tensor, values: Tensor, reference: Tensor, rows: Tensor) -> None:
        """Take in exponentials `[n, w]` relative to `reference`, with rows `[w, H]`; `scaled` is scratch."""
        largest = torch.maximum(self.reference, reference)
        old, new = ((r - largest).exp().to(values.dtype).unsqueeze(1) for r in (self.reference, reference))
        torch.mul(values, new, out=scaled)
        self.total.mul_(old).addmm_(scaled, rows)
        self.reference = largest

    def expectation(self, weight: Tensor, log_normaliser: Tensor) -> Tensor:
        """`weight * E[W_v]` `[n, H]`."""
        factor = weight * (self.reference - log_normaliser).exp()
        return self.total * factor.to(self.total.dtype).unsqueeze(1)


class RowSums:
    """The sums that a chunk needs: the student's for cross-entropy and divergence, and the teacher's."""

    def __init__(self, buffers: Buffers, student: Projection, hidden: Tensor, names: tuple[str, ...]) -> None:
        self.buffers = buffers
        self.student = student
        self.sums = {name: _WeightedRows(hidden.shape[0], student, hidden) for name in names}

    def add(self, name: str, tile: Tile, values: Tensor, reference: Tensor) -> None:
        """Take in a tile of `ce`, `q` or `p`, if that is wanted."""
        if name == "ce" and "both" in self.sums:
            name = "both"
        if name in self.sums:
            rows = self.student.rows_of_weight(tile.start, tile.stop)
            scaled = self.buffers.scratch("scaled", values.shape[0], tile)
            self.sums[name].add(scaled, values, reference, rows)

    def gradient(
        self, stats: Statistics, weights: Weights, elements: list[tuple[Tensor, Tensor, Tensor]]
    ) -> Tensor:
        """Gradient of the hidden states `[n, H]` from the sums and single elements."""
        n, item = stats.top.shape[1], self.student.width
        out = torch.zeros(n, item, dtype=stats.top.dtype, device=stats.top.device)
        ce, kd = weights.ce, weights.kd
        if "both" in self.sums:
            total = (0 if ce is None else ce) + (0 if kd is None else kd)
            assert isinstance(total, Tensor)
            out += self.sums["both"].expectation(total, stats.lse_ce)
        if "ce" in self.sums and ce is not None:
            out += self.sums["ce"].expectation(ce, stats.lse_ce)
        if "q" in self.sums and kd is not None:
            out += self.sums["q"].expectation(kd, stats.lse_q)
        if "p" in self.sums and kd is not None:
            out -= self.sums["p"].expectation(kd, stats.lse_p)
        step = max(1, (1 << 21) // (4 * item))
        for rows, classes, values in elements:
            parts = zip(rows.split(step), classes.split(step), values.split(step), strict=True)
            for row, index, value in parts:
                weighted = self.student.weight[index].to(out.dtype).mul_(value.unsqueeze(1))
                out.index_add_(0, row, weighted)
        return out.mul_(self.student.head.scale)
