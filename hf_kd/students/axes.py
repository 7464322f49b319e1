"""What each axis of each weight counts, found by building the model anew with one size doubled.

No architecture is known by name: an axis that doubles with the feed-forward size is one of feed-forward
channels, whatever the weight is called. Models are built without memory for their weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .depth import config_tree, sub_config
from .weights import empty_model

#: Options of configs, by what they count; the first that a config has is its name for messages.
FIELDS = {
    "hidden": ("hidden_size", "d_model", "n_embd", "dim"),
    "heads": ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads"),
    "kv": ("num_key_value_heads", "num_kv_heads"),
    "ffn": (
        "intermediate_size",
        "d_ff",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "ffn_dim",
        "n_inner",
        "hidden_dim",
    ),
    "vocab": ("vocab_size",),
}
_HEAD_DIM = ("head_dim", "d_kv")
# The layers that make queries, keys and values, where their width is the hidden size and tells nothing.
_QKV = re.compile(r"(^|_)(q|k|v|query|key|value|wqkv|qkv)(_proj|_lin|_attn)?$|^c_attn$")


@dataclass(frozen=True)
class Tower:
    """A config with a residual stream of its own: its path in the tree of configs, and its sizes."""

    path: str
    fields: Mapping[str, tuple[str, ...]]
    hidden: int
    heads: int
    head_dim: int
    #: Whether the heads' width is an option of its own and not hidden size / heads.
    free_heads: bool

    def option(self, kind: str, index: int = 0) -> str:
        """What messages and mappings call the size of a kind."""
        return f"{self.path}.{self.fields[kind][index]}".lstrip(".")


@dataclass(frozen=True)
class Axis:
    """What one axis of a weight counts.

    Attributes:
        tower: Path of the config that says how many.
        kind: "hidden", "heads", "kv", "ffn" or "vocab".
        unit: Entries of one item: a head has `head_dim` of them.
        blocks: How often all items come, one run after another: 3 in a fused query-key-value layer, unless
            that has all three of each head together. 0: the axis is no multiple of them and cannot be cut.
        reads: Whether the weight multiplies these entries (an input), or makes them.
    """

    tower: str
    kind: str
    unit: int
    blocks: int
    reads: bool
    #: Whether queries, keys and values (or two of them) are in one weight.
    fused: bool = False


#: Of each weight, its axes that follow a size of the config.
Axes = dict[str, dict[int, Axis]]


def find_towers(config: PreTrainedConfig) -> list[Tower]:
    """All configs in a tree that have a hidden size and attention heads."""
    towers = []
    for path, part in config_tree(config):
        fields = {kind: _own_fields(part, names) for kind, names in FIELDS.items()}
        # Some configs (Whisper) call their heads key-value heads too.
        fields["kv"] = tuple(name for name in fields["kv"] if name not in fields["heads"])
        if not fields["hidden"] or not fields["heads"] or hasattr(part, "depths"):
            continue
        hidden, heads = getattr(part, fields["hidden"][0]), getattr(part, fields["heads"][0])
        # Where it is computed from the others (Falcon) it is no option.
        own = vars(part)
        given = next((own[name] for name in _HEAD_DIM if own.get(name) is not None), None)
        towers.append(Tower(path, fields, hidden, heads, given or hidden // heads, given is not None))
    return towers


def _own_fields(config: PreTrainedConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    alias = config.attribute_map
    canonical = dict.fromkeys(alias.get(name, name) for name in names)
    return tuple(name for name in canonical if type(getattr(config, name, None)) is int)


def make_explicit(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config in which sizes that follow from the hidden size are options where they can be."""
    config = copy.deepcopy(config)
    for tower in find_towers(config):
        part: Any = sub_config(config, tower.path)
        if getattr(part, "n_inner", 0) is None:
            part.n_inner = 4 * tower.hidden
        computed = isinstance(getattr(type(part), "head_dim", None), property)
        if tower.free_heads or computed or tower.hidden % tower.heads:
            continue
        wide = copy.deepcopy(config)
        _double(wide, tower, "hidden")
        before = _weight_shapes(empty_model(kind, wide))
        explicit: Any = sub_config(wide, tower.path)
        explicit.head_dim = tower.head_dim
        if _weight_shapes(empty_model(kind, wide)) != before:
            part.head_dim = tower.head_dim
    return config


def _weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def changed_kinds(before: PreTrainedConfig, after: PreTrainedConfig) -> set[tuple[str, str]]:
    """Paths of towers and kinds of sizes in which two configs differ."""
    return {
        (tower.path, kind)
        for tower in find_towers(before)
        for kind, fields in tower.fields.items()
        for name in fields
        if getattr(sub_config(before, tower.path), name) != getattr(sub_config(after, tower.path), name)
    }


