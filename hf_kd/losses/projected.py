"""Logits from hidden states and a head, for what needs whole rows of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import HiddenTeacher, Projection

# Classes projected at a time: what is upcast of a head in half precision stays small.
_CLASSES = 8192


@torch.no_grad()
def head_logits(teacher: HiddenTeacher) -> Tensor:
    """What the head makes of its input, scale, bias and soft-cap included.

    Args:
        teacher: `[..., H]` hidden states and a head of C classes, of any dtype.

    Returns:
        `[..., C]` logits before any temperature, in fp32 (fp64 for fp64 hidden states), without gradient.

    Raises:
        ValueError: If the hidden states have another width than the head.
    """
    hidden, head = teacher.hidden, teacher.head
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"The teacher's hidden states have {hidden.shape[-1]} columns, its head {head.weight.shape[1]}; "
            "give the head's input."
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    projection = Projection(head, 1.0, dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = torch.empty(len(flat), head.classes, dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        scaled = flat.to(dtype) * projection.factor
        for start in range(0, head.classes, _CLASSES):
            stop = min(start + _CLASSES, head.classes)
            projection.tile(scaled, start, stop, out[:, start:stop])
    return out.view(*hidden.shape[:-1], head.classes)
