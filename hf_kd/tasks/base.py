"""Where a head keeps its logits, labels and mask, and what a supervised position is there.

Every head is brought to one shape, `[P, C]`: P positions of C classes, row-major, so that position `p`
belongs to batch row `p // (P / B)`. A weight per position says how much it counts; a mean is always
`sum(weight * value) / sum(weight)`, with both sums over the whole optimizer step. What remains of a head
after that is one entry of `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
Batch = Mapping[str, Any]
Logits = Mapping[str, Tensor]


@dataclass(frozen=True)
class Supervision:
    """Which positions of one batch count, made from the batch alone, before any forward.

    Attributes:
        labels: `[P]` class ids (`-100`: no label) or, for regression, float targets; None without labels.
            Heads whose task loss is not one per position (CTC, detection) keep their labels as they are.
        task_weight: Weight of each term of the task loss; 0 where there is no label. `[P]`, or `[B]` for
            heads whose task loss is one per row.
        kd_weight: `[P]` weight of each position in the distillation loss.
        rows: The number of batch rows B.
    """

    labels: Any
    task_weight: Tensor
    kd_weight: Tensor
    rows: int


@dataclass(frozen=True)
class TaskTerms:
    """The task losses of one batch: `[N]` losses, `[N]` weights, and the batch row that each belongs to."""

    losses: Tensor
    weight: Tensor
    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """A head, described. The base class serves every head with classes on one axis and -100 for "no label".

    A head that the library does not know takes three things: the names of its logits, the names of its
    labels, and a mask for batches without labels:

        Task(logits=("scores",), labels=("targets",), mask=lambda batch: batch["attention_mask"])

    Attributes:
        name: Name in `TASKS` and in messages.
        auto_class: The Transformers class that loads such a model.
        logits: Names of the model outputs that hold logits.
        labels: Names of the batch columns that hold labels.
        position: What one supervised position is, in words.
        class_axis: Axis of the classes in the logits.
        mask: Positions that exist, `[B, ...]` (nonzero: exists); None: all. Needed by heads with more than
            one position per row: it decides what is distilled on batches without labels.
        ignore_index: The label that means "no label".
        per_row: Whether the weights of a row's positions add up to 1 (a head that is counted in rows) instead
            of each counting 1 (a head that is counted in tokens or pixels).
        supervise: `"auto"` distils labelled positions where there are labels; `"all"` every position that
            exists.
        kind: `"classes"` for heads that give a distribution, `"regression"` for heads that give numbers,
            `"vectors"` for encoders whose output is a direction or a point.
        batch_coupled: Whether a row's loss depends on the rows beside it, so that the size of the micro-batch
            changes the loss.
    """

    name: str = "custom"
    auto_class: str = ""
    logits: tuple[str, ...] = ("logits",)
    labels: tuple[str, ...] = ("labels",)
    position: str = "row"
    class_axis: int = -1
    mask: Callable[[Batch], Tensor | None] | None = None
    ignore_index: int = IGNORE
    per_row: bool = False
    supervise: Literal["auto", "all"] = "auto"
    kind: Literal["classes", "regression", "vectors"] = "classes"
    batch_coupled: bool = False
    config: Any = field(default=None, repr=False, compare=False)

    def flat(self, logits: Logits, batch: Batch) -> Tensor:
        """Bring the head's logits to `[P, C]`, without a copy where the layout allows."""
        values = [v.movedim(self.class_axis, -1) for v in (logits[name] for name in self.logits)]
        stacked = values[0] if len(values) == 1 else torch.stack(values, dim=1)
        return stacked.reshape(-1, stacked.shape[-1])

    def flat_labels(self, batch: Batch) -> Tensor | None:
        """Labels as `[B, ...]` in the order of the positions, or None for a batch without labels."""
        values: list[Any] = [batch.get(name) for name in self.labels]
        if not values or any(v is None for v in values):
            return None
        return values[0] if len(values) == 1 else torch.stack(values, dim=1)

    def exists(self, batch: Batch) -> Tensor:
        """Which positions exist, `[B, ...]`; by default one per row."""
        if self.mask is not None:
            mask = self.mask(batch)
            if mask is not None:
                return mask != 0
        first = first_tensor(batch)
        return torch.ones(len(first), dtype=torch.bool, device=first.device)

    def supervise_batch(self, batch: Batch) -> Supervision:
        """Find the positions of a batch that count, and how much.

        Raises:
            ValueError: If labels and mask cover different numbers of positions.
        """
        labels = self.flat_labels(batch)
        if labels is None:
            exists = self.exists(batch)
            kd, task = exists.float(), torch.zeros_like(exists, dtype=torch.float32)
        else:
            labelled = self.labelled(labels)
            task = labelled.float()
            kd = task
            if self.supervise == "all" or self.distils_unlabelled_rows:
                exists = self.exists(batch)
                if exists.shape != labelled.shape:
                    raise ValueError(
                        f"Task {self.name!r}: labels have shape {tuple(labelled.shape)} but the mask of "
                        f"positions has {tuple(exists.shape)}; give both one entry per position."
                    )
                kd = exists.float()
        rows = kd.shape[0]
        if self.per_row:
            kd, task = kd / max(kd[0].numel(), 1), task / max(task[0].numel(), 1)
        return Supervision(
            labels=None if labels is None else labels.reshape(-1),
            task_weight=task.reshape(-1),
            kd_weight=kd.reshape(-1),
            rows=rows,
        )

    def labelled(self, labels: Tensor) -> Tensor:
        """Which labels are labels."""
        return labels != self.ignore_index

    @property
    def distils_unlabelled_rows(self) -> bool:
        """Whether a row without a label is still distilled: true where a row is one position."""
        return self.mask is None

    def task_losses(self, logits: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
        """Task loss `[N]` of selected positions, from `[N, C]` logits in fp32 and `[N]` labels."""
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)

    def task_terms(
        self,
        outputs: Any,
        student: Tensor,
        supervision: Supervision,
        index: Tensor | None,
        label_smoothing: float,
    ) -> TaskTerms:
        """The task losses of one batch.

        Args:
            outputs: What the student returned, for heads whose loss reads more than logits.
            student: `[P, C]` logits.
            supervision: What counts.
            index: Which positions have a label; None: all.
            label_smoothing: Weight of the uniform distribution in the target.
        """
        losses = self.task_losses(
            full_precision(take(student, index)),
            take(supervision.labels, index),
            label_smoothing=label_smoothing,
        )
        return TaskTerms(
            losses, take(supervision.task_weight, index), row_of(supervision.task_weight, index, supervision)
        )

    def split(self, outputs: Any, student: Tensor) -> tuple[Tensor, Tensor]:
        """While training: the logits `[P, C]` that labels teach, and those that the teacher teaches.

        Both are the head's own, but for models with a head for each.
        """
        return student, student

    def target_classes(self, labels: Tensor) -> Tensor:
        """Labels `[N]` as classes of `[N, C]` logits; negative: no label."""
        return labels

    def teacher_positions(self, values: Tensor, batch: Batch) -> Tensor:
        """The teacher's `[P_t, C]` at the student's positions `[P, C]`; the same, where inputs are shared."""
        return values

    def model_inputs(self, batch: Batch, model: Any) -> dict[str, Any]:
        """What the models read: the batch without its labels, so that no head computes a loss of its own."""
        return {k: v for k, v in batch.items() if k not in self.labels}


