"""The report of a trainer in a script: the same page and card that `hf-kd distill` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

import datasets
from torch import Tensor, nn

from hf_kd import evaluating, measure, paired
from hf_kd.alignment import ClassMap, label_names
from hf_kd.card import write_card
from hf_kd.comparison import folder_of, measured, sources, teacher_of
from hf_kd.evaluating import EVALUATION, Evaluation
from hf_kd.losses.projected import head_logits
from hf_kd.metrics import LOWER_IS_BETTER
from hf_kd.options import RunOptions, without_features
from hf_kd.pages import write_html
from hf_kd.results import Results
from hf_kd.rows import RowDataset
from hf_kd.tasks import Task
from hf_kd.teachers import Teacher
from hf_kd.trainer import DistillationTrainer


def report(
    trainer: DistillationTrainer,
    rows: Any = None,
    *,
    control: nn.Module | None = None,
    students: Mapping[str, nn.Module] | None = None,
    teacher: nn.Module | None = None,
    primary_metric: str | None = None,
    greater_is_better: bool | None = None,
    slices: Sequence[str] = (),
    dataset: str | None = None,
    watts: float | None = None,
) -> Results | None:
    """Compare teacher, student and further students; write `results.json`, `report.html` and the card.

    Everything goes into the trainer's `output_dir`. All ranks have to call it.

    Args:
        trainer: The student's trainer, after training.
        rows: The rows to compare on; default: the trainer's `eval_dataset`.
        control: The same student trained without the teacher.
        students: Further students by name; they take the same batches.
        teacher: The model that stands as the teacher; default: the one that taught. Needed where the teacher
            was several models, a cache without one, or a server.
        primary_metric: What quality is judged by; default: `metric_for_best_model`, else the first of
            `compute_metrics`, else the loss on the labels.
        greater_is_better: Whether more of it is; default: not for losses, perplexity and errors.
        slices: Also report quality by "length", "label" or columns of the rows.
        dataset: Its name, for page and card; an id on the Hub is linked there.
        watts: Power that the machine draws, in watts, for an estimate of the run's energy.

    Returns:
        The results on rank 0, None on the others.

    Raises:
        ValueError: If there are no rows, no teacher's model, or no such metric or slice.
    """
    rows = trainer.eval_dataset if rows is None else rows
    if rows is None or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"rows is {type(rows).__name__}: give rows with a length, or the trainer an eval_dataset of such"
        )
    taught = teacher if teacher is not None else getattr(trainer.teacher, "live", None) or trainer.teacher
    inside = trainer.args.self_teacher == "deeper" and teacher is None
    alone = teacher is not None or isinstance(getattr(taught, "model", None), nn.Module)
    if taught is None or inside or not alone:
        raise ValueError(
            f"the trainer's teacher is {type(trainer.teacher).__name__}, no single model in memory, so there "
            "is nothing to weigh and time: pass the model to compare with as teacher="
        )
    models: dict[str, Any] = {"student": trainer.accelerator.unwrap_model(trainer.model)}
    models |= {"control": control} if control is not None else {}
    clash = {"teacher", *models} & set(students or {})
    if clash:
        raise ValueError(
            f"students={sorted(students or {})}: {sorted(clash)[0]!r} is taken, name it otherwise"
        )
    models |= dict(students or {})
    trainers = {name: _evaluator(trainer, model, taught) for name, model in models.items()}
    against = trainers["student"]
    evaluated = {"teacher": _evaluate_teacher(trainer, against, rows, primary_metric)}
    for name, own in trainers.items():
        evaluated[name] = evaluating.evaluate(own, rows, primary=primary_metric)
    if trainer.args.process_index != 0:
        return None
    primary = _primary(trainer, evaluated, primary_metric)
    models = {"teacher": getattr(against.teacher, "model", None), **models}
    plain, collator = _plain(against, rows)
    names = label_names(getattr(against.student, "config", None))
    wanted = [name for name in slices if name not in ("length", "label")]
    folder = trainer.args.folder
    trainer.meter.watts = watts
    lower = primary is not None and (primary in LOWER_IS_BETTER or "error" in primary)
    results = Results(
        task=trainer.task.name,
        primary_metric=primary,
        greater_is_better=not lower if greater_is_better is None else greater_is_better,
        arms=measured(
            models,
            evaluated,
            plain,
            collator,
            folders={"teacher": folder_of(models["teacher"]), "student": folder},
        ),
        examples=len(rows),
        machine=measure.machine(trainer.args.device),
        provenance={
            "dataset": dataset or "",
            **sources(trainer.args, {"train": trainer.train_dataset, "eval": rows}),
            "teacher_identity": teacher_of([against]),
            **trainer.meter.record(),
        },
        training=numbers_of(trainer.state.log_history),
        differences=paired.differences(evaluated, primary),
        behaviour=evaluating.behaviour(evaluated, plain, processor=trainer.processing_class, names=names),
        positions=evaluating.kl_by_position(trainers, plain, collator),
        slices=evaluating.slices(
            evaluated,
            plain,
            wanted=slices,
            columns={name: _column(rows, name) for name in wanted},
            names=names,
        ),
    )
    results.write(folder / "results.json")
    write_html(results, folder)
    named = getattr(models["teacher"], "name_or_path", None) or None
    about = RunOptions(teacher=named, dataset=dataset)
    write_card(results, about, folder, name=trainer.args.hub_model_id, script=trainer.run_options is None)
    return results


def numbers_of(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """A trainer's log without what is not a number."""
    return [{k: float(v) for k, v in row.items() if isinstance(v, int | float)} for row in history]


