"""A run of the command line whose teacher is elsewhere: nothing of it is here to be measured or cut.

So there is no table with a teacher's column: the student (and the same student without the teacher) are
evaluated against the teacher's answers, into `evaluation.json`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.text import Text

from hf_kd import checks
from hf_kd.config import DistillationArguments
from hf_kd.data.prepare import prepare
from hf_kd.data.processors import load_processor
from hf_kd.data.sources import load_raw
from hf_kd.findings import Problem
from hf_kd.loading import check_path, load_model, task_of_checkpoint
from hf_kd.options import RunOptions, raise_problems
from hf_kd.progress import follow
from hf_kd.records import write_text
from hf_kd.setting import Setting, wiring
from hf_kd.teachers import Teacher
from hf_kd.teachers.link import is_link
from hf_kd.teachers.server import is_address
from hf_kd.trainer import DistillationTrainer

EVALUATION_FILE = "evaluation.json"


def is_elsewhere(teacher: str | None) -> bool:
    """Whether a teacher's name is an address, of a server or of a teacher group."""
    return is_address(teacher) or is_link(teacher)


def load(run: RunOptions, args: DistillationArguments) -> Setting:
    """Load data, tokenizer and student.

    Raises:
        ValueError: What can't be had without the teacher's weights, or can't be loaded.
    """
    problems = []
    if run.train_teacher:
        problems.append(f"train_teacher=True, but teacher={run.teacher!r} is elsewhere: train it there")
    if not run.student:
        problems.append(
            f"student is not set, and teacher={run.teacher!r} is elsewhere, of which no student can be cut: "
            "give the id or directory of one"
        )
    if is_address(run.teacher) and run.task not in (None, "causal-lm"):
        problems.append(f"task={run.task!r}, but teacher={run.teacher!r} is a server, for causal-lm alone")
    if args.push_to_hub:
        problems.append("push_to_hub=True, but such a run has no card: upload the folder yourself")
    if run.streaming:
        problems.append("streaming=True, but a run with a server counts its rows: set streaming=false")
    raise_problems(problems)
    check_path(str(run.student), "student")
    shared: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    task = run.task or "causal-lm"
    if is_link(run.teacher):
        task = run.task or task_of_checkpoint(str(run.student), role="student", **shared)
    run = dataclasses.replace(run, task=task)
    with args.main_process_first(desc="preparing the data"):
        raw = load_raw(run)
        processor = load_processor(run, raw, role="student", task=task, **shared)
        student: Any = load_model(str(run.student), task, role="student", **shared)
        data = prepare(raw, run, task=task, processor=processor, config=student.config)
    return Setting(
        run=run,
        args=args,
        console=Console(quiet=args.process_index != 0),
        teacher=None,  # type: ignore[arg-type]  # not in memory
        student=student,
        processor=processor,
        teacher_processor=processor,
        data=data,
        teacher_data=data,
    )


def distiller(setting: Setting, student: Any = None, teacher: Teacher | None = None) -> DistillationTrainer:
    """The trainer of the student, or of another one, with the server or group, joined before or not."""
    trainer = DistillationTrainer(
        student or setting.student,
        setting.args,
        teacher=teacher or setting.run.teacher,
        task=setting.run.task,
        **wiring(setting.data, setting.processor),
    )
    trainer.run_options = vars(setting.run)
    return trainer


def distill(
    run: RunOptions, args: DistillationArguments, *, described: Any, control: Any, resume: Any
) -> None:
    """Distil, evaluate the student and its control against the teacher, and save the student.

    Args:
        run: Models and data.
        args: The trainer's arguments.
        described: `run.describe`.
        control: `run.train_control`.
        resume: The checkpoint to go on from.
    """
    setting = load(run, args)
    console = setting.console
    console.print(Text(described(setting), style="dim"))
    initial = copy.deepcopy(setting.student)
    trainer = distiller(setting)
    console.rule("student", align="left")
    follow(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(args.output_dir)
    rows = setting.data.eval if setting.data.test is None else setting.data.test
    found = {"student": trainer.evaluate(rows)}
    state = trainer.state
    other = control(setting, initial, state.global_step, state.max_steps)
    if other is not None:
        found["control"] = distiller(setting, other, trainer.teacher).evaluate(rows)
    if args.process_index != 0:
        return
    path = args.folder / EVALUATION_FILE
    write_text(path, json.dumps(found, indent=2) + "\n")
    console.rule("results", align="left")
    for name, metrics in found.items():
        shown = ("eval_loss", "eval_kl", "eval_kl_tail", "eval_agreement")
        console.print(name, "  ".join(f"{key}={metrics[key]:.4g}" for key in shown if key in metrics))
    console.print(Text(f"the student is in {path.parent}, these numbers in {path.name}", style="dim"))


def check(run: RunOptions, args: DistillationArguments) -> list[Problem]:
    """Print what a run would find wrong, having asked the teacher about one batch."""
    setting = load(run, args)
    found = checks.inspect(distiller(setting))
    found.render(setting.console)
    return found.problems
