"""A student whose last layer teaches exits at the layers before it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_kd import DistillationTrainer, cli
from hf_kd.config import parse
from hf_kd.fusing import Fusion
from hf_kd.layer_maps import layer_stacks
from hf_kd.results import Results
from hf_kd.teachers import DeeperTeacher

from .heads import HEADS, Collator, models, oracle, rows_of
from .test_caching import classifier, texts  # noqa: F401
from .test_gradient import assert_same, step
from .test_selves import lora
from .test_teachers import batch_of
from .test_trainer import arguments, classifiers, text_rows

# Encoders, decoders, both, images; heads that pool, and heads of two outputs.
NAMES = ["single-label", "causal-lm", "seq2seq-lm", "image", "question-answering", "token", "masked-lm"]


def ended(student: nn.Module, layers: int) -> nn.Module:
    """The same model without the layers after the first few."""
    short = copy.deepcopy(student)
    (stack,) = (one for one in layer_stacks(short) if not one.inner)
    modules: Any = short.get_submodule(stack.path)
    del modules[layers:]
    return short


def expected(name: str, student: nn.Module, rows: list[Any], alpha: float) -> tuple[float, dict[str, Any]]:
    """The oracle's value and gradient: labels teach the whole model, and it the one that ends early."""
    head = HEADS[name]
    value, grads = torch.zeros((), dtype=torch.float64), {}
    if alpha < 1:
        value, grads = oracle(head, student, student, rows, alpha=0.0)
    kd, theirs = oracle(head, ended(student, 1), copy.deepcopy(student), rows, alpha=1.0)
    names = [n for n, _ in student.named_parameters()]
    mixed = {n: (1 - alpha) * grads.get(n, 0.0) + alpha * theirs.get(n, 0.0) for n in names}
    wide = {n: torch.zeros_like(p) + mixed[n] for n, p in student.named_parameters()}
    return float((1 - alpha) * value + alpha * kd), wide


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_a_model_that_ends_at_the_exit(name: str, tmp_path: Path) -> None:
    """Traps 3, 11, 15: against two models in float64; language models fused, layers checkpointed too."""
    head = HEADS[name]
    student, _ = models(head)
    rows = rows_of(head, 8, seed=3)
    value, grads = expected(name, student, rows, 0.4)
    options: dict[str, Any] = {"self_teacher": "deeper", "exit_layers": [0], "alpha": 0.4}
    for accumulation in (1, 4) if name in ("single-label", "causal-lm") else (2,):
        if accumulation == 4:
            options |= {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            }
        loss, ours = step(
            tmp_path, head, student, None, rows, gradient_accumulation_steps=accumulation, **options
        )
        assert loss == pytest.approx(value, rel=1e-6)
        assert_same(ours, grads, head.tolerance)


def test_dense_and_fused_agree_at_the_ends_of_alpha(tmp_path: Path) -> None:
    """Trap 2: without labels the last layer is not trained, and keeps its place in the graph (trap 17)."""
    head, rows = HEADS["causal-lm"], rows_of(HEADS["causal-lm"], 4)
    student, _ = models(head)
    grads = expected("causal-lm", student, rows, 1.0)[1]
    for fused in ("on", "off"):
        options: dict[str, Any] = {"self_teacher": "deeper", "exit_layers": [0], "alpha": 1.0, "fused": fused}
        ours = step(tmp_path, head, student, None, rows, **options)[1]
        assert_same(ours, grads, head.tolerance)
    last = [n for n in grads if ".layers.1." in n]
    assert last and all(float(grads[n].abs().max()) == 0.0 for n in last)


