"""What losses on layers add to a step: hooks, and the comparison of four pairs of layers.

    python benchmarks/features.py            # a table and benchmarks/results/features.json
    python benchmarks/features.py --steps 10

A step is `compute_loss` and its backward pass, through a `DistillationTrainer`, on one batch in memory. All
variants take turns step by step in one process, in an order that changes; what is compared is processor time,
as the median over rounds of the ratio to the step without losses on layers: a processor's speed drifts.
"hooks" captures what "hidden" compares, and compares nothing. All on the CPU, one thread, fp32. Memory that
is freed stays with the process: else a variant pays for what the one before it gave back.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.measure import machine

TARGET = 1.10
WARMUP = 2
RESULTS = Path(__file__).parent / "results" / "features.json"
Batch = dict[str, Tensor]

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "hooks": {"hidden_weight": 1.0},
    "hidden": {"hidden_weight": 1.0},
    "hidden, mse": {"hidden_weight": 1.0, "hidden_loss": "mse"},
    "relation vv": {"relation_weight": 1.0},
    "relation qq,kk,vv": {"relation_weight": 1.0, "relations": "qq,kk,vv"},
    "hidden + relation + embedding + last": {
        "hidden_weight": 1.0, "relation_weight": 1.0, "embedding_weight": 1.0, "last_hidden_weight": 1.0,
    },
    "attention": {"attention_weight": 1.0},
}  # fmt: skip


def bert(width: int, layers: int) -> nn.Module:
    """A classifier."""
    config = BertConfig(
        vocab_size=8192, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
        intermediate_size=4 * width, num_labels=2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def llama(width: int, layers: int) -> nn.Module:
    """A language model."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 64, intermediate_size=3 * width,
    )  # fmt: skip
    return LlamaForCausalLM(config)


#: Name -> (model of a width and a number of layers, student width, teacher width, rows, tokens a row).
WORKLOADS: dict[str, tuple[Callable[[int, int], nn.Module], int, int, int, int]] = {
    "bert, equal widths": (bert, 256, 256, 16, 128),
    "bert, projections": (bert, 192, 256, 16, 128),
    "llama, equal widths": (llama, 256, 256, 8, 128),
}


def batch_of(name: str, rows: int, length: int) -> Batch:
    """Random tokens."""
    torch.manual_seed(1)
    ids = torch.randint(5, 8192, (rows, length))
    labels = ids if name.startswith("llama") else ids[:, 0] % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step_of(name: str, variant: str, folder: str) -> tuple[Callable[[], Any], Any]:
    """One step of a variant, and the context in which it runs."""
    build, narrow, wide, rows, length = WORKLOADS[name]
    torch.manual_seed(0)
    student, teacher = build(narrow, 4), build(wide, 8)
    trainer = DistillationTrainer(
        student,
        DistillationArguments(
            output_dir=folder, temperature=2.0, use_cpu=True, disable_tqdm=True, **VARIANTS[variant]
        ),
        teacher=teacher,
    )
    student.train()
    batch = batch_of(name, rows, length)
    if variant == "hooks":
        trainer.features.add = lambda terms, *args, **kwargs: terms  # type: ignore[method-assign]

    def step() -> None:
        student.zero_grad()
        trainer.compute_loss(student, dict(batch)).backward()

    return step, trainer.features.ready


def compare(name: str, steps: int, folder: str) -> dict[str, dict[str, float]]:
    """Each variant's least processor time, and the median over rounds of its ratio to the step without."""
    found = {variant: step_of(name, variant, folder) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    order = list(VARIANTS)
    for round_ in range(WARMUP + steps):
        order = order[1:] + order[:1]
        for variant in order:
            step, ready = found[variant]
            with ready():
                start = time.process_time()
                step()
                spent = time.process_time() - start
            if round_ >= WARMUP:
                times[variant].append(spent)
    return {
        variant: {
            "least_milliseconds": round(1000 * min(spent), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(spent, times["none"], strict=True)), 4),
        }
        for variant, spent in times.items()
    }


def keep_memory() -> None:
    """Let glibc, where it is what allocates, neither return memory to the system nor map it anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold = -1, -3
    for name in (trim_threshold, mmap_threshold):
        if mallopt is not None and not mallopt(name, 2**31 - 1):
            raise SystemExit("this C library does not let its thresholds be set")


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="default: all")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    results: dict[str, Any] = {"machine": machine("cpu"), "target": TARGET, "steps": {}, "workloads": {}}
    if args.workload and args.output.exists():  # the others stay as they are
        results = {**results, **json.loads(args.output.read_text(encoding="utf-8"))}
    table = Table(box=SIMPLE_HEAD, title="processor time of a step, relative to none")
    table.add_column("4 pairs of layers")
    chosen = args.workload or list(WORKLOADS)
    for name in chosen:
        table.add_column(name, justify="right")
        with tempfile.TemporaryDirectory() as folder:
            results["workloads"][name] = compare(name, args.steps, folder)
        results["steps"][name] = args.steps
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for variant in VARIANTS:
        table.add_row(variant, *(f"{results['workloads'][name][variant]['ratio']:.3f}" for name in chosen))
    Console().print(table)


if __name__ == "__main__":
    main()
