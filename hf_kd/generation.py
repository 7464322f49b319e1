"""Text that the student generates during evaluation, for metrics of generated text (ROUGE, BLEU, WER)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def generate(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Tensor:
    """Generate from a batch whose labels and decoder inputs are left out, so that nothing is given away.

    Args:
        model: The unwrapped student.
        inputs: Its own columns.
        **options: For `model.generate`; those that are None are left to the model's generation config.

    Returns:
        `[B, L]` token ids; rows that end early are filled with the padding token.
    """
    make: Any = getattr(model, "generate", None)
    if make is None:
        raise ValueError(
            f"predict_with_generate=True needs a model that generates, but {type(model).__name__} does "
            "not; set it to "
            "False."
        )
    hidden = ("labels", "decoder_input_ids", "decoder_attention_mask")
    given = {k: v for k, v in inputs.items() if k not in hidden}
    return make(**given, **{k: v for k, v in options.items() if v is not None})


def pad_to(tokens: Tensor, length: int, pad: int) -> Tensor:
    """Fill `[B, L]` tokens on the right up to a length; longer ones stay as they are."""
    return F.pad(tokens, (0, max(length - tokens.shape[1], 0)), value=pad)
