"""The trainer as a user meets it: models by name, columns, checkpoints, evaluation, stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EvalPrediction,
    TrainerCallback,
)

from hf_kd import DistillationArguments, DistillationTrainer, TeacherSignal

from .heads import HEADS, VOCAB, Collator, bert, models, oracle, rows_of


def arguments(folder: Path, **options: Any) -> DistillationArguments:
    """Quiet arguments for a short run on the CPU."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "alpha": 0.5,
        "temperature": 2.0,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistillationArguments(**{**defaults, **options})


def classifiers() -> tuple[nn.Module, nn.Module]:
    """A student and a teacher in fp32."""
    torch.manual_seed(0)
    student, teacher = (BertForSequenceClassification(bert(width, num_labels=4)) for width in (16, 24))
    return student, teacher


def text_rows(count: int = 16, seed: int = 0) -> Dataset:
    """Rows of equal length, so that the default collator serves."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, 7), generator=g)
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "attention_mask": torch.ones_like(ids).tolist(),
            "token_type_ids": (torch.arange(7) > 3).long().expand(count, 7).tolist(),
            "labels": torch.randint(0, 4, (count,), generator=g).tolist(),
        }
    )


def test_twelve_lines_with_names(tmp_path: Path) -> None:
    """Models may be named: a directory or a Hub id, for the student and the teacher."""
    for name, model in zip(("student", "teacher"), classifiers(), strict=True):
        model.save_pretrained(tmp_path / name)
    trainer = DistillationTrainer(
        model=str(tmp_path / "student"),
        teacher=str(tmp_path / "teacher"),
        args=arguments(tmp_path / "out"),
        train_dataset=text_rows(),
        eval_dataset=text_rows(8, 1),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_kl", "eval_agreement", "eval_teacher_entropy"} <= metrics.keys()


def test_teacher_learns_nothing(tmp_path: Path) -> None:
    """Traps 11, 21: the teacher stays frozen, in evaluation mode, and outside accelerate's models."""
    student, teacher = classifiers()
    teacher.train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=text_rows())
    trainer.train()
    assert not teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(m is not teacher for m in trainer.accelerator._models)
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in teacher.parameters()}


def test_evaluate_before_train_prepares_the_student(tmp_path: Path) -> None:
    """Trap 21: a teacher among accelerate's models would keep `evaluate()` from preparing the student."""
    student, teacher = classifiers()
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, train_dataset=text_rows(), eval_dataset=text_rows()
    )
    first = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_kl"] != first["eval_kl"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to copy to")
def test_no_memory_is_pinned_for_an_accelerator_that_is_not_there(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The option stays what it is, for the machine that runs `distillation.yaml` next."""
    student, teacher = classifiers()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, use_cpu=False),
        teacher=teacher,
        train_dataset=text_rows(),
        eval_dataset=text_rows(),
    )
    loaders = [trainer.get_train_dataloader(), trainer.get_eval_dataloader()]
    assert all(next(iter(loader)) for loader in loaders)
    assert not [warning for warning in recwarn if "pin_memory" in str(warning.message)]
    assert trainer.args.dataloader_pin_memory and not any(loader.pin_memory for loader in loaders)


def test_columns_are_the_union(tmp_path: Path) -> None:
    """Trap 20: a DistilBERT student does not starve a BERT teacher of `token_type_ids`."""
    _, teacher = classifiers()
    student = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCAB, dim=16, hidden_dim=32, n_layers=2, n_heads=2, num_labels=4)
    )
    seen: list[Tensor] = []
    rows = text_rows()
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=rows)
    answer = trainer.teacher

    class Spy:
        identity, columns = answer.identity, answer.columns

        def __call__(self, batch: Any) -> TeacherSignal:
            signal = answer(batch)
            seen.append((batch, signal.logits["logits"]))
            return signal

    trainer.teacher = Spy()
    trainer.train()
    batch, logits = seen[0]
    alone = teacher(**{k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}).logits
    torch.testing.assert_close(logits, alone)
    starved = teacher(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    assert not torch.allclose(logits, starved)  # what dropping the student's unknown columns would give


def test_teacher_reads_its_own_columns(tmp_path: Path) -> None:
    """A `teacher_` column is the teacher's version of a column; the student reads the plain one."""
    student, teacher = classifiers()
    rows = text_rows()
    other = rows["input_ids"][::-1]
    rows = rows.add_column("teacher_input_ids", other)
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = teacher(
        input_ids=batch["teacher_input_ids"],
        attention_mask=batch["attention_mask"],
        token_type_ids=batch["token_type_ids"],
    ).logits
    torch.testing.assert_close(trainer.teacher(batch).logits["logits"], expected)


def test_student_is_called_through_its_wrapper(tmp_path: Path) -> None:
    """Trap 19: the loss goes through the model that Trainer hands over, once per micro-batch."""
    student, teacher = classifiers()
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=text_rows())
    calls = []

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = student

        def forward(self, **kwargs: Any) -> Any:
            calls.append(sorted(kwargs))
            return self.module(**kwargs)

    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(Wrapper(), batch)
    assert calls == [["attention_mask", "input_ids", "token_type_ids"]]


