"""How far a training is: lines in a file, a bar on a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_kd.progress import Progress


class Terminal(io.StringIO):
    """What tqdm takes for a terminal."""

    def isatty(self) -> bool:
        return True


def train(folder: Path, *, disable_tqdm: bool) -> None:
    """Fifty steps that are all logged, and an evaluation at the end."""
    args = TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=disable_tqdm)
    state, control, shown = TrainerState(max_steps=50), TrainerControl(), Progress()
    shown.on_train_begin(args, state, control)
    for state.global_step in range(1, 51):
        shown.on_step_end(args, state, control)
        logs = {"loss": 1 / state.global_step, "loss_kd": 0.5, "learning_rate": 1e-3}
        shown.on_log(args, state, control, logs=logs)
    shown.on_prediction_step(args, state, control, eval_dataloader=[1])
    shown.on_log(args, state, control, logs={"eval_kl": 0.25, "eval_runtime": 3.0})
    shown.on_train_end(args, state, control)


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_file_gets_ten_lines_and_the_evaluation(tmp_path: Path, capsys, disable_tqdm: bool) -> None:
    """Of fifty logs; no bar, whatever `disable_tqdm` says."""
    train(tmp_path, disable_tqdm=disable_tqdm)
    written = capsys.readouterr()
    lines = written.out.splitlines()
    assert len(lines) == 11
    assert lines[0] == "step 5 of 50  loss 0.2  loss_kd 0.5"
    assert lines[9:] == ["step 50 of 50  loss 0.02  loss_kd 0.5", "step 50 of 50  eval_kl 0.25"]
    assert not written.err


def test_a_terminal_gets_a_bar_with_the_newest_losses(tmp_path: Path, capsys, monkeypatch) -> None:
    """And the evaluation as the only line."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train(tmp_path, disable_tqdm=False)
    assert "50/50" in terminal.getvalue() and "loss 0.02  loss_kd 0.5" in terminal.getvalue()
    assert capsys.readouterr().out.splitlines() == ["step 50 of 50  eval_kl 0.25"]
