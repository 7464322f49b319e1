"""`hf-kd cache`: a run's teacher is asked about the run's rows once; such a folder is checked or shown."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor

from hf_kd.config import DistillationArguments, parse, plainly
from hf_kd.losses.projected import head_logits
from hf_kd.options import RunOptions
from hf_kd.rows import ROW
from hf_kd.run import distiller
from hf_kd.sample import sample_batches
from hf_kd.setting import Setting, load, with_trained_teacher
from hf_kd.teachers.cache import FIDELITIES, CachedTeacher, CacheError, CacheWriter, Manifest
from hf_kd.teachers.cache.asking import ask
from hf_kd.teachers.cache.card import write_card
from hf_kd.teachers.cache.keys import present, teacher_view
from hf_kd.teachers.cache.make import CacheSettings, changing_columns, describe, fill, save_head
from hf_kd.teachers.cache.record import DTYPES
from hf_kd.teachers.cache.store import MANIFEST_FILE, check_shard, locked, read_shards
from hf_kd.teachers.cache.writer import refuse_other
from hf_kd.teachers.link import is_link
from hf_kd.teachers.signal import TeacherSignal
from hf_kd.trainer import DistillationTrainer

# By how much a value may differ that the same teacher computes again: stored whole, and rounded.
_EXACT, _ROUNDED = 1e-3, 0.05


@dataclass(frozen=True)
class Asked:
    """What the command line of `hf-kd cache` asks for itself; the other flags are the run's.

    Attributes:
        folder: The cache.
        settings: What is to be kept.
        shard_bytes: Size of a shard.
        disk_bytes: Room that there is, for `plan`.
        rows: To be computed again, for `verify`.
    """

    folder: Path
    settings: CacheSettings
    shard_bytes: int
    disk_bytes: float
    rows: int


def prepare(command: str, argv: Sequence[str]) -> tuple[Asked, Setting, DistillationTrainer]:
    """The cache's own flags, and the run that the others describe, with its teacher.

    Raises:
        ValueError: If an option is wrong or missing.
    """
    asked, run, args = _parse(command, argv)
    if is_link(run.teacher):
        raise ValueError(
            f"teacher={run.teacher!r} is a teacher group, which keeps nothing: run hf-kd {command} where the "
            "model is, with its directory or Hub id"
        )
    setting = load(run, args)
    if setting.untrained:
        setting = with_trained_teacher(setting)
    trainer = distiller(setting)
    if trainer.teacher is None:
        raise ValueError(
            f"alpha={args.alpha} asks no teacher, so there is nothing to cache: set alpha above 0"
        )
    return asked, setting, trainer


def write(argv: Sequence[str]) -> int:
    """Ask the teacher of a run about all its rows, and keep what it says in a folder.

    Raises:
        CacheError: If the data is random, the disk is full, or the folder holds something else.
    """
    asked, setting, trainer = prepare("cache", argv)
    teacher, accelerator = trainer.teacher, trainer.accelerator
    assert teacher is not None
    refuse_random(trainer)
    batch = inputs_of(trainer, sample_batches(trainer, trainer.train_dataset, 1)[0])
    manifest, head = describe(teacher, batch, asked.settings, processor=trainer.processing_class)
    rank = accelerator.process_index
    with locked(asked.folder) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            refuse_other(asked.folder, manifest)
            if not (asked.folder / MANIFEST_FILE).exists():
                if head is not None:
                    manifest = replace(manifest, head=save_head(head, asked.folder))
                manifest.write(asked.folder)
        accelerator.wait_for_everyone()
        writer = CacheWriter(
            asked.folder, Manifest.read(asked.folder), rank=rank, shard_bytes=asked.shard_bytes
        )
        with _progress(writer, splits_of(setting), accelerator.num_processes, show=rank == 0) as done:
            fill(writer, teacher, _batches(trainer, setting), progress=done)
        accelerator.wait_for_everyone()
        if rank == 0:
            write_card(asked.folder)
            info([str(asked.folder)])
    return 0


def info(argv: Sequence[str]) -> int:
    """Print what a folder holds."""
    if len(argv) != 1:
        raise ValueError("hf-kd cache info takes one folder: hf-kd cache info DIR")
    folder = Path(argv[0])
    manifest, shards = Manifest.read(folder), read_shards(folder)
    positions, size = sum(s.positions for s in shards), sum(s.bytes for s in shards)
    teacher, kept = manifest.teacher, manifest.codec or manifest.stored
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in {
        "teacher": f"{teacher.get('name')} {teacher.get('revision', '')}".strip(),
        "weights": f"{teacher.get('fingerprint')} ({manifest.dtype})",
        "fidelity": f"{manifest.fidelity} ({kept})",
        "rows": f"{sum(s.rows for s in shards):,} in {len(shards)} shards",
        "positions": f"{positions:,}",
        "size": f"{size / 1e6:,.2f} MB, {size / max(1, positions):.1f} bytes a position",
        "written with": ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
    }.items():
        table.add_row(name, str(value))
    Console().print(table)
    return 0


def verify(argv: Sequence[str]) -> int:
    """Check every shard's checksum and, where a run is named too, ask its teacher about some rows again.

    Returns:
        0, or 1 if something is wrong; each problem is printed.
    """
    console = Console()
    if len(argv) == 1 and not argv[0].startswith("-"):
        return _check_sums(Path(argv[0]), console)
    asked, _, trainer = prepare("cache verify", argv)
    if _check_sums(asked.folder, console):
        return 1
    cached, worst, rows = CachedTeacher(asked.folder), 0.0, 0
    cached.tokens = getattr(trainer.teacher, "tokens", None)
    most = math.ceil(asked.rows / trainer.args.per_device_train_batch_size)
    for batch in sample_batches(trainer, trainer.train_dataset, most):
        inputs = inputs_of(trainer, batch)
        rows += len(next(iter(teacher_view(inputs, cached.manifest.columns).values())))
        worst = max(worst, _difference(trainer, cached, inputs))
    exact = cached.manifest.fidelity == "logits" and cached.manifest.stored in ("float32", "float64")
    limit = _EXACT if exact else _ROUNDED
    said = f"{rows} rows computed again: values differ by at most {worst:.2g}"
    console.print(
        said + ("" if worst <= limit else f", more than {limit:g}: another teacher made this cache")
    )
    return int(worst > limit)


def inputs_of(trainer: DistillationTrainer, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What both models read of a batch, on the training device."""
    return trainer.pair.inputs({k: v for k, v in trainer._prepare_inputs(dict(batch)).items() if k != ROW})


