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
from hf_kd.elsewhere import joined
from hf_kd.evaluating import EVALUATION, Evaluation
from hf_kd.options import RunOptions, without_features
from hf_kd.provenance import Meter
from hf_kd.records import resolved_options
from hf_kd.results import Arm, Results
from hf_kd.setting import Setting, alone, wiring
from hf_kd.sharding import in_pieces
from hf_kd.teacher_view import KNOWN, evaluate_teacher
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
        models: By arm; "student" is needed, and "teacher" unless it is elsewhere.
        training: What the student's training logged.
        meter: Time and energy since the run began, for the record.

    Returns:
        The results on rank 0, None on the others.
    """
    run, args, data = setting.run, setting.args, setting.data
    trainers = {}
    for name, model in models.items():
        trainers[name] = trainer_of(setting, name, model)
        setting = joined(setting, trainers[name])  # by training already, if that asked anybody
    others = {name: trainer for name, trainer in trainers.items() if name != "teacher"}
    evaluated = {name: evaluate_arm(setting, name, trainer) for name, trainer in trainers.items()}
    rows, here = test_rows(data), "teacher" in models
    scored = None if here else evaluate_teacher(others["student"], rows, data.primary_metric)
    evaluated = evaluated if scored is None else {"teacher": scored, **evaluated}
    if args.process_index != 0:
        return None
    labelled = all(f"eval_{data.primary_metric}" in found.scores for found in evaluated.values())
    primary = data.primary_metric if labelled else None
    student = models["student"]
    saved = {
        "teacher": folder_of(models.get("teacher")),
        "student": args.folder,
        "control": args.folder / "control",
    }
    arms = measured(
        models,
        evaluated,
        rows,
        data.collator,
        primary=primary,
        folders=saved,
        teacher=others["student"].teacher,
    )
    in_own_order = here and evaluated["student"].logits is not None
    return Results(
        task=str(run.task),
        primary_metric=primary,
        greater_is_better=data.greater_is_better,
        arms=arms,
        examples=len(rows),
        machine=measure.machine(args.device),
        provenance={
            "dataset": run.dataset,
            **sources(args, {"train": data.train, "eval": data.eval, "test": data.test}, run),
            "teacher_identity": teacher_of(others.values()),
            **meter.record(),
        },
        training=training,
        differences=paired.differences(arms, primary),
        behaviour=evaluating.behaviour(
            evaluated,
            rows,
            processor=setting.processor,
            names=label_names(student.config),
            order=align_labels(student.config, models["teacher"].config).order if in_own_order else None,
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
    args = dataclasses.replace(setting.args, **EVALUATION, **without_features())
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
    known = KNOWN if name == "teacher" else {}
    if name == "teacher" and setting.run.unlabelled:
        return Evaluation(dict(known))
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
    primary: str | None,
    folders: Mapping[str, Any],
    teacher: Any = None,
) -> dict[str, Arm]:
    """The arms: what was scored, with what each costs.

    Args:
        models: By arm; a teacher that is no single model in memory is absent or None.
        evaluated: By arm, in the order of the tables.
        rows: The evaluation rows.
        collator: Makes batches of them.
        primary: The metric that decides, if there is one.
        folders: Where models are saved, by arm.
        teacher: Whoever taught; it may say the `model_size` of one elsewhere.
    """
    here = {name: models[name] for name in evaluated if models.get(name) is not None}
    whole = not any(in_pieces(model) for model in here.values())
    if not whole:
        logger.warning("no latency: the models are in pieces over the ranks (FSDP 2)")
    times, batch = costs.time_models(here, rows, collator) if whole else ({}, None)
    arms = {}
    for name, found in evaluated.items():
        model = here.get(name)
        rest: dict[str, Any] = paired.kept(found, primary)
        if model is None:
            rest |= getattr(teacher, "model_size", {})
        elif batch is not None:
            rest["peak_memory"] = costs.peak_memory(model, batch)
        arms[name] = measure.measure_arm(
            model,
            found.scores,
            latency=times.get(name, []),
            errors=found.errors,
            folder=folders.get(name),
            **rest,
        )
    return arms


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
