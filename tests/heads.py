"""Tiny pairs of models for every head, rows for them, and a float64 oracle of the objective.

The oracle is written row by row and class by class, from the definitions, and shares no code with the
library.
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
    BertModel,
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    YolosConfig,
    YolosForObjectDetection,
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
    alpha: float = 0.5
    # Transformers' matching loss cannot run in float64, so that head is compared in float32.
    dtype: torch.dtype = torch.float64
    tolerance: float = 5e-7
    # The task loss of one row where it is not a cross-entropy per position; then `positions` gives no labels.
    row_loss: Callable[[Any, Row, Any], Tensor | None] | None = None


def bert(width: int, **kwargs: Any) -> BertConfig:
    """A BERT of two layers without dropout."""
    return BertConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **kwargs,
    )


def llama(width: int) -> LlamaConfig:
    """A Llama of two layers."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        pad_token_id=0,
    )


def t5(width: int) -> T5Config:
    """A T5 of two layers without dropout; its start token is its padding token."""
    return T5Config(
        vocab_size=VOCAB,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )


def vit(width: int) -> ViTConfig:
    """A ViT on 8 x 8 images without dropout."""
    return ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=4,
    )


def wav2vec2(width: int) -> Wav2Vec2Config:
    """A wav2vec 2.0 of two layers, 10 samples a frame, whose frames know the attention mask; no dropout."""
    none = dict.fromkeys(
        ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout",
         "layerdrop", "mask_time_prob", "mask_feature_prob"), 0.0,
    )  # fmt: skip
    return Wav2Vec2Config(
        vocab_size=9, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 *
        width, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(5, 2), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True, num_labels=4,
        classifier_proj_size=8, pad_token_id=0, **none,
    )  # fmt: skip


def whisper(width: int) -> WhisperConfig:
    """A Whisper of one layer each, 16 frames."""
    return WhisperConfig(
        vocab_size=VOCAB, d_model=width, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width, num_mel_bins=4,
        max_source_positions=8, max_target_positions=32, dropout=0.0, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip


def segformer(width: int) -> SegformerConfig:
    """A SegFormer of two stages: logits at a quarter of the image's resolution."""
    return SegformerConfig(
        num_channels=1, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[width, width],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=width, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip


def clip(width: int) -> CLIPConfig:
    """A CLIP of one layer each."""
    shared = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads":
        2,
        "projection_dim": 8,
    }  # fmt: skip
    text = {"vocab_size": VOCAB, "max_position_embeddings": 32, "eos_token_id": VOCAB - 1, "bos_token_id": 1}
    vision = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    return CLIPConfig(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=8)


def llava(width: int) -> LlavaConfig:
    """A Llava: one image of four patches, token 3 stands for a patch."""
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, num_channels=1,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=llama(width), image_token_index=3)


def yolos(width: int) -> YolosConfig:
    """A YOLOS with five queries and three classes."""
    return YolosConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2 * width,
        image_size=[8, 8], patch_size=4, num_channels=1, num_detection_tokens=5, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def _sound(label: Callable[[torch.Generator], Any]) -> Callable[[torch.Generator], Row]:
    def row(g: torch.Generator) -> Row:
        samples = torch.randn(80 + 10 * _integer(g, 6), generator=g)
        return {
            "input_values": samples,
            "attention_mask": torch.ones(len(samples)).long(),
            "labels": label(g),
        }

    return row


def _segmenter(width: int) -> nn.Module:
    """Without its batch norm, which couples the rows of a micro-batch whatever the loss does."""
    model = SegformerForSemanticSegmentation(segformer(width))
    model.decode_head.batch_norm = nn.Identity()
    return model


def _mel(g: torch.Generator) -> Row:
    return {"input_features": torch.randn(4, 16, generator=g), "labels": _ids(g)}


def _scene(g: torch.Generator) -> Row:
    labels = torch.randint(0, 5, (16, 16), generator=g)
    labels[torch.rand(16, 16, generator=g) < 0.3] = 255
    return {"pixel_values": torch.randn(1, 16, 16, generator=g), "labels": labels}


def _caption(g: torch.Generator) -> Row:
    ids = torch.cat([torch.randint(3, VOCAB - 1, (5,), generator=g), torch.tensor([VOCAB - 1])])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(6).long(),
        "pixel_values": torch.randn(1, 8, 8, generator=g),
    }


def _dialogue(g: torch.Generator) -> Row:
    ids = [3, 3, 3, 3, *(4 + i % (VOCAB - 4) for i in _ids(g))]
    return {
        "input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * 6 + ids[6:],
        "pixel_values": torch.randn(1, 8, 8, generator=g),
    }  # fmt: skip


