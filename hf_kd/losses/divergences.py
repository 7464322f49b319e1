"""What to compare: divergences between the teacher's and the student's distribution, one number a row.

Every divergence here has one shape, `(log_q[N, C], log_p[N, C]) -> [N]`: log-probabilities of the student
first, of the teacher second, in fp32 or fp64, as `log_probs` makes them. Values are in nats unless said
otherwise, summed over classes. There is no temperature, `T^2`, mask or mean in here: each is applied once,
outside.

| name | formula (p teacher, q student) | the student ... |
|---|---|---|
| `forward_kl` | KL(p, q) | covers everything the teacher finds likely; the default |
| `reverse_kl` | KL(q, p) | drops what it can't model, keeps to the teacher's modes |
| `jeffreys` | (KL(p, q) + KL(q, p)) / 2 | both at once |
| `jsd` | beta KL(p, m) + (1 - beta) KL(q, m) | between the two, bounded |
| `skew_kl` | KL(p, lam p + (1 - lam) q) | forward, with a bounded loss |
| `skew_reverse_kl` | KL(q, lam q + (1 - lam) p) | reverse, with a bounded loss |
| `tvd` | sum abs(q - p) / 2 | bounded gradient, robust to a noisy teacher |
| `alpha_beta` | a two-parameter family with both KLs at its corners | tuned |
| `logit_mse` | squared difference of centred logits | matches the tail as well as the top |

All of them are 0 with zero gradient where the two are equal, are never negative, keep their digits near that
point, and have finite values and gradients for any finite logits and any classes masked with `-inf` (on both
sides, as `log_probs` does).

How: near convergence a KL is the small difference of large numbers. `sum p * (log p - log q)` has a rounding
error of about 1e-6 in fp32, more than the KL itself at the end of a run. Since `sum q = sum p = 1`, the same
KL is `sum p * (expm1(d) - d)` with `d = log q - log p`, whose terms are all non-negative and of second order.

Losses on logits that are more than that (targets, correlations, other vocabularies) are in `logits.py`.

Your own divergence is a function of the same shape: pass it as a callable, or as `"package.module:function"`.
Autograd differentiates it; masked classes are `-inf` in both arguments, where `exp` is safe and a difference
is not. If it names `labels`, raw logits or the temperature as keywords, it gets them (`needs.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .logits import LOGIT_LOSSES, adaptive_kl, uld
from .named import check_call, find
from .needs import needs_of
from .rows import log_probs, sum_over_classes

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "alpha_beta",
    "entropy",
    "forward_kl",
    "jeffreys",
    "jsd",
    "log_probs",
    "logit_mse",
    "resolve_divergence",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
]

#: `(log_q[N, C], log_p[N, C], **what it reads besides) -> [N]`
Divergence = Callable[..., Tensor]

# Closer to 0, fp32 can't hold both a weight and its complement, and an exponent divides a rounding error.
_SMALLEST_WEIGHT = 1e-3
_SMALLEST_EXPONENT = 0.01
_LARGEST_EXPONENT = 10.0


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""Forward Kullback-Leibler divergence, teacher to student (Hinton et al. 2015). The default.

        KL(p || q) = sum_c p (log p - log q) = sum_c p (expm1(d) - d),    d = log q - log p

    Zero-avoiding: a class that the teacher finds likely and the student doesn't is expensive, so the student
    spreads over all the teacher's modes. It differs from cross-entropy with soft labels by the teacher's
    `entropy` only, so the gradient, `(q - p) / T` for the logits, is the same, and the value can reach 0. For
    `T -> infinity`, `T^2 KL` tends to `1/(2C) * |centred(z - t)|^2`.

    When: first. Classification, token classification, language models with a student that isn't far smaller.
    Siblings: `reverse_kl` swaps the roles; `skew_kl(lam=0)`, `jsd(beta=0)`, `alpha_beta(a=1, b=0)` are this.
    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531.

    Args:
        log_q: `[N, C]` student log-probabilities, fp32 or fp64.
        log_p: `[N, C]` teacher log-probabilities, same dtype; receives no gradient.

    Returns:
        `[N]` nats, at least 0, unbounded.

    Raises:
        ValueError: If shapes or dtypes differ (all divergences do).
    """
    return sum_over_classes(log_q, log_p, kernels.kl_terms, kernels.forward_slopes)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""Reverse Kullback-Leibler divergence, student to teacher (MiniLLM, Gu et al. 2024).

        KL(q || p) = sum_c q (log q - log p)

    Zero-forcing: mass where the teacher has none is expensive, so a student too small to cover all modes
    keeps to the largest. The gradient flows through `q` on both sides of the product; the obvious spelling,
    `F.kl_div(log_p, q)`, has a finite value and a NaN gradient once a probability underflows.

    When: generative students much smaller than the teacher, where an average of modes is a bad sample.
    Siblings: `forward_kl` swaps the roles; `jsd(beta=1)` and `alpha_beta(a=0, b=1)` are this;
    `skew_reverse_kl` bounds it.
    Source: Gu et al. 2024, arXiv:2306.08543; Agarwal et al. 2024 (GKD), arXiv:2306.13649.

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.

    Returns:
        `[N]` nats, at least 0, unbounded.
    """
    return sum_over_classes(log_q, log_p, kernels.reverse_terms, kernels.reverse_slopes)


def jeffreys(log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""Jeffreys divergence: the mean of forward and reverse KL, the symmetric one.

        J(p, q) = (KL(p || q) + KL(q || p)) / 2 = sum_c (q - p)(log q - log p) / 2

    When: covering and precision matter alike, and a strong pull far from the teacher is welcome: far away it
    grows as fast as the larger of the two KLs, where `jsd`, the bounded symmetric one, stops pulling.
    Source: Jeffreys 1946, Proc. R. Soc. A 186 (there without the factor 1/2).

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.

    Returns:
        `[N]` nats, at least 0, unbounded.
    """
    return sum_over_classes(log_q, log_p, kernels.jeffreys_terms, kernels.jeffreys_slopes)


