"""Who teaches: every teacher is a callable from a batch to a `TeacherSignal`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..loading import load_model
from ..students.memory import VOCABULARY
from ..tasks import TASKS, Task
from .cache import CachedTeacher
from .cache.make import sparse_manifest, tokenizer_hash
from .cache.opening import open_cache, start_cache
from .deeper import DeeperTeacher
from .ensemble import Ensemble
from .group import GroupTeacher, group_teacher
from .link import is_link
from .models import ModelTeacher, fingerprint
from .quantise import loading_options, quantise
from .selves import AdaptersOffTeacher, EMATeacher, FrozenTeacher, self_teacher
from .server import ServedTeacher, is_address, served_teacher
from .signal import SparseSignal, Teacher, TeacherSignal

if TYPE_CHECKING:
    from ..config import DistillationArguments

__all__ = [
    "AdaptersOffTeacher",
    "CachedTeacher",
    "DeeperTeacher",
    "EMATeacher",
    "Ensemble",
    "FrozenTeacher",
    "GroupTeacher",
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
        teacher: A name, the address of a server (`http://...`) or of a teacher group (`torch://...`), a
            model, or a `Teacher`; or a list of them, which are averaged, or routed where `teacher_routes`
            says so.
        task: The head.
        args: The options.
        student: The student.
        processor: Its tokenizer, for servers that name tokens by text.

    Raises:
        ValueError: If alpha wants a teacher and there is none, or it is something else, or the student
            itself; or if options of several teachers are given for one.
    """
    if args.self_teacher is not None:
        if teacher is not None:
            raise ValueError(
                f"self_teacher={args.self_teacher!r} makes the student its own teacher, but teacher= is "
                "given too: keep one."
            )
        return self_teacher(args.self_teacher, student, task.logits, args) if args.needs_teacher else None
    if args.teacher_cache and args.needs_teacher:
        return _from_cache(teacher, task, args, student=student, processor=processor)
    return _live(teacher, task, args, student=student, processor=processor)


def _live(
    teacher: Any,
    task: Task,
    args: DistillationArguments,
    *,
    student: nn.Module,
    processor: Any,
    place: bool = True,
) -> Teacher | None:
    """A teacher that is asked; one that is not is left where it is."""
    if teacher is None:
        if args.needs_teacher:
            raise ValueError(
                f"alpha={args.alpha} or a loss on layers gives the teacher a weight, but teacher=None. Pass "
                "a teacher, or set self_teacher."
            )
        return None
    if isinstance(teacher, list | tuple):
        # In its own place each is loaded; an ensemble that is offloaded has none on the device.
        placed = place and not args.ensemble_offload
        members = [_resolve(one, task, args, student, processor, place=placed) for one in teacher]
        routes = args.teacher_routes
        return Ensemble(
            members,
            task,
            weights=args.ensemble_weights,
            weighting=args.ensemble_weighting,
            temperature=args.ensemble_temperature,
            routes=None if not isinstance(routes, dict) else {int(k): int(v) for k, v in routes.items()},
            offload=args.ensemble_offload,
            device=args.device,
        )
    if not isinstance(teacher, Ensemble):
        _refuse_ensemble_options(args)
    return _resolve(teacher, task, args, student, processor, place=place)


def _refuse_ensemble_options(args: DistillationArguments) -> None:
    neutral = {
        "ensemble_weights": None,
        "ensemble_weighting": "fixed",
        "ensemble_temperature": 1.0,
        "ensemble_offload": False,
        "teacher_routes": None,
    }
    for name, value in neutral.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name}={getattr(args, name)!r} is about several teachers, but there is one: pass a list "
                f"(teachers on the command line), or drop {name}."
            )


def _resolve(
    teacher: Any,
    task: Task,
    args: DistillationArguments,
    student: nn.Module,
    processor: Any,
    *,
    place: bool = True,
) -> Teacher:
    if is_link(teacher):
        return group_teacher(teacher, args, task=task, student=student, processor=processor)
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
            **loading_options(args.teacher_quantization),
        )
    if isinstance(teacher, nn.Module):
        if teacher is student:
            raise ValueError(
                "teacher and model are the same object, which would freeze the student; pass a copy, or set "
                "self_teacher."
            )
        trained = {id(p) for p in student.parameters() if p.requires_grad}
        if any(id(p) in trained for p in teacher.parameters()):
            raise ValueError(
                "teacher shares trainable parameters with the student, which would freeze them; pass a copy "
                "(copy.deepcopy) as the teacher."
            )
        device = args.device if place else None
        if args.teacher_quantization is None:
            return ModelTeacher(teacher, task.logits, device=device, revision=args.teacher_revision)
        quantised = quantise(teacher, args.teacher_quantization, args.device)
        # Packed weights are no tensors: the weights that they were made of tell one teacher from another.
        made = f"{fingerprint(teacher)} {args.teacher_quantization}"
        return ModelTeacher(
            quantised, task.logits, device=device, revision=args.teacher_revision, fingerprint=made
        )
    if not isinstance(teacher, Teacher):
        raise ValueError(
            f"teacher is of the class {type(teacher).__name__}, which is no teacher; pass a model, a path or "
            "id, or an object with __call__(batch) -> TeacherSignal, `identity` and `columns`."
        )
    return teacher


def _from_cache(
    teacher: Any, task: Task, args: DistillationArguments, *, student: nn.Module, processor: Any
) -> CachedTeacher:
    """What the teacher said before; it is loaded only if it may be asked about rows that are not there."""
    name = teacher if isinstance(teacher, str) else None
    if is_link(name):
        raise ValueError(
            f"teacher={name!r} with teacher_cache={args.teacher_cache!r}: a teacher group keeps nothing. "
            "Fill the cache where the model is (hf-kd cache --teacher PATH), or drop one."
        )
    live, asked = None, args.cache_miss == "compute"
    if teacher is not None and (name is None or asked or is_address(name)):
        live = _live(teacher, task, args, student=student, processor=processor, place=asked)
    if asked and isinstance(live, ServedTeacher):
        most = min(255, live.vocab_size or 255)
        if live.top_k > most:
            raise ValueError(
                f"server_top_k={live.top_k}, but teacher_cache={args.teacher_cache!r} can hold {most} tokens "
                f"a position at most: set server_top_k={most}"
            )
        # All that is to be known of its answers is known before it is asked.
        start_cache(
            str(args.teacher_cache),
            sparse_manifest(
                live,
                entries=live.top_k,
                classes=live.vocab_size or 0,
                temperature=1.0,
                draws=False,
                processor=processor,
            ),
        )
    return open_cache(
        str(args.teacher_cache),
        device=args.device,
        miss=args.cache_miss,
        live=live,
        name=name,
        revision=args.teacher_revision,
        dtype=args.teacher_dtype,
        # A student with a part of the vocabulary asks in the teacher's ids.
        tokenizer="" if hasattr(getattr(student, "config", None), VOCABULARY) else tokenizer_hash(processor),
        rank=args.process_index,
    )
