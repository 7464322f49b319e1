"""Which teacher class is which student class: label names for classifiers, token ids for language models."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .losses.tiles import SparseTeacher

logger = logging.getLogger(__name__)

_DEFAULT_LABEL = re.compile(r"LABEL_\d+")
#: Tasks whose classes are entries of a vocabulary instead of named labels.
VOCABULARY_TASKS = (
    "causal-lm",
    "image-text-to-text",
    "masked-lm",
    "seq2seq-lm",
    "speech-seq2seq",
    "ctc",
)
#: Tasks whose classes are places in the input, the same for both models by construction.
PLACE_TASKS = (
    "question-answering",
    "multiple-choice",
    "next-sentence",
    "image-text",
    "embedding",
    "embedding-similarity",
)


class AlignmentError(ValueError):
    """Teacher and student predict different things; the message says which and what would work."""


@dataclass(frozen=True)
class ClassMap:
    """How the classes of two models correspond.

    Attributes:
        order: For student class `c`, the teacher's class `order[c]`; None where they agree.
        shared: Number of leading classes to compare; None: all. A larger model vocabulary is padding.
        unlike: Whether the classes don't correspond at all (unlike tokenizers), so that only what is blind to
            their order can compare them.
        notes: What was found, in sentences worth logging.
    """

    order: tuple[int, ...] | None = None
    shared: int | None = None
    unlike: bool = False
    notes: tuple[str, ...] = ()
    #: Whether `order` leaves classes of the teacher out: the student's vocabulary was trimmed.
    kept: bool = False

    @cached_property
    def _index(self) -> Tensor:
        return torch.tensor(self.order)

    def places(self, size: int = 0) -> Tensor:
        """The teacher's class of each of the student's; then, up to `size`, those that the student lacks."""
        gone = torch.ones(max(size, len(self._index)), dtype=torch.bool)
        gone[self._index[self._index < len(gone)]] = False
        return torch.cat([self._index, gone.nonzero().squeeze(-1)]) if size else self._index

    @property
    def drops(self) -> bool:
        """Whether the teacher may have classes that the student has not."""
        return self.shared is not None or self.kept

    def mass_dropped(self, logits: Tensor) -> Tensor:
        """`[P]` mass that the teacher gives to such classes."""
        return (1 - self.teacher(logits.float().softmax(-1)).sum(-1)).clamp_min(0)

    def teacher(self, logits: Tensor) -> Tensor:
        """Teacher logits `[P, C_t]` in the student's classes `[P, C]`; never edited in place."""
        if self.order is not None:
            return logits[:, self._index.to(logits.device)]
        return logits if self.shared is None else logits[:, : self.shared]

    def entries(self, teacher: SparseTeacher) -> SparseTeacher:
        """A sparse teacher's entries in the student's classes; never edited in place.

        Entries of classes that the student has not are dropped, the others renormalised, as for logits. What
        the teacher has there and does not show, in its tail, stays in the tail; draws have it among them.
        """
        ids = teacher.ids
        if self.order is not None:
            # Where the student has a part of the classes, one place more stands for all beyond its last.
            place = torch.full((max(self.order) + 1 + self.kept,), -1, dtype=ids.dtype)
            place[list(self.order)] = torch.arange(len(self.order), dtype=ids.dtype)
            known = ids.long().clamp_min(0)
            known = known.clamp_max(len(place) - 1) if self.kept else known
            ids = torch.where(ids >= 0, place.to(ids.device)[known], ids)
        elif self.shared is not None:
            ids = ids.masked_fill(ids >= self.shared, -1)
        if not self.drops:
            return replace(teacher, ids=ids)
        scale = torch.log1p(-self._mass(teacher, (ids < 0) & (teacher.ids >= 0)))
        log_probs = teacher.log_probs - scale.unsqueeze(-1)
        if teacher.log_tail is not None:
            return replace(teacher, ids=ids, log_probs=log_probs, log_tail=teacher.log_tail - scale)
        assert teacher.weights is not None
        weights = (teacher.weights / scale.exp().unsqueeze(-1)).masked_fill(ids < 0, 0.0)
        return replace(teacher, ids=ids, log_probs=log_probs, weights=weights)

    def dropped(self, teacher: SparseTeacher) -> Tensor:
        """`[...]` mass of a sparse teacher's entries whose classes the student has not."""
        if self.shared is not None:
            return self._mass(teacher, teacher.ids >= self.shared)
        known = self._index.to(teacher.ids.device)
        return self._mass(teacher, (teacher.ids >= 0) & ~torch.isin(teacher.ids.long(), known))

    def _mass(self, teacher: SparseTeacher, gone: Tensor) -> Tensor:
        mass = teacher.log_probs.exp() if teacher.weights is None else teacher.weights
        # All of it, for a few draws: what is left would be divided by 0.
        return mass.masked_fill(~gone, 0.0).sum(-1).clamp_max(1 - 2**-10)

    def student(self, logits: Tensor) -> Tensor:
        """The student's logits in the shared classes."""
        return logits if self.shared is None else logits[:, : self.shared]


