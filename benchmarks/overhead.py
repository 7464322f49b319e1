"""What the trainer costs over a bare loop that does the same work.

    python benchmarks/overhead.py             # all workloads: a table and benchmarks/results/overhead.json
    python benchmarks/overhead.py --steps 10 --workload causal-lm

The bare loop is what one would write by hand: teacher forward without gradient, student forward and backward,
the same loss, clipping and optimizer, on batches that are already in memory: no data loader, log or checks.

Speed: the two take turns step by step in one process, so that whatever else the machine does falls on both;
the ratio is the median over pairs of steps, and the CPU ratio that of processor time, which other programs do
not change. Memory: each variant in a process of its own, peak resident size. All on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.utils import logging as transformers_logging

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.measure import count_parameters, machine

ALPHA, TEMPERATURE, LEARNING_RATE = 0.5, 2.0, 1e-4
SPEED_TARGET, MEMORY_TARGET, STEP_TARGET_MS = 0.97, 1.02, 200
WARMUP = 3
RESULTS = Path(__file__).parent / "results" / "overhead.json"

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """Two models and a batch shape."""

    models: Callable[[], tuple[nn.Module, nn.Module]]
    rows: int
    length: int
    vocabulary: int
    causal: bool

    def data(self, steps: int) -> list[dict[str, Any]]:
        """Random rows of one length for `steps` batches."""
        torch.manual_seed(1)
        ids = torch.randint(0, self.vocabulary, (self.rows * steps, self.length))
        mask = torch.ones(self.length, dtype=torch.long)
        return [{"input_ids": row, "attention_mask": mask, "labels": self._label(row)} for row in ids]

    def _label(self, row: Tensor) -> Any:
        return row if self.causal else int(row[0]) % 2


def classifiers() -> tuple[nn.Module, nn.Module]:
    """Two small BERTs, one cut to half the depth of the other."""
    shape = {"vocab_size": 30_522, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    return tuple(
        BertForSequenceClassification(BertConfig(**shape, num_hidden_layers=layers)) for layers in (4, 2)
    )


def language_models() -> tuple[nn.Module, nn.Module]:
    """Two Llama-style models with a vocabulary that makes the logits matter."""
    shape = {
        "vocab_size": 16_384,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "use_cache": False,
    }
    return tuple(
        LlamaForCausalLM(
            LlamaConfig(**shape, hidden_size=size, intermediate_size=3 * size, num_hidden_layers=layers)
        )
        for size, layers in ((256, 4), (128, 2))
    )


WORKLOADS = {
    "classification": Workload(classifiers, rows=16, length=64, vocabulary=30_522, causal=False),
    "causal-lm": Workload(language_models, rows=4, length=128, vocabulary=16_384, causal=True),
}


class BareLoop:
    """The loop by hand, one step at a time."""

    def __init__(self, teacher: nn.Module, student: nn.Module, workload: Workload, steps: int) -> None:
        self.teacher, self.student, self.causal = (
            teacher.eval().requires_grad_(False),
            student.train(),
            workload.causal,
        )
        arguments = make_arguments("unused", workload, steps)
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        self.optimizer = optimizer(self.student.parameters(), **options)
        rows = workload.data(steps)
        size = workload.rows
        self.batches: Iterator[Batch] = iter(
            [default_data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]
        )

    def step(self) -> None:
        """One optimizer step."""
        batch = next(self.batches)
        labels = batch.pop("labels")
        with torch.no_grad():
            target = self.teacher(**batch).logits
        self.loss(self.student(**batch).logits, target, labels).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """The mix of cross-entropy and KL, from PyTorch's own functions."""
        if self.causal:
            labels = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
            logits, target = logits.flatten(0, 1), target.flatten(0, 1)
        log_q = F.log_softmax(logits / TEMPERATURE, dim=-1)
        log_p = F.log_softmax(target / TEMPERATURE, dim=-1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        keep = labels != -100
        kd = (kl * keep).sum() / keep.sum() * TEMPERATURE**2
        return (1 - ALPHA) * F.cross_entropy(logits, labels) + ALPHA * kd


class Turns(TrainerCallback):
    """After each step of the trainer, one of the bare loop; keeps what both took, as `clock` reads it."""

    def __init__(self, bare: BareLoop | None) -> None:
        self.bare = bare
        self.trainer_steps: list[tuple[float, float]] = []
        self.bare_steps: list[tuple[float, float]] = []
        self.resumed = clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The trainer's step began when this method last returned: all that it does in between counts."""
        if self.bare is not None:
            self.trainer_steps.append(since(self.resumed))
            start = clock()
            self.bare.step()
            self.bare_steps.append(since(start))
        self.resumed = clock()


def clock() -> tuple[float, float]:
    """Seconds on the wall and of the processor: the second does not count the time of other programs."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds since `start`."""
    now = clock()
    return now[0] - start[0], now[1] - start[1]


def make_arguments(folder: str, workload: Workload, steps: int) -> DistillationArguments:
    """Trainer's defaults but for what touches the disk or the terminal."""
    return DistillationArguments(
        output_dir=folder,
        alpha=ALPHA,
        temperature=TEMPERATURE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=workload.rows,
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def make_trainer(
    teacher: nn.Module, student: nn.Module, workload: Workload, steps: int, folder: str, turns: Turns
) -> DistillationTrainer:
    """The trainer as any script makes it."""
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=make_arguments(folder, workload, steps),
        train_dataset=workload.data(steps),
        data_collator=default_data_collator,
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def speed(workload: Workload, steps: int) -> dict[str, Any]:
    """Rows (examples) per second of both, and the median ratio over pairs of steps."""
    torch.manual_seed(0)
    teacher, student = workload.models()
    _, twin = workload.models()
    twin.load_state_dict(student.state_dict())
    turns = Turns(BareLoop(teacher, twin, workload, WARMUP + steps))
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(teacher, student, workload, WARMUP + steps, folder, turns).train()
    pairs = list(zip(turns.trainer_steps, turns.bare_steps, strict=True))[WARMUP:]
    trainer, bare = (statistics.median(step[0] for step in side) for side in zip(*pairs, strict=True))
    low, ratio, high = statistics.quantiles([b[0] / t[0] for t, b in pairs], n=4)
    return {
        "parameters": {"teacher": count_parameters(teacher), "student": count_parameters(student)},
        "batch": [workload.rows, workload.length],
        "pairs": len(pairs),
        "step_ms": {"trainer": 1000 * trainer, "bare": 1000 * bare},
        "rows_per_second": {"trainer": workload.rows / trainer, "bare": workload.rows / bare},
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "processor_ratio": statistics.median(b[1] / t[1] for t, b in pairs),
    }


def peak(name: str, variant: str, steps: int) -> dict[str, int]:
    """Peak resident bytes of this process after training, and before its first step."""
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    teacher, student = workload.models()
    with tempfile.TemporaryDirectory() as folder:
        if variant == "trainer":
            trainer = make_trainer(teacher, student, workload, steps, folder, Turns(None))
            before = resident()
            trainer.train()
        else:
            loop = BareLoop(teacher, student, workload, steps)
            before = resident()
            for _ in range(steps):
                loop.step()
    return {"before": before, "peak": resident()}


def resident() -> int:
    """Peak resident bytes of this process so far."""
    gc.collect()
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux starts it at what the parent held when it started this process.
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(name: str, repeats: int, steps: int) -> dict[str, Any]:
    """Median peak of each variant over processes of their own."""
    peaks: dict[str, list[int]] = {"trainer": [], "bare": []}
    grown: dict[str, list[int]] = {"trainer": [], "bare": []}
    for _ in range(repeats):
        for variant, found in peaks.items():
            command = [sys.executable, __file__, "--peak", variant, "--workload", name, "--steps", str(steps)]
            said = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"}
            )
            if said.returncode:
                raise RuntimeError(f"{variant} of {name} failed:\n{said.stderr}")
            sizes = json.loads(said.stdout.splitlines()[-1])
            found.append(sizes["peak"])
            grown[variant].append(sizes["peak"] - sizes["before"])
    middle = {variant: statistics.median(found) for variant, found in peaks.items()}
    return {
        "peak_bytes": middle,
        "grown_bytes": {variant: statistics.median(found) for variant, found in grown.items()},
        "ratio": middle["trainer"] / middle["bare"],
        "runs": peaks,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """A row per workload in each of two tables."""
    fast, big = (Table(box=SIMPLE_HEAD, pad_edge=False) for _ in range(2))
    for table, labels in (
        (fast, ("speed", "step ms", "bare rows/s", "trainer rows/s", "ratio", "quartiles", "CPU ratio")),
        (big, ("peak memory", "bare MB", "trainer MB", "ratio", "bare grew", "trainer grew")),
    ):
        for label in labels:
            table.add_column(label, justify="left" if label == labels[0] else "right")
    for name, found in results["workloads"].items():
        speeds, peaks = found["speed"], found["memory"]
        low, high = speeds["ratio_quartiles"]
        rates = (f"{speeds['rows_per_second'][variant]:.1f}" for variant in ("bare", "trainer"))
        fast.add_row(
            name,
            f"{speeds['step_ms']['bare']:.0f}",
            *rates,
            f"{speeds['ratio']:.3f}",
            f"{low:.2f}–{high:.2f}",
            f"{speeds['processor_ratio']:.3f}",
        )
        peak_sizes = (f"{peaks['peak_bytes'][variant] / 1e6:.0f}" for variant in ("bare", "trainer"))
        growth = (f"{peaks['grown_bytes'][variant] / 1e6:.0f}" for variant in ("bare", "trainer"))
        big.add_row(name, *peak_sizes, f"{peaks['ratio']:.3f}", *growth)
    console.print(fast)
    console.print(big)
    console.print(f"Speed ratio to reach: {SPEED_TARGET}, at steps of {STEP_TARGET_MS} ms and more.")
    console.print(f"Memory ratio not to exceed: {MEMORY_TARGET}.")
    about = results["machine"]
    hardware = f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['device']}"
    console.print(
        f"{hardware}, load {results['load_average']:.1f} before, torch {about['versions']['torch']}"
    )


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--workload", choices=WORKLOADS, help="only this one (then nothing is written)")
    parser.add_argument("--steps", type=int, default=30, help="timed pairs of steps")
    parser.add_argument("--memory-runs", type=int, default=3, help="processes per variant")
    parser.add_argument("--peak", choices=["trainer", "bare"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    # Random teachers are no better than a guess, and the trainer says so.
    logging.getLogger("hf_kd").setLevel(logging.ERROR)
    if options.peak:
        print(json.dumps(peak(options.workload, options.peak, options.steps)))
        return
    load = os.getloadavg()[0]
    chosen = [options.workload] if options.workload else list(WORKLOADS)
    found = {
        name: {
            "speed": speed(WORKLOADS[name], options.steps),
            "memory": memory(name, options.memory_runs, steps=4),
        }
        for name in chosen
    }
    results = {
        "machine": machine("cpu"),
        "load_average": load,
        "targets": {"speed": SPEED_TARGET, "memory": MEMORY_TARGET, "step_ms": STEP_TARGET_MS},
        "workloads": found,
    }
    show(results, Console())
    if not options.workload:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
