"""The gradient of an optimizer step depends on the examples in it and on nothing else (traps 1-3, 15-18)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, TrainerCallback

from hf_kd import DIVERGENCES, DistillationArguments, DistillationTrainer
from hf_kd.losses import LOGIT_LOSSES

from .heads import HEADS, Collator, Head, Row, forward_row, models, oracle, rows_of, vit


class Gradients(TrainerCallback):
    """Keep the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.grads = {
            n.removeprefix("module."): torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters()
            if p.requires_grad
        }


def step(
    folder: Path,
    head: Head,
    student: nn.Module,
    teacher: nn.Module | None,
    rows: list[Row],
    *,
    collator: Collator | None = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[float, dict[str, Tensor]]:
    """One optimizer step over all rows; the logged loss and the gradient. The learning rate is 0."""
    accumulation = options.get("gradient_accumulation_steps", 1)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": -(-len(rows) // accumulation),
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "alpha": head.alpha,
        "temperature": 2.0,
    }
    gradients = Gradients()
    trainer = DistillationTrainer(
        student,
        DistillationArguments(**{**defaults, **options}),
        teacher=teacher,
        task=head.task,
        train_dataset=rows,
        data_collator=collator or Collator(head),
        callbacks=[gradients],
        **(trainer_options or {}),
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.grads


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 5e-7) -> None:
    """Compare whole gradients: the error's norm against the norm."""
    assert ours.keys() == theirs.keys()
    error = sum((ours[n].double() - theirs[n]).square().sum() for n in ours) ** 0.5
    norm = sum(theirs[n].square().sum() for n in theirs) ** 0.5
    assert norm > 1e-6
    assert error / norm < tolerance, f"relative gradient error {error / norm:.2e}"


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
@pytest.mark.parametrize("name", HEADS)
def test_step_equals_oracle(tmp_path: Path, name: str, accumulation: int) -> None:
    """Traps 2, 3, 15, 16, 18: the float64 oracle's value and gradient, ragged rows."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 8, seed=accumulation)
    loss, grads = step(tmp_path, head, student, teacher, rows, gradient_accumulation_steps=accumulation)
    expected, expected_grads = oracle(head, student, teacher, rows)
    assert loss == pytest.approx(float(expected), rel=max(head.tolerance, 1e-6))
    assert_same(grads, expected_grads, head.tolerance)


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"embedding"}))
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_of_alpha(tmp_path: Path, name: str, alpha: float) -> None:
    """Trap 2: one term alone keeps its weight, for every head."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    _, grads = step(tmp_path, head, student, teacher, rows, alpha=alpha, gradient_accumulation_steps=2)
    assert_same(grads, oracle(head, student, teacher, rows, alpha=alpha)[1], head.tolerance)


@pytest.mark.parametrize("alpha", [1e-9, 0.3, 1.0 - 1e-9])
@pytest.mark.parametrize("name", ["single-label", "causal-lm", "multi-label"])
def test_alpha(tmp_path: Path, name: str, alpha: float) -> None:
    """Trap 2: the loss is right, and so continuous, in alpha, both ends included."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    loss, grads = step(tmp_path, head, student, teacher, rows, alpha=alpha)
    expected, expected_grads = oracle(head, student, teacher, rows, alpha=alpha)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert_same(grads, expected_grads, 1e-6)


@pytest.mark.parametrize("divergence", sorted({*DIVERGENCES, *LOGIT_LOSSES} - {"forward_kl"}))
@pytest.mark.parametrize("name", ["single-label", "multi-label", "causal-lm"])
def test_divergences(tmp_path: Path, name: str, divergence: str) -> None:
    """Trap 5: every divergence through the trainer, argument order and what it reads besides included."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    # Its other term compares the rows of a micro-batch.
    options = {"divergence_options": '{"gamma": 0}'} if divergence == "dist" else {}
    _, grads = step(
        tmp_path,
        head,
        student,
        teacher,
        rows,
        divergence=divergence,
        gradient_accumulation_steps=2,
        **options,
    )
    assert_same(grads, oracle(head, student, teacher, rows, divergence=divergence)[1])


@pytest.mark.parametrize("name", sorted(name for name in HEADS if "attention_mask" in HEADS[name].pad))
def test_padding(tmp_path: Path, name: str) -> None:
    """More padding on the right changes nothing, for every head that has any."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    collator = Collator(head, extra=10 if name in ("ctc", "audio") else 5)
    _, grads = step(tmp_path, head, student, teacher, rows, collator=collator, gradient_accumulation_steps=2)
    assert_same(grads, oracle(head, student, teacher, rows)[1])


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("name", ["causal-lm", "image-text-to-text"])
def test_left_padding(tmp_path: Path, name: str, extra: int) -> None:
    """Padding on the left changes nothing where positions allow it: no token is predicted from it."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    collator = _WithPositions(head, extra=extra, left=True)
    _, grads = step(tmp_path, head, student, teacher, rows, collator=collator, gradient_accumulation_steps=2)
    assert_same(grads, oracle(head, student, teacher, rows)[1])


