"""What a teacher continues: texts of a data set, each as its tokens, or nothing but a start token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_kd.data.columns import input_columns
from hf_kd.data.sources import load_split
from hf_kd.decoding import start_token
from hf_kd.options import GenerateOptions, RunOptions


@dataclass(frozen=True)
class Prompts:
    """What is continued: a text and its tokens for each prompt, or the start token alone."""

    texts: Sequence[str]
    tokens: Callable[[str], list[int]]
    samples: int

    def __len__(self) -> int:
        """Rows, not prompts."""
        return len(self.texts) * self.samples

    def row(self, number: int) -> tuple[str, list[int]]:
        """Text and tokens that a row starts from; the samples of a prompt are next to each other."""
        text = self.texts[number // self.samples]
        return text, self.tokens(text)


def load_prompts(
    options: GenerateOptions, run: RunOptions, task: str, tokenizer: Any, model: PreTrainedModel
) -> Prompts:
    """The prompts that the options name; without a dataset, empty ones: the start token alone.

    Args:
        options: What was asked for.
        run: The dataset among it.
        task: "causal-lm" or "seq2seq-lm".
        tokenizer: The teacher's.
        model: Its config may know a start token that the tokenizer doesn't.

    Raises:
        ValueError: If the data can't be found, has no such column or no rows, or holds no text.
    """
    start = tokenizer.bos_token_id
    if start is None:
        start = start_token(model, "bos_token_id")
    if start is None:
        start = tokenizer.eos_token_id

    def tokens(text: str) -> list[int]:
        ids = tokenizer(text, truncation=True, max_length=options.max_prompt_length)["input_ids"]
        if task == "causal-lm" and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # what follows the end token is another text
        if ids:
            return list(ids)
        if start is None:
            raise ValueError(
                "dataset: the tokenizer has neither a start nor an end token, so nothing can be sampled from "
                "an empty prompt: leave out empty prompts, or give a dataset"
            )
        return [start]

    if options.dataset is None:
        return Prompts([""] * int(options.num_rows or 0), tokens, options.samples_per_prompt)
    rows = load_split(run, options.split)
    column = options.prompt_column
    if column is None:
        own = "prompt" in rows.column_names
        column = "prompt" if own else input_columns(rows, run, task)[0]
    if column not in rows.column_names:
        raise ValueError(
            f"prompt_column={column!r} is no column of dataset={options.dataset!r}: there are "
            f"{', '.join(rows.column_names)}"
        )
    texts = [_text(text, column) for text in rows[column][: options.num_rows]]
    if not texts:
        raise ValueError(f"dataset={options.dataset!r} has no rows in its split {options.split!r}")
    return Prompts(texts, tokens, options.samples_per_prompt)


def _text(value: Any, column: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"prompt_column={column!r} holds {type(value).__name__}, not text: name a column of text"
        )
    return value or ""
