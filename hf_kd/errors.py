"""How sure a score is: standard errors from the rows that it was measured on."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from transformers import EvalPrediction

from hf_kd.metrics.predictions import take

logger = logging.getLogger(__name__)

#: Samples of the bootstrap; its standard error is then known to about 5 %.
RESAMPLES = 200
# Seconds of the processor that the samples of one model's metrics may take.
_LIMIT = 30.0
# A metric that does not read its rows alone changes by more than this when they change places.
_SAME = 1e-6

Samples = dict[str, np.ndarray]


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


def draws(rows: int) -> Iterator[np.ndarray]:
    """`RESAMPLES` times `[N]` row numbers with replacement; the same ones for the same number of rows."""
    rng = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        yield rng.integers(0, rows, rows)


def of_ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
    """`[RESAMPLES]` bootstrap values of `sum(sums) / sum(counts)`; None where one of them has no count."""
    if len(sums) < 2:
        return None
    found = [(sums[rows].sum(), counts[rows].sum()) for rows in draws(len(sums))]
    if any(count <= 0 for _, count in found):
        return None
    return np.array([total / count for total, count in found])


def bootstrap(compute: Callable[[EvalPrediction], dict[str, Any]], seen: EvalPrediction) -> Samples:
    """`[RESAMPLES]` values of each metric, by resampling whole rows (Efron 1979); the same for the same rows.

    A metric is left out where it is not a number in some resample (a class that is not in it), and where it
    changes when the rows change places: then it reads something besides the rows, such as a list of
    answers, that does not follow them. A function with a method `resamples` (`make_compute_metrics`) is
    asked for that instead. Nothing is returned where it would take over half a minute.

    Args:
        compute: What Trainer calls.
        seen: Predictions and labels, arrays `[N, ...]` or nested tuples of them.
    """
    rows = _rows(seen.predictions)
    if seen.label_ids is None or rows is None or rows < 2 or _rows(seen.label_ids) != rows:
        return {}
    if hasattr(compute, "resamples"):
        values, names = compute.resamples(seen, draws(rows)), None
    else:
        as_they_are, turned = compute(seen), compute(take(seen, np.arange(rows)[::-1]))
        names = [name for name, value in as_they_are.items() if _same(value, turned.get(name))]
        values = (compute(take(seen, which)) for which in draws(rows))
    made: list[dict[str, Any]] = []
    start = time.process_time()
    for found in values:
        made.append(found)
        if (time.process_time() - start) / len(made) * RESAMPLES > _LIMIT:
            logger.info("no standard errors of the metrics: %d samples of them take too long", RESAMPLES)
            return {}
    wanted = list(made[0]) if names is None else names
    return {name: np.array([found[name] for found in made]) for name in wanted if _numbers(made, name)}


def _rows(values: Any) -> int | None:
    """Rows of nested arrays; None where they have different numbers of them, or there is no array."""
    if isinstance(values, tuple | list):
        found = {_rows(value) for value in values}
        return found.pop() if len(found) == 1 else None
    return len(values) if isinstance(values, np.ndarray) and values.ndim else None


def _same(one: Any, other: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return numbers and math.isfinite(one) and abs(one - other) <= _SAME * max(1.0, abs(one))


def _numbers(made: list[dict[str, Any]], name: str) -> bool:
    return all(isinstance(row.get(name), int | float) and math.isfinite(row[name]) for row in made)
