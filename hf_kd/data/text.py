"""Rows of text with a label per row or per word."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from hf_kd.data.labels import IGNORE, encoder
from hf_kd.data.mapping import Context, cached_map, length_limit, row_length

_TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


def sequence_rows(rows: Dataset, context: Context) -> Dataset:
    """One text, or a pair, with one label, several, or a number: `input_ids ... labels`.

    A teacher that reads text otherwise gets columns of its own, with the prefix `teacher_`.
    """
    length = row_length(context)
    encode = encoder(context.labels, context.config) if context.labels else None

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [[_clean(text) for text in batch[name]] for name in context.inputs]
        made = dict(context.processor(*texts, truncation=True, max_length=length))
        if context.teacher_processor is not None:
            made |= _teacher_columns(context, texts, length, made)
        if encode is not None and context.label_column is not None:
            made["labels"] = [encode(value) for value in batch[context.label_column]]
        return made

    if len(context.inputs) > 2:
        raise ValueError(f"text_columns={context.inputs}: a model reads one text or a pair, name one or two")
    return cached_map(rows, prepare, context)


def token_rows(rows: Dataset, context: Context) -> Dataset:
    """Words with a tag each. The first token of a word has its tag; later ones and special tokens have -100.

    Without tags, `special_tokens_mask` marks the tokens that would have had none, so that the same positions
    are distilled with and without tags.
    """
    if not context.processor.is_fast:
        raise ValueError(
            f"processor: {type(context.processor).__name__} does not say which word a token is of; "
            "token-classification needs a fast tokenizer (one with a tokenizer.json)"
        )
    if context.teacher_processor is not None:
        raise ValueError(
            "processor: student and teacher divide words differently, and token-classification compares them "
            "token by token: give the student the teacher's tokenizer"
        )
    length = row_length(context)
    encode = encoder(context.labels, context.config) if context.labels else None
    (column,) = context.inputs

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        made = context.processor(batch[column], is_split_into_words=True, truncation=True, max_length=length)
        words = [_first_tokens(made.word_ids(i)) for i in range(len(batch[column]))]
        columns = dict(made)
        if encode is None or context.label_column is None:
            columns["special_tokens_mask"] = [[int(word is None) for word in row] for row in words]
            return columns
        tags = [encode(row) for row in batch[context.label_column]]
        for row, tagged in zip(batch[column], tags, strict=True):
            if len(row) != len(tagged):
                raise ValueError(
                    f"label_column={context.label_column!r} has {len(tagged)} tags for the {len(row)} words "
                    f"{row[:6]} of {column!r}: give one a word"
                )
        columns["labels"] = [
            [IGNORE if word is None else tagged[word] for word in row]
            for row, tagged in zip(words, tags, strict=True)
        ]
        return columns

    return cached_map(rows, prepare, context)


def _teacher_columns(
    context: Context, texts: list[list[str]], length: int, made: dict[str, Any]
) -> dict[str, Any]:
    """The teacher's tokens; where it reads the same ones but wants more columns, those without a prefix."""
    own = length_limit(context.teacher_processor, None) or length
    theirs = context.teacher_processor(*texts, truncation=True, max_length=min(length, own))
    columns = {f"teacher_{name}": values for name, values in theirs.items()}
    for name in _TOKEN_COLUMNS:
        # The teacher's forward may name a column that its tokenizer does not make; the student's must not
        # fill it.
        if name in made and name not in theirs:
            columns[f"teacher_{name}"] = [[0] * len(row) for row in theirs["input_ids"]]
    return columns


def _clean(text: Any) -> str:
    return "" if text is None else str(text).strip("\r\n")


def _first_tokens(words: list[int | None]) -> list[int | None]:
    """The word of each token that is the first of its word, else None."""
    return [w if i == 0 or w != words[i - 1] else None for i, w in enumerate(words)]
