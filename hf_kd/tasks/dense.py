"""Heads over frames, pixels, queries, pairs and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Batch, Logits, Supervision, Task, TaskTerms, first_tensor, full_precision, take, token_mask

# Model types whose task loss is DETR's: cross-entropy, L1 and generalised IoU of matched queries.
_MATCHES_QUERIES = ("detr", "yolos", "table-transformer")


@dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """A class per pixel. Logits are resized to the labels (without labels, to the image) first."""

    def flat(self, logits: Logits, batch: Batch) -> Tensor:
        """`[B, C, h, w]` logits as `[B * H * W, C]`."""
        values = logits[self.logits[0]]
        size = self._size(batch)
        if values.shape[-2:] != size:
            values = F.interpolate(values, size=size, mode="bilinear", align_corners=False)
        return values.movedim(1, -1).reshape(-1, values.shape[1])

    def exists(self, batch: Batch) -> Tensor:
        """All pixels."""
        image = batch["pixel_values"]
        return torch.ones(len(image), *self._size(batch), dtype=torch.bool, device=image.device)

    def _size(self, batch: Batch) -> torch.Size:
        labels = batch.get("labels")
        return (labels if labels is not None else batch["pixel_values"]).shape[-2:]

    @property
    def distils_unlabelled_rows(self) -> bool:
        """Pixels are supervised one by one."""
        return False


@dataclass(frozen=True, kw_only=True)
class CTC(Task):
    """A class per frame; the task loss sums over alignments and is one per row.

    Distillation averages over frames that are not padding. The task loss of a row is its CTC loss divided by
    its number of target tokens (Graves et al. 2006; the "mean" of Transformers' `ctc_loss_reduction`),
    averaged over rows; label smoothing has no meaning for it.

    Attributes:
        frames: The model's map from input length to number of frames.
    """

    frames: Callable[[Any], Any] | None = None

    def exists(self, batch: Batch) -> Tensor:
        """Frames `[B, T]` that are made from signal, not from padding."""
        values = batch.get("input_values", batch.get("input_features"))
        if values is None or self.frames is None:
            raise ValueError(
                "Task 'ctc' needs `input_values` or `input_features` and a model with "
                f"_get_feat_extract_output_lengths; the batch has {sorted(batch)}."
            )
        total = int(self.frames(values.shape[1]))
        lengths = torch.full((len(values),), total, device=values.device)
        if batch.get("attention_mask") is not None:
            lengths = self.frames(batch["attention_mask"].sum(-1))
        return torch.arange(total, device=values.device) < lengths[:, None]

    def supervise_batch(self, batch: Batch) -> Supervision:
        """Frames for distillation, rows for the task loss."""
        exists = self.exists(batch)
        labels = batch.get("labels")
        rows = torch.zeros(len(exists), device=exists.device)
        if labels is not None:
            rows = (labels != self.ignore_index).any(-1).float()
        return Supervision(
            labels=labels, task_weight=rows, kd_weight=exists.float().reshape(-1), rows=len(exists)
        )

    def task_terms(
        self,
        outputs: Any,
        student: Tensor,
        supervision: Supervision,
        index: Tensor | None,
        label_smoothing: float,
    ) -> TaskTerms:
        """The CTC loss of each labelled row, per target token."""
        if label_smoothing:
            raise ValueError(f"label_smoothing_factor={label_smoothing} has no meaning for CTC; set it to 0.")
        rows = torch.arange(supervision.rows, device=student.device) if index is None else index
        frames = supervision.kd_weight.view(supervision.rows, -1)
        log_probs = full_precision(student).view(supervision.rows, frames.shape[1], -1).log_softmax(-1)
        targets = supervision.labels.index_select(0, rows)
        present = targets != self.ignore_index
        lengths = present.sum(-1)
        # cuDNN's CTC wants int32 targets on the CPU and differs in its gradient; Transformers avoids it as
        # well.
        with torch.backends.cudnn.flags(enabled=False):
            losses = F.ctc_loss(
                log_probs.index_select(0, rows).transpose(0, 1),
                targets.masked_select(present),
                frames.sum(-1).long().index_select(0, rows),
                lengths,
                blank=self.config.pad_token_id,
                reduction="none",
                zero_infinity=bool(getattr(self.config, "ctc_zero_infinity", False)),
            )
        return TaskTerms(losses / lengths, take(supervision.task_weight, index), rows)

    @property
    def distils_unlabelled_rows(self) -> bool:
        """Rows without a transcript are distilled."""
        return True


@dataclass(frozen=True, kw_only=True)
class ImageText(Task):
    """Images and texts that belong together: each image ranks the batch's texts, each text its images.

    The classes are the rows of the micro-batch, so its size is part of the loss, and one row alone has
    nothing to rank. Labels need no column: row i belongs to row i.
    """

    def flat(self, logits: Logits, batch: Batch) -> Tensor:
        """`[B, B]` similarities of each kind as `[2 B, B]`."""
        per_image, per_text = (logits[name] for name in self.logits)
        if per_image.shape != per_text.shape or per_image.shape[0] != per_image.shape[1]:
            raise ValueError(
                f"Task 'image-text' pairs each image with its text, but got {per_image.shape[0]} images and "
                f"{per_image.shape[1]} texts; give one text per image."
            )
        if len(per_image) < 2:
            raise ValueError(
                "Task 'image-text' ranks the rows of a batch, but this batch has 1 row; set "
                "per_device_train_batch_size to 2 or more, and dataloader_drop_last=True."
            )
        return torch.stack([per_image, per_text], dim=1).flatten(0, 1)

    def flat_labels(self, batch: Batch) -> Tensor:
        """Each row's own number, `[B, 2]`."""
        rows = first_tensor(batch)
        return torch.arange(len(rows), device=rows.device)[:, None].expand(-1, 2)

    def exists(self, batch: Batch) -> Tensor:
        """Both rankings of every row."""
        return super().exists(batch)[:, None].expand(-1, 2)


@dataclass(frozen=True, kw_only=True)
class ObjectDetection(Task):
    """Object queries of a DETR-like model, compared one to one in their class logits.

    That has a meaning only where query i looks for the same thing in both models: the student has the
    teacher's number of queries and started from its query embeddings. Boxes are not distilled. The task loss
    is the model's own matching loss, computed row by row (so that it does not depend on the batch) and
    averaged.
    """

    def supervise_batch(self, batch: Batch) -> Supervision:
        """All queries of all rows; rows with annotations for the task loss."""
        pixels = batch["pixel_values"]
        queries = getattr(self.config, "num_queries", None) or self.config.num_detection_tokens
        weight = torch.full((len(pixels) * queries,), 1.0 / queries, device=pixels.device)
        labels = batch.get("labels")
        labelled = torch.full((len(pixels),), 0.0 if labels is None else 1.0, device=pixels.device)
        return Supervision(labels=labels, task_weight=labelled, kd_weight=weight, rows=len(pixels))

    def task_terms(
        self,
        outputs: Any,
        student: Tensor,
        supervision: Supervision,
        index: Tensor | None,
        label_smoothing: float,
    ) -> TaskTerms:
        """The matching loss of each row."""
        model_type = getattr(self.config, "model_type", "this model")
        auxiliary = getattr(self.config, "auxiliary_loss", False)
        if model_type not in _MATCHES_QUERIES or auxiliary:
            raise ValueError(
                f"The task loss of {model_type} with auxiliary_loss={auxiliary} is not known; set "
                "auxiliary_loss=False, or alpha=1."
            )
        logits, boxes = (full_precision(outputs[name]) for name in ("logits", "pred_boxes"))
        losses = [
            self.matching_loss({"logits": z[None], "pred_boxes": box[None]}, label)
            for z, box, label in zip(logits, boxes, supervision.labels, strict=True)
        ]
        rows = torch.arange(supervision.rows, device=student.device)
        return TaskTerms(torch.stack(losses), supervision.task_weight, rows)

    def matching_loss(self, outputs: dict[str, Tensor], label: dict[str, Tensor]) -> Tensor:
        """Cross-entropy and box losses of one row, after its queries are matched to its objects.

        Transformers' own sum of these terms divides the box losses by a number of boxes averaged over ranks,
        so that a row's loss would depend on what another rank is working on.
        """
        from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

        config = self.config
        matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
        parts = ImageLoss(matcher, config.num_labels, config.eos_coefficient, ["labels", "boxes"])
        parts.to(outputs["logits"].device)
        matches = matcher(outputs, [label])
        boxes = max(len(label["class_labels"]), 1)
        found = parts.loss_boxes(outputs, [label], matches, boxes)
        return (
            parts.loss_labels(outputs, [label], matches, boxes)["loss_ce"]
            + config.bbox_loss_coefficient * found["loss_bbox"]
            + config.giou_loss_coefficient * found["loss_giou"]
        )


@dataclass(frozen=True, kw_only=True)
class Embedding(Task):
    """One vector per row: the mean of the last hidden states over tokens that are not padding.

    Compared by cosine or squared error; where the two widths differ, a trained projection maps the student's.
    """

    def flat(self, logits: Logits, batch: Batch) -> Tensor:
        """`[B, L, H]` hidden states as `[B, H]` vectors."""
        hidden = logits[self.logits[0]]
        mask = _hidden_mask(hidden, batch)
        return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class EmbeddingSimilarity(Embedding):
    """The batch's rows as classes: each row's softmax over its cosine similarities to the other rows.

    Needs no projection. The classes are the rows of the micro-batch, so its size is part of the loss.
    """

    def flat(self, logits: Logits, batch: Batch) -> Tensor:
        """`[B, B]` similarities divided by 0.05, the diagonal excluded."""
        vectors = F.normalize(full_precision(super().flat(logits, batch)), dim=-1)
        if len(vectors) < 3:
            raise ValueError(
                "Task 'embedding-similarity' compares each row with the others, but this batch has "
                f"{len(vectors)} rows; set per_device_train_batch_size to 3 or more, and "
                "dataloader_drop_last=True."
            )
        similarity = vectors @ vectors.T / 0.05
        return similarity.masked_fill(
            torch.eye(len(vectors), dtype=torch.bool, device=vectors.device), float("-inf")
        )


def _hidden_mask(hidden: Tensor, batch: Batch) -> Tensor:
    """`[B, L, 1]`; models whose positions are not tokens (patches) count all of them."""
    if "input_ids" in batch or "inputs_embeds" in batch:
        mask = token_mask(batch)
        if mask.shape == hidden.shape[:2]:
            return mask[..., None].to(hidden.dtype)
    return torch.ones(*hidden.shape[:2], 1, dtype=hidden.dtype, device=hidden.device)
