"""Which layer of the teacher teaches which layer of the student.

Layers are counted from 0, and a layer is its own output: Transformers' `hidden_states[i + 1]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .students.depth import find_stacks, layer_map, sub_config
from .students.memory import remembered_layers
from .teachers.models import base_model


def last_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher's last layers, one each (PKD-Last, Sun et al. 2019, arXiv:1908.09355, section 3.2)."""
    return list(range(teacher_layers - student_layers, teacher_layers))


def every_kth_layer(teacher_layers: int, student_layers: int) -> list[int]:
    """Every k-th layer up to the last one (PKD-Skip, same source): 12 to 4 layers is `[2, 5, 8, 11]`."""
    return [(i + 1) * teacher_layers // student_layers - 1 for i in range(student_layers)]


#: Name -> `(teacher_layers, student_layers) -> teacher layer of each student layer`, for `layer_map`.
LAYER_MAPS: dict[str, Callable[[int, int], list[int]]] = {
    "even": layer_map,
    "last": last_layers,
    "skip": every_kth_layer,
}


@dataclass(frozen=True)
class LayerStack:
    """A model's layers.

    Attributes:
        path: Of the module list.
        count: How many there are.
        config: That of the model, or of its part that they belong to.
        option: The config's option that counts them.
        role: "decoder" and "encoder" of an encoder-decoder, a part's config for parts ("vision_config"),
            else "".
        inner: Whether its positions are not those of the head: an encoder's before a decoder, a vision
            tower's.
    """

    path: str
    count: int
    config: Any
    option: str
    role: str
    inner: bool

    def layer(self, index: int) -> str:
        """Path of a layer."""
        return f"{self.path}.{index}"


@dataclass(frozen=True)
class StackPair:
    """Two stacks and their pairs of layers `(student's, teacher's)`, in the student's order."""

    student: LayerStack
    teacher: LayerStack
    layers: tuple[tuple[int, int], ...]


def layer_stacks(whole: nn.Module) -> list[LayerStack]:
    """Find a model's stacks of layers.

    Raises:
        ValueError: If there are none.
    """
    model: Any = base_model(whole)
    found = find_stacks(model, least=1) if isinstance(model, PreTrainedModel) else []
    found = [stack for stack in found if stack.stage is None]
    if not found:
        raise ValueError(
            "Losses on layers (hidden_weight, attention_weight, relation_weight, embedding_weight) need a "
            f"stack of layers, but none of the module lists of {type(model).__name__} is as long as a layer "
            "count of its config (models whose layers are in stages, or shared, have none). Set these "
            "weights to 0."
        )
    stacks = []
    for stack in found:
        config = sub_config(model.config, stack.config_path)
        parts = stack.module.split(".")
        side = ""
        if getattr(model.config, "is_encoder_decoder", False):
            side = "decoder" if "decoder" in parts else "encoder"
        role = f"{stack.config_path}.{side}".strip(".")
        inner = side == "encoder" or "vision" in role or "audio" in role
        stacks.append(LayerStack(stack.module, stack.count, config, stack.option, role, inner))
    return stacks


def pair_layers(student: nn.Module, teacher: nn.Module, wanted: str | Mapping[Any, Any]) -> list[StackPair]:
    """Resolve the option `layer_map`.

    Args:
        student: The student.
        teacher: The teacher.
        wanted: "auto" (what the student's config remembers of how it was cut from its teacher, else "even"),
            a name in `LAYER_MAPS`, or a mapping of student layers to teacher layers, each a number (from 0;
            negative: from the end) or a module's name.

    Raises:
        ValueError: If stacks or layers don't correspond.
    """
    ours, theirs = layer_stacks(student), layer_stacks(teacher)
    if isinstance(wanted, Mapping):
        return _named_pairs(ours, theirs, wanted)
    remembered = remembered_layers(base_model(student).config) if wanted == "auto" else None
    pairs = []
    for one, other in _pair_stacks(ours, theirs):
        kept = _remembered(remembered, one, other)
        if kept is None:
            kept = _spread(wanted, one, other)
        pairs.append(StackPair(one, other, tuple(enumerate(kept))))
    return pairs


def _pair_stacks(ours: list[LayerStack], theirs: list[LayerStack]) -> list[tuple[LayerStack, LayerStack]]:
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    roles = {stack.role: stack for stack in theirs}
    if {stack.role for stack in ours} != set(roles):
        raise ValueError(
            f"layer_map: the student's stacks of layers are {[s.path for s in ours]}, the teacher's "
            f"{[s.path for s in theirs]}, and they don't correspond one to one. Give pairs of names, "
            f"""layer_map='{{"{ours[0].layer(0)}": "{theirs[0].layer(0)}"}}'."""
        )
    return [(stack, roles[stack.role]) for stack in ours]


def _remembered(kept: Any, student: LayerStack, teacher: LayerStack) -> list[int] | None:
    """The map in the student's config, if it is one between these two stacks."""
    layers = kept.get(student.option) if isinstance(kept, Mapping) else None
    if not isinstance(layers, Sequence) or len(layers) != student.count:
        return None
    return list(layers) if all(0 <= i < teacher.count for i in layers) else None


def _spread(wanted: str, student: LayerStack, teacher: LayerStack) -> list[int]:
    name = "even" if wanted == "auto" else wanted
    if name not in LAYER_MAPS:
        raise ValueError(
            f"layer_map={wanted!r} is not known: use one of auto, {', '.join(LAYER_MAPS)}, or pairs "
            """such as '{"0": 3, "-1": -1}'"""
        )
    if student.count > teacher.count:
        raise ValueError(
            f"layer_map={wanted!r} does not fit: the student's {student.path} has {student.count} layers, "
            f"the teacher's {teacher.path} {teacher.count}. Give pairs, layer_map="
            """'{"-1": -1}'."""
        )
    return LAYER_MAPS[name](teacher.count, student.count)


def _named_pairs(
    ours: list[LayerStack], theirs: list[LayerStack], wanted: Mapping[Any, Any]
) -> list[StackPair]:
    if not wanted:
        raise ValueError("layer_map={} has no pair: give some, or layer_map='even'.")
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for student, teacher in wanted.items():
        one, i = _locate(ours, student, "student")
        other, j = _locate(theirs, teacher, "teacher")
        found.setdefault((one.path, other.path), []).append((i, j))
    first, second = ({stack.path: stack for stack in stacks} for stacks in (ours, theirs))
    return [StackPair(first[a], second[b], tuple(sorted(pairs))) for (a, b), pairs in found.items()]


def _locate(stacks: list[LayerStack], layer: Any, whose: str) -> tuple[LayerStack, int]:
    """The stack and the number of a layer that is given by number or name."""
    text = str(layer)
    places = ", ".join(f"{s.layer(0)} to {s.layer(s.count - 1)}" for s in stacks)
    if _is_number(text):
        if len(stacks) > 1:
            raise ValueError(f"layer_map: {text} could be a layer of several stacks; name it: {places}.")
        stack, number = stacks[0], text
    else:
        path, _, number = text.rpartition(".")
        stack = next((s for s in stacks if s.path == path), stacks[0])
        if stack.path != path or not _is_number(number):
            raise ValueError(f"layer_map: the {whose} has no layer {text!r}; it has {places}.")
    index = int(number)
    if not -stack.count <= index < stack.count:
        raise ValueError(f"layer_map: the {whose} has no layer {text}; it has {stack.count}, {places}.")
    return stack, index % stack.count


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
