"""Every arm of a run on the same rows: quality, behaviour and cost, as `Results`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from hf_kd import costs, evaluating, measure, paired, provenance
from hf_kd.alignment import align_labels, label_names
from hf_kd.config import DistillationArguments
from hf_kd.data.prepare import Prepared
from hf_kd.evaluating import EVALUATION, Evaluation
from hf_kd.options import RunOptions, without_features
from hf_kd.provenance import Meter
from hf_kd.records import resolved_options
from hf_kd.results import Arm, Results
from hf_kd.setting import Setting, alone, wiring
from hf_kd.sharding import in_pieces
from hf_kd.trainer import DistillationTrainer

logger = logging.getLogger(__name__)


def compare(
    setting: Setting,
    models: dict[str, PreTrainedModel],
    training: list[dict[str, float]],
    *,
    meter: Meter,
) -> Results | None:
    """Measure every model on the test rows (the evaluation rows where there are no others).

    Args:
        setting: The run.
        models: By arm; "teacher" and "student" are needed.
        training: What the student's training logged.
        meter: Time and energy since the run began, for the record.

    Returns:
        The results on rank 0, None on the others.
    """
    run, args, data = setting.run, setting.args, setting.data
    trainers = {name: trainer_of(setting, name, model) for name, model in models.items()}
    evaluated = {name: evaluate_arm(setting, name, trainer) for name, trainer in trainers.items()}
    if args.process_index != 0:
        return None
    rows = test_rows(data)
    labelled = all(f"eval_{data.primary_metric}" in found.scores for found in evaluated.values())
    student = models["student"]
    saved = {
        "teacher": folder_of(models["teacher"]),
        "student": args.folder,
        "control": args.folder / "control",
    }
    others = {name: trainer for name, trainer in trainers.items() if name != "teacher"}
    return Results(
        task=str(run.task),
        primary_metric=data.primary_metric if labelled else None,
        greater_is_better=data.greater_is_better,
        arms=measured(models, evaluated, rows, data.collator, folders=saved),
        examples=len(rows),
        machine=measure.machine(args.device),
        provenance={
            "dataset": run.dataset,
            **sources(args, {"train": data.train, "eval": data.eval, "test": data.test}, run),
            "teacher_identity": teacher_of(others.values()),
            **meter.record(),
        },
        training=training,
        differences=paired.differences(evaluated, data.primary_metric if labelled else None),
        behaviour=evaluating.behaviour(
            evaluated,
            rows,
            processor=setting.processor,
            names=label_names(student.config),
            order=align_labels(student.config, models["teacher"].config).order
            if evaluated["student"].logits is not None
            else None,
        ),
        positions=evaluating.kl_by_position(others, rows, data.collator),
        slices=evaluating.slices(
            evaluated,
            rows,
            wanted=run.slices or (),
            columns=data.columns,
            names=label_names(student.config),
        ),
    )


def trainer_of(setting: Setting, name: str, model: Any) -> DistillationTrainer:
    """What evaluates one arm: the teacher with its own data, every other one against the teacher."""
    changes = {**EVALUATION, "output_dir": str(setting.args.folder / "evaluation"), **without_features()}
    args = dataclasses.replace(setting.args, **changes)
    if name == "teacher":
        return alone(model, args, setting.teacher_data, setting.teacher_processor, setting.run)
    return DistillationTrainer(
        model,
        args,
        teacher=setting.teaching,
        task=setting.run.task,
        teacher_processing_class=setting.teacher_processor,
        **wiring(setting.data, setting.processor),
    )


def evaluate_arm(setting: Setting, name: str, trainer: DistillationTrainer) -> Evaluation:
    """Metrics of one arm, how far it is from the teacher, and what it answers."""
    known = {"eval_kl": 0.0, "eval_agreement": 1.0} if name == "teacher" else {}
    if name == "teacher" and setting.run.unlabelled:
        return Evaluation(known)
    data = setting.teacher_data if name == "teacher" else setting.data
    return evaluating.evaluate(trainer, test_rows(data), known=known, primary=data.primary_metric)


def test_rows(data: Prepared) -> Any:
    """The rows of the final table."""
    return data.eval if data.test is None else data.test


def measured(
    models: Mapping[str, Any],
    evaluated: Mapping[str, Evaluation],
    rows: Any,
    collator: Any,
    *,
    folders: Mapping[str, Any] | None = None,
) -> dict[str, Arm]:
    """The arms: what was scored, with what each costs.

    Args:
        models: By arm.
        evaluated: Likewise.
        rows: The evaluation rows.
        collator: Makes batches of them.
        folders: Where models are saved, by arm.
    """
    whole = not any(in_pieces(model) for model in models.values())
    if not whole:
        logger.warning("no latency: the models are in pieces over the ranks (FSDP 2)")
    times, batch = costs.time_models(models, rows, collator) if whole else ({}, None)
    return {
        name: measure.measure_arm(
            model,
            evaluated[name].scores,
            latency=times.get(name, []),
            errors=evaluated[name].errors,
            folder=(folders or {}).get(name),
            peak_memory=None if batch is None else costs.peak_memory(model, batch),
        )
        for name, model in models.items()
    }


def sources(
    args: DistillationArguments, splits: Mapping[str, Any], run: RunOptions | None = None
) -> dict[str, Any]:
    """Options, seeds, versions, data and revision that the numbers come from.

    Args:
        args: The trainer's arguments.
        splits: The rows by name.
        run: Models and data as they were asked for.
    """
    prints = {name: provenance.data_fingerprint(rows) for name, rows in splits.items()}
    options = [args] if run is None else [run, args]
    return {
        "seed": args.seed,
        "data_seed": args.data_seed,
        "processes": args.world_size,
        "versions": provenance.versions(),
        "git_revision": provenance.git_revision(),
        "data": {name: found for name, found in prints.items() if found},
        "teacher_cache": provenance.cache_identity(args.teacher_cache),
        "options": {name: value for part in options for name, value in given(part).items()},
        "resolved": {name: value for part in options for name, value in resolved_options(part).items()},
    }


def given(options: Any) -> dict[str, Any]:
    """The options that are not at their defaults, as they go into a file."""
    defaults = {spec.name: spec.default for spec in dataclasses.fields(options) if spec.init and spec.repr}
    return {
        name: value
        for name, value in resolved_options(options).items()
        if value is not None and name in defaults and value != defaults[name]
    }


def teacher_of(trainers: Iterable[DistillationTrainer]) -> dict[str, str] | None:
    """Name, revision and fingerprint of the weights of the teacher that was compared with."""
    return next((dict(t.teacher.identity) for t in trainers if t.teacher is not None), None)


def folder_of(model: Any) -> Path | None:
    """Where a model was loaded from: a directory, or the Hub's copy of it on this machine."""
    name = str(getattr(model, "name_or_path", "") or "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a name that the Hub would take
        return None
    return Path(found).parent if isinstance(found, str) else None
