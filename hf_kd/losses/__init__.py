"""What to compare: divergences between distributions, and the machinery that makes them exact and small."""

from __future__ import annotations

from .divergences import (
    DIVERGENCES,
    Divergence,
    alpha_beta,
    entropy,
    forward_kl,
    jeffreys,
    jsd,
    log_probs,
    logit_mse,
    resolve_divergence,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    tvd,
)

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
