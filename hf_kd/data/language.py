"""Running text for language models, and pairs of texts for sequence-to-sequence models."""

from __future__ import annotations

import hashlib
import sys
from itertools import chain
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling

from hf_kd.alignment import first_difference
from hf_kd.data.mapping import Context, cached_map, row_length
from hf_kd.options import RunOptions

_TARGET_LENGTH = 128


#: Columns of rows that are tokens already, as `hf-kd generate` writes them.
TOKENS = ("input_ids", "labels")


def are_tokens(rows: Dataset, options: RunOptions, task: str) -> bool:
    """Whether rows are taken as they are: they have tokens and labels, and no column of text is asked for."""
    generated = task in ("causal-lm", "seq2seq-lm") and set(TOKENS) <= set(rows.column_names)
    return generated and options.text_columns is None


def ready_rows(rows: Dataset, context: Context) -> Dataset:
    """Rows of tokens, untouched: each is what its teacher sampled, and is known to a cache by its content.

    Raises:
        ValueError: If a row is longer than model or `max_length` allow, or has tokens that are unknown.
    """
    _refuse_other_tokens(context)
    if context.options.streaming:
        raise ValueError(
            "streaming=True, but the rows are tokens already, which are read from the disk and checked as a "
            "whole: set streaming=false, they don't lie in memory either"
        )
    limit = row_length(context, sys.maxsize)
    size = max(len(context.processor), getattr(context.config, "vocab_size", 0) or 0)
    kept = rows.select_columns(list(TOKENS))
    for name in TOKENS:
        lists = pc.list_value_length(kept.data.column(name))
        longest = pc.max(lists).as_py() or 0
        largest = pc.max(pc.list_flatten(kept.data.column(name))).as_py() or 0
        if longest > limit:
            raise ValueError(
                f"dataset: its rows have up to {longest} {name}, and model and max_length take {limit}: "
                "generate shorter rows (max_new_tokens, max_prompt_length), or raise max_length"
            )
        if largest >= size:
            raise ValueError(
                f"dataset: its {name} go up to {largest}, and the student's vocabulary has {size} tokens: "
                "use the tokenizer that the data was made with"
            )
    if context.task == "causal-lm":
        return kept
    # Says how long each answer is, whatever fills up the batch.
    return kept.add_column("decoder_attention_mask", [[1] * len(labels) for labels in kept["labels"]])


def causal_rows(rows: Dataset, context: Context) -> Dataset:
    """Texts one after another, each ended by the end token, cut into rows of `max_length` tokens."""
    if are_tokens(rows, context.options, context.task):
        return ready_rows(rows, context)
    end = context.processor.eos_token_id

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = _texts(batch, context)
        tokens = context.processor(texts, return_attention_mask=False, verbose=False)["input_ids"]
        if end is not None:
            # A line that has its line break goes on in the next row; all else is a text of its own.
            tokens = [
                ids if _is_line(text) or (ids and ids[-1] == end) else [*ids, end]
                for ids, text in zip(tokens, texts, strict=True)
            ]
        return {"input_ids": _cut(list(chain.from_iterable(tokens)), length)}

    _refuse_other_tokens(context)
    length = row_length(context)
    return cached_map(rows, prepare, context)


def masked_rows(rows: Dataset, context: Context, *, masked: bool) -> Dataset:
    """Texts one after another, cut into rows of `max_length` tokens.

    Args:
        rows: The texts.
        context: The tokenizer and the settings.
        masked: Mask the rows now, each by its own content, so that every evaluation and every model sees the
            same ones. Training rows are masked anew in every epoch, by the collator.
    """
    _refuse_other_tokens(context)
    if context.processor.mask_token_id is None:
        raise ValueError(
            f"processor: {type(context.processor).__name__} has no mask token, which masked-lm needs: use "
            "the tokenizer of a masked language model, or task=causal-lm"
        )
    length = row_length(context)
    collator = DataCollatorForLanguageModeling(
        context.processor, mlm=True, mlm_probability=context.options.mlm_probability
    )

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        made = context.processor(
            [text for text in _texts(batch, context) if text.strip()],
            return_special_tokens_mask=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        columns = {name: _cut(list(chain.from_iterable(made[name])), length) for name in made}
        if masked:
            pairs = zip(columns["input_ids"], columns.pop("special_tokens_mask"), strict=True)
            both = [_mask(collator, ids, special) for ids, special in pairs]
            columns = {"input_ids": [ids for ids, _ in both], "labels": [labels for _, labels in both]}
        return columns

    prepare.__qualname__ = f"masked_rows({masked}, {context.options.mlm_probability})"
    return cached_map(rows, prepare, context)


def pair_rows(rows: Dataset, context: Context) -> Dataset:
    """A text and the text to be made of it, cut to `max_length` and 128 tokens (or `max_length`, if less)."""
    if are_tokens(rows, context.options, context.task):
        return ready_rows(rows, context)
    _refuse_other_tokens(context)
    if context.label_column is None:
        raise ValueError(
            "seq2seq-lm compares predictions token by token along a target text, so it needs one, true or "
            "generated by the teacher: set label_column and unlabelled=false"
        )
    (source,) = context.inputs
    target = context.label_column
    length = row_length(context)
    target_length = row_length(context, _TARGET_LENGTH) if context.options.max_length is None else length

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        made = context.processor([text or "" for text in batch[source]], truncation=True, max_length=length)
        labels = context.processor(
            text_target=[text or "" for text in batch[target]],
            truncation=True,
            max_length=min(target_length, _TARGET_LENGTH),
        )
        return {**made, "labels": labels["input_ids"]}

    return cached_map(rows, prepare, context)


def _texts(batch: dict[str, list[Any]], context: Context) -> list[str]:
    columns = [batch[name] for name in context.inputs]
    return ["\n".join(part for part in parts if part) for parts in zip(*columns, strict=True)]


def _is_line(text: str) -> bool:
    return text.endswith("\n") and "\n" not in text[:-1]


def _cut(tokens: list[int], length: int) -> list[list[int]]:
    """Rows of `length` tokens; a last shorter one too, unless a single token, which predicts nothing."""
    rows = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    return [row for row in rows if len(row) > 1]


def _mask(
    collator: DataCollatorForLanguageModeling, ids: list[int], special: list[int]
) -> tuple[list[int], list[int]]:
    """Mask a row by a generator that is seeded with the row."""
    seed = int.from_bytes(hashlib.sha256(str(ids).encode()).digest()[:7], "big")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs, labels = collator.torch_mask_tokens(
            torch.tensor([ids]), special_tokens_mask=torch.tensor([special])
        )
    return inputs[0].tolist(), labels[0].tolist()


def _refuse_other_tokens(context: Context) -> None:
    if context.teacher_processor is not None:
        options = context.options
        difference = first_difference(context.processor, context.teacher_processor)
        raise ValueError(
            f"student={options.student!r} and teacher={options.teacher!r} have different tokenizers "
            f"({difference or 'they split text elsewhere'}), and {context.task} compares token by token: set "
            "student_layers or student_config, which make the student from the teacher, or train it on text "
            "that the teacher writes (hf-kd generate; alpha=0)"
        )
