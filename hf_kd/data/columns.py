"""Which columns of a data set are the input and the label of a task."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
from datasets import Dataset

from hf_kd.options import RunOptions, nearest

_ONE_TEXT = (("text",), ("sentence",), ("content",), ("review",), ("document",), ("tweet",))
_TWO_TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
)
# Columns that are looked for, by task, in this order.
_INPUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sequence-classification": (*_TWO_TEXTS, *_ONE_TEXT),
    "token-classification": (("tokens",), ("words",)),
    "masked-lm": _ONE_TEXT,
    "causal-lm": _ONE_TEXT,
    "seq2seq-lm": (
        ("document",),
        ("article",),
        ("dialogue",),
        ("source",),
        ("input",),
        ("text",),
        ("question",),
    ),
    "question-answering": (("question", "context"),),
    "image-classification": (("image",), ("img",), ("pixel_values",)),
    "audio-classification": (("audio",), ("speech",), ("input_values",)),
}
_CLASS_LABELS = ("label", "labels", "target", "class", "sentiment", "score", "stars")
_LABELS: dict[str, tuple[str, ...]] = {
    "sequence-classification": _CLASS_LABELS,
    "token-classification": ("ner_tags", "tags", "labels", "ner", "pos_tags"),
    "seq2seq-lm": ("summary", "highlights", "target", "output", "answer"),
    "question-answering": ("answers",),
    "image-classification": (*_CLASS_LABELS, "fine_label"),
    "audio-classification": _CLASS_LABELS,
}


def input_columns(rows: Dataset, options: RunOptions, task: str) -> list[str]:
    """The columns that a model of this task reads: `text_columns`, or those with a usual name.

    Raises:
        ValueError: If they are not there; names the columns that are.
    """
    if options.text_columns:
        for name in options.text_columns:
            _require(rows, name, "text_columns")
        return list(options.text_columns)
    for names in _INPUTS[task]:
        if set(names) <= set(rows.column_names):
            return list(names)
    found = _of_kind(rows, task)
    if len(found) == 1:
        return found
    raise ValueError(
        f"text_columns is not set and {task} finds no input among the columns {_list(rows.column_names)}: it "
        f"looks for {_list(sorted({' and '.join(names) for names in _INPUTS[task]}))}. Set text_columns"
    )


def label_column(rows: Dataset, options: RunOptions, task: str) -> str | None:
    """The column with the labels: `label_column`, or one with a usual name; None if labels are not wanted.

    Raises:
        ValueError: If it is not there; names the columns that are.
    """
    if options.unlabelled or task not in _LABELS:
        return None
    if options.label_column:
        _require(rows, options.label_column, "label_column")
        return options.label_column
    for name in _LABELS[task]:
        if name in rows.column_names:
            return name
    found = [name for name, feature in rows.features.items() if class_names(feature) is not None]
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"label_column is not set and {task} finds no label among the columns {_list(rows.column_names)}: it "
        f"looks for {_list(_LABELS[task])}. Set label_column, or unlabelled=true with alpha=1"
    )


def class_names(feature: object) -> list[str] | None:
    """Names in the ClassLabel of a column, also of one that holds lists; None if there is none."""
    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else None


def _require(rows: Dataset, name: str, option: str) -> None:
    if name not in rows.column_names:
        raise ValueError(
            f"{option}={name!r} is no column of the data{nearest(name, rows.column_names)}: "
            f"there are {_list(rows.column_names)}"
        )


def _of_kind(rows: Dataset, task: str) -> list[str]:
    """Columns whose type fits the input of a task."""
    features = rows.features.items()
    if task == "image-classification":
        return [name for name, feature in features if isinstance(feature, datasets.Image)]
    if task == "audio-classification":
        return [name for name, feature in features if isinstance(feature, datasets.Audio)]
    if task in ("token-classification", "question-answering"):
        return []
    return [name for name, feature in features if getattr(feature, "dtype", "") in ("string", "large_string")]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
