"""Losses on layers through the trainer: which places, which positions, and one gradient whatever the path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_kd import DistillationTrainer, TeacherSignal, init_student
from hf_kd.features import Features
from hf_kd.projection import Projection

from .heads import HEADS, VOCAB, Collator, Row, bert, forward_row, models, oracle, rows_of
from .test_feature_losses import naive_hidden, naive_relation
from .test_gradient import assert_same, step
from .test_projection import Stop
from .test_trainer import arguments, text_rows

WEIGHTS = {
    "hidden_weight": 1.0,
    "attention_weight": 0.5,
    "relation_weight": 2.0,
    "embedding_weight": 0.25,
    "last_hidden_weight": 0.75,
}
# The first layers: Transformers' `hidden_states` has the last ones after the final norm.
MAPS: dict[str, Any] = {
    "single-label": {"0": "1"},
    "causal-lm": {"model.layers.0": "model.layers.0"},
    "seq2seq-lm": {f"{side}.block.0": f"{side}.block.0" for side in ("encoder", "decoder")},
}


def show(model: nn.Module, wanted: bool) -> None:
    """Ask for hidden states and attentions; the stacks of T5 have configs of their own."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config.output_hidden_states = config.output_attentions = wanted


def inside(name: str, model: nn.Module, row: Row, layer: int) -> list[dict[str, Tensor]]:
    """What Transformers itself shows of one row, unpadded: per stack, `[L, ...]` each."""
    model.set_attn_implementation("eager")
    show(model, True)
    try:
        out = forward_row(model, row)
    finally:
        show(model, False)
        model.set_attn_implementation("sdpa")
    if name == "seq2seq-lm":
        found = []
        for side in ("encoder", "decoder"):
            hidden = getattr(out, f"{side}_hidden_states")
            part = getattr(model, side).block[layer].layer[0]
            v = part.SelfAttention.v(part.layer_norm(hidden[layer]))
            attention = getattr(out, f"{side}_attentions")[layer]
            found.append(
                {
                    "in": hidden[0],
                    "out": hidden[layer + 1],
                    "last": hidden[-1],
                    "v": v,
                    "attention": attention,
                }
            )
    else:
        hidden = out.hidden_states
        if name == "causal-lm":
            part = model.model.layers[layer]
            v = part.self_attn.v_proj(part.input_layernorm(hidden[layer]))
        else:
            v = model.bert.encoder.layer[layer].attention.self.value(hidden[layer])
        found = [
            {
                "in": hidden[0],
                "out": hidden[layer + 1],
                "last": hidden[-1],
                "v": v,
                "attention": out.attentions[layer],
            }
        ]
    return [{k: value[0] for k, value in stack.items()} for stack in found]


