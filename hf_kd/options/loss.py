"""What is compared and how it is weighed, as options."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .fields import mapping_problems, option, unknown_names

SCHEDULE_NAMES = ("constant", "linear", "cosine")
SUPERVISE_NAMES = ("auto", "all")
FUSED_NAMES = ("auto", "on", "off")
SPARSE_ESTIMATOR_NAMES = ("auto", "tail", "draws")
CORRECTION_NAMES = ("none", "swap", "drop")
KD_WEIGHTING_NAMES = ("none", "confidence", "entropy")


@dataclass(kw_only=True)
class LossOptions:
    """Two terms and their weights, the distributions that are compared, and how that is computed."""

    alpha: float = option(0.9, "weight of distillation, 0 to 1; at 1 no labels are needed")
    alpha_end: float | None = option(None, "value of alpha at the end of training")
    alpha_schedule: str = option("constant", "path from alpha to alpha_end: constant, linear, cosine")
    temperature: float | str = option(
        1.0, "softens both distributions; the term is scaled by T^2; or auto: measured"
    )
    temperature_end: float | None = option(None, "temperature at the end of training")
    temperature_schedule: str = option("constant", "path to temperature_end: constant, linear, cosine")
    teacher_temperature: float | None = option(None, "temperature of the teacher, if another")
    teacher_calibration: bool = option(False, "divide its logits by what fits validation labels best")
    divergence: Callable[..., Any] | str | None = option(
        "auto", "auto, forward_kl, reverse_kl, jsd, tvd ... or package.module:function"
    )
    divergence_options: dict[str, Any] | str | None = option(
        None, """its parameters as JSON: '{"beta": 0.3}'"""
    )
    target_correction: str = option("none", "where it contradicts a label: none, swap, drop")
    kd_weighting: str = option("none", "weight of a position, by its certainty: none, confidence, entropy")
    supervise: str = option("auto", "positions that are distilled: auto (the labelled ones), all")
    sparse_estimator: str = option("auto", "tail of a sparse teacher: auto (measured), tail, draws")
    fused: str = option("auto", "loss without [tokens, vocabulary] logits: auto, on, off")
    fused_chunk_mib: int = option(256, "MiB that the fused loss may use beyond its gradients")

    def loss_problems(self) -> list[str]:
        """Every problem of these options, each with the option's name, its value and the fix."""
        found: list[str] = []
        for name in ("alpha", "alpha_end"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                found.append(f"{name}={value} is outside [0, 1]: it is a weight, set e.g. {name}=0.5")
        if self.fused_chunk_mib < 1:
            found.append(f"fused_chunk_mib={self.fused_chunk_mib} is below 1: set e.g. 256")
        known = {
            "alpha_schedule": SCHEDULE_NAMES,
            "temperature_schedule": SCHEDULE_NAMES,
            "supervise": SUPERVISE_NAMES,
            "fused": FUSED_NAMES,
            "sparse_estimator": SPARSE_ESTIMATOR_NAMES,
            "target_correction": CORRECTION_NAMES,
            "kd_weighting": KD_WEIGHTING_NAMES,
        }
        found += unknown_names(self, known) + mapping_problems(self, ("divergence_options",))
        return found + self._schedule_problems() + self._temperature_problems()

    def _schedule_problems(self) -> list[str]:
        found = []
        for name in ("alpha", "temperature"):
            end, schedule = getattr(self, f"{name}_end"), getattr(self, f"{name}_schedule")
            if schedule == "constant" and end is not None:
                found.append(
                    f"{name}_end={end} has no effect with {name}_schedule='constant': "
                    f"set {name}_schedule='linear' or drop {name}_end"
                )
            if schedule in ("linear", "cosine") and end is None:
                found.append(f"{name}_schedule={schedule!r} has nowhere to go: set {name}_end")
        return found

    def _temperature_problems(self) -> list[str]:
        found = []
        for name in ("temperature", "temperature_end", "teacher_temperature"):
            value = getattr(self, name)
            if value is None or (name == "temperature" and value == "auto"):
                continue
            if isinstance(value, str) or not 0.0 < value < math.inf:
                found.append(f"{name}={value} is not above 0 and finite: set e.g. {name}=2.0")
        if self.temperature == "auto" and self.temperature_schedule != "constant":
            found.append(
                f"temperature='auto' with temperature_schedule={self.temperature_schedule!r}: both say the "
                "temperature; set temperature_schedule='constant', or temperature to a number"
            )
        return found
