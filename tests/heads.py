"""Tiny pairs of models for every head, rows for them, and a float64 oracle of the objective.

The oracle is written row by row and class by class, from the definitions, and shares no code with the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

Row = dict[str, Any]
VOCAB = 37


@dataclass(frozen=True)
class Head:
    """One head: how to build a model of some width, and how its rows look."""

    build: Callable[[int], nn.Module]
    row: Callable[[torch.Generator], Row]
    pad: dict[str, int]
    task: str
    positions: Callable[[Any, Row], tuple[list[Tensor], list[Any], float]]
    kind: str = "classes"


def bert(width: int, **kwargs: Any) -> BertConfig:
    """A BERT of two layers without dropout."""
    return BertConfig(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * width,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **kwargs,
    )


def llama(width: int) -> LlamaConfig:
    """A Llama of two layers."""
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=2 * width, max_position_embeddings=64, pad_token_id=0,
    )


def t5(width: int) -> T5Config:
    """A T5 of two layers without dropout; its start token is its padding token."""
    return T5Config(
        vocab_size=VOCAB, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )


def vit(width: int) -> ViTConfig:
    """A ViT on 8 x 8 images without dropout."""
    return ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=4,
    )


def _ids(g: torch.Generator, low: int = 3, high: int = 11) -> list[int]:
    length = int(torch.randint(low, high, (1,), generator=g))
    return torch.randint(3, VOCAB, (length,), generator=g).tolist()


def _text(label: Callable[[list[int], torch.Generator], Any]) -> Callable[[torch.Generator], Row]:
    def row(g: torch.Generator) -> Row:
        ids = _ids(g)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label(ids, g)}

    return row


def _integer(g: torch.Generator, high: int) -> int:
    return int(torch.randint(0, high, (1,), generator=g))


def _some(ids: list[int], g: torch.Generator, high: int, share: float = 0.5) -> list[int]:
    keep = torch.rand(len(ids), generator=g) < share
    return [_integer(g, high) if k else -100 for k in keep.tolist()]


def _image(g: torch.Generator) -> Row:
    return {"pixel_values": torch.randn(1, 8, 8, generator=g), "labels": _integer(g, 4)}


def _span(g: torch.Generator) -> Row:
    ids = _ids(g, 6, 12)
    types = [0, 0, 0] + [1] * (len(ids) - 3)
    start = 3 + _integer(g, len(ids) - 3)
    return {
        "input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types,
        "start_positions": start, "end_positions": min(start + _integer(g, 3), len(ids) - 1),
    }


def _choices(g: torch.Generator) -> Row:
    ids = torch.randint(3, VOCAB, (3, 6), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _integer(g, 3)}


def _translation(g: torch.Generator) -> Row:
    ids = _ids(g)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": _ids(g)}


# For the oracle: the [C] logits of every supervised position of one row, their labels, and each one's weight.


def _one(out: Any, row: Row) -> tuple[list[Tensor], list[Any], float]:
    return [out.logits[0]], [row.get("labels", -100)], 1.0


def _tokens(out: Any, row: Row) -> tuple[list[Tensor], list[Any], float]:
    where = [i for i, label in enumerate(row["labels"]) if label != -100]
    return [out.logits[0, i] for i in where], [row["labels"][i] for i in where], 1.0


def _next_tokens(out: Any, row: Row) -> tuple[list[Tensor], list[Any], float]:
    where = [i for i in range(len(row["labels"]) - 1) if row["labels"][i + 1] != -100]
    return [out.logits[0, i] for i in where], [row["labels"][i + 1] for i in where], 1.0


def _pairs(out: Any, row: Row) -> tuple[list[Tensor], list[Any], float]:
    logits = [torch.stack([z, torch.zeros_like(z)]) for z in out.logits[0]]
    return logits, [1 - int(y) for y in row["labels"]], 1.0 / len(logits)


def _ends(out: Any, row: Row) -> tuple[list[Tensor], list[Any], float]:
    allowed = [i for i, kind in enumerate(row["token_type_ids"]) if kind == 1 or i == 0]
    logits = [out.start_logits[0, allowed], out.end_logits[0, allowed]]
    return logits, [allowed.index(row["start_positions"]), allowed.index(row["end_positions"])], 0.5


HEADS: dict[str, Head] = {
    "single-label": Head(
        lambda w: BertForSequenceClassification(bert(w, num_labels=4)),
        _text(lambda ids, g: _integer(g, 4)), {"input_ids": 0, "attention_mask": 0}, "sequence-classification", _one,
    ),
    "multi-label": Head(
        lambda w: BertForSequenceClassification(bert(w, num_labels=3, problem_type="multi_label_classification")),
        _text(lambda ids, g: [float(_integer(g, 2)) for _ in range(3)]),
        {"input_ids": 0, "attention_mask": 0}, "sequence-classification", _pairs,
    ),
    "regression": Head(
        lambda w: BertForSequenceClassification(bert(w, num_labels=1)),
        _text(lambda ids, g: float(torch.randn(1, generator=g))),
        {"input_ids": 0, "attention_mask": 0}, "sequence-classification", _one, "regression",
    ),
    "token": Head(
        lambda w: BertForTokenClassification(bert(w, num_labels=5)),
        _text(lambda ids, g: _some(ids, g, 5)),
        {"input_ids": 0, "attention_mask": 0, "labels": -100}, "token-classification", _tokens,
    ),
    "image": Head(lambda w: ViTForImageClassification(vit(w)), _image, {}, "image-classification", _one),
    "masked-lm": Head(
        lambda w: BertForMaskedLM(bert(w)), _text(lambda ids, g: _some(ids, g, VOCAB, 0.4)),
        {"input_ids": 0, "attention_mask": 0, "labels": -100}, "masked-lm", _tokens,
    ),
    "causal-lm": Head(
        lambda w: LlamaForCausalLM(llama(w)),
        _text(lambda ids, g: [i if k else -100 for i, k in zip(ids, (torch.rand(len(ids), generator=g) < 0.7).tolist(),
                                                               strict=True)]),
        {"input_ids": 0, "attention_mask": 0, "labels": -100}, "causal-lm", _next_tokens,
    ),
    "seq2seq-lm": Head(
        lambda w: T5ForConditionalGeneration(t5(w)), _translation,
        {"input_ids": 0, "attention_mask": 0, "labels": -100}, "seq2seq-lm", _tokens,
    ),
    "question-answering": Head(
        lambda w: BertForQuestionAnswering(bert(w)), _span,
        {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0}, "question-answering", _ends,
    ),
    "multiple-choice": Head(lambda w: BertForMultipleChoice(bert(w)), _choices, {}, "multiple-choice", _one),
    "next-sentence": Head(
        lambda w: BertForNextSentencePrediction(bert(w)), _text(lambda ids, g: _integer(g, 2)),
        {"input_ids": 0, "attention_mask": 0}, "next-sentence", _one,
    ),
}


def models(head: Head, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A student and a wider teacher, with weights large enough for KLs that matter."""
    torch.manual_seed(seed)
    pair = head.build(16), head.build(24)
    for model in pair:
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.25)
        model.to(dtype)
    return pair