def naive_row(
    name: str,
    student: list[dict[str, Tensor]],
    teacher: list[dict[str, Tensor]],
    row: Row,
    maps: dict[str, Tensor],
) -> tuple[Tensor, float]:
    """The weighted features of one row, summed over its supervised positions; and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 1.0
    supervised: list[int] | None = None
    if name == "causal-lm":
        supervised = [i - 1 for i, label in enumerate(row["labels"]) if label != -100 and i > 0]
    elif name == "seq2seq-lm":
        supervised = [i for i, label in enumerate(row["labels"]) if label != -100]
    if supervised is not None:
        count = float(len(supervised))
    for k, (s, t) in enumerate(zip(student, teacher, strict=True)):
        length = len(s["in"])
        outer = k == len(student) - 1  # the stack whose positions the head predicts at
        chosen = supervised if supervised is not None and outer else range(length)
        weight = 1.0 if supervised is not None and outer else count / length
        causal = name == "causal-lm" or (name == "seq2seq-lm" and outer)
        share = 1 / len(student)
        for i in chosen:
            keys = range(i + 1) if causal else range(length)
            p, q = (x["attention"][:, i, list(keys)] for x in (t, s))
            relation = naive_relation(s["v"], t["v"], maps["heads"], lambda _, keys=keys: list(keys), i)
            value = (
                WEIGHTS["hidden_weight"]
                * naive_hidden("normalized_mse", s["out"][i] @ maps["hidden"].T, t["out"][i])
                + WEIGHTS["embedding_weight"]
                * naive_hidden("normalized_mse", s["in"][i] @ maps["embedding"].T, t["in"][i])
                + WEIGHTS["attention_weight"] * (p * (p.log() - q.log())).sum(-1).mean()
                + WEIGHTS["relation_weight"] * relation
            )
            total = total + share * weight * value
        if outer:
            for i in chosen:
                cosine = naive_hidden("cosine", s["last"][i] @ maps["last_hidden"].T, t["last"][i])
                total = total + WEIGHTS["last_hidden_weight"] * weight * cosine
    return total, count


def feature_oracle(
    name: str, student: nn.Module, teacher: nn.Module, rows: list[Row], alpha: float
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one step with all features, each row run alone."""
    maps: dict[str, Any] = {
        key: torch.eye(24, 16, dtype=torch.float64, requires_grad=True)
        for key in ("hidden", "embedding", "last_hidden")
    }
    maps["heads"] = 2
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        with torch.no_grad():
            t = inside(name, teacher, row, 1 if name == "single-label" else 0)
        value, number = naive_row(name, inside(name, student, row, 0), t, row, maps)
        total, count = total + value, count + number
    loss = total / count
    mix, grads = oracle(HEADS[name], student, teacher, rows, alpha=alpha)
    parameters = list(student.parameters())
    added = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    for key, grad in zip(grads, added, strict=True):
        grads[key] = grads[key] + (0 if grad is None else grad)
    for key in ("hidden", "embedding", "last_hidden"):
        grads[key] = torch.autograd.grad(loss, maps[key], retain_graph=True)[0]
    return float(mix + loss.detach()), grads


