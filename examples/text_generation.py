"""A distilled language model writes: with its own `generate`, and in `transformers.pipeline`.

A small Llama learns the text of a module of Python's standard library; a student with one of its layers is
distilled from its distribution, saved, and loaded as any other model:

    python examples/text_generation.py
"""

from __future__ import annotations

import inspect
import json
import tempfile
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, pipeline, set_seed

from hf_kd import DistillationArguments, DistillationTrainer, init_student
from hf_kd.data.processors import train_tokenizer

BLOCK = 48


def main() -> dict[str, str]:
    """Distil, save, generate in both ways; return what was written."""
    set_seed(0)
    text = inspect.getsource(json)
    tokenizer = train_tokenizer([text], 400)
    blocks = torch.tensor(tokenizer(text)["input_ids"]).split(BLOCK)
    rows = [{"input_ids": block, "labels": block} for block in blocks if len(block) == BLOCK]

    def train(model: Any, teacher: Any, folder: str) -> None:
        args = DistillationArguments(
            output_dir=folder,
            alpha=0.0 if teacher is None else 1.0,
            temperature=1.0,
            max_steps=40,
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

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    teacher = LlamaForCausalLM(config)
    train(teacher, None, tempfile.mkdtemp())
    folder = tempfile.mkdtemp()
    train(init_student(teacher, num_layers=1), teacher, folder)

    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("def load(", return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    write = pipeline("text-generation", model=folder)
    said = {
        "generate": tokenizer.decode(tokens[0]),
        "pipeline": write("def load(", max_new_tokens=12, do_sample=False)[0]["generated_text"],
    }
    Console().print(said)
    return said


if __name__ == "__main__":
    main()
