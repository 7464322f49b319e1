"""Attention as what it is made of: scores `a b^T`, compared by KL without ever holding all of them.

A kernel of fused attention (SDPA) never holds its scores, but it is called with queries and keys, from which
those of the layers that are compared follow. Worked through in tiles that stay in the processor's cache, with
the gradient written by hand, as in `rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .kernels import forward_slopes, kl_terms
from .rows import block_of, refuse_second_derivative

# Added to a score, leaves nothing of it, and a probability of 0 unless all keys are hidden.
_FLOOR = -1e30
# A class with log q - log p below this may be written in units of p: q is less than e^-40 where p underflows.
_NEAR = 40.0

#: A part of scores `[B, A, L, K]`.
Tile = tuple[slice, slice, slice, slice]


@dataclass(frozen=True)
class Products:
    """Attention scores before the softmax, by their factors: `scale * queries keys^T + bias`.

    Attributes:
        queries: `[B, A, L, d]`.
        keys: `[B, A, K, d]`.
        scale: Factor of the products.
        bias: What is added, broadcast to `[B, A, L, K]`; None: nothing.
        hidden: Bool, broadcast likewise: keys that are not seen; None: all are.
        causal: Whether a query sees no later keys than its own, beside that.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    bias: Tensor | None = None
    hidden: Tensor | None = None
    causal: bool = False

    @classmethod
    def of_call(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Products:
        """What `F.scaled_dot_product_attention` computes inside, by its arguments."""
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        bias, hidden = None, None
        if attn_mask is not None:
            mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
            if mask.dtype == torch.bool:
                hidden = ~mask
            else:
                hidden = mask < torch.finfo(mask.dtype).min / 4
                bias = mask.masked_fill(hidden, 0.0)
                if bias.device.type == "cpu" and not bias.requires_grad and not bias.any():
                    bias = None  # a mask, and no more
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return cls(query, key, scale, bias, hidden, is_causal)

    @property
    def shape(self) -> torch.Size:
        """`[B, A, L, K]`."""
        return torch.Size((*self.queries.shape[:3], self.keys.shape[2]))

    @property
    def ndim(self) -> int:
        """4."""
        return self.queries.ndim

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient reaches queries or keys."""
        return self.queries.requires_grad or self.keys.requires_grad

    @property
    def differentiable(self) -> bool:
        """Whether `product_kl` has all of its gradient: a bias that is trained is not in it."""
        return self.bias is None or not self.bias.requires_grad

    @property
    def dtype(self) -> torch.dtype:
        """Of queries and keys."""
        return self.queries.dtype

    @property
    def device(self) -> torch.device:
        """Of queries and keys."""
        return self.queries.device

    def to(self, device: torch.device, dtype: torch.dtype) -> Products:
        """On a device, in a precision."""
        bias, hidden = self.bias, self.hidden
        return replace(
            self,
            queries=self.queries.to(device, dtype),
            keys=self.keys.to(device, dtype),
            bias=None if bias is None else bias.to(device, dtype),
            hidden=None if hidden is None else hidden.to(device),
        )

    def detach(self) -> Products:
        """Without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, queries=self.queries.detach(), keys=self.keys.detach(), bias=bias)

    def scores(self) -> Tensor:
        """`[B, A, L, K]`; `-inf` where a key is hidden."""
        scores = self.queries @ self.keys.transpose(-1, -2) * self.scale
        if self.bias is not None:
            scores = scores + self.bias
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores if self.hidden is None else scores.masked_fill(self.hidden, -torch.inf)


def product_kl(student: Products, teacher: Products, weight: Tensor) -> Tensor:
    r"""KL from the teacher's attention to the student's: mean over heads, weighted sum over queries.

        sum_bl weight_bl / A * sum_a KL(softmax(t_bal) || softmax(s_bal))

    Keys that either model hides are hidden from both; a query that sees none (padding) has 0. The gradient is
    made with the value, so nothing as large as the scores is kept for the backward pass.

    Args:
        student: Factors of `[B, A, L, K]` scores, fp32 or fp64.
        teacher: Of the same shape and dtype; receives no gradient.
        weight: `[B, L]`; receives no gradient.

    Returns:
        A scalar in nats, at least 0 for weights that are. Differentiable once, and not towards the bias.
    """
    return _ProductKL.apply(student.queries, student.keys, student, teacher.detach(), weight)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]


