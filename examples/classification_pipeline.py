"""A distilled classifier in `transformers.pipeline`, from its folder alone: using it takes nothing of hf_kd.

A small BERT learns which of two kinds of sentence it sees; one of its layers is distilled from it:

    python examples/classification_pipeline.py
"""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import BertConfig, BertForSequenceClassification, pipeline, set_seed

from hf_kd import DistillationArguments, DistillationTrainer, init_student
from hf_kd.data.processors import train_tokenizer

GOOD, BAD = ("warm", "funny", "clever", "moving"), ("dull", "cold", "slow", "hollow")


def main() -> list[dict[str, Any]]:
    """Distil, save, load with the pipeline; return its answers to a good and a bad sentence."""
    set_seed(0)
    texts = [
        f"a {word} film, {word} and {other}" for words in (GOOD, BAD) for word in words for other in words
    ]
    labels = [0 if any(word in text for word in GOOD) else 1 for text in texts]
    tokenizer = train_tokenizer(texts, 300, task="sequence-classification")
    rows = Dataset.from_dict({**tokenizer(texts), "labels": labels})

    def train(model: Any, teacher: Any, folder: str) -> None:
        args = DistillationArguments(
            output_dir=folder,
            alpha=0.0 if teacher is None else 0.9,
            max_steps=30,
            learning_rate=5e-3,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            model, args, teacher=teacher, train_dataset=rows, processing_class=tokenizer
        )
        trainer.train()
        trainer.save_model()

    teacher = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            id2label={0: "good", 1: "bad"},
            label2id={"good": 0, "bad": 1},
        )
    )
    train(teacher, None, tempfile.mkdtemp())
    folder = tempfile.mkdtemp()
    train(init_student(teacher, num_layers=1), teacher, folder)

    classify = pipeline("text-classification", model=folder)
    answers = classify(["a clever film, warm and clever", "a slow film, slow and hollow"])
    Console().print(answers)
    return answers


if __name__ == "__main__":
    main()
