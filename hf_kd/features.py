"""Losses on what is inside the two models: hidden states, attentions, relations, embeddings.

    loss = mix + sum_j w_j * feature_j

Each `feature_j` is a mean over pairs of layers and over positions, of the whole optimizer step, as the other
terms are; see `positions.py` for which positions count.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layer_maps import LayerStack, StackPair, pair_layers
from .losses.features import ATTENTION_LOSSES, HIDDEN_LOSSES, attention_kl, relation_kl, scores_of
from .losses.named import find
from .losses.scores import Products, product_kl
from .losses.vectors import cosine
from .objective import Counts, Terms
from .options.layers import FEATURE_WEIGHTS
from .positions import positions_of
from .projection import Projection
from .taps import SEEN_KERNELS, SelfAttention, Tap, Value, find_self_attention, tapped
from .tasks import Batch, Supervision, Task
from .tasks.base import full_precision
from .teachers import ModelTeacher
from .teachers.models import TEACHER_PREFIX, base_model

if TYPE_CHECKING:
    from .config import DistillationArguments

_INPUTS = ("input_ids", "input_values", "input_features", "inputs_embeds")


@dataclass
class Seen:
    """What one forward of each model had at its taps."""

    features: Features
    student: dict[Tap, Value] = field(default_factory=dict)
    teacher: dict[Tap, Value] = field(default_factory=dict)

    def on_student(self) -> contextlib.AbstractContextManager[None]:
        """Look into the student for one forward."""
        return tapped(self.features.student, self.features.taps[0], self.student)

    def on_teacher(self) -> contextlib.AbstractContextManager[None]:
        """Look into the teacher for one forward."""
        return tapped(self.features.teacher, self.features.taps[1], self.teacher)


@dataclass(frozen=True)
class _Compared:
    """One pair of places."""

    term: str
    stacks: StackPair
    student: Tap
    teacher: Tap
    projection: str = ""
    attention: tuple[SelfAttention, SelfAttention] | None = None
    which: str = ""


class Features:
    """The losses on layers of one run; nothing at all where every weight is 0.

    Args:
        args: The options.
        student: The student, not wrapped.
        teacher: The teacher.
        task: Their head.

    Attributes:
        projections: A trained map per pair of hidden states whose widths differ.

    Raises:
        ValueError: If the teacher can't be looked into, or layers don't correspond.
    """

    def __init__(self, args: DistillationArguments, student: nn.Module, teacher: Any, task: Task) -> None:
        """Find the places to compare."""
        self.task, self.args = task, args
        self.weights = {name: getattr(args, f"{name}_weight") for name in FEATURE_WEIGHTS}
        self.weights = {name: weight for name, weight in self.weights.items() if weight > 0}
        self.projections = nn.ModuleDict()
        self.places: list[_Compared] = []
        self.taps: tuple[list[Tap], list[Tap]] = ([], [])
        if not self.weights:
            return
        if not isinstance(teacher, ModelTeacher):
            raise ValueError(
                f"{_named(self.weights)} compares layers, but teacher={type(teacher).__name__} gives no "
                "hidden states or attentions: only a model in memory does. Set it to 0, or teach with the "
                "model itself."
            )
        self.student, self.teacher = base_model(student), base_model(teacher.model)
        self.hidden_loss = find("hidden_loss", args.hidden_loss or "", HIDDEN_LOSSES)
        self.attention_loss = find("attention_loss", args.attention_loss or "", ATTENTION_LOSSES)
        self._find_places()
        self.taps = (
            list(dict.fromkeys(place.student for place in self.places)),
            list(dict.fromkeys(place.teacher for place in self.places)),
        )

    @property
    def wanted(self) -> bool:
        """Whether any term has a weight."""
        return bool(self.weights)

    def seen(self) -> Seen | None:
        """Room for what the next forwards have; None if nothing is compared."""
        return Seen(self) if self.wanted else None

    # ---- places ----

    def _find_places(self) -> None:
        stacks: list[StackPair] = []
        if set(self.weights) - {"last_hidden"}:
            stacks = pair_layers(self.student, self.teacher, self.args.layer_map or "auto")
        for pair in stacks:
            if "hidden" in self.weights:
                for i, j in pair.layers:
                    self._add_states("hidden", pair, (pair.student.layer(i), pair.teacher.layer(j)), "output")
            if "embedding" in self.weights:
                first = pair.student.layer(0), pair.teacher.layer(0)
                self._add_states("embedding", pair, first, "input")
            if "attention" in self.weights:
                for i, j in pair.layers:
                    self._add_attention(pair, *self._attention(pair, i, j))
            if "relation" in self.weights:
                attention = self._attention(pair, *pair.layers[-1])
                self._add_relations(pair, *attention)
        if "last_hidden" in self.weights:
            paths = _last_hidden(self.student), _last_hidden(self.teacher)
            ends = [
                _whole(model, path) for model, path in zip((self.student, self.teacher), paths, strict=True)
            ]
            self._add_states("last_hidden", StackPair(ends[0], ends[1], ()), paths, "last")

    def _add_states(self, term: str, pair: StackPair, paths: tuple[str, str], kind: Any) -> None:
        widths = [_width(stack, term) for stack in (pair.student, pair.teacher)]
        name = ""
        if widths[0] != widths[1]:
            name = f"{term}_{paths[0]}_{paths[1]}".replace(".", "_")
            parameter = next(self.student.parameters())
            self.projections[name] = Projection(*widths).to(parameter.device, parameter.dtype)
        self.places.append(_Compared(term, pair, Tap(paths[0], kind), Tap(paths[1], kind), name))

    def _attention(self, pair: StackPair, i: int, j: int) -> tuple[SelfAttention, SelfAttention]:
        return (
            find_self_attention(self.student, pair.student.layer(i), pair.student.config),
            find_self_attention(self.teacher, pair.teacher.layer(j), pair.teacher.config),
        )

    def _add_attention(self, pair: StackPair, student: SelfAttention, teacher: SelfAttention) -> None:
        if student.heads != teacher.heads:
            raise ValueError(
                f"attention_weight={self.weights['attention']} compares attentions head by head, but "
                f"{student.path} has {student.heads} heads and the teacher's {teacher.path} {teacher.heads}. "
                "Set attention_weight=0 and relation_weight instead, which takes any numbers of heads."
            )
        taps = Tap(student.path, "scores"), Tap(teacher.path, "scores")
        self.places.append(_Compared("attention", pair, *taps))

    def _add_relations(self, pair: StackPair, student: SelfAttention, teacher: SelfAttention) -> None:
        for relation in self.args.relations.split(","):
            which = relation.strip()[0]
            taps = student.tap(which), teacher.tap(which)
            self.places.append(_Compared("relation", pair, *taps, attention=(student, teacher), which=which))

    # ---- attention that can be seen ----

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Let attentions be seen, where they are compared: some kernels show neither scores nor factors."""
        if "attention" not in self.weights:
            yield
            return
        with _seen_kernel(self.student), _seen_kernel(self.teacher):
            yield

    # ---- losses ----

    def add(
        self,
        terms: Terms,
        seen: Seen | None,
        batch: Batch,
        supervision: Supervision,
        *,
        counts: Counts,
        ranks: int,
    ) -> Terms:
        """The terms of the mix, and those of the features: `loss + sum_j w_j * feature_j`."""
        if seen is None:
            return terms
        sums = self.sums(seen, batch, supervision)
        features = {name: value / counts.kd.clamp_min(1e-12) * ranks for name, value in sums.items()}
        loss = terms.loss
        for name, value in features.items():
            loss = loss + self.weights[name] * value.to(loss.dtype)
        return replace(terms, loss=loss, features={name: v.detach() for name, v in features.items()})

    def sums(self, seen: Seen, batch: Batch, supervision: Supervision) -> dict[str, Tensor]:
        """Each term's weighted sum over the positions of a batch, mean over its pairs of layers.

        Raises:
            ValueError: If a place was not reached, or the two models' positions don't correspond.
        """
        own = [TEACHER_PREFIX + name for name in _INPUTS if TEACHER_PREFIX + name in batch]
        if own:
            raise ValueError(
                f"{_named(self.weights)} compares the models position by position, but the batch has "
                f"{own[0]!r}: "
                "the teacher reads other tokens. Set it to 0."
            )
        sums: dict[str, list[Tensor]] = {}
        self._require_gradient(seen)
        for place in self.places:
            student, teacher = self._values(place, seen)
            shape = (student.shape[0], student.shape[-2])
            weight, exists = positions_of(
                place.stacks.student,
                self.student,
                shape,
                batch=batch,
                supervision=supervision,
                task=self.task,
            )
            value = self._compare(place, student, teacher, weight, exists)
            sums.setdefault(place.term, []).append(value)
        return {term: torch.stack(values).mean() for term, values in sums.items()}

    def _values(self, place: _Compared, seen: Seen) -> tuple[Value, Value]:
        found: list[Value] = []
        for whose, model, tap, values in (
            ("student", self.student, place.student, seen.student),
            ("teacher", self.teacher, place.teacher, seen.teacher),
        ):
            if tap not in values:
                raise ValueError(_missing(whose, model, tap))
            value = values[tap]
            dtype = torch.promote_types(value.dtype, torch.float32)
            found.append(value.to(value.device, dtype))
        student, teacher = found[0], found[1].detach().to(found[0].device, found[1].dtype)
        sizes = [(value.shape[0], *value.shape[-2:][:1]) for value in (student, teacher)]
        if student.ndim not in (3, 4) or student.ndim != teacher.ndim or sizes[0] != sizes[1]:
            raise ValueError(
                f"{place.term}_weight compares {place.student.path} with the teacher's {place.teacher.path} "
                f"position by position, but they have the shapes {list(student.shape)} and "
                f"{list(teacher.shape)}: the two models divide the input differently."
            )
        if place.projection:
            student = full_precision(self.projections[place.projection](student))
        return student, teacher.to(student.device, student.dtype)

    def _compare(
        self, place: _Compared, student: Value, teacher: Value, weight: Tensor, exists: Tensor
    ) -> Tensor:
        """The weighted sum over positions."""
        if place.term == "attention" and self.attention_loss is attention_kl:
            if isinstance(student, Products) and isinstance(teacher, Products) and student.differentiable:
                return product_kl(student, teacher, weight)
        student, teacher = scores_of(student), scores_of(teacher)
        if place.attention is not None:
            one, other = place.attention
            student, teacher = one.take(place.which, student), other.take(place.which, teacher)
            heads = self.args.relation_heads
            if heads is None:
                heads = math.gcd(one.heads or 1, student.shape[-1], teacher.shape[-1])
            causal = one.causal or other.causal
            return relation_kl(student, teacher, heads=heads, exists=exists, causal=causal, weight=weight)
        if place.term == "attention":
            function = self.attention_loss
        else:
            function = cosine if place.term == "last_hidden" else self.hidden_loss
        return (function(student, teacher) * weight).sum()

    def _require_gradient(self, seen: Seen) -> None:
        if not torch.is_grad_enabled():
            return
        for term, weight in self.weights.items():
            values = [seen.student.get(place.student) for place in self.places if place.term == term]
            if not any(value is None or value.requires_grad for value in values):
                raise ValueError(
                    f"{term}_weight={weight} reaches no parameter of the student that is trained: what it "
                    "compares is frozen, or is computed without autograd (gradient_checkpointing_kwargs="
                    "{'use_reentrant': True}; set it to False)."
                )

    def describe(self) -> list[tuple[str, str]]:
        """The terms and their weights, in words."""
        rows = []
        for term, weight in self.weights.items():
            pairs = [(p.student.path, p.teacher.path) for p in self.places if p.term == term]
            words = ", ".join(dict.fromkeys(f"{s} <- {t}" for s, t in pairs))
            rows.append((f"{weight:g} x {term.replace('_', ' ')}", words))
        return rows

    def problems(self, accelerator: Any) -> list[str]:
        """What of the way in which the run is executed does not go together with losses on layers."""
        if not self.wanted:
            return []
        args, name, found = self.args, _named(self.weights), []
        compiled = any(m._compiled_call_impl is not None for m in self.student.modules())
        if args.torch_compile or compiled:
            found.append(
                f"{name} looks into the student by hooks, which a compiled model does not call: set "
                f"torch_compile=False (it is {args.torch_compile}) and don't compile parts of it, or set it "
                f"to 0."
            )
        if args.n_gpu > 1:
            found.append(
                f"{name} and {args.n_gpu} GPUs in one process (DataParallel) don't go together: start one "
                "process per GPU with accelerate launch, or torchrun."
            )
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if self.projections and kind in ("FSDP", "DEEPSPEED"):
            found.append(
                f"{name} trains projections ({', '.join(self.projections)}), since the widths differ, and "
                f"{kind} shards them away from where they are used: use DDP, or a student as wide as the "
                "teacher."
            )
        return found


