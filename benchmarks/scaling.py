"""How training scales: 1 and 2 ranks, a teacher at hand, in a group, cached or none, asked ahead or not.

    python benchmarks/scaling.py          # tables, and benchmarks/results/scaling.json (about 5 minutes)

Every process has one thread and, unless its name says otherwise, one core of its own: rank 0 core 0, rank 1
or the teacher group core 1. A small Llama learns from a larger one on random tokens; the batch of a rank is
the same everywhere, so 2 ranks do twice the work of one. Cells take turns (`--rounds`), a step's seconds are
the median over all rounds after the first steps of each. Bytes are those of the loopback device, protocol
included.

The cost model (`hf_kd/cost_model.py`) then predicts each cell from what is measured apart: the student's step
without a teacher (its operations a second), an all-reduce of as many numbers, and the reading of the cache.
The teacher's forward follows from its size.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from lm_step import llama, rows
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PrinterCallback, TrainerCallback, default_data_collator
from transformers.utils import logging as transformers_logging

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.cost_model import Machine, Run, bytes_per_token, gradient_bytes, step
from hf_kd.measure import machine
from hf_kd.tasks import resolve_task
from hf_kd.teachers import CachedTeacher, ModelTeacher
from hf_kd.teachers.cache import CacheWriter
from hf_kd.teachers.cache.make import CacheSettings, describe, fill, save_head
from hf_kd.teachers.cache.store import locked
from hf_kd.teachers.group import HELLO
from hf_kd.teaching import Desk, Office

RESULTS = Path(__file__).parent / "results" / "scaling.json"
FORK = multiprocessing.get_context("fork")
FIDELITIES = ("hidden", "sparse")
#: Name: ranks, where the teacher is, whether it is asked ahead.
CELLS: dict[str, tuple[int, str, str]] = {
    "none, 1 rank": (1, "none", "off"),
    "local, 1 rank": (1, "local", "off"),
    "cache hidden, 1 rank": (1, "cache hidden", "off"),
    "cache sparse, 1 rank": (1, "cache sparse", "off"),
    "group hidden, not ahead": (1, "group hidden", "off"),
    "group hidden, ahead": (1, "group hidden", "on"),
    "group sparse, ahead": (1, "group sparse", "on"),
    "local, ahead, 2 cores": (1, "local", "on"),
    "none, 2 ranks": (2, "none", "off"),
    "local, 2 ranks": (2, "local", "off"),
    "cache hidden, 2 ranks": (2, "cache hidden", "off"),
}


def loopback() -> int:
    """Bytes that the loopback device has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    return 0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def weights(model: nn.Module) -> int:
    """Weights that multiply each token: all but the input embedding, which the tied output layer is again."""
    return sum(p.numel() for p in model.parameters())


def pin(cores: set[int]) -> None:
    """One thread, on these cores."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)


class Clock(TrainerCallback):
    """Wall seconds from the end of one step to the end of the next, and the bytes between."""

    def __init__(self, warm: int) -> None:
        self.warm, self.ends, self.bytes = warm, [], [0, 0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step has ended, optimizer included."""
        self.ends.append(time.perf_counter())
        if state.global_step == self.warm:
            self.bytes[0] = loopback()
        self.bytes[1] = loopback()

    def result(self) -> dict[str, Any]:
        """Seconds and bytes of the steps after the first ones."""
        ends = self.ends[self.warm - 1 :]
        seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
        return {"seconds": seconds, "bytes_a_step": (self.bytes[1] - self.bytes[0]) / len(seconds)}


