"""Make a student out of the teacher's layers; `hf_kd.fresh` makes one with random weights.

A student is an ordinary Transformers model: it saves, loads, generates and trains without this package.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kd.fresh import build_model, fresh_student

__all__ = ["build_model", "fresh_student", "init_student", "layer_map"]

logger = logging.getLogger(__name__)

# Names under which configs keep a layer count, per side of an encoder-decoder model.
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
_SIDES = {
    "encoder": ("encoder_layers", "num_encoder_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
# Attributes that may differ between a layer and its copy at another place: they say where, not what, it is.
_PLACE = re.compile(r"layer_?(idx|id|number|index)|block_?idx|seed|drop")
_Cuts = Mapping[str, Sequence[int]]
# Settings of parts in front of the layers, whose number may happen to be the same.
_NOT_LAYERS = ("__", "conv_", "tdnn_")
_INDEX_LIST = re.compile(r"(layers|idxs|indexes|indices|_ids)$")


def layer_map(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher layer that each student layer is taken from: evenly spaced, first and last included.

    A student of one layer takes the first, which is the one that reads embeddings. `layer_map(12, 6)` is
    `[0, 2, 4, 7, 9, 11]`.

    Raises:
        ValueError: If `student_layers` is not in `[1, teacher_layers]`.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"num_layers={student_layers} does not fit a teacher of {teacher_layers} layers: "
            f"set num_layers between 1 and {teacher_layers}"
        )
    gaps = max(student_layers - 1, 1)
    # Integer arithmetic: halves round up on every platform.
    return [(2 * i * (teacher_layers - 1) + gaps) // (2 * gaps) for i in range(student_layers)]


def init_student(
    teacher: PreTrainedModel,
    *,
    num_layers: int | Mapping[str, int] | None = None,
    layers: str | Sequence[int] | Mapping[str, Sequence[int]] = "even",
) -> PreTrainedModel:
    """Cut a student out of the teacher's layers; all other weights are copied.

    Works for every model whose stack of layers is a module list as long as its config's layer count:
    encoders, decoders and encoder-decoders, whatever the head. The student has the teacher's class, dtype,
    device and train or eval mode, and shares no memory with it. Layer indices, per-layer settings such as
    `layer_types`, tied weights and the generation config follow. The map is logged.

    Args:
        teacher: The model to cut; it is not changed.
        num_layers: Layers to keep, default half of them, rounded up. One number is for every stack of the
            model; a mapping names them by config option: `{"encoder_layers": 6, "decoder_layers": 3}`.
        layers: `"even"` (see `layer_map`), or the teacher layers to keep, in ascending order; for several
            stacks a mapping as above.

    Returns:
        A model of the same class with fewer layers.

    Raises:
        ValueError: If the layers do not fit the teacher, or if its layers cannot be cut without changing what
            the remaining ones compute.
    """
    _refuse_unreadable(teacher)
    stacks = _find_stacks(teacher)
    if not stacks:
        raise ValueError(
            f"init_student finds no stack of layers in {type(teacher).__name__}: none of its module lists is "
            "as long as a layer count of its config. Give a smaller checkpoint as student, or student_config"
        )
    cuts = _choose(stacks, num_layers, layers)
    config = copy.deepcopy(teacher.config)
    config._name_or_path = ""
    try:
        for stack in stacks:
            _cut_config(_sub_config(config, stack.config_path), stack, cuts[stack.module])
        with torch.random.fork_rng(devices=[]):  # the initialisation is overwritten: leave no trace of it
            student = type(teacher)(config)
        _copy_weights(teacher, student, cuts)
        _compare_layers(teacher, student, cuts)
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


@dataclass(frozen=True)
class _Stack:
    """A module list that is the model's layers: its module path, config, count option(s) and length."""

    module: str
    config_path: str
    fields: tuple[str, ...]
    count: int

    @property
    def option(self) -> str:
        return f"{self.config_path}.{self.fields[0]}".lstrip(".")


def _refuse_unreadable(teacher: object) -> None:
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


