"""The shapes that a search for a student looks at: what each has, weighs and takes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kd.measure import latency

from . import depth, vocabulary, width
from .axes import Tower, find_towers, make_explicit
from .depth import Ranking, Stack
from .plan import Plan
from .sizes import Size
from .weights import empty_model

#: Widths are tried in steps of this share of the teacher's; in twice that where each shape is timed.
_STEPS = 16
_REPEATS, _WARMUP = 11, 3


@dataclass(frozen=True)
class Candidate:
    """A shape that was looked at.

    Attributes:
        layers: Number of layers, by config option.
        widths: Sizes, by the option of `init_student` and then by config option.
        depth_share: Share of the teacher's layers, in the stack that keeps least.
        width_share: Share of the teacher's widths.
        parameters: Each counted once.
        bytes: Of its weights, as saved.
        latency_ms: Where it was timed.
        fits: Whether it meets the target.
    """

    layers: Mapping[str, int]
    widths: Mapping[str, Mapping[str, int]]
    depth_share: float
    width_share: float
    parameters: int
    bytes: int
    latency_ms: float | None = None
    fits: bool = True

    @property
    def least_share(self) -> float:
        """What the search makes as large as it can: the smaller of both shares."""
        return min(self.depth_share, self.width_share)

    def describe(self) -> str:
        """Its sizes in words."""
        sizes = [*self.layers.items(), *(item for own in self.widths.values() for item in own.items())]
        shape = ", ".join(f"{name}={value}" for name, value in sizes)
        timed = "" if self.latency_ms is None else f", {self.latency_ms:.3g} ms"
        return f"{shape}: {self.parameters:,} parameters, {self.bytes:,} bytes{timed}"


class Space:
    """All shapes that are looked at: depths by number of layers, widths by their share."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        stacks: Sequence[Stack],
        num_layers: Size | Mapping[str, Size] | None,
        layers: str | Sequence[int] | Mapping[str, Sequence[int]],
        rankings: Mapping[str, Ranking],
        widths: width.Sizes,
        vocab: Sequence[int] | None,
    ) -> None:
        self.teacher, self.stacks, self.layers, self.vocab = teacher, stacks, layers, vocab
        # Each ranking may be a measurement: once for each stack and number is enough.
        self.rankings = {name: functools.cache(ranking) for name, ranking in rankings.items()}
        self.config = make_explicit(type(teacher), teacher.config)
        self.given = {kind: size for kind, size in widths.items() if size is not None}
        self._sizes: dict[
            float, tuple[Mapping[str, Mapping[str, int]], list[dict[int, tuple[int, int]]]]
        ] = {}
        self._plans: dict[int, Plan | None] = {}
        most = max((stack.count for stack in stacks), default=1)
        fixed = num_layers is not None or not isinstance(layers, str)
        self.num_layers = num_layers
        self.depths = [most] if fixed or not stacks else list(range(1, most + 1))
        self._fixed = fixed
        self.uncut: list[str] = []
        self.kinds = self._cuttable()

    def _cuttable(self) -> tuple[str, ...]:
        """Kinds of sizes that may be searched: as many as the architecture lets go."""
        kinds = tuple(k for k in ("hidden", "heads", "ffn") if k not in self.given)
        if "heads" in kinds and "kv" in self.given:
            kinds = tuple(k for k in kinds if k != "heads")
        without = (("ffn",), ("hidden",), ("hidden", "heads"))
        attempts = [kinds, *(tuple(k for k in kinds if k not in gone) for gone in without)]
        for attempt in dict.fromkeys(attempts):
            if not attempt:
                continue
            try:
                sizes = self.sizes(0.5, attempt)
                if not any(sizes.values()):
                    continue
                plan = Plan(self.teacher, self.stacks, self._all(), may_move=False)
                plan.narrow({**sizes, **self.given}, self.vocab, [])
            except ValueError as error:
                self.uncut.append(f"{', '.join(width.OPTIONS[k] for k in attempt)} stay: {error}")
                continue
            return attempt
        return ()

    def _all(self) -> dict[str, list[int]]:
        return {stack.module: list(range(stack.count)) for stack in self.stacks}

    def shares(self, *, timed: bool) -> Iterator[float]:
        """Shares of the widths, the largest first."""
        steps = _STEPS // 2 if timed else _STEPS
        yield from (i / steps for i in range(steps, 0, -1)) if self.kinds else (1.0,)

    def sizes(self, share: float, kinds: Sequence[str] | None = None) -> dict[str, dict[str, int]]:
        """The sizes at a share of the teacher's, by kind and config option."""
        found: dict[str, dict[str, int]] = {}
        for tower in find_towers(self.config) if share < 1 else ():
            for kind, name, value in _sizes_of(tower, self.config, share):
                if kind in (self.kinds if kinds is None else (*kinds, *(["kv"] if "heads" in kinds else []))):
                    found.setdefault(kind, {})[name] = value
        return found

    def plan(self, layers: int) -> Plan | None:
        """The student of so many layers and all widths; None where layers can't be put so."""
        if layers not in self._plans:
            most = self.depths[-1]
            counts: Any = self.num_layers
            if not self._fixed:
                counts = {
                    s.option: min(s.count, max(1, (2 * layers * s.count + most) // (2 * most)))
                    for s in self.stacks
                }
            cuts = depth.choose_layers(self.stacks, counts, self.layers, self.rankings)
            try:
                plan = Plan(self.teacher, self.stacks, cuts, may_move=self.layers == "even")
            except ValueError:
                if self._fixed:
                    raise  # what was given does not fit
                plan = None
            self._plans[layers] = plan
        return self._plans[layers]

    def narrowed(self, share: float) -> dict[str, Any]:
        """All sizes that are asked for, given and searched."""
        return {**self.sizes(share), **self.given}

    def measure(self, layers: int, share: float) -> Candidate | None:
        """The size of one shape; None where there is no such model."""
        plan = self.plan(layers)
        if plan is None:
            return None
        if share not in self._sizes:
            try:
                config = self._narrow(copy.deepcopy(self.config), share)
                self._sizes[share] = self.sizes(share), self._by_layer(config)
            except ValueError:
                if share == 1.0:
                    raise  # what was given does not fit
                self._sizes[share] = {}, []
        widths, parts = self._sizes[share]
        if not parts:
            return None
        rest, *own = parts
        parameters, size = rest[-1]
        for stack, counts in zip(self.stacks, own, strict=True):
            for layer in plan.cuts[stack.module]:
                parameters, size = parameters + counts[layer][0], size + counts[layer][1]
        return Candidate(
            layers={s.option: len(plan.cuts[s.module]) for s in self.stacks},
            widths={width.OPTIONS[kind]: own for kind, own in widths.items()},
            depth_share=min((len(plan.cuts[s.module]) / s.count for s in self.stacks), default=1.0),
            width_share=self._share(widths),
            parameters=parameters,
            bytes=size,
        )

    def _share(self, widths: Mapping[str, Mapping[str, int]]) -> float:
        """The share of the teacher's that the most reduced size has."""
        found = [1.0]
        for own in widths.values():
            for option, size in own.items():
                path, _, name = option.rpartition(".")
                found.append(size / getattr(depth.sub_config(self.config, path), name))
        return min(found)

    def of_teacher(self) -> tuple[int, int]:
        """Parameters and bytes of the teacher."""
        parts = self._by_layer(self.teacher.config)
        return (
            sum(value[0] for part in parts for value in part.values()),
            sum(value[1] for part in parts for value in part.values()),
        )

    def _narrow(self, config: PreTrainedConfig, share: float) -> PreTrainedConfig:
        width.cut_widths(config, self.narrowed(share))
        if self.vocab is not None:
            vocabulary.cut_config(config, self.vocab)
        return config

    def _by_layer(self, config: PreTrainedConfig) -> list[dict[int, tuple[int, int]]]:
        """Parameters and bytes outside all layers (under -1), and for each stack of each layer."""
        model = empty_model(type(self.teacher), config)
        item = self.teacher.dtype.itemsize
        parameters = {id(p) for p in model.parameters()}
        found: list[dict[int, tuple[int, int]]] = [{-1: (0, 0)}, *({} for _ in self.stacks)]
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            place, layer = 0, -1
            for i, stack in enumerate(self.stacks):
                if name.startswith(f"{stack.module}."):
                    place, layer = i + 1, int(name[len(stack.module) + 1 :].partition(".")[0])
            own = tensor.numel() if id(tensor) in parameters else 0
            size = own * item if own else tensor.numel() * tensor.element_size()
            before = found[place].get(layer, (0, 0))
            found[place][layer] = before[0] + own, before[1] + size
        return found

    def build(self, candidate: Candidate) -> PreTrainedModel:
        """A model of this shape with random weights."""
        layers = next(d for d in self.depths if (c := self.measure(d, 1.0)) and c.layers == candidate.layers)
        plan = self.plan(layers)
        assert plan is not None
        config = copy.deepcopy(self.config)
        for stack in self.stacks:
            part = depth.sub_config(config, stack.config_path)
            depth.cut_config(part, stack, plan.cuts[stack.module])
        width.cut_widths(
            config,
            {**{kind: candidate.widths.get(width.OPTIONS[kind]) for kind in width.OPTIONS}, **self.given},
        )
        if self.vocab is not None:
            vocabulary.cut_config(config, self.vocab)
        with torch.random.fork_rng(devices=[]):
            model: Any = type(self.teacher)(config)
        return model.to(self.teacher.device, self.teacher.dtype).eval()


class Timer:
    """Times shapes on one row; each shape once."""

    def __init__(self, space: Space, row: Mapping[str, Any]) -> None:
        self.space, self.row = space, dict(row)
        for name in vocabulary.ID_COLUMNS:  # the values of ids do not matter, but they have to exist
            if space.vocab is not None and name in row:
                self.row[name] = row[name].clamp(max=len(space.vocab) - 1)
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in row.items() if hasattr(v, "shape"))
        self.described = (
            f"one row ({shapes}), median of {_REPEATS} passes after {_WARMUP}, on {space.teacher.device}, "
            f"{torch.get_num_threads()} threads"
        )
        self._known: dict[str, float] = {}

    def __call__(self, candidate: Candidate) -> Candidate:
        """The candidate with its latency."""
        key = f"{candidate.layers} {candidate.width_share}"
        if key not in self._known:
            model = self.space.build(candidate)
            found = latency({"student": model}, self.row, repeats=_REPEATS, warmup=_WARMUP)["student"]
            self._known[key] = found.median_ms
        return replace(candidate, latency_ms=self._known[key])


def _sizes_of(tower: Tower, config: PreTrainedConfig, share: float) -> Iterator[tuple[str, str, int]]:
    """Kind, config option and value of each size of a tower at a share."""
    part: Any = depth.sub_config(config, tower.path)
    multiple = 8 if tower.free_heads and tower.hidden % 8 == 0 else 1
    if not tower.free_heads:
        multiple = tower.head_dim
    hidden = max(multiple, int(share * tower.hidden / multiple + 0.5) * multiple)
    yield "hidden", tower.option("hidden"), hidden
    if tower.free_heads:
        groups = getattr(part, tower.fields["kv"][0]) if tower.fields["kv"] else tower.heads
        kept = max(1, int(share * groups + 0.5))
        for i in range(len(tower.fields["heads"])):
            yield "heads", tower.option("heads", i), kept * (tower.heads // groups)
        for i in range(len(tower.fields["kv"])):
            yield "kv", tower.option("kv", i), kept
    for i, name in enumerate(tower.fields["ffn"]):
        full = getattr(part, name)
        multiple = 8 if full % 8 == 0 else 1
        yield "ffn", tower.option("ffn", i), max(multiple, int(share * full / multiple + 0.5) * multiple)