def test_autocast_reaches_the_student(tmp_path: Path) -> None:
    """Trap 19: with bf16 on, products run in bf16, the loss in fp32; within 2 % of fp32."""
    losses = []
    for bf16 in (False, True):
        student, teacher = classifiers()
        dtypes = []
        student.classifier.register_forward_hook(lambda m, i, o, d=dtypes: d.append(o.dtype))
        trainer = DistillationTrainer(
            student, arguments(tmp_path, bf16=bf16, max_steps=1), teacher=teacher, train_dataset=text_rows()
        )
        trainer.train()
        assert dtypes[-1] == (torch.bfloat16 if bf16 else torch.float32)
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]


def test_logged_terms_add_up(tmp_path: Path) -> None:
    """Trap 6: `loss_kd` is a KL, and `loss = (1 - alpha) loss_task + alpha loss_kd` over logging windows."""
    head = HEADS["single-label"]
    student, teacher = models(head)
    rows = rows_of(head, 8)
    trainer = DistillationTrainer(
        student,
        arguments(
            tmp_path,
            alpha=0.3,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            logging_steps=2,
            learning_rate=0.0,
            remove_unused_columns=False,
        ),
        teacher=teacher,
        train_dataset=rows,
        data_collator=Collator(head),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.7 * log["loss_task"] + 0.3 * log["loss_kd"], rel=1e-5)
    assert log["loss_kd"] == pytest.approx(
        float(oracle(head, student, teacher, rows, alpha=1.0)[0]), rel=1e-5
    )


def test_alpha_zero_never_calls_the_teacher(tmp_path: Path) -> None:
    """Alpha = 0 is plain training, equal to Trainer's own, and the teacher is never run."""

    class Silent:
        identity: dict[str, str] = {"fingerprint": "none"}
        columns = ()

        def __call__(self, batch: Any) -> TeacherSignal:
            raise AssertionError("called")

    student, _ = classifiers()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, alpha=0.0),
        teacher=Silent(),
        train_dataset=text_rows(),
        eval_dataset=text_rows(),
    )
    trainer.train()
    assert "eval_kl" not in trainer.evaluate()


