"""Several texts in a row without padding: the loss and gradient of the texts, in rows of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.fusing import Fusion
from hf_kd.packing import second_text
from hf_kd.tasks import resolve_task

from .heads import HEADS, Collator, models, oracle, rows_of
from .test_gradient import Gradients, assert_same

HEAD = HEADS["causal-lm"]


def texts(count: int = 8) -> list[dict[str, list[int]]]:
    """Rows as a tokenizer gives them, each token a label."""
    rows = [{"input_ids": row["input_ids"]} for row in rows_of(HEAD, count, seed=5)]
    return [{**row, "labels": row["input_ids"]} for row in rows]


class Packed:
    """Two rows of several texts each, as users pack them; labels run on over the ends of texts."""

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        columns = {
            "input_ids": [[i for row in half for i in row["input_ids"]] for half in halves],
            "position_ids": [[i for row in half for i in range(len(row["input_ids"]))] for half in halves],
        }
        longest = max(map(len, columns["input_ids"]))
        for half in range(2):  # filled up by a text that has no labels
            missing = longest - len(columns["input_ids"][half])
            columns["input_ids"][half] += [1] * missing
            columns["position_ids"][half] += list(range(missing))
        batch = {name: torch.tensor(value) for name, value in columns.items()}
        labels = batch["input_ids"].clone()
        for half, rest in enumerate(halves):
            labels[half, sum(len(row["input_ids"]) for row in rest) :] = -100
        return {**batch, "labels": labels}


def train(folder: Path, collator: Any, rows: list[Any], pair: Any = None, **options: Any) -> Any:
    """One step over all rows; trainer and gradients."""
    student, teacher = pair or models(HEAD)
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": len(rows), "max_steps": 1,
        "max_grad_norm": 0.0, "learning_rate": 0.0, "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "temperature": 2.0,
    }  # fmt: skip
    args = DistillationArguments(**{**settings, **options})
    found = Gradients()
    trainer = DistillationTrainer(
        student, args, teacher=teacher, train_dataset=rows, data_collator=collator, callbacks=[found]
    )
    trainer.train()
    return trainer, found.grads


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("collator", [DataCollatorWithFlattening(), Packed()], ids=["flat", "two rows"])
def test_the_gradient_is_that_of_the_texts(tmp_path: Path, collator: Any, fused: str) -> None:
    """Traps 1, 16: of student and teacher, also where labels run on over the end of a text."""
    rows = texts()
    own = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    trainer, grads = train(tmp_path, collator, rows, alpha=HEAD.alpha, fused=fused)
    assert isinstance(trainer._fusion, Fusion) == (fused == "on")
    loss, expected = oracle(HEAD, *models(HEAD), own)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_same(grads, expected)
    if fused == "on":
        trainer.eval_dataset = rows
        score, _ = oracle(HEAD, *models(HEAD), own, alpha=1.0, temperature=1.0)
        assert trainer.evaluate()["eval_kl"] == pytest.approx(float(score), rel=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_no_position_crosses_a_boundary(labelled: bool) -> None:
    """Trap 16: the last token of a text predicts nothing, with labels and without."""
    task = resolve_task("causal-lm", models(HEAD)[0])
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([[3, 4, 5, 6, 7, 8]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),
    }
    if labelled:
        batch["labels"] = batch["input_ids"]
    found = task.supervise_batch(batch)
    assert found.kd_weight.tolist() == [1, 1, 0, 1, 0, 0]
    if labelled:
        assert found.task_weight.tolist() == [1, 1, 0, 1, 0, 0]


class Masked(DataCollatorWithFlattening):
    """With a mask of ones, behind which Transformers takes the row for one text."""

    def __call__(self, rows: list[Any], *args: Any, **kwargs: Any) -> Any:
        batch = super().__call__(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def test_attention_that_crosses_is_refused(tmp_path: Path) -> None:
    """The student's, the teacher's; each is named, with what to do."""
    with pytest.raises(
        ValueError, match=r"(?s)the student lets texts.*Leave attention_mask out.*the teacher lets"
    ):
        train(tmp_path, Masked(), texts())
    student, teacher = models(HEAD)
    forward = teacher.forward
    teacher.forward = lambda input_ids, **rest: forward(input_ids)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the teacher lets texts that are packed") as error:
        train(tmp_path, DataCollatorWithFlattening(), texts(), (student, teacher))
    assert "the student" not in str(error.value)


def test_padded_rows_are_not_packed() -> None:
    """Positions that a padded row starts with are no text."""
    batch = Collator(HEAD, left=True)(rows_of(HEAD, 4))
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    assert second_text(batch) is None
    assert second_text({"input_ids": torch.ones(1, 4), "position_ids": torch.tensor([[0, 1, 0, 1]])}) == (
        0,
        2,
        4,
    )


def test_rows_grouped_by_length(tmp_path: Path) -> None:
    """Trap 15: a step has rows of one length; over a pass each row is seen once."""
    seen: list[list[int]] = []

    class Watching(Collator):
        def __call__(self, rows: list[Any]) -> Any:
            seen.append([len(row["input_ids"]) for row in rows])
            return super().__call__(rows)

    rows = rows_of(HEAD, 64, seed=7)
    student, teacher = models(HEAD)
    args = DistillationArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.0,
        train_sampling_strategy="group_by_length", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillationTrainer(
        student, args, teacher=teacher, train_dataset=rows, data_collator=Watching(HEAD)
    )
    trainer.check(training=True)
    seen.clear()
    trainer.train()
    assert sorted(n for batch in seen for n in batch) == sorted(len(row["input_ids"]) for row in rows)
    spread = [max(batch) - min(batch) for batch in seen]
    alone = [len(row["input_ids"]) for row in rows]
    shuffled = [max(alone[i : i + 4]) - min(alone[i : i + 4]) for i in range(0, 64, 4)]
    assert sum(spread) < sum(shuffled) / 2
