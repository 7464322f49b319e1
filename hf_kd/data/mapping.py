"""Map a data set so that the result is found in the cache again, and how long a row may be."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Features, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from hf_kd.data.labels import Labels
from hf_kd.options import RunOptions

# Models whose positions start after the padding id, so that two fewer than they have can be used.
_OFFSET_POSITIONS = ("roberta", "camembert", "mpnet", "longformer", "esm", "data2vec-text")
_LONGEST_DEFAULT = 512


@dataclass(frozen=True)
class Context:
    """What the preparation of a task works with.

    Attributes:
        options: What was asked for.
        task: The task.
        processor: Tokenizer, image processor or feature extractor of the student.
        teacher_processor: The teacher's, where it makes something else of the same input; else None.
        config: The student's config.
        inputs: Columns that are read.
        label_column: Column of the labels, or None.
        labels: What they are, where they are classes or numbers.
    """

    options: RunOptions
    task: str
    processor: Any
    teacher_processor: Any
    config: Any
    inputs: list[str]
    label_column: str | None
    labels: Labels | None

    @property
    def key(self) -> str:
        """What decides the result, as text, besides the rows."""
        settings = [self.task, self.inputs, self.label_column, self.options.max_length, str(self.labels)]
        names = getattr(self.config, "id2label", None) if self.labels else None
        processors = [identity(self.processor), identity(self.teacher_processor)]
        return json.dumps(
            [settings, names, processors, length_limit(self.processor, self.config)], default=str
        )


def cached_map(
    rows: Any,
    function: Callable[[dict[str, list[Any]]], dict[str, Any]],
    context: Context,
    *,
    features: Features | None = None,
) -> Any:
    """Map batches of rows to new columns, dropping the old ones; those of a stream when they are read.

    The cache is keyed by the rows, the processors, the settings and the code. Hashing the function instead,
    as `datasets` does, hashes a tokenizer with its state, which its first use changes: nothing is found
    again.
    """
    if isinstance(rows, IterableDataset):
        return rows.map(function, batched=True, remove_columns=rows.column_names)
    code = inspect.getsource(sys.modules[function.__module__])
    return rows.map(
        function,
        batched=True,
        remove_columns=rows.column_names,
        features=features,
        try_original_type=False,  # `labels` made of a column `labels` are not of its type
        new_fingerprint=Hasher.hash([rows._fingerprint, function.__qualname__, code, context.key]),
        desc="preparing rows",
    )


def identity(processor: Any) -> str:
    """A text that changes with whatever a processor makes of its input."""
    if processor is None:
        return ""
    if not isinstance(processor, PreTrainedTokenizerBase):
        return f"{type(processor).__name__} {processor.to_json_string()}"
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return f"{type(processor).__name__} {sorted(processor.get_vocab().items())} {processor.init_kwargs}"
    settings = json.loads(backend.to_str())
    for state in ("truncation", "padding"):
        settings.pop(state, None)
    sides = [processor.padding_side, processor.truncation_side, processor.model_input_names]
    return f"{type(processor).__name__} {settings} {sides} {processor.special_tokens_map}"


def length_limit(processor: Any, config: Any) -> int | None:
    """The most tokens that tokenizer and model take, or None if neither says."""
    limits = [getattr(processor, "model_max_length", None)]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and any(kind in config.model_type for kind in _OFFSET_POSITIONS):
        positions -= (config.pad_token_id or 0) + 1
    limits.append(positions)
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(known, default=None)


def row_length(context: Context, default: int = _LONGEST_DEFAULT) -> int:
    """Tokens that a row is cut to: `max_length`, else what the model takes, at most 512.

    Raises:
        ValueError: If `max_length` is more than the model takes.
    """
    limit, wanted = length_limit(context.processor, context.config), context.options.max_length
    if wanted is not None and limit is not None and wanted > limit:
        raise ValueError(f"max_length={wanted} is more than model and tokenizer take: set at most {limit}")
    return wanted or min(default, limit or default)
