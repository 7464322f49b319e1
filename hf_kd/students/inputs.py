"""Inputs for a model that nobody gave any: of the right shapes, with random values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

# One second of sound, as most audio models sample it.
_SAMPLES = 16_000


def one_row(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first row of the first batch, or a made-up one of 128 tokens, an image, or a second of sound.

    Raises:
        ValueError: If there is no batch, and what the model reads is not known.
    """
    if not batches:
        return example_inputs(model)
    return {name: v[:1] if isinstance(v, Tensor) and v.ndim else v for name, v in batches[0].items()}


def example_inputs(
    model: PreTrainedModel, *, rows: int = 1, tokens: int = 128, samples: int = _SAMPLES
) -> dict[str, Tensor]:
    """Random inputs of the kind that a model reads.

    Args:
        model: Its config says how large an image is, and which ids there are.
        rows: How many.
        tokens: Length of text, at most.
        samples: Length of sound.

    Raises:
        ValueError: If what the model reads is not known.
    """
    config: Any = model.config
    g = torch.Generator().manual_seed(0)
    name = model.main_input_name
    ids = _ids(config, rows, tokens, g)
    found: dict[str, Tensor] = {}
    if name == "input_ids" and ids is not None:
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif name == "input_values":
        found = {"input_values": torch.randn(rows, samples, generator=g)}
    elif name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 500)
        found = {"input_features": torch.randn(rows, config.num_mel_bins, frames, generator=g)}
    # Models that compare text with images need both.
    if name == "pixel_values" or (found and hasattr(config, "logit_scale_init_value")):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None)
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            shape = rows, getattr(vision, "num_channels", 3), height, width
            found["pixel_values"] = torch.randn(shape, generator=g)
    if not found or (name == "pixel_values" and name not in found):
        raise ValueError(
            f"{type(model).__name__} reads {name}, of which no example is known: give calibration, a batch "
            "of its inputs"
        )
    if config.is_encoder_decoder and ids is not None:
        found["decoder_input_ids"] = ids
    return found


def _ids(config: PreTrainedConfig, rows: int, tokens: int, g: torch.Generator) -> Tensor | None:
    """Random tokens, none of them padding."""
    text: Any = config.get_text_config()
    size = getattr(text, "vocab_size", None)
    if size is None:
        return None
    # Some models count positions from behind their padding token.
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or tokens
    longest = min(longest, getattr(text, "max_target_positions", None) or longest)
    ids = torch.randint(0, size, (rows, max(2, min(tokens, longest - 4))), generator=g)
    pad = getattr(text, "pad_token_id", None)
    return ids if pad is None else torch.where(ids == pad, (ids + 1) % size, ids)
