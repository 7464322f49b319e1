"""The trainer without logits: when it applies, what it says when not, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from hf_kd import DistillationTrainer
from hf_kd.fusing import Fusion, find_fusion

from .heads import HEADS, Collator, models, oracle, rows_of
from .test_checks import lm_rows, lms, tokenizer
from .test_gradient import assert_same, step
from .test_trainer import arguments

LANGUAGE = ["masked-lm", "causal-lm", "seq2seq-lm", "speech-seq2seq", "image-text-to-text"]


def trainer(name: str, folder: Path, **options: Any) -> DistillationTrainer:
    """A trainer of a language model."""
    head = HEADS[name]
    student, teacher = models(head)
    extra = options.pop("extra", {})
    return DistillationTrainer(
        student, arguments(folder, remove_unused_columns=False, per_device_eval_batch_size=3, **options),
        teacher=teacher, train_dataset=rows_of(head, 4), eval_dataset=rows_of(head, 7),
        data_collator=Collator(head), task=head.task, **extra,
    )  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGE)
def test_no_logits_are_made(tmp_path: Path, name: str) -> None:
    """Neither model's output layer runs, in training or evaluation; the numbers are the dense path's."""
    made = trainer(name, tmp_path, fused="on", max_steps=1)
    calls: list[str] = []
    for role, model in (("student", made.student), ("teacher", made.teacher.model)):
        layer = model.get_output_embeddings()
        layer.register_forward_hook(
            lambda m, i, o, role=role: calls.append(role) if o.shape[-1] > 1 else None
        )
    made.train()
    probes = len(calls)
    fused = made.evaluate()
    batch = next(iter(made.get_train_dataloader()))
    made.compute_loss(made.model, batch)
    assert len(calls) == probes
    dense = trainer(name, tmp_path, fused="off")
    dense.student.load_state_dict(made.student.state_dict())
    expected = dense.evaluate()
    for key in ("eval_loss", "eval_kl", "eval_agreement", "eval_teacher_entropy"):
        assert fused[key] == pytest.approx(expected[key], rel=1e-6)
    assert isinstance(made._fusion, Fusion)
    assert not isinstance(dense._fusion, Fusion)


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("name", ["masked-lm", "causal-lm", "seq2seq-lm"])
def test_same_gradient(tmp_path: Path, name: str, fused: str) -> None:
    """Fused and dense give the float64 oracle's gradient, ragged rows and accumulation included."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 8)
    _, grads = step(tmp_path, head, student, teacher, rows, fused=fused, gradient_accumulation_steps=4)
    assert_same(grads, oracle(head, student, teacher, rows)[1])


def test_supervise_all(tmp_path: Path) -> None:
    """Positions without a label can be distilled; fused and dense agree in loss, gradient and evaluation."""
    head = HEADS["masked-lm"]
    rows = rows_of(head, 4)
    results = []
    for fused in ("on", "off"):
        student, teacher = models(head)
        results.append(step(tmp_path, head, student, teacher, rows, fused=fused, supervise="all"))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_same(*(grads for _, grads in results))
    scores = [
        trainer("masked-lm", tmp_path, fused=fused, supervise="all").evaluate() for fused in ("on", "off")
    ]
    assert scores[0]["eval_kl"] == pytest.approx(scores[1]["eval_kl"], rel=1e-6)


def test_padded_vocabularies(tmp_path: Path) -> None:
    """Trap 30: trimming, and the teacher mass that it drops, are the same without logits."""
    same = tokenizer(["<u>", *"abcdefghi"])
    scores = []
    for fused in ("on", "off"):
        made = DistillationTrainer(
            args=arguments(tmp_path, fused=fused), **lms(12, 16), processing_class=same,
            teacher_processing_class=same, eval_dataset=lm_rows(),
        )  # fmt: skip
        scores.append(made.evaluate())
    for key in ("eval_kl", "eval_teacher_mass_dropped", "eval_agreement"):
        assert scores[0][key] == pytest.approx(scores[1][key], rel=1e-5)
    assert scores[0]["eval_teacher_mass_dropped"] > 0.1


def test_what_falls_back_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An output layer that can't be seen through is computed densely, with the reason; "on" refuses."""

    def odd(made: DistillationTrainer) -> DistillationTrainer:
        forward = made.student.forward

        def sigmoid_logits(**kwargs: Any) -> Any:
            out = forward(**kwargs)
            out["logits"] = torch.sigmoid(out["logits"])
            return out

        made.student.forward = sigmoid_logits  # type: ignore[method-assign]
        return made

    odd(trainer("causal-lm", tmp_path, max_steps=2)).train()
    lines = [r.getMessage() for r in caplog.records if "full logits" in r.getMessage()]
    assert len(lines) == 1
    assert "neither a scale, a soft-cap nor a bias" in lines[0]
    with pytest.raises(ValueError, match="fused='on' is not possible.*Set fused='auto'"):
        odd(trainer("causal-lm", tmp_path, fused="on")).train()


