"""What a teacher knows about a batch, and what the trainer asks of any teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..losses.tiles import HiddenTeacher, SparseTeacher


@dataclass(frozen=True)
class SparseSignal:
    """A few entries of the teacher's distribution per position, at one temperature.

    The first `certain` entries of a position are there for sure: the likeliest ones. The others are draws
    from the rest by threshold sampling (Duffield, Lund, Thorup 2005): with a threshold tau, each class with
    `p > tau` is kept, each other one with probability `p / tau`, and then stands for a mass of tau. So the
    weights `max(p, tau)` of the entries have the teacher's probabilities as their expectation.

    Attributes:
        ids: `[..., n]` integer class of each entry, the certain ones first; -1 where there is none.
        log_probs: `[..., n]` the teacher's log-probability of each at `temperature`, nats.
        log_tail: `[...]` log of the mass outside the certain entries; `-inf` if there is none.
        temperature: Of the teacher's softmax.
        certain: `[...]` how many of the first entries are certain; None: all.
        log_tau: `[...]` log of the threshold; None: there are no draws, the tail is known by its mass alone.

    Raises:
        ValueError: If shapes don't match, ids are no integers, there are draws of which nobody knows the
            weight, or the temperature isn't positive.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    temperature: float = 1.0
    certain: Tensor | None = None
    log_tau: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what could not be read unambiguously."""
        if not (0.0 < self.temperature < math.inf):
            raise ValueError(f"SparseSignal.temperature={self.temperature} must be above 0 and finite.")
        if self.ids.is_floating_point() or self.ids.ndim == 0:
            raise ValueError(
                f"SparseSignal.ids is {self.ids.dtype} of shape {tuple(self.ids.shape)}; give integers "
                "[..., n]."
            )
        if self.log_probs.shape != self.ids.shape:
            raise ValueError(
                f"SparseSignal.log_probs is {tuple(self.log_probs.shape)}, ids {tuple(self.ids.shape)}; they "
                "must match."
            )
        for name in ("log_tail", "certain", "log_tau"):
            values = getattr(self, name)
            if values is not None and values.shape != self.ids.shape[:-1]:
                raise ValueError(
                    f"SparseSignal.{name} is {tuple(values.shape)}, ids {tuple(self.ids.shape)}; give one "
                    f"value per position, {tuple(self.ids.shape[:-1])}."
                )
        if self.certain is not None and self.log_tau is None:
            raise ValueError(
                "SparseSignal.certain says that some entries are draws, but log_tau=None: their weight is "
                "not known. Give log_tau, or certain=None if all entries are the likeliest."
            )

    @property
    def has_draws(self) -> bool:
        """Whether the entries are a sample of the whole distribution."""
        return self.log_tau is not None

    def tail(self) -> SparseTeacher:
        """The certain entries, and the mass of all other classes as one class more.

        Any divergence of distributions can be taken on these `k + 1` classes. Its value is a lower bound of
        that on all classes (data processing inequality), and its gradient leaves the tail's shape as it is.
        """
        return SparseTeacher(
            ids=self.ids.masked_fill(self.drawn, -1), log_probs=self.log_probs, log_tail=self.log_tail
        )

    def draws(self, control: float = 0.0) -> SparseTeacher:
        """All entries with what each stands for: an unbiased sample, for forward KL alone.

        Args:
            control: See `SparseTeacher`.

        Raises:
            ValueError: If there are no draws.
        """
        if self.log_tau is None:
            raise ValueError(
                "This teacher's sparse signal has no draws from the tail (log_tau=None), so "
                "sparse_estimator='draws' can't be; set sparse_estimator='tail'."
            )
        log_weights = torch.where(self.drawn, self.log_tau.unsqueeze(-1), self.log_probs)
        weights = log_weights.exp().masked_fill(self.ids < 0, 0.0)
        return SparseTeacher(ids=self.ids, log_probs=self.log_probs, weights=weights, control=control)

    def flat(self) -> SparseSignal:
        """All positions on one axis."""
        wide = self.ids.ndim
        return self.map(lambda values: values.flatten(0, -2 if values.ndim == wide else -1))

    def select(self, index: Tensor) -> SparseSignal:
        """Some positions of a flat signal."""
        return self.map(lambda values: values.index_select(0, index))

    def map(self, change: Callable[[Tensor], Tensor]) -> SparseSignal:
        """The same signal with every tensor changed in its positions' axes, or moved."""
        return replace(
            self,
            ids=change(self.ids),
            log_probs=change(self.log_probs),
            log_tail=change(self.log_tail),
            certain=None if self.certain is None else change(self.certain),
            log_tau=None if self.log_tau is None else change(self.log_tau),
        )

    @property
    def drawn(self) -> Tensor:
        """`[..., n]` which entries are draws."""
        if self.certain is None:
            return torch.zeros_like(self.ids, dtype=torch.bool)
        return torch.arange(self.ids.shape[-1], device=self.ids.device) >= self.certain.unsqueeze(-1)


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's answer for one batch, at one of three fidelities or more.

    Attributes:
        logits: Dense: the head's raw outputs by name, as the teacher's model names them: `{"logits": [B, ...,
            C]}` for most heads, `{"start_logits": [B, L], "end_logits": [B, L]}` for question answering. Raw
            means before any temperature. They carry no gradient and must not be edited in place.
        hidden: What the teacher's output layer reads, `[B, L, H]`, and that layer: as good as logits, and
            small where the vocabulary is large.
        sparse: A few entries of the distribution per position, `[B, L, n]` (`[B, n]` for heads with one
            position a row), at one temperature.
    """

    logits: Mapping[str, Tensor] | None = None
    hidden: HiddenTeacher | None = None
    sparse: SparseSignal | None = None

    def __post_init__(self) -> None:
        """Refuse a signal without content: there would be nothing to distil."""
        if not self.logits and self.hidden is None and self.sparse is None:
            raise ValueError(
                "A TeacherSignal needs at least one named tensor of logits, hidden states with a head, or "
                "sparse entries; got none."
            )

    @property
    def fidelity(self) -> str:
        """The best of what is there: "logits", "hidden" or "sparse"."""
        if self.logits:
            return "logits"
        return "hidden" if self.hidden is not None else "sparse"

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that it holds."""
        found: list[Any] = list((self.logits or {}).values())
        if self.hidden is not None:
            found += [self.hidden.hidden, self.hidden.head.weight, self.hidden.head.bias]
        if self.sparse is not None:
            sparse = self.sparse
            found += [sparse.ids, sparse.log_probs, sparse.log_tail, sparse.certain, sparse.log_tau]
        return [value for value in found if isinstance(value, Tensor)]

    def dense(self) -> Mapping[str, Tensor]:
        """The logits.

        Raises:
            ValueError: If there are none; says what there is instead.
        """
        if not self.logits:
            raise ValueError(
                f"This needs the teacher's logits, but its signal is {self.fidelity!r}. Use a teacher that "
                "gives logits (a model in memory, or a cache of fidelity 'logits')."
            )
        return self.logits


