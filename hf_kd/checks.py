"""Every problem found before step 0, all at once, each with its fix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .answers import answer, count, logits_of
from .fidelity import check_sparse
from .findings import Report
from .loss_checks import check_coupling, check_divergence, check_features
from .matching import first_eval_dataset, queries_differ
from .objective import counts_of
from .packing import check_packing
from .sample import sample_batches
from .settling import needs_settling, settle
from .streams import check_streams
from .targets import check_target
from .tasks import Batch, SequenceClassification, Supervision
from .teachers.models import TEACHER_PREFIX, ModelTeacher, forward_parameters
from .teachers.signal import SparseSignal

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


def inspect(
    trainer: DistillationTrainer, *, training: bool = True, teacher_is_trained: bool = True
) -> Report:
    """Look at models, options and the first batch of a trainer; train nothing.

    Args:
        trainer: What would be run.
        training: Also check what only training needs.
        teacher_is_trained: Whether the teacher is as it will be; otherwise its score says nothing yet.
    """
    report = Report()
    if trainer.alignment_problem is not None:
        report.add("teacher", str(trainer.alignment_problem))
    _describe_models(trainer, report)
    if training:
        _check_options(trainer, report)
    check_streams(trainer, report, training=training)
    name, dataset = (
        ("train_dataset", trainer.train_dataset)
        if training
        else ("eval_dataset", first_eval_dataset(trainer))
    )
    if dataset is None:
        if training:
            report.add("train_dataset", "train_dataset=None, but training needs data: pass train_dataset.")
        return report
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        report.add(name, f"{name} has 0 rows; give at least one.")
        return report
    batch = _first_batch(trainer, dataset, name, report)
    if batch is not None:
        _check_batch(trainer, batch, report, teacher_is_trained)
        if training:
            check_features(trainer, batch, report)
    if training and teacher_is_trained and not report.problems and needs_settling(trainer):
        try:
            trainer.settled = settle(trainer)
        except ValueError as error:
            report.add("teacher", str(error))
    if trainer.settled is not None or trainer.args.temperature != "auto":
        report.terms = trainer.objective.describe(trainer.mix())
    return report


def _check_options(trainer: DistillationTrainer, report: Report) -> None:
    args = trainer.args
    if args.fp16 and args.device.type == "cpu":
        report.add("fp16", "fp16=True needs a GPU, but the device is 'cpu'; set bf16=True or leave both off.")
    if args.spike_action != "warn" and trainer.is_deepspeed_enabled:
        report.add(
            "spike_action",
            f"spike_action={args.spike_action!r} drops a step before it is applied, but DeepSpeed applies it "
            "with the backward; set spike_action='warn'.",
        )
    if args.kl_threshold is not None:
        if trainer.teacher is None or not trainer.distils:
            report.add("kl_threshold", f"kl_threshold={args.kl_threshold} needs a teacher with alpha > 0.")
        elif trainer.objective.task.kind == "regression":
            report.add(
                "kl_threshold",
                f"kl_threshold={args.kl_threshold} has no meaning for regression, which has no KL; remove "
                "it.",
            )
        elif (
            str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no"
            or trainer.eval_dataset is None
        ):
            report.add(
                "kl_threshold",
                f"kl_threshold={args.kl_threshold} is compared at evaluations, but "
                f"eval_strategy={getattr(args.eval_strategy, 'value', args.eval_strategy)!r} and "
                f"eval_dataset is {'missing' if trainer.eval_dataset is None else 'given'}; set "
                "eval_strategy='steps' or 'epoch' and give an eval_dataset.",
            )
    if args.label_smoothing_factor and trainer.compute_loss_func is not None:
        report.add(
            "label_smoothing_factor",
            f"label_smoothing_factor={args.label_smoothing_factor} and compute_loss_func both define the "
            "task loss; keep one.",
        )
    if queries_differ(trainer):
        report.warnings.append(
            "Student and teacher have different object queries, so their class logits don't correspond one "
            "to one: start the student from the teacher's queries, or distil its backbone instead."
        )
    if args.label_smoothing_factor and trainer.task.name in ("ctc", "object-detection"):
        report.add(
            "label_smoothing_factor",
            f"label_smoothing_factor={args.label_smoothing_factor} has no meaning for task "
            f"{trainer.task.name!r}; set it to 0.",
        )
    if args.label_smoothing_factor and trainer.task.kind == "regression":
        report.add(
            "label_smoothing_factor", "label_smoothing_factor has no meaning for regression; set it to 0."
        )
    check_coupling(trainer, report)
    if getattr(getattr(trainer.student, "config", None), "output_router_logits", False):
        report.warnings.append(
            "config.output_router_logits=True: the router's auxiliary loss is not part of this objective."
        )


def _first_batch(
    trainer: DistillationTrainer, dataset: Any, name: str, report: Report
) -> dict[str, Any] | None:
    """The first rows as the dataloader would collate them."""
    try:
        batches = sample_batches(trainer, dataset, 1)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        columns = getattr(dataset, "column_names", None)
        if str(error).startswith("No columns in the dataset match"):  # Trainer's own names no remedy
            report.add(
                name,
                f"{name} has the columns {columns}, and the models read {_read_columns(trainer)}: tokenise "
                "it (or prepare its images or sound) before it is passed, or rename its columns.",
            )
            return None
        for column in {*_read_columns(trainer), *trainer.task.labels, "label"} & {*(columns or ())}:
            value = dataset[0][column]
            if isinstance(value, str):
                report.add(
                    name,
                    f"{name}: column {column!r} holds text, {value[:20]!r}, where numbers are needed: write "
                    "them into a new column, 'labels' for labels, and remove this one (a column of text that "
                    "is written over keeps its type).",
                )
                return None
        report.add(
            name,
            f"{name}: the first rows could not be made into a batch ({type(error).__name__}: {error}). "
            f"Its columns are {columns}; the models read {_read_columns(trainer)}.",
        )
        return None
    if not batches:
        report.add(name, f"{name} has 0 rows; give at least one.")
        return None
    return batches[0]


def _read_columns(trainer: DistillationTrainer) -> list[str]:
    teacher = trainer.teacher.columns if trainer.teacher is not None else ()
    plain = [c for c in teacher if not c.startswith(TEACHER_PREFIX)]
    return sorted({*forward_parameters(trainer.student), *plain})


def _check_batch(
    trainer: DistillationTrainer, batch: dict[str, Any], report: Report, teacher_is_trained: bool
) -> None:
    task, args = trainer.task, trainer.args
    columns = sorted(batch)
    if not trainer.pair.student_inputs({k: v for k, v in batch.items() if k not in task.labels}):
        report.add(
            "train_dataset",
            f"The batch has the columns {columns}, but the student reads "
            f"{list(forward_parameters(trainer.student))}; rename the columns.",
        )
        return
    try:
        supervision = task.supervise_batch(batch)
    except ValueError as error:
        report.add("train_dataset", str(error))
        return
    except (IndexError, RuntimeError, KeyError) as error:
        report.add(
            "task",
            f"task={task.name!r} can't read the first batch ({type(error).__name__}: {error}), whose columns "
            f"are {columns}. Choose the task that fits the model and its data.",
        )
        return
    needs_labels = min(args.alpha, args.alpha if args.alpha_end is None else args.alpha_end) < 1.0
    if supervision.labels is None and needs_labels:
        there = getattr(trainer.train_dataset, "column_names", None) or columns  # unread ones too
        report.add(
            "alpha",
            f"alpha={args.alpha} gives the task loss a weight of {1 - args.alpha:g}, but the data has no "
            f"{' / '.join(repr(name) for name in task.labels)} column (it has {there}). Set alpha=1 to "
            "distil without labels, or rename or add the column.",
        )
    if supervision.labels is None and args.metric_for_best_model in ("loss", "eval_loss"):
        report.add(
            "metric_for_best_model",
            f"metric_for_best_model={args.metric_for_best_model!r} is the task loss, which data without "
            "labels does "
            "not have; set metric_for_best_model='kl' and greater_is_better=False.",
        )
    counts = counts_of([supervision]).tolist()
    report.facts.append(
        (
            "supervised positions in the first batch",
            f"{counts[1]:g} x {task.position}, {counts[0]:g} with a label",
        )
    )
    wanted = counts[0] if needs_labels and supervision.labels is not None else counts[1]
    if wanted == 0:
        report.add(
            task.labels[0] if task.labels else "labels",
            f"All labels of the first batch are {task.ignore_index} (no label): nothing would be learnt. "
            "Check the preprocessing, or set alpha=1 and supervise='all' to distil without labels.",
        )
        return
    check_divergence(trainer, batch, supervision, report)
    check_target(trainer, supervision, report)
    logits = _check_models_on(trainer, batch, supervision, report)
    if logits is not None and teacher_is_trained:
        _check_teacher_knows(trainer, logits, supervision, report)
    if not report.problems:
        check_packing(trainer, batch, report)
    report.example = _example(trainer, batch, supervision)


@torch.no_grad()
def _check_models_on(
    trainer: DistillationTrainer, batch: Batch, supervision: Supervision, report: Report
) -> Tensor | None:
    """Run both models; the teacher's logits, if they can be scored against the labels."""
    task = trainer.task
    training = trainer.student.training
    trainer.student.eval()
    try:
        with torch.random.fork_rng():
            inputs = trainer.pair.inputs(batch)
            outputs = trainer.student(**trainer.pair.student_inputs(inputs))
            student = trainer.pair.positions(outputs, batch)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        report.add("model", f"The student cannot run on the first batch ({type(error).__name__}: {error}).")
        return None
    finally:
        trainer.student.train(training)
    if student.shape[0] != len(supervision.kd_weight):
        report.add(
            "task",
            f"Task {task.name!r} expects {len(supervision.kd_weight)} positions in the first batch, but the "
            f"student gives logits for {student.shape[0]} (logits {tuple(student.shape)}); choose the task "
            "that fits.",
        )
        return None
    labels_fit = _check_labels(trainer, supervision, student.shape[-1], report)
    if trainer.teacher is None or not trainer.distils:
        return None
    try:
        given = answer(trainer.teacher(inputs), task, batch)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        report.add("teacher", f"The teacher cannot run on the first batch ({type(error).__name__}: {error}).")
        return None
    if trainer.alignment_problem is not None:
        return None
    if count(given) != student.shape[0]:
        report.add(
            "teacher",
            f"teacher: it answers for {count(given)} positions of the first batch, the student for "
            f"{student.shape[0]}; both must divide the input alike (tokenizer, patch size, stride).",
        )
        return None
    if isinstance(given, SparseSignal):
        check_sparse(trainer, given, supervision.kd_weight, student.shape[-1], report)
        return None
    teacher = logits_of(given)
    z, t = trainer.objective.classes.student(student), trainer.objective.classes.teacher(teacher)
    unlike = trainer.objective.classes.unlike
    if not unlike and z.shape[-1] != t.shape[-1]:
        report.add(
            "teacher",
            f"teacher: its head has {t.shape[-1]} classes, the student's {z.shape[-1]}; give both the same "
            "labels.",
        )
        return None
    if not bool(t[supervision.kd_weight > 0].isfinite().any(-1).all()):
        report.add("teacher", "teacher: its logits on the first batch are NaN or infinite; check its dtype.")
        return None
    per_position = supervision.task_weight.shape == supervision.kd_weight.shape
    return teacher if labels_fit and not unlike and task.kind == "classes" and per_position else None


