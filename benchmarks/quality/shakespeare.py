"""Language modelling: a small Llama teaches a smaller one; perplexity at equal steps.

    python benchmarks/quality/shakespeare.py --data path/to/input.txt      # results/quality_shakespeare.json
    python benchmarks/quality/shakespeare.py --data karpathy/tiny_shakespeare

The text is cut 90 : 5 : 5 into training, development and test; the tokenizer is a byte-level BPE made from
the first. Every arm gets the same blocks, steps, optimizer and schedule. Perplexities are per token of
that tokenizer, so they compare with each other and with nothing else.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from arms import (
    BY_HAND,
    CONTROL,
    DEFAULT,
    RESULTS,
    Budget,
    ByHand,
    Recipe,
    Record,
    described,
    score,
    train,
)
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_kd.measure import count_parameters, latency

CANDIDATES = [
    Recipe("alpha=0.9, T=1", options={"alpha": 0.9, "temperature": 1.0}),
    Recipe("alpha=1, T=1", options={"alpha": 1.0, "temperature": 1.0}),
    Recipe("adaptive_kl, alpha=0.9, T=1",
           options={"alpha": 0.9, "temperature": 1.0, "divergence": "adaptive_kl"}),
    Recipe("skew_kl, alpha=0.9, T=1", options={"alpha": 0.9, "temperature": 1.0, "divergence": "skew_kl"}),
]  # fmt: skip
VOCABULARY, BLOCK = 1024, 64
SEEDS = (0, 1, 2)


def main() -> None:
    """Teacher, candidates on one seed, then all arms seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the file of results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    budget = Budget(max_steps=args.steps, batch_size=8, learning_rate=2e-3, warmup_steps=20)
    settings = {**vars(budget), "teacher_steps": args.teacher_steps, "vocabulary": VOCABULARY, "block": BLOCK}
    record = Record("quality_shakespeare", minutes=args.minutes, settings=settings, folder=args.results)
    blocks = tokens_of(text_of(args.data))
    blocks["dev"], blocks["test"] = blocks["dev"][:60], blocks["test"][:150]

    teacher = llama(192, 3, 0)
    teaching = Budget(max_steps=args.teacher_steps, batch_size=8, learning_rate=1e-3, warmup_steps=40)
    options = teaching.arguments(0, remove_unused_columns=True)
    data = rows_of(blocks["train"])
    Trainer(
        teacher, TrainingArguments(**options), train_dataset=data, data_collator=default_data_collator
    ).train()
    # One pass over as many blocks as the steps need; every arm sees the same ones.
    some = blocks["train"][: budget.max_steps * budget.batch_size]
    known = {"train": logits(teacher, some), **{s: logits(teacher, blocks[s]) for s in ("dev", "test")}}
    rows = rows_of(some)
    record.note(teacher={s: measured(known[s], known[s], blocks[s]) for s in ("dev", "test")})

    def arm(recipe: Recipe, seed: int) -> None:
        def make() -> dict[str, Any]:
            student = llama(96, 2, seed)
            train(
                recipe,
                student,
                rows,
                known["train"],
                budget=budget,
                seed=seed,
                collator=default_data_collator,
                by_hand=TokensByHand,
            )
            return {
                split: measured(logits(student, blocks[split]), known[split], blocks[split])
                for split in ("dev", "test")
            }

        record.run({"arm": recipe.name, "seed": seed}, make)

    for recipe in (CONTROL, DEFAULT, *CANDIDATES):
        arm(recipe, 0)
    tried = [
        (r["dev"]["log_loss"], recipe) for recipe in CANDIDATES for r in record.of(arm=recipe.name, seed=0)
    ]
    best = min(tried, key=lambda pair: pair[0])[1] if tried else CANDIDATES[0]
    record.note(best=described(best))
    for seed in SEEDS:
        for recipe in (CONTROL, DEFAULT, best, BY_HAND):
            arm(recipe, seed)
    models = {"teacher": teacher, "student": llama(96, 2, 0)}
    times = latency(models, {"input_ids": blocks["test"][:8]})
    record.note(
        sizes={name: count_parameters(model) for name, model in models.items()},
        latency_ms={name: time.median_ms for name, time in times.items()},
    )


class TokensByHand(ByHand):
    """The same for a language model: logits of all positions, as one long batch."""

    def flat(self, logits: Tensor) -> Tensor:
        """`[tokens, V]`."""
        return logits.float().flatten(0, 1)


def text_of(name: str) -> str:
    """A text file, or a data set of the Hub."""
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    from datasets import load_dataset

    return "".join(row["text"] for part in load_dataset(name).values() for row in part)


def tokens_of(text: str, *, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """`[blocks, BLOCK]` token ids of each part."""
    cuts = [0, int(0.9 * len(text)), int(0.95 * len(text)), len(text)]
    parts = dict(
        zip(("train", "dev", "test"), (text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)), strict=True)
    )
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        parts["train"].splitlines(keepends=True), vocab_size=vocabulary, show_progress=False
    )
    blocks = {}
    for name, part in parts.items():
        ids = torch.tensor(tokenizer.encode(part).ids)
        blocks[name] = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    order = torch.randperm(len(blocks["train"]), generator=torch.Generator().manual_seed(0))
    blocks["train"] = blocks["train"][order]
    return blocks


def rows_of(blocks: Tensor) -> list[dict[str, Any]]:
    """As a data set that knows its row numbers."""
    return [{"input_ids": ids, "labels": ids, "row": i} for i, ids in enumerate(blocks)]


def llama(width: int, layers: int, seed: int, *, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A Llama with tied embeddings."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def logits(model: LlamaForCausalLM, blocks: Tensor) -> Tensor:
    """`[blocks, BLOCK, V]`, in half precision: they are many."""
    model.eval()
    return torch.cat([model(input_ids=part).logits.half() for part in blocks.split(32)])


def measured(student: Tensor, teacher: Tensor, blocks: Tensor) -> dict[str, float]:
    """Scores of the next tokens, and the perplexity."""
    flat = [x[:, :-1].float().flatten(0, 1) for x in (student, teacher)]
    found = score(flat[0], flat[1], blocks[:, 1:].flatten())
    return {**found, "perplexity": math.exp(found["log_loss"])}


if __name__ == "__main__":
    main()