def jsd(log_q: Tensor, log_p: Tensor, *, beta: float = 0.5) -> Tensor:
    r"""Generalised Jensen-Shannon divergence (GKD, Agarwal et al. 2024).

        JSD_beta(p, q) = beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

    Bounded by the entropy of the pair `(beta, 1 - beta)`, log 2 at 0.5. Towards the ends it vanishes, while
    `JSD / beta -> KL(p || q)` for `beta -> 0`, and `JSD / (1 - beta) -> KL(q || p)` for `beta -> 1`. So, by
    convention, the ends themselves **are** forward KL (0) and reverse KL (1). In between the loss is smaller
    than a KL, and a `beta` near an end also lowers its weight against the task loss.

    When: language models on the student's own samples, where the two can be far apart and KL explodes.
    Siblings: `skew_kl` has one of the two terms; `jeffreys` is symmetric and unbounded.
    Source: Agarwal et al. 2024, arXiv:2306.13649; Lin 1991, IEEE Trans. Inf. Theory 37(1).

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.
        beta: Weight of the teacher in the mixture: 0, 1, or from 0.001 to 0.999.

    Returns:
        `[N]` nats, at least 0, at most log 2 for `beta` between the ends.

    Raises:
        ValueError: If `beta` is outside its range.
    """
    _check_weight("jsd", "beta", beta, ends=(0, 1))
    if beta == 0:
        return forward_kl(log_q, log_p)
    if beta == 1:
        return reverse_kl(log_q, log_p)
    terms = functools.partial(kernels.jsd_terms, beta=beta)
    return sum_over_classes(log_q, log_p, terms, functools.partial(kernels.jsd_slopes, beta=beta))


def skew_kl(log_q: Tensor, log_p: Tensor, *, lam: float = 0.1) -> Tensor:
    r"""Skew forward KL (DistiLLM, Ko et al. 2024): the teacher against a mixture of both.

        SKL_lam(p, q) = KL(p || lam p + (1 - lam) q)

    The mixture never falls below `lam p`, so the loss is at most `-log lam`, and a class on which the student
    is hopeless (`q` far below `lam p`) stops pulling instead of ruling the step. `lam = 0` is `forward_kl`.
    Near the teacher it is `(1 - lam)^2` times forward KL.

    When: language models, a student far from the teacher, noisy early steps.
    Siblings: `skew_reverse_kl` starts from the student; `jsd` adds the two, weighted.
    Source: Ko et al. 2024, arXiv:2402.03898, who choose `lam` = 0.1; Lee 2001, AISTATS.

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.
        lam: Share of the teacher in the mixture: 0, or from 0.001 to 0.999.

    Returns:
        `[N]` nats, at least 0, at most `-log lam`.

    Raises:
        ValueError: If `lam` is outside its range.
    """
    _check_weight("skew_kl", "lam", lam, ends=(0,))
    if lam == 0:
        return forward_kl(log_q, log_p)
    terms = functools.partial(kernels.skew_terms, lam=lam)
    return sum_over_classes(log_q, log_p, terms, functools.partial(kernels.skew_slopes, lam=lam))


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, *, lam: float = 0.1) -> Tensor:
    r"""Skew reverse KL (DistiLLM, Ko et al. 2024): the student against a mixture of both.

        SRKL_lam(p, q) = KL(q || lam q + (1 - lam) p)

    As `reverse_kl`, but mass where the teacher has none costs at most `-log lam`, so one underflown teacher
    probability doesn't rule the step. `lam = 0` is `reverse_kl`.

    When: where `reverse_kl` is right but unstable: large vocabularies, a teacher at low temperature.
    Siblings: `skew_kl` starts from the teacher.
    Source: Ko et al. 2024, arXiv:2402.03898.

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.
        lam: Share of the student in the mixture: 0, or from 0.001 to 0.999.

    Returns:
        `[N]` nats, at least 0, at most `-log lam`.

    Raises:
        ValueError: If `lam` is outside its range.
    """
    _check_weight("skew_reverse_kl", "lam", lam, ends=(0,))
    if lam == 0:
        return reverse_kl(log_q, log_p)
    terms = functools.partial(kernels.skew_reverse_terms, lam=lam)
    return sum_over_classes(log_q, log_p, terms, functools.partial(kernels.skew_reverse_slopes, lam=lam))


