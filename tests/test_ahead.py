"""The teacher is asked one batch ahead: the same run to the bit, and the student works meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_kd import DistillationArguments, DistillationTrainer, TeacherSignal
from hf_kd.teachers import Ensemble, ModelTeacher
from hf_kd.teachers.deadline import TeacherTimeout
from hf_kd.teachers.worker import Worker

from .heads import HEADS, Collator, models, rows_of
from .test_trainer import arguments, classifiers, text_rows

ROWS = text_rows(14)


class Watched:
    """A model teacher that notes what it is asked, in which thread, and can be told to misbehave."""

    asked_ahead = True

    def __init__(self, model: nn.Module, act: Any = None) -> None:
        self._inner, self._act = ModelTeacher(model, ("logits",)), act
        self.asked: list[list[int]] = []
        self.threads: list[str] = []

    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        self.asked.append(batch["input_ids"][:, 0].tolist())
        self.threads.append(threading.current_thread().name)
        if self._act is not None:
            self._act(len(self.asked))
        return self._inner(batch)

    @property
    def identity(self) -> dict[str, str]:
        return self._inner.identity

    @property
    def columns(self) -> tuple[str, ...]:
        return self._inner.columns


class Seen(TrainerCallback):
    """Every loss that is logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []


def dropping() -> tuple[nn.Module, nn.Module]:
    """A student with dropout, which draws from the generator that data may use, and a teacher."""
    student, teacher = classifiers()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return student, teacher


def train(
    folder: Path, ahead: str, teacher: Any = None, *, resume: Any = None, data: Any = ROWS, **options: Any
) -> tuple[list[float], dict[str, Tensor], Any]:
    """The losses and the student of a run with dropout, in steps of 3 micro-batches and a remainder of 1."""
    student, model = dropping()
    teacher = teacher(model) if teacher is not None else model
    seen = Seen()
    defaults = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2,
        "logging_steps": 1, "teacher_ahead": ahead, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    trainer = DistillationTrainer(
        student,
        arguments(folder, **{**defaults, **options}),
        teacher=teacher,
        train_dataset=data,
        eval_dataset=text_rows(6, 1),
        callbacks=[seen],
    )
    trainer.train(resume_from_checkpoint=resume)
    return seen.losses, {k: v.clone() for k, v in trainer.student.state_dict().items()}, trainer


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def test_the_same_run_to_the_bit(tmp_path: Path) -> None:
    """Two epochs with dropout, accumulation and a remainder; evaluation between the steps."""
    options = {"eval_strategy": "steps", "eval_steps": 1}
    plain = train(tmp_path / "plain", "off", Watched, **options)
    ahead = train(tmp_path / "ahead", "on", Watched, **options)
    same(plain, ahead)
    assert len(plain[0]) == 6
    asked = [one[2].teacher for one in (plain, ahead)]
    assert sorted(asked[0].asked) == sorted(asked[1].asked)  # nothing is asked that is not trained
    assert set(asked[0].threads) == {"MainThread"}
    assert asked[1].threads.count("teacher-ahead") == 14


def test_resumed_in_mid_epoch(tmp_path: Path) -> None:
    """A checkpoint after a batch was fetched early holds what it would without: both resume it alike."""
    whole = train(tmp_path, "on")
    checkpoint = str(tmp_path / "checkpoint-2")
    for name in ("on", "off"):
        rest = train(tmp_path / name, name, resume=checkpoint)
        same((whole[0][2:], whole[1]), rest)


def test_language_models_without_logits(tmp_path: Path) -> None:
    """The fused loss reads the teacher's hidden states, taken by a hook in the other thread."""
    found = []
    for ahead in ("off", "on"):
        student, teacher = models(HEADS["causal-lm"])
        trainer = DistillationTrainer(
            student,
            arguments(tmp_path / ahead, teacher_ahead=ahead, fused="on", per_device_train_batch_size=2),
            teacher=teacher,
            train_dataset=rows_of(HEADS["causal-lm"], 10),
            data_collator=Collator(HEADS["causal-lm"]),
        )
        trainer.args.remove_unused_columns = False
        trainer.train()
        found.append(({}, dict(trainer.student.state_dict())))
    same(*found)


