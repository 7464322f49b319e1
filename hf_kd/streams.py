"""Training on a stream: rows without a number of rows, dealt to ranks and data workers, each to one of them.

A stream is read again and again, so it has no end and every batch is full. Its rows are dealt in blocks of
`per_device_train_batch_size`: block `j` is a micro-batch of rank `j % ranks`. A stream of several files
(shards) has a lane for each, and block `j` comes from lane `j % lanes`. So which rows an optimizer step sees
depends on the number of rows in a step and on nothing else: not on ranks, accumulation or workers. A resumed
run counts the rows that were dealt, and goes on with the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from .matching import first_eval_dataset
from .records import read_record, write_record
from .rows import ROW

if TYPE_CHECKING:
    from .findings import Report
    from .trainer import DistillationTrainer

PLACE_FILE = "rows.json"
# Stands for a row that was read before the run was resumed; it is dropped with its batch.
_PASSED = "passed"


def is_stream(rows: Any) -> bool:
    """Whether rows come one after another: an `IterableDataset` of torch or of `datasets`."""
    return isinstance(rows, IterableDataset | datasets.IterableDataset)


@dataclass(frozen=True)
class Place:
    """How far a run has come in its data.

    Attributes:
        step: Optimizer steps taken.
        rows: Rows that they saw, over all ranks.
        rows_a_step: Rows of one of them: batch size times accumulation times ranks.
        block: Rows of a micro-batch.
        lanes: Files that a stream is read from side by side; 0 for data of which every row is known.
    """

    step: int
    rows: int
    rows_a_step: int
    block: int
    lanes: int


class Stream(IterableDataset):
    """One rank's rows of a stream, without end, each as a mapping with its number.

    Args:
        rows: The stream. It has to give the same rows in every process: who gets which is decided here.
        block: Rows of a micro-batch.
        rank: Whose rows.
        ranks: How many ranks there are.
        start: Rows that earlier runs saw.
        passed: Batches of this rank that are given as placeholders first, for a trainer that skips them.
        over: Give nothing: the run has taken all its steps.

    Raises:
        ValueError: If the stream is split for one rank already, or has several files and `start` lies within
            a block.
    """

    def __init__(
        self,
        rows: Any,
        *,
        block: int,
        rank: int = 0,
        ranks: int = 1,
        start: int = 0,
        passed: int = 0,
        over: bool = False,
    ) -> None:
        """See the class."""
        if getattr(rows, "_distributed", None) is not None:
            raise ValueError(
                "train_dataset is split for one rank (split_dataset_by_node), and the trainer deals the rows "
                "of a stream to the ranks itself: pass the whole stream."
            )
        self.rows, self.block, self.rank, self.ranks = rows, block, rank, ranks
        self.start, self.passed, self.over = start, passed, over
        self.lanes = lanes_of(rows)
        if self.lanes > 1 and start % block:
            raise ValueError(
                f"per_device_train_batch_size={block}, but the {start} rows that were seen before the "
                f"checkpoint are no multiple of it, and a stream of {self.lanes} files is dealt in whole "
                "batches: resume with the batch size that the run had."
            )

    def __iter__(self) -> Iterator[Any]:
        """The rows of every batch that is this worker's."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        lanes: dict[int, _Lane] = {}
        for batch in () if self.over else itertools.count(worker, workers):
            if batch < self.passed:
                yield from itertools.repeat(_PASSED, self.block)
                continue
            first = self.start + ((batch - self.passed) * self.ranks + self.rank) * self.block
            lane, place = 0, first
            if self.lanes > 1:
                turn, lane = divmod(first // self.block, self.lanes)
                place = turn * self.block
            if lane not in lanes:
                lanes[lane] = _Lane(self.rows, lane, self.lanes)
            for number, row in enumerate(lanes[lane].take(place, self.block), start=first):
                yield {**row, ROW: number} if isinstance(row, Mapping) else row


class _Lane:
    """The rows of one file of a stream, read again and again."""

    def __init__(self, rows: Any, number: int, lanes: int) -> None:
        if isinstance(rows, datasets.IterableDataset):
            # Also where there is one: the epoch of `rows` is shared with every worker, that of a part isn't.
            rows = rows.shard(lanes, number) if lanes == rows.num_shards else rows.skip(0)
        self.rows = rows
        self.name = f"train_dataset: file {number + 1} of {lanes}" if lanes > 1 else "train_dataset"
        self.epoch, self.at = 0, 0
        self.iterator = self._begin()

    def take(self, start: int, count: int) -> Iterator[Any]:
        """`count` rows from `start` on; those before are read and dropped."""
        while self.at < start:
            self._next()
        for _ in range(count):
            yield self._next()

    def _begin(self) -> Iterator[Any]:
        generator = getattr(self.rows, "generator", None)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(self.epoch)
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(self.epoch)
        with _no_worker():
            return iter(self.rows)

    def _next(self) -> Any:
        for _ in range(2):
            with _no_worker():
                row = next(self.iterator, _PASSED)
            if row is not _PASSED:
                self.at += 1
                return row
            self.epoch += 1
            self.iterator = self._begin()
        raise ValueError(f"{self.name} has no rows: give at least one, or leave the empty file out.")


@contextlib.contextmanager
def _no_worker() -> Iterator[None]:
    """Hide the data worker from a stream that would give each of them other rows."""
    info = torch_worker._worker_info
    torch_worker._worker_info = None
    try:
        yield
    finally:
        torch_worker._worker_info = info


def lanes_of(rows: Any) -> int:
    """Files that a stream can be read from side by side with the same rows in all."""
    if not isinstance(rows, datasets.IterableDataset):
        return 1
    source, names = getattr(rows, "_ex_iterable", None), set()
    while source is not None:
        names.add(type(source).__name__)
        source = getattr(source, "ex_iterable", None)
    # Of a shard these would skip or take another part of the rows.
    whole = {"SkipExamplesIterable", "TakeExamplesIterable", "StepExamplesIterable"}
    return 1 if names & whole else rows.num_shards


class StreamCollator:
    """Batches of a stream: what a collator draws (masks, augmentation) depends on seed and rows alone."""

    def __init__(self, collator: Callable[[list[Any]], Any], seed: int) -> None:
        """Wrap a collator."""
        self.collator, self.seed = collator, seed

    def __call__(self, features: list[Any]) -> Any:
        """Collate; nothing for a batch that is skipped."""
        if isinstance(features[0], str) and features[0] == _PASSED:
            return {}
        number = features[0].get(ROW) if isinstance(features[0], Mapping) else None
        if number is None:
            return self.collator(features)
        with _drawing(hash((self.seed, number)) & 0xFFFFFFFF):
            return self.collator(features)


@contextlib.contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Seed what collators draw from; afterwards it is as before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def dataloader(trainer: DistillationTrainer, rows: Any, batch_size: int) -> Any:
    """What `Trainer` trains on: this rank's batches of a stream.

    Raises:
        ValueError: If an option asks for another way of dealing rows; names it.
    """
    from accelerate.data_loader import prepare_data_loader

    args, place = trainer.args, trainer.place
    step = 0 if place is None else place.step
    stream = Stream(
        rows,
        block=batch_size,
        rank=args.process_index,
        ranks=args.world_size,
        start=0 if place is None or args.ignore_data_skip else place.rows,
        passed=0 if args.ignore_data_skip else step * args.gradient_accumulation_steps,
        over=step >= args.max_steps,
    )
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator, "training")
    workers = args.dataloader_num_workers
    loader = DataLoader(
        stream,
        batch_size=batch_size,
        collate_fn=StreamCollator(collator, args.seed),
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )
    # One process: the rows are this rank's already.
    return prepare_data_loader(
        loader, device=trainer.accelerator.device, num_processes=1, process_index=0, put_on_device=True,
        dispatch_batches=False,
    )  # fmt: skip


