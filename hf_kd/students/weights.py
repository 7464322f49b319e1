"""A student's weights: made empty from its config, then filled from the teacher's, one by one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .depth import Stack, outer_lists

#: The layers that are kept, by the module path of their stack.
Cuts = Mapping[str, Sequence[int]]
#: What of a teacher's weight the student keeps under a name of its own, as a new tensor.
Slicer = Callable[[str, Tensor], Tensor]

# Attributes that may differ between a layer and its copy at another place: they say where, not what, it is.
_PLACE = re.compile(r"layer_?(idx|id|number|index)|block_?idx|seed|drop")


def refuse_unreadable(teacher: object) -> None:
    """Say why the weights of this teacher cannot be copied one by one."""
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"init_student needs a Transformers model, not {type(teacher).__name__}: merge adapters into it "
            "first (merge_and_unload), and build the student of a plain module yourself"
        )
    if getattr(teacher.config, "quantization_config", None) is not None:
        raise ValueError("the teacher is quantised and cannot be cut: load it without quantisation for that")
    if any(p.is_meta for p in teacher.parameters()):
        raise ValueError("weights of the teacher are off-loaded: load it without a device map for that")


def empty_model(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose parameters take no memory; its buffers are real and as the config says."""
    # Random numbers for weights that have no room take longer than all the rest.
    with torch.random.fork_rng(devices=[]), _parameters_on_meta(), no_init_weights():
        model = kind(config)
    model.tie_weights()
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        # One that is there already is a tie: it stays the same object.
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def teacher_name(name: str, cuts: Cuts) -> str:
    """The teacher's name of a student's weight or module: the same, at the layer it is taken from."""
    for path, kept in cuts.items():
        if name.startswith(f"{path}."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            return f"{path}.{kept[int(index)]}.{rest}".rstrip(".")
    return name


def fill(teacher: PreTrainedModel, student: PreTrainedModel, cuts: Cuts, keep: Slicer) -> None:
    """Give an empty student its part of every weight and saved buffer of the teacher; its ties stay."""
    source = teacher.state_dict()
    made: dict[int, nn.Parameter] = {}
    for path, module in student.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            if id(tensor) in made:
                module._parameters[name] = made[id(tensor)]
                continue
            full = f"{path}.{name}".lstrip(".")
            value = _part(source, full, teacher_name(full, cuts), tensor, keep)
            if name in module._parameters:
                fresh = nn.Parameter(value, requires_grad=tensor.requires_grad)
                made[id(tensor)] = made[id(fresh)] = fresh
                module._parameters[name] = fresh
            else:
                module._buffers[name] = value
    device = next(iter(source.values())).device
    for buffer in student.buffers():  # those that a checkpoint does not hold keep their own dtype
        buffer.data = buffer.data.to(device)


def _part(source: Mapping[str, Tensor], name: str, origin: str, wanted: Tensor, keep: Slicer) -> Tensor:
    whole = source.get(origin)
    value = None if whole is None else keep(name, whole.detach())
    if value is None or value.shape != wanted.shape:
        found = "has no such weight" if value is None else f"has shape {tuple(value.shape)}"
        raise ValueError(f"{name} of the student is {tuple(wanted.shape)}, the teacher's layer {found}")
    return value


def clone(_: str, tensor: Tensor) -> Tensor:
    """A slicer that keeps everything."""
    return tensor.clone()


def compare_layers(
    teacher: PreTrainedModel, student: PreTrainedModel, cuts: Cuts, *, settings: bool = True
) -> None:
    """Refuse a layer that computes something else at its new place (window, rotary, experts ...).

    Args:
        teacher: The whole model.
        student: The cut one; its weights may be on meta.
        cuts: The layers that were kept.
        settings: Whether widths are the same too, so that all plain attributes have to be.
    """
    modules = dict(teacher.named_modules())
    for name, module in outer_lists(teacher).items():
        if name not in cuts and len(module) != len(student.get_submodule(name)):  # type: ignore[arg-type]
            raise ValueError(f"{name} would be cut too, by the same option")
    for name, module in student.named_modules():
        if not any(name.startswith(f"{path}.") for path in cuts):
            continue
        origin = modules[teacher_name(name, cuts)]
        before = layer_settings(origin)
        for key, value in layer_settings(module).items():
            if value != before.get(key) and (settings or key == "class"):
                raise ValueError(
                    f"{key} of {name} is {value!r} and was {before.get(key)!r} in the teacher's layer"
                )


def layer_settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes that say what a module computes."""
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
    }
    kept = {key: value for key, value in plain.items() if not _PLACE.search(key) and key != "training"}
    return {"class": type(module).__name__, **kept}


def follow_rule(teacher: PreTrainedModel, stack: Stack, wanted: Sequence[int]) -> list[int] | None:
    """Layers near the wanted ones whose kind is that of the place they come to.

    Where a rule of the config says what layer i is (every second window shifted, every second layer sparse),
    a layer can only move to a place of its own kind.

    Returns:
        Ascending layers with the smallest total distance from `wanted`, or None if there are none.
    """
    layers: Any = teacher.get_submodule(stack.module)
    kinds = [[layer_settings(module) for module in layer.modules()] for layer in layers]
    # best[j]: cost and choice for the places so far, the last of which takes layer j.
    best: dict[int, tuple[int, list[int]]] = {-1: (0, [])}
    for place, target in enumerate(wanted):
        following: dict[int, tuple[int, list[int]]] = {}
        for j in range(place, stack.count):
            before = [entry for last, entry in best.items() if last < j]
            if kinds[j] == kinds[place] and before:
                cost, chosen = min(before)
                following[j] = (cost + abs(j - target), [*chosen, j])
        best = following
    return min(best.values())[1] if best else None
