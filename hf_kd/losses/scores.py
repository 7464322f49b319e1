"""Attention as what it is made of: scores `a b^T`, compared by KL without holding more than a gradient.

A kernel of fused attention (SDPA) never holds its scores, but it is called with queries and keys, from which
those of the layers that are compared follow. Worked through in blocks of rows and heads that stay in the
processor's cache, with the gradient written by hand, as in `rows.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .kernels import forward_slopes, kl_terms
from .rows import block_of, refuse_second_derivative

# Less than any score that is not masked: models mask with the least number of their dtype, or add it.
_FLOOR = -1e30
# A class with log q - log p below this may be written in units of p: q is less than e^-40 where p underflows.
_NEAR = 40.0


@dataclass(frozen=True)
class Products:
    """Attention scores before the softmax, by their factors: `scale * queries keys^T + bias`.

    Attributes:
        queries: `[B, A, L, d]`.
        keys: `[B, A, K, d]`.
        scale: Factor of the products.
        bias: What is added, broadcast to `[B, A, L, K]`; None: nothing.
        hidden: Bool, broadcast likewise: keys that are not seen; None: all are.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    bias: Tensor | None = None
    hidden: Tensor | None = None

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
        if is_causal:
            size = query.shape[2], key.shape[2]
            hidden = ~torch.ones(size, dtype=torch.bool, device=query.device).tril()[None, None]
        elif attn_mask is not None:
            mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
            if mask.dtype == torch.bool:
                hidden = ~mask
            else:
                hidden = mask < torch.finfo(mask.dtype).min / 4
                bias = mask.masked_fill(hidden, 0.0)
                if bias.device.type == "cpu" and not bias.requires_grad and not bias.any():
                    bias = None  # a mask, and no more
        return cls(query, key, query.shape[-1] ** -0.5 if scale is None else scale, bias, hidden)

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
        return scores if self.hidden is None else scores.masked_fill(self.hidden, -torch.inf)


def product_kl(student: Products, teacher: Products) -> Tensor:
    r"""KL from the teacher's attention to the student's, per query, mean over heads.

    Keys that either model hides are hidden from both; a query that sees none (padding) has 0.

    Args:
        student: Factors of `[B, A, L, K]` scores, fp32 or fp64.
        teacher: Of the same shape and dtype; receives no gradient.

    Returns:
        `[B, L]` nats, at least 0. Differentiable once, and not towards the bias.
    """
    hidden = student.hidden
    if teacher.hidden is not None:
        hidden = teacher.hidden if hidden is None else hidden | teacher.hidden
    if hidden is not None and hidden.device.type == "cpu" and not hidden.any():
        hidden = None
    return _ProductKL.apply(student.queries, student.keys, student, teacher.detach(), hidden)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor, Tensor]
    scale: float
    alike: bool


class _ProductKL(torch.autograd.Function):
    """Kept for the backward pass: queries, keys, and `q - p`."""

    @staticmethod
    def forward(
        ctx: _Context,
        queries: Tensor,
        keys: Tensor,
        student: Products,
        teacher: Products,
        hidden: Tensor | None,
    ) -> Tensor:
        slopes = queries.new_empty(student.shape)
        values = queries.new_zeros(slopes.shape[:3])
        blind = None if hidden is None else hidden.all(-1, keepdim=True)
        for block in _blocks(slopes):
            log_q, log_p = (_log_softmax(side, block, hidden, blind) for side in (student, teacher))
            values[block], slopes[block] = _kl(log_q, log_p)
        ctx.save_for_backward(queries, keys, slopes)
        ctx.scale, ctx.alike = student.scale / slopes.shape[1], student.keys is student.queries
        return values.clamp_(min=0).mean(1)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        refuse_second_derivative()
        queries, keys, slopes = ctx.saved_tensors
        weight = (grad * ctx.scale)[:, None, :, None]
        to_queries = torch.empty_like(queries)
        if ctx.alike:  # one product instead of two
            for block in _blocks(slopes):
                slope = slopes[block] * weight[block[0]]
                to_queries[block] = (slope + slope.transpose(-1, -2)) @ keys[block]
            return to_queries, None, None, None, None
        to_keys = torch.empty_like(keys)
        for block in _blocks(slopes):
            slope = slopes[block] * weight[block[0]]
            to_queries[block] = slope @ keys[block]
            to_keys[block] = slope.transpose(-1, -2) @ queries[block]
        return to_queries, to_keys, None, None, None


def _kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row `[..., L]`, and its slope `[..., L, K]`, `q - p`."""
    gap = log_q - log_p
    if gap.device.type != "cpu" or not bool(gap.amax() <= _NEAR):
        return kl_terms(log_q, log_p).sum(-1), forward_slopes(log_q, log_p)
    # One exponential for both: q - p = p expm1(d), as long as that neither overflows nor loses a q.
    p, ratio = log_p.exp(), torch.expm1(gap)
    slope = p * ratio
    return ratio.sub_(gap).mul_(p).sum(-1), slope


def _log_softmax(
    side: Products, block: tuple[slice, slice], hidden: Tensor | None, blind: Tensor | None
) -> Tensor:
    scores = (side.queries[block] * side.scale) @ side.keys[block].transpose(-1, -2)
    if side.bias is not None:
        scores.add_(_part(side.bias, block))
    if hidden is None or blind is None:
        return torch.log_softmax(scores, -1)
    scores.masked_fill_(_part(hidden, block), -math.inf).masked_fill_(_part(blind, block), 0.0)
    return torch.log_softmax(scores, -1).clamp_(min=_FLOOR)


def _part(tensor: Tensor, block: tuple[slice, slice]) -> Tensor:
    """A block of a tensor whose rows or heads may be broadcast."""
    every = slice(None)
    rows, heads = (every if size == 1 else part for size, part in zip(tensor.shape[:2], block, strict=True))
    return tensor[rows, heads]


def _blocks(scores: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and heads whose scores fit in one block: several rows, or some heads of one."""
    rows, heads, length, keys = scores.shape
    fit = max(1, block_of(scores) // (length * keys))
    by_rows, by_heads = max(1, fit // heads), min(fit, heads)
    for row in range(0, rows, by_rows):
        for head in range(0, heads, by_heads):
            yield slice(row, row + by_rows), slice(head, head + by_heads)
