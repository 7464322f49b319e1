"""The folder of `hf-kd generate`: rows in files that are whole or not there, and what was asked for."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .records import write_text

GENERATION_FILE = "generation.json"
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "text": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
    }
)
# No `configs` there: with them, `datasets` takes two folders of one name for the same data.
CARD = """\
---
tags:
- distillation
---

Rows sampled by {teacher} with `hf-kd generate`: `prompt`, `text`, and as tokens `input_ids` and `labels`.
Read them with `datasets.load_dataset`. generation.json has the settings; manifest.json and the shards, where
there are any, are the teacher's signal, a cache for `hf-kd distill --teacher_cache`.
"""


def rows_file(folder: Path, shard: int) -> Path:
    """Where the rows of a shard go; named so that `datasets` finds them."""
    return folder / "data" / f"train-{shard:05d}.parquet"


def write_rows(path: Path, columns: Mapping[str, list[Any]]) -> None:
    """Write a file of rows beside its place, then rename it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.table(dict(columns), schema=SCHEMA), temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def has_rows(path: Path, count: int) -> bool:
    """Whether a file is there and readable, with so many rows."""
    try:
        return pq.ParquetFile(path).metadata.num_rows == count
    except (OSError, pa.ArrowInvalid):
        return False


def agree(folder: Path, asked: Mapping[str, Any]) -> None:
    """Note what is asked for, or find that it is what was asked for before.

    Raises:
        ValueError: If something else was begun in the folder; names what differs, and both values.
    """
    path, record = folder / GENERATION_FILE, json.loads(json.dumps(asked))
    if not path.is_file():
        if any((folder / "data").glob("*.parquet")):
            raise ValueError(f"output_dir={str(folder)!r} has data of something else: give another folder")
        write_text(path, json.dumps(record, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): give another output_dir") from error
    names = sorted({*record, *found})
    changed = [f"{n}={found.get(n)!r}, now {record.get(n)!r}" for n in names if found.get(n) != record.get(n)]
    if changed:
        raise ValueError(
            f"output_dir={str(folder)!r} was begun with {'; '.join(changed)}. Ask for the "
            "same, or give another folder"
        )


@contextlib.contextmanager
def alone(folder: Path, rank: int) -> Iterator[None]:
    """Be the only process of this rank that writes there; the lock goes with the process.

    Raises:
        ValueError: If another one is.
    """
    with (folder / f".lock-{rank:05d}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"output_dir={str(folder)!r} is being written by another process: wait for it, or give "
                "another folder"
            ) from error
        yield
