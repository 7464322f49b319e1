"""How a student is cut from its teacher, as options: `init_student`'s arguments, after `student_`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .fields import option, unknown_names

#: Options that are sizes, by the argument of `init_student` that each becomes.
SIZES = {
    "student_layers": "num_layers",
    "student_hidden_size": "hidden_size",
    "student_num_attention_heads": "num_attention_heads",
    "student_num_key_value_heads": "num_key_value_heads",
    "student_intermediate_size": "intermediate_size",
}
TARGETS = {
    "student_max_parameters": "max_parameters",
    "student_max_bytes": "max_bytes",
    "student_max_latency_ms": "max_latency_ms",
}
LAYER_CHOICE_NAMES = ("even", "first", "last", "importance")
IMPORTANCE_NAMES = ("influence", "loss")
#: What `student_vocabulary` says for the training rows.
TRAINING_ROWS = "train"
#: Rows that channels and layers are measured on, unless an option says otherwise.
CALIBRATION_ROWS = 64

_Size = dict[str, Any] | str | int | float | None


@dataclass(kw_only=True)
class StudentOptions:
    """A cut of the teacher: sizes are numbers, shares of the teacher's, or JSON by config option."""

    student_layers: _Size = option(None, "cut from the teacher: so many layers (6), or a share (0.5)")
    student_layer_choice: dict[str, Any] | str | list[int] | None = option(
        "even", "even, first, last, importance, or which as JSON: '[0, 5, 11]'"
    )
    student_importance: str = option("influence", "of layers: influence, or the loss without each")
    student_hidden_size: _Size = option(None, "its hidden size, or the share of the teacher's")
    student_num_attention_heads: _Size = option(None, "its heads, where they don't fill the hidden size")
    student_num_key_value_heads: _Size = option(None, "its key-value heads (default: as the heads)")
    student_intermediate_size: _Size = option(None, "its feed-forward size, or share")
    student_vocabulary: str | None = option(None, "keep only tokens of a text file, or of train: the rows")
    student_max_parameters: _Size = option(None, "search depth and width for so many, or this share")
    student_max_bytes: _Size = option(None, "the same for the bytes of its weights")
    student_max_latency_ms: float | None = option(None, "the same for a forward pass of one row")
    student_calibration_rows: int | None = option(
        None, "training rows that measure layers and widths (default: 64 if cut)"
    )

    @property
    def cuts(self) -> dict[str, Any]:
        """The options that ask for a cut of the teacher, with their values."""
        names = (*SIZES, *TARGETS, "student_vocabulary")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.student_layer_choice != "even":
            found["student_layer_choice"] = self.student_layer_choice
        return found

    @property
    def calibration_rows(self) -> int:
        """How many rows measure what is kept: none where only a depth is given."""
        if self.student_calibration_rows is not None:
            return self.student_calibration_rows
        return 0 if set(self.cuts) <= {"student_layers"} else CALIBRATION_ROWS

    def init_arguments(self) -> dict[str, Any]:
        """What `init_student` is called with; the vocabulary and calibration data are found elsewhere."""
        values = {to: getattr(self, name) for name, to in {**SIZES, **TARGETS}.items()}
        return {**values, "layers": self.student_layer_choice, "importance": self.student_importance}

    def student_problems(self) -> list[str]:
        """Every problem of these options; text that is a number or JSON becomes what it says, in place."""
        found = []
        for name in (*SIZES, "student_max_parameters", "student_max_bytes"):
            value = _read(getattr(self, name))
            if name in TARGETS and isinstance(value, float) and value >= 1 and value == int(value):
                value = int(value)  # 2e7, as people write it
            setattr(self, name, value)
            found += _size_problems(name, value, nested=name in SIZES)
        latency = self.student_max_latency_ms
        if latency is not None and not 0.0 < latency < math.inf:
            found.append(f"student_max_latency_ms={latency} is not above 0 and finite: give milliseconds")
        rows = self.student_calibration_rows
        if rows is not None and rows < 0:
            found.append(f"student_calibration_rows={rows} is negative: set 0 for none, or e.g. 64")
        return found + self._choice_problems()

    def _choice_problems(self) -> list[str]:
        found = []
        choice = self.student_layer_choice = _read_layers(self.student_layer_choice)
        if isinstance(choice, str) and choice not in LAYER_CHOICE_NAMES:
            found.append(
                f"student_layer_choice={choice!r} is not known: use one of {', '.join(LAYER_CHOICE_NAMES)}, "
                "or layers such as '[0, 5, 11]'"
            )
        if choice is None:
            found.append("student_layer_choice is empty: leave it out for 'even'")
        unknown = unknown_names(self, {"student_importance": IMPORTANCE_NAMES})
        found += unknown
        if not unknown and self.student_importance != "influence" and choice != "importance":
            found.append(
                f"student_importance={self.student_importance!r} has no effect with "
                f"student_layer_choice={choice!r}: set student_layer_choice='importance'"
            )
        if choice == "importance" and self.student_calibration_rows == 0:
            found.append(
                "student_layer_choice='importance' is measured, but student_calibration_rows=0: leave it out"
            )
        if self.student_calibration_rows and not self.cuts:
            found.append(
                f"student_calibration_rows={self.student_calibration_rows} has no effect on a student that "
                "is not cut from the teacher: set student_layers or another size, or drop it"
            )
        return found


#: The names of all these options.
NAMES = tuple(spec.name for spec in fields(StudentOptions))


def _read(value: Any) -> Any:
    """Text as the number or mapping that it is; anything else as it is."""
    if not isinstance(value, str):
        return dict(value) if isinstance(value, Mapping) else value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _read_layers(value: Any) -> Any:
    """Layers as numbers, whether they came as JSON, as a list of words, or by stack."""
    value = _read(value)
    if isinstance(value, list) and all(str(item).lstrip("-").isdigit() for item in value):
        return [int(item) for item in value]
    return value


def _size_problems(name: str, value: Any, *, nested: bool) -> list[str]:
    if isinstance(value, Mapping) and nested:
        return [
            text
            for key, size in value.items()
            for text in _size_problems(f"{name}[{key}]", size, nested=False)
        ]
    if value is None:
        return []
    if isinstance(value, bool) or not isinstance(value, int | float):
        kinds = (
            "a number, a share between 0 and 1, or JSON by config option" if nested else "a number or a share"
        )
        return [f"{name}={value!r} is not {kinds}: set e.g. {name}=0.5"]
    if not value > 0:
        return [f"{name}={value} is not positive: set it above 0 or leave it out"]
    if isinstance(value, float) and value >= 1:
        return [f"{name}={value} is neither a whole number nor a share below 1: set e.g. {int(value)} or 0.5"]
    return []
