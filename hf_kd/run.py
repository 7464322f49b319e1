"""One run of the command line: distil, train the control, compare.

All ranks go through all stages, since each may train or evaluate; what prints or writes does so on rank 0.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.text import Text
from transformers import PreTrainedModel, PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_kd import checks, measure, report
from hf_kd.config import DistillationArguments
from hf_kd.data.prepare import Prepared
from hf_kd.findings import Problem
from hf_kd.metrics import perplexity
from hf_kd.options import DistillationOptions, RunOptions
from hf_kd.results import Arm, Latency, Results
from hf_kd.setting import Setting, alone, load, wiring, with_trained_teacher
from hf_kd.trainer import DistillationTrainer

# Rows of the batch that latency is measured on.
_LATENCY_ROWS = 32


def distill(run: RunOptions, args: DistillationArguments) -> Results | None:
    """Distil, measure teacher, student and control, and save the student with `results.json` beside it.

    Args:
        run: Models and data.
        args: The trainer's arguments.

    Returns:
        The results on rank 0, None on the others.

    Raises:
        ValueError: What does not exist or does not fit, before any training.
    """
    start = time.monotonic()
    setting = load(run, args)
    console = setting.console
    console.print(Text(describe(setting), style="dim"))
    if setting.untrained:
        refuse_problems(setting)
        setting = with_trained_teacher(setting)
    elif run.train_teacher:
        console.print(
            f"teacher: the one in {setting.teacher.name_or_path}, trained before with the same options"
        )
    initial = copy.deepcopy(setting.student)
    trainer = distiller(setting)
    console.rule("student", align="left")
    trainer.train(resume_from_checkpoint=_checkpoint(args.resume_from_checkpoint, args.folder))
    trainer.save_model(args.output_dir)
    models = {"teacher": setting.teacher, "student": trainer.accelerator.unwrap_model(trainer.model)}
    steps = trainer.state.global_step, trainer.state.max_steps
    del trainer
    control = train_control(setting, initial, *steps)
    if control is not None:
        models["control"] = control
    results = compare(setting, models, minutes=(time.monotonic() - start) / 60)
    if results is None:
        return None
    path = results.write(args.folder / "results.json")
    console.rule("results", align="left")
    report.print_table(results, console)
    console.print(Text(f"student and results are in {path.parent}", style="dim"))
    return results


def check(run: RunOptions, args: DistillationArguments, *, launch: str) -> list[Problem]:
    """Print what a run would do and everything that is wrong with it, without training.

    Args:
        run: Models and data.
        args: The trainer's arguments.
        launch: The command that starts the run, to be printed.

    Returns:
        The problems found.
    """
    setting = load(run, args)
    console = setting.console
    found = checks.inspect(distiller(setting), teacher_is_trained=not setting.untrained)
    found.render(console)
    if setting.untrained:
        console.print("The teacher is trained on the task first.")
    console.print(Text(describe(setting), style="dim"))
    console.print(Text.assemble(("\nto run it: ", "bold"), launch), soft_wrap=True)
    return found.problems


def refuse_problems(setting: Setting) -> None:
    """Find what is wrong with the distillation before minutes go into training its teacher.

    Raises:
        ValueError: All problems in one message.
    """
    # A teacher is frozen while it teaches.
    trainable = [parameter for parameter in setting.teacher.parameters() if parameter.requires_grad]
    checks.inspect(distiller(setting), teacher_is_trained=False).raise_problems()
    for parameter in trainable:
        parameter.requires_grad_(True)


def distiller(setting: Setting) -> DistillationTrainer:
    """The trainer that the run is about."""
    trainer = DistillationTrainer(
        setting.student,
        setting.args,
        teacher=setting.teacher if setting.args.alpha > 0 or (setting.args.alpha_end or 0) > 0 else None,
        task=setting.run.task,
        teacher_processing_class=setting.teacher_processor,
        **wiring(setting.data, setting.processor),
    )
    trainer.run_options = dataclasses.asdict(setting.run)
    return trainer


def describe(setting: Setting) -> str:
    """What was resolved: the data, the budget, and every option that is not at its default."""
    run, args, data = setting.run, setting.args, setting.data
    test = f", {len(data.test)} test" if data.test is not None else ""
    lines = [f"{run.task} on {run.dataset}: {len(data.train)} train, {len(data.eval)} eval{test} rows"]
    chosen = {}
    for options in (run, args):
        for field in dataclasses.fields(options if options is run else DistillationOptions):
            value = getattr(options, field.name)
            if value != field.default and field.name not in ("task", "dataset"):
                chosen[field.name] = value
    lines.append("  ".join(f"{name}={value}" for name, value in chosen.items()))
    length = (
        f"max_steps={args.max_steps}" if args.max_steps > 0 else f"num_train_epochs={args.num_train_epochs:g}"
    )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    lines.append(
        f"{length}  learning_rate={args.learning_rate:g}  rows a step={batch}  seed={args.seed}  "
        f"device={args.device} x {args.world_size}  output_dir={args.output_dir}"
    )
    return "\n".join(lines)


def train_control(
    setting: Setting, initial: PreTrainedModel, steps: int, planned: int
) -> PreTrainedModel | None:
    """The same initial student, data, seed and number of steps, without the teacher.

    Args:
        setting: The run.
        initial: The student as it was before distillation.
        steps: Optimizer steps that distillation took.
        planned: Optimizer steps that it was to take; more than `steps` if it reached its KL threshold.

    Returns:
        The trained model, or None where there is no control to train.
    """
    args = setting.args
    if not setting.run.control:
        return None
    if setting.run.unlabelled:
        setting.console.print("no control: without labels there is nothing else to learn from")
        return None
    folder = args.folder / "control"
    changes: dict[str, Any] = {"output_dir": str(folder)}
    if 0 < steps < planned:
        changes["max_steps"] = steps
    setting.console.rule("control: the same student without the teacher", align="left")
    own = dataclasses.replace(args, **changes)
    trainer = alone(initial, own, setting.data, setting.processor, setting.run)
    wish = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=_checkpoint("true", folder) if wish else None)
    trainer.save_model(str(folder))
    return trainer.accelerator.unwrap_model(trainer.model)


def compare(setting: Setting, models: dict[str, PreTrainedModel], *, minutes: float) -> Results | None:
    """Measure every model on the test rows (the evaluation rows where there are no others).

    Args:
        setting: The run.
        models: By arm; "teacher" and "student" are needed.
        minutes: What the run took so far, for the record.

    Returns:
        The results on rank 0, None on the others.
    """
    run, args, data = setting.run, setting.args, setting.data
    scores = {name: _evaluate(setting, name, model) for name, model in models.items()}
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
            **{
                name: getattr(args, name)
                for name in ("alpha", "temperature", "learning_rate", "num_train_epochs")
            },
        },
    )


def _evaluate(setting: Setting, name: str, model: PreTrainedModel) -> dict[str, float]:
    """Metrics of one model, and how far it is from the teacher."""
    changes: dict[str, Any] = {"alpha": 1.0, "alpha_end": None, "alpha_schedule": "constant"}
    changes |= {"kl_threshold": None, "output_dir": str(setting.args.folder / "evaluation")}
    args = dataclasses.replace(setting.args, disable_tqdm=True, **changes)
    if name == "teacher" and setting.run.unlabelled:
        return {"eval_kl": 0.0, "eval_agreement": 1.0}
    if name == "teacher":
        data, processor = setting.teacher_data, setting.teacher_processor
        trainer = alone(model, args, data, processor, setting.run)
        known = {"eval_kl": 0.0, "eval_agreement": 1.0}
    else:
        data, known = setting.data, {}
        trainer = DistillationTrainer(
            model,
            args,
            teacher=setting.teacher,
            task=setting.run.task,
            teacher_processing_class=setting.teacher_processor,
            **wiring(data, setting.processor),
        )
    trainer.remove_callback(PrinterCallback)  # the table says it
    scores = {**trainer.evaluate(_test_rows(data)), **known}
    if data.primary_metric == "perplexity" and "eval_loss" in scores:
        scores["eval_perplexity"] = perplexity(scores["eval_loss"])
    return scores


def _test_rows(data: Prepared) -> Any:
    return data.eval if data.test is None else data.test


def _latency(setting: Setting, models: dict[str, PreTrainedModel]) -> dict[str, Latency]:
    """Time all models on one batch of rows of about the median length; nothing if on several devices."""
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


def _checkpoint(wish: str | None, folder: Path) -> str | None:
    """What `resume_from_checkpoint` means: a path, or "true" for the last checkpoint if there is one."""
    if wish is None or wish.lower() in ("false", "no", "0"):
        return None
    if wish.lower() not in ("true", "yes", "1", "last"):
        return wish
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
