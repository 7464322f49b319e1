"""Evaluation on text that the student generates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_kd import DistillationTrainer

from .heads import HEADS, Collator, models, rows_of
from .test_trainer import arguments, classifiers, text_rows


def test_predict_with_generate(tmp_path: Path) -> None:
    """`compute_metrics` gets generated ids; the losses stay those of teacher forcing."""
    head = HEADS["seq2seq-lm"]
    student, teacher = models(head, dtype=torch.float32)
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"rows": len(prediction.label_ids)}

    rows = rows_of(head, 5)

    def trainer(**options: object) -> DistillationTrainer:
        return DistillationTrainer(
            student, arguments(tmp_path, remove_unused_columns=False, per_device_eval_batch_size=2,
            **options), teacher=teacher, eval_dataset=rows, data_collator=Collator(head, dtype=torch.float32),
            compute_metrics=metrics,
        )  # fmt: skip

    generating = trainer(predict_with_generate=True, generation_max_length=7)
    scores = generating.evaluate()
    assert seen[0].predictions.shape == (5, 7)
    assert np.issubdtype(seen[0].predictions.dtype, np.integer)
    alone = student.generate(input_ids=torch.tensor([rows[0]["input_ids"]]), max_length=7)
    assert seen[0].predictions[0][: alone.shape[1]].tolist() == alone[0].tolist()
    assert generating.predict(rows, max_length=9).predictions.shape == (5, 9)
    plain = trainer()
    assert plain.evaluate()["eval_loss"] == pytest.approx(scores["eval_loss"])
    assert plain.evaluate()["eval_kl"] == pytest.approx(scores["eval_kl"])
    assert seen[-1].predictions[0].dtype == np.float32


def test_models_that_do_not_generate(tmp_path: Path) -> None:
    """A classifier has nothing to generate; options of generation need the switch."""
    student, teacher = classifiers()
    made = DistillationTrainer(
        student, arguments(tmp_path, predict_with_generate=True), teacher=teacher, eval_dataset=text_rows()
    )
    made.compute_metrics = lambda prediction: {}
    with pytest.raises(ValueError, match="BertForSequenceClassification does not"):
        made.evaluate()
    student, teacher = classifiers()
    made = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, eval_dataset=text_rows())
    with pytest.raises(ValueError, match=r"num_beams.*predict_with_generate=True"):
        made.evaluate(num_beams=2)
