"""What reaches a live logger: every term of the loss, every number of an evaluation, the options."""

from __future__ import annotations

import json
import sqlite3

import pytest
import torch
from torch import nn

from hf_kd import DistillationArguments, DistillationTrainer

TRAINING = {"loss", "loss_task", "loss_kd", "alpha", "temperature", "learning_rate", "grad_norm_ratio"}
EVALUATION = {"loss", "kl", "agreement", "teacher_entropy"}


def train(folder, report_to, **options):
    torch.manual_seed(0)
    rows = [{"x": torch.randn(6), "labels": torch.tensor(i % 3)} for i in range(32)]

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return self.linear(x)

    args = DistillationArguments(
        output_dir=str(folder), report_to=report_to, max_steps=4, logging_steps=2, eval_strategy="steps",
        eval_steps=2, save_strategy="no", use_cpu=True, disable_tqdm=True, term_gradients=4, alpha=0.8,
        alpha_end=0.4, alpha_schedule="linear", temperature=4.0, temperature_end=2.0,
        temperature_schedule="cosine", **options,
    )  # fmt: skip
    trainer = DistillationTrainer(Linear(), args, teacher=Linear(), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return {row["step"]: row for row in trainer.state.log_history if "loss_kd" in row}


def test_every_term_arrives_in_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    logged = train(tmp_path, "tensorboard")
    seen = EventAccumulator(str(tmp_path / "runs")).Reload()
    names = set(seen.Tags()["scalars"])
    assert {f"train/{name}" for name in TRAINING} | {f"eval/{name}" for name in EVALUATION} <= names
    for name in TRAINING:
        events = {event.step: event.value for event in seen.Scalars(f"train/{name}")}
        assert events == pytest.approx({step: row[name] for step, row in logged.items()}, rel=1e-5)
    assert "args/text_summary" in seen.Tags()["tensors"]


def test_every_term_arrives_in_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    logged = train(tmp_path, "trackio", project="distillation", run_name="first")
    (file,) = [path for path in (tmp_path / "trackio").rglob("*.db") if "distillation" in path.name]
    with sqlite3.connect(file) as store:
        rows = [(step, json.loads(text)) for step, text in store.execute("SELECT step, metrics FROM metrics")]
    seen: dict[str, list[float]] = {}
    for _, metrics in rows:
        for name, value in metrics.items():
            seen.setdefault(name, []).append(value)
    assert {f"train/{name}" for name in TRAINING} | {f"eval/{name}" for name in EVALUATION} <= seen.keys()
    assert seen["train/loss_kd"] == pytest.approx([row["loss_kd"] for row in logged.values()])