def test_the_teacher_begins_before_the_student_has_ended(tmp_path: Path) -> None:
    """The backward of one batch goes on only when the teacher was asked about the next one."""
    begun = [threading.Event() for _ in range(8)]
    waited: list[bool] = []

    def act(number: int) -> None:
        begun[number - 1].set()

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            step = len(waited)
            if step not in (0, 6):  # the first step of a run looks at how its data are made; the last ends it
                waited.append(begun[step + 1].wait(20))
            else:
                waited.append(True)
            return grad

    student, model = classifiers()
    teacher = Watched(model, act)
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, teacher_ahead="on", per_device_train_batch_size=2),
        teacher=teacher,
        train_dataset=ROWS,
    )
    trainer._checked = {True}  # asks the teacher about the first rows
    student.classifier.register_forward_hook(lambda module, given, out: Waits.apply(out))
    trainer.train()
    assert waited == [True] * 7
    assert teacher.threads == ["teacher-ahead"] * 7


def test_a_loader_that_draws_random_numbers_is_left_in_order(tmp_path: Path, caplog: Any) -> None:
    """Dropout and the collator draw from one generator: a batch fetched early would change both."""

    def noisy(rows: list[Any]) -> dict[str, Tensor]:
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        flip = torch.rand(batch["input_ids"].shape) < 0.2
        return {**batch, "input_ids": batch["input_ids"].masked_fill(flip, 3)}

    found = []
    for ahead in ("off", "on"):
        student, teacher = dropping()
        trainer = DistillationTrainer(
            student,
            arguments(
                tmp_path / ahead,
                teacher_ahead=ahead,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
            ),
            teacher=Watched(teacher),
            train_dataset=ROWS,
            data_collator=noisy,
        )
        trainer.train()
        found.append(({}, dict(trainer.student.state_dict())))
    same(*found)
    assert caplog.text.count("draws random numbers") == 1
    assert trainer.teacher.threads.count("teacher-ahead") == 7  # type: ignore[union-attr]


def test_what_the_teacher_raises_is_raised_by_training(tmp_path: Path) -> None:
    def act(number: int) -> None:
        if number == 5:
            raise ZeroDivisionError("the teacher's own reason")

    with pytest.raises(ZeroDivisionError, match="own reason"):
        train(tmp_path, "on", lambda model: Watched(model, act))


def test_a_teacher_that_stalls_ends_the_run_in_time(tmp_path: Path) -> None:
    release = threading.Event()

    def act(number: int) -> None:
        if number == 4:
            release.wait(60)

    with pytest.raises(TeacherTimeout, match="teacher_timeout=0.5"):
        train(tmp_path, "on", lambda model: Watched(model, act), teacher_timeout=0.5)
    release.set()


