"""What one arm of a comparison answers on the evaluation rows, and what follows for all arms together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PrinterCallback

from hf_kd import errors
from hf_kd.answers import logits_of
from hf_kd.behaviour import Behaviour, PositionKL, describe_behaviour, most_different
from hf_kd.errors import Samples
from hf_kd.losses.divergences import forward_kl, log_probs
from hf_kd.metrics import perplexity
from hf_kd.objective import STATISTICS, select
from hf_kd.sharding import in_pieces
from hf_kd.slices import Slice, slice_rows
from hf_kd.tasks import SequenceClassification
from hf_kd.tasks.base import take
from hf_kd.teachers.signal import SparseSignal
from hf_kd.trainer import DistillationTrainer

# Of a row's text that the report shows.
_SHOWN_CHARACTERS = 240
# Stretches of the sequence, and rows that their KL is measured on.
_STRETCHES, _POSITION_ROWS = 8, 256
# Heads whose positions are tokens.
_TOKEN_HEADS = ("causal-lm", "masked-lm", "seq2seq-lm", "token-classification")

#: What every evaluation returns beside the metrics of the task.
OWN_METRICS = ("loss", "kl", "agreement", "teacher_entropy", "distance", "teacher_mass_dropped")

#: Changes to the arguments of a training that leave its trainer fit for evaluation against the teacher.
EVALUATION: dict[str, Any] = {
    **{"alpha": 1.0, "alpha_end": None, "alpha_schedule": "constant", "kl_threshold": None},
    # The teacher itself is there: its whole distribution, and not what was kept of it.
    **{"teacher_cache": None, "cache_miss": "error", "self_teacher": None, "self_teacher_dropout": False},
    "exit_layers": None,
    # Rows keep their order, and nothing is uploaded or printed.
    **{"train_sampling_strategy": "random", "push_to_hub": False, "report_to": "none", "disable_tqdm": True},
}


@dataclass(frozen=True)
class Evaluation:
    """One arm.

    Attributes:
        scores: Metrics by name, with the prefix `eval_`.
        logits: `[N, C]`, where the head gives one class a row.
        labels: `[N]`, likewise.
        rows: `[N, len(STATISTICS)]` sums per row (`Objective.evaluate`).
        errors: Standard errors, by metric without a prefix.
        samples: `[RESAMPLES]` bootstrap values, likewise; of the same draws of rows in every arm.
    """

    scores: dict[str, float]
    logits: Any = None
    labels: Any = None
    rows: Any = None
    errors: dict[str, float] = field(default_factory=dict)
    samples: Samples = field(default_factory=dict)

    def per_row(self, name: str, count: str) -> np.ndarray | None:
        """`[N]` mean of a statistic per row, NaN where a row has none; None if no row has any."""
        if self.rows is None:
            return None
        sums, counts = (self.rows[:, STATISTICS.index(column)] for column in (name, count))
        if not (counts > 0).any():
            return None
        return np.where(counts > 0, sums / np.where(counts > 0, counts, 1.0), np.nan)

    @property
    def right(self) -> np.ndarray | None:
        """`[N]` whether the top class is the label, 0 or 1, NaN without a label; None for other heads."""
        if self.logits is None or self.labels is None:
            return None
        labels = np.asarray(self.labels)
        return np.where(labels >= 0, np.asarray(self.logits).argmax(1) == labels, np.nan).astype(float)


def evaluate(
    trainer: DistillationTrainer, rows: Any, *, known: Mapping[str, float] | None = None, primary: str | None
) -> Evaluation:
    """Ask a trainer's model about the rows.

    Args:
        trainer: With the teacher to compare with, if there is one.
        rows: The evaluation rows.
        known: Metrics that need no measurement.
        primary: The metric that decides; "perplexity" follows from the loss.
    """
    trainer.remove_callback(PrinterCallback)  # the table says it
    trainer.check(training=False, warn=False)  # training said it
    trainer.scores.rows = []
    logits = labels = None
    with _watched(trainer) as seen:
        if _one_class_a_row(trainer):
            predicted, labels, metrics = trainer.predict(rows, metric_key_prefix="eval")
            classes = getattr(getattr(trainer.student, "config", None), "num_labels", None)
            if isinstance(predicted, np.ndarray) and predicted.ndim == 2 and predicted.shape[1] == classes:
                logits = predicted
        else:
            metrics = trainer.evaluate(rows)
    scores = {**(metrics or {}), **(known or {})}
    if primary == "perplexity" and "eval_loss" in scores:
        scores["eval_perplexity"] = perplexity(scores["eval_loss"])
    sums = torch.cat(trainer.scores.rows).numpy() if trainer.scores.rows else None
    found = Evaluation(scores, logits, labels, sums)
    if trainer.args.process_index != 0:
        return found  # the others write nothing
    samples = _samples(trainer, found, seen)
    return replace(found, errors=_errors(found, samples), samples=samples)


def wiring_of(trainer: DistillationTrainer) -> dict[str, Any]:
    """What a trainer that evaluates another model in the same way takes over."""
    return {
        "task": trainer.task,
        "eval_dataset": trainer.eval_dataset,
        "data_collator": trainer.data_collator,
        "compute_metrics": trainer.compute_metrics,
        "preprocess_logits_for_metrics": trainer.preprocess_logits_for_metrics,
        "processing_class": trainer.processing_class,
    }


@contextmanager
def _watched(trainer: DistillationTrainer) -> Iterator[list[EvalPrediction]]:
    """What the metrics of an evaluation are computed from."""
    compute: Any = trainer.compute_metrics
    seen: list[EvalPrediction] = []

    def watching(prediction: EvalPrediction) -> Any:
        seen.append(prediction)
        return compute(prediction)

    if compute is not None and not trainer.args.batch_eval_metrics:
        trainer.compute_metrics = watching
    try:
        yield seen
    finally:
        trainer.compute_metrics = compute


def _samples(trainer: DistillationTrainer, found: Evaluation, seen: list[EvalPrediction]) -> Samples:
    """Bootstrap values of the metrics, of the loss on the labels and of perplexity."""
    compute = trainer.compute_metrics
    made: Samples = {}
    if compute is not None and len(seen) == 1:
        made = errors.bootstrap(compute, seen[0])
    if found.rows is not None and "eval_loss" in found.scores:
        loss = errors.of_ratio(*(found.rows[:, STATISTICS.index(name)] for name in ("task", "task_count")))
        if loss is not None:
            made["loss"] = loss
            if "eval_perplexity" in found.scores:
                made["perplexity"] = np.exp(np.minimum(loss, 700))
    return made


def _errors(found: Evaluation, samples: Samples) -> dict[str, float]:
    """Standard errors of all that was sampled; in closed form for the loss on the labels and perplexity."""
    made = {name: float(np.std(values, ddof=1)) for name, values in samples.items()}
    if found.rows is not None and "loss" in made:
        task, count = (found.rows[:, STATISTICS.index(name)] for name in ("task", "task_count"))
        loss = errors.of_mean(task, count)
        if loss is not None:
            made["loss"] = loss
            if "perplexity" in made:
                made["perplexity"] = loss * found.scores["eval_perplexity"]
    if found.right is not None and "eval_accuracy" in found.scores:
        made.pop("accuracy", None)  # follows from its value
    return made


def _one_class_a_row(trainer: DistillationTrainer) -> bool:
    task = trainer.task
    return isinstance(task, SequenceClassification) and task.problem_type == "single"


def behaviour(
    evaluated: Mapping[str, Evaluation],
    rows: Any,
    *,
    processor: Any,
    names: Sequence[str] | None,
    order: Sequence[int] | None = None,
) -> Behaviour | None:
    """Compare the arms row by row, where their head gives one class a row.

    Args:
        evaluated: By arm.
        rows: The evaluation rows, whose texts are shown.
        processor: Decodes them, if it can.
        names: Of the classes, in the student's order.
        order: The teacher's class of each of the student's, where the teacher's logits are in its own order.
    """
    logits = {name: found.logits for name, found in evaluated.items() if found.logits is not None}
    if not {"teacher", "student"} <= logits.keys():
        return None
    if order is not None:
        logits["teacher"] = logits["teacher"][:, list(order)]
    decode, texts = getattr(processor, "decode", None), {}
    if decode is not None and "input_ids" in rows[0]:
        for i in most_different(logits["teacher"], logits["student"]):
            texts[i] = decode(rows[i]["input_ids"], skip_special_tokens=True)[:_SHOWN_CHARACTERS]
    shown = names or [str(i) for i in range(logits["student"].shape[1])]
    return describe_behaviour(logits, evaluated["student"].labels, classes=shown, texts=texts)


def slices(
    evaluated: Mapping[str, Evaluation],
    rows: Any,
    *,
    wanted: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    names: Sequence[str] | None,
) -> list[Slice]:
    """Quality of the arms on parts of the rows: accuracy where a row has one class, else the task loss.

    Args:
        evaluated: By arm.
        rows: The evaluation rows.
        wanted: "length", "label", or names of columns.
        columns: Columns of the data, one value a row.
        names: Of the classes, for "label".

    Raises:
        ValueError: If there is no such column, or rows have no length or label.
    """
    if not wanted:
        return []
    found = {by: _column(by, evaluated["student"], rows, columns, names) for by in wanted}
    metric, values = "accuracy", {name: arm.right for name, arm in evaluated.items()}
    if values["student"] is None:
        metric, values = "loss", {n: arm.per_row("task", "task_count") for n, arm in evaluated.items()}
    if values["student"] is None:
        metric, values = "kl", {n: arm.per_row("kl", "kd_count") for n, arm in evaluated.items()}
    if values["student"] is None:
        raise ValueError(f"slices={list(wanted)}: neither labels nor a teacher's distribution to measure by")
    return slice_rows(found, {n: v for n, v in values.items() if v is not None}, metric=metric)


def _column(
    by: str, student: Evaluation, rows: Any, columns: Mapping[str, Sequence[Any]], names: Sequence[str] | None
) -> Sequence[Any]:
    if by in columns:
        return columns[by]
    if by == "length" and len(rows) and "input_ids" in rows[0]:
        return [len(row["input_ids"]) for row in rows]
    if by == "label" and student.labels is not None and np.asarray(student.labels).ndim == 1:
        labels = np.asarray(student.labels)
        return [None if i < 0 else names[int(i)] if names else str(int(i)) for i in labels]
    known = ", ".join(["length", "label", *columns])
    raise ValueError(
        f"slices={by!r}: the evaluation rows have no such column (there is {known}; 'length' needs text, "
        "'label' one class a row)"
    )


@torch.no_grad()
def kl_by_position(
    trainers: Mapping[str, DistillationTrainer], rows: Any, collator: Callable[[list[Any]], Any]
) -> list[PositionKL]:
    """KL to the teacher along the sequence, at T = 1, on up to 256 rows.

    Args:
        trainers: By arm, each with the teacher; heads with one position a token.
        rows: The evaluation rows.
        collator: Makes batches of them.

    Returns:
        Up to eight stretches of the same number of positions; nothing for heads without a distribution at
        every token, and for teachers that give a few entries of theirs.
    """
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(0, dtype=torch.float64)
    for name, trainer in trainers.items():
        values, counts = _along(trainer, rows, collator)
        if values is None:
            return []
        sums[name] = values
    edges = np.unique(np.linspace(0, len(counts), min(_STRETCHES, len(counts)) + 1).astype(int))
    made = []
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        count = float(counts[first:end].sum())
        if count > 0:
            kl = {name: float(values[first:end].sum()) / count for name, values in sums.items()}
            made.append(PositionKL(int(first), int(end) - 1, kl, round(count)))
    return made


def _along(trainer: DistillationTrainer, rows: Any, collator: Any) -> tuple[Tensor | None, Tensor]:
    """Sums of the KL and of the weights per position, `[L]` each."""
    objective, device = trainer.objective, trainer.args.device
    total, weights = (torch.zeros(0, dtype=torch.float64) for _ in range(2))
    models = [trainer.student, getattr(trainer.teacher, "model", None)]
    pieces = any(in_pieces(model) for model in models if model is not None)  # FSDP 2: not for one rank alone
    if trainer.task.name not in _TOKEN_HEADS or objective.classes.unlike or pieces:
        return None, weights
    some = [rows[i] for i in range(min(len(rows), _POSITION_ROWS))]
    training, model = trainer.student.training, trainer.student.eval()
    for batch in DataLoader(some, trainer.args.eval_batch_size, collate_fn=collator):  # type: ignore[arg-type]
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        supervision = trainer.task.supervise_batch(batch)
        length = len(supervision.kd_weight) // supervision.rows
        _, student, teacher = trainer.pair.dense(model, batch, distil=True)
        if teacher is None or isinstance(teacher, SparseSignal):
            return None, weights
        index = select([supervision])[0].kd
        z = objective.classes.student(take(student, index))
        t = objective.classes.teacher(take(logits_of(teacher), index))
        kl = forward_kl(*log_probs(z, t, temperature=1.0, teacher_temperature=1.0)).double().cpu()
        where = (torch.arange(len(supervision.kd_weight), device=device) if index is None else index) % length
        weight = take(supervision.kd_weight, index).double().cpu()
        if length > len(total):
            grow = torch.zeros(length - len(total), dtype=torch.float64)
            total, weights = torch.cat([total, grow]), torch.cat([weights, grow])
        total.index_add_(0, where.cpu(), kl * weight)
        weights.index_add_(0, where.cpu(), weight)
    trainer.student.train(training)
    return total, weights