def refuse_random(trainer: DistillationTrainer) -> None:
    """Collate the same rows twice: what differs is made anew each time, and no cache can know it.

    Raises:
        CacheError: Names the columns.
    """
    rows: Any = trainer._remove_unused_columns(trainer.train_dataset, "cache")
    few = [{k: v for k, v in rows[i].items() if k != ROW} for i in range(min(4, len(rows)))]
    changing = changing_columns(*(trainer.data_collator(list(few)) for _ in range(2)))
    if changing:
        raise CacheError(
            f"the columns {changing} are made anew each time a row is read (random masking or augmentation), "
            "so a cache would never hold what training sees. Make them once, when the data is prepared."
        )


def whole_logits(signal: TeacherSignal) -> Tensor:
    """The logits of a signal that is not sparse, `[B, ..., C]`."""
    if signal.hidden is not None:
        return head_logits(signal.hidden)
    return next(iter(signal.dense().values()))


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing a usage that lacks the options of the run."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(plainly(message))


def _parse(command: str, argv: Sequence[str]) -> tuple[Asked, RunOptions, DistillationArguments]:
    """Take the cache's own flags; the rest is parsed as `distill` does."""
    parser = _Parser(prog=f"hf-kd {command}", allow_abbrev=False, add_help=False)
    parser.add_argument("--cache_dir", type=Path)
    parser.add_argument("--cache_fidelity", default="auto", choices=("auto", *FIDELITIES))
    parser.add_argument("--cache_entries", type=int, default=28)
    parser.add_argument("--cache_bits", type=int, default=16, choices=(8, 16))
    parser.add_argument("--cache_dtype", choices=tuple(DTYPES))
    parser.add_argument("--shard_mib", type=int, default=256)
    parser.add_argument("--disk_mb", type=float, default=math.inf)
    parser.add_argument("--rows", type=int, default=64)
    own, rest = parser.parse_known_args(list(argv))
    if own.cache_dir is None and command != "cache plan":
        raise ValueError(f"hf-kd {command} needs a folder: --cache_dir DIR")
    for name in ("cache_entries", "shard_mib", "rows"):
        if getattr(own, name) < 1:
            raise ValueError(f"{name}={getattr(own, name)} is below 1: leave it out for the default")
    run, args = parse(rest)
    if run.streaming:
        raise ValueError(
            f"streaming=True, but hf-kd {command} counts the rows that it asks about: fill a cache while "
            "training instead (teacher_cache=DIR and cache_miss=compute), or set streaming=false"
        )
    if args.teacher_cache:
        raise ValueError(
            f"teacher_cache={args.teacher_cache!r} is for runs that read a cache: leave it out here"
        )
    temperature = args.teacher_temperature or args.temperature
    if isinstance(temperature, str):
        raise ValueError(
            f"temperature={temperature!r} is measured when a run starts, but a sparse cache is made at one "
            "temperature: set a number (hf-kd check says which)"
        )
    settings = CacheSettings(
        fidelity=own.cache_fidelity,
        entries=own.cache_entries,
        bits=own.cache_bits,
        temperature=temperature,
        dtype=own.cache_dtype,
    )
    return (
        Asked(own.cache_dir or Path(), settings, own.shard_mib << 20, own.disk_mb * 1e6, own.rows),
        run,
        args,
    )


