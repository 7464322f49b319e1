"""Rows that are added to a cache while a student is trained from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .store import Shard, locked, read_shards, shard_arrays
from .writer import append_shard

if TYPE_CHECKING:
    from ...trainer import DistillationTrainer

# A run that is killed loses what it was told since the last shard: so many bytes, or seconds, at most.
_SHARD_BYTES = 64 << 20
_SECONDS = 60.0
# Another run may be writing its own shard.
_PATIENCE = 60.0


class Additions:
    """What was said since the last shard of a rank, by key.

    The folder is locked only while a shard is written, so that several runs may add to one cache.

    Args:
        folder: The cache.
        rank: Of the process; its shards have names of their own.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        """Start with nothing in hand."""
        self.folder, self.rank = folder, rank
        self.rows: dict[bytes, dict[str, np.ndarray]] = {}
        self._bytes, self._since = 0, time.monotonic()
        #: Whether anything was ever added.
        self.started = False

    def add(self, key: bytes, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a row, in memory until the next shard."""
        if not self.rows:
            self._since = time.monotonic()
        self.started = True
        self.rows[key] = dict(arrays)
        self._bytes += sum(array.nbytes for array in arrays.values())

    @property
    def due(self) -> bool:
        """Whether enough is in hand for a shard."""
        return self._bytes >= _SHARD_BYTES or (bool(self.rows) and time.monotonic() - self._since > _SECONDS)

    def flush(self) -> Shard | None:
        """Write what is in hand as a shard; None if there is nothing.

        Raises:
            CacheError: If the disk is full, or `hf-kd cache` is writing this folder.
        """
        if not self.rows:
            return None
        with locked(self.folder, patience=_PATIENCE):
            prefix = f"shard-{self.rank:05d}-"
            own = [shard for shard in read_shards(self.folder) if shard.file.startswith(prefix)]
            shard = append_shard(
                self.folder, self.rank, own, shard_arrays(list(self.rows), list(self.rows.values()))
            )
        self.rows, self._bytes = {}, 0
        return shard


class AddingCallback(TrainerCallback):
    """Write what is in hand at the end of an epoch, before a checkpoint, after an evaluation, at the end."""

    def __init__(self, trainer: DistillationTrainer, flush: Callable[[], None]) -> None:
        """Watch a trainer."""
        self.trainer, self.flush = trainer, flush

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Another rank may meet these rows in the next epoch: it finds them when it has waited here."""
        self.flush()
        self.trainer.accelerator.wait_for_everyone()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before a checkpoint: a run that goes on from it doesn't ask again."""
        if control.should_save:
            self.flush()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing is left in hand."""
        self.flush()

    on_train_end = on_evaluate
