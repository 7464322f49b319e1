"""What a divergence reads beside the two log-probabilities, and what it asks of the batch.

A divergence names what it reads as keyword arguments, and the objective hands it over, for the same `N` rows:

| keyword | what it gets |
|---|---|
| `labels` | `[N]` class of each row, int64; negative: no label. None: the batch has none |
| `student_logits` | `[N, C]` the student's logits before any temperature, with gradient, in any precision |
| `teacher_logits` | `[N, C]` the teacher's |
| `temperature` | the student's T; the objective multiplies the loss by `T^2` |
| `teacher_temperature` | the teacher's T |

Its other keyword arguments are options (`divergence_options`). A function of your own gets the same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

#: The keywords that the objective fills in.
CONTEXT = ("labels", "student_logits", "teacher_logits", "temperature", "teacher_temperature")

_Function = TypeVar("_Function", bound=Callable[..., Any])
_COUPLES, _UNLIKE = "_hf_kd_couples_rows", "_hf_kd_unlike_classes"


@dataclass(frozen=True)
class Needs:
    """What a divergence asks for.

    Attributes:
        reads: Those of `CONTEXT` that it names.
        couples_rows: Whether a row's value depends on the rows beside it, so that the size of the micro-batch
            is part of the loss.
        unlike_classes: Whether class c of the student may be another one than class c of the teacher.
    """

    reads: tuple[str, ...]
    couples_rows: bool = False
    unlike_classes: bool = False


def couples_rows(*, unless_zero: str) -> Callable[[_Function], _Function]:
    """Declare that the rows of a micro-batch are compared with each other, unless that option is 0."""

    def declare(function: _Function) -> _Function:
        setattr(function, _COUPLES, unless_zero)
        return function

    return declare


def unlike_classes(function: _Function) -> _Function:
    """Declare that classes need not correspond: the teacher may have another vocabulary."""
    setattr(function, _UNLIKE, True)
    return function


def needs_of(function: Callable[..., Any]) -> Needs:
    """What a divergence needs, with the options that are bound to it."""
    options: dict[str, Any] = {}
    inner = function
    while True:
        if isinstance(inner, functools.partial):
            options = {**inner.keywords, **options}
            # A checked one is a partial of the check: what it checks is what it wraps.
            inner = getattr(inner, "__wrapped__", inner.func)
        elif hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        else:
            break
    try:
        parameters = inspect.signature(inner).parameters
    except (TypeError, ValueError):
        return Needs(reads=())
    switch = getattr(inner, _COUPLES, None)
    coupled = switch is not None and options.get(switch, parameters[switch].default) != 0
    return Needs(
        reads=tuple(name for name in CONTEXT if name in parameters),
        couples_rows=coupled,
        unlike_classes=getattr(inner, _UNLIKE, False),
    )
