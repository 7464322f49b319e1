"""`init_student`: a smaller model of the teacher's class that starts from the teacher's weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from . import depth
from .depth import Stack
from .memory import LAYERS, VOCABULARY
from .sizes import Size
from .weights import clone, compare_layers, empty_model, fill, follow_rule, refuse_unreadable

logger = logging.getLogger(__name__)


def init_student(
    teacher: PreTrainedModel,
    *,
    num_layers: Size | Mapping[str, Size] | None = None,
    layers: str | Sequence[int] | Mapping[str, Sequence[int]] = "even",
) -> PreTrainedModel:
    """Cut a student out of the teacher's layers; all other weights are copied.

    Works for every model whose stack of layers is a module list as long as its config's layer count:
    encoders, decoders and encoder-decoders, and the stages of a pyramid (Swin), whatever the head. The
    student has the teacher's class, dtype, device and train or eval mode, and shares no memory with it. Layer
    indices, per-layer settings such as `layer_types`, tied weights and the generation config follow. The map
    of layers is logged and kept in `student.config.hf_kd_layers` until the student is exported.

    Args:
        teacher: The model to cut; it is not changed.
        num_layers: Layers to keep, default half of them, rounded up: a number, or a share of the teacher's
            between 0 and 1. One number is for every stack of the model (and is the most that a stage of a
            pyramid keeps); a mapping names them by config option:
            `{"encoder_layers": 6, "decoder_layers": 0.5}`, `{"depths.2": 2}`.
        layers: `"even"` (see `layer_map`), `"first"`, `"last"`, or the teacher layers to keep, in ascending
            order; for several stacks a mapping as above. Where a rule of the config says what layer i is,
            "even" takes the nearest layers that are of the kind of their new place.

    Returns:
        A model of the same class with fewer layers.

    Raises:
        ValueError: If the layers do not fit the teacher, or if its layers cannot be cut without changing what
            the remaining ones compute.
    """
    refuse_unreadable(teacher)
    stacks = depth.find_stacks(teacher)
    if not stacks:
        raise ValueError(
            f"init_student finds no stack of layers in {type(teacher).__name__}: none of its module lists is "
            "as long as a layer count of its config. Give a smaller checkpoint as student, or student_config"
        )
    rankings = {
        "even": depth.even(stacks),
        "first": depth.ends(stacks, last=False),
        "last": depth.ends(stacks, last=True),
    }
    if num_layers is None and isinstance(layers, str):
        num_layers = {stack.option: (stack.count + 1) // 2 for stack in stacks}
    cuts = depth.choose_layers(stacks, num_layers, layers, rankings)
    try:
        try:
            student = _cut(teacher, stacks, cuts)
        except (RuntimeError, ValueError, KeyError, IndexError):
            moved = {s.module: follow_rule(teacher, s, cuts[s.module]) for s in stacks}
            if layers != "even" or None in moved.values() or moved == cuts:
                raise
            cuts = {path: kept for path, kept in moved.items() if kept is not None}
            student = _cut(teacher, stacks, cuts)
        fill(teacher, student, cuts, clone)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"{type(teacher).__name__} cannot be cut to layers {list(cuts.values())}: {error}. Choose "
            "other layers with layers=[...], give a smaller checkpoint as student, or student_config"
        ) from error
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    for stack in stacks:
        pairs = ", ".join(f"{i} <- {j}" for i, j in enumerate(cuts[stack.module]))
        logger.info(
            "student %s: %d of %d layers, %s", stack.option, len(cuts[stack.module]), stack.count, pairs
        )
    return student.train(teacher.training)


def _cut(
    teacher: PreTrainedModel, stacks: Sequence[Stack], cuts: Mapping[str, Sequence[int]]
) -> PreTrainedModel:
    """An empty student of the layers that are kept."""
    config = copy.deepcopy(teacher.config)
    config._name_or_path = ""
    for name in (LAYERS, VOCABULARY):  # of the teacher, if it is a student itself
        config.__dict__.pop(name, None)
    for stack in stacks:
        depth.cut_config(depth.sub_config(config, stack.config_path), stack, cuts[stack.module])
    setattr(config, LAYERS, {stack.option: list(cuts[stack.module]) for stack in stacks})
    student = empty_model(type(teacher), config)
    compare_layers(teacher, student, cuts)
    return student
