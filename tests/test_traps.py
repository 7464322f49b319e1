"""Traps that need a whole trainer to be seen, each beside the naive version that falls into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_kd import DistillationTrainer

from .heads import HEADS, VOCAB, Collator, Head, Row, bert, models, rows_of
from .test_gradient import Gradients, step
from .test_trainer import arguments, classifiers, text_rows


class CirculatingTrainer(Trainer):
    """The distillation trainer of many tutorials: the head's own loss and a KL per micro-batch."""

    teacher: nn.Module
    alpha, temperature = 0.5, 2.0

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        outputs = model(**inputs)
        with torch.no_grad():
            logits = self.teacher(**inputs).logits
        log_q = F.log_softmax(outputs.logits / self.temperature, -1)
        kl = F.kl_div(log_q, F.softmax(logits / self.temperature, -1), reduction="batchmean")
        return (1 - self.alpha) * outputs.loss + self.alpha * self.temperature**2 * kl


def naive_step(folder: Path, head: Head, rows: list[Row], accumulation: int, size: int) -> Tensor:
    """The gradient of one step of the circulating trainer, as one vector."""
    student, teacher = models(head)
    gradients = Gradients()
    trainer = CirculatingTrainer(
        student,
        TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=Collator(head),
        callbacks=[gradients],
    )
    trainer.teacher = teacher.eval()
    trainer.train()
    return vector(gradients.grads)


def vector(grads: dict[str, Tensor]) -> Tensor:
    """All gradients in one."""
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def our_step(folder: Path, head: Head, rows: list[Row], accumulation: int) -> Tensor:
    """The same of the library."""
    student, teacher = models(head)
    return vector(step(folder, head, student, teacher, rows, gradient_accumulation_steps=accumulation)[1])


def test_accumulation_multiplies_the_gradient(tmp_path: Path) -> None:
    """Traps 15, 16, counter-example: four micro-batches of a classifier give four times the gradient."""
    head = HEADS["single-label"]
    rows = rows_of(head, 8)
    naive = [naive_step(tmp_path, head, rows, accumulation, 8 // accumulation) for accumulation in (1, 4)]
    torch.testing.assert_close(naive[1], 4 * naive[0], rtol=1e-4, atol=1e-5)
    ours = [our_step(tmp_path, head, rows, accumulation) for accumulation in (1, 4)]
    torch.testing.assert_close(*ours)
    torch.testing.assert_close(ours[0], naive[0], rtol=1e-4, atol=1e-5)  # where nothing can go wrong


def test_scaled_and_unscaled_terms(tmp_path: Path) -> None:
    """Traps 3, 16, 18, counter-example: more micro-batches also turn a language model's gradient."""
    head = HEADS["causal-lm"]
    rows = rows_of(head, 8)
    naive = [naive_step(tmp_path, head, rows, accumulation, 8 // accumulation) for accumulation in (1, 4)]
    assert F.cosine_similarity(*naive, dim=0) < 0.999
    assert naive[1].norm() / naive[0].norm() > 2
    ours = [our_step(tmp_path, head, rows, accumulation) for accumulation in (1, 4)]
    torch.testing.assert_close(*ours)


def test_columns_that_only_the_teacher_reads(tmp_path: Path) -> None:
    """Trap 20, counter-example: Trainer keeps the student's columns, and starves the teacher in silence."""
    student = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCAB, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=4)
    )
    _, teacher = classifiers()
    rows = text_rows()
    options = arguments(tmp_path)
    naive = Trainer(student, options, train_dataset=rows)
    assert "token_type_ids" not in next(iter(naive.get_train_dataloader()))
    ours = DistillationTrainer(student, options, teacher=teacher, train_dataset=rows)
    assert "token_type_ids" in next(iter(ours.get_train_dataloader()))


def test_best_model(tmp_path: Path) -> None:
    """Trap 24, counter-example: chosen on the task loss; the mix prefers the one most like the teacher."""
    torch.manual_seed(0)
    student, teacher = (BertForSequenceClassification(bert(width, num_labels=4)) for width in (16, 24))
    teacher.classifier.bias.data[:] = torch.tensor([-3.0, 0.0, 0.0, 3.0])  # against all labels
    rows = text_rows().map(lambda row: {"labels": 0})
    trainer = DistillationTrainer(
        student,
        arguments(
            tmp_path,
            alpha=0.95,
            num_train_epochs=3,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
        ),
        teacher=teacher,
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    task = [log["eval_loss"] for log in logs]
    mixed = [0.05 * log["eval_loss"] + 0.95 * 4 * log["eval_kl"] for log in logs]
    assert task.index(min(task)) == 0
    assert mixed.index(min(mixed)) == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(task[0], rel=1e-5)


def test_evaluation_knows_neither_weight_nor_temperature(tmp_path: Path) -> None:
    """Trap 24: the same models are as good at any alpha and any temperature."""
    found = []
    for options in ({"alpha": 0.1, "temperature": 1.0}, {"alpha": 0.9, "temperature": 8.0}):
        student, teacher = classifiers()
        trainer = DistillationTrainer(
            student, arguments(tmp_path, **options), teacher=teacher, eval_dataset=text_rows()
        )
        metrics = trainer.evaluate()
        found.append([metrics[f"eval_{name}"] for name in ("loss", "kl", "agreement", "teacher_entropy")])
    assert found[0] == found[1]
