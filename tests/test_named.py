"""Options that name a function."""

from __future__ import annotations

import math

import pytest

from hf_kd.losses.named import check_call, find, nearest

TABLE = {"sine": math.sin, "cosine": math.cos}


def scaled(x: float, *, scale: float, shift: float = 0.0) -> float:
    return scale * x + shift


def test_find_takes_a_name_a_path_or_a_function() -> None:
    assert find("wave", "sine", TABLE) is math.sin
    assert find("wave", "math:tan", TABLE) is math.tan
    assert find("wave", scaled, TABLE) is scaled


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cosin", "wave='cosin' is not known; did you mean 'cosine'\\? Take one of sine, cosine"),
        ("zzz", "wave='zzz' is not known. Take one of"),
        ({}, "wave={} is not known"),
        ("math:tann", "wave='math:tann' can't be imported: .*tann"),
        (":sin", "wave=':sin' can't be imported"),
        ("no.such:f", "PYTHONPATH"),
        ("math:e", "is of type float: name a function"),
    ],
)
def test_find_says_what_is_wrong(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find("wave", spec, TABLE)


def test_check_call_makes_no_call() -> None:
    def explode(x: float, *, scale: float) -> float:
        raise AssertionError

    check_call("wave", "explode", explode, ("x",), {"scale": 1.0})
    check_call("wave", "sine", math.sin, ("x",), {})
    check_call("wave", "anything", lambda x, **options: x, ("x",), {"whatever": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scal": 1.0},
            "wave_options: scaled has no option 'scal'; did you mean 'scale'\\? Its options: scale, shift",
        ),
        ({"shift": 1.0}, "wave=scaled can't be called .* missing a required argument: 'scale'"),
    ],
)
def test_check_call_names_the_option(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_call("wave", "scaled", scaled, ("x",), options)


def test_nearest_is_the_end_of_a_sentence() -> None:
    assert nearest("sin", TABLE) == "; did you mean 'sine'?"
    assert nearest("qqq", TABLE) == "."
