"""One run a folder: a lock that goes with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# By process: a fork holds nothing of its own.
_held: set[tuple[int, Path]] = set()


@contextlib.contextmanager
def alone(folder: Path, refused: Callable[[], Exception]) -> Iterator[None]:
    """Be the only process that works in a folder; what the process holds already it may hold again.

    Args:
        folder: Made if it is not there.
        refused: The error to raise if another process is at work.

    Raises:
        Exception: What `refused` returns.
        ValueError: If nothing can be written there.
    """
    held = (os.getpid(), folder.absolute())
    if held in _held:
        yield
        return
    with _opened(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise refused() from error
        except OSError as error:
            logger.warning("%s has no locks (%s): nothing keeps a second run out.", folder, error.strerror)
        _held.add(held)
        try:
            yield
        finally:
            _held.discard(held)


def _opened(folder: Path) -> IO[str]:
    try:
        made(folder)
        return (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise _unwritable(folder, error) from error


def made(folder: Path) -> None:
    """Make a folder, if it is not there.

    Raises:
        ValueError: If it can't be: no permission, or a file has its name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"{folder} can't be written ({error.strerror}): choose another folder")


def output_dir(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Be the only run of an output folder.

    Raises:
        ValueError: If another run is at work there, or nothing can be written.
    """
    return alone(
        folder,
        lambda: ValueError(
            f"output_dir={str(folder)!r} is in use by another run: wait for it, or choose another folder"
        ),
    )
