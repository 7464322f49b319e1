"""What the labels of a data set are, and how they become the class ids of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import DatasetDict

from hf_kd.alignment import label_names as config_names
from hf_kd.data.columns import class_names, label_column
from hf_kd.options import RunOptions

IGNORE = -100
SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
#: Tasks whose labels are classes (or numbers) that a head has outputs for.
CLASSIFICATION = (
    "sequence-classification",
    "token-classification",
    "image-classification",
    "audio-classification",
)


@dataclass(frozen=True)
class Labels:
    """The labels of a data set.

    Attributes:
        column: Their column.
        problem_type: `single_label_classification`, `multi_label_classification` or `regression`.
        names: Names of the classes in order; for numbers that are class ids, the numbers. Empty for a
            regression.
        named: Whether the names mean something, so that they can be matched with those of a model.
        values: What stands in the column for each class, in the order of `names`; None where it is the class
            id.
        multi_hot: Whether a row's labels are a 0 or 1 for each class, instead of the list of those present.
        count: Number of outputs of a head for them.
    """

    column: str
    problem_type: str
    names: tuple[str, ...]
    named: bool
    values: tuple[Any, ...] | None
    multi_hot: bool
    count: int


def label_names(raw: DatasetDict, options: RunOptions) -> list[str] | None:
    """Names of the classes in the data, in order, for a new head; None where there are no classes."""
    labels = describe_labels(raw, options)
    return list(labels.names) if labels is not None and labels.names else None


def describe_labels(raw: DatasetDict, options: RunOptions) -> Labels | None:
    """What the labels are: the kind of problem, the classes, and how they are written.

    Args:
        raw: The splits; classes are collected over `train` and `eval`.
        options: `task` has to be set; `problem_type` and `num_labels` overrule what the data says.

    Returns:
        None where the task has no classes or labels are not wanted.

    Raises:
        ValueError: If the label column is missing, empty or of no use.
    """
    if options.task not in CLASSIFICATION:
        return None
    column = label_column(raw["train"], options, str(options.task))
    if column is None:
        return None
    feature = raw["train"].features[column]
    in_lists = isinstance(feature, datasets.List | datasets.LargeList)
    several = in_lists and options.task != "token-classification"
    if several and _fixed_numbers(feature):
        return _multi_hot(raw, column, options)
    names = class_names(feature)
    if names is not None:
        kind = MULTI if several else SINGLE
        return _with_count(Labels(column, kind, tuple(names), True, None, False, len(names)), options)
    found = _distinct(raw, column, in_lists)
    if not found:
        raise ValueError(
            f"label_column={column!r} has no values: set another, or unlabelled=true with alpha=1"
        )
    numbers = options.problem_type == REGRESSION
    if options.problem_type is None and not in_lists:
        numbers = _are_measures(raw, column, found)
    if numbers:
        return Labels(column, REGRESSION, (), False, None, False, 1)
    return _with_count(_of_values(column, MULTI if several else SINGLE, found), options)


def encoder(labels: Labels, config: Any) -> Callable[[Any], Any]:
    """How one row's label becomes what a model of this config is trained on.

    Classes are matched by name where data and config both have names that mean something, else by number.
    A missing label (None, or a negative number) becomes -100, and NaN for a regression.

    Raises:
        ValueError: If the config has too few labels, or names that the data does not have.
    """
    if labels.problem_type == REGRESSION:
        return lambda value: math.nan if value is None else float(value)
    ids = _class_ids(labels, config)
    if labels.values is not None:
        ids = {value: ids[i] for i, value in enumerate(labels.values)}

    def one(value: Any) -> int:
        missing = value is None or value != value or (type(value) is int and value < 0)
        if not missing and value not in ids:
            raise ValueError(
                f"label_column={labels.column!r} has {value!r}, which is none of the classes "
                f"{_some(labels.names)} that the first rows of the stream have: set num_labels (class ids), "
                "give the column the type ClassLabel, or set streaming=false"
            )
        return IGNORE if missing else ids[value]

    if labels.problem_type == SINGLE:
        return lambda value: [one(item) for item in value] if isinstance(value, list) else one(value)
    outputs = int(config.num_labels)

    def several(value: Sequence[Any] | None) -> list[float]:
        if value is None:
            return [float(IGNORE)] * outputs
        present = [i for i, item in enumerate(value) if item] if labels.multi_hot else [*value]
        hot = {one(item) for item in present}
        return [float(i in hot) for i in range(outputs)]

    return several


def _class_ids(labels: Labels, config: Any) -> dict[Any, int]:
    """The model's class id of each class of the data, by the data's class number."""
    ours = config_names(config)
    if labels.named and ours is not None:
        numbers = {name.strip().casefold(): i for i, name in enumerate(ours)}
        absent = [name for name in labels.names if name.strip().casefold() not in numbers]
        if not absent:
            return {i: numbers[name.strip().casefold()] for i, name in enumerate(labels.names)}
        raise ValueError(
            f"label_column={labels.column!r} has the classes {_some(labels.names)}, the model {_some(ours)}: "
            f"it has no {_some(absent)}. Rename one side (id2label in the model's config)"
        )
    if labels.count > config.num_labels:
        raise ValueError(
            f"label_column={labels.column!r} has {labels.count} classes, {_some(labels.names)}, and the "
            f"model num_labels={config.num_labels}: out of range. Set num_labels={labels.count}"
        )
    return {i: i for i in range(labels.count)}


def _fixed_numbers(feature: Any) -> bool:
    """Whether a list column holds numbers, not names or classes."""
    inner = feature.feature
    return isinstance(inner, datasets.Value) and not inner.dtype.endswith("string")


def _multi_hot(raw: DatasetDict, column: str, options: RunOptions) -> Labels:
    """Lists of numbers: equally long and of 0 and 1 they say which classes are there, else they name them."""
    rows = [
        row for split in ("train", "eval") for row in raw[split].with_format(None)[column] if row is not None
    ]
    lengths = {len(row) for row in rows}
    if len(lengths) == 1 and all(item in (0, 1) for row in rows for item in row):
        count = lengths.pop()
        names = tuple(str(i) for i in range(count))
        return _with_count(Labels(column, MULTI, names, False, None, True, count), options)
    found = {item for row in rows for item in row if item is not None}
    if any(not float(item).is_integer() for item in found):
        raise ValueError(
            f"label_column={column!r} holds lists of numbers that are neither 0 or 1 nor class ids, such as "
            f"{sorted(found)[:3]}: set another column, or unlabelled=true with alpha=1"
        )
    return _with_count(_of_values(column, MULTI, found), options)


def _distinct(raw: DatasetDict, column: str, in_lists: bool) -> set[Any]:
    found: set[Any] = set()
    for split in ("train", "eval"):
        if column not in raw[split].column_names:
            continue
        rows: Iterable[Any] = raw[split].with_format(None)[column] if in_lists else raw[split].unique(column)
        found.update((item for row in rows for item in row or ()) if in_lists else rows)
    return {value for value in found if value is not None and value == value}


def _are_measures(raw: DatasetDict, column: str, found: set[Any]) -> bool:
    """Whether numbers measure something: floats, unless they are whole only because values are missing."""
    if not all(isinstance(value, float) for value in found):
        return False
    whole = all(value.is_integer() for value in found)
    return not (whole and any(None in raw[split].unique(column) for split in ("train", "eval")))


def _of_values(column: str, kind: str, found: set[Any]) -> Labels:
    """Classes written as numbers or strings: 0 to n - 1 are class ids, all else is sorted and numbered."""
    values = sorted(value for value in found if isinstance(value, str) or value >= 0)
    names = tuple(str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values)
    ids = all(not isinstance(v, str | bool) and 0 <= v and float(v).is_integer() for v in values)
    if ids and values[0] == 0 and values[-1] < max(2 * len(values), 2):
        count = max(int(values[-1]) + 1, 2)
        return Labels(column, kind, tuple(str(i) for i in range(count)), False, None, False, count)
    return Labels(column, kind, names, not ids, tuple(values), False, len(values))


def _with_count(labels: Labels, options: RunOptions) -> Labels:
    """Apply `num_labels`, which may leave room for classes that the data happens not to have."""
    wanted = options.num_labels
    if wanted is None or wanted == labels.count:
        return labels
    if wanted < labels.count or labels.named:
        raise ValueError(
            f"num_labels={wanted} but label_column={labels.column!r} has {labels.count} classes, "
            f"{_some(labels.names)}: leave num_labels out"
        )
    names = (*labels.names, *(str(i) for i in range(labels.count, wanted)))
    return Labels(labels.column, labels.problem_type, names, False, labels.values, labels.multi_hot, wanted)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
