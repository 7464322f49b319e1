"""The trained map between two widths: in the optimizer and the checkpoints, absent from the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertModel, TrainerCallback

from hf_kd import DistillationTrainer

from .heads import HEADS, Collator, bert, rows_of
from .test_trainer import arguments


class Stop(TrainerCallback):
    """End training after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def run(folder: Path, *, steps: int = 6, resume: bool = False, **options: Any) -> DistillationTrainer:
    """Distil a wider encoder into a narrow one."""
    head = HEADS["embedding"]
    torch.manual_seed(0)
    student, teacher = BertModel(bert(16)), BertModel(bert(24))
    trainer = DistillationTrainer(
        student,
        arguments(
            folder,
            alpha=1.0,
            remove_unused_columns=False,
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=1,
            max_grad_norm=1.0,
            **options,
        ),  # fmt: skip
        teacher=teacher,
        train_dataset=rows_of(head, 8),
        eval_dataset=rows_of(head, 8, seed=1),
        data_collator=Collator(head, dtype=torch.float32),
        callbacks=[Stop(steps)],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@pytest.mark.parametrize("divergence", ["auto", "cosine", "mse"])
def test_widths_that_differ(tmp_path: Path, divergence: str) -> None:
    """Trap 26: the projection is trained and clipped, saved beside checkpoints, absent from the student."""
    trainer = run(tmp_path, divergence=divergence)
    assert trainer.projection is not None
    assert not torch.equal(trainer.projection.weight, torch.eye(24, 16))
    assert not any("hf_kd" in name for name, _ in trainer.model.named_parameters())
    checkpoint = tmp_path / "checkpoint-6"
    assert set(load_file(checkpoint / "projection.safetensors")) == {"output.weight"}
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "projection.safetensors").exists()
    for folder in (checkpoint, tmp_path / "final"):
        assert not any("hf_kd" in name for name in load_file(folder / "model.safetensors"))
        loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
    assert trainer.evaluate()["eval_distance"] < 1.5


def test_resume_restores_the_projection(tmp_path: Path) -> None:
    """Trap 26: a resumed run has the projection, and the weights, of an undisturbed one."""
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", steps=2)
    resumed = run(tmp_path / "parts", resume=True)
    assert resumed.projection is not None
    assert whole.projection is not None
    assert torch.equal(whole.projection.weight, resumed.projection.weight)
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_vectors_take_vector_losses(tmp_path: Path) -> None:
    """A KL between vectors is refused; what would work is named."""
    with pytest.raises(ValueError, match="embedding-similarity"):
        run(tmp_path, divergence="reverse_kl")