def test_resume_is_exact(tmp_path: Path) -> None:
    """Trap 28: the losses and weights after a resume, schedules included, are those of an undisturbed run."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    def run(folder: Path, callbacks: list, resume: bool = False) -> DistillationTrainer:
        student, teacher = classifiers()
        trainer = DistillationTrainer(
            student,
            arguments(
                folder,
                num_train_epochs=3,
                save_strategy="steps",
                save_steps=1,
                save_total_limit=2,
                alpha=0.2,
                alpha_schedule="linear",
                alpha_end=1.0,
                temperature_schedule="cosine",
                temperature_end=4.0,
            ),
            teacher=teacher,
            train_dataset=text_rows(),
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = run(tmp_path / "whole", [])
    run(tmp_path / "parts", [Stop()])
    resumed = run(tmp_path / "parts", [], resume=True)
    names = ("loss", "loss_task", "loss_kd", "alpha", "temperature", "grad_norm")
    logs = [
        [{k: log[k] for k in names} for log in t.state.log_history if "loss" in log] for t in (whole, resumed)
    ]
    assert len(logs[0]) == 12
    assert logs[0][-7:] == logs[1][-7:]
    assert logs[0][0]["alpha"] == pytest.approx(0.2 + 0.8 / 12) or logs[0][0]["alpha"] == pytest.approx(0.2)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoint_holds_the_student_only(tmp_path: Path) -> None:
    """Trap 21: weights of the student alone, the teacher's identity beside them, plain `from_pretrained`."""
    student, teacher = classifiers()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, save_strategy="epoch", hub_token="hf_secret"),
        teacher=teacher,
        train_dataset=text_rows(),
    )
    trainer.train()
    trainer.save_model()
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    identity = json.loads((checkpoint / "teacher.json").read_text())
    assert identity["fingerprint"] == trainer.teacher.identity["fingerprint"]
    assert not (tmp_path / "teacher.json").exists()
    for folder in (checkpoint, tmp_path):
        loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert loaded.num_parameters() == student.num_parameters()
        options = yaml.safe_load((folder / "distillation.yaml").read_text())
        assert options["alpha"] == 0.5
        assert options["temperature"] == 2.0
        assert "hf_secret" not in (folder / "distillation.yaml").read_text()
    assert "hf_kd" not in (tmp_path / "config.json").read_text()


