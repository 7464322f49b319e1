"""Some batches of a data set, as the dataloader would collate them; training does not notice."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .rows import ROW

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


def sample_batches(trainer: DistillationTrainer, dataset: Any, most: int) -> list[dict[str, Any]]:
    """Up to `most` batches of the training size, evenly spread; the first of them has the first rows.

    A stream is read from its start. Every random generator is left as it was.

    Raises:
        KeyError, ValueError, TypeError, IndexError: What the rows or the collator raise.
    """
    import datasets

    size = trainer.args.per_device_train_batch_size
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            collator = trainer.data_collator
            if isinstance(dataset, datasets.Dataset):
                rows = trainer._remove_unused_columns(dataset, "first batch")
                groups = [
                    [{k: v for k, v in rows[i].items() if k != ROW} for i in indices]
                    for indices in _spread(len(rows), size, most)
                ]
            else:
                collator = trainer._get_collator_with_removed_columns(collator, "first batch")
                if hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__"):
                    stream = list(itertools.islice(iter(dataset), size * most))
                    groups = [stream[i : i + size] for i in range(0, len(stream), size)]
                else:
                    groups = [[dataset[i] for i in indices] for indices in _spread(len(dataset), size, most)]
            return [dict(trainer._prepare_inputs(collator(features))) for features in groups if features]
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _spread(rows: int, size: int, most: int) -> list[range]:
    """Disjoint ranges of up to `size` rows, evenly spaced."""
    there = -(-rows // size)
    count = min(most, there)
    starts = [there * k // count * size for k in range(count)]
    return [range(start, min(start + size, rows)) for start in starts]
