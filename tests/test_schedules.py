"""Schedules are pure functions of progress, exact at both ends."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_kd.options.loss import SCHEDULE_NAMES
from hf_kd.schedules import SCHEDULES, schedule

weights = st.floats(0, 1)
names = st.sampled_from(list(SCHEDULES))


def test_the_options_offer_exactly_these() -> None:
    assert set(SCHEDULE_NAMES) == set(SCHEDULES)


@given(names, weights, weights, weights)
def test_stays_between_its_ends(name: str, start: float, end: float, progress: float) -> None:
    assert min(start, end) <= schedule(name, start, end, progress) <= max(start, end)


@given(st.sampled_from(["linear", "cosine"]), st.floats(0.05, 20), st.floats(0.05, 20))
def test_exact_at_both_ends(name: str, start: float, end: float) -> None:
    """Trap 28: the first step has the start value, not one step later; the last has the end value."""
    assert schedule(name, start, end, 0.0) == start
    assert schedule(name, start, end, 1.0) == end


@given(names, weights, weights, st.integers(1, 50))
def test_monotone(name: str, start: float, end: float, steps: int) -> None:
    path = [schedule(name, start, end, step / steps) for step in range(steps + 1)]
    assert path == sorted(path, reverse=end < start)


def test_known_values() -> None:
    assert schedule("constant", 0.3, None, 0.9) == 0.3
    assert schedule("constant", 0.3, 0.8, 1.0) == 0.3
    assert schedule("linear", 4.0, 1.0, 0.5) == 2.5
    assert schedule("cosine", 0.0, 1.0, 0.5) == pytest.approx(0.5)
    assert schedule("cosine", 4.0, 1.0, 0.25) == pytest.approx(4 - 3 * (1 - math.cos(math.pi / 4)) / 2)


@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 200), st.data())
def test_a_resumed_run_goes_on_where_it_was(name: str, steps: int, data: st.DataObject) -> None:
    """Trap 28: no state, so nothing restarts, and the base value is never overwritten."""

    def run(first: int, last: int) -> list[float]:
        base = 0.9
        return [schedule(name, base, 0.1, step / steps) for step in range(first, last)]

    stop = data.draw(st.integers(0, steps))
    assert run(0, stop) + run(stop, steps) == run(0, steps)


def test_overwriting_the_base_value_compounds() -> None:
    """Trap 28, counter-example: the value of step 10 depends on how often it was asked for."""

    def naive(calls: int) -> float:
        alpha = 1.0
        for step in range(10 - calls, 10):
            alpha = alpha * (1 - (step + 1) / 20)
        return alpha

    assert naive(10) != pytest.approx(naive(1))
    assert schedule("linear", 1.0, 0.0, 10 / 20) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linaer", 0.0, 1.0, 0.5), "schedule 'linaer' is not known; did you mean 'linear'"),
        (("linear", 0.0, None, 0.5), "schedule 'linear' goes from start=0.0 to nowhere"),
        (("linear", 0.0, 1.0, 37), "progress=37 must be from 0 to 1"),
        (("constant", 0.0, 1.0, -0.1), "progress=-0.1"),
        (("cosine", 0.0, 1.0, float("nan")), "progress=nan"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


def test_needs_no_torch() -> None:
    code = "import sys, hf_kd.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