def test_resume_with_another_teacher_is_refused(tmp_path: Path) -> None:
    """A checkpoint from another teacher is refused, and both teachers are named."""
    student, teacher = classifiers()
    teacher.name_or_path = "first"
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    DistillationTrainer(
        student, arguments(tmp_path, **options), teacher=teacher, train_dataset=text_rows()
    ).train()
    student, other = classifiers()
    other.name_or_path = "second"
    other.classifier.weight.data.add_(1.0)
    trainer = DistillationTrainer(
        student, arguments(tmp_path, **options), teacher=other, train_dataset=text_rows()
    )
    with pytest.raises(ValueError, match="'first'.*'second'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_predictions_have_no_extras(tmp_path: Path) -> None:
    """Trap 23: no hidden states in predictions; `prediction_loss_only`, `return_outputs` hold."""
    student, teacher = classifiers()
    student.config.output_hidden_states = True
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = DistillationTrainer(
        student,
        arguments(tmp_path),
        teacher=teacher,
        train_dataset=text_rows(),
        eval_dataset=text_rows(9),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits * 1,
    )
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert seen[0].predictions.shape == (9, 4)
    assert trainer.predict(text_rows(5)).predictions.shape == (5, 4)
    batch = next(iter(trainer.get_eval_dataloader()))
    assert trainer.prediction_step(trainer.model, batch, True)[1:] == (None, None)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.ndim == 0
    assert outputs["logits"].shape[-1] == 4


def test_unlabelled_evaluation(tmp_path: Path) -> None:
    """Without labels there is no `eval_loss`, but KL and agreement are there."""
    student, teacher = classifiers()
    rows = text_rows().remove_columns("labels")
    trainer = DistillationTrainer(
        student, arguments(tmp_path, alpha=1.0), teacher=teacher, train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert "eval_loss" not in metrics
    assert metrics["eval_kl"] > 0


class Linear(nn.Module):
    """A plain module: ten inputs, two classes; returns what `form` says."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 2)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        logits = self.linear(x)
        return {"tensor": logits, "tuple": (logits,), "dict": {"logits": logits}}[self.form]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_classic_pair_reaches_the_threshold(tmp_path: Path, form: str) -> None:
    """The classic example, ten random inputs and two classes, stops by itself at a KL below 1e-4."""
    torch.manual_seed(0)
    teacher, student = Linear(form), Linear(form)
    rows = [{"x": torch.randn(10)} for _ in range(64)]
    trainer = DistillationTrainer(
        student,
        arguments(
            tmp_path,
            alpha=1.0,
            kl_threshold=1e-4,
            learning_rate=0.05,
            num_train_epochs=500,
            eval_strategy="epoch",
            per_device_train_batch_size=64,
            logging_strategy="no",
        ),
        teacher=teacher,
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    assert trainer.state.global_step < 500
    x = torch.stack([row["x"] for row in rows])
    with torch.no_grad():
        kl = F.kl_div(
            student.linear(x).log_softmax(-1),
            teacher.linear(x).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
    assert float(kl) < 1e-4
    kls = [log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log]
    assert all(value > 1e-4 for value in kls[:-1])


def test_circulating_example_measures_something_else() -> None:
    """Trap 5, counter-example: with swapped arguments, `kl_div` of two different models can be any number."""
    torch.manual_seed(0)
    q, p = torch.randn(64, 2).log_softmax(-1), torch.randn(64, 2).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    swapped = F.kl_div(p.exp(), q.exp(), reduction="batchmean")
    assert float(kl) > 0
    assert float(swapped) < 0 or abs(float(swapped) - float(kl)) > 0.1 * float(kl)


def test_nan_stops_with_step_term_and_rows(tmp_path: Path) -> None:
    """Trap 29: a NaN loss names step, term and rows; the last checkpoint is intact."""
    student, teacher = classifiers()
    rows = text_rows(16).map(
        lambda row, i: {"inputs_embeds": np.zeros((7, 16), np.float32)}, with_indices=True
    )
    rows = rows.remove_columns("input_ids")

    class Poisoned:
        identity: dict[str, str] = {"fingerprint": "x"}
        columns = ("inputs_embeds",)
        calls = 0

        def __call__(self, batch: Any) -> TeacherSignal:
            Poisoned.calls += 1
            logits = torch.zeros(len(batch["inputs_embeds"]), 4)
            if Poisoned.calls == 4:  # the first is the pre-flight check
                logits[1] = float("nan")
            return TeacherSignal({"logits": logits})

    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, save_strategy="steps", save_steps=1),
        teacher=Poisoned(),
        train_dataset=rows,
    )
    order: list[int] = []
    sampler = trainer._get_train_sampler
    trainer._get_train_sampler = lambda *a: order_sampler(sampler(*a), order)  # type: ignore[method-assign]
    with pytest.raises(
        FloatingPointError, match=r"distillation loss is nan at step 3, rows \[.*\]"
    ) as caught:
        trainer.train()
    assert str(order[8:12]) in str(caught.value)
    checkpoint = tmp_path / "checkpoint-2"
    weights = AutoModelForSequenceClassification.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in weights.items())


def order_sampler(sampler: Any, order: list[int]) -> list[int]:
    """The sampler's order, kept."""
    order[:] = list(sampler)
    return order


def test_wrong_arguments_class(tmp_path: Path) -> None:
    """Trainer's own arguments are refused with the name of ours."""
    from transformers import TrainingArguments

    student, teacher = classifiers()
    with pytest.raises(ValueError, match="DistillationArguments"):
        DistillationTrainer(student, TrainingArguments(output_dir=str(tmp_path)), teacher=teacher)  # type: ignore


def test_student_keeps_its_dropout(tmp_path: Path) -> None:
    """Trap 22: putting the teacher in evaluation mode leaves the student's dropout alive."""
    student, teacher = classifiers()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    modes = []
    student.register_forward_hook(lambda m, i, o: modes.append(all(x.training for x in m.modules())))
    trainer = DistillationTrainer(
        student, arguments(tmp_path, max_steps=2), teacher=teacher, train_dataset=text_rows()
    )
    trainer.train()
    assert modes[-2:] == [True, True]