@pytest.mark.parametrize(
    "options,reason",
    [
        ({"divergence": "logit_mse"}, "whole rows"),
        (
            {"extra": {"compute_loss_func": lambda o, y, num_items_in_batch: o.logits.sum() * 0}},
            "compute_loss_func",
        ),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, "torch_compile"),
    ],
)
def test_options_that_need_logits(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    """What reads logits gets them, or is refused with fused="on"."""
    with pytest.raises(ValueError, match=f"fused='on' is not possible: .*{reason}"):
        trainer("causal-lm", tmp_path, fused="on", **options).train()


def test_frozen_head(tmp_path: Path) -> None:
    """A student whose output layer is frozen trains below it, with the oracle's gradient."""
    head = HEADS["causal-lm"]
    student, teacher = models(head)
    layer = student.get_output_embeddings()
    assert isinstance(layer, nn.Linear)
    layer.weight.requires_grad_(False)
    rows = rows_of(head, 4)
    _, grads = step(tmp_path, head, student, teacher, rows, fused="on")
    assert "lm_head.weight" not in grads
    assert_same(grads, oracle(head, student, teacher, rows)[1])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_compiled_body(tmp_path: Path, accumulation: int) -> None:
    """`torch.compile` of what is below the output layer leaves the fused loss's gradient as it is."""
    head = HEADS["causal-lm"]
    student, teacher = models(head)
    student.model.compile(backend="aot_eager")  # type: ignore[operator, union-attr]
    rows = rows_of(head, 8)
    _, grads = step(
        tmp_path, head, student, teacher, rows, fused="on", gradient_accumulation_steps=accumulation
    )
    assert_same(grads, oracle(head, *models(head), rows)[1])


def test_sharded_by_fsdp_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP 1 has the output layer in pieces when the loss is computed: dense, or an error that says so."""
    made = trainer("causal-lm", tmp_path, fused="on")
    monkeypatch.setattr(made, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="fused='on' is not possible: FSDP 1 .*in pieces"):
        made.compute_loss(made.model, next(iter(made.get_train_dataloader())))


class _Whole(torch.autograd.Function):
    """The identity; calls a function before the gradient passes."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, function: Any) -> torch.Tensor:
        ctx.function = function
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.function()
        return gradients[0], None


class Pieces:
    """A layer whose weight is there in its forward, and once a gradient has reached its output."""

    def __init__(self, layer: nn.Module) -> None:
        self.weight: Any = layer.weight
        self.data, self.gathered = self.weight.data.clone(), 0
        self.keep: Any = self.weight.expand_as(self.weight)  # its accumulator expects the whole
        self.scatter()
        layer.register_forward_pre_hook(lambda *_: self.gather())
        layer.register_forward_hook(self.after_forward)
        self.weight.register_post_accumulate_grad_hook(lambda _: self.scatter())

    def gather(self) -> None:
        self.weight.data = self.data
        self.gathered += 1

    def scatter(self) -> None:
        self.weight.data = self.data.new_empty(0)

    def after_forward(self, _: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        self.scatter()
        return _Whole.apply(output, self.gather) if output.requires_grad else output


def test_a_head_that_is_whole_only_in_its_forward(tmp_path: Path) -> None:
    """Gathered once in the forward and once for the gradient, as by ZeRO-3; evaluation agrees too."""
    made = trainer("causal-lm", tmp_path, fused="on")
    batch = next(iter(made.get_train_dataloader()))
    made.compute_loss(made.model, batch).backward()
    wanted, scores = {n: p.grad for n, p in made.model.named_parameters()}, made.evaluate()
    made.model.zero_grad()
    assert isinstance(made._fusion, Fusion)
    made._fusion = replace(made._fusion, inside=True)
    pieces = Pieces(made.student.get_output_embeddings())
    loss = made.compute_loss(made.model, batch)
    assert pieces.gathered == 1
    loss.backward()
    assert pieces.gathered == 2
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter.grad, wanted[name]), name
    again = made.evaluate()
    for key in ("eval_loss", "eval_kl", "eval_agreement", "eval_teacher_entropy"):
        assert again[key] == pytest.approx(scores[key], rel=1e-9)


def test_zero_3_with_an_adapted_head(tmp_path: Path) -> None:
    """An output layer in several layers is not whole in one forward: full logits, with the reason."""
    made = trainer("causal-lm", tmp_path)
    model = peft.get_peft_model(made.student, peft.LoraConfig(target_modules=["lm_head"]))
    batch = next(iter(made.get_train_dataloader()))
    given = {"task": made.task, "objective": made.objective, "student": model, "teacher": None}
    given |= {"batch": batch, "inputs": made.pair.student_inputs(batch)}
    given |= {"chunk_bytes": 1 << 20, "obstacle": None}
    assert isinstance(find_fusion("auto", **given), Fusion)
    found = find_fusion("auto", **given, inside=True)
    assert isinstance(found, str) and "one by one" in found
