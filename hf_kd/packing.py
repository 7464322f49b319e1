"""Several texts in one row, without padding: `position_ids` that start anew with each, and no attention mask.

Transformers' attention then keeps the texts apart, where the implementation can; whether a model does is seen
by asking it about a text alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .answers import answer, logits_of
from .findings import Report
from .tasks import Batch
from .teachers.cache.asking import apart
from .teachers.ensemble import Ensemble
from .teachers.models import ModelTeacher
from .teachers.selves import AdaptersOffTeacher

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

# Where texts begin and how long they are, for attention that wants to be told; says nothing of a part.
_OF_THE_WHOLE = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def second_text(batch: Batch) -> tuple[int, int, int] | None:
    """Row, start and end of the first text that is packed behind another; None where there is none."""
    ids, positions = batch.get("input_ids"), batch.get("position_ids")
    if ids is None or positions is None or positions.shape != ids.shape or ids.ndim != 2:
        return None
    mask = batch.get("attention_mask")
    for row, numbers in enumerate(positions):
        begins = numbers[1:] == 0
        if mask is not None and mask.shape == ids.shape:
            begins = begins & (mask[row, 1:] != 0) & (mask[row, :-1] != 0)
        starts = (begins.nonzero().flatten() + 1).tolist()
        if starts:
            return row, starts[0], starts[1] if len(starts) > 1 else len(numbers)
    return None


@torch.no_grad()
def check_packing(trainer: DistillationTrainer, batch: dict[str, Any], report: Report) -> None:
    """Note if student or teacher lets packed texts see each other."""
    found = second_text(batch)
    if found is None or trainer.task.name not in ("causal-lm", "masked-lm", "token-classification"):
        return
    row, start, stop = found
    length = batch["input_ids"].shape[1]
    alone = {
        name: value[row : row + 1, start:stop]
        if isinstance(value, Tensor) and value.shape[:2] == batch["input_ids"].shape
        else value
        for name, value in batch.items()
        if name not in _OF_THE_WHOLE
    }

    def student(one: dict[str, Any]) -> Tensor:
        pair = trainer.pair
        return pair.positions(trainer.student(**pair.student_inputs(pair.inputs(one))), one)

    def teacher(one: dict[str, Any]) -> Tensor:
        assert trainer.teacher is not None
        said: Any = answer(trainer.teacher(trainer.pair.inputs(one)), trainer.task, one)
        return logits_of(said)

    asked = {"model": student}
    # A cache and a server are asked about each text of a packed row by itself.
    if trainer.distils and isinstance(trainer.teacher, ModelTeacher | Ensemble | AdaptersOffTeacher):
        asked["teacher"] = teacher
    training = trainer.student.training
    trainer.student.eval()
    try:
        answers = {
            name: (ask(batch)[row * length + start : row * length + stop], ask(alone))
            for name, ask in asked.items()
        }
    finally:
        trainer.student.train(training)
    for name, (packed, single) in answers.items():
        far = apart(packed, single)
        if far is not None:
            masked = " Leave attention_mask out of the batch." if "attention_mask" in batch else ""
            report.add(
                name,
                f"{'the student' if name == 'model' else 'the teacher'} lets texts that are packed into one "
                f"row see each other: its answer for the one at position {start} of row {row} is {far:.2g} "
                f"standard deviations from its answer for the same text alone.{masked} Load it with "
                "attn_implementation='sdpa', 'eager' or a flash attention that reads position_ids, or don't "
                "pack.",
            )
