"""Does choosing the target help? Each choice against plain distillation, on real data.

    python benchmarks/targets.py --data path/to/mnist_t10k        # results/targets_mnist.json
    python benchmarks/targets.py --data path/to/sst2              # results/targets_sst2.json
    python benchmarks/targets.py --data digits                    # scikit-learn's: no files needed
    python benchmarks/targets.py --table                          # the tables in docs/targets.md, anew

Images: the teacher is a small convolutional network, the student has one narrow hidden layer on the pixels.
Sentences: the teacher reads the mean of all-MiniLM-L6's last states, the student that of its word vectors;
the encoder is frozen, and run once. Data sets of the Hub serve as well (ylecun/mnist, SetFit/sst2).

Four cases, since a choice can only help where there is something to choose: all rows have labels; few have
(5 %); a part of the labels (40 %), the teacher's included, is replaced by random ones; the teacher has seen
few rows, while all labels are there. A teacher is trained once a case and asked once. All arms of a case take
the same steps from the same start, of each seed, on the same rows (labels alone: on those that have one). Dev
rows serve what is fitted, figures are of the test rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import default_data_collator

sys.path.insert(0, str(Path(__file__).parent / "quality"))
from arms import RESULTS, Answers, Budget, Record, score, spread
from images import digits, mnist

from hf_kd import DistillationArguments, DistillationTrainer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "targets.md"
ARMS: dict[str, dict[str, Any]] = {
    "labels alone": {"alpha": 0.0},
    "plain (T = 2)": {},
    "`temperature=auto`": {"temperature": "auto"},
    "`teacher_calibration`": {"teacher_calibration": True},
    "`target_correction=swap`": {"target_correction": "swap"},
    "`target_correction=drop`": {"target_correction": "drop"},
    "`kd_weighting=confidence`": {"kd_weighting": "confidence"},
    "`kd_weighting=entropy`": {"kd_weighting": "entropy"},
}
PLAIN = "plain (T = 2)"
_PLAIN = {"alpha": 0.5, "temperature": 2.0}
CASES = ("all labels", "few labels", "wrong labels", "weak teacher")
FEW, WRONG = 0.05, 0.4


@dataclass(frozen=True)
class Part:
    """Rows of one split: what the teacher reads, what the student reads, `[N, ...]`, and labels `[N]`."""

    rich: Tensor
    plain: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Study:
    """A data set, and who learns from whom."""

    parts: dict[str, Part]
    teacher: Callable[[], nn.Module]
    width: int
    budget: Budget


class Student(nn.Module):
    """One hidden layer."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, classes))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits `[B, C]` of `[B, inputs]`."""
        return {"logits": self.layers(features)}


def image_study(name: str, train_rows: int) -> Study:
    """Digits or MNIST, split in a fixed random order."""
    pixels, labels = digits() if name == "digits" else mnist(name)
    test, dev = (600, 300) if name == "digits" else (3000, 1000)
    cuts = {"test": slice(0, test), "dev": slice(test, test + dev)}
    cuts["train"] = slice(test + dev, test + dev + train_rows)
    parts = {split: Part(pixels[c], pixels[c].flatten(1), labels[c]) for split, c in cuts.items()}
    size, step = pixels.shape[-1], 1 if name == "digits" else 2

    def teacher() -> nn.Module:
        left = size // step // 2
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=step, padding=2), nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * left * left, 10),
        )  # fmt: skip

    return Study(parts, teacher, 16, Budget(300, 64, 5e-3, warmup_steps=20))