def _evaluator(trainer: DistillationTrainer, model: Any, teacher: Any) -> DistillationTrainer:
    """A trainer that evaluates another model in the same way."""
    folder = str(trainer.args.folder / "evaluation")
    args = dataclasses.replace(trainer.args, **{**EVALUATION, **without_features(), "output_dir": folder})
    return DistillationTrainer(
        model,
        args,
        teacher=teacher,
        task=trainer.task,
        teacher_processing_class=trainer.teacher_processing_class,
        **_wiring(trainer),
    )


def _wiring(trainer: DistillationTrainer) -> dict[str, Any]:
    return {
        "eval_dataset": trainer.eval_dataset,
        "data_collator": trainer.data_collator,
        "compute_metrics": trainer.compute_metrics,
        "preprocess_logits_for_metrics": trainer.preprocess_logits_for_metrics,
        "processing_class": trainer.processing_class,
    }


def _evaluate_teacher(
    trainer: DistillationTrainer, against: DistillationTrainer, rows: Any, primary: str | None
) -> Evaluation:
    """The teacher's metrics on the student's own rows, its classes in the student's order."""
    classes = against.objective.classes
    known = {"eval_kl": 0.0, "eval_agreement": 1.0}
    if classes.unlike or trainer.task.kind == "vectors":
        return Evaluation(known)  # what it predicts has no place among the student's labels
    assert against.teacher is not None
    view = _TeacherView(against.teacher, classes, trainer.task, getattr(against.student, "config", None))
    changes = {**EVALUATION, **without_features(), "alpha": 0.0}
    args = dataclasses.replace(trainer.args, **changes, output_dir=str(trainer.args.folder / "evaluation"))
    own = DistillationTrainer(view, args, task=trainer.task, **_wiring(trainer))
    return evaluating.evaluate(own, rows, known=known, primary=primary)


class _TeacherView(nn.Module):
    """A teacher as a model that takes the student's batches and answers in the student's classes."""

    def __init__(self, teacher: Teacher, classes: ClassMap, task: Task, config: Any) -> None:
        super().__init__()
        self.config = config
        names = dict.fromkeys(teacher.columns)
        signature = Signature([Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in names])

        def forward(**batch: Any) -> dict[str, Tensor]:
            signal = teacher(batch)
            if signal.logits:
                logits = dict(signal.logits)
            elif signal.hidden is not None:
                logits = {task.logits[0]: head_logits(signal.hidden).movedim(-1, task.class_axis)}
            else:
                logits = dict(signal.dense())  # says why not
            return {name: _in_order(value, classes, task.class_axis) for name, value in logits.items()}

        model: Any = getattr(teacher, "model", None)
        if hasattr(model, "generate"):  # for metrics of generated text
            self.generate, self.generation_config = model.generate, model.generation_config
        forward.__signature__ = signature  # type: ignore[attr-defined]  # the columns that the teacher reads
        self.forward = forward


def _in_order(logits: Tensor, classes: ClassMap, axis: int) -> Tensor:
    if classes.order is None and classes.shared is None:
        return logits
    moved = logits.movedim(axis, -1)
    flat = classes.teacher(moved.reshape(-1, moved.shape[-1]))
    return flat.reshape(*moved.shape[:-1], flat.shape[-1]).movedim(-1, axis)


def _primary(
    trainer: DistillationTrainer, evaluated: Mapping[str, Evaluation], wanted: str | None
) -> str | None:
    """The metric that decides; None without labels."""
    shared = set.intersection(*(set(found.scores) for found in evaluated.values()))
    shared = {name.removeprefix("eval_") for name in shared if name.startswith("eval_")}
    if wanted is not None:
        if wanted not in shared:
            raise ValueError(
                f"primary_metric={wanted!r} is not measured for every model: use one of {sorted(shared)}"
            )
        return wanted
    best = str(trainer.args.metric_for_best_model or "").removeprefix("eval_")
    if best in shared and best not in ("kl", "agreement"):
        return best
    measured_names = [name.removeprefix("eval_") for name in evaluated["student"].scores]
    tasks = [
        name
        for name in measured_names
        if name in shared and name not in (*evaluating.OWN_METRICS, *measure.RUNTIME)
    ]
    return tasks[0] if tasks else "loss" if "loss" in shared else None


def _plain(trainer: DistillationTrainer, rows: Any) -> tuple[Any, Any]:
    """The rows with the columns that the models read, and what makes batches of them."""
    if isinstance(rows, datasets.Dataset):
        return RowDataset.unwrap(trainer._remove_unused_columns(rows)), trainer.data_collator
    return rows, trainer._get_collator_with_removed_columns(trainer.data_collator)


def _column(rows: Any, name: str) -> list[Any]:
    columns = rows.column_names if isinstance(rows, datasets.Dataset) else list(rows[0])
    if name not in columns:
        known = ", ".join(["length", "label", *map(str, columns)])
        raise ValueError(f"slices={name!r} is no column of the rows: use some of {known}")
    return list(rows[name]) if isinstance(rows, datasets.Dataset) else [row[name] for row in rows]
