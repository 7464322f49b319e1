"""Heads over rows and tokens of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import IGNORE, Batch, Logits, Supervision, Task, token_mask

#: Columns that say where in the text each token ends, for a student and a teacher of unlike tokenizers.
TEXT_ENDS = ("text_ends", "teacher_text_ends")


#: Which positions of decoder inputs made from labels have a label at or after them; no model reads it.
DECODED = "hf_kd_decoded"


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(Task):
    """One label, several labels, or numbers per row, as the config's `problem_type` says.

    A label among several is a Bernoulli variable: logit `z` becomes the pair `(z, 0)`, whose softmax is
    `(sigmoid(z), 1 - sigmoid(z))`, so every divergence applies. Its C positions weigh `1 / C` each.
    """

    problem_type: Literal["single", "multi", "regression"] = "single"

    def flat(self, logits: Logits, batch: Batch) -> Tensor:
        """`[B, C]` as it is; several labels as `[B * C, 2]`; numbers as `[B * C, 1]`."""
        values = logits[self.logits[0]]
        if self.problem_type == "single":
            return values
        values = values.reshape(-1, 1)
        if self.problem_type == "regression":
            return values
        return torch.cat([values, torch.zeros_like(values)], dim=-1)

    def flat_labels(self, batch: Batch) -> Tensor | None:
        """Class ids `[B]`; or `[B, C]` numbers, or probabilities (0, 1 or between) of each label."""
        labels = super().flat_labels(batch)
        if labels is None or self.problem_type == "single":
            return labels
        return labels.reshape(len(labels), -1).float()

    def labelled(self, labels: Tensor) -> Tensor:
        """A number may be any number; NaN means "no label"."""
        if self.problem_type == "regression":
            return ~torch.isnan(labels)
        return labels != self.ignore_index

    def exists(self, batch: Batch) -> Tensor:
        """One position per row, or one per row and label."""
        rows = super().exists(batch)
        if self.problem_type == "single":
            return rows
        return rows[:, None].expand(-1, max(int(getattr(self.config, "num_labels", 1)), 1))

    def target_classes(self, labels: Tensor) -> Tensor:
        """Of a label among several: 0 present, 1 absent, as `flat` orders the pair."""
        if self.problem_type != "multi":
            return labels
        return torch.where(labels == self.ignore_index, self.ignore_index, labels < 0.5).long()

    def task_losses(self, logits: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
        """Cross-entropy with a class, or with each label's probability; the squared error for numbers."""
        if self.problem_type == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")
        if self.problem_type == "multi":
            target = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
            return F.binary_cross_entropy_with_logits(logits[:, 0] - logits[:, 1], target, reduction="none")
        return super().task_losses(logits, labels, label_smoothing=label_smoothing)


@dataclass(frozen=True, kw_only=True)
class DistillationToken(SequenceClassification):
    """A classifier with a head for each teacher of it: labels teach one, the teacher model the other.

    DeiT's and LeViT's `...ForImageClassificationWithTeacher` (Touvron et al. 2021): `cls_logits`,
    `distillation_logits`, and `logits`, their mean, which evaluation reads.
    """

    def split(self, outputs: Any, student: Tensor) -> tuple[Tensor, Tensor]:
        """The class token's logits, and the distillation token's."""
        names = ("cls_logits", "distillation_logits")
        if not isinstance(outputs, Mapping) or any(outputs.get(name) is None for name in names):
            raise ValueError(
                f"A student with a distillation token returns {' and '.join(names)}, but this one returned "
                f"{sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__}."
            )
        first, second = (self.flat({self.logits[0]: outputs[name]}, {}) for name in names)
        return first, second


@dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """Next-token prediction: position i counts if and only if `labels[i + 1]` is a label.

    A padding token predicts nothing: the last of the left padding would otherwise predict the first token of
    the row, and the loss would depend on the side of the padding.
    """

    def flat_labels(self, batch: Batch) -> Tensor | None:
        """Labels moved one step to the left, so that logits need no slicing copy."""
        if batch.get("shift_labels") is not None:
            return batch["shift_labels"]
        labels = super().flat_labels(batch)
        if labels is None:
            return None
        shifted = F.pad(labels[:, 1:], (0, 1), value=self.ignore_index)
        shifted = shifted.masked_fill(_ends(batch, shifted), self.ignore_index)
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != shifted.shape:
            return shifted
        return shifted.masked_fill(mask == 0, self.ignore_index)

    def supervise_batch(self, batch: Batch) -> Supervision:
        """Tokens that count; with a teacher of unlike tokens, those that end where one of its own does."""
        supervision = super().supervise_batch(batch)
        where = counterparts(batch)
        if where is None:
            return supervision
        return replace(supervision, kd_weight=supervision.kd_weight * (where >= 0).reshape(-1))

    def teacher_positions(self, values: Tensor, batch: Batch) -> Tensor:
        """The teacher's logits after the same text, where it reads tokens of its own."""
        where = counterparts(batch)
        if where is None:
            return values
        first = torch.arange(len(where), device=where.device) * batch["teacher_text_ends"].shape[1]
        return values.index_select(0, (first[:, None] + where.clamp_min(0)).reshape(-1))

    def exists(self, batch: Batch) -> Tensor:
        """Token i and token i + 1 both exist and belong to the same packed sequence."""
        mask = token_mask(batch)
        exists = (mask != 0) & F.pad(mask[:, 1:] != 0, (0, 1), value=False)
        return exists & ~_ends(batch, exists)