def student_process(
    rank: int, cell: str, size: argparse.Namespace, folder: Path, ports: tuple[int, int]
) -> None:
    """One rank of a cell."""
    ranks, where, ahead = CELLS[cell]
    pin({0, 1} if "2 cores" in cell else {rank})
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]), ACCELERATE_USE_CPU="true",
        )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    teacher: Any = None
    if where == "local":
        teacher = make(size, size.teacher)
    elif where.startswith("cache"):
        teacher = CachedTeacher(folder / where.split()[1])
    elif where.startswith("group"):
        teacher = f"torch://127.0.0.1:{ports[1]}"
    clock = Clock(size.warm)
    options: dict[str, Any] = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": size.batch, "max_steps": size.steps,
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "save_strategy": "no",
        "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False, "temperature": 1.0, "sparse_estimator": "draws",
        "alpha": 0.0 if where == "none" else 0.5, "teacher_ahead": ahead,
    }  # fmt: skip
    trainer = DistillationTrainer(
        make(size, size.student), DistillationArguments(**options), teacher=teacher, callbacks=[clock],
        train_dataset=data(size), data_collator=default_data_collator,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if rank == 0:
        found = clock.result()
        if where.startswith("group"):
            found["traffic"] = vars(trainer.teacher.traffic)
        (folder / "found.json").write_text(json.dumps(found))
    if where.startswith("group"):
        trainer.teacher.close()


def group_process(cell: str, size: argparse.Namespace, port: int) -> None:
    """The teacher of a cell, on core 1."""
    pin({1})
    model = make(size, size.teacher)
    fidelity = CELLS[cell][1].split()[1]
    task = resolve_task(None, model)
    desk = Desk(ModelTeacher(model, task.logits), CacheSettings(fidelity, dtype="float32"))
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    store.set(HELLO, json.dumps(desk.hello(1)))
    Office(desk, store, near="127.0.0.1", idle=60.0, say=lambda line: None).run(1)


def make(size: argparse.Namespace, shape: list[int]) -> nn.Module:
    """A model of a width and a number of layers."""
    return llama(*shape, size.vocabulary)


def data(size: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Rows for every step of two ranks."""
    return rows(size.batch * size.steps * 2, size.length, size.vocabulary)


def child(function: Callable[..., None], *args: Any) -> Any:
    """A fork that ends without what this process would do at its end."""

    def run() -> None:
        try:
            function(*args)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)

    process = FORK.Process(target=run)
    process.start()
    return process


def measure(cell: str, size: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One round of a cell."""
    ranks, where, _ = CELLS[cell]
    ports = free_port(), free_port()
    processes = [child(group_process, cell, size, ports[1])] if where.startswith("group") else []
    processes += [child(student_process, rank, cell, size, folder, ports) for rank in range(ranks)]
    for process in processes:
        process.join(180)
        if process.exitcode:
            raise RuntimeError(f"{cell}: a process ended with status {process.exitcode}")
    return json.loads((folder / "found.json").read_text())


def write_caches(size: argparse.Namespace, folder: Path) -> None:
    """What the teacher says of every row, in each fidelity."""
    pin({0})
    teacher = ModelTeacher(make(size, size.teacher), ("logits",))
    given = data(size)
    batches = [default_data_collator(given[i : i + 8]) for i in range(0, len(given), 8)]
    batches = [{name: b[name] for name in ("input_ids", "attention_mask")} for b in batches]
    for fidelity in FIDELITIES:
        settings = CacheSettings(fidelity, dtype="float32" if fidelity == "hidden" else None)
        manifest, head = describe(teacher, batches[0], settings)
        with locked(folder / fidelity):
            if head is not None:
                about = save_head(head, folder / fidelity)
                manifest = type(manifest)(**{**vars(manifest), "head": about})
            manifest.write(folder / fidelity)
            fill(CacheWriter(folder / fidelity, manifest), teacher, batches)


def forward_alone(size: argparse.Namespace, folder: Path) -> None:
    """Seconds of the teacher's forward, output layer included, and of reading the caches, on core 0."""
    pin({0})
    model, batch = make(size, size.teacher).eval(), default_data_collator(data(size)[: size.batch])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    work: dict[str, Callable[[], Any]] = {"teacher": lambda: model(**inputs).logits}
    for fidelity in FIDELITIES:
        work[f"cache {fidelity}"] = partial(CachedTeacher(folder / fidelity), inputs)
    found = {}
    with torch.no_grad():
        for name, call in work.items():
            times = []
            for _ in range(6):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            found[name] = statistics.median(times[1:])
    (folder / "found.json").write_text(json.dumps(found))


def all_reduce_alone(rank: int, size: argparse.Namespace, folder: Path, port: int) -> None:
    """Seconds of an all-reduce of the student's gradient between two ranks."""
    pin({rank})
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    values, times = torch.zeros(weights(make(size, size.student))), []
    for _ in range(7):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        times.append(time.perf_counter() - start)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps({"all_reduce": statistics.median(times[2:])}))


def sharded_teacher(rank: int, size: argparse.Namespace, folder: Path, port: int) -> None:
    """Bytes that each rank receives for a forward of a teacher in pieces over two ranks (FSDP 2)."""
    pin({1})  # bytes, not seconds
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    model, mesh = make(size, size.teacher).eval(), init_device_mesh("cpu", (2,))
    batch = default_data_collator(data(size)[: size.batch])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    counts = []
    with torch.no_grad():
        for _ in range(4):
            dist.barrier()
            before = loopback()
            model(**inputs)
            dist.barrier()
            counts.append(loopback() - before)
    if rank == 0:
        tokens = size.batch * size.length
        each = statistics.median(counts[1:]) / 2 / tokens
        formula = 4 * weights(model) / tokens  # `numel` of a piece is that of the whole
        (folder / "found.json").write_text(
            json.dumps({"bytes_per_token": each, "formula": formula / 2, "tokens": tokens})
        )


def moved_by_a_sharded_teacher(size: argparse.Namespace, folder: Path) -> dict[str, float]:
    """See `sharded_teacher`."""
    port = free_port()
    processes = [child(sharded_teacher, rank, size, folder, port) for rank in range(2)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return json.loads((folder / "found.json").read_text())


def alone(size: argparse.Namespace, folder: Path) -> dict[str, float]:
    """What is measured outside of any training."""
    found = {}
    port = free_port()
    for processes in (
        lambda: [child(forward_alone, size, folder)],
        lambda: [child(all_reduce_alone, rank, size, folder, port) for rank in range(2)],
    ):
        for process in processes():
            process.join(120)
            assert process.exitcode == 0
        found |= json.loads((folder / "found.json").read_text())
    return found


def predict(size: argparse.Namespace, found: dict[str, Any], single: dict[str, float]) -> dict[str, Any]:
    """Each cell by the cost model, beside what was measured."""
    student, teacher = make(size, size.student), make(size, size.teacher)
    p_s, p_t, tokens = weights(student), weights(teacher), size.batch * size.length
    head = size.teacher[0] * size.vocabulary
    flops = 6 * p_s * tokens / found["none, 1 rank"]["seconds"]
    link = gradient_bytes(p_s, 2) / single["all_reduce"]
    signal = {
        "hidden": bytes_per_token("hidden", vocabulary=size.vocabulary, width=size.teacher[0], number=4),
        "sparse": bytes_per_token("sparse", vocabulary=size.vocabulary, width=size.teacher[0]),
    }
    predicted: dict[str, Any] = {}
    for cell, (ranks, where, ahead) in CELLS.items():
        place, *fidelity = where.split()
        told = signal[fidelity[0]] if fidelity else 0.0
        disk = tokens * told / single[where] if place == "cache" else 1.0
        # A model at hand that a second core asks ahead is a group of one device without a way to it.
        as_group = place == "local" and ahead == "on"
        run = Run(
            p_s, p_t, tokens, devices=ranks, where="group" if as_group else place, signal=told,
            head=head if fidelity == ["hidden"] else 0.0, ahead=ahead == "on",
        )  # fmt: skip
        total = step(run, Machine(flops, link, disk)).total
        measured = found[cell]["seconds"]
        predicted[cell] = {"seconds": total, "error": total / measured - 1}
    forward = 2 * p_t * tokens / flops
    return {
        "flops": flops, "link": link, "weights": {"student": p_s, "teacher": p_t},
        "teacher_forward": {"predicted": forward, "measured": single["teacher"],
                            "error": forward / single["teacher"] - 1},
        "signal_bytes_per_token": signal, "cells": predicted,
    }  # fmt: skip


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """What the page says, each from one run."""

    def seconds(cell: str) -> float:
        return float(found[cell]["seconds"])

    ranks = {
        f"efficiency of 2 ranks, teacher {kind}": seconds(f"{kind}, 1 rank") / seconds(f"{kind}, 2 ranks")
        for kind in ("none", "local", "cache hidden")
    }
    hand, group = seconds("local, 1 rank"), seconds("group hidden, ahead")
    return ranks | {
        "step without a teacher / with one at hand": seconds("none, 1 rank") / hand,
        "step from a cache (hidden) / with a teacher at hand": seconds("cache hidden, 1 rank") / hand,
        "group on a second core, ahead / not ahead": group / seconds("group hidden, not ahead"),
        "group on a second core, ahead / teacher at hand": group / hand,
        "thread on a second core, ahead / teacher at hand": seconds("local, ahead, 2 cores") / hand,
    }


def main() -> None:
    """Measure all cells in turns, predict them, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=int, nargs=2, default=[256, 4], help="width and layers")
    parser.add_argument("--teacher", type=int, nargs=2, default=[384, 6])
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4, help="rows of a rank and a step")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warm", type=int, default=2, help="steps of each round that are not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--save", default=str(RESULTS))
    parser.add_argument("--sharded", action="store_true", help="only what a sharded teacher moves, added")
    size = parser.parse_args()
    if size.sharded:
        with tempfile.TemporaryDirectory() as name:
            found = moved_by_a_sharded_teacher(size, Path(name))
        content = json.loads(Path(size.save).read_text()) | {"sharded_teacher": found}
        Path(size.save).write_text(json.dumps(content, indent=1) + "\n")
        print(found)
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = child(write_caches, size, folder)
        writer.join(300)
        assert writer.exitcode == 0
        tokens = 2 * size.batch * size.steps * size.length
        stored = {
            kind: sum(p.stat().st_size for p in (folder / kind).glob("shard-*")) / tokens
            for kind in FIDELITIES
        }
        raw: dict[str, list[dict[str, Any]]] = {cell: [] for cell in CELLS}
        for _ in range(size.rounds):
            for cell in CELLS:
                raw[cell].append(measure(cell, size, folder))
        single = alone(size, folder)
        sharded = moved_by_a_sharded_teacher(size, folder)
    found: dict[str, Any] = {}
    for cell, rounds in raw.items():
        seconds = [s for one in rounds for s in one["seconds"]]
        moved = statistics.median(one["bytes_a_step"] for one in rounds)
        ranks = CELLS[cell][0]
        found[cell] = {
            "seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds),
            "bytes_per_token": moved / (size.batch * size.length * ranks),
        }  # fmt: skip
        if "traffic" in rounds[0]:
            t = rounds[0]["traffic"]
            found[cell]["counted"] = {k: t[k] / t["positions"] for k in ("asked", "answered")}
    model = predict(size, found, single)
    said = ratios(found)
    print(f"{'cell':26}{'s/step':>9}{'model':>9}{'error':>8}{'bytes/token':>13}")
    for cell, one in found.items():
        guess = model["cells"][cell]
        print(
            f"{cell:26}{one['seconds']:9.3f}{guess['seconds']:9.3f}{guess['error']:8.0%}"
            f"{one['bytes_per_token']:13,.0f}"
        )
    for text, value in said.items():
        print(f"{text:58}{value:7.2f}")
    described = {name: value for name, value in vars(size).items() if name not in ("save", "sharded")}
    content = {
        "schema_version": 1, **described, "machine": machine(), "load_average": os.getloadavg()[0],
        "wall_seconds": time.perf_counter() - started, "cells": found, "cache_bytes_per_token": stored,
        "alone": single, "sharded_teacher": sharded, "model": model, "ratios": said,
    }  # fmt: skip
    Path(size.save).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
