"""A tiny run that may be stopped anywhere, in children that share this process's imports."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from hf_kd import DistillationArguments, DistillationTrainer

from ..heads import VOCAB, bert

FORK = multiprocessing.get_context("fork")
STEPS = 30


def models() -> tuple[nn.Module, nn.Module]:
    """A student with dropout, so that its random numbers count, and a teacher."""
    torch.manual_seed(0)
    student = BertForSequenceClassification(bert(8, num_labels=4, classifier_dropout=0.1))
    return student, BertForSequenceClassification(bert(12, num_labels=4))


def rows(count: int = 24) -> Dataset:
    """Rows of equal length."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (count, 5), generator=g)
    labels = torch.randint(0, 4, (count,), generator=g).tolist()
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels}
    )


def trainer(folder: Path, *, teacher: Any = None, data: Any = None, **options: Any) -> DistillationTrainer:
    """Thirty steps with a checkpoint every five."""
    student, theirs = models()
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "save_steps": 5, "save_total_limit": 3,
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 5, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
    }  # fmt: skip
    return DistillationTrainer(
        student,
        DistillationArguments(**{**defaults, **options}),
        teacher=theirs if teacher is None else teacher,
        train_dataset=rows() if data is None else data,
    )


def train(
    folder: Path, *, resume: bool = False, delay: float = 0.0, steps: Path | None = None, **options: Any
) -> None:
    """Train and save; `delay` seconds longer a step, so that a signal meets any part of it.

    The file `steps` has as many bytes as the run has come steps far.
    """
    run = trainer(folder, **options)
    if delay:
        original = run.training_step

        def slow(*args: Any, **kwargs: Any) -> Tensor:
            if steps is not None:
                steps.write_bytes(b"." * (run.state.global_step + 1))
            time.sleep(delay)
            return original(*args, **kwargs)

        run.training_step = slow  # type: ignore[method-assign]
    there = any(folder.glob("checkpoint-*"))
    run.train(resume_from_checkpoint=True if resume and there else None)
    run.save_model(str(folder))


def weights(folder: Path) -> dict[str, Tensor]:
    """The final student's."""
    return load_file(folder / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def child(function: Callable[..., None], *args: Any, **kwargs: Any) -> BaseProcess:
    """Start a function in a fork; what it prints goes to `log` if that is given."""
    process = FORK.Process(target=_quietly, args=(function, args, kwargs))
    process.start()
    return process


def _quietly(function: Callable[..., None], args: tuple, kwargs: dict[str, Any]) -> None:
    log = kwargs.pop("log", None)
    with open(log or os.devnull, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        AcceleratorState._reset_state(reset_partial_state=True)  # what this process ran before
        try:
            function(*args, **kwargs)
            file.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=file)
            file.flush()
            os._exit(1)


def join(process: BaseProcess, seconds: float = 120.0) -> int:
    """The exit status; a run that doesn't end is a failure of the test, and is killed."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"still running after {seconds:g} s")
    assert process.exitcode is not None
    return process.exitcode


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def as_rank(rank: int, port: int, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run a function as one of two gloo ranks."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    function(*args, **kwargs)


def two_ranks(function: Callable[..., None], *args: Any, logs: Path, **kwargs: Any) -> list[BaseProcess]:
    """Two ranks of a function, each with its log."""
    port = free_port()
    return [
        child(as_rank, rank, port, function, *args, log=str(logs / f"rank{rank}.log"), **kwargs)
        for rank in range(2)
    ]
