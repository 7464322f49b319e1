"""Texts for a student and a teacher with unlike tokenizers: each its own tokens, and where they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .collate import CausalCollator

# What `text_ends` of a token without text is: special tokens, padding.
_NOWHERE = -1


def encode_texts(
    texts: Sequence[str], tokenizer: Any, teacher_tokenizer: Any, *, max_length: int
) -> dict[str, list[list[int]]]:
    """Columns of a causal language model that learns from a teacher with another tokenizer.

    After the tokens `text_ends[i]` is the number of characters of the text that a model has read at token i.
    Where both have read the same, their predictions are about the same continuation, and can be compared by
    `divergence="uld"`. Use it with `Dataset.map`, and `UnlikeCollator` to make batches.

    Args:
        texts: The texts, each a row.
        tokenizer: The student's; a fast one, since slow ones don't know where a token is in the text.
        teacher_tokenizer: The teacher's, likewise.
        max_length: Tokens that either's row is cut to.

    Returns:
        `input_ids`, `attention_mask`, `text_ends`, and the same with the prefix `teacher_`.

    Raises:
        ValueError: If a tokenizer isn't a fast one.

    Example:
        >>> columns = dataset.map(
        ...     lambda batch: encode_texts(batch["text"], tokenizer, teacher_tokenizer, max_length=256),
        ...     batched=True, remove_columns=dataset.column_names,
        ... )  # doctest: +SKIP
    """
    columns: dict[str, list[list[int]]] = {}
    for prefix, own in (("", tokenizer), ("teacher_", teacher_tokenizer)):
        if not getattr(own, "is_fast", False):
            raise ValueError(
                f"{prefix}tokenizer: {type(own).__name__} doesn't say where in the text its tokens are; take "
                "a fast tokenizer (use_fast=True)."
            )
        made = own(
            list(texts),
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        columns[f"{prefix}input_ids"] = made["input_ids"]
        columns[f"{prefix}attention_mask"] = made["attention_mask"]
        columns[f"{prefix}text_ends"] = [
            [_NOWHERE if odd else end for (_, end), odd in zip(offsets, special, strict=True)]
            for offsets, special in zip(made["offset_mapping"], made["special_tokens_mask"], strict=True)
        ]
    return columns


class UnlikeCollator(CausalCollator):
    """Batches of `encode_texts`' columns, with labels; each tokenizer's padding on its own side.

    Args:
        tokenizer: The student's.
        teacher_tokenizer: The teacher's.
    """

    def __init__(self, tokenizer: Any, teacher_tokenizer: Any) -> None:
        """Take padding ids and sides from the tokenizers."""
        super().__init__(tokenizer, teacher_tokenizer)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch in which padding ends nowhere in the text."""
        batch = super().__call__(features)
        for prefix in ("", "teacher_"):
            ends = batch[f"{prefix}text_ends"]
            batch[f"{prefix}text_ends"] = ends.masked_fill(batch[f"{prefix}attention_mask"] == 0, _NOWHERE)
        return batch
