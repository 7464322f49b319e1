"""A teacher's signal as positions: whatever its fidelity, `[P, ...]` in the order of the student's logits.

Here is the one place where fidelities are told apart: dense logits stay logits, hidden states wait for the
positions that count before they become logits, sparse entries stay entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .losses.projected import head_logits
from .losses.tiles import HiddenTeacher
from .tasks import Batch, SequenceClassification, Task
from .tasks.base import take
from .teachers.signal import SparseSignal, TeacherSignal


@dataclass(frozen=True)
class Exits:
    """What layers of the student say, each of the same positions: here the student is the teacher.

    Attributes:
        said: `[P, C]` logits each, or hidden states with the head (`fusing.HiddenStudent`), with gradient.
    """

    said: tuple[Any, ...]


#: `[P, C]` logits, `[P, H]` hidden states with their head, `[P, n]` entries, or the student's own exits.
Answer = Tensor | HiddenTeacher | SparseSignal | Exits


def answer(signal: TeacherSignal, task: Task, batch: Batch) -> Answer:
    """The best fidelity of a signal, one row per position of the task.

    Raises:
        ValueError: If the head can't be read from this fidelity; names both.
    """
    if signal.logits:
        return task.teacher_positions(task.flat(signal.logits, batch), batch)
    obstacle = fidelity_obstacle(signal.fidelity, task)
    if obstacle is not None:
        raise ValueError(obstacle)
    if signal.hidden is not None:
        hidden = signal.hidden.hidden
        if _row_by_row(task):
            flat = hidden.reshape(-1, hidden.shape[-1])
            return replace(signal.hidden, hidden=task.teacher_positions(flat, batch))
        return task.flat({task.logits[0]: head_logits(signal.hidden).movedim(-1, task.class_axis)}, batch)
    assert signal.sparse is not None
    return signal.sparse.flat().map(lambda values: task.teacher_positions(values, batch))


def fidelity_obstacle(fidelity: str, task: Task) -> str | None:
    """Why a head can't be distilled from signals of a fidelity; None if it can."""
    if fidelity == "logits":
        return None
    if task.kind == "vectors" or len(task.logits) != 1:
        return (
            f"The teacher's signal is {fidelity!r}, but task {task.name!r} reads the outputs "
            f"{list(task.logits)}, which are no softmax over the output of one layer. Use a teacher that "
            "gives logits."
        )
    if fidelity == "hidden":
        return None
    single = isinstance(task, SequenceClassification) and task.problem_type == "single"
    if task.kind == "classes" and (single or _row_by_row(task)):
        return None
    return (
        f"The teacher's signal is 'sparse', a few classes of a softmax, but a position of task {task.name!r} "
        "is something else (several labels, numbers, resized maps, or rows of the batch). Use a teacher that "
        "gives logits."
    )


def _row_by_row(task: Task) -> bool:
    """Whether the head's positions are its outputs' rows as they come."""
    return type(task).flat is Task.flat and task.class_axis == -1


def count(answer: Answer) -> int:
    """The number of positions P."""
    if isinstance(answer, Exits):
        return len(answer.said[0])
    if isinstance(answer, SparseSignal):
        return len(answer.ids)
    return len(answer.hidden if isinstance(answer, HiddenTeacher) else answer)


def pick(answer: Answer, index: Tensor | None) -> Answer:
    """The selected positions; all of them, without a copy, where the index is None."""
    if isinstance(answer, Tensor):
        return take(answer, index)
    if index is None:
        return answer
    if isinstance(answer, Exits):
        return Exits(tuple(take(one, index) for one in answer.said))
    if isinstance(answer, HiddenTeacher):
        return replace(answer, hidden=take(answer.hidden, index))
    return answer.select(index)


def logits_of(answer: Tensor | HiddenTeacher | Exits) -> Tensor:
    """`[P, C]` logits, made from hidden states where there are none yet."""
    assert not isinstance(answer, Exits)  # taken one by one
    return answer if isinstance(answer, Tensor) else head_logits(answer)
