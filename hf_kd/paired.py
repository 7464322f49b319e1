"""Two models on the same rows: how much one is better, and what the rows can say about it.

Both fail on the hard rows, so the error of the difference is mostly far smaller than that of either score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hf_kd.evaluating import Evaluation
    from hf_kd.results import Arm

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


def differences(arms: Mapping[str, Arm], metric: str | None) -> list[PairedDifference]:
    """How the arms differ on the same rows: students against the control, the student against the teacher.

    Args:
        arms: By name, all scored on the same rows.
        metric: The one that decides.
    """
    pairs = [(name, "control") for name in arms if name not in ("teacher", "control")]
    made = [
        between((one, arms[one]), (other, arms[other]), metric)
        for one, other in [*pairs, ("student", "teacher")]
        if one in arms and other in arms and metric is not None
    ]
    return [found for found in made if found is not None]


def between(one: tuple[str, Arm], other: tuple[str, Arm], metric: str) -> PairedDifference | None:
    """How two arms, each with its name, differ on the same rows; None where these were not kept."""
    (name, ours), (against, theirs) = one, other
    scores = [arm.metrics.get(metric, math.nan) for arm in (ours, theirs)]
    if not all(map(math.isfinite, scores)):
        return None
    value = scores[0] - scores[1]
    if ours.right and theirs.right and len(ours.right) == len(theirs.right):
        low, high = of_shares(*(_as_numbers(arm.right or "") for arm in (ours, theirs)))
        return PairedDifference(name, against, metric, value, low, high, "mcnemar")
    if not ours.samples or len(ours.samples) != len(theirs.samples):
        return None
    low, high = of_samples(value, *(np.asarray(arm.samples) for arm in (ours, theirs)))
    return PairedDifference(name, against, metric, value, low, high, "bootstrap")


def kept(found: Evaluation, metric: str | None) -> dict[str, Any]:
    """What an arm keeps of its rows, to be compared with others later: `right` or `samples` of `Arm`."""
    score = None if metric is None else found.scores.get(f"eval_{metric}")
    if metric is None or not isinstance(score, int | float) or not math.isfinite(score):
        return {}
    if found.right is not None and _is_its_mean(found.right, score):
        return {"right": "".join("-" if np.isnan(row) else str(int(row)) for row in found.right)}
    samples = found.samples.get(metric)
    return {} if samples is None else {"samples": samples.tolist()}


def _as_numbers(right: str) -> np.ndarray:
    return np.array([math.nan if row == "-" else float(row) for row in right])


def _is_its_mean(right: np.ndarray, score: float) -> bool:
    """Whether a score is the share of rows that are right."""
    return bool(np.isfinite(right).any()) and abs(float(np.nanmean(right)) - score) < 1e-6
