"""What a run of the command line works on: data, processors, a teacher that knows its task, and a student."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from datasets import DatasetDict
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from hf_kd import cutting, elsewhere
from hf_kd.config import DistillationArguments
from hf_kd.data.prepare import PREPARE, Prepared, prepare
from hf_kd.data.processors import load_processor
from hf_kd.data.sources import load_raw
from hf_kd.elsewhere import Elsewhere, is_elsewhere
from hf_kd.fresh import fresh_student
from hf_kd.loading import check_path, config_of_checkpoint, load_model, task_of_checkpoint
from hf_kd.metrics import BUILT_IN
from hf_kd.options import RunOptions, as_mapping, nearest, raise_problems
from hf_kd.progress import follow
from hf_kd.records import write_text
from hf_kd.run_teacher import (
    ALONE,
    TRAINED_FILE,
    head_of,
    labels_of,
    left_teacher,
    load_named_teacher,
    load_teacher,
    other_teachers,
    read_json,
    recipe_of_teacher,
    teacher_arguments,
)
from hf_kd.students.memory import VOCABULARY
from hf_kd.trainer import DistillationTrainer
from hf_kd.trust import code_metrics
from hf_kd.waiting import WaitingTeacher, is_read, waiting


@dataclass(kw_only=True)
class Setting:
    """What a run works on.

    Attributes:
        run: Models and data as they were asked for, with the task filled in.
        args: The trainer's arguments.
        console: Prints on rank 0, silent elsewhere.
        teacher: The teacher: a model, or what stands for one that is not in memory.
        student: The student, before training.
        processor: The student's tokenizer, image processor or feature extractor.
        teacher_processor: The teacher's.
        data: Rows, collator and metrics, with labels in the student's order.
        teacher_data: The same with labels in the teacher's order.
        others: Further teachers, where there are several.
        untrained: Whether the teacher is still to be trained; see `with_trained_teacher`.
    """

    run: RunOptions
    args: DistillationArguments
    console: Console
    teacher: Any
    student: PreTrainedModel
    processor: Any
    teacher_processor: Any
    data: Prepared
    teacher_data: Prepared
    others: tuple[PreTrainedModel, ...] = ()
    untrained: bool = False

    @property
    def teaching(self) -> Any:
        """The teacher, or all of them; by name, where it is not in memory."""
        if isinstance(self.teacher, WaitingTeacher | Elsewhere):
            return self.teacher.name_or_path
        return [self.teacher, *self.others] if self.others else self.teacher


def load(run: RunOptions, args: DistillationArguments) -> Setting:
    """Load data, processors, teacher and student, and train nothing.

    With `train_teacher` the teacher is the one that an earlier run with the same options left in
    `output_dir/teacher`, or one that is still to be trained.

    Args:
        run: Models and data.
        args: The trainer's arguments.

    Raises:
        ValueError: What cannot be loaded, all of it.
    """
    console = Console(quiet=args.process_index != 0)
    # Rank 0 first: the others find what it downloaded and prepared in the cache.
    with args.main_process_first(desc="loading the data"):
        raw, run = _load_named(run, args)
    shared: dict[str, Any] = {"task": run.task, "trust_remote_code": args.trust_remote_code}

    def own_processor() -> Any:
        return load_processor(run, raw, role="student", **shared)

    teacher: Any = Elsewhere(str(run.teacher)) if is_elsewhere(run.teacher) else None
    student: Any = None
    left = left_teacher(run, args) if run.train_teacher else None
    if teacher is not None:
        # Nothing of the teacher is here to prepare rows by.
        teacher_processor = processor = own_processor()
        student = load_student(run, args, teacher, None, None, console)
    else:
        teacher_processor = load_processor(run, raw, revision=args.teacher_revision, **shared)
        processor = own_processor() if run.student else teacher_processor
        teacher = left
        if left is None and run.student and is_read(args) and not (run.train_teacher or run.teachers):
            teacher = waiting(run, args, partial(load_named_teacher, run, args))
        teacher = teacher or load_teacher(run, args, raw, teacher_processor)

    def prepared(model: PreTrainedModel, own: Any, other: Any) -> Prepared:
        with args.main_process_first(desc="preparing the rows"):
            made = prepare(
                raw, run, task=str(run.task), processor=own, config=model.config, teacher_processor=other
            )
        return made.shuffled(args.seed, run.stream_buffer)

    teacher_data = prepared(student or teacher, teacher_processor, None)
    vocab = None
    if run.cuts:
        with args.main_process_first(desc="the student's tokens"):
            processor, vocab = cutting.trimmed(run, teacher_processor, teacher_data)
    student = student or load_student(run, args, teacher, teacher_data, vocab, console)
    same = processor is teacher_processor and labels_of(student.config) == labels_of(teacher.config)
    same = same or isinstance(teacher, Elsewhere)
    # A trimmed student's ids are turned into the teacher's, which needs no columns of its own.
    beside = None if cutting.is_trimmed(student) else teacher_processor
    return Setting(
        run=run,
        args=args,
        console=console,
        teacher=teacher,
        student=student,
        processor=processor,
        teacher_processor=teacher_processor,
        data=teacher_data if same else prepared(student, processor, beside),
        teacher_data=teacher_data,
        others=other_teachers(run, args),
        untrained=run.train_teacher and left is None,
    )


def _load_named(run: RunOptions, args: DistillationArguments) -> tuple[DatasetDict, RunOptions]:
    """Load the data and find the task; everything that does not exist is one message."""
    away = is_elsewhere(run.teacher)
    problems: list[str] = elsewhere.obstacles(run) if away else []

    def attempt(load: Callable[[], Any]) -> Any:
        try:
            return load()
        except ValueError as error:
            problems.append(str(error))

    for option in ("student",) if away else ("teacher", "student"):
        name = getattr(run, option)
        if name:
            attempt(partial(check_path, name, option))
    for name in (run.teachers or [])[1:]:
        attempt(partial(check_path, name, "teachers"))
    if args.teacher_quantization not in (None, "int8-dynamic") and not run.student:
        problems.append(
            f"teacher_quantization={args.teacher_quantization!r} loads the teacher in few bits, of which no "
            "student can be made: set student to a checkpoint"
        )
    for name in [] if args.trust_remote_code else code_metrics(run.metrics):
        problems.append(
            f"metrics: {name!r} is not built in{nearest(name, BUILT_IN)}; one of the Hub is a program: set "
            f"trust_remote_code=true to run it, or use one of {', '.join(sorted(BUILT_IN))}"
        )
    task = run.task
    if task is None and away:
        task = None if problems else attempt(partial(elsewhere.task_of, run, args))
    elif task is None and run.teacher:
        shared = {"revision": args.teacher_revision, "trust_remote_code": args.trust_remote_code}
        task = (
            None if problems else attempt(partial(task_of_checkpoint, run.teacher, role="teacher", **shared))
        )
    elif task is None:
        problems.append("task is not set, and teacher_config does not say it: set e.g. task='causal-lm'")
    elif task not in PREPARE:
        problems.append(
            f"task={task!r} is none of the command line's: use one of {', '.join(PREPARE)}, or "
            "DistillationTrainer in Python"
        )
    raw = attempt(lambda: load_raw(run))
    raise_problems(problems)
    return raw, replace(run, task=task)


def with_trained_teacher(setting: Setting) -> Setting:
    """Train the teacher on the task, keep it in `output_dir/teacher`, and make the student anew from it."""
    run, args = setting.run, setting.args
    own = teacher_arguments(run, args)
    wanted, found = recipe_of_teacher(run, own), read_json(own.folder / TRAINED_FILE)
    changed = ", ".join(name for name in wanted if found and found.get(name) != wanted[name])
    setting.console.rule(f"teacher (again, since {changed} changed)" if changed else "teacher", align="left")
    trainer = alone(setting.teacher, own, setting.teacher_data, setting.teacher_processor, run)
    follow(trainer)
    trainer.train()
    trainer.save_model(str(own.folder))
    if args.should_save:
        write_text(own.folder / TRAINED_FILE, json.dumps(wanted, indent=2) + "\n")
    trainer.accelerator.wait_for_everyone()
    teacher = left_teacher(run, args)
    assert teacher is not None
    vocab = getattr(setting.student.config, VOCABULARY, None) if run.cuts else None
    student = load_student(run, args, teacher, setting.teacher_data, vocab, setting.console)
    return replace(setting, teacher=teacher, student=student, untrained=False)


def alone(
    model: PreTrainedModel, args: DistillationArguments, data: Prepared, processor: Any, run: RunOptions
) -> DistillationTrainer:
    """A trainer of one model without a teacher."""
    trainer = DistillationTrainer(model, replace(args, **ALONE), task=run.task, **wiring(data, processor))
    trainer.run_options = dataclasses.asdict(run)
    return trainer


def wiring(data: Prepared, processor: Any) -> dict[str, Any]:
    """Prepared data as the arguments of a trainer."""
    return {
        "train_dataset": data.train,
        "eval_dataset": data.eval,
        "data_collator": data.collator,
        "compute_metrics": data.compute_metrics,
        "preprocess_logits_for_metrics": data.preprocess_logits_for_metrics,
        "processing_class": processor,
    }


def load_student(
    run: RunOptions,
    args: DistillationArguments,
    teacher: PreTrainedModel,
    data: Prepared | None,
    vocab: list[int] | None,
    console: Console,
) -> PreTrainedModel:
    """The student: a checkpoint of its own, a cut of the teacher, or a fresh one of other sizes."""
    if run.cuts:
        assert data is not None
        with cutting.overheard() as said:
            batches = cutting.calibration(run, data, seed=args.seed)
            made = cutting.cut(run, teacher, batches=batches, vocab=vocab, seed=args.seed)
        console.print(Text("\n".join(said), style="dim"))
        return made
    if run.student_config is not None:
        return fresh_student(teacher, as_mapping(run.student_config), seed=args.seed)
    loading: dict[str, Any] = {"role": "student", "trust_remote_code": args.trust_remote_code}
    theirs = labels_of(teacher.config)
    ours = labels_of(config_of_checkpoint(str(run.student), **loading))
    head = {}
    if theirs is not None and ours is not None and {*ours.values()} != {*theirs.values()}:
        head = head_of(list(theirs.values()), getattr(teacher.config, "problem_type", None))
    return load_model(str(run.student), run.task, new_head=True, **loading, **head)  # type: ignore[return-value]
