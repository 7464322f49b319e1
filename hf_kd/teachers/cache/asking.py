"""Asking a teacher for what a cache stores of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...losses.heads import UnsupportedHead, find_head, head_inputs
from ...losses.tiles import HiddenTeacher
from ..models import ModelTeacher
from ..signal import Teacher, TeacherSignal
from .keys import Piece
from .record import positions_of, records
from .store import CacheError, Manifest

# How far a text's answer in a packed row may be from its answer alone, in standard deviations of the answer:
# rounding in another order, and no more.
_APART = {torch.float64: 1e-6, torch.float32: 1e-3}
_APART_HALF = 0.1


def ask(teacher: Teacher, batch: Mapping[str, Any], fidelity: str) -> TeacherSignal:
    """A teacher's answer with what a fidelity stores: hidden states where it has a head, else logits.

    Raises:
        CacheError: If the fidelity is "hidden" and the teacher has no output layer that is known.
    """
    if fidelity == "logits" or not isinstance(teacher, ModelTeacher):
        return teacher(batch)
    try:
        one = {k: v[:1] if isinstance(v, Tensor) and v.ndim > 0 else v for k, v in batch.items()}
        spec = find_head(teacher.model, teacher.inputs(one))
    except UnsupportedHead as error:
        if fidelity == "hidden":
            raise CacheError(
                f"fidelity='hidden' is not possible: {error} Choose 'logits' or 'sparse'."
            ) from error
        return teacher(batch)
    with head_inputs(spec) as captured:
        teacher(batch)
    return TeacherSignal(hidden=HiddenTeacher(*captured[-1]))


@dataclass(frozen=True)
class Answered:
    """A teacher's answer, and the inputs that it was asked about.

    Attributes:
        batch: What it was asked.
        mask: `[B, L]` which positions of that exist; None for heads with one answer a row.
        wanted: Inputs of it.
        signal: What it said.
    """

    batch: Mapping[str, Any]
    mask: Tensor | None
    wanted: Sequence[Piece]
    signal: TeacherSignal

    def records(self, manifest: Manifest) -> list[dict[str, np.ndarray]]:
        """What is stored of each input; see `record.records`."""
        return records(self.signal, self.mask, manifest, self.wanted)


def ask_about(
    teacher: Teacher, batch: Mapping[str, Any], mask: Tensor | None, fidelity: str, wanted: Sequence[Piece]
) -> Answered:
    """Ask for what is stored of some inputs of a batch.

    A model is asked about the whole batch, so that what is stored doesn't depend on what is known already;
    others, whose answers may cost money, only about the rows that are wanted.
    """
    rows = sorted({piece.row for piece in wanted})
    count = next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim > 0)
    if not isinstance(teacher, ModelTeacher) and len(rows) < count:
        index = torch.tensor(rows)
        batch = {
            k: v[index.to(v.device)] if isinstance(v, Tensor) and v.ndim > 0 and len(v) == count else v
            for k, v in batch.items()
        }
        mask = None if mask is None else mask[index.to(mask.device)]
        wanted = [replace(piece, row=rows.index(piece.row)) for piece in wanted]
    return Answered(batch, mask, list(wanted), ask(teacher, batch, fidelity))


def apart(one: Tensor, other: Tensor) -> float | None:
    """How far two answers about a text are, in standard deviations; None if it is rounding."""
    limit = _APART.get(one.dtype, _APART_HALF)
    one, other = one.double(), other.double()
    worst = float((one - other).abs().max() / other.std().clamp_min(1e-12))
    return None if worst <= limit else worst


def refuse_crossing(teacher: Teacher, given: Answered) -> bool:
    """Ask about a packed text alone: its answer must be the one that it has behind another.

    Returns:
        Whether there was such a text to be asked about.

    Raises:
        CacheError: If it isn't: this teacher lets packed texts see each other.
    """
    batch, mask, signal = given.batch, given.mask, given.signal
    piece = next((p for p in given.wanted if p.packed and p.start > 0), None)
    if piece is None or mask is None or signal.sparse is not None:
        return False
    places = piece.positions(mask)
    alone = {
        k: v[piece.row : piece.row + 1, places.to(v.device)]
        if isinstance(v, Tensor) and v.shape[:2] == mask.shape
        else v
        for k, v in batch.items()
    }
    packed = signal.hidden.hidden if signal.hidden is not None else next(iter(signal.dense().values()))
    again = ask(teacher, alone, "logits" if signal.hidden is None else "hidden")
    single = again.hidden.hidden if again.hidden is not None else next(iter(again.dense().values()))
    worst = apart(positions_of(packed, mask, piece), single[0])
    if worst is not None:
        raise CacheError(
            "a text that is packed behind another (position_ids start anew, no attention_mask) has another "
            f"answer than alone (by {worst:.2g} standard deviations): this teacher lets packed texts see "
            "each other, so what it says of one can't be found in another packing. Load it with "
            "attn_implementation='sdpa' or a flash attention that reads position_ids, or don't pack."
        )
    return True