class _ProductKL(torch.autograd.Function):
    """Kept for the backward pass: the gradient itself, of queries and keys."""

    @staticmethod
    def forward(
        ctx: _Context, queries: Tensor, keys: Tensor, student: Products, teacher: Products, weight: Tensor
    ) -> Tensor:
        total = queries.new_zeros(())
        to_queries, to_keys = (
            torch.zeros_like(side, memory_format=torch.contiguous_format) for side in (queries, keys)
        )
        share = weight.to(queries.dtype)[:, None, :, None] / queries.shape[1]
        causal, cover = student.causal or teacher.causal, _cover(student, teacher)
        for tile in _tiles(student.shape, block_of(queries), causal):
            rows, heads, part, seen = tile

            def scores(tile: Tile = tile) -> tuple[Tensor, Tensor]:
                # Further down in the student: a hidden key is never where it is the most above the teacher.
                return (
                    _scores(student, cover, tile, causal, 2 * _FLOOR),
                    _scores(teacher, cover, tile, causal, _FLOOR),
                )

            found = _kl_near(*scores()) if queries.device.type == "cpu" else None
            values, slopes = found or _kl(*scores())
            values.clamp_(min=0).mul_(share[rows, :, part])
            total += values.sum()
            slopes = slopes.mul_(share[rows, :, part]).flatten(0, 1)
            # Added where they belong: rows are several only with all heads, so `view` finds one stride.
            for grad, factor, slope in (
                (to_queries[rows, heads, part], keys[rows, heads, seen], slopes),
                (to_keys[rows, heads, seen], queries[rows, heads, part], slopes.transpose(1, 2)),
            ):
                grad.view(-1, *grad.shape[2:]).baddbmm_(slope, factor.flatten(0, 1), alpha=student.scale)
        ctx.save_for_backward(to_queries, to_keys)
        return total

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        refuse_second_derivative()
        to_queries, to_keys = ctx.saved_tensors
        return to_queries * grad, to_keys * grad, None, None, None


def _kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence `[..., L, 1]` of rows of scores `[..., L, K]`, and its slope `q - p`."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return kl_terms(log_q, log_p).sum(-1, keepdim=True), forward_slopes(log_q, log_p)


def _kl_near(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same with fewer exponentials, overwriting the scores; None where q is far above p somewhere.

    With `p = softmax(t)` and any `g = s - t + constant`, `q = p exp(g) / sum p exp(g)`. For the constant with
    which `sum p g = 0`, the divergence is `log sum p exp(g)`.
    """
    p = teacher.softmax(-1)
    gap = student.sub_(teacher)
    gap.sub_(gap.amax(-1, keepdim=True))
    mean = torch.mul(p, gap, out=teacher).sum(-1, keepdim=True)
    if not bool(mean.amin() >= -_NEAR):
        return None
    ratio = gap.sub_(mean).expm1_()
    excess = torch.mul(p, ratio, out=teacher).sum(-1, keepdim=True)
    return excess.log1p(), ratio.sub_(excess).mul_(p).div_(1 + excess)


def _cover(student: Products, teacher: Products) -> Tensor | None:
    """1 where either model hides a key, 0 elsewhere."""
    hidden = student.hidden
    if teacher.hidden is not None:
        hidden = teacher.hidden if hidden is None else hidden | teacher.hidden
    if hidden is None or (hidden.device.type == "cpu" and not hidden.any()):
        return None
    return hidden.to(student.dtype)


def _scores(side: Products, cover: Tensor | None, tile: Tile, causal: bool, floor: float) -> Tensor:
    """The scores of some queries and the keys that they see, `floor` added to those that are hidden."""
    rows, heads, part, seen = tile
    scores = (side.queries[rows, heads, part] * side.scale) @ side.keys[rows, heads, seen].transpose(-1, -2)
    if side.bias is not None:
        scores.add_(_part(side.bias, tile))
    if cover is not None:
        scores.add_(_part(cover, tile), alpha=floor)
    if causal:
        scores.add_(scores.new_ones(scores.shape[-2:]).triu_(1 + part.start), alpha=floor)
    return scores


def _part(tensor: Tensor, tile: Tile) -> Tensor:
    """A tile of a tensor whose axes may be broadcast."""
    return tensor[tuple(slice(None) if n == 1 else part for n, part in zip(tensor.shape, tile, strict=True))]


def _tiles(shape: torch.Size, fit: int, causal: bool) -> Iterator[Tile]:
    """Queries whose scores fit in a block: of several rows, or of some heads of one, or some of one head."""
    rows, heads, length, keys = shape
    by_part = min(length, max(1, fit // keys))
    if causal:
        by_part = min(by_part, max(32, -(-length // 4)))  # the earlier ones have fewer keys to see
    by_heads = min(heads, max(1, fit // (by_part * keys)))
    by_rows = max(1, fit // (by_heads * by_part * keys))
    for row in range(0, rows, by_rows):
        for head in range(0, heads, by_heads):
            for start in range(0, length, by_part):
                part = slice(start, min(start + by_part, length))
                seen = slice(part.stop if causal else keys)
                yield slice(row, row + by_rows), slice(head, head + by_heads), part, seen
