"""Does choosing the target help? Each choice against plain distillation, on scikit-learn's digits.

    python benchmarks/targets.py [--seeds 3] [--rows 300] [--noise 0.0]

A teacher of 256 hidden units is trained once on the training rows, with labels; every student has 12, starts
alike within a seed and takes the same steps. `--noise` is the share of training labels, the teacher's
included, that are replaced by random ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_kd import DistillationArguments, DistillationTrainer

ARMS: dict[str, dict[str, Any]] = {
    "labels alone": {"alpha": 0.0},
    "plain": {},
    "temperature='auto'": {"temperature": "auto"},
    "teacher_calibration": {"teacher_calibration": True},
    "target_correction='swap'": {"target_correction": "swap"},
    "target_correction='drop'": {"target_correction": "drop"},
    "kd_weighting='confidence'": {"kd_weighting": "confidence"},
    "kd_weighting='entropy'": {"kd_weighting": "entropy"},
    "three teachers, fixed": {"several": True},
    "three teachers, learned": {"several": True, "ensemble_weighting": "learned"},
    "three teachers, confidence": {"several": True, "ensemble_weighting": "confidence"},
    "int8-dynamic teacher": {"teacher_quantization": "int8-dynamic"},
    "self_teacher='ema'": {"self_teacher": "ema", "ema_decay": 0.95},
}


class Digits(nn.Module):
    """A classifier with one hidden layer on 64 pixels."""

    def __init__(self, width: int, seed: int) -> None:
        """Start from a seed."""
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Logits `[B, 10]` of images `[B, 64]`."""
        return {"logits": self.layers(pixel_values)}


def data(rows: int, noise: float) -> tuple[Dataset, Dataset, Dataset]:
    """Training, validation (for what is fitted) and test rows."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 8 - 1, labels[order]
    given = labels.copy()
    wrong = np.random.default_rng(1).random(rows) < noise
    given[:rows][wrong] = np.random.default_rng(2).integers(0, 10, wrong.sum())
    parts = (slice(0, rows), slice(rows, rows + 300), slice(rows + 300, None))
    made = (Dataset.from_dict({"pixel_values": images[p], "labels": given[p]}) for p in parts)
    train, validation, test = (part.with_format("numpy") for part in made)
    return train, validation, test


def train(student: Any, teacher: Any, train_rows: Any, eval_rows: Any, *, seed: int, **options: Any) -> Any:
    """One training run of 200 steps."""
    with TemporaryDirectory() as folder:
        args = DistillationArguments(
            output_dir=folder,
            **{"alpha": 0.5, **options},
            max_steps=200,
            per_device_train_batch_size=64,
            learning_rate=5e-3,
            warmup_steps=20,
            save_strategy="no",
            logging_steps=200,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = DistillationTrainer(
            student,
            args,
            teacher=teacher,
            task="image-classification",
            train_dataset=train_rows,
            eval_dataset=eval_rows,
        )
        trainer.train()
    return trainer


def accuracy(network: Any, rows: Any) -> float:
    """Share of right answers, percent."""
    network.eval()
    with torch.no_grad():
        logits = network(pixel_values=torch.as_tensor(np.asarray(rows["pixel_values"][:])))["logits"]
    return 100 * float((logits.argmax(-1) == torch.as_tensor(np.asarray(rows["labels"][:]))).float().mean())


def main() -> None:
    """Train, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "targets.json")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    train_rows, validation, test = data(options.rows, options.noise)
    teachers = [
        train(Digits(256, 10 + i), None, train_rows, validation, seed=10 + i, alpha=0.0).model
        for i in range(3)
    ]
    scores: dict[str, list[float]] = {"teacher": [accuracy(teachers[0], test)]}
    settled: dict[str, list[Any]] = {}
    for seed in range(options.seeds):
        for name, arm in ARMS.items():
            own = dict(arm)
            several = own.pop("several", False)
            teacher: Any = list(teachers) if several else teachers[0]
            if "self_teacher" in own or own.get("alpha") == 0.0:
                teacher = None
            trainer = train(Digits(12, seed), teacher, train_rows, validation, seed=seed, **own)
            scores.setdefault(name, []).append(accuracy(trainer.model, test))
            if trainer.settled is not None:
                found = trainer.settled
                settled.setdefault(name, []).append([found.temperature, found.calibration, found.weights])
    plain = scores["plain"]
    result: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items() if k != "output"}}
    result["minutes"] = round((time.monotonic() - start) / 60, 2)
    result["test_rows"] = len(test)
    result["arms"] = {}
    for name, values in scores.items():
        entry: dict[str, Any] = {"accuracy": values, "mean": statistics.fmean(values)}
        line = f"{name:<28} {entry['mean']:6.2f}"
        if len(values) > 1:
            entry["spread"] = statistics.stdev(values)
            gains = [a - b for a, b in zip(values, plain, strict=True)]
            entry |= {"gain": statistics.fmean(gains), "gain_spread": statistics.stdev(gains)}
            line += f" +- {entry['spread']:.2f}   gain {entry['gain']:+.2f} +- {entry['gain_spread']:.2f}"
        if name in settled:
            entry["settled"] = settled[name]
        result["arms"][name] = entry
        print(line)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
