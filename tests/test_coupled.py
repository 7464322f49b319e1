"""Heads whose classes are the rows of the batch: image with text, and similarities (trap 13)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel, CLIPModel

from hf_kd import DistillationTrainer, checks

from .heads import HEADS, Collator, Head, Row, _caption, bert, clip, rows_of
from .test_gradient import assert_same, step
from .test_trainer import arguments

PAIRS = Head(lambda w: CLIPModel(clip(w)), _caption, {}, "image-text", lambda out, row: ([], [], 1.0))


def pair(head: Head, widths: tuple[int, int] = (16, 24)) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher in float64."""
    torch.manual_seed(0)
    student, teacher = (head.build(width).double() for width in widths)
    return student, teacher


def naive_kl(z: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Row sums of the forward KL, from probabilities."""
    p, q = (t / temperature).softmax(-1), (z / temperature).softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def gradient(loss: Tensor, student: nn.Module) -> dict[str, Tensor]:
    """The gradient by name."""
    grads = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(student.named_parameters(), grads, strict=True)
    }


def test_image_text_equals_oracle(tmp_path: Path) -> None:
    """Each image ranks the texts and each text the images; means over both."""
    student, teacher = pair(PAIRS)
    rows = rows_of(PAIRS, 4)
    loss, grads = step(tmp_path, PAIRS, student, teacher, rows)
    batch = Collator(PAIRS)(rows)
    z = student(**batch).logits_per_image
    with torch.no_grad():
        t = teacher(**batch).logits_per_image
    target = torch.arange(4)
    task = (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2
    kd = (naive_kl(z, t, 2.0).mean() + naive_kl(z.T, t.T, 2.0).mean()) / 2
    expected = 0.5 * task + 0.5 * 4.0 * kd
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert_same(grads, gradient(expected, student))


def sentences() -> Head:
    """Headless encoders compared by the similarities of a batch."""
    base = HEADS["embedding"]
    return Head(
        lambda w: BertModel(bert(w)), base.row, base.pad, "embedding-similarity", base.positions, alpha=1.0
    )


def test_similarity_equals_oracle(tmp_path: Path) -> None:
    """Widths may differ: what is compared is each row's softmax over the other rows."""
    head = sentences()
    student, teacher = pair(head)
    rows = rows_of(head, 5)

    def similarity(model: nn.Module) -> Tensor:
        vectors = [
            model(**{k: torch.tensor(v)[None] for k, v in row.items()}).last_hidden_state.mean(1)
            for row in rows
        ]
        unit = torch.cat(vectors) / torch.cat(vectors).norm(dim=-1, keepdim=True)
        values = unit @ unit.T / 0.05
        return torch.stack([torch.cat([values[i, :i], values[i, i + 1 :]]) for i in range(len(rows))])

    loss, grads = step(tmp_path, head, student, teacher, rows)
    with torch.no_grad():
        target = similarity(teacher)
    expected = 4.0 * naive_kl(similarity(student), target, 2.0).mean()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert_same(grads, gradient(expected, student))


@pytest.mark.parametrize("head", [PAIRS, sentences()], ids=["image-text", "similarity"])
def test_batch_of_one_is_refused(tmp_path: Path, head: Head) -> None:
    """Trap 13: one row has nothing to be compared with; the message names the option."""
    student, teacher = pair(head)
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        step(tmp_path, head, student, teacher, rows_of(head, 1))


def test_dependence_on_the_micro_batch_is_said(tmp_path: Path) -> None:
    """Trap 13: accumulation changes these losses, and the checks say so; other heads get no such warning."""

    def warnings(head: Head, rows: list[Row], **options: Any) -> str:
        student, teacher = pair(head)
        made = DistillationTrainer(
            student, arguments(tmp_path, remove_unused_columns=False, gradient_accumulation_steps=2,
            **options), teacher=teacher, task=head.task, train_dataset=rows, data_collator=Collator(head),
        )  # fmt: skip
        return " ".join(checks.inspect(made).warnings)

    assert "micro-batch" in warnings(PAIRS, rows_of(PAIRS, 8))
    assert "micro-batch" not in warnings(HEADS["image"], rows_of(HEADS["image"], 8))