def label_names(config: Any) -> list[str] | None:
    """A config's label names in class order, or None where they are only the default `LABEL_i`."""
    id2label = getattr(config, "id2label", None)
    if not id2label:
        return None
    names = [str(id2label[key]) for key in sorted(id2label, key=int)]
    return None if all(_DEFAULT_LABEL.fullmatch(name) for name in names) else names


def align_labels(student: Any, teacher: Any) -> ClassMap:
    """Match the label names of two classification configs.

    Args:
        student: The student's config.
        teacher: The teacher's config.

    Returns:
        The permutation of the teacher's classes into the student's order.

    Raises:
        AlignmentError: If the numbers of labels differ, names exist on one side only, or the names differ.
    """
    counts = [getattr(config, "num_labels", None) for config in (student, teacher)]
    if None in counts:
        return ClassMap()
    if counts[0] != counts[1]:
        raise AlignmentError(
            f"num_labels: the student has {counts[0]} labels, the teacher {counts[1]}. Give the student the "
            "teacher's labels: from_pretrained(..., num_labels=teacher.config.num_labels, "
            "id2label=teacher.config.id2label)."
        )
    ours, theirs = label_names(student), label_names(teacher)
    if ours is None and theirs is None:
        return ClassMap()
    if ours is None or theirs is None:
        named, names = ("teacher", theirs) if ours is None else ("student", ours)
        raise AlignmentError(
            f"id2label: only the {named} has label names ({_short(names)}), so the order of the other "
            "model's classes is not known. Set `id2label` of the model without names to the order that it "
            "was trained in (for a new student: student.config.id2label = teacher.config.id2label)."
        )
    keys = [[name.strip().casefold() for name in names] for names in (ours, theirs)]
    if keys[0] == keys[1]:
        return ClassMap()
    if sorted(keys[0]) != sorted(keys[1]) or len(set(keys[0])) != len(keys[0]):
        raise AlignmentError(
            f"id2label: the student's labels are {_short(ours)}, the teacher's {_short(theirs)}. Rename them "
            "in one config so that the same class has the same name."
        )
    order = tuple(keys[1].index(name) for name in keys[0])
    return ClassMap(
        order=order,
        notes=(
            f"id2label: the teacher's classes {_short(theirs)} are permuted to the student's {_short(ours)}.",
        ),
    )