def _objects(g: torch.Generator) -> Row:
    count = 1 + _integer(g, 3)
    boxes = torch.rand(count, 4, generator=g) * 0.3 + 0.3
    labels = {"class_labels": torch.randint(0, 3, (count,), generator=g), "boxes": boxes}
    return {"pixel_values": torch.randn(1, 8, 8, generator=g), "labels": labels}


def _sentence(g: torch.Generator) -> Row:
    ids = _ids(g)
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}


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
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "token_type_ids": types,
        "start_positions": start,
        "end_positions": min(start + _integer(g, 3), len(ids) - 1),
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


def _frames(out: Any, row: Row) -> tuple[list[Tensor], list[Any], float]:
    return list(out.logits[0]), [-100] * out.logits.shape[1], 1.0


def _ctc_loss(out: Any, row: Row, model: Any) -> Tensor:
    """All alignments by brute force dynamic programming over the extended target, in log space."""
    log_q = out.logits[0].log_softmax(-1)
    extended = [0]
    for token in row["labels"]:
        extended += [token, 0]
    state = [log_q[0, token] if i < 2 else None for i, token in enumerate(extended)]
    for frame in log_q[1:]:
        new: list[Tensor | None] = []
        for i, token in enumerate(extended):
            ways = [state[i], state[i - 1] if i else None]
            if i > 1 and token != 0 and token != extended[i - 2]:
                ways.append(state[i - 2])
            known = [w for w in ways if w is not None]
            new.append(frame[token] + torch.stack(known).logsumexp(0) if known else None)
        state = new
    ends = torch.stack([s for s in state[-2:] if s is not None])
    return -ends.logsumexp(0) / len(row["labels"])


def _pixels(out: Any, row: Row) -> tuple[list[Tensor], list[Any], float]:
    logits = F.interpolate(out.logits, size=(16, 16), mode="bilinear", align_corners=False)[0]
    where = (row["labels"] != 255).nonzero().tolist()
    return [logits[:, i, j] for i, j in where], [int(row["labels"][i, j]) for i, j in where], 1.0


def _queries(out: Any, row: Row) -> tuple[list[Tensor], list[Any], float]:
    return list(out.logits[0]), [-100] * 5, 0.2


def _matching_loss(out: Any, row: Row, model: Any) -> Tensor:
    label = {k: torch.as_tensor(v) for k, v in row["labels"].items()}
    pixels = row["pixel_values"][None]
    return model(pixel_values=pixels, labels=[label]).loss


def _mean_vector(out: Any, row: Row) -> tuple[list[Tensor], list[Any], float]:
    return [out.last_hidden_state[0].mean(0)], [-100], 1.0


