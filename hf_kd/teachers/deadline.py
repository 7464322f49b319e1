"""A teacher that stalls ends the run with an error instead of keeping it for ever."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class TeacherTimeout(RuntimeError):
    """The teacher did not answer in time."""


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise in the block if it takes longer, by the system's alarm clock; None: no limit.

    The alarm interrupts Python code, sleeps and reads. It reaches compiled code when that returns: a single
    kernel that never ends is for the launcher's time-out.

    Raises:
        TeacherTimeout: When the time is over.
        ValueError: Outside the main thread, where there are no alarms.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(f"teacher_timeout={seconds} works in the main thread only: leave it out here")

    def late(number: int, frame: Any) -> None:
        raise TeacherTimeout(
            f"The teacher gave no answer for one batch in teacher_timeout={seconds:g} s. No weight was "
            "changed by this step. Look at what it waits for, or raise teacher_timeout; then go on with "
            "resume_from_checkpoint=True."
        )

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
