"""What a teacher knows about a batch, and what the trainer asks of any teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's answer for one batch, at dense fidelity.

    Attributes:
        logits: The head's raw outputs by name, as the teacher's model names them: `{"logits": [B, ..., C]}`
            for most heads, `{"start_logits": [B, L], "end_logits": [B, L]}` for question answering. Raw
            means before any temperature. They carry no gradient and must not be edited in place.
    """

    logits: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Refuse a signal without logits: there would be nothing to distil."""
        if not self.logits:
            raise ValueError("A TeacherSignal needs at least one named tensor of logits; got none.")


@runtime_checkable
class Teacher(Protocol):
    """Anything that answers a batch with a `TeacherSignal`; the trainer never asks which kind it is."""

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
