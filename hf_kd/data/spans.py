"""Questions about a passage, in the columns of SQuAD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from hf_kd.data.mapping import Context, cached_map, row_length


def question_rows(rows: Dataset, context: Context) -> Dataset:
    """Question and passage; a passage that is too long becomes several rows that overlap by a third.

    Columns are the tokenizer's, `span_mask` (1 on tokens of the passage and on the first token, which stands
    for "no answer"; 0 on the question, other special tokens and padding), and `start_positions` and
    `end_positions` where there are answers. An answer that is not whole inside a row is none there.

    Raises:
        ValueError: If the tokenizer does not say where its tokens are in the text.
    """
    tokenizer = context.processor
    if not tokenizer.is_fast or context.teacher_processor is not None:
        raise ValueError(
            "processor: question-answering compares positions of tokens, so student and teacher need the "
            "same fast tokenizer (one with a tokenizer.json)"
        )
    length = row_length(context, default=384)
    asked, passage = _two(context)

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        made = tokenizer(
            [text.strip() for text in batch[asked]],
            batch[passage],
            truncation="only_second",
            max_length=length,
            stride=length // 3,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        columns = {name: made[name] for name in made if name in tokenizer.model_input_names}
        inside = [[int(kind == 1) for kind in made.sequence_ids(i)] for i in range(len(made["input_ids"]))]
        columns["span_mask"] = [_with_first(row, made["attention_mask"][i]) for i, row in enumerate(inside)]
        if context.label_column is not None:
            answers = batch[context.label_column]
            found = [
                _locate(answers[row], made["offset_mapping"][i], inside[i], columns["span_mask"][i])
                for i, row in enumerate(made["overflow_to_sample_mapping"])
            ]
            columns["start_positions"] = [start for start, _ in found]
            columns["end_positions"] = [end for _, end in found]
        return columns

    return cached_map(rows, prepare, context)


def allowed_tokens(splits: Sequence[Dataset]) -> Callable[[Any], np.ndarray | None]:
    """The `span_mask` of an evaluation, found by its labels: which split it is, Trainer does not say."""
    known = [s for s in splits if "start_positions" in s.column_names]

    def find(labels: Any) -> np.ndarray | None:
        for split in known:
            if np.array_equal(np.asarray(split["start_positions"]), np.asarray(labels[0])):
                rows = list(split["span_mask"])
                width = max(map(len, rows))
                return np.array([[*row, *[0] * (width - len(row))] for row in rows])
        return None

    return find


def _two(context: Context) -> tuple[str, str]:
    if len(context.inputs) != 2:
        raise ValueError(
            f"text_columns={context.inputs}: name two, the question and the passage, in this order"
        )
    return context.inputs[0], context.inputs[1]


def _with_first(inside: list[int], attention: list[int]) -> list[int]:
    """The mask with the first token that is not padding added."""
    mask = list(inside)
    mask[attention.index(1)] = 1
    return mask


def _locate(
    answer: Any, offsets: list[tuple[int, int]], inside: list[int], mask: list[int]
) -> tuple[int, int]:
    """First and last token of an answer in a row, or twice the first token where it is not whole in it."""
    nowhere = mask.index(1)
    if not answer or not answer["answer_start"]:
        return nowhere, nowhere
    begin = int(answer["answer_start"][0])
    end = begin + len(answer["text"][0])
    tokens = [i for i, kind in enumerate(inside) if kind]
    touched = [i for i in tokens if offsets[i][0] < end and offsets[i][1] > begin]
    whole = tokens and offsets[tokens[0]][0] <= begin and offsets[tokens[-1]][1] >= end
    return (touched[0], touched[-1]) if whole and touched else (nowhere, nowhere)
