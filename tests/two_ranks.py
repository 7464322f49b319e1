"""One optimizer step per head on two ranks; rank 0 saves what `test_distributed.py` compares.

Started as `python -m accelerate.commands.launch ... tests/two_ranks.py FOLDER EARLIER`, where `EARLIER` has
the runs of `rank_teachers.py` on one rank.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_kd import DistillationArguments, DistillationTrainer  # noqa: E402
from hf_kd.teachers import CachedTeacher  # noqa: E402
from tests.heads import HEADS, Collator, models, rows_of  # noqa: E402
from tests.rank_teachers import all_runs, trained  # noqa: E402
from tests.test_cached import write  # noqa: E402
from tests.test_features import MAPS, WEIGHTS  # noqa: E402
from tests.test_gradient import step  # noqa: E402

FEATURES = {name: {"layer_map": MAPS[name], **WEIGHTS} for name in ("single-label", "causal-lm")}


def rows_for(name: str) -> list:
    """Eight rows with unequal supervision, but for `token`: two rows, one with every label masked."""
    rows = rows_of(HEADS[name], 2 if name == "token" else 8, seed=3)
    if name == "token":
        rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    return rows


def main(folder: Path) -> None:
    """Run every head; also one evaluation of a number of rows that does not divide."""
    results = {}
    for name, head in HEADS.items():
        student, teacher = models(head)
        rows = rows_for(name)
        accumulation = 1 if name == "token" else 2
        loss, grads = step(
            folder,
            head,
            student,
            teacher,
            rows,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=len(rows) // 2 // accumulation,
        )
        results[name] = {"loss": loss, "grads": grads}
    for name, options in FEATURES.items():
        student, teacher = models(HEADS[name])
        rows = rows_of(HEADS[name], 8, seed=2)
        loss, grads = step(
            folder,
            HEADS[name],
            student,
            teacher,
            rows,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            **options,
        )
        results[f"{name} with features"] = {"loss": loss, "grads": grads}
    head, rows = HEADS["causal-lm"], rows_for("causal-lm")
    student, teacher = models(head)
    own = folder / f"rank{os.environ['RANK']}"
    cached = CachedTeacher(write("causal-lm", student, teacher, rows, own))
    loss, grads = step(folder, head, student, cached, rows[::-1], per_device_train_batch_size=4)
    results["from a cache"] = {"loss": loss, "grads": grads}
    results["teachers"] = all_runs(folder / "teachers", 2)
    earlier = Path(sys.argv[2]) / "ema" / "checkpoint-2"
    results["from one rank"] = trained(folder / "from one rank", "ema", 2, resume=earlier)
    student, teacher = models(head)
    trainer = DistillationTrainer(
        student,
        DistillationArguments(
            output_dir=str(folder),
            per_device_eval_batch_size=2,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        teacher=teacher,
        eval_dataset=rows_of(head, 7),
        data_collator=Collator(head),
    )
    metrics = trainer.evaluate()
    assert trainer.accelerator.num_processes == 2
    if trainer.accelerator.is_main_process:
        results["evaluate"] = {k: v for k, v in metrics.items() if isinstance(v, float)}
        torch.save(results, folder / "results.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    gc.freeze()  # as in conftest.py
    main(Path(sys.argv[1]))
