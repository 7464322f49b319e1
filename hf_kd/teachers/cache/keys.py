"""What a teacher sees of each row, without padding, and the hash that a row is found by.

Keys are made of content, so shuffling, another batch size, subsets, several epochs and duplicated rows change
nothing: the same input has the same key wherever it stands.

A row of several texts is as many inputs where its texts don't see each other: `position_ids` that start anew
and no attention mask, which is how Transformers marks them (padding-free batches). A text then has the key
that it has in a row of its own. Elsewhere a token's answer depends on the texts before it, and the whole row
is one input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...tasks.text import DECODED
from ..models import TEACHER_PREFIX
from .store import CacheError

KEY_BYTES = 16
# What says where padding is, or how to compute, and not what there is to see.
_NOT_CONTENT = ("attention_mask", "decoder_attention_mask", "labels", "use_cache", "return_dict")
#: The mask that goes with positions of each side of a model, and the column that they are the positions of.
SIDES = {"decoder_input_ids": "decoder_attention_mask", "input_ids": "attention_mask"}


def teacher_view(
    batch: Mapping[str, Any], columns: Sequence[str], tokens: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of a batch that a teacher with these arguments reads; its own `teacher_` columns win.

    Args:
        batch: What both models read.
        columns: The teacher's arguments.
        tokens: The teacher's id of each of the student's tokens, where the student has not all of them.
    """
    found = {name: batch.get(TEACHER_PREFIX + name, batch.get(name)) for name in columns}
    for name in SIDES:
        ids = found.get(name)
        if tokens is not None and isinstance(ids, Tensor) and TEACHER_PREFIX + name not in batch:
            found[name] = tokens.to(ids.device)[ids]
    if DECODED in batch and found.get("decoder_attention_mask") is None:
        found["decoder_attention_mask"] = batch[DECODED]
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and value.ndim > 0}


def present(view: Mapping[str, Tensor], pad: int | None = None) -> Tensor | None:
    """Which positions of the teacher's output exist, `[B, L]`; None where a row has no positions of its own.

    Positions are those of the decoder where there is one. A decoder without a mask ends with its last token
    that isn't padding; the first, which may be the padding token (T5), always exists.
    """
    for name, mask in SIDES.items():
        if name not in view:
            continue
        if mask in view:
            if view[mask].shape != view[name].shape:
                raise CacheError(
                    f"{mask} has the shape {tuple(view[mask].shape)} and {name} {tuple(view[name].shape)}: a "
                    "mask of who sees whom is not cached. For texts that don't see each other give "
                    "position_ids that start anew with each, and no mask."
                )
            return view[mask] != 0
        ids = view[name]
        if name == "input_ids" or pad is None:
            return torch.ones_like(ids, dtype=torch.bool)
        real = ids != pad
        real[:, 0] = True
        return real.flip(-1).int().cummax(-1).values.flip(-1).bool()
    return None


@dataclass(frozen=True)
class Piece:
    """One input of a batch: a row, or one of the texts that are packed into it.

    Attributes:
        key: Hash of what the teacher sees of it.
        row: Where it is.
        start: Its first position among those of the row that exist.
        stop: The one after its last; None: to the end.
    """

    key: bytes
    row: int
    start: int = 0
    stop: int | None = None

    @property
    def packed(self) -> bool:
        """Whether it shares its row with others."""
        return self.stop is not None

    def positions(self, mask: Tensor) -> Tensor:
        """Its positions in the row, where the mask `[B, L]` says which exist."""
        return mask[self.row].nonzero().squeeze(-1)[self.start : self.stop]


def row_keys(view: Mapping[str, Tensor], pad: int | None = None) -> list[bytes]:
    """The keys of a batch's inputs, in order."""
    return [piece.key for piece in pieces(view, pad)]


def pieces(view: Mapping[str, Tensor], pad: int | None = None, *, whole: bool = False) -> list[Piece]:
    """The inputs of a batch, row after row, each with its key.

    A key is a hash of the names, types, shapes and unpadded values that the teacher sees. Positions that
    count from 0 are what a model assumes anyway, and are no part of it.

    Args:
        view: What the teacher reads.
        pad: The padding token of a decoder without a mask.
        whole: Take rows as they are, also where several texts are in them.

    Raises:
        CacheError: If an attention mask has another shape than the tokens.
    """
    rows = len(next(iter(view.values())))
    masks = {
        side: present({k: v for k, v in view.items() if k in (side, mask)}, pad)
        for side, mask in SIDES.items()
        if side in view
    }
    if "input_ids" not in view and "attention_mask" in view:  # sound
        masks["input_ids"] = view["attention_mask"] != 0
    if "position_ids" in view and len(view["position_ids"]) == 1 < rows:
        # One row of positions for all of them.
        view = {**view, "position_ids": view["position_ids"].expand(rows, *view["position_ids"].shape[1:])}
    ranges = [[(0, None)] for _ in range(rows)] if whole else [_texts(view, i) for i in range(rows)]
    spans = [(i, start, stop) for i in range(rows) for start, stop in ranges[i]]
    digests = [hashlib.blake2b(digest_size=KEY_BYTES) for _ in spans]
    for name in sorted(view):
        if name in _NOT_CONTENT:
            continue
        values = view[name].detach().cpu()
        mask = _mask_of(name, values, masks)
        if values.is_floating_point():
            values = values.float()
        array = values.numpy()
        for digest, (i, start, stop) in zip(digests, spans, strict=True):
            part = array[i] if mask is None else array[i][mask[i]][start:stop]
            part = part.astype(np.int64) if part.dtype.kind in "iub" else part
            if name == "position_ids" and part.ndim == 1 and np.array_equal(part, np.arange(len(part))):
                continue
            digest.update(f"{name}:{part.dtype}:{part.shape};".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
    return [Piece(d.digest(), *span) for d, span in zip(digests, spans, strict=True)]


def once(found: Iterable[Piece]) -> list[Piece]:
    """The first of each key, in order."""
    first: dict[bytes, Piece] = {}
    for piece in found:
        first.setdefault(piece.key, piece)
    return list(first.values())


def _texts(view: Mapping[str, Tensor], row: int) -> list[tuple[int, int | None]]:
    """Where the texts of a row begin and end; one from start to end if they are read as one."""
    ids, positions = view.get("input_ids"), view.get("position_ids")
    if ids is None or positions is None or positions.shape != ids.shape or ids.ndim != 2:
        return [(0, None)]
    if "attention_mask" in view or "decoder_input_ids" in view:
        return [(0, None)]
    numbers = positions[row].cpu()
    starts = (numbers.diff(prepend=numbers[:1] - 1) != 1).nonzero().squeeze(-1).tolist()
    if not starts or int(numbers[0]) != 0 or any(int(numbers[s]) != 0 for s in starts):
        return [(0, None)]
    return list(zip([0, *starts], [*starts, len(numbers)], strict=True))


def _mask_of(name: str, values: Tensor, masks: Mapping[str, Tensor | None]) -> np.ndarray | None:
    """The padding of a column: that of its side, where it has one value per position."""
    side = "decoder_input_ids" if name.startswith("decoder_") else "input_ids"
    mask = masks.get(side)
    if mask is None or values.ndim < 2 or values.shape[:2] != mask.shape:
        return None
    return mask.cpu().numpy()
