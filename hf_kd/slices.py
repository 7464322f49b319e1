"""Quality on parts of the evaluation rows: by a column of the data, by length, by label.

A mean over all rows hides the part on which a student is bad. Each part comes with its number of rows and a
95 % interval, without which the smallest parts always look the most interesting.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_kd.paired import Z_95

#: Values of a column that are shown; the rarer ones are counted together.
MOST_VALUES = 12
_QUARTERS = 4
_OTHERS = "(others)"


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        value: The mean; None where no row of the slice has a number.
        low: Lower end.
        high: Upper end.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Slice:
    """The rows with one value.

    Attributes:
        by: What they have in common: a column, "length" or "label".
        value: Its value, or a range of it.
        rows: How many they are.
        metric: What `scores` are means of: "accuracy" (share of rows that are right), "loss" (task loss,
            nats) or "kl" (to the teacher, nats).
        scores: By arm.
    """

    by: str
    value: str
    rows: int
    metric: str
    scores: dict[str, Interval]


def slice_rows(
    columns: Mapping[str, Sequence[Any]], values: Mapping[str, Sequence[float] | np.ndarray], *, metric: str
) -> list[Slice]:
    """Each arm's mean on the rows of each value of each column.

    Args:
        columns: By name, one value a row. Numbers of more than `MOST_VALUES` kinds are cut at their
            quartiles; of other values the commonest are kept, and the rest is one slice.
        values: By arm, one number a row; NaN where there is none. With `metric="accuracy"` 0 or 1.
        metric: What the numbers are: "accuracy", "loss" or "kl".

    Returns:
        The slices, column by column.

    Raises:
        ValueError: If a column has another number of rows than the values.
    """
    arrays = {name: np.asarray(numbers_, dtype=np.float64) for name, numbers_ in values.items()}
    made = []
    for by, column in columns.items():
        wrong = {name: len(array) for name, array in arrays.items() if len(array) != len(column)}
        if wrong:
            raise ValueError(f"slices: column {by!r} has {len(column)} rows, the arms {wrong}: give the same")
        for value, mask in _parts(column):
            scores = {
                name: interval(array[mask], proportion=metric == "accuracy") for name, array in arrays.items()
            }
            made.append(Slice(by, value, int(mask.sum()), metric, scores))
    return made


def interval(values: np.ndarray, *, proportion: bool) -> Interval:
    """The mean of `[N]` numbers with its 95 % interval; NaN are left out.

    Args:
        values: The numbers.
        proportion: Whether they are zeros and ones: Wilson's interval (1927), which stays in [0, 1] and is
            right for few rows too; else that of a mean, `1.96 sd / sqrt(N)`, and none for a single row.
    """
    values = values[~np.isnan(values)]
    n = len(values)
    if n == 0:
        return Interval(None, None, None)
    mean = float(values.mean())
    if proportion:
        centre = (mean + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z_95**2 / (4 * n * n))
        # Rounding must not leave the mean outside.
        return Interval(mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)))
    if n == 1:
        return Interval(mean, None, None)
    half = Z_95 * float(values.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def _parts(column: Sequence[Any]) -> list[tuple[str, np.ndarray]]:
    """The values of a column and which rows have them."""
    known = [value for value in column if value is not None]
    numeric = all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in known)
    if known and numeric and len(set(known)) > MOST_VALUES:
        return _ranges(np.array([math.nan if v is None else float(v) for v in column]))
    named = np.array(["(none)" if value is None else str(value) for value in column], dtype=object)
    common = [value for value, _ in Counter(named.tolist()).most_common(MOST_VALUES)]
    shown = sorted(common, key=lambda v: (0, float(v), v) if numeric and v != "(none)" else (1, 0.0, v))
    parts = [(value, named == value) for value in shown]
    rest = ~np.isin(named.astype(str), common)
    return [*parts, (_OTHERS, rest)] if rest.any() else parts


def _ranges(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Quarters of about the same number of rows; equal values stay together."""
    present = values[~np.isnan(values)]
    edges = np.unique(np.quantile(present, np.linspace(0, 1, _QUARTERS + 1)))
    parts = []
    for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        last = i == len(edges) - 2
        mask = (values >= low) & ((values <= high) if last else (values < high))
        if mask.any():
            inside = values[mask]
            parts.append((f"{inside.min():g} to {inside.max():g}", mask))
    missing = np.isnan(values)
    return [*parts, ("(none)", missing)] if missing.any() else parts