def tvd(log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""Total variation distance (used for sequences by Wen et al. 2023, f-DISTILL).

        TVD(p, q) = 1/2 sum_c |q - p|

    The largest difference in probability that the two give to any set of classes: symmetric, a metric, and
    without a logarithm. Its gradient does not shrink near the teacher (it is 0 only at equality), so the
    learning rate has to. By Pinsker, `TVD <= sqrt(KL / 2)`.

    When: a noisy or over-confident teacher; or a student that drafts for the teacher in speculative decoding,
    where `1 - TVD` is the share of tokens that are accepted.
    Siblings: `jsd` is bounded too, and smooth at 0.
    Source: Wen et al. 2023, arXiv:2307.15190.

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.

    Returns:
        `[N]`, a probability (not nats), from 0 to 1.
    """
    return sum_over_classes(log_q, log_p, kernels.tvd_terms, kernels.tvd_slopes)


def alpha_beta(log_q: Tensor, log_p: Tensor, *, a: float = 0.2, b: float = 0.7) -> Tensor:
    r"""Alpha-beta divergence (ABKD, Wang et al. 2025): a plane of divergences with both KLs on its axes.

        D(p, q) = 1/(a b) sum_c [ a/(a+b) p^(a+b) + b/(a+b) q^(a+b) - p^a q^b ]

    Its slope is `q^b (q^a - p^a) / a`: the smaller `a`, the more it is ratios that count and not differences,
    so that errors on unlikely classes weigh more; the larger `b`, the more it looks at what the student
    finds likely. On the axes it is continued to its limits: `(1, 0)` is `forward_kl`, `(0, 1)` is
    `reverse_kl`, `(0, 0)` is half the sum of squared log-ratios; `(0.5, 0.5)` is 4 times the squared
    Hellinger distance. Near the teacher it is `sum p^(a+b) d^2 / 2`.

    When: a held-out set is there to tune two numbers on. ABKD uses (0.2, 0.7) for language models and around
    (0.8, 0.3) for image classification; `a + b` near 1 keeps the weights of `forward_kl`.
    Source: Wang et al. 2025, arXiv:2505.04560; Cichocki, Cruces, Amari 2011, Entropy 13(1).

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.
        a: Exponent of the teacher: 0, or from 0.01 to 10.
        b: Exponent of the student: 0, or from 0.01 to 10.

    Returns:
        `[N]`, at least 0; nats where `a + b = 1`.

    Raises:
        ValueError: If `a` or `b` is outside its range. Negative ones are defined in the literature, but are
            infinite where a class has no mass.
    """
    _check_exponent("a", a)
    _check_exponent("b", b)
    terms = functools.partial(kernels.alpha_beta_terms, a=a, b=b)
    return sum_over_classes(log_q, log_p, terms, functools.partial(kernels.alpha_beta_slopes, a=a, b=b))


def logit_mse(log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""Mean squared error of logits, blind to a constant added to all logits of a row (Kim et al. 2021).

        MSE(p, q) = 1/C sum_c (d_c - mean(d))^2,    d = log q - log p

    Log-probabilities are logits shifted by a constant, so this is `1/C |centred(z - t)|^2 / T^2`, and with
    the `T^2` of the objective it is the squared error of the centred logits at any temperature. Plain MSE
    also asks the student for the teacher's (meaningless) mean logit. All classes count alike, likely or not.
    It is twice the limit of `T^2 forward_kl` for `T -> infinity`.

    When: classification with few classes and a teacher whose small logits carry knowledge. With a large
    vocabulary it spends the student on the tail: prefer a KL at a higher temperature.
    Siblings: `alpha_beta(a=0, b=0)` is similar, but neither centred nor averaged.
    Source: Kim et al. 2021, arXiv:2105.08919; Ba and Caruana 2014, arXiv:1312.6184.

    Args:
        log_q: `[N, C]` student log-probabilities.
        log_p: `[N, C]` teacher log-probabilities.

    Returns:
        `[N]`, at least 0, in squared logits; a mean over the classes that are not masked.
    """
    return sum_over_classes(log_q, log_p, kernels.logit_mse_terms, kernels.logit_mse_slopes)


def entropy(log_p: Tensor) -> Tensor:
    r"""Entropy of each row, in nats: how much the teacher leaves open.

        H(p) = -sum_c p log p

    0 is a one-hot teacher, `log C` one that knows nothing. It is the floor of cross-entropy with soft labels,
    `CE(p, q) = H(p) + KL(p || q)`, which is why cross-entropy with soft labels must not be logged as KL.

    Args:
        log_p: `[N, C]` log-probabilities, fp32 or fp64; `-inf` counts as 0.

    Returns:
        `[N]` nats, from 0 to `log C`.
    """
    return sum_over_classes(log_p, log_p, kernels.entropy_terms, kernels.entropy_slopes)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "alpha_beta": alpha_beta,
    "logit_mse": logit_mse,
    "adaptive_kl": adaptive_kl,
    "uld": uld,
}


