"""Quality on parts of the rows: which rows are in which part, and how sure its number is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_kd.slices import MOST_VALUES, interval, slice_rows


def test_wilsons_interval_is_the_published_one_and_stays_within_0_and_1():
    """Newcombe 1998, table I: 81 of 263, and 0 of 20."""
    some = interval(np.array([1.0] * 81 + [0.0] * 182), proportion=True)
    assert (round(some.low, 4), round(some.high, 4)) == (0.2553, 0.3662)
    none = interval(np.zeros(20), proportion=True)
    assert none.low == 0 and round(none.high, 4) == 0.1611
    every = interval(np.ones(5), proportion=True)
    assert every.value == every.high == 1 and 0 < every.low < 1


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    drawn = [interval(rng.exponential(size=200), proportion=False) for _ in range(1000)]
    assert 0.92 < np.mean([i.low <= 1 <= i.high for i in drawn]) < 0.97
    alone = interval(np.array([3.0]), proportion=False)
    assert (alone.value, alone.low, alone.high) == (3.0, None, None)
    assert interval(np.array([math.nan]), proportion=True).value is None


def test_every_row_is_in_one_slice_of_each_column():
    values = {"student": [1.0, 0.0, 1.0, math.nan], "teacher": [1.0] * 4}
    made = slice_rows({"kind": ["a", "b", "a", None]}, values, metric="accuracy")
    assert [(part.value, part.rows) for part in made] == [("(none)", 1), ("a", 2), ("b", 1)]
    assert made[1].scores["student"].value == 1.0 and made[0].scores["student"].value is None
    assert made[0].scores["teacher"].value == 1.0


def test_many_numbers_are_cut_at_their_quartiles_and_equal_ones_stay_together():
    lengths = [*range(100)] + [7] * 300
    made = slice_rows({"length": lengths}, {"student": np.arange(400.0)}, metric="loss")
    assert sum(part.rows for part in made) == 400
    assert len([part for part in made if any(x == 7 for x in _inside(part, lengths))]) == 1
    few = slice_rows({"grade": [10, 9, 10, 2]}, {"student": np.arange(4.0)}, metric="loss")
    assert [part.value for part in few] == ["2", "9", "10"]


def _inside(part, lengths):
    low, high = map(float, part.value.split(" to "))
    return [x for x in lengths if low <= x <= high]


def test_rare_values_are_counted_together():
    names = [f"name {i}" for i in range(MOST_VALUES + 5)] * 2
    names += [f"name {i}" for i in range(MOST_VALUES)]
    made = slice_rows({"name": names}, {"student": np.ones(len(names))}, metric="loss")
    assert made[-1].value == "(others)" and made[-1].rows == 10 and len(made) == MOST_VALUES + 1


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="column 'kind' has 3 rows"):
        slice_rows({"kind": ["a", "b", "c"]}, {"student": [1.0]}, metric="loss")
