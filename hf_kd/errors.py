"""How sure a score is: standard errors from the rows that it was measured on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import EvalPrediction

#: Samples of the bootstrap; its standard error is then known to about 5 %.
RESAMPLES = 200


def of_mean(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Standard error of `sum(sums) / sum(counts)` over `[N]` independent rows, as that of a ratio.

    Rows count by how much they hold (tokens, say), so the spread is that of `sums - mean * counts` (Cochran
    1977, eq. 6.13). None for fewer than two rows.
    """
    rows, total = len(sums), float(counts.sum())
    if rows < 2 or total <= 0:
        return None
    residual = sums - sums.sum() / total * counts
    return float(math.sqrt(np.square(residual).sum() * rows / (rows - 1)) / total)


def bootstrap(
    compute: Callable[[EvalPrediction], dict[str, Any]],
    predictions: np.ndarray,
    labels: np.ndarray,
    metric: str,
) -> float | None:
    """Standard error of any metric by resampling `[N, ...]` rows (Efron 1979); the same for the same rows.

    None where the metric is not computed, or not a number in some resample (a class that is not in it).
    """
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(labels), len(labels))
        value = compute(EvalPrediction(predictions=predictions[rows], label_ids=labels[rows])).get(metric)
        if value is None or not math.isfinite(value):
            return None
        found.append(float(value))
    return float(np.std(found, ddof=1))
