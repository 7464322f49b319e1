"""The page of traps says what the tests say."""

from __future__ import annotations

import pytest

from .correctness import PAGE, TRAPS, find_tests, page

TESTS = find_tests()
MOST_HARMFUL = (1, 3, 5, 7, 8, 9, 15, 16, 17, 18, 20, 30, 33, 34, 36)


def test_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.correctness > docs/correctness.md"


@pytest.mark.parametrize("number", TRAPS)
def test_every_trap_has_a_test_or_a_reason(number: int) -> None:
    assert TRAPS[number].missing or any(number in test.traps for test in TESTS)


@pytest.mark.parametrize("number", MOST_HARMFUL)
def test_naive_version_is_kept(number: int) -> None:
    """The most harmful traps have a test that holds the naive version and shows that it fails."""
    assert any(number in test.traps and test.naive for test in TESTS)


def test_numbers_are_known() -> None:
    """A test that names a trap which does not exist names the wrong one."""
    assert {number for test in TESTS for number in test.traps} <= TRAPS.keys()
