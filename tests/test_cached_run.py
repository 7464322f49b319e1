"""A whole run from a cache is the run with its teacher: shuffled, over two epochs, at every fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.teachers import CachedTeacher
from hf_kd.teachers.cache.make import CacheSettings

from .heads import HEADS, VOCAB, Collator, models, rows_of
from .test_cached import write

# How far losses and weights may be apart. The models are float64: what is stored as such differs by rounding
# of products in batches of another size alone; float16 and the codec (2.5e-4 nats an entry) round more.
CASES: dict[str, tuple[CacheSettings, float]] = {
    "logits": (CacheSettings(fidelity="logits"), 1e-12),
    "hidden, float64": (CacheSettings(fidelity="hidden", dtype="float64"), 1e-12),
    "hidden, float32": (CacheSettings(fidelity="hidden", dtype="float32"), 1e-5),
    "hidden, float16": (CacheSettings(fidelity="hidden"), 1e-2),
    "sparse, all classes": (CacheSettings(fidelity="sparse", entries=VOCAB, temperature=2.0), 2e-3),
}


def run(folder: Path, teacher: Any, rows: list[Any], **options: Any) -> tuple[list[float], list[Tensor]]:
    """Logged losses of every step, and the student's weights after the last."""
    head = HEADS["causal-lm"]
    student, _ = models(head)
    settings: dict[str, Any] = {
        "output_dir": str(folder), "num_train_epochs": 2, "per_device_train_batch_size": 3,
        "learning_rate": 1e-2, "optim": "sgd", "temperature": 2.0, "alpha": 1.0, "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
        "report_to": "none", **options,
    }  # fmt: skip
    trainer = DistillationTrainer(
        student,
        DistillationArguments(**settings),
        teacher=teacher,
        train_dataset=rows,
        data_collator=Collator(head),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [parameter.detach() for parameter in student.parameters()]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[Tensor]]:
    return run(tmp_path_factory.mktemp("live"), models(HEADS["causal-lm"])[1], rows_of(HEADS["causal-lm"], 8))


@pytest.mark.parametrize("name", CASES)
def test_a_run_from_the_cache(name: str, live: tuple[list[float], list[Tensor]], tmp_path: Path) -> None:
    """Trap 45: two shuffled epochs in batches of three, from a cache written in batches of five."""
    settings, tolerance = CASES[name]
    head = HEADS["causal-lm"]
    rows = rows_of(head, 8)
    cache = write("causal-lm", *models(head), rows, tmp_path, settings, 5)
    losses, weights = run(tmp_path, CachedTeacher(cache), rows)
    assert len(losses) == len(live[0]) == 6
    assert losses == pytest.approx(live[0], rel=tolerance, abs=tolerance)
    for ours, theirs in zip(weights, live[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance)


def test_a_row_left_out_stops_the_run(tmp_path: Path) -> None:
    """Trap 48: a cache that lacks a row ends the run, and is not taught less; naive: alpha 0."""
    head = HEADS["causal-lm"]
    rows = rows_of(head, 8)
    cache = write("causal-lm", *models(head), rows[:7], tmp_path)
    with pytest.raises(ValueError, match="is not in the cache"):
        run(tmp_path, CachedTeacher(cache), rows)
    student_alone, _ = run(tmp_path, None, rows, alpha=0.0)
    assert len(student_alone) == 6
