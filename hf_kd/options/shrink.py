"""What `hf-kd shrink` makes, from which teacher, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from .fields import DTYPE_NAMES, option, raise_problems, unknown_names, unset
from .run import RunOptions
from .student import TRAINING_ROWS, StudentOptions


@dataclass(kw_only=True)
class ShrinkOptions(StudentOptions):
    """A teacher, how a student is cut from it, and the data on which that is measured."""

    teacher: str | None = option(None, "Hub id or directory of the teacher")
    teacher_revision: str | None = option(None, "its branch, tag or commit on the Hub")
    teacher_dtype: str | None = option(None, "dtype of both (default: its checkpoint's)")
    trust_remote_code: bool = option(False, "run model code that comes with its checkpoint")
    task: str | None = option(None, "e.g. causal-lm (default: from the teacher's class)")
    processor: str | None = option(None, "tokenizer or image processor (default: the teacher's)")
    output_dir: str | None = option(None, "folder of the student: model, processor, shrink.json")
    overwrite: bool = option(False, "write into a folder that is not empty")
    dataset: str | None = option(None, "rows to measure on: Hub id, directory, file, builtin:digits")
    dataset_config: str | None = option(None, "configuration of a Hub dataset, e.g. sst2 of glue")
    train_split: str = option("train", "split of the rows")
    text_columns: list[str] | None = option(None, "input columns (default: by task)")
    label_column: str | None = option(None, "column of the labels (default: by task)")
    max_length: int | None = option(None, "tokens an example is cut to, or the block length of an LM")
    batch_size: int = option(16, "rows of a calibration batch")
    seed: int = option(0, "of the random start that the student is compared with")

    def validate(self) -> None:
        """Raise one `ValueError` that lists every problem of these options."""
        found = self.student_problems()
        found += unset(self, {"teacher": "give a directory or Hub id", "output_dir": "give a folder"})
        if not self.cuts:
            found.append(
                "nothing is cut: set student_layers=0.5, student_max_parameters=0.25 or another size"
            )
        if self.batch_size < 1:
            found.append(f"batch_size={self.batch_size} is below 1: set e.g. 16")
        if self.max_length is not None and self.max_length < 1:
            found.append(f"max_length={self.max_length} is not positive: set it above 0 or leave it out")
        found += unknown_names(self, {"teacher_dtype": (*DTYPE_NAMES, None)})
        if not self.dataset:
            found += self._missing_data()
        raise_problems(found)

    def _missing_data(self) -> list[str]:
        needs = {
            "student_layer_choice='importance'": self.student_layer_choice == "importance",
            f"student_vocabulary={TRAINING_ROWS!r}": self.student_vocabulary == TRAINING_ROWS,
            f"student_calibration_rows={self.student_calibration_rows}": bool(self.student_calibration_rows),
        }
        return [f"{name} needs rows: set dataset" for name, needed in needs.items() if needed]

    def run_options(self) -> RunOptions:
        """The same as options of a run, for what loads models and data."""
        names = {spec.name for spec in fields(RunOptions)} & {spec.name for spec in fields(self)}
        run = RunOptions(**{name: getattr(self, name) for name in names})
        rows = self.calibration_rows or None
        if self.student_vocabulary == TRAINING_ROWS:
            rows = None  # all of them, for their tokens
        return replace(run, max_train_samples=rows, max_eval_samples=1, control=False)
