"""Choosing the target: rules against float64 references, and what a run makes of them."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kd import DistillationTrainer, SparseSignal, TeacherSignal
from hf_kd.settling import (
    NON_TOP_MASS,
    Settled,
    auto_temperature,
    calibration_error,
    fit_temperature,
    non_top_mass,
)
from hf_kd.targets import Target, confidence

from .heads import HEADS, Collator, forward_row, models, rows_of
from .test_gradient import assert_same, step
from .test_trainer import arguments, classifiers, text_rows


def random(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_swap_makes_the_label_the_likeliest() -> None:
    """Values of the two classes change places, all others and right rows stay; nothing is edited in place."""
    logits, labels = random(50, 6), torch.randint(-1, 6, (50,), generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    swapped = Target("swap").logits(logits, labels)
    assert torch.equal(logits, before)
    for row, new, label in zip(logits, swapped, labels.tolist(), strict=True):
        expected, top = row.clone(), int(row.argmax())
        if label >= 0:
            expected[label], expected[top] = row[top], row[label]
        assert torch.equal(new, expected)
    assert Target("swap").logits(logits, None) is logits


def test_drop_and_weights() -> None:
    """Positions where the teacher contradicts the label weigh 0; certainty is one minus relative entropy."""
    logits = random(50, 6)
    labels = torch.where(torch.arange(50) % 2 == 0, logits.argmax(-1), (logits.argmax(-1) + 1) % 6)
    p = logits.softmax(-1)
    sure = 1 + (p * p.log()).sum(-1) / math.log(6)
    torch.testing.assert_close(confidence(logits), sure, rtol=1e-9, atol=1e-12)
    weights = Target("drop", "entropy").weights(logits, labels)
    expected = torch.where(torch.arange(50) % 2 == 0, 1 - sure, 0.0)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    masked = torch.cat([logits, torch.full((50, 3), float("-inf"))], -1)
    torch.testing.assert_close(confidence(masked), sure, rtol=1e-9, atol=1e-12)


def test_fitted_temperature_is_the_minimum() -> None:
    """Logits that are too sure by a factor of 3 get it back; the neighbours of the optimum are worse."""
    g = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(4000, 5, dtype=torch.float64, generator=g)
    labels = torch.multinomial(true.softmax(-1), 1, generator=g).squeeze(-1)
    found = fit_temperature(3 * true, labels)
    assert found == pytest.approx(3.0, rel=0.1)
    best = F.cross_entropy(3 * true / found, labels)
    assert all(F.cross_entropy(3 * true / (found * f), labels) > best for f in (0.98, 1.02))
    assert calibration_error(3 * true, labels) > 5 * calibration_error(3 * true / found, labels)
    sure = 10 * F.one_hot(labels, 5).double()
    assert fit_temperature(sure, labels) == pytest.approx(0.05)


def test_calibration_error_by_hand() -> None:
    """Two bins: four answers at 0.9, of which half are right, and one at 0.6 that is right."""
    p = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 0])
    assert calibration_error(p.log(), labels) == pytest.approx((4 * 0.4 + 0.4) / 5)


def test_auto_temperature_hits_its_mass() -> None:
    """The stated mass, from the smallest temperature that reaches it, between 1 and 10."""
    logits = 4 * random(100, 10)
    found = auto_temperature(logits)
    assert 1 < found < 10 and non_top_mass(logits, found) == pytest.approx(NON_TOP_MASS, abs=1e-9)
    assert auto_temperature(logits / 100) == 1.0
    assert auto_temperature(logits * 100) == 10.0


def oracle(
    student: Any,
    teacher: Any,
    rows: list[Any],
    *,
    target: str,
    weighting: str,
    alpha: float,
    temperature: float,
) -> dict[str, Tensor]:
    """Gradient of the objective, row by row."""
    student = copy.deepcopy(student).double()
    teacher = copy.deepcopy(teacher).double()
    total: Any = 0.0
    for row in rows:
        z = forward_row(student, row).logits[0]
        with torch.no_grad():
            t = forward_row(teacher, row).logits[0].clone()
        label, weight = row["labels"], 1.0
        top = int(t.argmax())
        if top != label and target == "swap":
            t[label], t[top] = t[top].clone(), t[label].clone()
        p = t.softmax(-1)
        sure = float(1 + (p * p.log()).sum() / math.log(len(p)))
        weight *= {"none": 1.0, "confidence": sure, "entropy": 1 - sure}[weighting]
        if top != label and target == "drop":
            weight = 0.0
        soft = (t / temperature).softmax(-1)
        kl = (soft * (soft.log() - (z / temperature).log_softmax(-1))).sum()
        total = total + alpha * weight * temperature**2 * kl
        total = total - (1 - alpha) * z.log_softmax(-1)[label]
    (total / len(rows)).backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad
        for n, p in student.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize(
    "target,weighting", [("swap", "none"), ("drop", "none"), ("none", "entropy"), ("swap", "confidence")]
)
def test_gradient_of_a_step(tmp_path: Path, target: str, weighting: str) -> None:
    """Traps 15, 18: a sum over the count of positions, so accumulation changes nothing; against float64."""
    head = HEADS["single-label"]
    student, teacher = models(head)
    rows = rows_of(head, 8)
    expected = oracle(student, teacher, rows, target=target, weighting=weighting, alpha=0.5, temperature=2.0)
    for accumulation in (1, 4):
        options: dict[str, Any] = {"target_correction": target, "kd_weighting": weighting, "temperature": 2.0}
        options["gradient_accumulation_steps"] = accumulation
        assert_same(step(tmp_path, head, student, teacher, rows, **options)[1], expected, 1e-5)
    plain = step(tmp_path, head, student, teacher, rows, temperature=2.0)[1]
    with pytest.raises(AssertionError):
        assert_same(plain, expected, 1e-3)


def test_auto_and_calibration_are_in_force_logged_and_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The teacher's temperature is T times the calibration; a resumed run keeps what was measured."""
    student, teacher = classifiers()
    with torch.no_grad():
        teacher.classifier.weight *= 40
    options: dict[str, Any] = {"temperature": "auto", "teacher_calibration": True, "save_strategy": "steps"}
    args = arguments(tmp_path, save_steps=2, **options)
    trainer = DistillationTrainer(
        student, args, teacher=teacher, train_dataset=text_rows(), eval_dataset=text_rows(32, 1)
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "temperature='auto' takes" in caplog.text and "divided by" in caplog.text
    batch = {k: torch.tensor(v) for k, v in text_rows(32, 1).to_dict().items()}
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = teacher(**batch).logits
    calibration = fit_temperature(logits, labels)
    mix = trainer.mix()
    assert mix.temperature == pytest.approx(auto_temperature(logits / calibration), rel=1e-4)
    assert mix.teacher_temperature == pytest.approx(mix.temperature * calibration, rel=1e-4)
    saved = json.loads((tmp_path / "checkpoint-2" / "target.json").read_text())
    assert saved["calibration"] == pytest.approx(calibration, rel=1e-4)
    again = DistillationTrainer(
        student, args, teacher=teacher, train_dataset=text_rows(), eval_dataset=text_rows(8, 5)
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.settled == trainer.settled == Settled(**saved)


def test_calibrated_teacher_folds_into_the_fused_loss(tmp_path: Path) -> None:
    """Fused and dense take the same step; corrections are computed densely, or refused with fused='on'."""
    head = HEADS["causal-lm"]
    student, teacher = models(head)
    rows = rows_of(head, 8)
    options: dict[str, Any] = {
        "teacher_calibration": True,
        "trainer_options": {"eval_dataset": rows_of(head, 8, seed=2)},
    }
    found = [step(tmp_path, head, student, teacher, rows, fused=mode, **options)[1] for mode in ("on", "off")]
    assert_same(found[0], found[1])
    with pytest.raises(AssertionError):
        assert_same(step(tmp_path, head, student, teacher, rows, fused="on")[1], found[0], 1e-3)
    with pytest.raises(ValueError, match="fused='on' is not possible: target_correction"):
        step(tmp_path, head, student, teacher, rows, fused="on", kd_weighting="entropy")
    step(tmp_path, head, student, teacher, rows, fused="auto", kd_weighting="entropy")


class Sparse:
    """A teacher that shows two of four classes."""

    columns = ("input_ids",)
    identity = {"name": "sparse", "fingerprint": "s"}

    def __call__(self, batch: Any) -> TeacherSignal:
        rows = len(batch["input_ids"])
        log_probs = torch.tensor([0.5, 0.3]).log().expand(rows, 2)
        signal = SparseSignal(
            torch.tensor([[0, 1]]).expand(rows, 2), log_probs, torch.full((rows,), math.log(0.2))
        )
        return TeacherSignal(sparse=signal)


@pytest.mark.parametrize(
    "options",
    [
        {"target_correction": "swap"},
        {"kd_weighting": "entropy"},
        {"teacher_calibration": True},
        {"temperature": "auto"},
    ],
)
def test_refused_by_name_with_a_sparse_teacher(tmp_path: Path, options: dict[str, Any]) -> None:
    """Trap 12: a few entries have no logits to correct, soften or calibrate."""
    student, _ = classifiers()
    args = arguments(tmp_path, **{"temperature": 1.0, **options})
    trainer = DistillationTrainer(
        student, args, teacher=Sparse(), train_dataset=text_rows(), eval_dataset=text_rows()
    )
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*sparse"):
        trainer.train()


def test_refused_without_what_they_read(tmp_path: Path) -> None:
    """No labels, no validation data, or a head without classes."""
    student, teacher = classifiers()
    unlabelled = text_rows().remove_columns("labels")
    for options, data, match in (
        (
            {"target_correction": "swap", "alpha": 1.0},
            unlabelled,
            "target_correction='swap'.*this data has not",
        ),
        ({"teacher_calibration": True}, text_rows(), "eval_dataset is None"),
    ):
        with pytest.raises(ValueError, match=match):
            DistillationTrainer(
                student, arguments(tmp_path, **options), teacher=teacher, train_dataset=data
            ).train()
    head = HEADS["regression"]
    with pytest.raises(ValueError, match="kd_weighting='entropy' reads a distribution"):
        step(tmp_path, head, *models(head), rows_of(head, 4), collator=Collator(head), kd_weighting="entropy")
    assert np.isfinite(non_top_mass(torch.zeros(2, 3), 1.0))