def _check_labels(
    trainer: DistillationTrainer, supervision: Supervision, classes: int, report: Report
) -> bool:
    """Whether every label is a class of the student; notes a problem if not. Regression has no range."""
    labels, task = supervision.labels, trainer.task
    if not isinstance(labels, Tensor) or task.kind == "regression":
        return labels is not None
    counted = labels[labels != task.ignore_index]
    multi = isinstance(task, SequenceClassification) and task.problem_type == "multi"
    if multi:
        classes = 2  # of each label: absent and present
    elif counted.is_floating_point():
        report.add(
            "problem_type",
            f"labels are {counted.dtype}, but the head gives classes; use integer labels, or set "
            "problem_type to 'multi_label_classification' or 'regression' in the student's config.",
        )
        return False
    out = counted[(counted < 0) | (counted > classes - 1)]
    if len(out):
        name = task.labels[0]
        worst = sorted(set(out.tolist()))[:5]
        fix = "targets are probabilities" if multi else "give num_labels classes, or map the labels"
        report.add(
            name, f"{name} has the values {worst}, outside the student's classes 0 to {classes - 1}; {fix}."
        )
        return False
    return True


def _check_teacher_knows(
    trainer: DistillationTrainer, teacher: Tensor, supervision: Supervision, report: Report
) -> None:
    """A head initialised at random: a teacher that knows the task beats the uniform guess."""
    sums = trainer.objective.evaluate(trainer.objective.classes.teacher(teacher), teacher, supervision).sum(0)
    if trainer.objective.classes.order is not None or trainer.objective.classes.shared is not None:
        return
    scores = trainer.objective.summarise(sums, "teacher")
    loss, chance = scores.get("teacher_loss"), math.log(max(teacher.shape[-1], 2))
    if loss is None:
        return
    report.facts.append(("teacher's own loss on the first batch", f"{loss:.3g} (uniform guess {chance:.3g})"))
    if loss >= 0.98 * chance:
        report.warnings.append(
            f"The teacher's own loss on the first batch is {loss:.3g}, no better than a uniform guess "
            f"({chance:.3g}): was its head trained on this task, with the labels in this order?"
        )


