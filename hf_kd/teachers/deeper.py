"""A student whose last layer teaches the layers before it ("Be Your Own Teacher", Zhang et al. 2019).

An exit is what the student would answer if it ended after one of its layers: the model's own forward runs
once more with all layers stood in for, so that what follows them (norm, pooling, head) reads the states of
that layer. It costs the embeddings and the head, and no layer. All exits share the student's head, as in
LayerSkip (Elhoushi et al. 2024), so there is nothing more to save, and a student that is cut after an exit
(`init_student`) needs no new head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .models import TEACHER_PREFIX, base_model, forward_parameters
from .signal import TeacherSignal, named_logits

# How far an exit after the last layer may be from the model's own answer, by dtype.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
_SAME_HALF = 3e-2


class DeeperTeacher:
    """The student's last layer as the teacher of its exits.

    Args:
        student: What is trained; nothing of it is copied.
        outputs: The outputs that the task reads.
        layers: After which layers of the student (from 0; negative: from the end) there are exits; None: one,
            half way.

    Raises:
        ValueError: If the student has no stack of layers, or not such layers.
    """

    def __init__(
        self, student: nn.Module, outputs: tuple[str, ...], *, layers: Sequence[int] | None = None
    ) -> None:
        """Find the layers."""
        from ..layer_maps import layer_stacks

        stacks = layer_stacks(student)
        own = [stack for stack in stacks if not stack.inner]
        if len(own) != 1:
            raise ValueError(
                f"self_teacher='deeper' needs one stack of layers whose last one the head reads, but "
                f"{type(base_model(student)).__name__} has {[stack.path for stack in own]}: use "
                "self_teacher='ema'."
            )
        (self._stack,), self._inner = own, [stack for stack in stacks if stack.inner]
        self.layers = _resolved(layers, self._stack.count)
        # No attribute `model`: that would be a model of the teacher's own, to be placed and prepared.
        self._student, self._outputs = student, outputs
        self._checked = False

    @property
    def identity(self) -> dict[str, str]:
        """The rule: the weights are the student's."""
        return {
            "name": "deeper layers of the student",
            "revision": "",
            "fingerprint": f"deeper {self.layers} of {self._stack.count}",
        }

    @property
    def columns(self) -> tuple[str, ...]:
        """What the student reads."""
        return forward_parameters(self._student)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """What the last layer says, without dropout; the student keeps its modes.

        Raises:
            ValueError: At the first call, if an exit after the last layer says something else than the model.
        """
        modes = [(module, module.training) for module in self._student.modules()]
        self._student.eval()
        names = self.columns
        inputs = {k: v for k, v in batch.items() if k in names or not (names or k.startswith(TEACHER_PREFIX))}
        try:
            with self.watching() as seen:
                logits = named_logits(self._student(**inputs), self._outputs)
            if not self._checked:
                with self._standing_in(self._stack.count - 1, seen):
                    again = named_logits(self._student(**inputs), self._outputs)
                self._compare(logits, again)
        finally:
            for module, training in modes:
                module.training = training
        return TeacherSignal(logits=logits)

    @contextmanager
    def watching(self) -> Iterator[dict[str, Any]]:
        """Keep what the layers return in one forward of the student, with its graph, by path."""
        seen: dict[str, Any] = {}
        paths = [self._stack.layer(i) for i in (*self.layers, self._stack.count - 1)]
        paths += [stack.layer(stack.count - 1) for stack in self._inner]
        with ExitStack() as hooks:
            for path in dict.fromkeys(paths):

                def keep(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
                    seen[path] = output

                handle = base_model(self._student).get_submodule(path).register_forward_hook(keep)
                hooks.callback(handle.remove)
            yield seen

    def exits(self, seen: Mapping[str, Any]) -> Iterator[int]:
        """Each exit's layer in turn; until the next one, the student's forward is that of the exit."""
        for layer in self.layers:
            with self._standing_in(layer, seen):
                yield layer

    @contextmanager
    def _standing_in(self, layer: int, seen: Mapping[str, Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for one, place in ((self._stack, layer), *((s, s.count - 1) for s in self._inner)):
                path = one.layer(place)
                if path not in seen:
                    raise ValueError(
                        f"self_teacher='deeper': the student's {path!r} was not called in its forward (a "
                        "compiled model calls no hooks), so there is no exit after it."
                    )
                modules: Any = base_model(self._student).get_submodule(one.path)
                before = dict(modules._modules)
                stack.callback(modules._modules.update, before)
                for i, (name, original) in enumerate(before.items()):
                    modules._modules[name] = _StandIn(original, seen[path], first=i == 0)
            yield

    def _compare(self, logits: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> None:
        for name, values in logits.items():
            limit = _SAME.get(values.dtype, _SAME_HALF) * float(values.abs().max().clamp_min(1.0))
            worst = float((values - again[name]).abs().nan_to_num(0.0, 0.0, 0.0).max())
            if again[name].shape != values.shape or worst > limit:
                raise ValueError(
                    f"self_teacher='deeper': an exit after the last layer of "
                    f"{type(base_model(self._student)).__name__} gives other {name} than the model (by up to "
                    f"{worst:.2g}): it does something between its layers, so an exit is not what the model "
                    "would say if it ended there. Use self_teacher='ema' or 'frozen'."
                )
        self._checked = True


class _StandIn(nn.Module):
    """In a layer's place: the first returns what an earlier forward had, the others what they are given."""

    def __init__(self, layer: Any, output: Any, *, first: bool) -> None:
        super().__init__()
        # Not registered: it is no part of this module.
        object.__setattr__(self, "_layer", layer)
        self._output, self._first = output, first

    def __getattr__(self, name: str) -> Any:
        """What a model reads of its layers, such as the kind of their attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        if self._first:
            return self._output
        return hidden_states if isinstance(self._output, Tensor) else (hidden_states, *self._output[1:])


def _resolved(layers: Sequence[int] | None, count: int) -> list[int]:
    """Numbers from 0 of the layers with an exit, in order.

    Raises:
        ValueError: If there is no such layer, or nothing deeper to teach it.
    """
    if count < 2:
        raise ValueError(
            f"self_teacher='deeper' needs a layer below the last one, but the student has {count}: use "
            "self_teacher='ema'."
        )
    found = sorted({layer + count if layer < 0 else layer for layer in (layers or [(count - 1) // 2])})
    if not all(0 <= layer < count - 1 for layer in found):
        raise ValueError(
            f"exit_layers={list(layers or [])} must be layers 0 to {count - 2} of the student's {count}: the "
            "last one is their teacher."
        )
    return found
