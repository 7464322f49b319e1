"""Two models on the same rows: how much one is better, and what the rows can say about it.

Both fail on the hard rows, so the error of the difference is mostly far smaller than that of either score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hf_kd.evaluating import Evaluation

#: Standard errors from the middle of a two-sided 95 % interval to its ends.
Z_95 = 1.959964


@dataclass(frozen=True)
class PairedDifference:
    """Score of one arm minus that of another, on the same rows.

    Attributes:
        one: The arm that is compared.
        other: The one that it is compared with.
        metric: What the score is.
        value: `one - other`.
        low: Lower end of its 95 % interval.
        high: Upper end.
        how: How the interval was made: "mcnemar" or "bootstrap".
    """

    one: str
    other: str
    metric: str
    value: float
    low: float
    high: float
    how: str

    @property
    def is_clear(self) -> bool:
        """Whether 0 is outside the interval: these rows can tell the two apart."""
        return self.low > 0 or self.high < 0


def of_shares(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two shares of the same `[N]` rows (0 or 1; NaN: left out).

    Exact given the number of rows on which the two differ: 0 is outside the interval just where McNemar's
    exact test (1947; two-sided, binomial) is below 0.05. The share of those rows on which `one` is right has
    the interval of Clopper and Pearson (1934). Where they never differ, the ends are what such rows leave
    possible: no more than `1 - 0.025 ** (1 / N)` of all rows can be.
    """
    from scipy.stats import beta

    known = ~(np.isnan(one) | np.isnan(other))
    better, worse = int((one > other)[known].sum()), int((one < other)[known].sum())
    differ, rows = better + worse, int(known.sum())
    if not differ:
        most = 1 - 0.025 ** (1 / rows) if rows else 1.0
        return -most, most
    low = float(beta.ppf(0.025, better, worse + 1)) if better else 0.0
    high = float(beta.ppf(0.975, better + 1, worse)) if worse else 1.0
    return (2 * low - 1) * differ / rows, (2 * high - 1) * differ / rows


def of_samples(value: float, one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """95 % interval of a difference from `[R]` bootstrap values of both scores, each pair of the same rows.

    Normal, with the bootstrap's standard error (Efron and Tibshirani 1993, eq. 12.14): the ends of the
    bootstrap's own distribution need thousands of samples.
    """
    half = Z_95 * float(np.std(one - other, ddof=1))
    return value - half, value + half


def differences(evaluated: Mapping[str, Evaluation], metric: str | None) -> list[PairedDifference]:
    """How the arms differ on the same rows: students against the control, the student against the teacher.

    Args:
        evaluated: By arm.
        metric: The one that decides.
    """
    pairs = [(name, "control") for name in evaluated if name not in ("teacher", "control")]
    made = [_paired(evaluated, one, other, metric) for one, other in [*pairs, ("student", "teacher")]]
    return [found for found in made if found is not None]


def _paired(
    evaluated: Mapping[str, Evaluation], one: str, other: str, metric: str | None
) -> PairedDifference | None:
    if one not in evaluated or other not in evaluated or metric is None:
        return None
    ours, theirs = evaluated[one], evaluated[other]
    scores = [arm.scores.get(f"eval_{metric}") for arm in (ours, theirs)]
    if not all(isinstance(score, int | float) and np.isfinite(score) for score in scores):
        return None
    value = float(scores[0] - scores[1])  # type: ignore[operator]
    right = [arm.right for arm in (ours, theirs)]
    if all(side is not None and _is_its_mean(side, s) for side, s in zip(right, scores, strict=True)):
        low, high = of_shares(*right)  # type: ignore[arg-type]
        return PairedDifference(one, other, metric, value, low, high, "mcnemar")
    samples = [arm.samples.get(metric) for arm in (ours, theirs)]
    if any(side is None for side in samples):
        return None
    low, high = of_samples(value, *samples)  # type: ignore[arg-type]
    return PairedDifference(one, other, metric, value, low, high, "bootstrap")


def _is_its_mean(right: np.ndarray, score: Any) -> bool:
    """Whether a score is the share of rows that are right."""
    return bool(np.isfinite(right).any()) and abs(float(np.nanmean(right)) - score) < 1e-6
