"""A distilled encoder in sentence-transformers: the folder is given to `SentenceTransformer` as it is.

A BERT stands for the teacher; a student of half its layers learns its sentence vectors (task "embedding"),
means over tokens, as sentence-transformers takes them. Needs `pip install sentence-transformers`.

    python examples/sentence_encoder.py
"""

from __future__ import annotations

import tempfile

import numpy as np
from datasets import Dataset
from rich.console import Console
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, set_seed

from hf_kd import DistillationArguments, DistillationTrainer, init_student
from hf_kd.data.processors import train_tokenizer

WORDS = ("river", "bank", "money", "boat", "loan", "water", "fish", "debt")


def encode(folder: str, texts: list[str]) -> np.ndarray:
    """`[N, H]` embeddings by sentence-transformers, of length 1."""
    return SentenceTransformer(folder, device="cpu").encode(texts, normalize_embeddings=True)


def main() -> dict[str, float]:
    """Distil and save; return the mean cosine to the teacher's embeddings, before and after."""
    set_seed(0)
    texts = [f"the {a} and the {b}" for a in WORDS for b in WORDS]
    tokenizer = train_tokenizer(texts, 300, task="embedding")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    teacher = BertModel(config)
    student = init_student(teacher, num_layers=2)
    folders = {name: tempfile.mkdtemp() for name in ("teacher", "before", "after")}
    for name, model in (("teacher", teacher), ("before", student)):
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    trainer = DistillationTrainer(
        student,
        DistillationArguments(
            output_dir=folders["after"],
            alpha=1.0,
            max_steps=40,
            learning_rate=3e-3,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        teacher=teacher,
        task="embedding",
        train_dataset=Dataset.from_dict(dict(tokenizer(texts))),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()

    wanted = encode(folders["teacher"], texts)
    found = {
        name: float((encode(folders[name], texts) * wanted).sum(1).mean()) for name in ("before", "after")
    }
    Console().print(found)
    return found


if __name__ == "__main__":
    main()