def find_axes(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    wanted: set[tuple[str, str]],
    *,
    interleaved: bool = False,
) -> tuple[PreTrainedModel, Axes]:
    """What every axis of every weight counts.

    Args:
        kind: The model's class.
        config: Its config, from `make_explicit`.
        wanted: Paths of towers and kinds of axes to find.
        interleaved: Whether weights that hold queries, keys and values have those of each head together, and
            not all queries first; see `hf_kd.students.symmetry`.

    Returns:
        An empty model of that config, and the axes of its weights and buffers.
    """
    model = empty_model(kind, config)
    base = _shapes(model)
    owners = dict(model.named_modules())
    axes: Axes = {}
    for tower in find_towers(config):
        for what in tower.fields:
            if (tower.path, what) not in wanted or (what == "heads" and not tower.free_heads):
                continue  # heads that fill the hidden size change nothing by themselves
            wide = copy.deepcopy(config)
            _double(wide, tower, what)
            for name, shape in _shapes(empty_model(kind, wide)).items():
                for i, (old, new) in enumerate(zip(base.get(name, ()), shape, strict=False)):
                    if old != new:
                        taken = i in axes.get(name, {})
                        axis = _axis(owners, name, i, tower, what, (old, new), config, interleaved)
                        axes.setdefault(name, {})[i] = _unclear(axis) if taken else axis
        if not tower.free_heads:
            _split_attention(model, axes, tower, interleaved)
    return model, axes


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _double(config: PreTrainedConfig, tower: Tower, kind: str) -> None:
    part = sub_config(config, tower.path)
    for name in tower.fields[kind]:
        setattr(part, name, 2 * getattr(part, name))
    if kind == "hidden":
        for name in hidden_aliases(part, tower):
            setattr(part, name, 2 * tower.hidden)


def hidden_aliases(config: PreTrainedConfig, tower: Tower) -> list[str]:
    """Other options that repeat the hidden size, such as `pooler_hidden_size`."""
    own = tower.fields["hidden"][0]
    return [
        n for n, v in vars(config).items() if n.endswith("_hidden_size") and v == tower.hidden and n != own
    ]


def _axis(
    owners: Mapping[str, nn.Module],
    name: str,
    index: int,
    tower: Tower,
    kind: str,
    sizes: tuple[int, int],
    config: PreTrainedConfig,
    interleaved: bool,
) -> Axis:
    path, _, leaf = name.rpartition(".")
    owner = owners[path]
    part = sub_config(config, tower.path)
    counts = {getattr(part, field) for field in tower.fields[kind]}
    unit = tower.head_dim if kind in ("heads", "kv") and sizes[0] not in counts else 1
    whole = [n for n in counts if sizes[0] % (n * unit) == 0]
    blocks = sizes[0] // (max(whole) * unit) if whole and sizes[1] == 2 * sizes[0] else 0
    axis = Axis(tower.path, kind, unit, blocks, _reads(owner, leaf, index))
    return _in_heads(axis, unit, interleaved) if kind in ("heads", "kv") else axis


def _in_heads(axis: Axis, unit: int, interleaved: bool) -> Axis:
    """An axis of whole heads, of which up to three (query, key, value) may be in one weight."""
    fused = axis.blocks in (2, 3)
    blocks = axis.blocks if axis.blocks == 1 or fused else 0
    if fused and interleaved:
        unit, blocks = unit * blocks, 1
    kind = axis.kind if axis.kind == "kv" else "heads"
    return Axis(axis.tower, kind, unit, blocks, axis.reads, fused)


def _unclear(axis: Axis) -> Axis:
    return Axis(axis.tower, axis.kind, axis.unit, 0, axis.reads)


def _reads(owner: nn.Module, leaf: str, index: int) -> bool:
    if leaf != "weight":
        return False
    if isinstance(owner, Conv1D):
        return index == 0
    return isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and index == 1


def _split_attention(model: nn.Module, axes: Axes, tower: Tower, interleaved: bool) -> None:
    """Tell heads from hidden channels where the former fill exactly the latter.

    What queries, keys and values are made in is known by name; what reads the heads again is the layer that
    follows them.
    """
    open_ = False
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        own = axes.get(f"{path}.weight", {})
        if not any(axis.kind == "hidden" and axis.tower == tower.path for axis in own.values()):
            continue
        last = path.rpartition(".")[2].lower()
        if _QKV.search(last):
            for name in (f"{path}.weight", f"{path}.bias"):
                _rename(axes.get(name, {}), tower, reads=False, interleaved=interleaved)
            open_ = True
        elif open_:
            _rename(own, tower, reads=True, interleaved=False)
            open_ = False


def _rename(own: dict[int, Axis], tower: Tower, *, reads: bool, interleaved: bool) -> None:
    for i, axis in own.items():
        if axis.kind == "hidden" and axis.reads == reads:
            own[i] = _in_heads(axis, tower.head_dim, interleaved)