def _named(weights: dict[str, float]) -> str:
    return ", ".join(f"{name}_weight={weight:g}" for name, weight in weights.items())


def _width(stack: LayerStack, term: str) -> int:
    config = stack.config
    if not hasattr(config, "hidden_size") and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"{term}_weight needs the width of {stack.path}, but {type(stack.config).__name__} has no "
            f"hidden_size. Set {term}_weight=0."
        )
    return width


def _last_hidden(model: Any) -> str:
    """Path of the module that returns the hidden state which the head reads."""
    owner = model.get_decoder() if getattr(model.config, "is_encoder_decoder", False) else model.base_model
    return next(path for path, module in model.named_modules() if module is owner)


def _whole(model: Any, path: str) -> LayerStack:
    """The part of a model that ends in its last hidden state."""
    role = "decoder" if getattr(model.config, "is_encoder_decoder", False) else ""
    return LayerStack(path, 0, model.config, "", role, inner=False)


def _missing(whose: str, model: Any, tap: Tap) -> str:
    if tap.kind != "scores":
        return (
            f"The {whose}'s {tap.path!r} was not called in its forward, so it can't be compared; see "
            "layer_map."
        )
    kernel = getattr(model.config, "_attn_implementation", None)
    return (
        f"attention_weight: the {whose}'s {tap.path!r} took no softmax over scores of queries and keys, and "
        f"its attention (attn_implementation={kernel!r}) does not show them. Load the {whose} with "
        "attn_implementation='eager', or set attention_weight=0."
    )


@contextlib.contextmanager
def _seen_kernel(model: Any) -> Iterator[None]:
    """Switch a model to eager attention for a while, unless its kernel's scores can be seen."""
    configs = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}
    before = [
        (config, config._attn_implementation)
        for config in configs.values()
        if hasattr(config, "_attn_implementation")
    ]
    if any(kernel not in SEEN_KERNELS for _, kernel in before):
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for config, kernel in before:
            config._attn_implementation = kernel
