"""The divergences as pairs of functions on a block of rows: what is added up over classes, and its slope.

`terms(log_q[n, C], log_p[n, C]) -> [n, C]` sums to the divergence of each row; `slopes(...) -> [n, C]` is the
derivative of that sum with respect to each `log_q`. Inputs are finite (`rows.py` floors `-inf`). Three rules
keep every pair finite and exact:

- Exponents are never positive: a term is scaled by the larger of `p` and `q`, and `expm1` sees `-|d|` only,
  so that a difference of log-probabilities of a million gives neither infinity nor infinity times 0.
- Terms are of second order in `d = log q - log p`: `sum q - sum p`, which is 0 but for rounding, is part of
  each.
- Slopes are written down, not derived by autograd; where `d` is 0 they are exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import visible


def kl_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`p * (expm1(d) - d)`: the terms of KL(p || q) plus `q - p`; needs no normalisation to be >= 0."""
    larger = torch.maximum(log_q, log_p)
    gap = torch.minimum(log_q, log_p).sub_(larger)
    shrunk = torch.expm1(gap)
    rest = shrunk - gap
    # q above p: in units of q the term is -expm1(-d) - d exp(-d).
    shrunk.mul_(gap).sub_(rest)
    return torch.where(log_q > log_p, shrunk, rest).mul_(larger.exp_())


def forward_slopes(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`q - p`."""
    return log_q.exp().sub_(log_p.exp())


def reverse_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`q * (expm1(-d) + d)`."""
    return kl_terms(log_p, log_q)


def reverse_slopes(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`q d`."""
    return (log_q - log_p).mul_(log_q.exp())


def jeffreys_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`(q - p) d / 2`: two factors of the same sign, so nothing cancels."""
    return forward_slopes(log_q, log_p).mul_(log_q - log_p).mul_(0.5)


def jeffreys_slopes(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`(q - p + q d) / 2`."""
    return forward_slopes(log_q, log_p).add_(reverse_slopes(log_q, log_p)).mul_(0.5)


def log_mix(log_q: Tensor, log_p: Tensor, weight: float) -> Tensor:
    """`log(weight p + (1 - weight) q)`; exactly `log p` where the two are equal."""
    larger = torch.maximum(log_q, log_p)
    shrunk = torch.minimum(log_q, log_p).sub_(larger).expm1_()
    shrunk = torch.where(log_q > log_p, shrunk * weight, shrunk.mul(1 - weight))
    return larger.add_(shrunk.log1p_())


def jsd_terms(log_q: Tensor, log_p: Tensor, *, beta: float) -> Tensor:
    """`beta` times KL(p || m) plus `1 - beta` times KL(q || m)."""
    log_m = log_mix(log_q, log_p, beta)
    return kl_terms(log_m, log_p).mul_(beta).add_(kl_terms(log_m, log_q), alpha=1 - beta)


def jsd_slopes(log_q: Tensor, log_p: Tensor, *, beta: float) -> Tensor:
    """`(1 - beta) q log(q / m)`."""
    log_m = log_mix(log_q, log_p, beta)
    return reverse_slopes(log_q, log_m).mul_(1 - beta)


def skew_terms(log_q: Tensor, log_p: Tensor, *, lam: float) -> Tensor:
    """KL(p || m), `m = lam p + (1 - lam) q`."""
    return kl_terms(log_mix(log_q, log_p, lam), log_p)


def skew_slopes(log_q: Tensor, log_p: Tensor, *, lam: float) -> Tensor:
    """`(1 - lam)^2 (q - p) q / m`; `q / m` is at most `1 / (1 - lam)`."""
    ratio = (log_q - log_mix(log_q, log_p, lam)).exp_()
    return forward_slopes(log_q, log_p).mul_(ratio).mul_((1 - lam) ** 2)


def skew_reverse_terms(log_q: Tensor, log_p: Tensor, *, lam: float) -> Tensor:
    """KL(q || m), `m = lam q + (1 - lam) p`."""
    return kl_terms(log_mix(log_p, log_q, lam), log_q)


def skew_reverse_slopes(log_q: Tensor, log_p: Tensor, *, lam: float) -> Tensor:
    """`q (log(q / m) - lam (q / m - 1))`; `log(q / m)` is at most `-log lam`."""
    over = log_q - log_mix(log_p, log_q, lam)
    return over.expm1().mul_(-lam).add_(over).mul_(log_q.exp())


def tvd_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`|q - p| / 2`."""
    return forward_slopes(log_q, log_p).abs_().mul_(0.5)


def tvd_slopes(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`sign(d) q / 2`."""
    return (log_q - log_p).sign_().mul_(log_q.exp()).mul_(0.5)


def alpha_beta_terms(log_q: Tensor, log_p: Tensor, *, a: float, b: float) -> Tensor:
    """The alpha-beta terms, on the axes their limits."""
    if a == 0 and b == 0:
        return (log_q - log_p).square_().mul_(0.5)
    if b == 0:
        return kl_terms(a * log_q, a * log_p).div_(a * a)
    if a == 0:
        return kl_terms(b * log_p, b * log_q).div_(b * b)
    total = a + b
    larger = torch.maximum(log_q, log_p)
    gap = torch.minimum(log_q, log_p).sub_(larger)
    # In units of the larger one to the power a + b; the exponent of the smaller one is left in the cross
    # term.
    q_larger = log_q > log_p
    both = (gap * total).expm1_().div_(total)
    bracket = torch.where(q_larger, a * both - (a * gap).expm1_(), b * both - (b * gap).expm1_())
    return larger.mul_(total).exp_().mul_(bracket).div_(a * b)


def alpha_beta_slopes(log_q: Tensor, log_p: Tensor, *, a: float, b: float) -> Tensor:
    """`q^b (q^a - p^a) / a`, for `a = 0` its limit `q^b d`."""
    d = log_q - log_p
    if a == 0:
        return (b * log_q).exp_().mul_(d)
    weight = torch.maximum(log_q, log_p).mul_(a).add_(log_q, alpha=b).exp_()
    return d.abs().mul_(-a).expm1_().mul_(d.sign_()).mul_(weight).div_(-a)


def logit_mse_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Squares of the centred difference over the number of classes that are not masked."""
    centred, count = _centred(log_q, log_p)
    return centred.square_().div_(count)


def logit_mse_slopes(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Twice the centred difference over the same number."""
    centred, count = _centred(log_q, log_p)
    return centred.mul_(2).div_(count)


def _centred(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    seen = visible(log_p)
    count = seen.sum(-1, keepdim=True)
    d = log_q - log_p
    # Masked classes differ by 0, so they are absent from the sum, but not from what centring moves.
    return d.sub_(d.sum(-1, keepdim=True) / count).mul_(seen), count


def entropy_terms(log_p: Tensor, _: Tensor) -> Tensor:
    """`-p log p`."""
    return log_p.exp().mul_(log_p).neg_()


def entropy_slopes(log_p: Tensor, _: Tensor) -> Tensor:
    """`-p (log p + 1)`."""
    return log_p.exp().mul_(log_p + 1).neg_()