def test_a_data_set_that_raises_does_so_in_its_own_step(tmp_path: Path) -> None:
    class Broken(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Any:
            if index == 9:
                raise KeyError("row 9 is gone")
            return {k: v for k, v in ROWS[index].items()}

    steps = []
    for ahead in ("off", "on"):
        with pytest.raises(KeyError, match="row 9"):
            student, model = classifiers()
            trainer = DistillationTrainer(
                student,
                arguments(
                    tmp_path / ahead,
                    teacher_ahead=ahead,
                    per_device_train_batch_size=2,
                    train_sampling_strategy="sequential",
                ),
                teacher=model,
                train_dataset=Broken(),
            )
            trainer.train()
        steps.append(trainer.state.global_step)
    assert steps[0] == steps[1] > 1


def test_a_stream_is_read_ahead_alike(tmp_path: Path) -> None:
    """Each rank reads its own rows of a stream; a checkpoint counts those that were trained."""
    data = ROWS.to_iterable_dataset()
    found = []
    for ahead in ("off", "on"):
        options = {"data": data, "max_steps": 6, "gradient_accumulation_steps": 1}
        found.append(train(tmp_path / ahead, ahead, Watched, **options))
        teacher = found[-1][2].teacher
    same(*found)
    assert teacher.threads.count("teacher-ahead") == 6
    rest = train(
        tmp_path / "rest", "on", data=data, max_steps=6, gradient_accumulation_steps=1,
        resume=str(tmp_path / "on" / "checkpoint-2"),
    )  # fmt: skip
    same((found[0][0][2:], found[0][1]), rest)


def test_a_served_teacher_is_asked_early_by_itself(tmp_path: Path) -> None:
    """Nobody is asked here."""
    student, _ = models(HEADS["causal-lm"])
    args = arguments(tmp_path, temperature=1.0, server_model="tiny")
    trainer = DistillationTrainer(student, args, teacher="http://127.0.0.1:1/v1")
    assert trainer.ahead.used
    args = arguments(tmp_path, temperature=1.0, server_model="tiny", teacher_ahead="off")
    assert not DistillationTrainer(student, args, teacher="http://127.0.0.1:1/v1").ahead.used


def _unlike(model: nn.Module) -> Any:
    teacher = Watched(model)
    teacher.asked_ahead = False  # type: ignore[misc]
    return teacher


@pytest.mark.parametrize(
    ("teacher", "options", "reason"),
    [
        (None, {"self_teacher": "ema"}, "changes with each step"),
        (None, {"self_teacher": "frozen", "self_teacher_dropout": True}, "draws random numbers"),
        (None, {"self_teacher": "deeper", "exit_layers": [0]}, "is the student itself"),
        (_unlike, {}, "does not say that"),
        (lambda model: model, {"hidden_weight": 1.0}, "losses on layers"),
        (lambda model: [model, _unlike(classifiers()[1])], {}, "does not say that"),
        (lambda model: [model, classifiers()[1]], {"ensemble_offload": True}, "ensemble_offload"),
    ],
)
def test_a_teacher_that_can_not_be_asked_early(
    tmp_path: Path, teacher: Any, options: dict[str, Any], reason: str
) -> None:
    """Refused by name if it is insisted on, left alone where it isn't."""
    for ahead in ("on", "auto"):
        student, model = classifiers()
        args = arguments(tmp_path, teacher_ahead=ahead, **options)
        given = {"teacher": None if teacher is None else teacher(model), "train_dataset": ROWS}
        if ahead == "on":
            with pytest.raises(ValueError, match=f"teacher_ahead='on'.*{reason}"):
                DistillationTrainer(student, args, **given)
        else:
            assert not DistillationTrainer(student, args, **given).ahead.used


def test_shared_modules_are_refused(tmp_path: Path) -> None:
    student, model = classifiers()
    for parameter in student.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    small, _ = classifiers()
    small.bert.embeddings = student.bert.embeddings
    with pytest.raises(ValueError, match="shares modules with the student"):
        DistillationTrainer(student, arguments(tmp_path, teacher_ahead="on"), teacher=small)


def test_several_teachers_may_be_asked_early(tmp_path: Path) -> None:
    student, model = classifiers()
    trainer = DistillationTrainer(
        student, arguments(tmp_path, teacher_ahead="on"), teacher=[model, classifiers()[1]]
    )
    assert isinstance(trainer.teacher, Ensemble)
    assert trainer.ahead.used


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher_ahead='maybe' is not known: use one of auto, on, off"):
        DistillationArguments(teacher_ahead="maybe")


def test_calls_are_made_in_order_without_gradient() -> None:
    worker = Worker("one")
    order: list[int] = []

    def call(number: int) -> tuple[bool, int]:
        order.append(number)
        return torch.is_grad_enabled(), torch.get_num_threads()

    futures = [worker.submit(lambda n=n: call(n)) for n in range(5)]
    assert {future.result(20) for future in futures} == {(False, torch.get_num_threads())}
    assert order == list(range(5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_side_stream(tmp_path: Path) -> None:
    """The same run to the bit, with the teacher's kernels beside the student's."""
    options = {"use_cpu": False}
    same(train(tmp_path / "plain", "off", **options), train(tmp_path / "ahead", "on", **options))
