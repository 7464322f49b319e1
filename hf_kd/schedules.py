"""How a weight moves over training: pure functions of progress.

A schedule knows nothing of steps and keeps no state: it maps the fraction of training that is done, from 0 to
1, to a value between two given ends. So it can't start a step late, start again when a run is resumed, or
wear down the value that it started from. Take progress as `step / max_steps` with the number of optimizer
steps that are *done*: 0 in the first step.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

#: Name -> the share of the way from start to end that is covered at some progress; both from 0 to 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1.0 - math.cos(math.pi * progress)) / 2.0,
}


def schedule(name: str, start: float, end: float | None, progress: float) -> float:
    """The value at some point of training.

    `constant` stays at `start`. `linear` goes straight to `end`. `cosine` leaves `start` and reaches `end`
    slowly and is fastest halfway: `start + (end - start) * (1 - cos(pi * progress)) / 2`.

    Args:
        name: One of `SCHEDULES`.
        start: The value at progress 0, exactly.
        end: The value at progress 1, exactly; `constant` ignores it, and for it alone it may be None.
        progress: The fraction of training that is done, from 0 to 1.

    Returns:
        A value between `start` and `end`.

    Raises:
        ValueError: If the name is not known, if `end` is missing, or if `progress` is outside [0, 1].

    Example:
        >>> schedule("linear", 4.0, 1.0, 0.5)
        2.5
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(str(name), SCHEDULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"schedule {name!r} is not known{hint} Take one of {', '.join(SCHEDULES)}")
    if not 0.0 <= progress <= 1.0:
        raise ValueError(
            f"progress={progress} must be from 0 to 1: pass steps done / max_steps, not the step"
        )
    if name == "constant":
        return start
    if end is None:
        raise ValueError(
            f"schedule {name!r} goes from start={start} to nowhere: set the end value, or take 'constant'"
        )
    share = SCHEDULES[name](progress)
    value = (1.0 - share) * start + share * end
    # Rounding must not carry a weight past its end: alpha = 1.0000000000000002 is not a weight.
    return min(max(value, min(start, end)), max(start, end))
