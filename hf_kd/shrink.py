"""`hf-kd shrink`: a student cut from a teacher, saved with its tokenizer, and what it starts from."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PrinterCallback

from hf_kd import cutting
from hf_kd.config import DistillationArguments
from hf_kd.data.prepare import Prepared, prepare
from hf_kd.data.processors import load_processor
from hf_kd.data.sources import load_raw
from hf_kd.loading import load_model, task_of_checkpoint
from hf_kd.measure import count_parameters, model_bytes
from hf_kd.options import ShrinkOptions
from hf_kd.records import write_text
from hf_kd.students import remembered_layers
from hf_kd.students.depth import find_stacks
from hf_kd.trainer import DistillationTrainer

REPORT_FILE = "shrink.json"


@dataclass(frozen=True)
class Shrunk:
    """What was made, for `shrink.json`.

    Attributes:
        student: The options that differ from their defaults.
        parameters: Of teacher and student, each counted once.
        bytes: Of parameters and buffers in memory, of both.
        parts: Parameters of teacher and student by part: embeddings, what a layer has, the rest.
        layers: The teacher layer of every student layer, by config option.
        tokens: Size of both vocabularies, where one was trimmed.
        steps: What was said while the student was made.
        start: Before any training, on the calibration rows: loss, KL to the teacher in nats and agreement of
            the teacher, of the student, and of its shape with random weights. Empty without rows.
    """

    student: dict[str, Any]
    parameters: dict[str, int]
    bytes: dict[str, int]
    parts: dict[str, dict[str, int]]
    layers: dict[str, list[int]]
    tokens: dict[str, int] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    start: dict[str, dict[str, float]] = field(default_factory=dict)


def shrink(options: ShrinkOptions) -> Shrunk:
    """Cut a student from a teacher and save it with its tokenizer or processor.

    Args:
        options: The teacher, the cut, and the data to measure on.

    Raises:
        ValueError: If the folder is not empty, or something can't be loaded or cut.
    """
    folder = Path(str(options.output_dir)).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not options.overwrite:
        raise ValueError(f"output_dir={str(folder)!r} is not empty: name another, or set overwrite=true")
    shared: dict[str, Any] = {
        "revision": options.teacher_revision,
        "trust_remote_code": options.trust_remote_code,
    }
    task = options.task or task_of_checkpoint(str(options.teacher), role="teacher", **shared)
    teacher: Any = load_model(
        str(options.teacher), task, role="teacher", dtype=options.teacher_dtype, **shared
    )
    run = replace(options.run_options(), task=task)
    raw = load_raw(run) if run.dataset else None
    processor = _processor(options, raw, task, shared)
    rows: Any = {"task": task, "config": teacher.config}
    data = None if raw is None else prepare(raw, run, processor=processor, **rows)
    tokenizer, vocab = cutting.trimmed(options, processor, data)
    size = {"batch_size": options.batch_size, "seed": options.seed}
    batches = cutting.calibration(options, data, **size) if data is not None else []
    with cutting.overheard() as steps:
        student = cutting.cut(options, teacher, batches=batches, vocab=vocab, seed=options.seed)
    own = data if tokenizer is processor or raw is None else prepare(raw, run, processor=tokenizer, **rows)
    found = Shrunk(
        student=options.cuts,
        parameters={"teacher": count_parameters(teacher), "student": count_parameters(student)},
        bytes={"teacher": model_bytes(teacher), "student": model_bytes(student)},
        parts=_parts(teacher, student),
        layers=remembered_layers(student.config) or {},
        tokens={} if vocab is None else {"teacher": len(processor), "student": len(vocab)},
        steps=[line for line in steps if not line.startswith("loss on the calibration")],  # see `start`
    )
    if data is not None and own is not None and batches:
        models = {"teacher": teacher, "student": student}
        pairs: Any = {"data": (own, tokenizer), "teacher_data": (data, processor)}
        found = replace(found, start=_start(options, models, task=task, **pairs))
    folder.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_text(folder / REPORT_FILE, json.dumps(vars(found), indent=2) + "\n")
    return found


def _processor(options: ShrinkOptions, raw: Any, task: str, shared: dict[str, Any]) -> Any:
    """The teacher's processor; a teacher that has none beside it makes a student without one."""
    try:
        return load_processor(options.run_options(), raw, task=task, **shared)
    except ValueError:
        if options.processor or options.dataset or options.student_vocabulary:
            raise
        return None


