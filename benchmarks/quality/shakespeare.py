"""Language modelling: a small Llama teaches a smaller one; perplexity at equal steps.

    python benchmarks/quality/shakespeare.py --data path/to/input.txt      # results/quality_shakespeare.json
    python benchmarks/quality/shakespeare.py --data karpathy/tiny_shakespeare

The text is cut 90 : 5 : 5 into training, development and test; the tokenizer is a byte-level BPE made from
the first. Every arm gets the same blocks, steps, optimizer and schedule. Students of three shapes, wide,
between, and deep, have nearly as many parameters. Perplexities are per token of that tokenizer, so they
compare with each other and with nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from arms import (
    BY_HAND,
    CANDIDATES,
    CONTROL,
    RESULTS,
    SAME,
    Budget,
    ByHand,
    Recipe,
    Record,
    best_on_dev,
    described,
    score,
    train,
)
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_kd import init_student
from hf_kd.measure import count_parameters, latency

VOCABULARY, BLOCK = 1024, 64
SEEDS = (0, 1, 2)
#: Width and layers of students with 0.31 to 0.33 million parameters.
SHAPES = {"96 x 2": (96, 2), "128 x 1": (128, 1), "80 x 3": (80, 3)}
FEATURES = Recipe("forward_kl, T=1, hidden", options={"alpha": 0.9, "temperature": 1.0, "hidden_weight": 1.0})
TRIED = [*CANDIDATES[:-1], FEATURES]


def main() -> None:
    """Teacher; all arms on one shape and seed; what matters on all seeds; the best on the other shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument(
        "--work", type=Path, default=Path("out/quality-shakespeare"), help="keeps the teacher"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the file of results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    budget = Budget(max_steps=args.steps, batch_size=8, learning_rate=2e-3, warmup_steps=20)
    settings = {**vars(budget), "teacher_steps": args.teacher_steps, "vocabulary": VOCABULARY, "block": BLOCK}
    record = Record("quality_shakespeare", minutes=args.minutes, settings=settings, folder=args.results)
    blocks = tokens_of(text_of(args.data))
    blocks["dev"], blocks["test"] = blocks["dev"][:60], blocks["test"][:150]
    teacher = teacher_in(args.work, blocks["train"], args.teacher_steps)
    # As many blocks as the steps need, or all of them again; every arm sees the same ones.
    some = blocks["train"][: budget.max_steps * budget.batch_size]
    known = {"train": logits(teacher, some), **{s: logits(teacher, blocks[s]) for s in ("dev", "test")}}
    rows = rows_of(some)
    record.taught_by({s: measured(known[s], known[s], blocks[s]) for s in ("dev", "test")})

    def student(shape: str, seed: int) -> PreTrainedModel:
        if shape == "96 x 2, cut":
            heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
            sizes = {"num_layers": 2, "hidden_size": 96, "intermediate_size": 256, **heads}
            return init_student(teacher, **sizes, calibration={"input_ids": some[:16]}).train()
        return llama(*SHAPES[shape], seed)

    def arm(recipe: Recipe, seed: int, shape: str) -> None:
        def make() -> dict[str, Any]:
            set_seed(seed)
            model = student(shape, seed)
            train(
                recipe,
                model,
                rows,
                known["train"],
                budget=budget,
                seed=seed,
                collator=default_data_collator,
                by_hand=TokensByHand,
                teacher=teacher,
            )
            return {
                split: measured(logits(model, blocks[split]), known[split], blocks[split])
                for split in ("dev", "test")
            }

        record.run({"shape": shape, "arm": recipe.name, "seed": seed}, make)

    for recipe in (CONTROL, SAME, BY_HAND, *TRIED):
        arm(recipe, 0, "96 x 2")
    best = best_on_dev(record, TRIED, shape="96 x 2", seed=0)
    record.note(best=described(best))
    for seed, recipe in itertools.product(SEEDS, (CONTROL, SAME, BY_HAND, best, *TRIED)):
        arm(recipe, seed, "96 x 2")
    others = ("96 x 2, cut", "128 x 1", "80 x 3")
    for seed, shape, recipe in itertools.product(SEEDS, others, (CONTROL, best)):
        arm(recipe, seed, shape)
    models = {"teacher": teacher, **{shape: student(shape, 0) for shape in SHAPES}}
    times = latency(models, {"input_ids": blocks["test"][:8]})
    record.note(
        sizes={name: count_parameters(model) for name, model in models.items()},
        latency_ms={name: time.median_ms for name, time in times.items()},
    )


def teacher_in(folder: Path, blocks: Tensor, steps: int) -> PreTrainedModel:
    """The larger Llama, trained once."""
    if not (folder / "config.json").exists():
        model = llama(192, 3, 0)
        budget = Budget(max_steps=steps, batch_size=8, learning_rate=1e-3, warmup_steps=40)
        args = TrainingArguments(**budget.arguments(0, remove_unused_columns=True))
        wiring = {"train_dataset": rows_of(blocks), "data_collator": default_data_collator}
        Trainer(model, args, **wiring).train()
        model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


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
def logits(model: PreTrainedModel, blocks: Tensor) -> Tensor:
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
