"""How the two models of a trainer correspond: their classes, and what their processors make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .alignment import (
    PLACE_TASKS,
    VOCABULARY_TASKS,
    AlignmentError,
    ClassMap,
    align_labels,
    align_trimmed,
    align_vocabulary,
    first_difference,
    tokenizer_of,
)
from .losses.divergences import resolve_divergence
from .losses.needs import needs_of
from .options import as_mapping
from .processors import PixelMap, align_processors
from .students.memory import VOCABULARY
from .teachers.cache import CachedTeacher
from .teachers.ensemble import Ensemble
from .teachers.models import TEACHER_PREFIX, ModelTeacher, forward_parameters

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


def match_classes(trainer: DistillationTrainer) -> ClassMap:
    """How the teacher's classes correspond to the student's; members of an ensemble are mapped one by one.

    Raises:
        AlignmentError: If they don't.
    """
    teacher = trainer.teacher
    if not isinstance(teacher, Ensemble):
        return _match(trainer, teacher)
    for member in teacher.members:
        member.classes = _match(trainer, member.teacher)
    found = [member.classes for member in teacher.members]
    if any(classes.unlike for classes in found):
        raise AlignmentError(
            f"teachers: divergence={trainer.args.divergence!r} compares unlike vocabularies, which have no "
            "classes in common to average over; use one teacher."
        )
    teacher.shared = min((c.shared for c in found if c.shared is not None), default=None)
    return ClassMap(shared=teacher.shared, notes=tuple(dict.fromkeys(n for c in found for n in c.notes)))


def _match(trainer: DistillationTrainer, teacher: Any) -> ClassMap:
    # A teacher that is no model may describe its classes in a `config` of its own.
    described: Any = teacher.model if isinstance(teacher, ModelTeacher) else teacher
    student_config, teacher_config = (getattr(m, "config", None) for m in (trainer.student, described))
    if trainer.task.name in PLACE_TASKS:
        return ClassMap()
    if student_config is None or teacher_config is None:
        return ClassMap()
    if trainer.task.name not in VOCABULARY_TASKS:
        return align_labels(student_config, teacher_config)
    sizes = _vocab_size(trainer.student), _vocab_size(described)
    processors = trainer.processing_class, _teacher_processor(trainer, described)
    kept = _trimmed(trainer)
    if kept is not None and isinstance(teacher, ModelTeacher | CachedTeacher):
        return align_trimmed(kept, sizes, *processors)
    try:
        return align_vocabulary(*sizes, *processors)
    except AlignmentError:
        if trainer.task.name != "causal-lm" or not _blind_to_classes(trainer):
            raise
    note = f"divergence={trainer.args.divergence!r} compares unlike vocabularies, {sizes[0]} and {sizes[1]}."
    return ClassMap(unlike=True, notes=(note,))


def _blind_to_classes(trainer: DistillationTrainer) -> bool:
    """Whether the divergence compares models whose classes don't correspond."""
    args = trainer.args
    if args.divergence in (None, "auto"):
        return False
    options = as_mapping(args.divergence_options)
    return needs_of(resolve_divergence(args.divergence, options)).unlike_classes


def _trimmed(trainer: DistillationTrainer) -> list[int] | None:
    """The teacher's id of each of the student's tokens, where the student's vocabulary was trimmed."""
    if trainer.args.self_teacher is not None:
        return None  # its own tokens are the teacher's
    return getattr(getattr(trainer.student, "config", None), VOCABULARY, None)


