"""What a student will be, before any weight is copied: its config, its layers, and the channels that stay."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from . import depth, vocabulary, width
from .axes import changed_kinds, find_axes, make_explicit
from .depth import Stack
from .importance import reader_importance
from .memory import LAYERS, VOCABULARY
from .symmetry import find_layout
from .weights import compare_layers, empty_model, fill, follow_rule, teacher_name

logger = logging.getLogger("hf_kd.students")

_Errors = (RuntimeError, ValueError, KeyError, IndexError)


class Plan:
    """A student to be: made empty, and filled in one pass over the teacher's weights.

    Args:
        teacher: The model to cut.
        stacks: Its stacks of layers.
        cuts: The layers to keep, by module path.
        may_move: Whether a layer near a wanted one may be taken where that one can't move to its place.

    Raises:
        ValueError: If the layers would compute something else at their new places.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        stacks: Sequence[Stack],
        cuts: Mapping[str, Sequence[int]],
        *,
        may_move: bool,
    ) -> None:
        self.teacher, self.stacks = teacher, stacks
        self.kept: width.Kept = {}
        try:
            try:
                self._cut(cuts)
            except _Errors:
                moved = {s.module: follow_rule(teacher, s, cuts[s.module]) for s in stacks}
                if not may_move or None in moved.values() or moved == cuts:
                    raise
                self._cut({path: kept for path, kept in moved.items() if kept is not None})
        except _Errors as error:
            raise ValueError(
                f"{type(teacher).__name__} cannot be cut to layers {list(cuts.values())}: {error}. Choose "
                "other layers with layers=[...], give a smaller checkpoint as student, or student_config"
            ) from error

    def _cut(self, cuts: Mapping[str, Sequence[int]]) -> None:
        config = copy.deepcopy(self.teacher.config)
        config._name_or_path = ""
        for name in (LAYERS, VOCABULARY):  # of the teacher, if it is a student itself
            config.__dict__.pop(name, None)
        for stack in self.stacks:
            depth.cut_config(depth.sub_config(config, stack.config_path), stack, cuts[stack.module])
        if self.stacks:
            setattr(config, LAYERS, {s.option: list(cuts[s.module]) for s in self.stacks})
        model = empty_model(type(self.teacher), config)
        compare_layers(self.teacher, model, cuts)
        self.config: PreTrainedConfig = config
        self.model: PreTrainedModel = model
        self.cuts = dict(cuts)

    def narrow(
        self, sizes: width.Sizes, vocab: Sequence[int] | None, batches: Sequence[Mapping[str, Any]]
    ) -> None:
        """Cut widths and vocabulary too; see `init_student`.

        Raises:
            ValueError: If a size does not fit, or an axis that would be cut is not understood.
        """
        kind = type(self.teacher)
        config = make_explicit(kind, self.config)
        whole = copy.deepcopy(config)
        width.cut_widths(config, sizes)
        if vocab is not None:
            vocabulary.cut_config(config, vocab)

        def measure(readers: list[str]) -> dict[str, Tensor]:
            names = {teacher_name(name, self.cuts): name for name in readers}
            found = reader_importance(self.teacher, names, batches) if batches and names else {}
            return {names[name]: scores for name, scores in found.items()}

        try:
            wanted = changed_kinds(whole, config)
            interleaved = find_layout(kind, whole, self.stacks, wanted)
            full, axes = find_axes(kind, whole, wanted, interleaved=interleaved)
            self.model = empty_model(kind, config)
            tokens = None if vocab is None else torch.tensor(vocab)
            self.kept = width.select(full, self.model, axes, measure, tokens)
        except _Errors as error:
            asked = ", ".join(f"{width.OPTIONS[k]}={v}" for k, v in sizes.items() if v is not None)
            raise ValueError(
                f"{kind.__name__} cannot be cut to {asked or 'this vocabulary'}: {error}. Leave that size as "
                "it is, or make a student with random weights from student_config"
            ) from error
        self.config = config

    def build(self) -> PreTrainedModel:
        """The student."""
        teacher, student = self.teacher, self.model
        try:
            fill(teacher, student, self.cuts, width.slicer(self.kept))
        except _Errors as error:
            raise ValueError(f"{type(teacher).__name__} cannot be cut: {error}") from error
        if teacher.can_generate():
            student.generation_config = copy.deepcopy(teacher.generation_config)
            vocab = getattr(self.config, VOCABULARY, None)
            if vocab is not None:
                vocabulary.map_ids(student.generation_config, vocab)
        return student.train(teacher.training)

    def log(self) -> None:
        """Say which layers, and which sizes, the student has."""
        for stack in self.stacks:
            kept = self.cuts[stack.module]
            pairs = ", ".join(f"{i} <- {j}" for i, j in enumerate(kept))
            logger.info("student %s: %d of %d layers, %s", stack.option, len(kept), stack.count, pairs)
        for line in width.describe(self.teacher.config, self.config):
            logger.info("student %s", line)
