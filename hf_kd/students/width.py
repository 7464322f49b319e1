"""A narrower model: which heads, feed-forward and hidden channels stay, the same ones wherever they meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .axes import Axes, Axis, Tower, find_towers, hidden_aliases
from .depth import sub_config
from .sizes import Size, resolve_size

#: Options of `init_student`, by the kind of channel.
OPTIONS = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv": "num_key_value_heads",
    "ffn": "intermediate_size",
}
#: A size for every tower of a model, or by config option.
Sizes = Mapping[str, Size | Mapping[str, Size] | None]


#: Indices that stay, by weight and axis.
Kept = dict[str, dict[int, Tensor]]
_Sizes = Mapping[str, tuple[int, ...]]
_LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class _Member:
    """One axis of one weight that is cut."""

    name: str
    index: int
    axis: Axis

    @property
    def owner(self) -> str:
        """Path of the module that has the weight."""
        return self.name.rpartition(".")[0]

    @property
    def is_per_head(self) -> bool:
        """Whether it has one number per head."""
        return self.axis.kind == "heads" and self.axis.unit == 1

    def sizes(self, before: _Sizes, after: _Sizes) -> tuple[int, int]:
        """How many items it has, and is to have."""
        entries = self.axis.blocks * self.axis.unit
        return before[self.name][self.index] // entries, after[self.name][self.index] // entries


@dataclass
class _Group:
    """Axes of the same channels: where they are made and where they are read."""

    members: list[_Member] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


def cut_widths(config: PreTrainedConfig, sizes: Sizes) -> None:
    """Set the sizes of a config, from `make_explicit`, in place.

    Raises:
        ValueError: If a size is unknown to the model, larger than the teacher's, or does not go with others.
    """
    towers = find_towers(config)
    for kind, value in sizes.items():
        known = {tower.option(kind, i) for tower in towers for i in range(len(tower.fields[kind]))}
        unknown = set(value) - known if isinstance(value, Mapping) else set()
        if value is not None and (unknown or not known):
            given = f" names {sorted(unknown)}" if unknown else f"={value}"
            raise ValueError(
                f"{OPTIONS[kind]}{given}, but {type(config).__name__} has {sorted(known) or 'no such size'}"
            )
    for tower in towers:
        part = sub_config(config, tower.path)
        wanted = {
            (kind, i): _wanted(tower, part, kind, i, sizes.get(kind))
            for kind in OPTIONS
            for i in range(len(tower.fields[kind]))
        }
        _cut_tower(part, tower, wanted)


def _wanted(tower: Tower, part: Any, kind: str, index: int, value: Any) -> int | None:
    name = tower.option(kind, index)
    value = value.get(name) if isinstance(value, Mapping) else value
    if value is None:
        return None
    full = getattr(part, tower.fields[kind][index])
    multiple = tower.head_dim if kind == "hidden" and not tower.free_heads else 1
    size = resolve_size(OPTIONS[kind], value, full, multiple=multiple)
    if size > full:
        raise ValueError(
            f"{OPTIONS[kind]}={value} does not fit the teacher's {name}={full}, which is the most"
        )
    return size


def _cut_tower(part: Any, tower: Tower, wanted: Mapping[tuple[str, int], int | None]) -> None:
    sizes = {key: value for key, value in wanted.items() if value is not None}
    hidden = sizes.get(("hidden", 0), tower.hidden)
    if not tower.free_heads:
        heads, rest = divmod(hidden, tower.head_dim)
        if rest:
            raise ValueError(
                f"hidden_size={hidden} is no multiple of {tower.head_dim}, the width of a head, which "
                f"{type(part).__name__} can't set apart: set "
                f"hidden_size={max(heads, 1) * tower.head_dim} or {(heads + 1) * tower.head_dim}"
            )
        for i in range(len(tower.fields["heads"])):
            if sizes.setdefault(("heads", i), heads) != heads:
                raise ValueError(
                    f"num_attention_heads={sizes['heads', i]} and hidden_size={hidden}: in "
                    f"{type(part).__name__} heads of {tower.head_dim} channels fill the hidden size: set "
                    f"hidden_size={sizes['heads', i] * tower.head_dim} or leave one out"
                )
    elif ("heads", 0) not in sizes and tower.heads * tower.head_dim == tower.hidden:
        heads, rest = divmod(
            hidden, tower.head_dim
        )  # heads that filled the hidden size still do, if they can
        if not rest and all(getattr(part, name) * heads % tower.heads == 0 for name in tower.fields["kv"]):
            sizes["heads", 0] = heads
    for name in hidden_aliases(part, tower):
        setattr(part, name, hidden)
    _fit_key_values(part, tower, sizes)
    for (kind, i), size in sizes.items():
        setattr(part, tower.fields[kind][i], size)


def _fit_key_values(part: Any, tower: Tower, sizes: dict[tuple[str, int], int]) -> None:
    if not tower.fields["kv"]:
        return
    heads, before = sizes.get(("heads", 0), tower.heads), getattr(part, tower.fields["kv"][0])
    if ("kv", 0) not in sizes:
        share, rest = divmod(before * heads, tower.heads)
        sizes["kv", 0] = share if not rest and share else before
    kept = sizes["kv", 0]
    if heads % kept or heads // kept > tower.heads // before:
        raise ValueError(
            f"num_attention_heads={heads} and num_key_value_heads={kept}: each key-value head needs the same "
            f"number of query heads, at most the teacher's {tower.heads // before}: set num_attention_heads "
            f"to a multiple of {kept} up to {kept * (tower.heads // before)}"
        )


def select(
    full: PreTrainedModel,
    narrow: PreTrainedModel,
    axes: Axes,
    measure: Callable[[list[str]], dict[str, Tensor]],
    tokens: Tensor | None = None,
) -> Kept:
    """Which entries of each axis of each weight stay.

    Args:
        full: An empty model of the teacher's widths.
        narrow: An empty model of the widths wanted.
        axes: From `find_axes`, for `full`.
        measure: Importance of the input channels of the named layers; see `reader_importance`. Where it
            gives none, the first channels stay.
        tokens: Ids that stay, where the vocabulary is cut.

    Returns:
        Indices by weight and axis, for the axes that become shorter.

    Raises:
        ValueError: If a weight would be cut in a way that is not understood.
    """
    before, after = _shapes(full), _shapes(narrow)
    members = _shorter(full, before, after, axes)
    groups = _groups(full, members)
    hidden = [m for m in members if m.axis.kind == "hidden"]
    readers = {m.owner for m in members if m.axis.reads}
    scores = measure(sorted(name for name in readers if isinstance(full.get_submodule(name), _LINEAR)))
    kept: Kept = {}
    for tower in {m.axis.tower for m in hidden}:
        own = [m for m in hidden if m.axis.tower == tower]
        size, wanted = own[0].sizes(before, after)
        found = [scores[m.owner] for m in own if m.axis.reads and m.owner in scores]
        # Each layer that reads the stream has one vote.
        total = sum((s / s.sum().clamp_min(1e-30) for s in found), torch.zeros(size))
        _put(kept, own, {"hidden": _top(total if found else None, size, wanted)}, before)
    if tokens is not None:
        _put(kept, [m for m in members if m.axis.kind == "vocab"], {"vocab": tokens}, before)
    for group in _joined(groups, members):
        found = [scores[r] for r in group.readers if r in scores]
        heads = {m.axis.kind: m.sizes(before, after)[0] for m in group.members}
        chosen = _chosen(group.members, before, after, found, _key_value_heads(full, group, heads))
        _put(kept, group.members, chosen, before)
    return kept


def reordered(full: PreTrainedModel, axes: Axes) -> Kept:
    """All entries of each axis of each weight in another, random order: that of whole heads and channels.

    Args:
        full: An empty model.
        axes: From `find_axes`, for `full`.

    Raises:
        ValueError: If an axis is not understood.
    """
    before, persistent = _shapes(full), set(full.state_dict())
    members = [
        _Member(name, i, axis)
        for name, own in axes.items()
        for i, axis in own.items()
        if name in persistent and axis.kind != "vocab"
    ]
    for member in members:
        if not member.axis.blocks:
            raise ValueError(f"axis {member.index} of {member.name} is not understood")
    g = torch.Generator().manual_seed(1)
    kept: Kept = {}
    hidden = [m for m in members if m.axis.kind == "hidden"]
    for tower in {m.axis.tower for m in hidden}:
        own = [m for m in hidden if m.axis.tower == tower]
        size, _ = own[0].sizes(before, before)
        _put(kept, own, {"hidden": torch.randperm(size, generator=g)}, before)
    for group in _joined(_groups(full, members), members):
        sizes = {m.axis.kind: m.sizes(before, before)[0] for m in group.members}
        chosen = {kind: torch.randperm(size, generator=g) for kind, size in sizes.items()}
        if "heads" in sizes:  # query heads move with their key-value heads
            sets = _key_value_heads(full, group, sizes)
            order = chosen.get("kv", torch.arange(sets))
            size = sizes["heads"] // sets
            chosen["heads"] = torch.cat([k * size + torch.randperm(size, generator=g) for k in order])
        _put(kept, group.members, chosen, before)
    return kept


def _shorter(full: nn.Module, before: _Sizes, after: _Sizes, axes: Axes) -> list[_Member]:
    """All axes that are cut, in the order of the modules."""
    found = []
    persistent = set(full.state_dict())
    for name, shape in before.items():
        for i, (old, new) in enumerate(zip(shape, after[name], strict=True)):
            axis = axes.get(name, {}).get(i)
            if old == new:
                continue
            if name not in persistent:
                raise ValueError(f"{name} is computed from a size that changes, from {old} to {new}")
            if axis is None or not axis.blocks:
                raise ValueError(
                    f"axis {i} of {name}, {old} entries, is not understood and can't become {new}"
                )
            found.append(_Member(name, i, axis))
    return found


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _groups(full: nn.Module, members: Sequence[_Member]) -> list[_Group]:
    """Heads and feed-forward channels, each with the layer that reads them.

    What is made and then read in the order of the modules belongs together: queries, keys and values and
    the layer after attention, or the two or three layers of a feed-forward block.
    """
    order = {path: i for i, (path, _) in enumerate(full.named_modules())}
    groups: list[_Group] = []
    open_: dict[tuple[str, str], _Group] = {}
    for member in sorted(members, key=lambda m: order[m.owner]):
        kind = "heads" if member.axis.kind == "kv" else member.axis.kind
        if kind not in ("heads", "ffn") or member.is_per_head:
            continue
        group = open_.setdefault((member.axis.tower, kind), _Group())
        group.members.append(member)
        if member.axis.reads:
            group.readers.append(member.owner)
            groups.append(open_.pop((member.axis.tower, kind)))
    for group in open_.values():
        raise ValueError(f"{group.members[0].name} makes channels that no layer after it is seen to read")
    return groups


def _joined(groups: list[_Group], members: Sequence[_Member]) -> list[_Group]:
    """A tower's groups as one, where layers share a weight with a number per head (T5's position bias)."""
    for tower in {m.axis.tower for m in members if m.is_per_head}:
        loose = [m for m in members if m.is_per_head and m.axis.tower == tower]
        own = [g for g in groups if any(m.axis.kind == "heads" and m.axis.tower == tower for m in g.members)]
        joined = _Group(loose)
        for group in own:
            joined.members += group.members
            joined.readers += group.readers
        groups = [group for group in groups if group not in own] + [joined]
    return groups


def _chosen(
    members: Sequence[_Member], before: _Sizes, after: _Sizes, scores: Sequence[Tensor], kv: int
) -> dict[str, Tensor]:
    """The channels, or the heads and key-value heads, that stay in one group."""
    total = sum(scores[1:], scores[0]) if scores else None
    sizes = {m.axis.kind: m.sizes(before, after) for m in members}
    if "ffn" in sizes:
        return {"ffn": _top(total, *sizes["ffn"])}
    if "heads" not in sizes:
        raise ValueError(f"{members[0].name} loses key-value heads but no query heads")
    heads, kept_heads = sizes["heads"]
    each = total.reshape(heads, -1).sum(1) if total is not None else None
    keys = _top(None if each is None else each.reshape(kv, -1).sum(1), *sizes.get("kv", (kv, kv)))
    size, kept_size = heads // kv, kept_heads // len(keys)
    queries = [
        int(key) * size + _top(None if each is None else each.reshape(kv, -1)[key].cpu(), size, kept_size)
        for key in keys
    ]
    return {"kv": keys, "heads": torch.cat(queries)}


def _key_value_heads(full: PreTrainedModel, group: _Group, sizes: Mapping[str, int]) -> int:
    """How many sets of heads have keys of their own; all heads are one set where each has."""
    if "kv" not in sizes and "heads" not in sizes:
        return 1
    axis = group.members[0].axis
    tower = next(t for t in find_towers(full.config) if t.path == axis.tower)
    fields = tower.fields["kv"]
    count = getattr(sub_config(full.config, tower.path), fields[0]) if fields else 1
    return 1 if "kv" not in sizes and count == sizes["heads"] else count


def _top(scores: Tensor | None, size: int, wanted: int) -> Tensor:
    """Indices of the `wanted` best, ascending; the first ones without scores."""
    if scores is None:
        return torch.arange(wanted)
    assert len(scores) == size
    return scores.cpu().topk(wanted).indices.sort().values


def _put(kept: Kept, members: Sequence[_Member], chosen: Mapping[str, Tensor], before: _Sizes) -> None:
    for member in members:
        axis, items = member.axis, chosen[member.axis.kind]
        block = before[member.name][member.index] // axis.blocks
        inside = (items[:, None] * axis.unit + torch.arange(axis.unit)).flatten()
        entries = (torch.arange(axis.blocks)[:, None] * block + inside).flatten()
        kept.setdefault(member.name, {})[member.index] = entries


def slicer(kept: Kept) -> Callable[[str, Tensor], Tensor]:
    """What of a weight stays, as a new tensor."""

    def keep(name: str, tensor: Tensor) -> Tensor:
        own = kept.get(name)
        if not own:
            return tensor.clone()
        for index, entries in own.items():
            tensor = tensor.index_select(index, entries.to(tensor.device))
        return tensor

    return keep


def describe(before: PreTrainedConfig, after: PreTrainedConfig) -> list[str]:
    """The sizes that differ, in words."""
    lines = []
    for tower in find_towers(after):
        old, new = sub_config(before, tower.path), sub_config(after, tower.path)
        for kind, fields in tower.fields.items():
            for i, name in enumerate(fields):
                values = getattr(old, name, None), getattr(new, name)
                if None not in values and values[0] != values[1]:
                    lines.append(f"{tower.option(kind, i)}: {values[1]} of {values[0]}")
    return lines
