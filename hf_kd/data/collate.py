"""Rows to batches: what has a length is filled up, what has not is stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

_IGNORE = -100
# What fills up a column that is not filled with zeros.
_FILL = {"labels": _IGNORE, "special_tokens_mask": 1}


class PaddingCollator:
    """Fill rows up to the longest of the batch, each column with what stands for nothing in it.

    `input_ids` get the padding token and `attention_mask` says so; columns with the prefix `teacher_` get
    that of the teacher's tokenizer.
    """

    def __init__(
        self, processor: Any = None, teacher_processor: Any = None, *, labels_right: bool = False
    ) -> None:
        """Take padding ids and sides from the tokenizers.

        Args:
            processor: The student's.
            teacher_processor: The teacher's, if its columns have the prefix.
            labels_right: Fill labels up on the right whatever the side of the inputs: a decoder's own tokens.
        """
        self.processor = processor
        self.teacher_processor = teacher_processor
        self.labels_right = labels_right

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch of tensors from rows with the same columns."""
        batch = {name: self._column(name, [row[name] for row in features]) for name in features[0]}
        for prefix in ("", "teacher_"):
            ids, mask = f"{prefix}input_ids", f"{prefix}attention_mask"
            if ids in batch and mask not in batch:
                lengths = [[1] * len(row[ids]) for row in features]
                batch[mask] = self._column(mask, lengths)
        return batch

    def _column(self, name: str, values: list[Any]) -> Tensor:
        if np.ndim(values[0]) == 0:
            return torch.as_tensor(np.asarray(values))
        arrays = [np.asarray(value) for value in values]
        lengths = {len(array) for array in arrays}
        if len(lengths) == 1:
            return torch.as_tensor(np.stack(arrays))
        longest, first = max(lengths), arrays[0]
        filled = np.full((len(arrays), longest, *first.shape[1:]), self._fill(name), dtype=first.dtype)
        left = self._is_left(name)
        for row, array in zip(filled, arrays, strict=True):
            row[longest - len(array) if left else 0 :][: len(array)] = array
        return torch.as_tensor(filled)

    def _owner(self, name: str) -> Any:
        return self.teacher_processor if name.startswith("teacher_") else self.processor

    def _fill(self, name: str) -> int:
        base = name.removeprefix("teacher_")
        if base == "input_ids":
            return getattr(self._owner(name), "pad_token_id", None) or 0
        if base == "token_type_ids":
            return getattr(self._owner(name), "pad_token_type_id", 0)
        return _FILL.get(base, 0)

    def _is_left(self, name: str) -> bool:
        own_side = self.labels_right and name in ("labels", "decoder_input_ids", "decoder_attention_mask")
        return not own_side and getattr(self._owner(name), "padding_side", "right") == "left"


class CausalCollator(PaddingCollator):
    """Rows of a causal model: every token is a label, padding is not, even where it is the end token."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch with `labels`, which models shift by one themselves."""
        batch = super().__call__(features)
        if "labels" not in batch:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, _IGNORE)
        return batch


class MaskingCollator(PaddingCollator):
    """Rows of a masked model: those without labels are masked anew, those that are masked already stay so."""

    def __init__(self, processor: Any, mlm_probability: float) -> None:
        """Take the mask token from the tokenizer."""
        super().__init__(processor)
        self.masking = DataCollatorForLanguageModeling(processor, mlm=True, mlm_probability=mlm_probability)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch with `labels`: -100 but where a token was masked."""
        batch = super().__call__(features)
        special = batch.pop("special_tokens_mask", None)
        if "labels" not in batch:
            batch["input_ids"], batch["labels"] = self.masking.torch_mask_tokens(
                batch["input_ids"], special_tokens_mask=special
            )
        return batch
