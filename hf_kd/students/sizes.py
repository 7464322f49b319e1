"""Sizes of a student: a number, or the share of the teacher's."""

from __future__ import annotations

import numbers

#: An integer, or a float in (0, 1): the share of the teacher's.
Size = int | float


def resolve_size(option: str, value: Size, full: int, *, multiple: int = 1) -> int:
    """The number that an option means.

    Args:
        option: What messages call it.
        value: An integer is the number itself; a float in (0, 1) is a share of `full`.
        full: The teacher's number.
        multiple: A share is rounded to the nearest multiple of this, halves up.

    Returns:
        The number, which may be larger than `full` where `value` is.

    Raises:
        ValueError: If it is neither, or not positive. `1.0` is refused, since it might mean one or all.
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{option}={value} is not positive: set 1 to {full}, or a share such as 0.5")
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and 0.0 < float(value) < 1.0:
        return max(multiple, int(float(value) * full / multiple + 0.5) * multiple)
    raise ValueError(
        f"{option}={value!r} is neither a number (an integer, up to {full}) nor a share of the teacher's "
        f"{full} (a float between 0 and 1, without its ends): set e.g. {option}={max(1, full // 2)} or 0.5"
    )
