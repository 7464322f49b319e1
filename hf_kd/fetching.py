"""An epoch's micro-batches, one of which is fetched before its step where that changes nothing."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Source:
    """An epoch's micro-batches, of which one can be fetched early.

    Attributes:
        iterator: Where they come from.
        quiet: Whether fetching leaves the random state of this process alone; None: not seen yet.
        early: What was fetched early.
    """

    def __init__(self, iterator: Iterator[Any], quiet: bool | None = None) -> None:
        """Fetch nothing yet."""
        self.iterator = iterator
        self.quiet = quiet
        self.early: Any = None
        self._failed: Exception | None = None
        self._started = False

    def __iter__(self) -> Iterator[Any]:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next micro-batch: the one that was fetched early, if there is one."""
        if self.early is not None:
            early, self.early = self.early, None
            return early
        if self._failed is not None:
            raise self._failed
        before = _random_state()
        batch = next(self.iterator)
        # The first fetch of an epoch starts workers and samplers, which draw their seeds.
        if self._started and self.quiet is not False:
            self._note(_same(before, _random_state()))
        self._started = True
        return batch

    def peek(self) -> Any:
        """Fetch one early; None where that would change random numbers, or nothing is left."""
        if not self.quiet or self.early is not None:
            return None
        try:
            return next(self)
        except StopIteration:
            return None
        except Exception as error:  # of the step that the batch belongs to
            self._failed = error
            return None

    def _note(self, quiet: bool) -> None:
        self.quiet = quiet
        if not quiet:
            logger.warning(
                "Loading data draws random numbers in this process, so that no batch is fetched before its "
                "step: the teacher is asked ahead within a step only. With dataloader_num_workers=1 or more "
                "they are drawn elsewhere."
            )


def _random_state() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _same(before: tuple[Any, Any, Tensor], after: tuple[Any, Any, Tensor]) -> bool:
    ours, theirs = before[1], after[1]
    return (
        before[0] == after[0]
        and ours[2:] == theirs[2:]
        and bool((ours[1] == theirs[1]).all())
        and torch.equal(before[2], after[2])
    )