def merged(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our gradients, those of each term's projections added up (the oracle has one for both stacks)."""
    found: dict[str, Tensor] = {}
    for key, grad in grads.items():
        if key.startswith("hf_kd_projection."):
            key = next(k for k in ("last_hidden", "embedding", "hidden") if key.split(".")[1].startswith(k))
            grad = grad + found.get(key, torch.zeros_like(grad))
        found[key] = grad
    return found


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
@pytest.mark.parametrize("name", MAPS)
def test_step_equals_oracle(tmp_path: Path, name: str, accumulation: int) -> None:
    """Traps 15, 16, 18: value and gradient of all terms in float64, ragged rows, whatever the accumulation.

    The causal head takes the fused path; supervised positions are tokens, source tokens and whole rows.
    """
    student, teacher = models(HEADS[name])
    rows = rows_of(HEADS[name], 8, seed=2)
    loss, grads = step(
        tmp_path,
        HEADS[name],
        student,
        teacher,
        rows,
        gradient_accumulation_steps=accumulation,
        layer_map=MAPS[name],
        **WEIGHTS,
    )
    expected, expected_grads = feature_oracle(name, student, teacher, rows, HEADS[name].alpha)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same(merged(grads), expected_grads)


@pytest.mark.parametrize(
    ("name", "left"),
    [("single-label", False), ("causal-lm", False), ("causal-lm", True), ("seq2seq-lm", False)],
)
def test_padding_changes_nothing(tmp_path: Path, name: str, left: bool) -> None:
    """Traps 3, 18: the gradient is that of unpadded rows, attentions and relations included."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 4, seed=2)
    expected = feature_oracle(name, student, teacher, rows, head.alpha)[1]
    # Llama's eager attention is in fp32, in which the least number of fp64 is not one.
    dtype = torch.float32 if left else torch.float64
    student, teacher = student.to(dtype), teacher.to(dtype)
    collator = Collator(head, extra=3, left=left, dtype=dtype)
    _, grads = step(
        tmp_path, head, student, teacher, rows, collator=collator, layer_map=MAPS[name], **WEIGHTS
    )
    assert_same(merged(grads), expected, 1e-5 if left else 5e-7)


@pytest.mark.parametrize("fused", ["on", "off"])
def test_features_alone(tmp_path: Path, fused: str) -> None:
    """Trap 2: at alpha = 0 the teacher is asked for its layers; fused and dense agree."""
    head = HEADS["causal-lm"]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    _, grads = step(
        tmp_path, head, student, teacher, rows, alpha=0.0, fused=fused, layer_map=MAPS["causal-lm"], **WEIGHTS
    )
    assert_same(merged(grads), feature_oracle("causal-lm", student, teacher, rows, 0.0)[1])


def deberta() -> nn.Module:
    """Disentangled attention, whose projections also read positions."""
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=64,
            num_labels=4,
        )
    )


def distilbert() -> nn.Module:
    """Other names for the same things."""
    config = DistilBertConfig(
        vocab_size=VOCAB, dim=16, n_layers=4, n_heads=2, hidden_dim=32, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0, num_labels=4, max_position_embeddings=64,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)


def modernbert() -> nn.Module:
    """One projection to queries, keys and values; local attention in some layers."""
    config = ModernBertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, num_labels=4,
        local_attention=4, global_attn_every_n_layers=2,
    )  # fmt: skip
    return ModernBertForSequenceClassification(config)


def gpt2() -> nn.Module:
    """A joint projection that is not a Linear."""
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=4, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def neox() -> nn.Module:
    """A joint projection whose thirds are interleaved by head."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def deep(name: str, **layers: int) -> Callable[[], nn.Module]:
    """A head of `heads.py` with four layers."""

    def build() -> nn.Module:
        model = HEADS[name].build(16)
        for option, count in layers.items():
            setattr(model.config, option, count)
        return type(model)(model.config)

    return build


COPIES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "bert": ("single-label", deep("single-label", num_hidden_layers=4)),
    "deberta": ("single-label", deberta),
    "distilbert": ("single-label", distilbert),
    "modernbert": ("single-label", modernbert),
    "vit": ("image", deep("image", num_hidden_layers=4)),
    "gpt2": ("causal-lm", gpt2),
    "neox": ("causal-lm", neox),
    "llama": ("causal-lm", deep("causal-lm", num_hidden_layers=4)),
    "t5": ("seq2seq-lm", deep("seq2seq-lm", num_layers=4, num_decoder_layers=4)),
    "whisper": ("speech-seq2seq", deep("speech-seq2seq", encoder_layers=4, decoder_layers=4)),
    "wav2vec2": ("audio", deep("audio", num_hidden_layers=4)),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copied_student_matches_its_teacher(tmp_path: Path, name: str) -> None:
    """Traps 38, 39: every pair of the first layers of a student cut from them is equal at step 0.

    A map that is one off, the naive reading of `hidden_states`, is not.
    """
    head_name, build = COPIES[name]
    head = HEADS[head_name]
    torch.manual_seed(0)
    teacher = build().double()
    # A decoder reads its whole encoder: only its own layers are cut.
    both = {"t5": ("num_layers", "num_decoder_layers"), "whisper": ("encoder_layers", "decoder_layers")}.get(
        name
    )
    student = init_student(teacher, layers={both[0]: range(4), both[1]: [0, 1]} if both else [0, 1])
    student = student.double()
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    rows = rows_of(head, 2)
    student, teacher = student.eval(), teacher.eval()
    trainer = DistillationTrainer(
        student,
        arguments(
            tmp_path,
            alpha=1.0,
            remove_unused_columns=False,
            relations="qq,kk,vv",
            **{k: v for k, v in WEIGHTS.items() if k != "last_hidden_weight"},
        ),
        teacher=teacher,
        task=head.task,
        train_dataset=rows,
        data_collator=Collator(head),
    )
    features, batch = trainer.features, Collator(head)(rows)
    ours = [place for place in features.places if place.term == "hidden"]

    def sums(layer_map: Any) -> dict[str, Tensor]:
        trainer.args.layer_map = layer_map
        chosen = Features(trainer.args, student, trainer.teacher, trainer.task)
        seen = chosen.seen()
        assert seen is not None
        with chosen.ready():
            trainer.pair.dense(student, batch, distil=True, seen=seen)
            return chosen.sums(seen, batch, trainer.task.supervise_batch(batch))

    stacks = {place.student.path.rpartition(".")[0] for place in ours}

    def shifted(by: int) -> dict[str, str]:
        return {f"{stack}.{i}": f"{stack}.{i + by}" for stack in stacks for i in (0, 1)}

    same = sums(shifted(0))
    assert set(same) == {"hidden", "attention", "relation", "embedding"}
    for term, value in same.items():
        assert abs(float(value.detach())) < 1e-12, term
    assert float(sums(shifted(1))["hidden"].detach()) > 1e-9
    for model in (student, teacher):
        assert model.config._attn_implementation == ("eager" if name == "deberta" else "sdpa")


def unseen(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Attention that is computed where nobody sees it, as in a kernel of its own."""
    with torch._C.DisableTorchFunction():
        return sdpa_attention_forward(module, *args, **kwargs)


def test_kernels_that_show_no_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 40: SDPA is seen through, other kernels give way to eager attention, or there is an error.

    The naive loss on what SDPA returns is silently 0.
    """
    head = HEADS["single-label"]
    student, teacher = models(head)
    rows = rows_of(head, 2)
    kernels = []

    class Watch(Collator):
        def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
            kernels.append((student.config._attn_implementation, teacher.config._attn_implementation))
            return super().__call__(rows)

    options = {"collator": Watch(head), "attention_weight": 1.0}
    expected = step(tmp_path, head, student, teacher, rows, **options)
    assert kernels[-1] == ("sdpa", "sdpa")
    for known, ours in ((ALL_ATTENTION_FUNCTIONS, unseen), (ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask)):
        monkeypatch.setitem(known._global_mapping, "unseen", ours)
    for model in (student, teacher):
        model.config._attn_implementation = "unseen"
    loss, grads = step(tmp_path, head, student, teacher, rows, **options)
    assert kernels[-1] == ("eager", "eager")
    assert student.config._attn_implementation == teacher.config._attn_implementation == "unseen"
    assert loss == pytest.approx(expected[0], rel=1e-9)
    assert_same(grads, expected[1])
    monkeypatch.setattr(type(teacher), "set_attn_implementation", lambda self, kernel: None)
    with pytest.raises(ValueError, match="attn_implementation='unseen'"):
        step(tmp_path, head, student, teacher, rows, attention_weight=1.0)
    step(tmp_path, head, student, teacher, rows, hidden_weight=1.0, relation_weight=1.0)  # needs none


def test_other_numbers_of_heads(tmp_path: Path) -> None:
    """Trap 41: attentions of other head counts are refused; relations take them."""
    head = HEADS["single-label"]
    torch.manual_seed(0)
    config = bert(24, num_labels=4)
    config.num_attention_heads = 3
    student, teacher = models(head)[0], BertForSequenceClassification(config).double()
    rows = rows_of(head, 4)
    with pytest.raises(ValueError, match=r"has 2 heads and the teacher's .* 3\. Set attention_weight=0"):
        step(tmp_path, head, student, teacher, rows, attention_weight=1.0)
    with pytest.raises(ValueError, match="relation_heads=3 does not divide the width 16"):
        step(tmp_path, head, student, teacher, rows, relation_weight=1.0, relation_heads=3)
    _, grads = step(tmp_path, head, student, teacher, rows, relation_weight=1.0, relation_heads=4, alpha=0.0)
    assert grads["bert.encoder.layer.1.attention.self.value.weight"].norm() > 0


def test_attention_dropout_is_not_compared(tmp_path: Path) -> None:
    """Attentions are read before dropout: a copied student in train mode has a finite, small loss."""
    head = HEADS["single-label"]
    torch.manual_seed(0)
    config = bert(16, num_labels=4)
    config.attention_probs_dropout_prob = 0.9
    teacher = BertForSequenceClassification(config).double()
    student = copy.deepcopy(teacher)
    loss, _ = step(
        tmp_path,
        head,
        student,
        teacher,
        rows_of(head, 2),
        attention_weight=1.0,
        layer_map={"0": "0"},
        alpha=0.0,
        trainer_options={"compute_loss_func": lambda out, labels, num_items_in_batch: out.logits.sum() * 0},
    )
    assert abs(loss) < 1e-12


@pytest.mark.parametrize("name", ["single-label", "causal-lm"])
def test_gradient_checkpointing(tmp_path: Path, name: str) -> None:
    """Hooks are gone when the backward pass computes layers again; without autograd inside, an error."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    plain = step(tmp_path, head, student, teacher, rows, gradient_accumulation_steps=2, **WEIGHTS)
    again = step(
        tmp_path,
        head,
        student,
        teacher,
        rows,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **WEIGHTS,
    )
    assert again[0] == pytest.approx(plain[0], rel=1e-12)
    assert_same(again[1], plain[1], 1e-12)
    with pytest.raises(ValueError, match="use_reentrant"):
        step(
            tmp_path,
            head,
            student,
            teacher,
            rows,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
            relation_weight=1.0,
        )
    tables = [t for m in student.modules() for t in (m._forward_hooks, m._forward_pre_hooks)]
    hooks = [hook for table in tables for hook in table.values()]
    assert not any(hook.__module__ == "hf_kd.taps" for hook in hooks)


def test_nothing_leaks_into_evaluation(tmp_path: Path) -> None:
    """Trap 23: the same predictions and metrics with and without features; each term is in the log."""
    torch.manual_seed(0)
    student, teacher = (BertForSequenceClassification(bert(w, num_labels=4)) for w in (16, 24))
    seen = []
    for weights in ({}, WEIGHTS):
        trainer = DistillationTrainer(
            copy.deepcopy(student),
            arguments(tmp_path, learning_rate=0.0, max_steps=2, **weights),
            teacher=teacher,
            train_dataset=text_rows(8),
            eval_dataset=text_rows(4, 1),
            compute_metrics=lambda p: {"shape": float(p.predictions.shape == (4, 4))},
        )
        trainer.train()
        metrics = trainer.evaluate()
        seen.append({k: v for k, v in metrics.items() if "second" not in k and "runtime" not in k})
        logged = {key for entry in trainer.state.log_history for key in entry if key.startswith("loss_")}
    assert seen[0] == pytest.approx(seen[1])
    assert seen[1]["eval_shape"] == 1.0
    assert logged == {"loss_task", "loss_kd", *(f"loss_{key.removesuffix('_weight')}" for key in WEIGHTS)}


def test_bf16(tmp_path: Path) -> None:
    """Under autocast the comparison itself is in fp32."""
    torch.manual_seed(0)
    student, teacher = (BertForSequenceClassification(bert(w, num_labels=4)) for w in (16, 24))
    runs = []
    for bf16 in (False, True):
        trainer = DistillationTrainer(
            copy.deepcopy(student),
            arguments(tmp_path, learning_rate=0.0, max_steps=2, bf16=bf16, **WEIGHTS),
            teacher=teacher,
            train_dataset=text_rows(8),
        )
        trainer.train()
        runs.append(trainer.state.log_history[0])
    for key in (k for k in runs[0] if k.startswith("loss_")):
        assert runs[1][key] == pytest.approx(runs[0][key], rel=0.1)


class Silent:
    """A teacher that is not a model."""

    identity = {"fingerprint": "x"}
    columns = ("input_ids",)

    def __call__(self, batch: Any) -> TeacherSignal:
        return TeacherSignal(logits={"logits": torch.zeros(len(batch["input_ids"]), 4)})


def test_refusals(tmp_path: Path) -> None:
    """Who can't be looked into is named, and so is what does not fit."""
    student, teacher = models(HEADS["single-label"])
    rows = rows_of(HEADS["single-label"], 2)

    def refused(match: str, teacher: Any = teacher, student: Any = student, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            step(tmp_path, HEADS["single-label"], student, teacher, rows, **options)

    refused("hidden_weight=1 compares layers, but teacher=Silent", Silent(), hidden_weight=1.0)
    refused("gives the teacher a weight, but teacher=None", None, hidden_weight=1.0, alpha=0.0)
    refused("torch_compile=False", hidden_weight=1.0, torch_compile=True)
    frozen = copy.deepcopy(student)
    frozen.bert.requires_grad_(False)
    refused("embedding_weight=1.0 reaches no parameter of the student", student=frozen, embedding_weight=1.0)
    plain = nn.Linear(2, 2)
    plain.config = student.config  # type: ignore[assignment]
    refused("need a stack of layers, but none of the module lists of Linear", plain, hidden_weight=1.0)
    other = [{**row, "teacher_input_ids": row["input_ids"]} for row in rows]
    with pytest.raises(ValueError, match="the teacher reads other tokens"):
        head = replace(HEADS["single-label"], pad={**HEADS["single-label"].pad, "teacher_input_ids": 0})
        step(tmp_path, head, student, teacher, other, hidden_weight=1.0)


def run(folder: Path, *, steps: int, resume: bool = False, **options: Any) -> DistillationTrainer:
    """Distil a wider classifier into a narrow one."""
    torch.manual_seed(0)
    student, teacher = (BertForSequenceClassification(bert(w, num_labels=4)) for w in (16, 24))
    trainer = DistillationTrainer(
        student,
        arguments(
            folder, num_train_epochs=3, save_strategy="steps", save_steps=1, max_grad_norm=1.0, **options
        ),
        teacher=teacher,
        train_dataset=text_rows(8),
        callbacks=[Stop(steps)],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def test_projections_are_trained_saved_and_resumed(tmp_path: Path) -> None:
    """Trap 26: one per pair of widths that differ; a resumed run is an undisturbed one; none is exported."""
    whole = run(tmp_path / "whole", steps=6, **WEIGHTS)
    names = {name for name in whole.projections}
    assert {name.split("_bert")[0] for name in names} == {"hidden", "embedding", "last_hidden"}
    assert len(names) == 4
    for projection in whole.projections.values():
        assert isinstance(projection, Projection)
        assert not torch.equal(projection.weight, torch.eye(24, 16))
    run(tmp_path / "parts", steps=2, **WEIGHTS)
    resumed = run(tmp_path / "parts", steps=6, resume=True, **WEIGHTS)
    for a, b in zip(
        [*whole.student.parameters(), *whole.projections.parameters()],
        [*resumed.student.parameters(), *resumed.projections.parameters()],
        strict=True,
    ):
        assert torch.equal(a, b)
    assert not any("hf_kd" in name for name, _ in whole.student.named_parameters())
    for folder in (tmp_path / "whole" / "checkpoint-6", tmp_path / "final"):
        whole.save_model(str(tmp_path / "final"))
        loaded, info = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert not any(key.startswith("hf_kd") for key in loaded.config.to_dict())
    assert not (tmp_path / "final" / "projection.safetensors").exists()
    with pytest.raises(ValueError, match="made with other losses on layers or another layer_map"):
        run(tmp_path / "parts", steps=9, resume=True, hidden_weight=1.0)


def test_projections_are_clipped(tmp_path: Path) -> None:
    """Trap 26: the norm that is clipped includes the projections."""
    head = HEADS["single-label"]
    student, teacher = models(head)
    _, grads = step(tmp_path, head, student, teacher, rows_of(head, 4), max_grad_norm=0.01, **WEIGHTS)
    norm = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
    assert any(key.startswith("hf_kd_projection") for key in grads)
    assert norm == pytest.approx(0.01, rel=1e-3)
