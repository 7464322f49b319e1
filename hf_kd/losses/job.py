"""What the fused loss is asked for, checked and flat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .tiles import Head, Teacher


@dataclass(frozen=True)
class Job:
    """All that defines the loss but the student's hidden states; the tensors are flat, `[N, ...]`."""

    head: Head
    teacher: Teacher | None
    labels: Tensor | None
    kd_weights: Tensor | None
    alpha: float
    temperature: float
    teacher_temperature: float
    kind: str
    parameter: float
    task_count: Tensor | float | None
    kd_count: Tensor | float | None
    scale: float
    label_smoothing: float
    z_loss: float
    shared: int
    chunk_bytes: int
    entropies: bool
    with_gradient: bool = False

    @property
    def tau(self) -> float:
        """Temperature at which the student is exponentiated; the other softmax is a power of that one.

        The larger of T and 1, so that the power is at least 1 and nothing that matters underflows first.
        """
        return max(self.temperature, 1.0)

    @property
    def kd_power(self) -> float:
        """Exponent from exponentials at `tau` to the temperature."""
        return self.tau / self.temperature

    @property
    def ce_power(self) -> float:
        """Exponent from exponentials at `tau` to temperature 1."""
        return self.tau