def splits_of(setting: Setting) -> list[Any]:
    """Every set of rows that a run asks the teacher about."""
    data = setting.data
    return [rows for rows in (data.train, data.eval, data.test) if rows is not None]


def _batches(trainer: DistillationTrainer, setting: Setting) -> Iterator[dict[str, Any]]:
    """This rank's share of all rows, as the teacher reads them."""
    for rows in splits_of(setting):
        for batch in trainer.get_eval_dataloader(rows):
            yield inputs_of(trainer, batch)


@contextlib.contextmanager
def _progress(
    writer: CacheWriter, splits: Sequence[Any], ranks: int, *, show: bool
) -> Iterator[Callable[[int], None]]:
    """Rows done, rows per second, time left and bytes so far, of all ranks by what rank 0 has done."""
    total = sum(map(len, splits))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.fields[speed]} rows/s, {task.fields[size]} MB"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task("asking the teacher", total=total, speed="–", size="0.0")

        def done(rows: int) -> None:
            bar.advance(task, min(rows * ranks, total))
            speed, size = bar.tasks[0].speed, writer.bytes * ranks
            bar.update(task, speed=f"{speed:.0f}" if speed else "–", size=f"{size / 1e6:.1f}")

        yield done


def _check_sums(folder: Path, console: Console) -> int:
    manifest, shards = Manifest.read(folder), read_shards(folder)
    problems = [found for shard in shards if (found := check_shard(folder, shard, content=True))]
    for problem in problems:
        console.print(problem, style="bold")
    if problems:
        console.print("Run the same hf-kd cache command again: it writes these rows anew.")
        return 1
    CachedTeacher(folder)
    rows = sum(shard.rows for shard in shards)
    console.print(
        f"{len(shards)} shards, {rows:,} rows: as they were written by {manifest.teacher.get('name')}"
    )
    return 0


def _difference(trainer: DistillationTrainer, cached: CachedTeacher, inputs: Mapping[str, Any]) -> float:
    """The largest difference between what is stored of a batch and what the teacher says now."""
    assert trainer.teacher is not None
    manifest, read = cached.manifest, cached(inputs)
    live = ask(trainer.teacher, inputs, manifest.fidelity)
    mask = None
    if manifest.per_position:
        mask = present(teacher_view(inputs, manifest.columns, cached.tokens), manifest.pad)

    def kept(values: Tensor) -> Tensor:
        return (values if mask is None else values[mask]).float().cpu()

    if read.sparse is not None:
        there = read.sparse.ids >= 0
        if live.sparse is not None:
            # Both have the likeliest first: what is equally likely may change places.
            return float((live.sparse.log_probs - read.sparse.log_probs)[there].abs().max())
        log_p = (whole_logits(live).float() / read.sparse.temperature).log_softmax(-1)
        pairs = [(log_p.gather(-1, read.sparse.ids.clamp_min(0))[there], read.sparse.log_probs[there])]
    elif read.hidden is not None and live.hidden is not None:
        pairs = [(kept(live.hidden.hidden), kept(read.hidden.hidden))]
    else:
        dense, again = read.dense(), live.dense()
        pairs = [(kept(again[name]), kept(dense[name])) for name in dense]
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
