"""A student that teaches itself: averages, starts and bases, in training and after a restart."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, TrainerCallback

from hf_kd import DistillationTrainer
from hf_kd.teachers import AdaptersOffTeacher, EMATeacher, FrozenTeacher
from hf_kd.teachers.selves import EMA_FILE, self_teacher

from .heads import HEADS, bert, models, rows_of
from .test_gradient import Gradients, assert_same, step
from .test_teachers import Normed, batch_of
from .test_trainer import arguments, classifiers, text_rows


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_pieces_of_a_student_are_no_teacher(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Also where the configuration that was launched says so, and no option does."""
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    args = SimpleNamespace(fsdp=None, deepspeed=None, torch_compile=False, n_gpu=0)
    with pytest.raises(ValueError, match="self_teacher='ema' needs the student's whole weights"):
        self_teacher("ema", noisy(), ("logits",), args)


def noisy() -> nn.Module:
    """A classifier with dropout."""
    torch.manual_seed(0)
    config = bert(16, num_labels=4)
    config.hidden_dropout_prob = 0.3
    return BertForSequenceClassification(config)


class Weights(TrainerCallback):
    """Keep the student's weights after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.seen.append({n: p.detach().double().clone() for n, p in model.named_parameters()})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_average_is_that_of_the_optimizer_steps(tmp_path: Path, accumulation: int) -> None:
    """Once per optimizer step, whatever the accumulation, with the schedule of the decay."""
    student, _ = classifiers()
    start = {n: p.detach().double().clone() for n, p in student.named_parameters()}
    kept = Weights()
    args = arguments(
        tmp_path, self_teacher="ema", ema_decay=0.5, ema_decay_end=0.9, max_steps=4,
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=4 // accumulation,
    )  # fmt: skip
    trainer = DistillationTrainer(student, args, train_dataset=text_rows(), callbacks=[kept])
    trainer.train()
    mean = start
    for t, weights in enumerate(kept.seen, 1):
        cosine = 0.5 + 0.4 * (1 - torch.cos(torch.tensor(torch.pi * t / 4, dtype=torch.float64))) / 2
        d = min(float(cosine), (1 + t) / (10 + t))
        mean = {n: d * mean[n] + (1 - d) * weights[n] for n in mean}
    assert isinstance(trainer.teacher, EMATeacher) and len(kept.seen) == 4
    ours = dict(trainer.teacher.model.named_parameters())
    for name, values in mean.items():
        torch.testing.assert_close(ours[name].double(), values, rtol=1e-5, atol=1e-6)
        assert not ours[name].requires_grad
    assert any((ours[n].double() - kept.seen[-1][n]).abs().max() > 1e-3 for n in mean)


def test_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """The average is in the checkpoint: stopping and going on gives the same student, to the bit."""
    options: dict[str, Any] = {"self_teacher": "ema", "ema_decay": 0.9, "alpha": 0.7, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2, "self_teacher_dropout": True}

    def trainer() -> DistillationTrainer:
        return DistillationTrainer(noisy(), arguments(tmp_path, **options), train_dataset=text_rows())

    whole = trainer()
    whole.train()
    assert (tmp_path / "checkpoint-2" / EMA_FILE).is_file()
    rest = trainer()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in ((whole.student, rest.student), (whole.teacher.model, rest.teacher.model)):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    (tmp_path / "checkpoint-2" / EMA_FILE).unlink()
    with pytest.raises(ValueError, match=f"{EMA_FILE} is missing"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_average_of_half_precision_moves(tmp_path: Path) -> None:
    """Trap 8: bf16 can't hold a step of a thousandth; the average is kept in fp32."""
    student = nn.Linear(4, 4).to(torch.bfloat16)
    teacher = EMATeacher(student, ("logits",), decay=0.999)
    before = teacher.model.weight.clone()
    with torch.no_grad():
        student.weight += 0.01
    for step_number in range(20000, 20010):
        teacher.update(student, step=step_number, progress=0.5)
    moved = teacher.model.weight - before
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.mean(), torch.tensor(0.01 * (1 - 0.999**10)), rtol=0.2, atol=0)


