"""What a sparse cache costs and loses: bytes, error, reading, writing, a training step, and what is learnt.

    python benchmarks/cache.py                    # tables, and benchmarks/results/cache.json
    python benchmarks/cache.py --parts codec --vocabulary 32000 --tokens 128
    python benchmarks/cache.py --parts budget --text input.txt    # instead of Python's standard library

The loss after a fixed training budget is in `budget.py`; angles are in `sparse.py`, with a file of results of
their own, and here is the best of what a cache offers. Times are CPU time of one thread, medians of repeats.
Logits are made: a Zipf curve plus noise. The step is one of `DistillationTrainer` on a small Llama: from the
cache, without a teacher, and with one four times as wide in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sparse
import torch
from budget import budget
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_kd import DistillationArguments, DistillationTrainer, SparseSignal
from hf_kd.measure import machine
from hf_kd.teachers import CachedTeacher, ModelTeacher
from hf_kd.teachers.cache import CacheWriter, SparseCodec, threshold_sample
from hf_kd.teachers.cache.make import CacheSettings, describe, fill

RESULTS = Path(__file__).parent / "results" / "cache.json"


def logits_of(tokens: int, classes: int) -> Tensor:
    """Logits of Zipf's law with noise, in another order for each token."""
    g = torch.Generator().manual_seed(0)
    zipf = -1.2 * torch.arange(1, classes + 1).float().log()
    rows = [zipf[torch.randperm(classes, generator=g)] for _ in range(tokens)]
    return torch.stack(rows) + torch.randn(tokens, classes, generator=g)


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median CPU time."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def kl(signal: SparseSignal, read: SparseSignal) -> Tensor:
    """KL of what is stored and what is read, over the kept classes and the tail, renormalised."""

    def whole(s: SparseSignal) -> Tensor:
        tail = s.tail()
        assert tail.log_tail is not None
        kept = tail.log_probs.double().masked_fill(tail.ids < 0, -torch.inf)
        return torch.cat([kept, tail.log_tail.double().unsqueeze(-1)], -1).log_softmax(-1)

    log_p, log_q = whole(signal), whole(read)
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def codec(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes, error, and tokens per second of one core."""
    logits = logits_of(args.tokens, args.vocabulary)
    generator = torch.Generator().manual_seed(1)

    def sample() -> SparseSignal:
        return threshold_sample(logits, args.entries, least_certain=args.entries // 2, generator=generator)

    found: dict[str, Any] = {}
    signal, sampling = sample(), seconds(sample)
    for bits in (16, 8):
        layout = SparseCodec(args.vocabulary, args.entries, bits=bits)
        data = layout.encode(signal)
        error = kl(signal, layout.decode(data))
        many = np.tile(data, (max(1, 65536 // len(data)), 1))
        encoding = seconds(lambda layout=layout: layout.encode(signal))
        found[f"{bits} bits"] = {
            "bytes_per_token": layout.stride,
            "kl_error_mean": float(error.mean()),
            "kl_error_most": float(error.max()),
            "decode_tokens_per_second": len(many) / seconds(lambda d=many, c=layout: c.decode(d)),
            "write_tokens_per_second": len(data) / (sampling + encoding),
            "sampling_ms_per_token": 1e3 * sampling / len(data),
        }
    return found


class StepTimes(TrainerCallback):
    """CPU time of each optimizer step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Keep what it says."""
        self.times.append(time.process_time() - self._start)


def llama(width: int, layers: int, vocabulary: int) -> nn.Module:
    """A Llama with new weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=3 * width, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def step(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """CPU seconds of a step, by teacher."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.step_vocabulary, (4 * args.steps, args.length), generator=g)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    big = llama(4 * args.width, 8, args.step_vocabulary).eval()
    teacher = ModelTeacher(big, ("logits",))
    batches = [
        {
            name: torch.stack([row[name] for row in rows[i : i + 4]])
            for name in ("input_ids", "attention_mask")
        }
        for i in range(0, len(rows), 4)
    ]
    manifest, _ = describe(teacher, batches[0], CacheSettings(fidelity="sparse", entries=args.entries))
    folder.mkdir()
    manifest.write(folder)
    fill(CacheWriter(folder, manifest), teacher, batches)

    def run(who: Any) -> float:
        times = StepTimes()
        options = DistillationArguments(
            output_dir=str(folder.parent / "out"), per_device_train_batch_size=4, alpha=0.5 if who else 0.0,
            temperature=1.0, sparse_estimator="tail", save_strategy="no", use_cpu=True, disable_tqdm=True,
            report_to="none", num_train_epochs=1, logging_strategy="no",
        )  # fmt: skip
        trainer = DistillationTrainer(
            llama(args.width, 4, args.step_vocabulary), options, teacher=who, train_dataset=rows,
            callbacks=[times],
        )  # fmt: skip
        trainer.train()
        return statistics.median(times.times[1:])

    alone, cached, live = run(None), run(CachedTeacher(folder)), run(big)
    return {
        "alone_seconds": alone, "cached_seconds": cached, "live_seconds": live,
        "cached_to_alone": cached / alone, "live_to_alone": live / alone,
    }  # fmt: skip


def angle(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each made student and teacher, what a cache offers that is nearest to the full gradient."""
    found = {"command": "python benchmarks/cache.py --parts angle", **sparse.measure(args)}
    args.angles.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for row in found["rows"]:
        key = (row["student"], row["teacher's entropy"])
        if (
            "draws" in row["read as"]
            and row["angle (degrees)"] < best.get(key, row)["angle (degrees)"] + 1e-9
        ):
            best[key] = row
    return list(best.values())


def show(found: dict[str, Any]) -> None:
    """Tables of what was measured."""
    console = Console(width=110)
    if "codec" in found:
        table = Table("", "16 bits", "8 bits")
        for name in found["codec"]["16 bits"]:
            table.add_row(name, *(f"{found['codec'][bits][name]:,.4g}" for bits in ("16 bits", "8 bits")))
        console.print(table)
    if "step" in found:
        console.print(found["step"])
    for row in found.get("angle", []):
        names = ("student", "teacher's entropy", "bytes per token", "read as", "angle (degrees)")
        console.print({name: row[name] for name in names})
    if "budget" in found:
        table = Table("told", "cross-entropy", "KL to the teacher")
        for arm, values in found["budget"]["means"].items():
            table.add_row(arm, *("{:.3f} ± {:.3f}".format(*values[key]) for key in ("log_loss", "kl")))
        console.print(table)


def main() -> None:
    """Measure, print, and keep; parts that were not asked for stay as they were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["codec", "step", "angle", "budget"])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--entries", type=int, default=28)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--step_vocabulary", type=int, default=32_000)
    sparse.add_options(parser)
    parser.add_argument("--text", default="builtin:stdlib", help="of the budget: a file or Hub id")
    parser.add_argument("--budget_vocabulary", type=int, default=8_192)
    parser.add_argument("--budget_steps", type=int, default=160)
    parser.add_argument("--teacher_steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=600.0, help="after which no run begins; call again")
    parser.add_argument("--work", default="out/cache-budget", help="folder of the teacher and finished runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--angles", type=Path, default=sparse.RESULTS, help="file of all angles")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    found |= {"command": "python benchmarks/cache.py", "machine": machine("cpu")}
    if {"codec", "step"} & set(args.parts):
        names = ("vocabulary", "tokens", "entries", "width", "length", "steps", "step_vocabulary")
        found["settings"] = {name: getattr(args, name) for name in names}
    parts: dict[str, Callable[[Path], Any]] = {
        "codec": lambda _: codec(args),
        "step": lambda folder: step(args, folder / "cache"),
        "angle": lambda _: angle(args),
        "budget": lambda folder: budget(args, folder),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts:
            found[name] = parts[name](Path(folder))
    show(found)
    args.results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
