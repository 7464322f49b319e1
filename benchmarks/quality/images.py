"""Image classification: a small ViT teaches one several times smaller, on digits and on MNIST.

    python benchmarks/quality/images.py --data digits                      # results/quality_digits.json
    python benchmarks/quality/images.py --data path/to/mnist_t10k          # results/quality_mnist.json
    python benchmarks/quality/images.py --data ylecun/mnist                # the same from the Hub

MNIST is its ten thousand test images, split in two: 5,000 to train on, 1,000 to choose by, 4,000 to test.
Every arm gets the same rows, steps, optimizer and schedule, with three seeds, which also initialise the
student, unless it is cut from its teacher; the best recipe is chosen on development rows.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import (
    BY_HAND,
    CANDIDATES,
    CONTROL,
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
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from hf_kd import init_student
from hf_kd.fresh import fresh_student
from hf_kd.measure import count_parameters, latency

# Beside the candidates for a default, what the papers take, on the same budget.
LOSSES = [
    Recipe("reverse_kl", options={"alpha": 0.9, "divergence": "reverse_kl", "temperature": 2.0}),
    Recipe("logit_mse", options={"alpha": 0.9, "divergence": "logit_mse", "temperature": 1.0}),
    Recipe("dkd", options={"alpha": 0.9, "divergence": "dkd", "temperature": 4.0}),
    Recipe("nkd", options={"alpha": 0.5, "divergence": "nkd", "temperature": 1.0}),
    Recipe("dist", options={"alpha": 0.9, "divergence": "dist", "temperature": 4.0}),
    Recipe("standardised_kl", options={"alpha": 0.9, "divergence": "standardised_kl", "temperature": 2.0}),
    Recipe("adaptive_kl", options={"alpha": 0.9, "divergence": "adaptive_kl", "temperature": 2.0}),
    Recipe("hard_labels", options={"alpha": 0.5, "divergence": "hard_labels", "temperature": 2.0}),
]
SEEDS = (0, 1, 2)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STUDENT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def main() -> None:
    """Teacher, then all arms seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-rows", type=int, default=None, help="default: 1000 of digits, 5000 of MNIST")
    parser.add_argument("--teacher-epochs", type=int, default=25)
    parser.add_argument("--epochs", type=int, default=None, help="default: 15 on digits, 20 on MNIST")
    parser.add_argument("--work", type=Path, default=Path("out/quality-images"), help="keeps the teacher")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the file of results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    small = args.data == "digits"
    name = "digits" if small else "mnist"
    pixels, labels = digits() if small else mnist(args.data)
    count = args.train_rows or (1000 if small else 5000)
    dev, test = (297, 500) if small else (1000, 4000)
    batch = 32 if small else 128
    budget = Budget(
        max_steps=(args.epochs or (15 if small else 20)) * count // batch,
        batch_size=batch,
        learning_rate=2e-3,
        warmup_steps=30,
    )
    settings = {"train_rows": count, "dev_rows": dev, "test_rows": test, **vars(budget), "student": STUDENT}
    record = Record(f"quality_{name}", minutes=args.minutes, settings=settings, folder=args.results)
    parts = {"test": slice(0, test), "dev": slice(test, test + dev), "train": slice(test + dev, None)}
    images = {split: pixels[where] for split, where in parts.items()}
    targets = {split: labels[where] for split, where in parts.items()}

    kept = args.work / name
    if not (kept / "config.json").exists():
        made = trained_teacher(images["train"], targets["train"], epochs=args.teacher_epochs)
        made.save_pretrained(kept)
    teacher = ViTForImageClassification.from_pretrained(kept).eval()
    known = {split: logits_of(teacher, batches(images[split])) for split in parts}
    record.taught_by({s: score(known[s], known[s], targets[s]) for s in ("dev", "test")})
    rows = rows_of(images["train"][:count], targets["train"][:count])

    def fresh(seed: int) -> PreTrainedModel:
        return fresh_student(teacher, {**STUDENT, **NO_DROPOUT}, seed=seed)

    def cut() -> PreTrainedModel:
        sizes = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64}
        student = init_student(teacher, **sizes, calibration={"pixel_values": images["train"][:256]})
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return student

    def arm(recipe: Recipe, seed: int, start: Callable[[int], PreTrainedModel] = fresh) -> None:
        def make() -> dict[str, Any]:
            set_seed(seed)
            student = start(seed)
            train(
                recipe,
                student,
                rows,
                known["train"],
                budget=budget,
                seed=seed,
                collator=default_data_collator,
                teacher=teacher,
            )
            return {
                split: score(logits_of(student, batches(images[split])), known[split], targets[split])
                for split in ("dev", "test")
            }

        record.run({"arm": recipe.name, "seed": seed}, make)

    for seed in SEEDS:
        for recipe in (CONTROL, SAME, BY_HAND, *CANDIDATES[:4], TEXTBREWER, *CANDIDATES[4:]):
            arm(recipe, seed)
        for recipe in (CONTROL, SAME):
            arm(replace(recipe, name=f"{recipe.name}, cut from the teacher"), seed, lambda _: cut())
    for seed, recipe in itertools.product(SEEDS, LOSSES if small else ()):
        arm(recipe, seed)
    record.note(best=described(best_on_dev(record, CANDIDATES)))
    models = {"teacher": teacher, "student": fresh(0)}
    times = latency(models, {"pixel_values": images["test"][:8]})
    record.note(
        sizes={name: count_parameters(model) for name, model in models.items()},
        latency_ms={name: time.median_ms for name, time in times.items()},
    )


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 images of 8 x 8 in a fixed random order."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 8 - 1
    return pixels, torch.tensor(data.target[order])