HEADS: dict[str, Head] = {
    "single-label": Head(
        lambda w: BertForSequenceClassification(bert(w, num_labels=4)),
        _text(lambda ids, g: _integer(g, 4)),
        {"input_ids": 0, "attention_mask": 0},
        "sequence-classification",
        _one,
    ),
    "multi-label": Head(
        lambda w: BertForSequenceClassification(
            bert(w, num_labels=3, problem_type="multi_label_classification")
        ),
        _text(lambda ids, g: [float(_integer(g, 2)) for _ in range(3)]),
        {"input_ids": 0, "attention_mask": 0},
        "sequence-classification",
        _pairs,
    ),
    "regression": Head(
        lambda w: BertForSequenceClassification(bert(w, num_labels=1)),
        _text(lambda ids, g: float(torch.randn(1, generator=g))),
        {"input_ids": 0, "attention_mask": 0},
        "sequence-classification",
        _one,
        "regression",
    ),
    "token": Head(
        lambda w: BertForTokenClassification(bert(w, num_labels=5)),
        _text(lambda ids, g: _some(ids, g, 5)),
        {"input_ids": 0, "attention_mask": 0, "labels": -100},
        "token-classification",
        _tokens,
    ),
    "image": Head(lambda w: ViTForImageClassification(vit(w)), _image, {}, "image-classification", _one),
    "masked-lm": Head(
        lambda w: BertForMaskedLM(bert(w)),
        _text(lambda ids, g: _some(ids, g, VOCAB, 0.4)),
        {"input_ids": 0, "attention_mask": 0, "labels": -100},
        "masked-lm",
        _tokens,
    ),
    "causal-lm": Head(
        lambda w: LlamaForCausalLM(llama(w)),
        _text(
            lambda ids, g: [
                i if k else -100
                for i, k in zip(ids, (torch.rand(len(ids), generator=g) < 0.7).tolist(), strict=True)
            ]
        ),
        {"input_ids": 0, "attention_mask": 0, "labels": -100},
        "causal-lm",
        _next_tokens,
    ),
    "seq2seq-lm": Head(
        lambda w: T5ForConditionalGeneration(t5(w)),
        _translation,
        {"input_ids": 0, "attention_mask": 0, "labels": -100, "decoder_input_ids": 0},
        "seq2seq-lm",
        _tokens,
    ),
    "question-answering": Head(
        lambda w: BertForQuestionAnswering(bert(w)),
        _span,
        {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0},
        "question-answering",
        _ends,
    ),
    "multiple-choice": Head(lambda w: BertForMultipleChoice(bert(w)), _choices, {}, "multiple-choice", _one),
    "next-sentence": Head(
        lambda w: BertForNextSentencePrediction(bert(w)),
        _text(lambda ids, g: _integer(g, 2)),
        {"input_ids": 0, "attention_mask": 0},
        "next-sentence",
        _one,
    ),
    "ctc": Head(
        lambda w: Wav2Vec2ForCTC(wav2vec2(w)),
        _sound(lambda g: [1 + (i % 8) for i in _ids(g, 1, 4)]),
        {"input_values": 0, "attention_mask": 0, "labels": -100},
        "ctc",
        _frames,
        row_loss=_ctc_loss,
    ),
    "audio": Head(
        lambda w: Wav2Vec2ForSequenceClassification(wav2vec2(w)),
        _sound(lambda g: _integer(g, 4)),
        {"input_values": 0, "attention_mask": 0},
        "audio-classification",
        _one,
    ),
    "speech-seq2seq": Head(
        lambda w: WhisperForConditionalGeneration(whisper(w)),
        _mel,
        {"labels": -100, "decoder_input_ids": 0},
        "speech-seq2seq",
        _tokens,
    ),
    "segmentation": Head(_segmenter, _scene, {}, "semantic-segmentation", _pixels),
    "image-text-to-text": Head(
        lambda w: LlavaForConditionalGeneration(llava(w)),
        _dialogue,
        {"input_ids": 0, "attention_mask": 0, "labels": -100},
        "image-text-to-text",
        _next_tokens,
    ),
    "detection": Head(
        lambda w: YolosForObjectDetection(yolos(w)),
        _objects,
        {},
        "object-detection",
        _queries,
        row_loss=_matching_loss,
        dtype=torch.float32,
        tolerance=1e-4,
    ),
    "embedding": Head(
        lambda w: BertModel(bert(16)),
        _sentence,
        {"input_ids": 0, "attention_mask": 0},
        "embedding",
        _mean_vector,
        "vectors",
        alpha=1.0,
    ),
}


def models(head: Head, *, seed: int = 0, dtype: torch.dtype | None = None) -> tuple[nn.Module, nn.Module]:
    """A student and a wider teacher, with weights large enough for KLs that matter."""
    torch.manual_seed(seed)
    pair = head.build(16), head.build(24)
    for model in pair:
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.25)
        model.to(dtype or head.dtype)
    return pair


def rows_of(head: Head, count: int, *, seed: int = 0) -> list[Row]:
    """Some rows of ragged lengths."""
    g = torch.Generator().manual_seed(seed)
    return [head.row(g) for _ in range(count)]


