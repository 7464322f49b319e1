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
from .logits import LOGIT_LOSSES, adaptive_kl, dist, dkd, hard_labels, nkd, standardised_kl, uld

__all__ = [
    "DIVERGENCES",
    "LOGIT_LOSSES",
    "Divergence",
    "adaptive_kl",
    "alpha_beta",
    "dist",
    "dkd",
    "entropy",
    "forward_kl",
    "hard_labels",
    "jeffreys",
    "jsd",
    "log_probs",
    "logit_mse",
    "nkd",
    "resolve_divergence",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "standardised_kl",
    "tvd",
    "uld",
]