def align_vocabulary(
    student_size: int, teacher_size: int, student_tokens: Any, teacher_tokens: Any
) -> ClassMap:
    """Match two vocabularies: the same tokens with more padding on one side are cut to the shared range.

    Args:
        student_size: Number of the student's output classes.
        teacher_size: Number of the teacher's output classes.
        student_tokens: The student's tokenizer or a processor that holds it, or None if it is not known.
        teacher_tokens: The teacher's, likewise.

    Raises:
        AlignmentError: If the tokenizers differ (with the first token that does), or the sizes differ and the
            tokenizers are not known.
    """
    student_tokens, teacher_tokens = tokenizer_of(student_tokens), tokenizer_of(teacher_tokens)
    if student_tokens is not None and teacher_tokens is not None and student_tokens is not teacher_tokens:
        difference = first_difference(student_tokens, teacher_tokens)
        if difference is not None:
            raise AlignmentError(
                f"tokenizer: student and teacher use different tokenizers ({difference}). Token-level losses "
                "need the same one: build the student on the teacher's tokenizer, distil through labels that "
                "the teacher generates (alpha=0 on its outputs), or, for a causal model, take "
                "divergence='uld' with the teacher's own columns (hf_kd.data.unlike)."
            )
    if student_size == teacher_size:
        return ClassMap()
    if student_tokens is None or teacher_tokens is None:
        raise AlignmentError(
            f"vocab_size: the student predicts {student_size} tokens, the teacher {teacher_size}, and "
            "without both tokenizers nobody knows whether that is padding. Pass `processing_class` (and "
            "`teacher_processing_class` if it is not found beside the teacher)."
        )
    shared = min(student_size, teacher_size)
    if len(student_tokens) > shared:
        raise AlignmentError(
            f"vocab_size: the tokenizer has {len(student_tokens)} tokens but one model predicts only "
            f"{shared}. Resize its embeddings: model.resize_token_embeddings(len(tokenizer))."
        )
    return ClassMap(
        shared=shared,
        notes=(
            f"vocab_size: the student predicts {student_size} tokens, the teacher {teacher_size}; both are "
            f"compared on the shared {shared} and renormalised there (evaluation logs the teacher mass "
            "dropped).",
        ),
    )


def align_trimmed(
    kept: Sequence[int], sizes: tuple[int, int], student_tokens: Any, teacher_tokens: Any
) -> ClassMap:
    """Match a trimmed vocabulary with the one it was cut from.

    Args:
        kept: The teacher's id of each of the student's tokens.
        sizes: Number of tokens of student and teacher.
        student_tokens: The student's tokenizer, or None.
        teacher_tokens: The teacher's, or None.

    Returns:
        The teacher's classes that the student has; both are compared there, renormalised.

    Raises:
        AlignmentError: If the map does not fit the models or their tokenizers.
    """
    if len(kept) != sizes[0] or max(kept) >= sizes[1]:
        raise AlignmentError(
            f"hf_kd_vocabulary: the student's config maps {len(kept)} tokens to ids up to {max(kept)}, but "
            f"the models have {sizes[0]} and {sizes[1]}: the student was cut from another teacher."
        )
    ours, theirs = tokenizer_of(student_tokens), tokenizer_of(teacher_tokens)
    if ours is not None and theirs is not None:
        wanted = theirs.convert_ids_to_tokens([int(i) for i in kept])
        for token, i in ours.get_vocab().items():
            if i >= len(wanted) or wanted[i] != token:
                raise AlignmentError(
                    f"tokenizer: token {i} of the student is {token!r}, not what hf_kd_vocabulary in its "
                    "config says: use the tokenizer that trim_vocabulary made, and the teacher's own."
                )
    note = f"vocabulary: the student has {len(kept)} of the teacher's {sizes[1]} tokens, compared there."
    return ClassMap(order=tuple(kept), kept=True, notes=(note,))


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer itself, or the one in a processor; None where there is none (a feature extractor)."""
    tokens = getattr(processor, "tokenizer", processor)
    return tokens if hasattr(tokens, "get_vocab") else None


def first_difference(student_tokens: Any, teacher_tokens: Any) -> str | None:
    """The first token id whose token differs between two tokenizers, in words; None if there is none."""
    student_tokens, teacher_tokens = tokenizer_of(student_tokens), tokenizer_of(teacher_tokens)
    if student_tokens is None or teacher_tokens is None:
        return None
    ours, theirs = ({i: t for t, i in tok.get_vocab().items()} for tok in (student_tokens, teacher_tokens))
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            mine, other = ours.get(index), theirs.get(index)
            return f"token id {index} is {mine!r} for the student and {other!r} for the teacher"
    return None


def _short(names: list[str] | None) -> str:
    names = names or []
    shown = ", ".join(repr(name) for name in names[:6])
    return f"[{shown}{', ...' if len(names) > 6 else ''}]"