def sentence_study(name: str, train_rows: int) -> Study:
    """SST-2 as vectors of a frozen encoder, kept in a file when they are made."""
    from safetensors.torch import load_file, save_file
    from sst2 import Data, packaged_model
    from transformers import AutoModel

    kept = Path("out") / f"targets-{Path(name).name}-{train_rows}.safetensors"
    if not kept.exists():
        data = Data(name, packaged_model(), 32, None)
        data.rows["train"] = data.rows["train"].select(range(min(train_rows, len(data.rows["train"]))))
        encoder, made = AutoModel.from_pretrained(packaged_model()).eval(), {}
        for split in ("train", "dev", "test"):
            rich, plain = [], []
            for batch in data.batches(split):
                mask = batch["attention_mask"].unsqueeze(-1).float()
                with torch.no_grad():
                    last = encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
                    words = encoder.embeddings.word_embeddings(batch["input_ids"])
                rich.append((last * mask).sum(1) / mask.sum(1))
                plain.append((words * mask).sum(1) / mask.sum(1))
            made |= {f"{split}.rich": torch.cat(rich), f"{split}.plain": torch.cat(plain)}
            made[f"{split}.labels"] = data.labels(split)
        kept.parent.mkdir(exist_ok=True)
        save_file(made, kept)
    found = load_file(kept)
    scale = {x: found[f"train.{x}"].std(0, keepdim=True) for x in ("rich", "plain")}
    middle = {x: found[f"train.{x}"].mean(0, keepdim=True) for x in ("rich", "plain")}
    parts = {}
    for split in ("train", "dev", "test"):
        rich, plain = ((found[f"{split}.{x}"] - middle[x]) / scale[x] for x in ("rich", "plain"))
        parts[split] = Part(rich, plain, found[f"{split}.labels"])

    def teacher() -> nn.Module:
        return nn.Sequential(
            nn.Dropout(0.5), nn.Linear(384, 128), nn.GELU(), nn.Dropout(0.5), nn.Linear(128, 2)
        )

    return Study(parts, teacher, 8, Budget(300, 64, 3e-3, warmup_steps=20))


