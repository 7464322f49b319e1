"""The report of a trainer in a script: the same page and card that `hf-kd distill` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from torch import nn

from hf_kd import evaluating, measure, paired
from hf_kd.alignment import label_names
from hf_kd.card import write_card
from hf_kd.comparison import folder_of, measured, sources, teacher_of
from hf_kd.evaluating import EVALUATION, Evaluation
from hf_kd.metrics import LOWER_IS_BETTER
from hf_kd.options import RunOptions, without_features
from hf_kd.pages import write_html
from hf_kd.results import Results
from hf_kd.rows import RowDataset
from hf_kd.teacher_view import evaluate_teacher
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
        teacher: The model that stands as the teacher; default: the one that taught. What is not known of that
            (the cost of several models, of a cache, or of a teacher elsewhere) is left out, and so are its
            scores where it gives some entries of its distribution alone.
        primary_metric: What quality is judged by; default: `metric_for_best_model`, else the first of
            `compute_metrics`, else the loss on the labels.
        greater_is_better: Whether more of it is; default: not for losses, perplexity and errors.
        slices: Also report quality by "length", "label" or columns of the rows.
        dataset: Its name, for page and card; an id on the Hub is linked there.
        watts: Power that the machine draws, in watts, for an estimate of the run's energy.

    Returns:
        The results on rank 0, None on the others.

    Raises:
        ValueError: If there are no rows, no teacher, or no such metric or slice.
    """
    rows = trainer.eval_dataset if rows is None else rows
    if rows is None or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"rows is {type(rows).__name__}: give rows with a length, or the trainer an eval_dataset of such"
        )
    taught = teacher if teacher is not None else getattr(trainer.teacher, "live", None) or trainer.teacher
    inside = trainer.args.self_teacher == "deeper" and teacher is None
    if taught is None or inside:
        raise ValueError(
            f"the trainer's teacher is {type(trainer.teacher).__name__}, nobody beside the student: pass the "
            "model to compare with as teacher="
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
    evaluated = {
        name: evaluating.evaluate(own, rows, primary=primary_metric) for name, own in trainers.items()
    }
    scored = evaluate_teacher(against, rows, primary_metric)
    evaluated = evaluated if scored is None else {"teacher": scored, **evaluated}
    if trainer.args.process_index != 0:
        return None
    primary = _primary(trainer, evaluated, primary_metric)
    models["teacher"] = getattr(against.teacher, "model", None)
    plain, collator = _plain(against, rows)
    names = label_names(getattr(against.student, "config", None))
    wanted = [name for name in slices if name not in ("length", "label")]
    folder = trainer.args.folder
    trainer.meter.watts = watts
    lower = primary is not None and (primary in LOWER_IS_BETTER or "error" in primary)
    arms = measured(
        models,
        evaluated,
        plain,
        collator,
        primary=primary,
        folders={"teacher": folder_of(models["teacher"]), "student": folder},
        teacher=against.teacher,
    )
    results = Results(
        task=trainer.task.name,
        primary_metric=primary,
        greater_is_better=not lower if greater_is_better is None else greater_is_better,
        arms=arms,
        examples=len(rows),
        machine=measure.machine(trainer.args.device),
        provenance={
            "dataset": dataset or "",
            **sources(trainer.args, {"train": trainer.train_dataset, "eval": rows}),
            "teacher_identity": teacher_of([against]),
            **trainer.meter.record(),
        },
        training=numbers_of(trainer.state.log_history),
        differences=paired.differences(arms, primary),
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
    args = dataclasses.replace(trainer.args, **EVALUATION, **without_features())
    return DistillationTrainer(
        model,
        args,
        teacher=teacher,
        teacher_processing_class=trainer.teacher_processing_class,
        **evaluating.wiring_of(trainer),
    )


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