def _parts(teacher: PreTrainedModel, student: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Parameters of both by part, the parts in the order of the teacher's modules."""
    stacks = [stack.module for stack in find_stacks(teacher)]
    counts = {"teacher": _by_part(teacher, stacks), "student": _by_part(student, stacks)}
    return {
        part: {name: own[part] for name, own in counts.items()} for part in dict.fromkeys(counts["teacher"])
    }


def _by_part(model: PreTrainedModel, stacks: list[str]) -> Counter[str]:
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        stack = next((path for path in stacks if name.startswith(f"{path}.")), None)
        if stack is not None:
            part = f"{stack}: {name[len(stack) + 1 :].split('.')[1]}"
        else:
            part = "input embeddings" if id(parameter) in embeddings else name.rpartition(".")[0]
        found[part] += parameter.numel()
    return found


def _start(
    options: ShrinkOptions,
    models: dict[str, PreTrainedModel],
    *,
    task: str,
    data: tuple[Prepared, Any],
    teacher_data: tuple[Prepared, Any],
) -> dict[str, dict[str, float]]:
    """Loss, KL and agreement of teacher, student, and its shape with random weights, on calibration rows.

    Args:
        options: What was asked for.
        models: Teacher and student.
        task: Their head.
        data: Rows and tokenizer of the student.
        teacher_data: Rows and tokenizer of the teacher.
    """
    teacher, student = models["teacher"], models["student"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        random: Any = type(student)(student.config)
    arms = {**models, "random": random.to(student.device, student.dtype)}
    trainable = [p for p in teacher.parameters() if p.requires_grad]  # a teacher is frozen while it teaches
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in arms.items():
            whole = model is teacher
            prepared, own = teacher_data if whole else data
            rows = prepared.train.select(range(min(options.calibration_rows, len(prepared.train))))
            trainer = DistillationTrainer(
                model,
                _evaluation(options, folder, alpha=0.0 if whole else 1.0),
                teacher=None if whole else teacher,
                task=task,
                teacher_processing_class=teacher_data[1],
                data_collator=prepared.collator,
                eval_dataset=rows,
                processing_class=own,
            )
            trainer.remove_callback(PrinterCallback)
            with torch.random.fork_rng():
                torch.manual_seed(options.seed)  # of masks, the same for all
                metrics = trainer.evaluate()
            names = ("loss", "kl", "agreement", "distance", "teacher_mass_dropped")
            found[name] = {key: metrics[f"eval_{key}"] for key in names if f"eval_{key}" in metrics}
    for parameter in trainable:
        parameter.requires_grad_(True)
    return found


def _evaluation(options: ShrinkOptions, folder: str, *, alpha: float) -> DistillationArguments:
    return DistillationArguments(
        output_dir=folder,
        alpha=alpha,
        temperature=1.0,
        per_device_eval_batch_size=options.batch_size,
        per_device_train_batch_size=options.batch_size,
        seed=options.seed,
        report_to=[],
        disable_tqdm=True,
    )


def print_report(found: Shrunk, folder: str, console: Console | None = None) -> None:
    """Print what was made."""
    console = console or Console()
    for line in found.steps:
        console.print(Text(line, style="dim"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("parameters", "teacher", "student", "kept"):
        table.add_column(title, justify="left" if title == "parameters" else "right", overflow="fold")
    sizes = {**found.parts, "all": found.parameters, "bytes": found.bytes}
    if found.tokens:
        sizes["tokens"] = found.tokens
    for name, both in sizes.items():
        share = f"{both['student'] / both['teacher']:.1%}" if both["teacher"] else "-"
        table.add_row(name, f"{both['teacher']:,}", f"{both['student']:,}", share)
    console.print(table)
    for name, kept in found.layers.items():
        console.print(Text(f"{name}: " + ", ".join(f"{i} <- {j}" for i, j in enumerate(kept))))
    if found.start:
        start = Table(box=SIMPLE_HEAD, pad_edge=False)
        names = list(dict.fromkeys(name for metrics in found.start.values() for name in metrics))
        for title in ("before training", *names):
            start.add_column(title)
        for arm, metrics in found.start.items():
            start.add_row(arm, *(f"{metrics[name]:.4g}" if name in metrics else "-" for name in names))
        console.print(start)
    console.print(Text(f"the student is in {folder}", style="bold"))
