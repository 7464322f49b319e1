"""Who teaches: every teacher is a callable from a batch to a `TeacherSignal`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..loading import load_model
from ..tasks import TASKS, Task
from .cache import CachedTeacher
from .cache.make import tokenizer_hash
from .cache.opening import open_cache
from .models import ModelTeacher
from .server import ServedTeacher, is_address, served_teacher
from .signal import SparseSignal, Teacher, TeacherSignal

if TYPE_CHECKING:
    from ..config import DistillationArguments

__all__ = [
    "CachedTeacher",
    "ModelTeacher",
    "ServedTeacher",
    "SparseSignal",
    "Teacher",
    "TeacherSignal",
    "resolve_teacher",
]


def resolve_teacher(
    teacher: Any, task: Task, args: DistillationArguments, *, student: nn.Module, processor: Any = None
) -> Teacher | None:
    """The teacher of a run: a name is loaded, a model is frozen and placed, a `Teacher` is taken as it is.

    Args:
        teacher: A name, the address of a server (`http://...`), a model, or a `Teacher`.
        task: The head.
        args: The options.
        student: The student.
        processor: Its tokenizer, for servers that name tokens by text.

    Raises:
        ValueError: If alpha wants a teacher and there is none, or it is something else, or the student
            itself.
    """
    if args.teacher_cache and args.needs_teacher:
        return _from_cache(teacher, task, args, student=student, processor=processor)
    return _live(teacher, task, args, student=student, processor=processor)


def _live(
    teacher: Any, task: Task, args: DistillationArguments, *, student: nn.Module, processor: Any
) -> Teacher | None:
    """A teacher that is asked."""
    if teacher is None:
        if args.needs_teacher:
            raise ValueError(
                f"alpha={args.alpha} or a loss on layers gives the teacher a weight, but teacher=None. Pass "
                "a teacher."
            )
        return None
    if is_address(teacher):
        return served_teacher(teacher, args, task=task, student=student, tokenizer=processor)
    if isinstance(teacher, str):
        teacher = load_model(
            teacher,
            task.name if task.name in TASKS else None,
            role="teacher",
            dtype=args.teacher_dtype,
            device_map=args.teacher_device_map,
            revision=args.teacher_revision,
            trust_remote_code=args.trust_remote_code,
        )
    if isinstance(teacher, nn.Module):
        if teacher is student:
            raise ValueError(
                "teacher and model are the same object, which would freeze the student; pass a copy."
            )
        trained = {id(p) for p in student.parameters() if p.requires_grad}
        if any(id(p) in trained for p in teacher.parameters()):
            raise ValueError(
                "teacher shares trainable parameters with the student, which would freeze them; pass a copy "
                "(copy.deepcopy) as the teacher."
            )
        return ModelTeacher(teacher, task.logits, device=args.device, revision=args.teacher_revision)
    if not isinstance(teacher, Teacher):
        raise ValueError(
            f"teacher is a {type(teacher).__name__}; pass a model, a path or id, or an object with "
            "__call__(batch) -> TeacherSignal, `identity` and `columns`."
        )
    return teacher


def _from_cache(
    teacher: Any, task: Task, args: DistillationArguments, *, student: nn.Module, processor: Any
) -> CachedTeacher:
    """What the teacher said before; it is loaded only if it may be asked about rows that are not there."""
    name = teacher if isinstance(teacher, str) else None
    live = None
    if teacher is not None and (name is None or args.cache_miss == "compute"):
        live = _live(teacher, task, args, student=student, processor=processor)
    return open_cache(
        str(args.teacher_cache),
        device=args.device,
        miss=args.cache_miss,
        live=live,
        name=name,
        revision=args.teacher_revision,
        dtype=args.teacher_dtype,
        tokenizer=tokenizer_hash(processor),
    )