def token_mask(batch: Batch) -> Tensor:
    """Tokens that are not padding, `[B, L]`; without an attention mask, all."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return mask
    ids = batch.get("input_ids", batch.get("inputs_embeds"))
    if ids is None:
        raise ValueError(f"Expected `attention_mask` or `input_ids` in the batch; it has {sorted(batch)}.")
    return torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)


def content_mask(batch: Batch) -> Tensor:
    """Tokens that are neither padding nor, where the collator says so, special."""
    special = batch.get("special_tokens_mask")
    mask = token_mask(batch)
    return mask if special is None else mask * (special == 0)


def first_tensor(batch: Batch) -> Tensor:
    """A tensor whose first axis is the batch."""
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise ValueError(f"The batch has no tensors; its columns are {sorted(batch)}.")


def full_precision(logits: Tensor) -> Tensor:
    """Logits may be half precision; the maths is fp32 (or fp64, where they are)."""
    return logits if logits.dtype == torch.float64 else logits.float()


def take(values: Tensor, index: Tensor | None) -> Tensor:
    """The selected entries; all of them, without a copy, where the index is None."""
    return values if index is None else values.index_select(0, index)


def row_of(weight: Tensor, index: Tensor | None, supervision: Supervision) -> Tensor:
    """The batch row of each selected entry of a weight, `[N]`."""
    where = torch.arange(len(weight), device=weight.device) if index is None else index
    return where // max(len(weight) // max(supervision.rows, 1), 1)
