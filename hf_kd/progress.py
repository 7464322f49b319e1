"""How far a training of the command line is: a bar on a terminal, a few lines in a file."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

# Lines of a training whose output is no terminal.
_LINES = 10
# How long an evaluation took is not how good the student is.
_OF_TIME = ("runtime", "per_second")


class Progress(ProgressCallback):
    """One bar a training, with its newest losses beside it; Trainer prints a line for each log.

    Where the output is no terminal, or with `disable_tqdm`, the losses are printed ten times. An evaluation
    is always a line of its own. All that is logged is in the report, and goes to what `report_to` names.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the bar."""
        self.current_step, self._told = state.global_step, state.global_step
        if state.is_world_process_zero:
            hidden = True if args.disable_tqdm else None  # None: unless there is a terminal
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=hidden
            )

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Move the bar of the evaluation, where there are bars."""
        if self.training_bar is not None and not self.training_bar.disable:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the losses, or the metrics of an evaluation."""
        bar = self.training_bar
        if bar is None:
            return
        losses = _words(logs or {}, "loss")
        metrics = _words(logs or {}, "eval_")
        step = state.global_step
        if losses:
            bar.set_postfix_str(losses, refresh=False)
        if losses and bar.disable and (step - self._told) * _LINES >= state.max_steps:
            self._told = step
            metrics = losses
        if metrics:
            bar.write(f"step {step} of {state.max_steps}  {metrics}")


def follow(trainer: Trainer) -> None:
    """Let the trainer show its training by `Progress`."""
    for other in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other)
    trainer.add_callback(Progress())


def _words(logs: dict[str, Any], prefix: str) -> str:
    return "  ".join(
        f"{name} {value:.4g}"
        for name, value in logs.items()
        if name.startswith(prefix) and isinstance(value, float) and not name.endswith(_OF_TIME)
    )