def resolve_divergence(spec: str | Divergence, options: Mapping[str, float] | None = None) -> Divergence:
    """Find a divergence by name, by import path, or as it is, and bind its options.

    Args:
        spec: A name in `DIVERGENCES` or `LOGIT_LOSSES`, `"package.module:function"`, or a callable
            `(log_q, log_p) -> [N]`, which may name more (`needs.py`).
        options: Its keyword arguments, such as `{"beta": 0.1}`.

    Returns:
        `(log_q, log_p, ...) -> [N]`. One that is not ours is checked at each call: it must return one value a
        row.

    Raises:
        ValueError: If there is no such divergence, it has no such option, or the option is out of range.
    """
    known = {**DIVERGENCES, **LOGIT_LOSSES}
    function = find("divergence", spec, known)
    options = dict(options or {})
    name = spec if isinstance(spec, str) else getattr(spec, "__name__", repr(spec))
    reads = needs_of(function).reads
    check_call("divergence", name, function, ("log_q", "log_p"), options, given=reads)
    bound = functools.partial(function, **options) if options else function
    if function in known.values():
        # A value out of range raises here, before any training.
        some = torch.zeros(2, 2)
        context = {"labels": torch.zeros(2, dtype=torch.long), "temperature": 1.0, "teacher_temperature": 1.0}
        bound(some, some, **{key: context.get(key, some) for key in reads})
        return bound
    checked = functools.wraps(function)(functools.partial(_checked, bound, name))
    checked.__wrapped__ = bound
    return checked


def _checked(function: Divergence, name: str, log_q: Tensor, log_p: Tensor, **context: Any) -> Tensor:
    values = function(log_q, log_p, **context)
    if not isinstance(values, Tensor) or values.shape != log_q.shape[:-1]:
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(
            f"divergence={name} returned {got} for log-probabilities of shape {list(log_q.shape)}: it must "
            f"return one value a row, shape {list(log_q.shape[:-1])}, summed over classes and without a mean"
        )
    return values


def _check_weight(name: str, option: str, value: float, *, ends: tuple[int, ...]) -> None:
    if not _is_number(value) or not (value in ends or _SMALLEST_WEIGHT <= value <= 1 - _SMALLEST_WEIGHT):
        raise ValueError(
            f"{name}: {option}={value!r} must be {' or '.join(map(str, ends))}, or a number from "
            f"{_SMALLEST_WEIGHT} to {1 - _SMALLEST_WEIGHT}"
        )


def _check_exponent(option: str, value: float) -> None:
    if not _is_number(value) or not (value == 0 or _SMALLEST_EXPONENT <= value <= _LARGEST_EXPONENT):
        raise ValueError(
            f"alpha_beta: {option}={value!r} must be 0 (the exact limit), or a number from "
            f"{_SMALLEST_EXPONENT} to {_LARGEST_EXPONENT}: the divergence is infinite below 0, and lost in "
            "rounding just above"
        )


def _is_number(value: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
