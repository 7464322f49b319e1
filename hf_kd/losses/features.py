"""How far two models are apart inside: at hidden states, attentions, and the relations between positions.

No function takes a mean over positions: which of them count, and over how many the mean is, is decided once,
outside, so each gives one value per position, or is given their weights. What couples positions (attentions,
relations) couples those of one row, so neither padding nor the size of a micro-batch changes a value.
Teachers receive no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import forward_kl, log_probs
from .scores import Products, product_kl
from .vectors import cosine, mse

# Below the variance of any hidden state that says something.
_EPSILON = 1e-12


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared error of hidden states that are standardised over their width. The default.

        mean_h (n(s)_h - n(t)_h)^2,    n(x) = (x - mean(x)) / std(x)

    It is `2 (1 - correlation(s, t))`, from 0 to 4: neither model's scale or offset matters, so it also
    compares a state before a final norm with one after it, and layers whose norms grow with depth weigh the
    same.
    Source: Sun et al. 2019, arXiv:1908.09355, section 3.2, which divides by the length; subtracting the mean
    is what a LayerNorm does.

    Args:
        student: `[..., H]`, fp32 or fp64.
        teacher: Same shape.

    Returns:
        `[...]`.
    """
    return (_standardised(student) - _standardised(teacher)).square().mean(-1)


#: Name -> function `(student[..., H], teacher[..., H]) -> [...]`, for the option `hidden_loss`.
HIDDEN_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normalized_mse": normalized_mse,
    "mse": mse,
    "cosine": cosine,
}


def attention_kl(student: Tensor, teacher: Tensor) -> Tensor:
    r"""KL from the teacher's attention to the student's, per query, mean over heads.

    Source: Wang et al. 2020 (MiniLM), arXiv:2002.10957, section 3.1.

    Args:
        student: `[B, A, L, K]` scores of A heads before the softmax, masks included (a masked key has a score
            near the dtype's minimum, or `-inf`). From their factors: `scores.product_kl`.
        teacher: Same shape.

    Returns:
        `[B, L]` nats, at least 0; 0 where a query sees one key only.
    """
    if student.shape[-1] < 2:
        return student.new_zeros(student.shape[0], student.shape[2]) + 0.0 * student.sum((1, 3))
    log_q, log_p = _attention_log_probs(student, teacher)
    return forward_kl(log_q, log_p).mean(1)


def attention_mse(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared error of attention probabilities, summed over keys, mean over heads, per query.

    Gentler than `attention_kl` where the teacher ignores a key almost wholly. (TinyBERT, Jiao et al. 2020,
    arXiv:1909.10351, equation 7, compares scores before the softmax, whose offset per query means nothing.)
    Summed, not averaged, over keys: padding changes nothing.

    Args:
        student: `[B, A, L, K]`, as for `attention_kl`.
        teacher: Same shape.

    Returns:
        `[B, L]`, from 0 to 2.
    """
    q, p = (_masked(scores).softmax(-1) for scores in (student, teacher.detach()))
    return (q - p).square().sum(-1).mean(1)


#: Name -> function `(student[B, A, L, K], teacher[B, A, L, K]) -> [B, L]`, for the option `attention_loss`.
ATTENTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": attention_kl, "mse": attention_mse}


def relation_kl(
    student: Tensor, teacher: Tensor, *, heads: int, exists: Tensor, causal: bool, weight: Tensor
) -> Tensor:
    r"""KL between the two models' self-relations of queries, keys or values.

        R(x) = softmax(x_a x_a^T / sqrt(d_a)),    a = 1 .. heads
        loss_i = 1 / heads * sum_a KL(R_a(teacher)_i || R_a(student)_i)

    The vectors of all attention heads are joined and split again into `heads` relation heads, so the two
    models may have any widths and any numbers of heads.
    Source: Wang et al. 2021 (MiniLMv2), arXiv:2012.15828, section 3.1; with values alone, the value
    relation of MiniLM (arXiv:2002.10957, section 3.2).

    Args:
        student: `[B, L, D_s]` queries, keys or values of all heads, fp32 or fp64.
        teacher: `[B, L, D_t]`.
        heads: Number of relation heads; divides both widths.
        exists: `[B, L]` bool: positions that others are related to (no padding).
        causal: Whether a position is related to no later ones.
        weight: `[B, L]`: of each position's loss.

    Returns:
        The weighted sum over positions, in nats; a position that is related to none adds 0.

    Raises:
        ValueError: If `heads` does not divide a width.
    """
    hidden = ~exists[:, None, None]
    sides = [_relations(values, heads, hidden, causal) for values in (student, teacher)]
    return product_kl(sides[0], sides[1], weight)


def _relations(values: Tensor, heads: int, hidden: Tensor, causal: bool) -> Products:
    """`[B, heads, L, L]` scaled products of a row's positions."""
    batch, length, width = values.shape
    if width % heads:
        raise ValueError(f"relation_heads={heads} does not divide the width {width}: choose a divisor of it.")
    split = values.reshape(batch, length, heads, width // heads).transpose(1, 2)
    return Products(split, split, (width // heads) ** -0.5, None, hidden, causal)


def scores_of(scores: Tensor | Products) -> Tensor:
    """`[B, A, L, K]` attention scores, multiplied out."""
    return scores.scores() if isinstance(scores, Products) else scores


def _standardised(values: Tensor) -> Tensor:
    return F.layer_norm(values, values.shape[-1:], eps=_EPSILON)


def _masked(scores: Tensor) -> Tensor:
    """Scores whose masked keys are `-inf`: models mask with the least number of their dtype, or add it."""
    scores_32 = scores if scores.dtype == torch.float64 else scores.float()
    return scores_32.masked_fill(scores < torch.finfo(scores.dtype).min / 4, -torch.inf)


def _attention_log_probs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    masked = [_masked(scores) for scores in (student, teacher.detach())]
    # A query that sees nothing in one model (padding) is compared over all keys: unused, but finite.
    blind = (masked[0].isinf() | masked[1].isinf()).all(-1, keepdim=True)
    masked = [torch.where(blind, torch.zeros_like(scores), scores) for scores in masked]
    return log_probs(masked[0], masked[1], temperature=1.0)
