"""DeepSpeed's ZeRO-3 on two CPU ranks: one step and an evaluation; rank 0 saves whole gradients and scores.

Started as `torchrun --nproc_per_node 2 tests/zero_ranks.py FOLDER`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

# Accelerate takes a rank on a CPU for DeepSpeed's only if its own configuration says so.
os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed  # noqa: E402
from deepspeed.utils import safe_get_full_grad  # noqa: E402

from hf_kd import DistillationArguments, DistillationTrainer  # noqa: E402
from hf_kd.fusing import Fusion  # noqa: E402
from tests.heads import HEADS, Collator, models, rows_of  # noqa: E402

CONFIG = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
}  # fmt: skip


def run(folder: Path, fused: str, tie: bool) -> dict[str, object]:
    """Loss and gradient of one step, and an evaluation; the learning rate is 0."""
    head = HEADS["causal-lm"]
    student, teacher = models(head)
    if tie:
        student.config.tie_word_embeddings = True
        student.tie_weights()
    options = DistillationArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
        learning_rate=0.0, max_grad_norm=0.0, logging_steps=1, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, alpha=head.alpha, temperature=2.0, per_device_eval_batch_size=2,
        fused=fused, ddp_backend="gloo",
    )  # fmt: skip
    trainer = DistillationTrainer(
        student, options, teacher=teacher, task=head.task, train_dataset=rows_of(head, 8),
        eval_dataset=rows_of(head, 7), data_collator=Collator(head),
    )  # fmt: skip
    grads: dict[str, torch.Tensor] = {}
    step = deepspeed.DeepSpeedEngine.step

    def keep(engine: deepspeed.DeepSpeedEngine, *args: object, **kwargs: object) -> None:
        """The engine's step, and before it the gradients that it has averaged."""
        if engine.is_gradient_accumulation_boundary():
            found = {name: safe_get_full_grad(p) for name, p in trainer.student.named_parameters()}
            grads.update({name: grad.clone() for name, grad in found.items()})
        step(engine, *args, **kwargs)

    deepspeed.DeepSpeedEngine.step = keep
    try:
        trainer.train()
    finally:
        deepspeed.DeepSpeedEngine.step = step
    scores = trainer.evaluate()
    assert all(p.ds_tensor.numel() < p.ds_numel for p in trainer.student.parameters())  # in pieces
    return {
        "fused": isinstance(trainer._fusion, Fusion),
        "loss": trainer.state.log_history[0]["loss"],
        "grads": grads,
        "scores": {k: v for k, v in scores.items() if isinstance(v, float)},
    }


def main(folder: Path) -> None:
    """A student with an output layer of its own, and one that shares it with the embeddings."""
    config = folder / f"zero{os.environ['RANK']}.json"
    config.write_text(json.dumps(CONFIG))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(config)
    results = {tie: run(folder, "on", tie) for tie in (False, True)}
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