def trained_teacher(study: Study, labels: Tensor, rows: Tensor) -> nn.Module:
    """Trained on some rows until it has seen as many as 15 times all of them, at most 200 times its own."""
    torch.manual_seed(100)
    model, part = study.teacher(), study.parts["train"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    model.train()
    for _ in range(min(200, 15 * len(part.labels) // len(rows))):
        for index in rows[torch.randperm(len(rows))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(part.rich[index]), labels[index]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def case_of(study: Study, case: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Labels of the training rows, -100 where there are none, and what the teacher says of each split."""
    truth = study.parts["train"].labels
    labels, seen = truth.clone(), torch.arange(len(truth))
    few = int(FEW * len(truth))
    if case == "wrong labels":
        g = torch.Generator().manual_seed(1)
        wrong = torch.rand(len(truth), generator=g) < WRONG
        labels[wrong] = torch.randint(0, int(truth.max()) + 1, (int(wrong.sum()),), generator=g)
    if case == "weak teacher":
        seen = seen[:few]
    with torch.enable_grad():
        teacher = trained_teacher(study, labels, seen)
    if case == "few labels":
        labels[few:] = -100
    return labels, {split: teacher(part.rich) for split, part in study.parts.items()}


def rows_of(part: Part, labels: Tensor, first: int) -> list[dict[str, Any]]:
    """As a data set that knows its row numbers, counted from `first`."""
    return [
        {"features": x, "labels": int(y), "row": first + i}
        for i, (x, y) in enumerate(zip(part.plain, labels, strict=True))
    ]


def taught(study: Study, answers: Tensor, rows: Any, dev: Any, seed: int, options: Any) -> Any:
    """One student; the trainer that made it."""
    torch.manual_seed(seed)
    student = Student(study.parts["train"].plain.shape[1], study.width, answers.shape[1])
    trainer = DistillationTrainer(
        student,
        DistillationArguments(**study.budget.arguments(seed, **{**_PLAIN, **options})),
        teacher=Answers(answers),
        task="sequence-classification",
        train_dataset=rows,
        eval_dataset=dev,
        data_collator=default_data_collator,
    )
    trainer.train()
    student.eval()
    return trainer


def measure(study: Study, record: Record, seeds: int) -> None:
    """All cases and arms, seed by seed, so that what is stopped is balanced."""
    dev, test = study.parts["dev"], study.parts["test"]
    teachers = {}
    for case in CASES:
        labels, known = case_of(study, case)
        train = study.parts["train"]
        truth = score(known["train"], known["train"], train.labels)
        teachers[case] = {"test": score(known["test"], known["test"], test.labels), "train": truth}
        answers = torch.cat([known["train"], known["dev"]])
        rows, held = rows_of(train, labels, 0), rows_of(dev, dev.labels, len(train.labels))
        labelled = [row for row in rows if row["labels"] >= 0]

        def make(
            seed: int, name: str, answers: Any = answers, rows: Any = (rows, labelled), held: Any = held,
            known: Any = known["test"],
        ) -> dict[str, Any]:  # fmt: skip
            trainer = taught(study, answers, rows[ARMS[name].get("alpha") == 0.0], held, seed, ARMS[name])
            with torch.no_grad():
                logits = trainer.model(test.plain)["logits"]
            found: dict[str, Any] = {"test": score(logits, known, test.labels)}
            if trainer.settled is not None:
                found["settled"] = [trainer.settled.temperature, trainer.settled.calibration]
            return found

        for seed in range(seeds):
            for name in ARMS:
                record.run({"case": case, "arm": name, "seed": seed}, partial(make, seed, name))
    record.note(teachers=teachers)


# Heading, key, factor, digits.
SHOWN = (("accuracy, %", "accuracy", 100, 1), ("log loss, nats", "log_loss", 1, 3))


def tables(record: dict[str, Any]) -> list[str]:
    """Arms by cases, on test rows: plain as it is, the others by what they add to it, seed by seed."""
    lines = []
    for heading, key, factor, places in SHOWN:
        lines += [f"| {heading} | {' | '.join(CASES)} |", "|---|" + "--:|" * len(CASES)]
        own = [f"{factor * record['teachers'][case]['test'][key]:.{places}f}" for case in CASES]
        lines.append(f"| teacher | {' | '.join(own)} |")

        def runs(case: str, arm: str, key: str = key, factor: int = factor) -> list[float]:
            found = [r for r in record["runs"] if (r["case"], r["arm"]) == (case, arm)]
            return [factor * r["test"][key] for r in sorted(found, key=lambda r: r["seed"])]

        for arm in (PLAIN, *(name for name in ARMS if name != PLAIN)):
            cells = []
            for case in CASES:
                plain = runs(case, PLAIN)
                gains = [a - b for a, b in zip(runs(case, arm), plain, strict=True)]
                mean, deviation = spread(plain if arm == PLAIN else gains)
                sign = "" if arm == PLAIN else "+"
                cells.append(f"{mean:{sign}.{places}f} ± {deviation:.{places}f}")
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def renew_page(folder: Path) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`."""
    text = PAGE.read_text(encoding="utf-8")
    for path in sorted(folder.glob("targets_*.json")):
        lines = "\n".join(tables(json.loads(path.read_text(encoding="utf-8"))))
        mark = path.stem
        text = re.sub(
            f"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
            lambda m, lines=lines: f"{m[1]}{lines}\n{m[2]}", text, flags=re.DOTALL,
        )  # fmt: skip
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Train, write JSON and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data", default="digits", help="digits, or a folder or Hub id with mnist or sst in it"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-rows", type=int, default=None, help="default: 800 of digits, else 6000")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the file of results")
    parser.add_argument("--table", action="store_true", help="only renew the tables in the documentation")
    args = parser.parse_args()
    if args.table:
        renew_page(args.results)
        return
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    name = next((x for x in ("digits", "mnist", "sst") if x in args.data.lower()), None)
    if name is None:
        parser.error(f"--data {args.data}: its name should say digits, mnist or sst")
    rows = args.train_rows or (800 if name == "digits" else 6000)
    study = (sentence_study if name == "sst" else image_study)(args.data, rows)
    settings = {
        "train_rows": len(study.parts["train"].labels), "test_rows": len(study.parts["test"].labels),
        "few": FEW, "wrong": WRONG, "student_width": study.width, **vars(study.budget),
    }  # fmt: skip
    mark = "sst2" if name == "sst" else name
    record = Record(f"targets_{mark}", minutes=args.minutes, settings=settings, folder=args.results)
    measure(study, record, args.seeds)
    print("\n".join(tables(record.data)))


if __name__ == "__main__":
    main()
