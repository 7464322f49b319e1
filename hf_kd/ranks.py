"""What is said when ranks lose each other."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

# How gloo, NCCL and the store say that the other side is gone or silent.
_LOST = re.compile(
    r"connection (closed|reset|refused)|closed by peer|broken pipe|timed out|timeout|socket|nccl|gloo", re.I
)


class RankError(RuntimeError):
    """Another rank has ended or does not answer."""


def lost(error: Exception) -> bool:
    """Whether an error is that of a broken exchange."""
    return isinstance(error, dist.DistError) or bool(_LOST.search(str(error)))


@contextlib.contextmanager
def explained(trainer: DistillationTrainer) -> Iterator[None]:
    """Turn a broken exchange between ranks into an error that says which rank saw it, when, and what to do.

    Raises:
        RankError: Instead of what the exchange raised.
    """
    try:
        yield
    except RuntimeError as error:
        if trainer.args.world_size < 2 or not lost(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise RankError(
            f"rank {trainer.args.process_index} of {trainer.args.world_size} lost the others after step "
            f"{trainer.state.global_step} ({first}). One of them has ended, or was silent for "
            f"ddp_timeout={trainer.args.ddp_timeout} s; its own message says why. Start again with "
            "resume_from_checkpoint=True."
        ) from error
