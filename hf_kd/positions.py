"""Which positions inside a model count in a comparison of layers, and how much.

Each row weighs what it weighs in the distillation term, so the terms share one count per optimizer step:

- Where the head has a prediction per position of the layer (tokens, frames), a position has that weight:
  what is not supervised does not count.
- Where it has one per row, or the layer belongs to an encoder before the decoder that predicts, a row's
  weight is spread evenly over the positions that exist (those that are not padding).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layer_maps import LayerStack
from .tasks import Batch, Supervision, Task


def positions_of(
    stack: LayerStack,
    model: nn.Module,
    shape: tuple[int, int],
    *,
    batch: Batch,
    supervision: Supervision,
    task: Task,
) -> tuple[Tensor, Tensor]:
    """Weights of a layer's positions, and which of them exist.

    Args:
        stack: The layers.
        model: Their model, for its map from input lengths to numbers of frames.
        shape: `(B, L)` of the layer's output; B may be a multiple of the rows (choices).
        batch: The batch, with its masks.
        supervision: What counts in it.
        task: The head.

    Returns:
        `[B, L]` weights that add up to the weight of the distillation term, and `[B, L]` bool.

    Raises:
        ValueError: If the positions can't be told from the masks.
    """
    rows, length = shape
    if rows % supervision.rows:
        raise ValueError(
            f"{stack.path} has an output of {rows} rows for a batch of {supervision.rows}, so it is not "
            "known which belongs to which. Choose layers of another stack with layer_map, by name."
        )
    exists = _existing(stack, model, shape, batch)
    weight = supervision.kd_weight.reshape(supervision.rows, -1)
    if not (task.per_row or stack.inner):
        if weight.shape == exists.shape and length > 1:
            return weight, exists
        if task.mask is not None:
            raise ValueError(
                f"{stack.path} has {length} positions a row, but task {task.name!r} supervises "
                f"{weight.shape[1]}: which of them correspond is not known (prompt tuning adds positions, "
                "for example). Set the weights of the losses on layers to 0."
            )
    per_row = weight.sum(1).repeat_interleave(rows // supervision.rows) / (rows // supervision.rows)
    return (per_row / exists.sum(1).clamp_min(1)).unsqueeze(1) * exists, exists


def _existing(stack: LayerStack, model: nn.Module, shape: tuple[int, int], batch: Batch) -> Tensor:
    """`[B, L]` bool: positions that are not padding."""
    rows, length = shape
    mask = batch.get("decoder_attention_mask" if stack.role == "decoder" else "attention_mask")
    if mask is None or "vision" in stack.role or mask.ndim > 3:
        device = next(v.device for v in batch.values() if isinstance(v, Tensor))
        return torch.ones(shape, dtype=torch.bool, device=device)
    mask = mask.reshape(-1, mask.shape[-1])
    if mask.shape == shape:
        return mask != 0
    frames: Any = getattr(model, "_get_feature_vector_attention_mask", None)
    if frames is not None and len(mask) == rows:
        return frames(length, mask) != 0
    if len(mask) == rows and mask.shape[1] % length == 0:
        return mask[:, :: mask.shape[1] // length] != 0
    raise ValueError(
        f"{stack.path} has {rows} rows of {length} positions, but the attention mask is "
        f"{list(mask.shape)}: which positions are padding is not known. Set the weights of the losses on "
        "layers to 0."
    )
