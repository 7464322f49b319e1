"""Teachers and data that fail: an error that names the fault, no weight changed, and a resumable run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from hf_kd import TeacherSignal
from hf_kd.teachers.deadline import TeacherTimeout, deadline

from .runs import models, rows, same, train, trainer, weights


class Failing:
    """A teacher that answers right until it is asked for the `after`-th time in training."""

    columns = ("input_ids", "attention_mask")
    identity = {"name": "made", "fingerprint": "1"}

    def __init__(self, how: str = "", after: int = 9) -> None:
        self.how, self.after, self.asked = how, after, 0
        self.model_ = models()[1].eval()

    @torch.no_grad()
    def __call__(self, batch: Any) -> TeacherSignal:
        self.asked += 1
        logits = self.model_(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if self.asked > self.after:
            if self.how == "raise":
                raise ConnectionError("the teacher is gone")
            if self.how == "stall":
                time.sleep(60)
            logits = {
                "nan": logits * torch.nan, "rows": logits[1:], "classes": logits[:, :3], "": logits,
                "scalar": logits.sum(),
            }[self.how]  # fmt: skip
        return TeacherSignal({"logits": logits})


FAULTS: dict[str, tuple[type[Exception], str]] = {
    "raise": (ConnectionError, "the teacher is gone"),
    "stall": (TeacherTimeout, "gave no answer for one batch in teacher_timeout=1 s"),
    "nan": (FloatingPointError, r"The distillation loss is nan at step \d+, rows \["),
    "rows": (ValueError, "The student has 4 positions in this batch, the teacher 3"),
    "classes": (ValueError, r"student_logits has shape \[4, 4\], teacher_logits \[4, 3\]"),
    "scalar": (Exception, ""),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a teacher that never fails."""
    folder = tmp_path_factory.mktemp("quiet") / "out"
    train(folder, teacher=Failing(), max_steps=15)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_teacher_that_fails(undisturbed: Path, tmp_path: Path, fault: str) -> None:
    """Named; and the run goes on from its last checkpoint when the teacher is well again."""
    kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message):
        train(tmp_path, teacher=Failing(fault), max_steps=15, teacher_timeout=1.0)
    assert (tmp_path / "checkpoint-5").is_dir() and not (tmp_path / "model.safetensors").exists()
    train(tmp_path, resume=True, teacher=Failing(), max_steps=15)
    assert same(weights(tmp_path), weights(undisturbed))


class Broken(Dataset):
    """A data set whose worker meets an unreadable row."""

    def __init__(self, broken: int | None) -> None:
        self.rows, self.broken = rows(), broken

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            raise OSError("row 17 can't be read")
        return self.rows[index]


def test_a_data_worker_that_raises(tmp_path: Path) -> None:
    """The worker's own message and trace arrive; nothing hangs; the run can go on."""
    options: dict[str, Any] = {"max_steps": 12, "save_steps": 2, "dataloader_num_workers": 1}
    train(tmp_path / "quiet", data=Broken(None), **options)
    with pytest.raises(OSError, match="(?s)DataLoader worker process 0.*row 17 can't be read"):
        train(tmp_path / "out", data=Broken(17), **options)
    train(tmp_path / "out", resume=True, data=Broken(None), **options)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "quiet"))


def test_a_deadline_leaves_nothing_behind() -> None:
    """The alarm is off afterwards, whether the block ended or not; and needs the main thread."""
    import signal
    import threading

    before = signal.getsignal(signal.SIGALRM)
    with deadline(5.0):
        pass
    with pytest.raises(KeyError), deadline(5.0):
        raise KeyError
    with deadline(None):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0 and signal.getsignal(signal.SIGALRM) == before
    found: list[Exception] = []

    def elsewhere() -> None:
        try:
            with deadline(1.0):
                pass
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "works in the main thread only" in str(found[0])


def test_the_option_is_checked() -> None:
    with pytest.raises(ValueError, match="teacher_timeout=0 is not above 0"):
        trainer(Path("unused"), teacher_timeout=0)
