"""Every option of a distillation that is not one of Trainer's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .fields import option, raise_problems, unknown_names
from .layers import FEATURE_WEIGHTS, LayerOptions
from .loss import LossOptions
from .teacher import TeacherOptions

SPIKE_ACTION_NAMES = ("warn", "skip", "stop")


@dataclass(kw_only=True)
class DistillationOptions(TeacherOptions, LayerOptions, LossOptions):
    """What to compare and how to weigh it. `loss = (1 - alpha) * task + alpha * T^2 * divergence`."""

    kl_threshold: float | None = option(None, "stop at the evaluation whose eval_kl is not above this")
    trust_remote_code: bool = option(False, "run code of checkpoints, and metrics, from the Hub")
    predict_with_generate: bool = option(False, "evaluate on text that the student generates")
    generation_max_length: int | None = option(None, "its length in tokens (default: the model's)")
    generation_num_beams: int | None = option(None, "its number of beams (default: the model's)")
    spike_action: str = option("warn", "a step far above those before it: warn, skip (drop it), stop")
    spike_threshold: float = option(8.0, "how far: robust standard deviations of its logarithm")
    term_gradients: int | None = option(
        None, "times each term's gradient norm is measured (default: 20, 0.01 of a run)"
    )

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has any weight at any time."""
        weights = [getattr(self, f"{name}_weight") for name in FEATURE_WEIGHTS]
        return self.alpha > 0 or (self.alpha_end or 0) > 0 or any(weight > 0 for weight in weights)

    def distillation_problems(self) -> list[str]:
        """Every problem of these options, each with the option's name, its value and the fix."""
        found = self.loss_problems() + self.teacher_problems() + self.layer_problems()
        found += unknown_names(self, {"spike_action": SPIKE_ACTION_NAMES})
        if self.kl_threshold is not None and not self.kl_threshold > 0.0:
            found.append(f"kl_threshold={self.kl_threshold} is never reached: set a small positive number")
        return found + self._watching_problems()

    def _watching_problems(self) -> list[str]:
        found = []
        if self.term_gradients is not None and self.term_gradients < 0:
            found.append(f"term_gradients={self.term_gradients} is below 0: set e.g. 20, or 0 for none")
        if self.term_gradients and any(getattr(self, f"{name}_weight") > 0 for name in FEATURE_WEIGHTS):
            found.append(
                f"term_gradients={self.term_gradients} tells task and distillation apart, but not losses on "
                "layers: set it to 0, or their weights"
            )
        if self.term_gradients and self.self_teacher == "deeper":
            found.append(
                f"term_gradients={self.term_gradients} with self_teacher='deeper': one forward is both "
                "terms; set it to 0"
            )
        if not 0.0 < self.spike_threshold < math.inf:
            found.append(f"spike_threshold={self.spike_threshold} is not above 0 and finite: set e.g. 8")
        return found

    def validate(self) -> None:
        """Raise one `ValueError` that lists every problem of these options."""
        raise_problems(self.distillation_problems())
