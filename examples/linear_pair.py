"""The classic pair: ten random inputs, two classes, a linear teacher and a linear student.

The student is trained on the teacher's distribution alone until the KL between them is at most 1e-4 nats:

    python examples/linear_pair.py
"""

from __future__ import annotations

import tempfile

import torch
from rich.console import Console
from torch import Tensor, nn

from hf_kd import DistillationArguments, DistillationTrainer


class Linear(nn.Module):
    """Ten inputs, two classes. A plain module may return a tensor, a tuple, or a dict with `logits`."""

    def __init__(self) -> None:
        """Start at random."""
        super().__init__()
        self.linear = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, 2]` logits."""
        return self.linear(x)


def main() -> float:
    """Train until the threshold; return the KL reached, in nats."""
    torch.manual_seed(0)
    teacher, student = Linear(), Linear()
    rows = [{"x": torch.randn(10)} for _ in range(256)]
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=DistillationArguments(
            output_dir=tempfile.mkdtemp(),
            alpha=1.0,  # no labels: the target is the teacher's distribution
            kl_threshold=1e-4,  # repeat until the KL is there ...
            num_train_epochs=200,  # ... or the epochs are over
            eval_strategy="epoch",
            learning_rate=0.02,
            per_device_train_batch_size=64,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows[:192],
        eval_dataset=rows[192:],
    )
    trainer.train()
    kl = trainer.evaluate()["eval_kl"]
    Console().print(f"KL to the teacher: {kl:.2e} nats after {trainer.state.global_step} steps")
    return kl


if __name__ == "__main__":
    main()
