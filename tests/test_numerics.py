"""Numbers at their ends: a finite loss and a finite gradient, or an error that says what is wrong.

Rows hold every pair of a student's and a teacher's kind (extreme, one-hot, uniform, masked), so that one call
covers them all. In fp16 a gradient may only overflow where its value, computed in fp32, is out of fp16's
range: that is what a loss scaler is for, and what training without one refuses.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kd import DistillationTrainer, TeacherSignal
from hf_kd.losses.divergences import DIVERGENCES, log_probs, resolve_divergence
from hf_kd.losses.features import ATTENTION_LOSSES, HIDDEN_LOSSES
from hf_kd.losses.fused import FUSED_DIVERGENCES, fused_distillation
from hf_kd.losses.logits import LOGIT_LOSSES, unlike_log_probs
from hf_kd.losses.needs import needs_of
from hf_kd.losses.tiles import DenseTeacher, Head
from hf_kd.losses.vectors import VECTOR_LOSSES
from hf_kd.spikes import SpikeWatch

from .heads import HEADS, Collator, models, rows_of
from .test_feature_losses import related
from .test_trainer import arguments, classifiers, text_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FP16_MAX = torch.finfo(torch.float16).max
CASES: list[tuple[str, dict[str, float]]] = [
    *[(name, {}) for name in {**DIVERGENCES, **LOGIT_LOSSES}],
    ("jsd", {"beta": 0.001}),
    ("skew_kl", {"lam": 0.001}),
    ("skew_reverse_kl", {"lam": 0.001}),
    ("alpha_beta", {"a": 0.01, "b": 0.01}),
    ("alpha_beta", {"a": 10.0, "b": 10.0}),
    ("alpha_beta", {"a": 0.0, "b": 0.0}),
]
every_loss = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}{list(o.values())}" for n, o in CASES]
)


def kinds(classes: int, seed: int) -> dict[str, Tensor]:
    """One row of logits of each kind, `[classes]`."""
    noise = torch.randn(classes, generator=torch.Generator().manual_seed(seed))
    one_hot, masked = torch.zeros(classes), noise.clone()
    one_hot[seed % classes] = 1e4
    if classes > 2:
        masked[-(classes // 3) :] = -torch.inf
    return {
        "plain": noise,
        "extreme": noise.sign() * 1e4,
        "spread": noise * 1e4,
        "one-hot": one_hot,
        "uniform": torch.zeros(classes),
        "masked": masked,
    }


def pairs(classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every kind of student with every kind of teacher, `[36, classes]` twice."""
    students, teachers = kinds(classes, 1).values(), kinds(classes, 2).values()
    rows = list(itertools.product(students, teachers))
    return torch.stack([z for z, _ in rows]).to(dtype), torch.stack([t for _, t in rows]).to(dtype)


