"""A head that the library does not know, described in three lines.

The models below score every token on a scale of four grades, under names of their own:

    python examples/custom_head.py
"""

from __future__ import annotations

import tempfile

import torch
from rich.console import Console
from torch import Tensor, nn

from hf_kd import DistillationArguments, DistillationTrainer, Task


class Grader(nn.Module):
    """`[B, L]` tokens to `[B, L, 4]` grades."""

    def __init__(self, width: int) -> None:
        """Make a small network."""
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens: Tensor, present: Tensor) -> dict[str, Tensor]:
        """Grade the tokens that are present."""
        return {"grades": self.head(self.embed(tokens) * present[..., None])}


# Where the logits are, where the labels are, and which positions exist where there are no labels.
task = Task(
    name="grading",
    logits=("grades",),
    labels=("targets",),
    mask=lambda batch: batch["present"],
    position="token",
)


def main() -> float:
    """Train for a few steps; return the KL to the teacher, in nats."""
    torch.manual_seed(0)
    rows = [
        {"tokens": torch.randint(0, 50, (6,)), "present": torch.ones(6), "targets": torch.randint(0, 4, (6,))}
        for _ in range(64)
    ]
    trainer = DistillationTrainer(
        model=Grader(8),
        teacher=Grader(32),
        task=task,
        args=DistillationArguments(
            output_dir=tempfile.mkdtemp(),
            alpha=0.9,
            num_train_epochs=20,
            learning_rate=0.02,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),  # fmt: skip
        train_dataset=rows,
        eval_dataset=rows,
    )
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    after = trainer.evaluate()["eval_kl"]
    Console().print(f"KL to the teacher: {before:.3f} nats before, {after:.3f} after")
    return after


if __name__ == "__main__":
    main()
