"""Which stacks of layers a model has, which layers a student keeps, and the config that says so."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .sizes import Size, resolve_size

#: Gives the layers to keep of a stack: its path and how many.
Ranking = Callable[[str, int], list[int]]

# Names under which configs keep a layer count, per side of an encoder-decoder model.
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
_SIDES = {
    "encoder": ("encoder_layers", "num_encoder_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
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


@dataclass(frozen=True)
class Stack:
    """A module list that is the model's layers: its module path, config, count option(s) and length."""

    module: str
    config_path: str
    fields: tuple[str, ...]
    count: int
    #: The stage of a pyramid that these layers are, an entry of the config's `depths`.
    stage: int | None = None

    @property
    def option(self) -> str:
        """What messages, mappings and the student's config call it."""
        place = "" if self.stage is None else f".{self.stage}"
        return f"{self.config_path}.{self.fields[0]}{place}".lstrip(".")


def find_stacks(model: PreTrainedModel, *, least: int = 2) -> list[Stack]:
    """Outermost module lists of `least` or more whose length is the layer count of their part's config."""
    found: dict[str, tuple[int, Stack]] = {}
    owners: list[tuple[str, PreTrainedConfig]] = []
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            owners.append((path, config))
    for path, module in outer_lists(model, least).items():
        owner = max((item for item in owners if _is_inside(path, item[0])), key=lambda item: len(item[0]))[1]
        config_path = _config_path(model.config, owner)
        if config_path is None:
            continue
        if hasattr(owner, "depths"):  # stages of a pyramid are not layers, but have some
            found |= {stack.option: (0, stack) for stack in _stages(path, module, owner.depths, config_path)}
            continue
        fields = _count_fields(sub_config(model.config, config_path), path, len(module))
        if not fields:
            continue
        stack = Stack(path, config_path, fields, len(module))
        size = sum(p.numel() for p in module.parameters())
        # A list of another kind may happen to be as long: the layers are where the weights are.
        if size > found.get(stack.option, (0, stack))[0]:
            found[stack.option] = (size, stack)
    return [stack for _, stack in found.values()]


def _stages(path: str, stages: nn.ModuleList, depths: Sequence[int], config_path: str) -> Iterator[Stack]:
    """The blocks of each stage of a pyramid (Swin); blocks of one stage have one width."""
    if len(stages) != len(depths) or max(depths) < 2:
        return
    for stage, module in enumerate(stages):
        for name, blocks in module.named_children():
            if isinstance(blocks, nn.ModuleList) and len(blocks) == depths[stage]:
                yield Stack(f"{path}.{stage}.{name}", config_path, ("depths",), len(blocks), stage)


def outer_lists(model: nn.Module, least: int = 2) -> dict[str, nn.ModuleList]:
    """Module lists of `least` or more that are in no other such list, by path."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) >= least and not nested:
            lists[path] = module
    return lists


def _is_inside(path: str, prefix: str) -> bool:
    return not prefix or path.startswith(f"{prefix}.")


def _config_path(root: PreTrainedConfig, wanted: PreTrainedConfig) -> str | None:
    """Where in the tree of configs `wanted` is; some stacks (T5) hold a copy, found by its class."""
    tree = dict(config_tree(root))
    same = [path for path, config in tree.items() if config is wanted]
    alike = [path for path, config in tree.items() if type(config) is type(wanted)]
    return next(iter(same or alike), None)


def config_tree(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """A config and all configs in it, each with its path of attributes."""
    yield path, config
    for name, child in vars(config).items():
        if isinstance(child, PreTrainedConfig):
            yield from config_tree(child, f"{path}.{name}".lstrip("."))


def sub_config(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    """The config at a path of `config_tree`."""
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


def choose_layers(
    stacks: Sequence[Stack],
    num_layers: Size | Mapping[str, Size] | None,
    layers: str | Sequence[int] | Mapping[str, Sequence[int]],
    rankings: Mapping[str, Ranking],
) -> dict[str, list[int]]:
    """For each stack (by module path) the teacher layers that the student keeps.

    Args:
        stacks: The teacher's.
        num_layers: How many; None: all of them.
        layers: A key of `rankings`, or the layers themselves.
        rankings: Ways to choose, by name.
    """
    options = {stack.option: stack for stack in stacks}
    for name, value in (("num_layers", num_layers), ("layers", layers)):
        unknown = set(value) - set(options) if isinstance(value, Mapping) else set()
        if unknown:
            raise ValueError(
                f"{name} names {sorted(unknown)}, but the teacher's stacks are {sorted(options)}"
            )
    if isinstance(layers, str) and layers not in rankings:
        known = ", ".join(repr(name) for name in rankings)
        raise ValueError(
            f"layers={layers!r} is not known: use one of {known}, or a list of layers such as [0, 5, 11]"
        )
    chosen = {}
    for option, stack in options.items():
        wanted = layers.get(option, "even") if isinstance(layers, Mapping) else layers
        size = num_layers.get(option, stack.count) if isinstance(num_layers, Mapping) else num_layers
        count = None if size is None else resolve_size("num_layers", size, stack.count)
        if count is not None and stack.stage is not None and not isinstance(num_layers, Mapping):
            count = min(count, stack.count)  # one number is for every stage, and some have fewer
        if isinstance(wanted, str):
            chosen[stack.module] = rankings[wanted](stack.module, stack.count if count is None else count)
        else:
            chosen[stack.module] = _checked(list(wanted), stack, count)
    return chosen


def even(stacks: Sequence[Stack]) -> Ranking:
    """Evenly spaced layers; see `layer_map`."""
    counts = {stack.module: stack.count for stack in stacks}
    return lambda path, count: layer_map(counts[path], count)


def ends(stacks: Sequence[Stack], *, last: bool) -> Ranking:
    """The first or the last layers."""
    counts = {stack.module: stack.count for stack in stacks}

    def pick(path: str, count: int) -> list[int]:
        layer_map(counts[path], count)  # refuses a count that does not fit
        return list(range(counts[path] - count, counts[path]) if last else range(count))

    return pick


def _checked(wanted: list[int], stack: Stack, count: int | None) -> list[int]:
    ascending = all(a < b for a, b in zip(wanted, wanted[1:], strict=False))
    if not wanted or not ascending or wanted[0] < 0 or wanted[-1] >= stack.count:
        raise ValueError(
            f"layers={wanted} does not fit {stack.option}={stack.count}: list layers from 0 to "
            f"{stack.count - 1} in ascending order, each once"
        )
    if count not in (None, len(wanted)):
        raise ValueError(f"num_layers={count} but layers={wanted} are {len(wanted)}: set one of the two")
    return wanted


def cut_config(config: PreTrainedConfig, stack: Stack, kept: Sequence[int]) -> None:
    """Set the layer count, and cut every per-layer setting to the layers that are kept."""
    if stack.stage is not None:
        depths: Any = list(config.depths)
        depths[stack.stage] = len(kept)
        config.depths = type(config.depths)(depths)
        return
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


def _cut_stages(config: Any, stack: Stack, layers: int) -> None:
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