@runtime_checkable
class Teacher(Protocol):
    """Anything that answers a batch with a `TeacherSignal`; the trainer never asks which kind it is.

    One that is no model in memory may have a `config`, with the `num_labels` and `id2label` of a classifier
    or the `vocab_size` of a language model: its classes are then matched to the student's as a model's are.
    Without one, they are taken to be the student's.

    One whose answers depend on nothing but the batch, and can be made in another thread while the student
    works, may say so by `asked_ahead = True` (see the option `teacher_ahead`).
    """

    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """Answer one batch, whose tensors are on the training device, without gradient."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """What tells this teacher from another one; recorded in checkpoints and compared on resume."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the batch columns that the teacher reads."""
        ...


def named_logits(outputs: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Find a head's logits in whatever a model returned.

    Args:
        outputs: A `ModelOutput` or other mapping, a tuple whose first entries are the logits (after a 0-d
            loss, if there is one), or a tensor.
        names: The outputs that the task reads, in order.

    Returns:
        One tensor per name.

    Raises:
        ValueError: If an output is missing; names what was returned instead.
    """
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    if isinstance(outputs, Mapping):
        missing = [name for name in names if outputs.get(name) is None]
        if missing:
            raise ValueError(
                f"The model returned {sorted(outputs)} but the task reads {list(names)}. Choose the task "
                "that fits the model's head (`task=`), or give a custom Task whose `logits` names the right "
                "outputs."
            )
        return {name: outputs[name] for name in names}
    if not isinstance(outputs, tuple | list):
        raise ValueError(
            f"The model returned a {type(outputs).__name__}; return a tensor, a tuple or a mapping with "
            f"{list(names)} instead."
        )
    tensors = [item for item in outputs if isinstance(item, Tensor) and item.ndim > 0]
    if len(tensors) < len(names):
        raise ValueError(f"The model returned {len(tensors)} tensors but the task reads {list(names)}.")
    return dict(zip(names, tensors, strict=False))