def match_inputs(trainer: DistillationTrainer) -> None:
    """Find what each teacher does to the student's pixels before it reads them, and have it done.

    Raises:
        AlignmentError: If two models' inputs differ in a way that can't be undone, and the data has no
            `teacher_` columns.
    """
    # One behind a cache is asked about rows that the cache lacks.
    teacher = getattr(trainer.teacher, "live", None) or trainer.teacher
    teachers: list[Any] = [m.teacher for m in teacher.members] if isinstance(teacher, Ensemble) else [teacher]
    kept = _trimmed(trainer)
    for one in [*teachers, trainer.teacher] if isinstance(trainer.teacher, CachedTeacher) else teachers:
        if isinstance(one, ModelTeacher):
            one.pixels = _pixels(trainer, one)
        elif isinstance(one, CachedTeacher):
            one.tokens = None if kept is None else torch.tensor(kept)
        elif kept is not None and one is not None:
            raise AlignmentError(
                f"teacher: the student has {len(kept)} of its teacher's tokens, and a {type(one).__name__} "
                "can't be asked in the teacher's own ids: give the teacher as a model, or a cache of what it "
                "says (teacher_cache)."
            )


def _pixels(trainer: DistillationTrainer, teacher: ModelTeacher) -> PixelMap | None:
    own = (prefix + name for prefix in teacher.prefixes for name in forward_parameters(teacher.model))
    if set(own) & set(_columns(trainer)):
        return None
    processors = trainer.processing_class, _teacher_processor(trainer, teacher.model)
    kept = _trimmed(trainer)
    if kept is not None:
        config: Any = teacher.model.config
        align_trimmed(kept, (len(kept), config.get_text_config().vocab_size), *processors)
        teacher.tokens = torch.tensor(kept)
        return align_processors(*processors)
    tokenizers = [tokenizer_of(processor) for processor in processors]
    difference = None if None in tokenizers else first_difference(*tokenizers)
    if difference is not None and trainer.task.name not in VOCABULARY_TASKS:
        raise AlignmentError(
            f"processing_class: student and teacher use different tokenizers ({difference}). Give the "
            f"teacher its own columns, made by its tokenizer: {TEACHER_PREFIX}input_ids, "
            f"{TEACHER_PREFIX}attention_mask."
        )
    return align_processors(*processors)


def _teacher_processor(trainer: DistillationTrainer, model: Any) -> Any:
    given = trainer.teacher_processing_class
    if isinstance(trainer.teacher, Ensemble):
        return _processor_beside(model) or given  # which of them is meant, nobody said
    return given or _processor_beside(model)


def _vocab_size(model: nn.Module) -> int:
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    weight = getattr(head, "weight", None)
    if weight is not None:
        return int(weight.shape[0])
    config: Any = model.config
    nested = getattr(config, "get_text_config", None)
    return int((nested(decoder=True) if nested is not None else config).vocab_size)


def _processor_beside(model: nn.Module) -> Any:
    """The processor in the folder or cache that a model was loaded from, or None. Never asks the network."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    name = getattr(model, "name_or_path", "")
    autos: dict[str, Any] = {
        "input_ids": AutoTokenizer,
        "pixel_values": AutoImageProcessor,
        "input_values": AutoFeatureExtractor,
        "input_features": AutoFeatureExtractor,
    }
    auto = autos.get(getattr(model, "main_input_name", "input_ids"))
    if not name or auto is None:
        return None
    try:
        return auto.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _columns(trainer: DistillationTrainer) -> list[str]:
    dataset = trainer.train_dataset if trainer.train_dataset is not None else first_eval_dataset(trainer)
    return list(getattr(dataset, "column_names", None) or [])


def queries_differ(trainer: DistillationTrainer) -> bool:
    """Whether two detectors look for objects with queries of their own, so that query i means two things."""
    teacher = trainer.teacher
    if trainer.task.name != "object-detection" or not isinstance(teacher, ModelTeacher):
        return False
    ours, theirs = (
        [p for name, p in model.named_parameters() if "query_position" in name or "detection_tokens" in name]
        for model in (trainer.student, teacher.model)
    )
    return len(ours) != len(theirs) or any(
        a.shape != b.shape or not torch.equal(a.to(b), b) for a, b in zip(ours, theirs, strict=True)
    )


def first_eval_dataset(trainer: DistillationTrainer) -> Any:
    """The evaluation data, or the first of several sets; None if there is none."""
    dataset = trainer.eval_dataset
    return next(iter(dataset.values()), None) if isinstance(dataset, dict) else dataset
