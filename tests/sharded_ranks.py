"""FSDP 2 through Trainer and Accelerate on two CPU ranks: gradients, checkpoints, the student that is saved.

Started by Accelerate with `hf_kd/accelerate/fsdp2.yaml` as `tests/sharded_ranks.py FOLDER`; rank 0 saves what
`test_sharding.py` compares.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_kd import DistillationArguments, DistillationTrainer  # noqa: E402
from hf_kd.sharding import in_pieces  # noqa: E402
from tests.heads import HEADS, Collator, models, rows_of  # noqa: E402

NAMES = ("causal-lm", "single-label")


class WholeGradients(TrainerCallback):
    """Gather the gradients of the first optimizer step."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.grads: dict[str, Any] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All ranks take part."""
        if not self.grads:
            self.grads = {n: whole(p.grad) for n, p in kwargs["model"].named_parameters()}


def whole(tensor: Any) -> Any:
    """A tensor that may be in pieces."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def trainer_for(folder: Path, name: str, callback: Any, **options: Any) -> DistillationTrainer:
    """Two steps of two micro-batches a rank, a checkpoint after each."""
    head = HEADS[name]
    student, teacher = models(head)
    defaults = {
        "output_dir": str(folder / name),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "save_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "alpha": head.alpha,
        "temperature": 2.0,
    }
    args = DistillationArguments(**{**defaults, **options})
    assert args.device.type == "cpu"
    # Accelerate shards on accelerators only; it is told that these ranks have one, and finds the CPU.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return DistillationTrainer(
        student,
        args,
        teacher=teacher,
        task=head.task,
        train_dataset=rows_of(head, 8, seed=3),
        eval_dataset=rows_of(head, 7),
        data_collator=Collator(head),
        callbacks=[callback],
    )


def main(folder: Path) -> None:
    """Train, resume from the first checkpoint, evaluate, save."""
    results: dict[str, Any] = {}
    for name in NAMES:
        gradients = WholeGradients()
        trainer = trainer_for(folder, name, gradients)
        trainer.train()
        found: dict[str, Any] = {"grads": gradients.grads, "loss": trainer.state.log_history[0]["loss"]}
        found["fused"] = not isinstance(trainer._fusion, str)
        found["pieces"] = [in_pieces(trainer.student), in_pieces(trainer.teacher.model)]  # type: ignore[union-attr]
        found["eval_kl"] = trainer.evaluate()["eval_kl"]
        trainer.save_model(str(folder / name / "final"))
        again = trainer_for(folder, name, WholeGradients())
        again.train(resume_from_checkpoint=str(folder / name / "checkpoint-1"))
        assert again.accelerator.is_fsdp2
        found["resumed"] = {n: whole(p.detach()) for n, p in again.student.named_parameters()}
        try:
            again.train()
        except ValueError as error:
            found["refused"] = str(error)
        results[name] = found
        again.accelerator.wait_for_everyone()
    results["identity"] = trainer.teacher.identity["fingerprint"]  # type: ignore[union-attr]
    if trainer.accelerator.is_main_process:
        torch.save(results, folder / "results.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    gc.freeze()  # as in conftest.py
    main(Path(sys.argv[1]))