class _WithPositions(Collator):
    """Left padding needs explicit positions: Llama counts from the row's first column otherwise."""

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        batch = super().__call__(rows)
        if self.left:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return batch


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"embedding", "regression", "ctc", "detection"}))
def test_label_smoothing(tmp_path: Path, name: str) -> None:
    """Trap 25: label smoothing acts on the task term, with distillation beside it."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    _, grads = step(
        tmp_path, head, student, teacher, rows, label_smoothing_factor=0.2, gradient_accumulation_steps=2
    )
    assert_same(grads, oracle(head, student, teacher, rows, smoothing=0.2)[1])


def test_compute_loss_func(tmp_path: Path) -> None:
    """Trap 25: a custom task loss gets the labels and the step's global count."""
    head = HEADS["single-label"]
    student, teacher = models(head)
    rows = rows_of(head, 8)

    def task_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    _, grads = step(
        tmp_path,
        head,
        student,
        teacher,
        rows,
        gradient_accumulation_steps=4,
        trainer_options={"compute_loss_func": task_loss},
    )
    assert_same(grads, oracle(head, student, teacher, rows)[1])


def test_mixed_labelled_and_unlabelled_rows(tmp_path: Path) -> None:
    """Trap 16: two counts. A row labelled -100 is distilled and does not divide the task loss."""
    head = HEADS["single-label"]
    student, teacher = models(head)
    rows = rows_of(head, 8)
    for row in rows[::3]:
        row["labels"] = -100
    loss, grads = step(tmp_path, head, student, teacher, rows, gradient_accumulation_steps=4)
    expected, expected_grads = oracle(head, student, teacher, rows)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert_same(grads, expected_grads)


