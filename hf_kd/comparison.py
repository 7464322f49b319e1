"""Every arm of a run on the same rows: quality, behaviour and cost, as `Results`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PrinterCallback

from hf_kd import measure
from hf_kd.alignment import align_labels, label_names
from hf_kd.behaviour import Behaviour, describe_behaviour, most_different
from hf_kd.data.prepare import Prepared
from hf_kd.metrics import perplexity
from hf_kd.options import without_features
from hf_kd.records import resolved_options
from hf_kd.results import Arm, Latency, Results
from hf_kd.setting import Setting, alone, wiring
from hf_kd.sharding import in_pieces
from hf_kd.tasks.text import SequenceClassification
from hf_kd.trainer import DistillationTrainer

# Rows of the batch that latency is measured on.
_LATENCY_ROWS = 32
# Of a row's text that the report shows.
_SHOWN_CHARACTERS = 240


def compare(
    setting: Setting,
    models: dict[str, PreTrainedModel],
    training: list[dict[str, float]],
    *,
    minutes: float,
) -> Results | None:
    """Measure every model on the test rows (the evaluation rows where there are no others).

    Args:
        setting: The run.
        models: By arm; "teacher" and "student" are needed.
        training: What the student's training logged.
        minutes: What the run took so far, for the record.

    Returns:
        The results on rank 0, None on the others.
    """
    run, args, data = setting.run, setting.args, setting.data
    evaluated = {name: _evaluate(setting, name, model) for name, model in models.items()}
    scores = {name: found.scores for name, found in evaluated.items()}
    if args.process_index != 0:
        return None
    rows = _test_rows(data)
    times = _latency(setting, models)
    arms: dict[str, Arm] = {
        name: measure.measure_arm(model, scores[name], latency=[times[name]] if name in times else [])
        for name, model in models.items()
    }
    labelled = all(data.primary_metric in arm.metrics for arm in arms.values())
    return Results(
        task=str(run.task),
        primary_metric=data.primary_metric if labelled else None,
        greater_is_better=data.greater_is_better,
        arms=arms,
        examples=len(rows),
        machine=measure.machine(args.device),
        provenance={
            "dataset": run.dataset,
            "seed": args.seed,
            "processes": args.world_size,
            "minutes": round(minutes, 2),
            "options": {**_given(run), **_given(args)},
        },
        training=training,
        behaviour=_behaviour(setting, models, evaluated),
    )


@dataclass(frozen=True)
class _Evaluation:
    """Metrics of an arm; where the head gives one class a row also logits `[N, C]` and labels `[N]`."""

    scores: dict[str, float]
    logits: Any = None
    labels: Any = None


def _given(options: Any) -> dict[str, Any]:
    """The options that are not at their defaults, as they go into a file."""
    defaults = {spec.name: spec.default for spec in dataclasses.fields(options) if spec.init and spec.repr}
    return {
        name: value
        for name, value in resolved_options(options).items()
        if value is not None and name in defaults and value != defaults[name]
    }


def _behaviour(
    setting: Setting, models: dict[str, PreTrainedModel], evaluated: dict[str, _Evaluation]
) -> Behaviour | None:
    """Compare the arms row by row, where their head gives one class a row."""
    logits = {name: found.logits for name, found in evaluated.items() if found.logits is not None}
    if not {"teacher", "student"} <= logits.keys():
        return None
    student = models["student"]
    order = align_labels(student.config, models["teacher"].config).order
    if order is not None:
        logits["teacher"] = logits["teacher"][:, list(order)]
    decode, rows = getattr(setting.processor, "decode", None), _test_rows(setting.data)
    texts = {}
    if decode is not None and "input_ids" in rows[0]:
        for i in most_different(logits["teacher"], logits["student"]):
            texts[i] = decode(rows[i]["input_ids"], skip_special_tokens=True)[:_SHOWN_CHARACTERS]
    names = label_names(student.config) or [str(i) for i in range(logits["student"].shape[1])]
    return describe_behaviour(logits, evaluated["student"].labels, classes=names, texts=texts)


def _evaluate(setting: Setting, name: str, model: PreTrainedModel) -> _Evaluation:
    """Metrics of one model, how far it is from the teacher, and what it answers."""
    changes: dict[str, Any] = {"alpha": 1.0, "alpha_end": None, "alpha_schedule": "constant"}
    # The teacher itself is there: its whole distribution, and not what was kept of it.
    changes |= {"teacher_cache": None, "cache_miss": "error"}
    changes |= {"self_teacher": None, "self_teacher_dropout": False, "exit_layers": None}
    changes |= {"kl_threshold": None, "output_dir": str(setting.args.folder / "evaluation")}
    changes |= without_features()
    args = dataclasses.replace(setting.args, disable_tqdm=True, **changes)
    if name == "teacher" and setting.run.unlabelled:
        return _Evaluation({"eval_kl": 0.0, "eval_agreement": 1.0})
    if name == "teacher":
        data, processor = setting.teacher_data, setting.teacher_processor
        trainer = alone(model, args, data, processor, setting.run)
        known = {"eval_kl": 0.0, "eval_agreement": 1.0}
    else:
        data, known = setting.data, {}
        trainer = DistillationTrainer(
            model,
            args,
            teacher=setting.teaching,
            task=setting.run.task,
            teacher_processing_class=setting.teacher_processor,
            **wiring(data, setting.processor),
        )
    trainer.remove_callback(PrinterCallback)  # the table says it
    logits = labels = None
    if _one_class_a_row(trainer):
        logits, labels, metrics = trainer.predict(_test_rows(data), metric_key_prefix="eval")
    else:
        metrics = trainer.evaluate(_test_rows(data))
    scores = {**metrics, **known}
    if data.primary_metric == "perplexity" and "eval_loss" in scores:
        scores["eval_perplexity"] = perplexity(scores["eval_loss"])
    return _Evaluation(scores, logits, labels)


def _one_class_a_row(trainer: DistillationTrainer) -> bool:
    task = trainer.task
    return isinstance(task, SequenceClassification) and task.problem_type == "single"


def _test_rows(data: Prepared) -> Any:
    return data.eval if data.test is None else data.test


def _latency(setting: Setting, models: dict[str, PreTrainedModel]) -> dict[str, Latency]:
    """Time all models on one batch of rows of about the median length; nothing if on several devices."""
    if any(in_pieces(model) for model in models.values()):
        setting.console.print("no latency: the models are in pieces over the ranks (FSDP 2)")
        return {}
    devices = {str(model.device) for model in models.values()}
    if len(devices) > 1:
        setting.console.print(
            f"no latency: the models are on different devices, {', '.join(sorted(devices))}"
        )
        return {}
    rows = _test_rows(setting.data)
    few = [rows[i] for i in range(min(len(rows), 8 * _LATENCY_ROWS))]
    few.sort(key=lambda row: len(row.get("input_ids", ())))
    middle = max(0, (len(few) - _LATENCY_ROWS) // 2)
    batch = setting.data.collator(few[middle : middle + _LATENCY_ROWS])
    return measure.latency(dict(models), batch)