def check_streams(trainer: DistillationTrainer, report: Report, *, training: bool) -> None:
    """Note options that a stream would ignore, and an evaluation that would count rows twice."""
    args, evaluated = trainer.args, first_eval_dataset(trainer)
    if is_stream(evaluated) and trainer.accelerator.num_processes > 1:
        report.add(
            "eval_dataset",
            f"eval_dataset is a stream, and how many rows each of {trainer.accelerator.num_processes} ranks "
            "gets of it can't be known: take them first, Dataset.from_list(list(stream.take(1000))).",
        )
    if not (training and is_stream(trainer.train_dataset)):
        return
    config = args.accelerator_config
    given = {
        "train_sampling_strategy": (args.train_sampling_strategy, "random"),
        "dataloader_drop_last": (args.dataloader_drop_last, False),
        **{name: (getattr(config, name), None) for name in ("split_batches", "dispatch_batches")},
    }
    for name, (value, default) in given.items():
        if value and value != default:
            report.add(
                name,
                f"{name}={value!r} has no effect on a stream, whose rows are dealt in their own order, in "
                "full batches: leave it out (shuffle with stream.shuffle(seed=..., buffer_size=...)).",
            )


def save_place(trainer: DistillationTrainer, folder: Path) -> None:
    """Write how far the run has come in its data into a checkpoint."""
    now, before = place_of(trainer), trainer.place
    start = before if before is not None and not trainer.args.ignore_data_skip else None
    rows = now.rows if start is None else start.rows + (now.step - start.step) * now.rows_a_step
    write_record(folder / PLACE_FILE, Place(now.step, rows, now.rows_a_step, now.block, now.lanes))


