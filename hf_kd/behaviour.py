"""Where a student behaves like its teacher and where not: agreement, calibration, the rows that differ.

For heads that give one class per row. All of it is made from the logits of the same rows, at T = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_BINS = 10
_DIFFERENCES = 10
#: More classes than this make a matrix that nobody reads.
MOST_CLASSES = 30


@dataclass(frozen=True)
class Calibration:
    """Is a model right as often as it says it is: rows in bins of the probability of their top class.

    Attributes:
        confidence: Mean probability of the top class, per bin that has rows.
        accuracy: Share of rows whose top class is the label, per such bin.
        count: Rows per such bin.
        ece: Expected calibration error, sum of `count / rows * |accuracy - confidence|`, in [0, 1] (Naeini et
            al. 2015; Guo et al. 2017, eq. 3).
    """

    confidence: list[float]
    accuracy: list[float]
    count: list[int]
    ece: float


@dataclass(frozen=True)
class Difference:
    """A row on which student and teacher differ much.

    Attributes:
        row: Its number in the evaluation data.
        kl: KL(teacher || student) of this row, in nats.
        teacher: The teacher's class, with its probability.
        student: The student's.
        label: The label, if there is one.
        text: The input, decoded, where it is text.
    """

    row: int
    kl: float
    teacher: str
    student: str
    label: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class PositionKL:
    """KL to the teacher on a stretch of the sequence.

    Attributes:
        first: Its first token, from 0.
        last: Its last one.
        kl: By arm, mean KL(teacher || arm) at T = 1 over the supervised tokens there, in nats.
        count: Such tokens.
    """

    first: int
    last: int
    kl: dict[str, float]
    count: int


@dataclass(frozen=True)
class Behaviour:
    """How the student answers the evaluation rows beside its teacher.

    Attributes:
        classes: Names, in the student's order.
        agreement: `[C][C]` rows by the teacher's class (first) and the student's (second); None with more
            than `MOST_CLASSES` classes.
        kl_by_class: Mean KL(teacher || student) over the rows that the teacher gives to a class, in nats.
        calibration: By arm; empty without labels.
        differences: The rows of the largest KL, largest first.
    """

    classes: list[str]
    agreement: list[list[int]] | None
    kl_by_class: dict[str, float]
    calibration: dict[str, Calibration] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


def describe_behaviour(
    logits: Mapping[str, Any],
    labels: Any | None,
    *,
    classes: Sequence[str],
    texts: Mapping[int, str] | None = None,
) -> Behaviour:
    """Compare the arms' answers.

    Args:
        logits: `[N, C]` by arm, classes in one order; "teacher" and "student" are needed.
        labels: `[N]` class numbers, negative for no label, or None.
        classes: The name of each class.
        texts: Inputs of rows, by number, to show beside the differences.

    Raises:
        ValueError: If the arms have different shapes or the names don't fit.
    """
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in logits.items()}
    shapes = {name: value.shape for name, value in arrays.items()}
    if len(set(shapes.values())) != 1 or arrays["teacher"].ndim != 2:
        raise ValueError(f"logits of the arms have the shapes {shapes}; give [N, C] of the same rows to each")
    if len(classes) != arrays["teacher"].shape[1]:
        raise ValueError(f"{len(classes)} class names for {arrays['teacher'].shape[1]} classes")
    log_probs = {name: _log_softmax(value) for name, value in arrays.items()}
    log_p, log_q = log_probs["teacher"], log_probs["student"]
    kl = _kl(log_p, log_q)
    ours, theirs = log_q.argmax(1), log_p.argmax(1)
    known = None if labels is None else np.asarray(labels).astype(np.int64)
    matrix = None
    if len(classes) <= MOST_CLASSES:
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(counts, (theirs, ours), 1)
        matrix = counts.tolist()
    return Behaviour(
        classes=list(classes),
        agreement=matrix,
        kl_by_class={
            name: float(kl[theirs == i].mean()) for i, name in enumerate(classes) if (theirs == i).any()
        },
        calibration={}
        if known is None or not (known >= 0).any()
        else {name: calibration(value, known) for name, value in log_probs.items()},
        differences=[
            Difference(
                row=int(i),
                kl=float(kl[i]),
                teacher=_answer(classes, log_p[i]),
                student=_answer(classes, log_q[i]),
                label=None if known is None or known[i] < 0 else classes[known[i]],
                text=(texts or {}).get(int(i)),
            )
            for i in np.argsort(-kl, kind="stable")[:_DIFFERENCES]
        ],
    )


def most_different(teacher: Any, student: Any) -> list[int]:
    """Numbers of the rows that `describe_behaviour` will show, from logits `[N, C]`."""
    kl = _kl(*(_log_softmax(np.asarray(x, dtype=np.float64)) for x in (teacher, student)))
    return [int(i) for i in np.argsort(-kl, kind="stable")[:_DIFFERENCES]]


def calibration(log_probs: np.ndarray, labels: np.ndarray) -> Calibration:
    """Calibration of log-probabilities `[N, C]` for labels `[N]`; rows with a negative one are left out."""
    log_probs, labels = log_probs[labels >= 0], labels[labels >= 0]
    confidence = np.exp(log_probs.max(1))
    right = log_probs.argmax(1) == labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    used = [i for i in range(_BINS) if (bins == i).any()]
    said = [float(confidence[bins == i].mean()) for i in used]
    true = [float(right[bins == i].mean()) for i in used]
    count = [int((bins == i).sum()) for i in used]
    ece = sum(n * abs(a - c) for n, a, c in zip(count, true, said, strict=True)) / max(1, len(labels))
    return Calibration(confidence=said, accuracy=true, count=count, ece=float(ece))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """`[N]` in nats; a class without teacher mass adds nothing."""
    p = np.exp(log_p)
    difference = np.where(p > 0, log_q - np.where(p > 0, log_p, 0.0), 0.0)
    return np.maximum((p * -difference).sum(1), 0.0)


def _answer(classes: Sequence[str], log_probs: np.ndarray) -> str:
    top = int(log_probs.argmax())
    return f"{classes[top]} ({100 * np.exp(log_probs[top]):.0f} %)"
