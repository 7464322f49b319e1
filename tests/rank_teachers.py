"""Short runs with every kind of teacher that is more than one model, the same on one process and on two.

`two_ranks.py` starts them on two ranks, `test_distributed.py` on one, and compares.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.teachers import CachedTeacher, EMATeacher, ModelTeacher
from hf_kd.teachers.cache.make import CacheSettings, describe

from .heads import HEADS, Collator, models, rows_of

HEAD = HEADS["single-label"]
CASES: dict[str, dict[str, Any]] = {
    "ema": {
        "self_teacher": "ema", "ema_decay": 0.5, "ema_decay_end": 0.9, "save_strategy": "steps",
        "save_steps": 2,
    },
    "ensemble": {"ensemble_weights": [1.0, 3.0], "term_gradients": 2},
    "confidence": {"ensemble_weighting": "confidence"},
    "routed": {"teacher_routes": {"0": 1, "1": 0}},
    "one": {},
    "a stream": {},
    "a spike": {"spike_action": "skip", "spike_threshold": 20.0, "max_steps": 20, "learning_rate": 1e-3},
    "filled": {},
    "deeper, no labels": {"self_teacher": "deeper", "exit_layers": [0], "alpha": 1.0},
}  # fmt: skip


class Numbered(Collator):
    """Also says which teacher a row has."""

    def __call__(self, rows: Any) -> Any:
        """Make a batch."""
        ids = torch.tensor([row["teacher_id"] for row in rows])
        rest = [{k: v for k, v in row.items() if k != "teacher_id"} for row in rows]
        return {**super().__call__(rest), "teacher_id": ids}


class Counting(ModelTeacher):
    """How often it was asked."""

    asked = 0

    def __call__(self, batch: Any) -> Any:
        """As a model does."""
        self.asked += 1
        return super().__call__(batch)


def filled(folder: Path, model: nn.Module) -> CachedTeacher:
    """A cache without rows, which the run fills, each rank with its own."""
    live = Counting(model, ("logits",))
    row = Collator(HEAD)(rows_of(HEAD, 1))
    folder.mkdir(parents=True, exist_ok=True)
    describe(live, {k: v for k, v in row.items() if k != "labels"}, CacheSettings())[0].write(folder)
    live.asked = 0
    return CachedTeacher(folder, live=live, miss="compute", rank=int(os.environ.get("RANK", "0")))


def trained(folder: Path, name: str, ranks: int, *, resume: Path | None = None) -> dict[str, Any]:
    """Four optimizer steps of four rows each; the student's weights, and those of its average."""
    student, teacher = models(HEAD)
    several = [teacher, models(HEAD, seed=5)[1]]
    rows = [{**row, "teacher_id": i % 2} for i, row in enumerate(rows_of(HEAD, 8, seed=3))]
    options = CASES[name]
    teachers: Any = None if "self_teacher" in options else several
    teachers = teacher if name in ("one", "a stream", "a spike") else teachers
    if name == "filled":
        teachers = filled(folder / name / "cache", teacher)
    settings: dict[str, Any] = {
        "output_dir": str(folder / name), "per_device_train_batch_size": 4 // ranks, "max_steps": 4,
        "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
        "report_to": "none", **options,
    }  # fmt: skip
    trainer = DistillationTrainer(
        student,
        DistillationArguments(**settings),
        teacher=teachers,
        train_dataset=Stream(rows) if name == "a stream" else rows,
        data_collator=Numbered(HEAD),
    )
    if name == "a spike":
        spoil(trainer)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.accelerator.num_processes == ranks and trainer.state.global_step == settings["max_steps"]
    assert trainer.spikes.counts["steps_skipped"] == (name == "a spike")
    found: dict[str, Any] = {"student": weights(student)}
    if "term_gradients" in options:
        logged = [row for row in trainer.state.log_history if "grad_norm_ratio" in row]
        found["norms of the terms"] = [row[f"grad_norm_{term}"] for row in logged for term in ("task", "kd")]
    if name == "filled":
        # The first rows, before training, and the first epoch: in the second one the ranks have other rows.
        assert teachers.live.asked <= 3
        trainer.accelerator.wait_for_everyone()
        assert CachedTeacher(teachers.folder).rows >= 8
    if isinstance(trainer.teacher, EMATeacher):
        found["average"] = weights(trainer.teacher.model)
        total = torch.stack([values.sum() for values in found["average"].values()]).sum()
        found["averages of the ranks"] = trainer.accelerator.gather(total.reshape(1))
    return found


class Stream(IterableDataset):
    """Eight rows, one after another."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def spoil(trainer: DistillationTrainer) -> None:
    """The last rank's gradient is a million times too large in one step."""

    def hook(grad: Tensor) -> Tensor:
        last = trainer.args.process_index == trainer.args.world_size - 1
        return grad * 1e6 if last and trainer.state.global_step == 17 else grad

    for parameter in trainer.student.parameters():
        parameter.register_hook(hook)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy."""
    return {name: values.detach().clone() for name, values in model.named_parameters()}


def all_runs(folder: Path, ranks: int) -> dict[str, dict[str, Any]]:
    """Every case, and the average's run gone on with from its middle."""
    found = {name: trained(folder, name, ranks) for name in CASES}
    found["ema, resumed"] = trained(folder, "ema", ranks, resume=folder / "ema" / "checkpoint-2")
    return found