def loss_and_gradient(
    name: str, options: dict[str, float], z: Tensor, t: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As the objective has it: mean over rows, times `T^2`."""
    divergence, z = resolve_divergence(name, options), z.clone().requires_grad_()
    context = {
        "labels": torch.zeros(len(z), dtype=torch.long),
        "student_logits": z,
        "teacher_logits": t,
        "temperature": temperature,
        "teacher_temperature": temperature,
    }
    make = unlike_log_probs if name == "uld" else log_probs
    asked = {key: context[key] for key in needs_of(divergence).reads}
    values = divergence(*make(z, t, temperature=temperature, teacher_temperature=temperature), **asked)
    loss = values.sum() / max(len(z), 1) * temperature**2
    loss.backward()
    assert z.grad is not None
    return loss.detach(), z.grad


def check(loss: Tensor, grad: Tensor, exact: Tensor | None) -> None:
    assert loss.isfinite()
    lost = ~grad.isfinite()
    if not lost.any():
        return
    assert grad.dtype == torch.float16 and exact is not None
    assert (exact[lost].abs() > 0.99 * FP16_MAX).all() and exact.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1e-6, 0.05, 1.0, 1e3, 1e6])
def test_every_loss_on_every_pair(
    name: str, options: dict[str, float], dtype: torch.dtype, temperature: float
) -> None:
    """Extreme, one-hot, uniform, masked; bf16, fp16, fp32; temperatures from 1e-6 to 1e6; 2 and 7 classes."""
    for classes in (2, 7):
        z, t = pairs(classes, dtype)
        loss, grad = loss_and_gradient(name, options, z, t, temperature)
        half = dtype == torch.float16 and not grad.isfinite().all()
        check(
            loss,
            grad,
            loss_and_gradient(name, options, z.float(), t.float(), temperature)[1] if half else None,
        )


@every_loss
def test_one_row_and_none(name: str, options: dict[str, float]) -> None:
    """A batch of one, and one of nothing: an exact 0 with the gradient's shape."""
    z, t = (x[7:8] for x in pairs(7, torch.float32))
    if name == "dist":
        with pytest.raises(ValueError, match="has 1 supervised row. Set per_device_train_batch_size to 2"):
            loss_and_gradient(name, options, z, t, 2.0)
    else:
        loss, grad = loss_and_gradient(name, options, z, t, 2.0)
        check(loss, grad, None)
    loss, grad = loss_and_gradient(name, options, z[:0], t[:0], 2.0)
    assert loss == 0 and grad.shape == (0, 7)


@every_loss
def test_a_vocabulary_of_one(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="fewer than two classes, and their softmax says nothing"):
        loss_and_gradient(name, options, torch.zeros(3, 1), torch.zeros(3, 1), 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", sorted(FUSED_DIVERGENCES))
def test_the_fused_loss(dtype: torch.dtype, divergence: str) -> None:
    """Logits of 1e4 and more through the head, against all kinds of teachers; every temperature."""
    classes, width = 9, 4
    teachers = torch.stack(list(kinds(classes, 2).values())).to(dtype)
    g = torch.Generator().manual_seed(0)
    for size, temperature in itertools.product((1.0, 100.0), (1e-3, 1.0, 1e3)):
        weight = torch.randn(classes, width, generator=g) * size
        # The student's best class is one that the teacher has too (docs/reliability.md has the limit).
        weight[-(classes // 3) :] *= 0.01
        weight = weight.to(dtype).requires_grad_()
        hidden = (torch.randn(len(teachers), width, generator=g) * size).to(dtype).requires_grad_()
        labels = torch.tensor([0, 1, -100, 2, 3, 0])
        out = fused_distillation(
            hidden, Head(weight), teacher=DenseTeacher(teachers), labels=labels, divergence=divergence,
            temperature=temperature, kd_weights=torch.ones(len(teachers)),
        )  # fmt: skip
        out.loss.backward()
        for leaf in (hidden, weight):
            assert leaf.grad is not None
            # fp16 holds nothing above 65504: T^2 times a logit of 1e4 is more.
            outside = dtype == torch.float16 and size * temperature >= 100.0
            assert out.loss.isfinite() and (outside or leaf.grad.isfinite().all())


LAYERS = {
    **{f"hidden-{name}": loss for name, loss in HIDDEN_LOSSES.items()},
    **{f"attention-{name}": loss for name, loss in ATTENTION_LOSSES.items()},
    **{f"vectors-{name}": loss for name, loss in VECTOR_LOSSES.items()},
}


@pytest.mark.parametrize("name", [*LAYERS, "relation"])
def test_losses_on_layers(name: str) -> None:
    """Hidden states of nothing, of one value, of 1e4; attentions that see one key only."""
    shapes = {"zero": 0.0, "tiny": 1e-12, "one": 1.0, "large": 1e4}
    g = torch.Generator().manual_seed(0)
    for (_, a), (_, b), flat in itertools.product(shapes.items(), shapes.items(), (False, True)):
        student = (torch.ones(2, 2, 3, 3) if flat else torch.randn(2, 2, 3, 3, generator=g)) * a
        teacher = torch.randn(2, 2, 3, 3, generator=g) * b
        if name.startswith("attention"):
            mask = torch.tensor([[0.0, -torch.inf, -torch.inf]]).expand(3, 3)
            student, teacher = student + mask, teacher + mask
        student.requires_grad_()
        if name == "relation":
            values = related(student.reshape(2, 6, 3), teacher.reshape(2, 6, 3), heads=1)
        else:
            values = LAYERS[name](student, teacher)
        values.mean().backward()
        assert values.isfinite().all() and student.grad is not None and student.grad.isfinite().all()


def language_models(vocabulary: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8,
        "max_position_embeddings": 16, "pad_token_id": 0,
    }  # fmt: skip
    return tuple(
        LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=8, **shape)) for _ in range(2)
    )


def train(folder: Path, models: tuple[nn.Module, Any], rows: Any, **options: Any) -> DistillationTrainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "max_steps": 3,
        "remove_unused_columns": False,
    }
    trainer = DistillationTrainer(
        models[0], arguments(folder, **{**defaults, **options}), teacher=models[1], train_dataset=rows
    )
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.student.parameters())
    assert all(float(row["loss"]) == float(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    return trainer


def test_a_sequence_of_one_and_micro_batches_of_nothing(tmp_path: Path) -> None:
    """A row of one token predicts nothing: an empty micro-batch between others, and steps of only such."""
    long = [3, 4, 5, 6]
    rows = [{"input_ids": ids, "labels": ids} for ids in (long, [3], long, [4])]
    for fused in ("on", "off"):
        trainer = train(
            tmp_path, language_models(11), rows, gradient_accumulation_steps=2, bf16=True, fused=fused
        )
        assert trainer.state.log_history[0]["loss"] > 0
    rows = [{"input_ids": long, "labels": long}, *[{"input_ids": [3], "labels": [3]}] * 3]
    before = language_models(11)
    trainer = train(tmp_path, before, rows, weight_decay=0.0)
    assert 0.0 in [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_vocabulary_of_one_is_refused_before_training(tmp_path: Path) -> None:
    rows = [{"input_ids": [0, 0, 0], "labels": [0, 0, 0]}] * 2
    with pytest.raises(ValueError, match="fewer than two classes"):
        train(tmp_path, language_models(1), rows, fused="off")
    with pytest.raises(ValueError, match="two classes"):
        train(tmp_path, language_models(1), rows, fused="on")


class Stressed:
    """A teacher whose logits are of one kind, by row."""

    columns = ("input_ids",)
    identity = {"name": "stressed"}

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, batch: Any) -> TeacherSignal:
        rows = len(batch["input_ids"])
        if self.kind == "none left":
            logits = torch.full((rows, 4), -torch.inf)
        else:
            logits = kinds(4, 2)[self.kind].expand(rows, 4)
        return TeacherSignal({"logits": logits})


@pytest.mark.parametrize("kind", [*kinds(4, 2), "none left"])
def test_training_with_each_kind_of_teacher(tmp_path: Path, kind: str) -> None:
    """bf16, at temperatures of both ends; a teacher that allows no class is an error that names it."""
    for temperature in (1e-3, 1e3):
        student, _ = classifiers()
        models = (student, Stressed(kind))
        if kind == "none left":
            with pytest.raises(ValueError, match="its logits on the first batch are NaN or infinite"):
                train(tmp_path, models, text_rows(8), temperature=temperature, bf16=True)
        else:
            train(tmp_path, models, text_rows(8), temperature=temperature, bf16=True, max_steps=1)


def test_an_fp16_gradient_out_of_range_is_never_applied() -> None:
    """What `check` lets pass above ends here: with the number of the step, or dropped by the loss scaler."""
    z, t = pairs(7, torch.float16)
    _, grad = loss_and_gradient("tvd", {}, z[:1], t[:1], 1e6)
    norm = float(grad.float().norm())
    assert norm == float("inf")
    with pytest.raises(FloatingPointError, match="norm is inf at step 3.*train in bf16 or fp32"):
        SpikeWatch().judge(step=3, norm=norm, kl=1.0)
    assert SpikeWatch().judge(step=3, norm=norm, kl=1.0, scaled=True) is None


def test_a_student_and_a_teacher_without_a_class_in_common(tmp_path: Path) -> None:
    """Each masks what the other allows: no distribution is left, and training says where."""
    student, _ = classifiers()
    rows = text_rows(8)

    class Half(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            out = self.inner(input_ids=input_ids, attention_mask=attention_mask)
            out.logits = out.logits.masked_fill(torch.arange(4) < 2, -torch.inf)
            return out

    class Other(Stressed):
        def __call__(self, batch: Any) -> TeacherSignal:
            logits = torch.zeros(len(batch["input_ids"]), 4)
            logits[:, 2:] = -torch.inf
            return TeacherSignal({"logits": logits})

    trainer = DistillationTrainer(
        Half(student),
        arguments(tmp_path, alpha=1.0, max_steps=1),
        teacher=Other("masked"),
        task="sequence-classification",
        train_dataset=Dataset.from_dict({k: rows[k] for k in ("input_ids", "attention_mask", "labels")}),
    )
    with pytest.raises(FloatingPointError, match=r"The distillation loss is nan at step 1, rows \["):
        trainer.train()


def test_the_fused_loss_ends_where_the_teacher_masks_what_the_student_is_sure_of(tmp_path: Path) -> None:
    """Its best class is masked and the rest lies more than 88 T below it: named, and no weight changed."""
    head = HEADS["causal-lm"]
    student, _ = models(head, dtype=torch.float32)
    student.lm_head.weight.data *= 1e4
    own = copy.deepcopy(student)

    class Masking(Stressed):
        columns = ("input_ids", "attention_mask")

        def __call__(self, batch: Any) -> TeacherSignal:
            with torch.no_grad():
                seen = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            best = torch.nn.functional.one_hot(seen.argmax(-1), seen.shape[-1]).bool()
            return TeacherSignal({"logits": torch.zeros_like(seen).masked_fill(best, -torch.inf)})

    before = student.lm_head.weight.detach().clone()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, alpha=1.0, max_steps=1, temperature=1.0, fused="on"),
        teacher=Masking("masked"),
        task="causal-lm",
        train_dataset=rows_of(head, 8),
        data_collator=Collator(head),
    )
    with pytest.raises(FloatingPointError, match=r"The distillation loss is nan at step 1, rows \["):
        trainer.train()
    assert torch.equal(student.lm_head.weight, before)