def test_evaluation_compares_exits_with_the_last_layer(tmp_path: Path) -> None:
    """Trap 24: the task loss is the whole model's, the KL the mean over exits, dense and fused."""
    head, rows = HEADS["causal-lm"], rows_of(HEADS["causal-lm"], 5)
    student, _ = models(head)
    loss, _ = oracle(head, student, student, rows, alpha=0.0)
    kl, _ = oracle(head, ended(student, 1), student, rows, alpha=1.0, temperature=1.0)
    for fused in ("on", "off"):
        args = arguments(
            tmp_path, self_teacher="deeper", exit_layers=[-2], fused=fused, remove_unused_columns=False,
            prediction_loss_only=fused == "on", per_device_eval_batch_size=2,
        )  # fmt: skip
        trainer = DistillationTrainer(student, args, eval_dataset=rows, data_collator=Collator(head))
        metrics = trainer.evaluate()
        assert isinstance(trainer.fusion_for(Collator(head)(rows)), Fusion) == (fused == "on")
        assert metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-9)
        assert metrics["eval_kl"] == pytest.approx(float(kl), rel=1e-9)


def test_exits_learn_without_labels_and_the_student_is_left_as_it_was(tmp_path: Path) -> None:
    """Traps 2, 22: no labels, dropout on; hooks and stand-ins are gone afterwards."""
    student, _ = classifiers()
    for parameter in student.parameters():
        parameter.data.normal_(0.0, 0.25)
    rows = text_rows().remove_columns("labels")
    args = arguments(tmp_path, self_teacher="deeper", alpha=1.0, num_train_epochs=4, learning_rate=3e-3)
    layers = [type(m) for m in student.modules()]
    trainer = DistillationTrainer(student, args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.5 * before
    assert [type(m) for m in student.modules()] == layers
    assert not any(m._forward_hooks for m in student.modules())
    assert isinstance(trainer.teacher, DeeperTeacher) and trainer.teacher.layers == [0]


def test_what_is_no_exit_is_refused(tmp_path: Path) -> None:
    """A model that does more than pass on what a layer returns would make exits of another model."""
    student, _ = classifiers()
    pooled = student.bert.pooler.forward
    calls: list[int] = []

    def impure(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return pooled(hidden + len(calls))

    teacher = DeeperTeacher(student, ("logits",))
    student.bert.pooler.forward = impure  # type: ignore[method-assign]
    batch = {k: torch.tensor(v) for k, v in text_rows(2)[:].items() if k != "labels"}
    with pytest.raises(ValueError, match="an exit after the last layer.*gives other logits than the model"):
        teacher(batch)


def test_the_command_line_and_yaml(texts: Path, tmp_path: Path) -> None:  # noqa: F811
    """A run from flags writes its options; run again from them it asks for the same exits."""
    out = tmp_path / "out"
    own = ["--self_teacher", "deeper", "--exit_layers", "-2", "--max_steps", "1", "--control", "false"]
    command = classifier(texts, *own, "--output_dir", out)
    command[command.index("--student_layers") + 1] = "2"
    assert cli.main(["distill", *command]) == 0
    assert Results.read(out / "results.json").training[0]["loss_kd"] > 0
    args = parse(["--config", str(out / "distillation.yaml")])[1]
    assert args.self_teacher == "deeper" and args.exit_layers == [-2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_layers": [1]}, r"exit_layers=\[1\] must be layers 0 to 0 of the student's 2"),
        ({"exit_layers": [-3]}, "must be layers 0 to 0"),
        ({"self_teacher": "ema", "exit_layers": [0]}, r"exit_layers=\[0\] with self_teacher='ema'"),
        ({"self_teacher_dropout": True}, "self_teacher_dropout=True with self_teacher='deeper'"),
        ({"hidden_weight": 1.0}, "hidden_weight=1 compares layers, but teacher=DeeperTeacher"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        args = arguments(tmp_path, **{"self_teacher": "deeper", **options})
        DistillationTrainer(classifiers()[0], args, train_dataset=text_rows())


def test_adapters_are_part_of_an_exit() -> None:
    """A LoRA student's exit is that of the merged model."""
    student, batch = lora(), batch_of()
    teacher = DeeperTeacher(student, ("logits",), layers=[0])
    teacher(batch)  # an exit after the last layer is the model
    merged = copy.deepcopy(student).merge_and_unload()
    with torch.no_grad(), teacher.watching() as seen:
        student(**batch)
        (logits,) = (student(**batch).logits for _ in teacher.exits(seen))
        torch.testing.assert_close(logits, ended(merged, 1)(**batch).logits)
        assert not torch.allclose(logits, merged(**batch).logits)