def _find_stacks(model: PreTrainedModel) -> list[_Stack]:
    """Outermost module lists whose length is the layer count of the config they were built from."""
    found: dict[str, tuple[int, _Stack]] = {}
    owners: list[tuple[str, PreTrainedConfig]] = []
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            owners.append((path, config))
    for path, module in _outer_lists(model).items():
        owner = max((item for item in owners if _is_inside(path, item[0])), key=lambda item: len(item[0]))[1]
        config_path = _config_path(model.config, owner)
        if config_path is None or hasattr(owner, "depths"):  # stages of a pyramid are not layers
            continue
        fields = _count_fields(_sub_config(model.config, config_path), path, len(module))
        if not fields:
            continue
        stack = _Stack(path, config_path, fields, len(module))
        size = sum(p.numel() for p in module.parameters())
        # A list of another kind may happen to be as long: the layers are where the weights are.
        if size > found.get(stack.option, (0, stack))[0]:
            found[stack.option] = (size, stack)
    return [stack for _, stack in found.values()]


def _outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Module lists of two or more that are in no other such list, by path."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not nested:
            lists[path] = module
    return lists


def _is_inside(path: str, prefix: str) -> bool:
    return not prefix or path.startswith(f"{prefix}.")


def _config_path(root: PreTrainedConfig, wanted: PreTrainedConfig) -> str | None:
    """Where in the tree of configs `wanted` is; some stacks (T5) hold a copy, found by its class."""
    tree = dict(_config_tree(root))
    same = [path for path, config in tree.items() if config is wanted]
    alike = [path for path, config in tree.items() if type(config) is type(wanted)]
    return next(iter(same or alike), None)


