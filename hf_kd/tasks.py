"""Where a head keeps its logits, labels and mask, and what a supervised position is there.

Every head is brought to one shape, `[P, C]`: P positions of C classes, row-major, so that position `p` belongs
to batch row `p // (P / B)`. A weight per position says how much it counts; a mean is always
`sum(weight * value) / sum(weight)`, with both sums over the whole optimizer step. What remains of a head after
that is one entry of `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
Batch = Mapping[str, Any]
Logits = Mapping[str, Tensor]


@dataclass(frozen=True)
class Supervision:
    """Which positions of one batch count, made from the batch alone, before any forward.

    Attributes:
        labels: `[P]` class ids (`-100`: no label) or, for regression, float targets; None without labels.
        task_weight: `[P]` weight of each position in the task loss; 0 where there is no label.
        kd_weight: `[P]` weight of each position in the distillation loss.
        rows: The number of batch rows B.
    """

    labels: Tensor | None
    task_weight: Tensor
    kd_weight: Tensor
    rows: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """A head, described. The base class serves every head with classes on one axis and -100 for "no label".

    A head that the library does not know takes three things: the names of its logits, the names of its labels,
    and a mask for batches without labels:

        Task(logits=("scores",), labels=("targets",), mask=lambda batch: batch["attention_mask"])

    Attributes:
        name: Name in `TASKS` and in messages.
        auto_class: The Transformers class that loads such a model.
        logits: Names of the model outputs that hold logits.
        labels: Names of the batch columns that hold labels.
        position: What one supervised position is, in words.
        class_axis: Axis of the classes in the logits.
        mask: Positions that exist, `[B, ...]` (nonzero: exists); None: all. Needed by heads with more than one
            position per row: it decides what is distilled on batches without labels.
        ignore_index: The label that means "no label".
        per_row: Whether the weights of a row's positions add up to 1 (a head that is counted in rows) instead of
            each counting 1 (a head that is counted in tokens or pixels).
        supervise: `"auto"` distils labelled positions where there are labels; `"all"` every position that exists.
        kind: `"classes"` for heads that give a distribution, `"regression"` for heads that give numbers.
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
    kind: Literal["classes", "regression"] = "classes"
    config: Any = field(default=None, repr=False, compare=False)

    def flat(self, logits: Logits, batch: Batch) -> Tensor:
        """Bring the head's logits to `[P, C]`, without a copy where the layout allows."""
        values = [v.movedim(self.class_axis, -1) for v in (logits[name] for name in self.logits)]
        stacked = values[0] if len(values) == 1 else torch.stack(values, dim=1)
        return stacked.reshape(-1, stacked.shape[-1])

    def flat_labels(self, batch: Batch) -> Tensor | None:
        """Labels as `[B, ...]` in the order of the positions, or None for a batch without labels."""
        values = [batch.get(name) for name in self.labels]
        if not values or any(v is None for v in values):
            return None
        return values[0] if len(values) == 1 else torch.stack(values, dim=1)

    def exists(self, batch: Batch) -> Tensor:
        """Which positions exist, `[B, ...]`; by default one per row."""
        if self.mask is not None:
            mask = self.mask(batch)
            if mask is not None:
                return mask != 0
        first = _first_tensor(batch)
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
                        f"Task {self.name!r}: labels have shape {tuple(labelled.shape)} but the mask of positions has "
                        f"{tuple(exists.shape)}; give both one entry per position."
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

    def model_inputs(self, batch: Batch, model: Any) -> dict[str, Any]:
        """What the models read: the batch without its labels, so that no head computes a loss of its own."""
        return {k: v for k, v in batch.items() if k not in self.labels}


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
        """Class ids `[B]`, or `[B, C]`: 0 for the first class of a pair (present), 1 for absent."""
        labels = super().flat_labels(batch)
        if labels is None or self.problem_type == "single":
            return labels
        labels = labels.reshape(len(labels), -1)
        if self.problem_type == "regression":
            return labels.float()
        return torch.where(labels == self.ignore_index, self.ignore_index, 1 - labels.long())

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

    def task_losses(self, logits: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
        """Cross-entropy, or the squared error for numbers."""
        if self.problem_type == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")
        return super().task_losses(logits, labels, label_smoothing=label_smoothing)


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
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != shifted.shape:
            return shifted
        return shifted.masked_fill(mask == 0, self.ignore_index)

    def exists(self, batch: Batch) -> Tensor:
        """Token i and token i + 1 both exist and belong to the same packed sequence."""
        mask = token_mask(batch)
        exists = (mask != 0) & F.pad(mask[:, 1:] != 0, (0, 1), value=False)
        positions = batch.get("position_ids")
        if positions is not None and positions.shape == exists.shape:
            exists = exists & F.pad(positions[:, 1:] != 0, (0, 1), value=False)
        return exists


@dataclass(frozen=True, kw_only=True)
class Seq2SeqLM(Task):
    """Token prediction by a decoder; labels are not shifted, decoder inputs are."""

    def exists(self, batch: Batch) -> Tensor:
        """Decoder tokens that are not padding."""
        mask = batch.get("decoder_attention_mask")
        ids = batch.get("decoder_input_ids")
        if mask is None and ids is None:
            raise ValueError(
                "Task 'seq2seq-lm' on data without `labels` needs `decoder_input_ids`: the tokens after which both "
                "models predict. Add that column, or labels."
            )
        return (mask if mask is not None else torch.ones_like(ids)) != 0

    def model_inputs(self, batch: Batch, model: Any) -> dict[str, Any]:
        """Both models read the same decoder inputs, made by the student's own rule."""
        inputs = super().model_inputs(batch, model)
        labels = batch.get("labels")
        if labels is not None and inputs.get("decoder_input_ids") is None:
            inputs["decoder_input_ids"] = decoder_inputs(labels, model)
        return inputs


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Start and end of a span: two positions per row, each over the tokens of the row.

    Padding and the question are excluded from both softmaxes, `[CLS]` (no answer) stays. Which tokens those are
    is read from a `span_mask` column if there is one, else from `token_type_ids` (1: context), else only padding
    can be excluded. A label on an excluded token counts as no label.
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
        return attended & ((types == 1) | first)

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

    @property
    def distils_unlabelled_rows(self) -> bool:
        """Rows without an answer are distilled all the same."""
        return True


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


def decoder_inputs(labels: Tensor, model: Any) -> Tensor:
    """Labels moved one step to the right behind the model's start token."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is not None:
        return make(labels=labels)
    config = model.config.get_text_config(decoder=True)
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise ValueError(
            f"The student's config has decoder_start_token_id={start} and pad_token_id={pad}; set both, or give a "
            "`decoder_input_ids` column."
        )
    shifted = F.pad(labels[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == IGNORE, pad)


def _first_tensor(batch: Batch) -> Tensor:
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise ValueError(f"The batch has no tensors; its columns are {sorted(batch)}.")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SequenceClassification(
            name="sequence-classification", auto_class="AutoModelForSequenceClassification", per_row=True
        ),
        SequenceClassification(
            name="image-classification", auto_class="AutoModelForImageClassification", per_row=True
        ),
        SequenceClassification(
            name="audio-classification", auto_class="AutoModelForAudioClassification", per_row=True
        ),
        Task(
            name="token-classification",
            auto_class="AutoModelForTokenClassification",
            position="labelled token",
            mask=content_mask,
        ),
        Task(
            name="masked-lm",
            auto_class="AutoModelForMaskedLM",
            position="masked token",
            mask=token_mask,
        ),
        CausalLM(name="causal-lm", auto_class="AutoModelForCausalLM", position="predicted token", mask=token_mask),
        Seq2SeqLM(
            name="seq2seq-lm", auto_class="AutoModelForSeq2SeqLM", position="decoder token", mask=token_mask
        ),
        QuestionAnswering(
            name="question-answering",
            auto_class="AutoModelForQuestionAnswering",
            logits=("start_logits", "end_logits"),
            labels=("start_positions", "end_positions"),
            position="start or end of a row",
            per_row=True,
        ),
        Task(name="multiple-choice", auto_class="AutoModelForMultipleChoice", position="row of choices"),
        Task(name="next-sentence", auto_class="AutoModelForNextSentencePrediction", position="pair"),
    )
}

# Transformers' own tables of model classes, in the order in which a class is looked up: BART stands in several,
# and its sequence-to-sequence use is the one with a trained head.
_CLASS_TABLES = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "seq2seq-lm",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "seq2seq-lm",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "causal-lm",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "masked-lm",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "audio-classification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "sequence-classification",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "image-classification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "token-classification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "question-answering",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "multiple-choice",
    "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES": "next-sentence",
}


def task_of_class(class_name: str) -> str | None:
    """Name of the task of a Transformers model class, or None if it has no known head."""
    from transformers.models.auto import modeling_auto

    for table, task in _CLASS_TABLES.items():
        for names in getattr(modeling_auto, table).values():
            if class_name == names or (not isinstance(names, str) and class_name in names):
                return task
    return None


def resolve_task(task: str | Task | None, model: nn.Module | None, *, supervise: str = "auto") -> Task:
    """The task of a model: given, named, or found from the model's class, and fitted to its config.

    Args:
        task: A `Task`, a name in `TASKS`, or None to look at the model's class.
        model: The student.
        supervise: `"auto"` or `"all"`; see `Task`.

    Returns:
        The task with the model's config and, for classification, its problem type.

    Raises:
        ValueError: If the name is unknown, or the class's head is; says what to supply.
    """
    base = model.get_base_model() if model is not None and hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if task is None:
        name = task_of_class(type(base).__name__)
        if name is None and config is None:
            name = "sequence-classification"  # a plain module that returns [B, C] logits
        if name is None:
            raise ValueError(
                f"The head of {type(base).__name__} is not known. Name one of task={sorted(TASKS)}, or describe it: "
                'Task(logits=("<output with the logits>",), labels=("<column with the labels>",), '
                'mask=lambda batch: <[B, ...] mask of positions, or None for one per row>).'
            )
        task = TASKS[name]
    elif isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task={task!r} is not known; choose one of {sorted(TASKS)}.")
        task = TASKS[task]
    if supervise not in ("auto", "all"):
        raise ValueError(f"supervise={supervise!r} is not known; choose 'auto' or 'all'.")
    changes: dict[str, Any] = {"config": config, "supervise": supervise}
    if isinstance(task, SequenceClassification):
        changes["problem_type"] = problem_type(config)
        changes["kind"] = "regression" if changes["problem_type"] == "regression" else "classes"
    return replace(task, **changes)


def problem_type(config: Any) -> Literal["single", "multi", "regression"]:
    """What a classification config means: its `problem_type`, else one output is regression, more are classes."""
    names: dict[str, Literal["single", "multi", "regression"]] = {
        "single_label_classification": "single",
        "multi_label_classification": "multi",
        "regression": "regression",
    }
    given = getattr(config, "problem_type", None)
    if given is not None:
        return names[given]
    return "regression" if getattr(config, "num_labels", 2) == 1 else "single"
