"""Models and data of one run, as options of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .fields import mapping_problems, option, unknown_names
from .student import StudentOptions

_POSITIVE = (
    "teacher_epochs",
    "teacher_learning_rate",
    "teacher_batch_size",
    "num_labels",
    "max_length",
    "max_train_samples",
    "max_eval_samples",
    "watts",
    "stream_buffer",
)
_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(kw_only=True)
class RunOptions(StudentOptions):
    """Models and data of one run from the command line; the Python API takes objects instead."""

    teacher: str | None = option(None, "Hub id or directory of the teacher")
    teachers: list[str] | None = option(
        None, "instead: several, averaged or routed; the first is compared with, and cut"
    )
    student: str | None = option(None, "Hub id or directory of a student")
    student_config: dict[str, Any] | str | None = option(
        None, """or: a fresh one, like the teacher but for this JSON"""
    )
    teacher_config: dict[str, Any] | str | None = option(
        None, """instead of --teacher: one from scratch, '{"model_type": "vit"}'"""
    )
    train_teacher: bool = option(False, "train the teacher first, into output_dir/teacher")
    teacher_epochs: float | None = option(None, "epochs of that training (default: num_train_epochs)")
    teacher_learning_rate: float | None = option(None, "its learning rate (default: learning_rate)")
    teacher_batch_size: int | None = option(None, "its batch size (default: per_device_train_batch_size)")
    control: bool = option(True, "also train the same student without the teacher, to compare")
    processor: str | None = option(None, "tokenizer or image processor (default: the teacher's)")
    task: str | None = option(None, "e.g. causal-lm (default: from the teacher's class)")
    problem_type: str | None = option(
        None, "single_label_classification, multi_label_classification, regression"
    )
    num_labels: int | None = option(None, "labels of a new head (default: from the data)")
    metrics: list[str] | None = option(None, "evaluate metrics, the main one first (default: by task)")
    dataset: str | None = option(None, "Hub id, directory, csv/tsv/json/parquet/txt file, builtin:digits")
    dataset_config: str | None = option(None, "configuration of a Hub dataset, e.g. sst2 of glue")
    train_split: str = option("train", "split to train on")
    eval_split: str | None = option(None, "split to evaluate on (default: validation, or part of train)")
    test_split: str | None = option(None, "split of the final table (default: the evaluation split)")
    eval_file: str | None = option(None, "file to evaluate on, where --dataset is a file")
    test_file: str | None = option(None, "file for the final table, where --dataset is a file")
    column_names: list[str] | None = option(None, "columns of a csv or tsv file without a header line")
    text_columns: list[str] | None = option(None, "input columns (default: by task)")
    label_column: str | None = option(None, "column of the labels (default: by task)")
    unlabelled: bool = option(False, "the data has no labels, or ignore them; needs --alpha 1")
    max_length: int | None = option(None, "tokens an example is cut to, or the block length of an LM")
    streaming: bool = option(False, "read the training rows when they are needed; needs --max_steps")
    stream_buffer: int = option(1000, "rows among which a stream is shuffled; 1: it keeps its order")
    mlm_probability: float = option(0.15, "share of tokens that are masked in masked LM")
    max_train_samples: int | None = option(None, "use only this many training rows")
    max_eval_samples: int | None = option(None, "use only this many evaluation and test rows")
    slices: list[str] | None = option(None, "also report quality by: length, label, or columns of the data")
    watts: float | None = option(None, "power that the machine draws, to estimate the energy of the run")

    def _several_problems(self) -> list[str]:
        """What is wrong with `teachers`; the first of them becomes `teacher`."""
        found: list[str] = []
        if not self.teachers:
            return found
        if self.teacher not in (None, self.teachers[0]):
            found.append(f"teacher={self.teacher!r} and teachers={self.teachers}: keep one")
        if len(self.teachers) < 2:
            found.append(f"teachers={self.teachers} names one: use teacher, or name a second")
        if self.train_teacher:
            found.append("train_teacher=True trains one teacher, not teachers: train them one by one")
        self.teacher = self.teachers[0]
        return found

    def run_problems(self) -> list[str]:
        """Every problem of these options, each with the option's name, its value and the fix."""
        found = self._several_problems() + self.student_problems()
        if self.teacher and self.teacher_config:
            found.append(f"teacher={self.teacher!r} and teacher_config={self.teacher_config}: keep one")
        if not self.teacher and not self.teacher_config:
            found.append("teacher is not set: give a directory or Hub id, or teacher_config for a new one")
        if self.teacher_config and not self.train_teacher:
            found.append("train_teacher=False leaves the new teacher untrained: set train_teacher=true")
        students = {"student": self.student, **dict(list(self.cuts.items())[:1])}
        students["student_config"] = self.student_config
        given = [f"{name}={value!r}" for name, value in students.items() if value is not None]
        if len(given) > 1:
            found.append(f"{' and '.join(given)} name different students: keep one")
        if not given:
            found.append(
                "no student: set student (id or directory), student_layers or another size of a cut of the "
                "teacher, or student_config"
            )
        if not self.dataset:
            found.append("dataset is not set: give a Hub id, a directory, a file, or builtin:digits")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                found.append(f"{name}={value} is not positive: set it above 0 or leave it out")
        if not 0.0 < self.mlm_probability < 1.0:
            found.append(f"mlm_probability={self.mlm_probability} is outside (0, 1): set e.g. 0.15")
        if self.streaming and self.teacher_epochs is not None:
            found.append(
                f"streaming=True and teacher_epochs={self.teacher_epochs}: a stream has no epochs, and the "
                "teacher takes max_steps: leave teacher_epochs out"
            )
        found += unknown_names(self, {"problem_type": (*_PROBLEM_TYPES, None)})
        found += mapping_problems(self, ("student_config", "teacher_config"))
        return found