def place_of(trainer: DistillationTrainer) -> Place:
    """How far a run has come that was never resumed."""
    args, step = trainer.args, trainer.state.global_step
    each = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    lanes = lanes_of(trainer.train_dataset) if is_stream(trainer.train_dataset) else 0
    return Place(step, step * each, each, args.train_batch_size, lanes)


def found_place(trainer: DistillationTrainer, checkpoint: str | bool | None) -> Place | None:
    """Where a resumed run goes on in its data.

    Raises:
        ValueError: If the run would see other rows than the one that wrote the checkpoint: it has another
            number of rows in a step, or its stream another number of files.
    """
    found = read_record(Path(checkpoint) / PLACE_FILE, Place) if isinstance(checkpoint, str) else None
    if found is None or trainer.args.ignore_data_skip:
        return found
    args, now = trainer.args, place_of(trainer)
    if now.lanes != found.lanes:
        raise ValueError(
            f"train_dataset is {_kind(now.lanes)}, and was {_kind(found.lanes)} when {checkpoint} was "
            "written, so its rows come in another order: resume with the same data, or set "
            "ignore_data_skip=true to begin with its first row."
        )
    if now.lanes == 0 and now.rows_a_step != found.rows_a_step:
        each, ranks = args.train_batch_size, args.world_size
        fit, rest = divmod(found.rows_a_step, each * ranks)
        fix = f"gradient_accumulation_steps={fit}"
        if rest or not fit:
            fix = f"batch size and accumulation so that {ranks} ranks make {found.rows_a_step} rows"
        raise ValueError(
            f"a step of this run has {now.rows_a_step} rows (per_device_train_batch_size={each} x "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} x {ranks} ranks), and one of "
            f"the run that wrote {checkpoint} had {found.rows_a_step}, so rows would be seen twice or left "
            f"out: set {fix}, or ignore_data_skip=true to begin the epoch anew."
        )
    return found


def _kind(lanes: int) -> str:
    return f"a stream of {lanes} file{'s' if lanes > 1 else ''}" if lanes else "a data set with a length"
