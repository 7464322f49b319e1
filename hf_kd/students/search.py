"""Depth and width of a student that meets a target: its parameters, bytes, or latency.

Shapes are tried on the meta device, where a model takes no memory; for a latency some of them are built with
random weights and timed.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kd.measure import latency

from . import depth, vocabulary, width
from .axes import Tower, find_towers, make_explicit
from .depth import Ranking, Stack
from .inputs import one_row
from .plan import Plan
from .sizes import Size, resolve_size
from .weights import empty_model

logger = logging.getLogger("hf_kd.students")

#: Widths are tried in steps of this share of the teacher's; in twice that where each shape is timed.
_STEPS = 16
_REPEATS, _WARMUP = 11, 3


@dataclass(frozen=True)
class Target:
    """The most that a student may have; at least one is set.

    Attributes:
        parameters: Each counted once; a share between 0 and 1 is of the teacher's.
        bytes: Of its weights in the teacher's dtype, as saved; a share likewise.
        latency_ms: Median milliseconds of a forward pass of one row on the teacher's device.
    """

    parameters: Size | None = None
    bytes: Size | None = None
    latency_ms: float | None = None

    def resolve(self, parameters: int, bytes: int) -> Target:
        """The same in numbers, for a teacher of this size.

        Raises:
            ValueError: If a target is neither a positive number nor a share.
        """
        if self.latency_ms is not None and not 0 < self.latency_ms < math.inf:
            raise ValueError(f"max_latency_ms={self.latency_ms} is not above 0 and finite: give milliseconds")
        return Target(
            _whole("max_parameters", self.parameters, parameters),
            _whole("max_bytes", self.bytes, bytes),
            self.latency_ms,
        )

    def describe(self) -> str:
        """The targets, as options."""
        values = {
            "max_parameters": self.parameters,
            "max_bytes": self.bytes,
            "max_latency_ms": self.latency_ms,
        }
        return ", ".join(f"{name}={value:,}" for name, value in values.items() if value is not None)


def _whole(option: str, value: Size | None, full: int) -> Size | None:
    if isinstance(value, float) and value >= 1 and value == int(value):
        value = int(value)  # 2e7 is a number as people write it
    return None if value is None else resolve_size(option, value, full)


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


@dataclass(frozen=True)
class Search:
    """What was tried for a target, and what was chosen.

    Attributes:
        target: In numbers.
        candidates: For each width the deepest student that fits, or the smallest one where none does.
        chosen: The best of them.
        timing: On what latencies were measured; empty where none was.
        uncut: Sizes that this architecture can't change, and why.
    """

    target: Target
    candidates: Sequence[Candidate]
    chosen: Candidate
    timing: str = ""
    uncut: Sequence[str] = ()

    @property
    def why(self) -> str:
        """The rule by which it was chosen, with its numbers."""
        best = self.chosen
        return (
            f"of {sum(c.fits for c in self.candidates)} shapes that meet {self.target.describe()}, the one "
            f"whose most reduced dimension is least reduced ({best.depth_share:.0%} of the layers, "
            f"{best.width_share:.0%} of the widths), then the one with most parameters"
        )

    def log(self) -> None:
        """Say what was tried, and why this one."""
        for line in self.uncut:
            logger.info("search: %s", line)
        for candidate in self.candidates:
            logger.info("search: %s%s", candidate.describe(), "" if candidate.fits else " (too much)")
        if self.timing:
            logger.info("search: latency of %s", self.timing)
        logger.info("search: chosen %s; %s", self.chosen.describe(), self.why)


def search(
    teacher: PreTrainedModel,
    stacks: Sequence[Stack],
    target: Target,
    *,
    num_layers: Size | Mapping[str, Size] | None = None,
    layers: str | Sequence[int] | Mapping[str, Sequence[int]] = "even",
    rankings: Mapping[str, Ranking],
    widths: width.Sizes,
    vocab: Sequence[int] | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
) -> Search:
    """Find depth and width under a target.

    For each width the deepest student that fits is a candidate. Chosen is the one whose most reduced
    dimension, layers or widths, is least reduced. What is given (a number of layers, the layers, a size) is
    not searched.

    Args:
        teacher: The model to cut.
        stacks: Its stacks of layers.
        target: What to meet.
        num_layers: As in `init_student`; None: searched.
        layers: As in `init_student`.
        rankings: The ways to choose layers.
        widths: Sizes by kind, as in `init_student`; None: searched.
        vocab: Tokens that are kept.
        batches: Calibration data, of which one row is what latency is measured on.

    Raises:
        ValueError: If nothing fits; names the smallest that can be made.
    """
    space = _Space(teacher, stacks, num_layers, layers, rankings, widths, vocab)
    space.measure(space.depths[-1], 1.0)  # refuses what was given and does not fit
    target = target.resolve(*space.of_teacher())
    timer = None if target.latency_ms is None else _Timer(space, one_row(teacher, batches))
    candidates: list[Candidate] = []
    for share in space.shares(timed=timer is not None):
        best = max((c.least_share for c in candidates if c.fits), default=0.0)
        if timer is not None and share < best:
            break  # narrower ones can't be better, and each costs time
        found = _deepest(space, share, target, timer)
        if found is not None and not any(
            (c.layers, c.widths) == (found.layers, found.widths) for c in candidates
        ):
            candidates.append(found)
    fitting = [c for c in candidates if c.fits]
    if not fitting:
        least = min(candidates, key=lambda c: (c.latency_ms or 0.0, c.parameters))
        raise ValueError(
            f"no student of this teacher meets {target.describe()}: the smallest that the search can make is "
            f"{least.describe()}. Set a higher target, trim the vocabulary (vocab), leave out sizes that are "
            "given, or make a student with random weights from student_config"
        )
    chosen = max(fitting, key=lambda c: (c.least_share, c.parameters))
    return Search(target, candidates, chosen, "" if timer is None else timer.described, space.uncut)


def _deepest(space: _Space, share: float, target: Target, timer: _Timer | None) -> Candidate | None:
    """The deepest student of a width that fits; the shallowest, marked, where none does."""
    sized = [c for c in (space.measure(d, share) for d in space.depths) if c is not None]
    if not sized:
        return None
    fitting = [c for c in sized if _fits(c, target)]
    if not fitting or timer is None:
        return fitting[-1] if fitting else _marked(sized[0])
    limit = target.latency_ms or math.inf
    top = timer(fitting[-1])
    if _ms(top) <= limit:
        return top
    low = timer(fitting[0])
    if _ms(low) > limit:
        return _marked(low)
    # Latency grows by about the same with each layer: start where the line meets the target.
    slope = (_ms(top) - _ms(low)) / max(1, len(fitting) - 1)
    place = int((limit - _ms(low)) / max(slope, 1e-9))
    for i in range(min(place, len(fitting) - 2), 0, -1):
        timed = timer(fitting[i])
        if _ms(timed) <= limit:
            return timed
    return low


def _ms(candidate: Candidate) -> float:
    assert candidate.latency_ms is not None
    return candidate.latency_ms


def _fits(candidate: Candidate, target: Target) -> bool:
    return (target.parameters is None or candidate.parameters <= target.parameters) and (
        target.bytes is None or candidate.bytes <= target.bytes
    )


def _marked(candidate: Candidate) -> Candidate:
    return replace(candidate, fits=False)


class _Space:
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


class _Timer:
    """Times shapes on one row; each shape once."""

    def __init__(self, space: _Space, row: Mapping[str, Any]) -> None:
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