def lora(dropout: float = 0.0) -> Any:
    student = noisy() if dropout else classifiers()[0]
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], lora_dropout=dropout, task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(student, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def test_adapters_off_is_the_base_and_leaves_the_student_as_it_was() -> None:
    """Trap 22: the base answers without dropout, and every module of the student keeps its mode."""
    student = lora(0.5).train()
    student.base_model.model.bert.encoder.layer[0].eval()
    modes = [m.training for m in student.modules()]
    trained = [p.requires_grad for p in student.parameters()]
    teacher = AdaptersOffTeacher(student, ("logits",))
    assert [m.training for m in student.modules()] == modes
    batch = batch_of()
    first = teacher(batch).dense()["logits"]
    assert [m.training for m in student.modules()] == modes
    assert [p.requires_grad for p in student.parameters()] == trained
    base = copy.deepcopy(student).unload().eval()
    with torch.no_grad():
        torch.testing.assert_close(first, base(**batch).logits)
        assert not torch.allclose(first, student.eval()(**batch).logits)
    assert torch.equal(first, teacher(batch).dense()["logits"])


def test_gradient_with_adapters_off_is_that_of_a_copy_of_the_base(tmp_path: Path) -> None:
    """Trap 22: switching adapters between forward and backward does not touch the student's graph."""
    head = HEADS["single-label"]
    student, _ = models(head)
    base = copy.deepcopy(student)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(student, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    rows = rows_of(head, 8)
    expected = step(tmp_path, head, model, base, rows)[1]
    found = []
    for accumulation in (1, 4):
        options: dict[str, Any] = {
            "self_teacher": "adapters_off",
            "gradient_accumulation_steps": accumulation,
        }
        found.append(step(tmp_path, head, model, None, rows, **options)[1])
    assert any(g.abs().max() > 0 for g in expected.values())
    assert_same(found[0], expected)
    assert_same(found[1], expected)


def test_no_adapters_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="self_teacher='adapters_off'.*has no adapters"):
        DistillationTrainer(noisy(), arguments(tmp_path, self_teacher="adapters_off"))
    with pytest.raises(ValueError, match="self_teacher='ema'.*teacher= is given"):
        DistillationTrainer(noisy(), arguments(tmp_path, self_teacher="ema"), teacher=classifiers()[1])


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_self_teachers_work_without_labels(tmp_path: Path, kind: str) -> None:
    """Trap 2: alpha = 1, no labels; dropout makes the two views of a row differ."""
    student, rows = noisy(), text_rows().remove_columns("labels")
    before = copy.deepcopy(student.state_dict())
    args = arguments(tmp_path, alpha=1.0, self_teacher=kind, self_teacher_dropout=True)
    DistillationTrainer(student, args, train_dataset=rows).train()
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_frozen_start_stays_and_a_teacher_column_is_another_view(tmp_path: Path) -> None:
    """Born again: the start is the teacher, also of rows augmented in `teacher_` columns."""
    student = noisy()
    teacher = FrozenTeacher(student, ("logits",))
    batch = batch_of()
    with torch.no_grad():
        expected = student.eval()(**batch).logits
    other = {**batch, "input_ids": batch["input_ids"].flip(0), "teacher_input_ids": batch["input_ids"]}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(teacher(other).dense()["logits"], expected)


def test_dropout_of_a_teacher_does_not_move_its_batch_norm() -> None:
    """Trap 21: dropout on, running statistics as they were."""
    torch.manual_seed(0)
    teacher = FrozenTeacher(Normed(), ("logits",), dropout=True)
    before, x = teacher.model.norm.running_mean.clone(), 3 + torch.randn(64, 6)
    views = [teacher({"x": x}).dense()["logits"] for _ in range(2)]
    assert not torch.equal(*views)
    assert torch.equal(teacher.model.norm.running_mean, before)


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_two_views_of_a_row(tmp_path: Path, kind: str) -> None:
    """Trap 20: the data's `teacher_` column reaches the teacher alone; without it there is no gradient."""
    rows = text_rows(8).remove_columns("labels")
    turned = [ids[::-1] for ids in rows["input_ids"]]
    found = {}
    for name, data in {"one": rows, "two": rows.add_column("teacher_input_ids", turned)}.items():
        student, gradients = classifiers()[0], Gradients()
        for parameter in student.parameters():
            parameter.data.normal_(0.0, 0.25, generator=torch.Generator().manual_seed(parameter.numel()))
        start = copy.deepcopy(student)
        args = arguments(tmp_path, alpha=1.0, self_teacher=kind, max_steps=1, per_device_train_batch_size=8)
        DistillationTrainer(student, args, train_dataset=data, callbacks=[gradients]).train()
        found[name] = gradients.grads
    args = arguments(tmp_path, alpha=1.0, max_steps=1, per_device_train_batch_size=8)
    student, gradients = copy.deepcopy(start), Gradients()
    data = rows.add_column("teacher_input_ids", turned)
    DistillationTrainer(student, args, teacher=start, train_dataset=data, callbacks=[gradients]).train()
    assert_same(found["two"], {n: g.double() for n, g in gradients.grads.items()}, 1e-5)
    assert max(float(g.abs().max()) for g in found["one"].values()) < 1e-6
