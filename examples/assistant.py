"""A distilled student drafts for its teacher: the same text with fewer calls of the large model.

A small Llama learns the text of a module of Python's standard library; a student with one of its layers is
distilled from it, once without training and once with, and drafts for it (speculative decoding, Leviathan et
al. 2023; in Transformers, `assistant_model`). What is generated is the teacher's own greedy text each time.

    python examples/assistant.py
"""

from __future__ import annotations

import inspect
import json
import tempfile

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from hf_kd import DistillationArguments, DistillationTrainer, init_student

BLOCK = 64


def rows(text: str) -> list[dict[str, torch.Tensor]]:
    """The text's bytes, in blocks."""
    ids = torch.tensor(list(text.encode("ascii", "ignore")))
    return [{"input_ids": block, "labels": block} for block in ids.split(BLOCK) if len(block) == BLOCK]


def train(
    model: PreTrainedModel, teacher: PreTrainedModel | None, data: list[dict[str, torch.Tensor]], steps: int
) -> None:
    """Train on the text alone, or on the teacher's distribution over it."""
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        args=DistillationArguments(
            output_dir=tempfile.mkdtemp(),
            alpha=0.0 if teacher is None else 1.0,
            temperature=1.0,
            max_steps=steps,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=16,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data,
    )
    trainer.train()


def generate(
    teacher: PreTrainedModel, prompt: torch.Tensor, assistant: PreTrainedModel | None
) -> tuple[list[int], int]:
    """The teacher's greedy continuation, and how often the teacher was called for it."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = teacher.register_forward_hook(count)
    made = teacher.generate(
        prompt,
        assistant_model=assistant,
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones_like(prompt),
    )
    hook.remove()
    return made[0].tolist(), calls


def main() -> dict[str, int]:
    """Calls of the teacher for 48 tokens: alone, with an untrained draft, with a distilled one."""
    set_seed(0)
    data = rows(inspect.getsource(json))[:64]
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    teacher = LlamaForCausalLM(config)
    train(teacher, None, data, 120)
    teacher.eval()
    untrained = init_student(teacher, num_layers=1).eval()
    student = init_student(teacher, num_layers=1)
    train(student, teacher, data, 80)
    prompt = data[3]["input_ids"][None, :32]
    alone, calls = generate(teacher, prompt, None)
    found = {"teacher alone": calls}
    for name, draft in (("untrained draft", untrained), ("distilled draft", student.eval())):
        text, found[name] = generate(teacher, prompt, draft)
        assert text == alone, "an assistant never changes what its model says"
    Console().print(found)
    return found


if __name__ == "__main__":
    main()
