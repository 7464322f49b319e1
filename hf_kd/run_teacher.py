"""A run's teacher as a model in memory: from its checkpoint, new, or trained by this run or before."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import PreTrainedModel

from hf_kd.config import DistillationArguments
from hf_kd.data.labels import describe_labels
from hf_kd.fresh import build_model
from hf_kd.loading import load_model
from hf_kd.options import RunOptions, as_mapping, without_features
from hf_kd.options.student import NAMES as STUDENT_OPTIONS
from hf_kd.teachers.quantise import loading_options

TRAINED_FILE = "trained.json"

# Turns the arguments of a distillation into those of training one model.
ALONE: dict[str, Any] = {
    "alpha": 0.0,
    "alpha_end": None,
    "alpha_schedule": "constant",
    "kl_threshold": None,
    "push_to_hub": False,
    **without_features(),
}
# Options that have no say in what a trained teacher becomes.
_NOT_THE_TEACHERS = (
    *"student student_config control metrics test_split test_file max_eval_samples slices watts".split(),
    *STUDENT_OPTIONS,
)
_OF_TRAINING = """
num_train_epochs max_steps learning_rate per_device_train_batch_size gradient_accumulation_steps warmup_steps
weight_decay lr_scheduler_type lr_scheduler_kwargs optim label_smoothing_factor max_grad_norm bf16 fp16 seed
world_size
""".split()


def load_teacher(
    run: RunOptions, args: DistillationArguments, raw: DatasetDict, processor: Any
) -> PreTrainedModel:
    """The teacher from its checkpoint, or a new one; with a head for the labels if it is to be trained."""
    if run.teacher and not run.train_teacher:
        return load_named_teacher(run, args)
    labels = describe_labels(raw, run)
    names = list(labels.names) if labels is not None else []
    if not run.teacher:
        return build_model(
            as_mapping(run.teacher_config),
            task=str(run.task),
            label_names=names or None,
            num_labels=labels.count if labels is not None else run.num_labels,
            problem_type=labels.problem_type if labels is not None else run.problem_type,
            tokenizer=processor if hasattr(processor, "get_vocab") else None,
            seed=args.seed,
        )
    head: dict[str, Any] = {}
    if labels is not None:
        head = head_of(names or [str(i) for i in range(labels.count)], labels.problem_type)
    return load_model(  # type: ignore[return-value]
        run.teacher, run.task, role="teacher", new_head=True, **_teacher_loading(args, trained=True), **head
    )


def load_named_teacher(run: RunOptions, args: DistillationArguments) -> PreTrainedModel:
    """The teacher from its checkpoint, or the one that this run trained."""
    if run.train_teacher:
        own = left_teacher(run, args)
        assert own is not None
        return own
    return load_model(str(run.teacher), run.task, role="teacher", **_teacher_loading(args))  # type: ignore[return-value]


def other_teachers(run: RunOptions, args: DistillationArguments) -> tuple[PreTrainedModel, ...]:
    """Further teachers, where there are several."""
    return tuple(
        load_model(name, run.task, role="teachers", **_teacher_loading(args))  # type: ignore[misc]
        for name in (run.teachers or [])[1:]
    )


def left_teacher(run: RunOptions, args: DistillationArguments) -> PreTrainedModel | None:
    """The trained teacher that an earlier run with the same options left, or None."""
    own = teacher_arguments(run, args)
    if read_json(own.folder / TRAINED_FILE) != recipe_of_teacher(run, own):
        return None
    loading = {**_teacher_loading(args), "revision": None}
    return load_model(str(own.folder), run.task, role="teacher", **loading)  # type: ignore[return-value]


def _teacher_loading(args: DistillationArguments, *, trained: bool = False) -> dict[str, Any]:
    """How a teacher is loaded; one that is trained first is loaded in full precision."""
    return {
        **({} if trained else loading_options(args.teacher_quantization)),
        "dtype": args.teacher_dtype,
        "device_map": args.teacher_device_map,
        "revision": args.teacher_revision,
        "trust_remote_code": args.trust_remote_code,
    }


def teacher_arguments(run: RunOptions, args: DistillationArguments) -> DistillationArguments:
    """The arguments of the teacher's training: the student's, but for what `teacher_...` options say."""
    changes: dict[str, Any] = {
        **ALONE,
        "output_dir": str(args.folder / "teacher"),
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
    }
    if run.teacher_epochs is not None:
        changes |= {"num_train_epochs": run.teacher_epochs, "max_steps": -1}
    if run.teacher_learning_rate is not None:
        changes["learning_rate"] = run.teacher_learning_rate
    if run.teacher_batch_size is not None:
        changes["per_device_train_batch_size"] = run.teacher_batch_size
    return replace(args, **changes)


def recipe_of_teacher(run: RunOptions, args: DistillationArguments) -> dict[str, Any]:
    """All that decides what the trained teacher is, as JSON."""
    options = {k: v for k, v in dataclasses.asdict(run).items() if k not in _NOT_THE_TEACHERS}
    given = {name: _state_of(getattr(run, name)) for name in ("teacher", "dataset")}
    training = {name: getattr(args, name) for name in _OF_TRAINING}
    recipe = {**options, **training, **{f"{name}_changed": state for name, state in given.items()}}
    return json.loads(json.dumps(recipe, default=str))


def _state_of(name: str | None) -> int | None:
    """When a local file or folder last changed; None for what is not local."""
    path = Path(name or "").expanduser()
    if not name or not path.exists():
        return None
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return max((p.stat().st_mtime_ns for p in files), default=None)


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's content; None if there is no such file, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def head_of(names: list[str], problem_type: str | None) -> dict[str, Any]:
    """What makes a checkpoint have a head for these labels."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": problem_type,
    }


def labels_of(config: Any) -> Any:
    """A model's label names by number, or None."""
    return getattr(config, "id2label", None)