def rows_of(head: Head, count: int, *, seed: int = 0) -> list[Row]:
    """Some rows of ragged lengths."""
    g = torch.Generator().manual_seed(seed)
    return [head.row(g) for _ in range(count)]


class Collator:
    """Pad each column with its own value, on either side, to the longest row or further."""

    def __init__(self, head: Head, *, extra: int = 0, left: bool = False, dtype: torch.dtype = torch.float64) -> None:
        """Keep the padding values."""
        self.head, self.extra, self.left, self.dtype = head, extra, left, dtype

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """Make a batch."""
        batch = {}
        for name in rows[0]:
            values = [torch.as_tensor(row[name]) for row in rows]
            if name in self.head.pad:
                longest = max(len(v) for v in values) + self.extra
                sides = [(longest - len(v), 0) if self.left else (0, longest - len(v)) for v in values]
                values = [F.pad(v, side, value=self.head.pad[name]) for v, side in zip(values, sides, strict=True)]
            stacked = torch.stack(values)
            batch[name] = stacked.to(self.dtype) if stacked.is_floating_point() else stacked
        return batch


def forward_row(model: nn.Module, row: Row) -> Any:
    """One row alone, unpadded, through a model."""
    labels = ("labels", "start_positions", "end_positions")
    inputs = {k: torch.as_tensor(v)[None] for k, v in row.items() if k not in labels}
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, *row["labels"][:-1]]])
    return model(**inputs)


def naive_divergence(name: str, q: Tensor, p: Tensor) -> Tensor:
    """Divergences from their definitions, on probabilities in float64."""
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum()

    m = 0.5 * (p + q)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jeffreys": lambda: 0.5 * (kl(p, q) + kl(q, p)),
        "jsd": lambda: 0.5 * (kl(p, m) + kl(q, m)),
        "skew_kl": lambda: kl(p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": lambda: kl(q, 0.1 * q + 0.9 * p),
        "tvd": lambda: 0.5 * (p - q).abs().sum(),
    }[name]()


def oracle(
    head: Head, student: nn.Module, teacher: nn.Module, rows: list[Row], *, alpha: float = 0.5,
    temperature: float = 2.0, divergence: str = "forward_kl", smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of one step on these rows, each run alone: `(1 - a) task + a T^2 D`, means over positions."""
    task, kd = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    task_weight = kd_weight = 0.0
    for row in rows:
        with torch.no_grad():
            targets, _, _ = head.positions(forward_row(teacher, row), row)
        logits, labels, weight = head.positions(forward_row(student, row), row)
        for z, t, y in zip(logits, targets, labels, strict=True):
            kd_weight += weight
            if head.kind == "regression":
                kd = kd + weight * (z - t).square().sum()
                task = task + weight * (z - y).square().sum()
                task_weight += weight
                continue
            p, q = (t / temperature).softmax(-1), (z / temperature).softmax(-1)
            kd = kd + weight * temperature**2 * naive_divergence(divergence, q, p)
            if y != -100:
                log_q = z.log_softmax(-1)
                task = task - weight * ((1 - smoothing) * log_q[y] + smoothing * log_q.mean())
                task_weight += weight
    loss = (1 - alpha) * task / max(task_weight, 1e-12) + alpha * kd / max(kd_weight, 1e-12)
    names = [n for n, p in student.named_parameters() if p.requires_grad]
    parameters = [p for p in student.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), {n: torch.zeros_like(p) if g is None else g
                           for n, p, g in zip(names, parameters, grads, strict=True)}