def _describe_models(trainer: DistillationTrainer, report: Report) -> None:
    teacher = trainer.teacher.model if isinstance(trainer.teacher, ModelTeacher) else None
    student = trainer.accelerator.unwrap_model(trainer.student)

    def rows(model: nn.Module | None) -> list[str]:
        if model is None:
            return [type(trainer.teacher).__name__ if trainer.teacher is not None else "none", *[""] * 5]
        config = getattr(model, "config", None)
        unique = {p.data_ptr(): p.numel() for p in model.parameters()}
        names = ("num_hidden_layers", "hidden_size")
        return [
            type(model).__name__,
            str(getattr(model, "name_or_path", "") or "-"),
            f"{sum(unique.values()):,}",
            *(str(getattr(config, name, "-")) for name in names),
            f"{getattr(model, 'dtype', next(iter(p.dtype for p in model.parameters()), '-'))}".removeprefix(
                "torch."
            ),
        ]

    labels = ("class", "from", "parameters", "layers", "hidden size", "dtype")
    report.models = list(zip(labels, rows(teacher), rows(student), strict=True))
    report.facts.append(("task", f"{trainer.task.name}, a supervised position is a {trainer.task.position}"))
    report.facts.append(("device", f"{trainer.args.device} x {trainer.accelerator.num_processes}"))


def _example(
    trainer: DistillationTrainer, batch: Mapping[str, Any], supervision: Supervision
) -> list[tuple[str, bool]]:
    """The first row's tokens and which of them are supervised, where the task's positions are tokens."""
    decode, ids = getattr(trainer.processing_class, "decode", None), batch.get("input_ids")
    if decode is None or not isinstance(ids, Tensor) or ids.ndim != 2:
        return []
    counts = supervision.kd_weight
    if counts.numel() != ids.numel():
        return [(decode(ids[0]), True)]
    row = counts.reshape(ids.shape)[0] > 0
    return [
        (decode([token]), bool(count)) for token, count in zip(ids[0].tolist(), row.tolist(), strict=True)
    ]