@pytest.mark.parametrize("name", HEADS)
def test_unlabelled(tmp_path: Path, name: str) -> None:
    """Trap 2: alpha = 1 runs on data without labels, for every head, and the gradient is not zero."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    for row in rows:
        if student.config.is_encoder_decoder:
            row["decoder_input_ids"] = [student.config.decoder_start_token_id, *row["labels"][:-1]]
        for label in ("labels", "start_positions", "end_positions"):
            row.pop(label, None)
    loss, grads = step(tmp_path, head, student, teacher, rows, alpha=1.0)
    assert loss > 0
    assert sum(g.abs().sum() for g in grads.values()) > 0


def test_soft_targets_of_labels(tmp_path: Path) -> None:
    """Labels that do not exclude each other may be probabilities."""
    head = HEADS["multi-label"]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    for row in rows:
        row["labels"] = [0.3, 0.9, 1.0]
    _, grads = step(tmp_path, head, student, teacher, rows, alpha=0.0)
    out = [forward_row(student, row).logits[0] for row in rows]
    target = torch.tensor(rows[0]["labels"], dtype=torch.float64)
    loss = nn.functional.binary_cross_entropy_with_logits(torch.stack(out), target.expand(4, 3))
    expected = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    names = [n for n, _ in student.named_parameters()]
    zeros = {n: torch.zeros_like(p) for n, p in student.named_parameters()}
    assert_same(grads, {n: zeros[n] if g is None else g for n, g in zip(names, expected, strict=True)})


def test_micro_batch_without_supervision(tmp_path: Path) -> None:
    """Trap 17: a micro-batch with every label masked contributes an exact zero, not NaN."""
    head = HEADS["token"]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    for row in rows[2:]:
        row["labels"] = [-100] * len(row["labels"])
    _, grads = step(tmp_path, head, student, teacher, rows, gradient_accumulation_steps=4)
    assert_same(grads, oracle(head, student, teacher, rows)[1])


def test_equal_models_have_no_gradient(tmp_path: Path) -> None:
    """A student equal to its teacher has loss 0 and gradient 0 at alpha = 1."""
    head = HEADS["causal-lm"]
    _, teacher = models(head)
    student = head.build(24).double()
    student.load_state_dict(teacher.state_dict())
    loss, grads = step(tmp_path, head, student, teacher, rows_of(head, 4), alpha=1.0)
    assert abs(loss) < 1e-12
    assert max(g.abs().max() for g in grads.values()) < 1e-12


def test_naive_normalisation_fails(tmp_path: Path) -> None:
    """Traps 15, 16, 18, counter-example: a mean per micro-batch is about 4 times off."""
    head = HEADS["causal-lm"]
    student, teacher = models(head)
    rows = rows_of(head, 8, seed=1)
    total = {n: torch.zeros_like(p) for n, p in student.named_parameters()}
    for start in range(0, 8, 2):
        _, part = oracle(head, student, teacher, rows[start : start + 2])
        total = {n: total[n] + part[n] for n in total}
    expected = oracle(head, student, teacher, rows)[1]
    with pytest.raises(AssertionError, match="relative gradient error"):
        assert_same(total, expected)
    with pytest.raises(AssertionError, match="relative gradient error"):
        assert_same({n: g / 4 for n, g in total.items()}, expected, 1e-3)


@pytest.mark.parametrize("name", ["single-label", "token", "image", "masked-lm", "causal-lm", "seq2seq-lm"])
def test_gradient_checkpointing(tmp_path: Path, name: str) -> None:
    """Recomputed activations give the same gradient."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 8)
    _, grads = step(
        tmp_path,
        head,
        student,
        teacher,
        rows,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert_same(grads, oracle(head, student, teacher, rows)[1])


@pytest.mark.parametrize("name", ["single-label", "token", "image", "masked-lm", "causal-lm", "seq2seq-lm"])
def test_bf16_autocast(tmp_path: Path, name: str) -> None:
    """Under bf16 autocast: accumulation 4 as accumulation 1 (3 %), and both near float64's gradient (5 %)."""
    head = HEADS[name]
    rows = rows_of(head, 8)
    results = []
    for accumulation in (1, 4):
        student, teacher = models(head, dtype=torch.float32)
        results.append(
            step(
                tmp_path,
                head,
                student,
                teacher,
                rows,
                collator=Collator(head, dtype=torch.float32),
                gradient_accumulation_steps=accumulation,
                bf16=True,
            )[1]
        )
    student, teacher = models(head)
    expected = oracle(head, student, teacher, rows)[1]
    for grads in results:
        assert_same(grads, expected, 5e-2)
    assert_same(results[1], {n: g.double() for n, g in results[0].items()}, 3e-2)


def test_lora_student(tmp_path: Path) -> None:
    """Adapters alone get gradients, the same ones at any accumulation as their float64 oracle."""
    head = HEADS["causal-lm"]
    base, teacher = models(head)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    student = peft.get_peft_model(base, config).double()
    rows = rows_of(head, 8)
    _, grads = step(tmp_path, head, student, teacher, rows, gradient_accumulation_steps=4)
    assert grads
    assert all("lora" in name for name in grads)
    assert_same(grads, oracle(head, student, teacher, rows)[1])


def test_compiled_student(tmp_path: Path) -> None:
    """`torch_compile` of the student changes neither loss nor gradient."""
    head = HEADS["image"]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    _, grads = step(
        tmp_path,
        head,
        student,
        teacher,
        rows,
        gradient_accumulation_steps=2,
        torch_compile=True,
        torch_compile_backend="aot_eager",
    )
    expected = oracle(head, student, teacher, rows)[1]
    assert_same({n.removeprefix("_orig_mod."): g for n, g in grads.items()}, expected)


@pytest.mark.parametrize("divergence", ["hard_labels", "forward_kl"])
def test_distillation_token(tmp_path: Path, divergence: str) -> None:
    """DeiT's two heads: labels teach the class token, the teacher the other; evaluation reads their mean."""
    head = HEADS["image"]
    _, teacher = models(head)
    config = DeiTConfig(**{k: v for k, v in vit(16).to_dict().items() if k not in ("model_type", "dtype")})
    torch.manual_seed(1)
    student = DeiTForImageClassificationWithTeacher(config).double()
    for parameter in student.parameters():
        parameter.data.normal_(0.0, 0.25)
    rows = rows_of(head, 4)
    loss, grads = step(
        tmp_path, head, student, teacher, rows, divergence=divergence, gradient_accumulation_steps=2
    )
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        out, t = forward_row(student, row), forward_row(teacher, row).logits[0].detach()
        taught = out.distillation_logits[0]
        if divergence == "hard_labels":
            kd = -taught.log_softmax(-1)[t.argmax()]
        else:
            p, q = (t / 2).softmax(-1), (taught / 2).softmax(-1)
            kd = 4 * (p * (p / q).log()).sum()
        total = total + 0.5 * (kd - out.cls_logits[0].log_softmax(-1)[row["labels"]]) / len(rows)
    assert loss == pytest.approx(float(total), rel=1e-6)
    expected = torch.autograd.grad(total, list(student.parameters()))
    assert_same(grads, {n: g for (n, _), g in zip(student.named_parameters(), expected, strict=True)})

    trainer = DistillationTrainer(
        student,
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True),
        teacher=teacher,
        eval_dataset=rows,
        data_collator=Collator(head),
    )
    found = trainer.predict(rows)
    mean = torch.stack([forward_row(student, row).logits[0] for row in rows]).detach()
    assert torch.allclose(torch.as_tensor(found.predictions), mean)
    labels = torch.tensor([row["labels"] for row in rows])
    expected_loss = nn.functional.cross_entropy(mean, labels)
    assert found.metrics["test_loss"] == pytest.approx(float(expected_loss))