class Collator:
    """Pad each column with its own value, on either side, to the longest row or further."""

    def __init__(
        self, head: Head, *, extra: int = 0, left: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """Keep the padding values."""
        self.head, self.extra, self.left, self.dtype = head, extra, left, dtype or head.dtype

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """Make a batch."""
        batch = {}
        for name in rows[0]:
            values = [
                row[name] if isinstance(row[name], dict) else torch.as_tensor(row[name]) for row in rows
            ]
            if name in self.head.pad:
                longest = max(len(v) for v in values) + self.extra
                sides = [(longest - len(v), 0) if self.left else (0, longest - len(v)) for v in values]
                values = [
                    F.pad(v, side, value=self.head.pad[name]) for v, side in zip(values, sides, strict=True)
                ]
            if isinstance(rows[0][name], dict):  # annotations of objects
                batch[name] = [row[name] for row in rows]
                continue
            stacked = torch.stack(values)
            batch[name] = stacked.to(self.dtype) if stacked.is_floating_point() else stacked
        return batch


def forward_row(model: nn.Module, row: Row) -> Any:
    """One row alone, unpadded, through a model."""
    labels = ("labels", "start_positions", "end_positions")
    inputs = {k: torch.as_tensor(v)[None] for k, v in row.items() if k not in labels}
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor(
            [[model.config.decoder_start_token_id, *row["labels"][:-1]]]
        )
    return model(**inputs)


def naive_divergence(
    name: str, q: Tensor, p: Tensor, *, z: Tensor, t: Tensor, label: int, temperature: float
) -> Tensor:
    """Divergences of one position from their definitions, on probabilities in float64.

    Those that look at raw logits `z` and `t`, or at the label, come without the `T^2` that all are multiplied
    by. DIST is its first term; the other one compares rows.
    """
    target = int(label) if label >= 0 else int(t.argmax())
    others = [c for c in range(len(q)) if c != target]

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum()

    def centred(a: Tensor) -> Tensor:
        return a.log() - a.log().mean()

    def alpha_beta(a: float, b: float) -> Tensor:
        mixed = a / (a + b) * p ** (a + b) + b / (a + b) * q ** (a + b)
        return (mixed - p**a * q**b).sum() / (a * b)

    def rest() -> Tensor:
        return kl(p[others] / p[others].sum(), q[others] / q[others].sum())

    def dkd() -> Tensor:
        pair = [torch.stack([a[target], a[others].sum()]) for a in (p, q)]
        return kl(*pair) + 8.0 * rest()

    def nkd() -> Tensor:
        first = -t.softmax(-1)[target] * z.log_softmax(-1)[target]
        return first / temperature**2 + 1.5 * rest()

    def standardised_kl() -> Tensor:
        one, other = ((a - a.mean()) / a.std(correction=0) / temperature for a in (t, z))
        return kl(one.softmax(-1), other.softmax(-1))

    def adaptive_kl() -> Tensor:
        held, head = 0.0, []
        for c in p.argsort(descending=True).tolist():
            head += [c] if held < 0.5 else []
            held += float(p[c])
        gap = (p - q).abs().detach()
        share = gap[head].sum() / gap.sum()
        return share * kl(p, q) + (1 - share) * kl(q, p)

    m = 0.5 * (p + q)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jeffreys": lambda: 0.5 * (kl(p, q) + kl(q, p)),
        "jsd": lambda: 0.5 * (kl(p, m) + kl(q, m)),
        "skew_kl": lambda: kl(p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": lambda: kl(q, 0.1 * q + 0.9 * p),
        "tvd": lambda: 0.5 * (p - q).abs().sum(),
        "logit_mse": lambda: (centred(q) - centred(p)).square().mean(),
        "alpha_beta": lambda: alpha_beta(0.2, 0.7),
        "adaptive_kl": adaptive_kl,
        "uld": lambda: (p.sort()[0] - q.sort()[0]).abs().sum(),
        "dkd": dkd,
        "nkd": nkd,
        "dist": lambda: 1 - torch.corrcoef(torch.stack([p, q]))[0, 1],
        "standardised_kl": standardised_kl,
        "hard_labels": lambda: -z.log_softmax(-1)[t.argmax()] / temperature**2,
    }[name]()


def oracle(
    head: Head,
    student: nn.Module,
    teacher: nn.Module,
    rows: list[Row],
    *,
    alpha: float | None = None,
    temperature: float = 2.0,
    divergence: str = "forward_kl",
    smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of one step, each row run alone: `(1 - a) task + a T^2 D`."""
    alpha = head.alpha if alpha is None else alpha
    task, kd = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    task_weight = kd_weight = 0.0
    for row in rows:
        with torch.no_grad():
            targets, _, _ = head.positions(forward_row(teacher, row), row)
        out = forward_row(student, row)
        logits, labels, weight = head.positions(out, row)
        if head.row_loss is not None and alpha < 1:
            task = task + head.row_loss(out, row, student)
            task_weight += 1
        for z, t, y in zip(logits, targets, labels, strict=True):
            kd_weight += weight
            if head.kind == "vectors":
                kd = kd + weight * (1 - (z * t).sum() / (z.norm() * t.norm()))
                continue
            if head.kind == "regression":
                kd = kd + weight * (z - t).square().sum()
                task = task + weight * (z - y).square().sum()
                task_weight += weight
                continue
            p, q = (t / temperature).softmax(-1), (z / temperature).softmax(-1)
            value = naive_divergence(divergence, q, p, z=z, t=t, label=int(y), temperature=temperature)
            kd = kd + weight * temperature**2 * value
            if y != -100:
                log_q = z.log_softmax(-1)
                task = task - weight * ((1 - smoothing) * log_q[y] + smoothing * log_q.mean())
                task_weight += weight
    loss = (1 - alpha) * task / max(task_weight, 1e-12) + alpha * kd / max(kd_weight, 1e-12)
    names = [n for n, p in student.named_parameters() if p.requires_grad]
    parameters = [p for p in student.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), {
        n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)
    }
