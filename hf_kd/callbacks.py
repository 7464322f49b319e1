"""What happens between steps: stop at a KL threshold, look at a step before it is applied."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .spikes import drop_step

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)


class KLThresholdCallback(TrainerCallback):
    """End training at the evaluation whose KL to the teacher is at or below a threshold.

    This is the loop of the classic formulation, "repeat until the KL reaches the threshold"; `max_steps` or
    the epochs end it otherwise. With several evaluation sets, all of them have to be there.

    Args:
        threshold: In nats, at T = 1, mean over supervised positions.
    """

    def __init__(self, threshold: float) -> None:
        """Keep the threshold."""
        self.threshold = threshold
        self._reached: dict[str, bool] = {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the newest KL of every evaluation set."""
        metrics = kwargs.get("metrics") or {}
        for name, value in metrics.items():
            if name.endswith("_kl"):
                self._reached[name] = value <= self.threshold
                logger.info("%s = %.3g nats, threshold %.3g", name, value, self.threshold)
        if self._reached and all(self._reached.values()) and state.global_step > 0:
            logger.warning(
                "kl_threshold=%g reached at step %d: training ends.", self.threshold, state.global_step
            )
            control.should_training_stop = True


class StepCallback(TrainerCallback):
    """Look at every step before it is applied: is its loss finite, is it a spike (see `spikes.py`).

    Weights and the last checkpoint stay as they were. One device synchronisation per optimizer step.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        """Watch a trainer."""
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise `FloatingPointError` with the step, the term and the rows; drop the step; or end training."""
        verdict = self.trainer.judge_step()
        if verdict is not None:
            drop_step(kwargs["optimizer"])
        if verdict == "stop":
            control.should_training_stop = True
            control.should_save = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
