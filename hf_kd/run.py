"""One run of the command line: distil, train the control, compare.

All ranks go through all stages, since each may train or evaluate; what prints or writes does so on rank 0.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy

from hf_kd import checks, locks, report, whole
from hf_kd.card import write_card
from hf_kd.comparison import compare
from hf_kd.config import DistillationArguments
from hf_kd.elsewhere import joined
from hf_kd.findings import Problem
from hf_kd.live_report import numbers_of
from hf_kd.options import DistillationOptions, RunOptions
from hf_kd.pages import write_html
from hf_kd.progress import follow
from hf_kd.provenance import Meter
from hf_kd.publish import publish
from hf_kd.results import Results
from hf_kd.run_teacher import load_named_teacher, other_teachers
from hf_kd.setting import Setting, alone, load, wiring, with_trained_teacher
from hf_kd.settling import describe_target
from hf_kd.trainer import DistillationTrainer
from hf_kd.waiting import rested, woken


def distill(run: RunOptions, args: DistillationArguments) -> Results | None:
    """Distil, measure teacher, student and control, and save the student with `results.json` beside it.

    Args:
        run: Models and data.
        args: The trainer's arguments.

    Returns:
        The results on rank 0, None on the others.

    Raises:
        ValueError: What does not exist or does not fit, before any training; or another run in `output_dir`.
    """
    with locks.output_dir(args.folder) if args.process_index == 0 else nullcontext():
        return _distill(run, args)


def _distill(run: RunOptions, args: DistillationArguments) -> Results | None:
    meter = Meter(run.watts)
    wish, args = args, _unpublished(args)
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
    setting = joined(setting, trainer)
    again = setting.run, args
    setting = rested(setting, trainer, partial(load_named_teacher, *again), partial(other_teachers, *again))
    console.rule("student", align="left")
    follow(trainer)
    trainer.train(resume_from_checkpoint=_checkpoint(args.resume_from_checkpoint, args.folder))
    trainer.save_model(args.output_dir)
    models = {"student": trainer.accelerator.unwrap_model(trainer.model)}
    if trainer.settled is not None and trainer.settled.weights is not None:
        learned: dict[str, Any] = {"ensemble_weighting": "fixed", "ensemble_weights": trainer.settled.weights}
        setting = dataclasses.replace(setting, args=dataclasses.replace(args, **learned))
    steps = trainer.state.global_step, trainer.state.max_steps
    history = numbers_of(trainer.state.log_history)
    identity = {} if trainer.teacher is None else trainer.teacher.identity
    del trainer
    control = train_control(setting, initial, *steps)
    if control is not None:
        models["control"] = control
    setting = woken(setting, identity)
    if isinstance(setting.teacher, nn.Module):
        models = {"teacher": setting.teacher, **models}
    results = compare(setting, models, history, meter=meter)
    if results is None:
        return None
    path = results.write(args.folder / "results.json")
    page = write_html(results, args.folder)
    write_card(results, setting.run, args.folder, name=args.hub_model_id)
    console.rule("results", align="left")
    report.print_table(results, console)
    console.print(Text(f"student and results are in {path.parent}, to be read in {page}", style="dim"))
    if wish.push_to_hub:
        name = wish.hub_model_id or args.folder.name
        address = publish(args.folder, name, private=wish.hub_private_repo, token=wish.hub_token)
        console.print(Text(f"published as {address}", style="dim"))
    return results


def _unpublished(args: DistillationArguments) -> DistillationArguments:
    """The arguments of training: Trainer would upload the teacher and the control that lie in its folder."""
    if not args.push_to_hub:
        return args
    strategy = HubStrategy(args.hub_strategy)
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy={strategy.value!r} uploads checkpoints, but hf-kd distill publishes the "
            "finished student once, with its report: set hub_strategy='end'"
        )
    return dataclasses.replace(args, push_to_hub=False)


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
    trainer = distiller(setting)
    found = checks.inspect(trainer, teacher_is_trained=not setting.untrained)
    if not found.problems and not found.sparse and not setting.untrained:
        found.facts += describe_target(trainer)
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
    wanted = setting.args.needs_teacher and setting.args.self_teacher is None
    trainer = DistillationTrainer(
        setting.student,
        setting.args,
        teacher=setting.teaching if wanted else None,
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
    lines = [f"{run.task} on {run.dataset}: {_rows_of(data.train)} train, {len(data.eval)} eval{test} rows"]
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


def _rows_of(rows: Any) -> str:
    return str(len(rows)) if hasattr(rows, "__len__") else "a stream to"


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
    follow(trainer)
    trainer.train(resume_from_checkpoint=_checkpoint("true", folder) if wish else None)
    trainer.save_model(str(folder))
    return trainer.accelerator.unwrap_model(trainer.model)


def _checkpoint(wish: str | None, folder: Path) -> str | None:
    """What `resume_from_checkpoint` means: a path, or "true" for the last checkpoint if there is one."""
    if wish is None or wish.lower() in ("false", "no", "0"):
        return None
    if wish.lower() not in ("true", "yes", "1", "last"):
        return wish
    return whole.newest(folder)
