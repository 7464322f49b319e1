"""Metrics through `evaluate`: built-in ones that work offline, and any name that the Hub knows.

A name that is built in is always ours, so that a run gives the same numbers with and without a network.
"""

from hf_kd.metrics.builtin import BUILT_IN, entities, load_metric, perplexity
from hf_kd.metrics.predictions import (
    LOWER_IS_BETTER,
    Compute,
    default_metrics,
    keep_top_class,
    make_compute_metrics,
)

__all__ = [
    "BUILT_IN",
    "LOWER_IS_BETTER",
    "Compute",
    "default_metrics",
    "entities",
    "keep_top_class",
    "load_metric",
    "make_compute_metrics",
    "perplexity",
]