def _ends(batch: Batch, like: Tensor) -> Tensor:
    """Where a packed text ends, `[B, L]`: the next token is the first of another."""
    positions = batch.get("position_ids")
    if positions is None or positions.shape != like.shape:
        return torch.zeros_like(like, dtype=torch.bool)
    return F.pad(positions[:, 1:] == 0, (0, 1), value=False)


@dataclass(frozen=True, kw_only=True)
class Seq2SeqLM(Task):
    """Token prediction by a decoder; labels are not shifted, decoder inputs are."""

    def exists(self, batch: Batch) -> Tensor:
        """Decoder tokens that are not padding."""
        mask, ids = batch.get("decoder_attention_mask"), batch.get("decoder_input_ids")
        if mask is not None:
            return mask != 0
        if ids is None:
            raise ValueError(
                "Task 'seq2seq-lm' on data without `labels` needs `decoder_input_ids`: the tokens after "
                "which both models predict. Add that column, or labels."
            )
        return torch.ones_like(ids, dtype=torch.bool)

    def model_inputs(self, batch: Batch, model: Any) -> dict[str, Any]:
        """Both models read the same decoder inputs, made by the student's own rule."""
        inputs = super().model_inputs(batch, model)
        labels = batch.get("labels")
        if labels is not None and inputs.get("decoder_input_ids") is None:
            inputs["decoder_input_ids"] = decoder_inputs(labels, model)
            # Up to the last label: one token more is read where others are longer, and nobody learns from it.
            inputs[DECODED] = (labels != self.ignore_index).flip(-1).int().cummax(-1).values.flip(-1)
        return inputs


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Start and end of a span: two positions per row, each over the tokens of the row.

    Padding and the question are excluded from both softmaxes, `[CLS]` (no answer) stays. Which tokens those
    are is read from a `span_mask` column if there is one, else from `token_type_ids` (1: context). In rows
    without either, or with no token marked as context, only padding can be excluded. A label on an excluded
    token counts as no label.
    """

    def allowed(self, batch: Batch) -> Tensor:
        """Tokens that an answer may start or end at, `[B, L]`."""
        attended = token_mask(batch) != 0
        if batch.get("span_mask") is not None:
            return (batch["span_mask"] != 0) & attended
        types = batch.get("token_type_ids")
        if types is None:
            return attended
        first = attended & (attended.cumsum(-1) == 1)
        unmarked = ~(types == 1).any(-1, keepdim=True)
        return attended & ((types == 1) | first | unmarked)

    def flat(self, logits: Logits, batch: Batch) -> Tensor:
        """`[2 B, L]`, start and end in turn, -inf on excluded tokens."""
        allowed = self.allowed(batch)
        values = [logits[name].masked_fill(~allowed, float("-inf")) for name in self.logits]
        return torch.stack(values, dim=1).flatten(0, 1)

    def flat_labels(self, batch: Batch) -> Tensor | None:
        """Start and end positions, `[B, 2]`."""
        labels = super().flat_labels(batch)
        if labels is None:
            return None
        allowed = self.allowed(batch)
        inside = (labels >= 0) & (labels < allowed.shape[1])
        hit = allowed.gather(1, labels.clamp(0, allowed.shape[1] - 1))
        return torch.where(inside & hit, labels, self.ignore_index)

    def exists(self, batch: Batch) -> Tensor:
        """Both ends of every row."""
        return super().exists(batch)[:, None].expand(-1, 2)

    def task_losses(self, logits: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
        """Cross-entropy; label smoothing spreads over the tokens that an answer may be at."""
        if not label_smoothing:
            return super().task_losses(logits, labels, label_smoothing=0.0)
        log_q = logits.log_softmax(-1)
        excluded = torch.isneginf(logits)
        uniform = -log_q.masked_fill(excluded, 0.0).sum(-1) / (~excluded).sum(-1)
        hit = -log_q.gather(1, labels[:, None]).squeeze(1)
        return (1 - label_smoothing) * hit + label_smoothing * uniform

    @property
    def distils_unlabelled_rows(self) -> bool:
        """Rows without an answer are distilled all the same."""
        return True


def decoder_inputs(labels: Tensor, model: Any) -> Tensor:
    """Labels moved one step to the right behind the model's start token."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is not None:
        return make(labels=labels)
    start, pad = (getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        raise ValueError(
            f"The student's config has decoder_start_token_id={start} and pad_token_id={pad}; set both, or "
            "give a `decoder_input_ids` column."
        )
    shifted = F.pad(labels[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == IGNORE, pad)


def counterparts(batch: Batch) -> Tensor | None:
    """For each of the student's tokens, the teacher's token that ends at the same place in the text.

    Args:
        batch: With `text_ends` `[B, L]` and `teacher_text_ends` `[B, L_t]`: the character after each token's
            last one, -1 for tokens without text (special ones, padding).

    Returns:
        `[B, L]` indices, -1 where there is none; None for a batch without those columns. Where several tokens
        end at one place (the bytes of one character), only the last of them has read the text up to there.
    """
    ends, teacher_ends = (batch.get(name) for name in TEXT_ENDS)
    if ends is None or teacher_ends is None:
        return None
    complete = [(e >= 0) & (e != F.pad(e[:, 1:], (0, 1), value=-1)) for e in (ends, teacher_ends)]
    same = (ends[:, :, None] == teacher_ends[:, None, :]) & complete[1][:, None, :]
    found, where = same.to(torch.uint8).max(-1)
    return torch.where((found > 0) & complete[0], where, -1)
