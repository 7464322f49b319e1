"""An ordinary Trainer script for text classification, and the three lines that make it distil.

    python examples/from_run_glue.py --teacher textattack/bert-base-uncased-SST-2 --layers 4 \
        --dataset stanfordnlp/sst2 --text sentence

`--dataset` is a Hub id, or a csv file with the columns that `--text` and `label` name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction

from hf_kd import DistillationArguments, DistillationTrainer, init_student  # instead of Trainer's


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train a student; return its metrics on the evaluation rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--layers", type=int, required=True, help="layers of the student")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--text", default="sentence", help="column of the text")
    parser.add_argument("--output_dir", default="out/glue")
    parser.add_argument("--epochs", type=float, default=3)
    options = parser.parse_args(argv)

    if options.dataset.endswith(".csv"):
        data = load_dataset("csv", data_files=options.dataset)["train"].train_test_split(0.1, seed=0)
    else:
        data = load_dataset(options.dataset)
        data["test"] = data["validation"]
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    data = data.map(lambda row: tokenizer(row[options.text], truncation=True, max_length=128), batched=True)

    teacher = AutoModelForSequenceClassification.from_pretrained(options.teacher)
    model = init_student(teacher, num_layers=options.layers)

    def metrics(predicted: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}

    args = DistillationArguments(  # TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        learning_rate=5e-5,
        eval_strategy="epoch",
        report_to="none",
    )
    trainer = DistillationTrainer(  # Trainer(
        model=model,
        teacher=teacher,  # and nobody else
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()


if __name__ == "__main__":
    main()
