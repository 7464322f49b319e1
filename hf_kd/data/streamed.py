"""Splits whose training rows are a stream: read when they are needed, and never all in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset

from hf_kd.options import RunOptions
from hf_kd.teachers.ensemble import TEACHER_ID

logger = logging.getLogger(__name__)

# Rows that are looked at to find out what columns and labels are, and the most to evaluate on.
_HEAD, _MOST_EVALUATED = 2000, 5000


class Streamed(DatasetDict):
    """`train` has the first rows, which say what columns and labels there are; `stream` has them all."""

    stream: IterableDataset


def streamed(chosen: Mapping[str, Any], options: RunOptions) -> Streamed:
    """Look at the first rows of `train`, and take those of the other splits into memory.

    Without an evaluation split it is the first rows of the stream: `max_eval_samples`, else a tenth of the
    first 2,000; they are not trained on.

    Raises:
        ValueError: If there are no rows, or too few to hold some out.
    """
    stream = _as_stream(chosen["train"])
    found = Streamed()
    for name, rows in chosen.items():
        if name != "train":
            found[name] = _taken(_as_stream(rows), options.max_eval_samples or _MOST_EVALUATED)
    head = _taken(stream, _HEAD)
    if "eval" not in found:
        held = options.max_eval_samples or max(len(head) // 10, 1)
        first = _taken(stream, held + 1)
        if len(first) <= held:
            raise ValueError(
                f"dataset={options.dataset!r} has {len(first)} rows, too few to hold {held} out for "
                "evaluation: set eval_split, or a smaller max_eval_samples"
            )
        found["eval"] = first.select(range(held))
        logger.warning("no evaluation split: the first %d rows of the stream are held out for it", held)
        stream = stream.skip(held)
        head = _taken(stream, _HEAD)
    found["train"] = head
    for name, rows in found.items():
        if len(rows) == 0:
            raise ValueError(f"dataset={options.dataset!r} has no rows in its {name} split")
    if TEACHER_ID in head.column_names:
        raise ValueError(
            f"streaming=True and a column {TEACHER_ID!r}, which routes rows to teachers: set streaming=false"
        )
    found.stream = stream
    return found


def _as_stream(rows: Any) -> IterableDataset:
    if isinstance(rows, Dataset):
        return rows.to_iterable_dataset()
    return rows if rows.features is not None else rows._resolve_features()


def _taken(stream: IterableDataset, count: int) -> Dataset:
    return Dataset.from_list(list(stream.take(count)), features=stream.features)
