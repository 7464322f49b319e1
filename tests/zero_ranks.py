"""DeepSpeed's ZeRO on two CPU ranks: one step and an evaluation; rank 0 saves whole gradients and scores.

Started by Accelerate with `hf_kd/accelerate/zero2.yaml` or `zero3.yaml` as `tests/zero_ranks.py FOLDER`; the
folder has the models `student` and `teacher`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

# Accelerate takes a rank on a CPU for DeepSpeed's only if its own configuration says so.
os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed  # noqa: E402
from deepspeed.utils import safe_get_full_grad  # noqa: E402
from transformers.integrations import is_deepspeed_zero3_enabled  # noqa: E402

from hf_kd import DistillationArguments, DistillationTrainer  # noqa: E402
from hf_kd.fusing import Fusion  # noqa: E402
from tests.heads import HEADS, Collator, models, rows_of  # noqa: E402

# Ranks exchange by gloo alone: the operator that does it in shared memory would be compiled here first.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run(folder: Path, case: str) -> dict[str, object]:
    """Loss and gradient of one step, an evaluation, and the saved student; the learning rate is 0."""
    head = HEADS["causal-lm"]
    student, teacher = models(head)
    if case == "tied":
        student.config.tie_word_embeddings = True
        student.tie_weights()
    options = DistillationArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
        learning_rate=0.0, max_grad_norm=0.0, logging_steps=1, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, alpha=head.alpha, temperature=2.0, per_device_eval_batch_size=2,
        fused="on", ddp_backend="gloo",
    )  # fmt: skip
    zero = options.deepspeed_plugin.deepspeed_config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = 0  # layers this small would never be taken apart
    if case == "names":
        assert is_deepspeed_zero3_enabled() == (zero["stage"] == 3)
        student, teacher = str(folder / "student"), str(folder / "teacher")
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
    if zero["stage"] == 3:
        assert all(p.ds_tensor.numel() < p.ds_numel for p in trainer.student.parameters())  # in pieces
    assert not any(hasattr(p, "ds_id") for p in trainer.teacher.model.parameters())  # type: ignore[union-attr]
    trainer.save_model(str(folder / case))
    return {
        "fused": isinstance(trainer._fusion, Fusion),
        "loss": trainer.state.log_history[0]["loss"],
        "grads": grads,
        "scores": {k: v for k, v in scores.items() if isinstance(v, float)},
    }


def main(folder: Path) -> None:
    """A student with an output layer of its own, one that shares it with the embeddings, and named models."""
    stage = int(os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"])
    results = {
        case: run(folder, case) for case in (("models", "tied", "names") if stage == 3 else ("names",))
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