def _config_tree(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    yield path, config
    for name, child in vars(config).items():
        if isinstance(child, PreTrainedConfig):
            yield from _config_tree(child, f"{path}.{name}".lstrip("."))


def _sub_config(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    for name in filter(None, path.split(".")):
        config = getattr(config, name)
    return config


def _count_fields(config: PreTrainedConfig, path: str, length: int) -> tuple[str, ...]:
    """The options of `config` that count the layers of the module list at `path`."""
    side = next((name for name in ("decoder", "encoder") if name in path.split(".")), None)
    names = [name for name in _SIDES.get(side or "", ()) if hasattr(config, name)] or list(_COUNTS)
    alias = config.attribute_map
    canonical = dict.fromkeys(alias.get(name, name) for name in names)
    return tuple(name for name in canonical if getattr(config, name, None) == length)


def _choose(
    stacks: Sequence[_Stack],
    num_layers: int | Mapping[str, int] | None,
    layers: str | Sequence[int] | Mapping[str, Sequence[int]],
) -> dict[str, list[int]]:
    """For each stack (by module path) the teacher layers that the student keeps."""
    options = {stack.option: stack for stack in stacks}
    for name, value in (("num_layers", num_layers), ("layers", layers)):
        unknown = set(value) - set(options) if isinstance(value, Mapping) else set()
        if unknown:
            raise ValueError(
                f"{name} names {sorted(unknown)}, but the teacher's stacks are {sorted(options)}"
            )
    if isinstance(layers, str) and layers != "even":
        raise ValueError(f"layers={layers!r} is not known: use 'even' or a list of layers such as [0, 5, 11]")
    chosen = {}
    for option, stack in options.items():
        wanted = layers.get(option, "even") if isinstance(layers, Mapping) else layers
        count = num_layers.get(option, stack.count) if isinstance(num_layers, Mapping) else num_layers
        if isinstance(wanted, str):
            chosen[stack.module] = layer_map(stack.count, (stack.count + 1) // 2 if count is None else count)
        else:
            chosen[stack.module] = _checked(list(wanted), stack, count)
    return chosen


def _checked(wanted: list[int], stack: _Stack, count: int | None) -> list[int]:
    ascending = all(a < b for a, b in zip(wanted, wanted[1:], strict=False))
    if not wanted or not ascending or wanted[0] < 0 or wanted[-1] >= stack.count:
        raise ValueError(
            f"layers={wanted} does not fit {stack.option}={stack.count}: list layers from 0 to "
            f"{stack.count - 1} in ascending order, each once"
        )
    if count not in (None, len(wanted)):
        raise ValueError(f"num_layers={count} but layers={wanted} are {len(wanted)}: set one of the two")
    return wanted


def _cut_config(config: PreTrainedConfig, stack: _Stack, kept: Sequence[int]) -> None:
    """Set the layer count, and cut every per-layer setting to the layers that are kept."""
    for name in stack.fields:
        setattr(config, name, len(kept))
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and not name.startswith(_NOT_LAYERS):
            cut = _cut_setting(name, value, stack.count, kept)
            if cut != value:
                setattr(config, name, cut)
    if getattr(config, "stage_names", None):
        _cut_stages(config, stack, len(kept))
    if config.model_type == "gpt_neo":  # attention_layers is made from this pattern when the config is loaded
        config.attention_types = [[list(config.attention_layers), 1]]


def _cut_stages(config: Any, stack: _Stack, layers: int) -> None:
    """A config that can serve as backbone names each layer as a stage; by default it gives the last."""
    if list(config.out_indices) != [stack.count]:
        raise ValueError(f"out_features={config.out_features} of a backbone name layers that may not be kept")
    config.stage_names = list(config.stage_names)[: layers + 1]
    config.set_output_features_output_indices(None, None)


def _cut_setting(name: str, value: Sequence[Any], count: int, kept: Sequence[int]) -> Sequence[Any]:
    """A list of layer numbers is re-numbered, a list with one item a layer keeps the items of its layers."""
    cut: list[Any]
    if _INDEX_LIST.search(name) and _are_layer_numbers(value, count):
        cut = [kept.index(i) for i in value if i in kept]
    elif len(value) == count:
        cut = [value[i] for i in kept]
    else:
        cut = list(value)
    return cut if isinstance(value, list) else tuple(cut)


def _are_layer_numbers(value: Sequence[Any], count: int) -> bool:
    numbers = bool(value) and all(type(i) is int and 0 <= i < count for i in value)
    return numbers and all(a < b for a, b in zip(value, value[1:], strict=False))


def _teacher_name(name: str, cuts: _Cuts) -> str:
    """The teacher's name of a student's weight or module: the same, at the layer it is taken from."""
    for path, kept in cuts.items():
        if name.startswith(f"{path}."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            return f"{path}.{kept[int(index)]}.{rest}".rstrip(".")
    return name


def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, cuts: _Cuts) -> None:
    """Clone every weight and buffer into the student, keeping its own ties."""
    source = teacher.state_dict()
    for name, tensor in student.state_dict(keep_vars=True).items():
        origin = source.get(_teacher_name(name, cuts))
        if origin is None or origin.shape != tensor.shape:
            found = "has no such weight" if origin is None else f"has shape {tuple(origin.shape)}"
            raise ValueError(f"{name} of the student is {tuple(tensor.shape)}, the teacher's layer {found}")
        tensor.data = origin.detach().clone()
    _move_buffers(student, next(iter(source.values())).device)


def _move_buffers(student: PreTrainedModel, device: torch.device) -> None:
    """Buffers that a checkpoint does not hold (rotary frequencies) follow the weights, in their own dtype."""
    for buffer in student.buffers():
        buffer.data = buffer.data.to(device)


def _compare_layers(teacher: PreTrainedModel, student: PreTrainedModel, cuts: _Cuts) -> None:
    """Refuse a layer that computes something else at its new place (window, rotary, experts ...)."""
    modules = dict(teacher.named_modules())
    for name, module in _outer_lists(teacher).items():
        if name not in cuts and len(module) != len(student.get_submodule(name)):  # type: ignore[arg-type]
            raise ValueError(f"{name} would be cut too, by the same option")
    for name, module in student.named_modules():
        if not any(name.startswith(f"{path}.") for path in cuts):
            continue
        origin = modules[_teacher_name(name, cuts)]
        for key, value in _settings(module).items():
            before = _settings(origin).get(key)
            if value != before:
                raise ValueError(f"{key} of {name} is {value!r} and was {before!r} in the teacher's layer")


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
    }
    kept = {key: value for key, value in plain.items() if not _PLACE.search(key) and key != "training"}
    return {"class": type(module).__name__, **kept}
