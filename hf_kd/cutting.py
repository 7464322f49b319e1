"""A student cut from the teacher as options ask: its tokenizer, the rows that measure, what is said."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_kd.data.prepare import Prepared
from hf_kd.options.student import TRAINING_ROWS, StudentOptions
from hf_kd.students import init_student, trim_vocabulary
from hf_kd.students.memory import VOCABULARY

_BATCH = 16


def cut(
    options: StudentOptions,
    teacher: PreTrainedModel,
    *,
    batches: Sequence[dict[str, Any]] = (),
    vocab: Sequence[int] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """The student.

    Args:
        options: How it is cut.
        teacher: The whole model.
        batches: From `calibration`.
        vocab: From `trimmed`.
        seed: Of the random start that it is compared with, where there are batches.

    Raises:
        ValueError: What `init_student` refuses, with the options that asked for it.
    """
    values = options.init_arguments()
    try:
        return init_student(teacher, **values, vocab=vocab, calibration=list(batches) or None, seed=seed)
    except ValueError as error:
        asked = ", ".join(f"{name}={value!r}" for name, value in options.cuts.items())
        raise ValueError(f"{asked}: {error}") from error


def trimmed(options: StudentOptions, tokenizer: Any, data: Prepared | None) -> tuple[Any, list[int] | None]:
    """The tokenizer of the student, and its tokens' ids in the teacher's; the same and None if none go.

    Args:
        options: How the student is cut.
        tokenizer: The teacher's.
        data: Its rows, prepared for the teacher.

    Raises:
        ValueError: If there is no such file, or no tokenizer to trim.
    """
    if options.student_vocabulary is None:
        return tokenizer, None
    if not hasattr(tokenizer, "get_vocab"):
        raise ValueError(
            f"student_vocabulary={options.student_vocabulary!r}, but {type(tokenizer).__name__} has no "
            "vocabulary: leave it out"
        )
    if options.student_vocabulary == TRAINING_ROWS:
        assert data is not None
        return trim_vocabulary(tokenizer, (), ids=_ids_of(data.train))
    path = Path(options.student_vocabulary).expanduser()
    if not path.is_file():
        raise ValueError(
            f"student_vocabulary={options.student_vocabulary!r} is not a file: give a text file, or "
            f"{TRAINING_ROWS!r} for the training rows"
        )
    with path.open(encoding="utf-8") as lines:
        return trim_vocabulary(tokenizer, (line.rstrip("\n") for line in lines))


def _ids_of(rows: Any) -> Iterator[Iterable[int]]:
    """The token ids of each row, those of a target text too."""
    for row in rows:
        for name in ("input_ids", "labels"):
            if isinstance(row.get(name), list):
                yield (i for i in row[name] if i >= 0)


def calibration(
    options: StudentOptions, data: Prepared, *, batch_size: int = _BATCH, seed: int = 0
) -> list[dict[str, Any]]:
    """Batches of the first training rows, with labels; the same in every run, and on every rank."""
    rows = data.at_hand
    count = min(options.calibration_rows, len(rows)) if options.cuts else 0
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # a collator may mask at random
            random.seed(seed)
            np.random.seed(seed)
            return [
                dict(data.collator([rows[i] for i in range(first, min(first + batch_size, count))]))
                for first in range(0, count, batch_size)
            ]
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def is_trimmed(student: PreTrainedModel) -> bool:
    """Whether the student has only some of its teacher's tokens."""
    return getattr(student.config, VOCABULARY, None) is not None


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def overheard() -> Iterator[list[str]]:
    """What is said while a student is made: searched shapes, kept layers, sizes, losses."""
    logger, handler = logging.getLogger("hf_kd.students"), _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
