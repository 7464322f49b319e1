"""What a teacher sees of each row, without padding, and the hash that a row is found by.

Keys are made of content, so shuffling, another batch size, subsets, several epochs and duplicated rows change
nothing: the same input has the same key wherever it stands. A packed row is one input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...tasks.text import DECODED
from ..models import TEACHER_PREFIX

KEY_BYTES = 16
# What says where padding is, or how to compute, and not what there is to see.
_NOT_CONTENT = ("attention_mask", "decoder_attention_mask", "labels", "use_cache", "return_dict")
#: The mask that goes with positions of each side of a model, and the column that they are the positions of.
SIDES = {"decoder_input_ids": "decoder_attention_mask", "input_ids": "attention_mask"}


def teacher_view(batch: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a batch that a teacher with these arguments reads; its own `teacher_` columns win."""
    found = {name: batch.get(TEACHER_PREFIX + name, batch.get(name)) for name in columns}
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
            return view[mask] != 0
        ids = view[name]
        if name == "input_ids" or pad is None:
            return torch.ones_like(ids, dtype=torch.bool)
        real = ids != pad
        real[:, 0] = True
        return real.flip(-1).int().cummax(-1).values.flip(-1).bool()
    return None


def row_keys(view: Mapping[str, Tensor], pad: int | None = None) -> list[bytes]:
    """A key for each row: a hash of the names, types, shapes and unpadded values that the teacher sees."""
    rows = len(next(iter(view.values())))
    digests = [hashlib.blake2b(digest_size=KEY_BYTES) for _ in range(rows)]
    masks = {
        side: present({k: v for k, v in view.items() if k in (side, mask)}, pad)
        for side, mask in SIDES.items()
        if side in view
    }
    if "input_ids" not in view and "attention_mask" in view:  # sound
        masks["input_ids"] = view["attention_mask"] != 0
    for name in sorted(view):
        if name in _NOT_CONTENT:
            continue
        values = view[name].detach().cpu()
        mask = _mask_of(name, values, masks)
        if values.is_floating_point():
            values = values.float()
        array = values.numpy()
        for i, digest in enumerate(digests):
            row = array[i] if mask is None else array[i][mask[i]]
            row = row.astype(np.int64) if row.dtype.kind in "iub" else row
            digest.update(f"{name}:{row.dtype}:{row.shape};".encode())
            digest.update(np.ascontiguousarray(row).tobytes())
    return [digest.digest() for digest in digests]


def _mask_of(name: str, values: Tensor, masks: Mapping[str, Tensor | None]) -> np.ndarray | None:
    """The padding of a column: that of its side, where it has one value per position."""
    side = "decoder_input_ids" if name.startswith("decoder_") else "input_ids"
    mask = masks.get(side)
    if mask is None or values.ndim < 2 or values.shape[:2] != mask.shape:
        return None
    return mask.cpu().numpy()
