"""Whether the axes of a model are understood: its heads and channels, put in another order, change nothing.

A model does not care which of its heads is the first one, nor which hidden channel, as long as all weights
agree. So a small copy with random weights is put in another order by the code that also cuts; where its
answer changes, that code takes some weight for what it isn't (queries, keys and values in one weight come in
several orders), or heads differ by their place (ALiBi), and a cut would go wrong in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from . import depth, width
from .axes import find_axes, find_towers
from .depth import Stack
from .inputs import example_inputs

_LAYERS, _HEADS, _HIDDEN, _CHANNELS, _TOKENS = 2, 3, 32, 24, 96
# Of the largest output: far above what another order of sums does, far below what one of heads does.
_TOLERANCE = 1e-3


def find_layout(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    stacks: Sequence[Stack],
    wanted: set[tuple[str, str]],
) -> bool:
    """Whether weights that hold queries, keys and values do so head by head (True) or one after another.

    Args:
        kind: The model's class.
        config: Its config, from `make_explicit`.
        stacks: Its stacks of layers.
        wanted: Paths of towers and kinds of axes that are to be cut, from `changed_kinds`.

    Raises:
        ValueError: If neither order leaves the model's answer as it is, or that can't be found out for a
            model that has such weights.
    """
    if not any(what in ("hidden", "heads", "kv", "ffn") for _, what in wanted):
        return False
    try:
        tiny = _tiny(config, stacks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind(tiny).eval()
            for parameter in model.parameters():  # fresh norms and biases are alike: every one another
                parameter.data.add_(0.3 * torch.randn_like(parameter))
            batch = example_inputs(model, rows=2, tokens=12, samples=800)
            before = _answer(model, batch)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        _, axes = find_axes(kind, config, wanted)
        fused = sorted(name for name, own in axes.items() if any(axis.fused for axis in own.values()))
        if fused:
            raise ValueError(
                f"{fused[0]} holds queries, keys and values in one weight, and their order can't be found "
                f"out on a small copy of the model: {error}"
            ) from error
        return False
    for interleaved in (False, True):
        empty, axes = find_axes(kind, tiny, wanted, interleaved=interleaved)
        keep = width.slicer(width.reordered(empty, axes))
        other, seen = copy.deepcopy(model), set()
        for name, tensor in other.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:  # tied weights once
                seen.add(id(tensor))
                tensor.data = keep(name, tensor.data)
        if _same(before, _answer(other, batch)):
            return interleaved
        if not any(axis.fused for own in axes.values() for axis in own.values()):
            break
    raise ValueError(
        "another order of its heads and channels changes what the model computes, so a weight is not "
        "understood (queries, keys and values in one weight in an order of its own), or heads differ by "
        "their place (ALiBi)"
    )


def _tiny(config: PreTrainedConfig, stacks: Sequence[Stack]) -> PreTrainedConfig:
    """The config of a small model of the same kind."""
    tiny = copy.deepcopy(config)
    for stack in stacks:
        part = depth.sub_config(tiny, stack.config_path)
        now = getattr(part, stack.fields[0])
        count = now if stack.stage is None else now[stack.stage]
        if count > _LAYERS:
            depth.cut_config(part, replace(stack, count=count), range(_LAYERS))
    sizes: dict[str, dict[str, int]] = {kind: {} for kind in width.OPTIONS}
    for tower in find_towers(tiny):
        part = depth.sub_config(tiny, tower.path)
        hidden = min(tower.hidden, _HIDDEN if tower.free_heads else _HEADS * tower.head_dim)
        sizes["hidden"][tower.option("hidden")] = hidden
        if tower.free_heads:
            groups = getattr(part, tower.fields["kv"][0]) if tower.fields["kv"] else tower.heads
            kept = min(groups, _HEADS)
            heads = kept * min(tower.heads // groups, 2)
            sizes["heads"] |= {tower.option("heads", i): heads for i in range(len(tower.fields["heads"]))}
            sizes["kv"] |= {tower.option("kv", i): kept for i in range(len(tower.fields["kv"]))}
        for i, name in enumerate(tower.fields["ffn"]):
            sizes["ffn"][tower.option("ffn", i)] = min(getattr(part, name), _CHANNELS)
    width.cut_widths(tiny, {kind: own or None for kind, own in sizes.items()})
    for _, part in depth.config_tree(tiny):
        if type(getattr(part, "vocab_size", None)) is int and part.vocab_size > _TOKENS:
            part.vocab_size = _TOKENS
            for name, value in list(vars(part).items()):
                if name.endswith("_token_id") and type(value) is int and value >= _TOKENS:
                    setattr(part, name, _TOKENS - 1)
                elif name.endswith("_token_id") and isinstance(value, list):
                    setattr(part, name, [min(i, _TOKENS - 1) for i in value])
    return tiny


@torch.no_grad()
def _answer(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The first thing that the model returns; where that is in hidden channels, whatever their order."""
    first: Any = model(**batch)[0]
    widths = {tower.hidden for tower in find_towers(model.config)}
    return first.sort(-1).values if first.shape[-1] in widths else first


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max().clamp_min(1e-6))