def mnist(name: str) -> tuple[Tensor, Tensor]:
    """The ten thousand test images, 28 x 28, in a fixed random order."""
    folder = Path(name)
    if folder.is_dir():
        with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
            raw = np.frombuffer(file.read(), dtype=np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
            target = np.frombuffer(file.read(), dtype=np.uint8, offset=8)
    else:
        from datasets import load_dataset

        data = load_dataset(name, split="test")
        raw, target = np.stack([np.asarray(image) for image in data["image"]]), np.asarray(data["label"])
    order = np.random.default_rng(0).permutation(len(target))
    pixels = torch.tensor(raw[order].astype(np.float32))[:, None] / 127.5 - 1
    return pixels, torch.tensor(target[order].astype(np.int64))


def rows_of(images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """As a data set that knows its row numbers."""
    return [
        {"pixel_values": image, "labels": int(label), "row": i}
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def batches(images: Tensor) -> Iterator[dict[str, Tensor]]:
    """All images in order."""
    return ({"pixel_values": part} for part in images.split(500))


def trained_teacher(images: Tensor, labels: Tensor, *, epochs: int) -> PreTrainedModel:
    """A ViT of four layers on all training rows."""
    size = images.shape[-1]
    set_seed(0)
    config = ViTConfig(
        image_size=size,
        patch_size=size // 4 if size > 8 else 4,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.2 if size == 8 else 0.1,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    budget = Budget(max_steps=-1, batch_size=64, learning_rate=1e-3, warmup_steps=50)
    args = TrainingArguments(**budget.arguments(0, num_train_epochs=epochs, remove_unused_columns=True))
    rows = rows_of(images, labels)
    collator = default_data_collator if size == 8 else shifted
    Trainer(model, args, train_dataset=rows, data_collator=collator).train()
    return model.eval()


def shifted(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch whose images are moved by up to two pixels, for the teacher alone."""
    batch = dict(default_data_collator(rows))
    shifts = torch.randint(-2, 3, (len(rows), 2)).tolist()
    moved = [x.roll(tuple(by), (-2, -1)) for x, by in zip(batch["pixel_values"], shifts, strict=True)]
    return {**batch, "pixel_values": torch.stack(moved)}


if __name__ == "__main__":
    main()
