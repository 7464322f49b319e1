"""A cache's folder: a manifest that says what is in it, and shards that are written whole or not at all.

    manifest.json                     what was asked: teacher, fidelity, codec, columns; never changes, and
                                      holds a checksum of itself
    shards-00000.json                 the shards of one writing rank, with sizes and checksums
    shard-00000-000000.safetensors    keys [R, 16], starts [R + 1], sums [R] (CRC-32 of each row, looked at
                                      whenever it is read), and arrays of one length per position
    head.safetensors                  the teacher's output layer, where the fidelity is `hidden`

A shard counts when it is listed, and is listed when it is on disk. What is not listed is left over from a
writer that was stopped, and is written over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ...records import write_text
from .codec import SparseCodec

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
HEAD_FILE = "head.safetensors"
FIDELITIES = ("logits", "hidden", "sparse")
_SHARD = re.compile(r"shard-\d{5}-\d{6}\.safetensors")
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U32": "<u4",
    "U16": "<u2", "U8": "u1",
}  # fmt: skip


class CacheError(ValueError):
    """A cache can't be used as it is; the message says which part and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a cache was asked to hold.

    Attributes:
        fidelity: "logits", "hidden" or "sparse".
        teacher: Its identity: name, revision, fingerprint of the weights.
        columns: Arguments of the teacher's forward.
        outputs: The outputs that are kept, for example `["logits"]`.
        dtype: Of the teacher's weights.
        stored: Dtype of what is stored for `logits` and `hidden`.
        shapes: For outputs with one shape for every row, that shape; for those per position, the rest of it.
        per_position: Whether rows have positions (tokens), or one answer each.
        tokenizer: Hash of the tokenizer; "" where there is none.
        pad: The padding token of a decoder, if there is one.
        codec: Of the sparse fidelity.
        head: Checksum and settings of the head, for `hidden`.
        versions: Of the libraries that wrote it.
        note: What else the writer knew (the data, the teacher's scores); free.
        schema_version: Of this format.
    """

    fidelity: str
    teacher: dict[str, str]
    columns: list[str]
    outputs: list[str]
    dtype: str
    stored: str
    shapes: dict[str, list[int]]
    per_position: bool
    tokenizer: str = ""
    pad: int | None = None
    codec: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check a folder's manifest.

        Raises:
            CacheError: If there is none, it is damaged, or it comes from a newer version.
        """
        content = _read_json(folder / MANIFEST_FILE, "is not a teacher cache (make one with hf-kd cache)")
        version = content.get("schema_version")
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise CacheError(
                f"{folder / MANIFEST_FILE} has schema_version {version!r}, but this hf_kd reads 1 to "
                f"{SCHEMA_VERSION}: upgrade it, or make the cache again"
            )
        if content.pop("checksum", None) != _digest(content):
            raise CacheError(
                f"{folder / MANIFEST_FILE} is damaged or was edited (its checksum is another): make the "
                "cache again"
            )
        try:
            return cls.of(content)
        except CacheError as error:
            raise CacheError(
                f"{folder / MANIFEST_FILE} is damaged ({error}): make the cache again"
            ) from error

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Manifest:
        """A manifest from its fields, of any origin.

        Raises:
            CacheError: If they are not those of a manifest, or don't fit together.
        """
        specs = {spec.name: spec for spec in dataclasses.fields(cls)}
        required = {n for n, s in specs.items() if s.default is s.default_factory is dataclasses.MISSING}
        if set(content) - set(specs) or required - set(content):
            raise CacheError(f"it has the fields {sorted(content)}, not those of a manifest")
        made = cls(**content)
        problem = made._problem()
        if problem:
            raise CacheError(problem)
        return made

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        content = json.loads(json.dumps(dataclasses.asdict(self)))
        content["checksum"] = _digest(content)
        write_text(folder / MANIFEST_FILE, json.dumps(content, indent=2) + "\n")

    def _problem(self) -> str | None:
        kinds: dict[str, Any] = {
            "fidelity": str, "teacher": dict, "columns": list, "outputs": list, "dtype": str, "stored": str,
            "shapes": dict, "per_position": bool, "tokenizer": str, "pad": int | None, "codec": dict | None,
            "head": dict | None, "versions": dict, "note": dict,
        }  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                return f"{name} is {getattr(self, name)!r}"
        if self.fidelity not in FIDELITIES:
            return f"fidelity is {self.fidelity!r}"
        if not all(isinstance(name, str) for name in (*self.columns, *self.outputs)):
            return "columns and outputs are not names"
        if (self.codec is not None) != (self.fidelity == "sparse"):
            return f"codec is {self.codec!r}"
        try:
            SparseCodec(**(self.codec or {"classes": 2, "entries": 1}))
        except (TypeError, ValueError) as error:
            return f"codec: {error}"
        return None


@dataclass(frozen=True)
class Shard:
    """One file of rows: its name, rows, positions, bytes, and BLAKE2b checksum."""

    file: str
    rows: int
    positions: int
    bytes: int
    checksum: str


def read_shards(folder: Path) -> list[Shard]:
    """The shards that are listed, of all writers.

    Raises:
        CacheError: If a list is damaged, or names something else than a shard of this folder.
    """
    found: list[Shard] = []
    for path in sorted(folder.glob("shards-[0-9][0-9][0-9][0-9][0-9].json")):
        entries = _read_json(path, "is missing").get("shards")
        if not isinstance(entries, list):
            raise CacheError(f"{path} is damaged: it has no list of shards; verify or make the cache again")
        for entry in entries:
            try:
                shard = Shard(**entry)
                fits = all(
                    type(v) is int and v >= 0 for v in (shard.rows, shard.positions, shard.bytes)
                ) and isinstance(shard.checksum, str)
            except TypeError:
                fits = False
            # A path in a file from elsewhere must not lead out of the folder.
            if not fits or not isinstance(shard.file, str) or not _SHARD.fullmatch(shard.file):
                raise CacheError(f"{path} is damaged: {entry!r} is not a shard; make the cache again")
            found.append(shard)
    return found


def write_shard(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> Shard:
    """Write a shard beside its place, then rename it there."""
    temporary = folder / f".{name}.{os.getpid()}"
    try:
        content = save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    path = folder / name
    return Shard(name, len(arrays["keys"]), int(arrays["starts"][-1]), path.stat().st_size, checksum(path))


def write_list(folder: Path, rank: int, shards: list[Shard]) -> None:
    """Say which shards a rank has finished."""
    content = {"shards": [dataclasses.asdict(shard) for shard in sorted(shards, key=lambda s: s.file)]}
    write_text(folder / f"shards-{rank:05d}.json", json.dumps(content, indent=1) + "\n")


def checksum(path: Path) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def row_sum(key: bytes, arrays: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of a row: its key, and its arrays in the order of their names."""
    found = zlib.crc32(key)
    for name in sorted(arrays):
        found = zlib.crc32(np.ascontiguousarray(arrays[name]).data, found)
    return found


def shard_arrays(keys: list[bytes], rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What a shard of some rows holds, at least one: their arrays in a line, and what finds them."""
    lengths = [len(next(iter(arrays.values()))) for arrays in rows]
    return {
        **{name: np.concatenate([row[name] for row in rows]) for name in rows[0]},
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1),
        "sums": np.array([row_sum(key, row) for key, row in zip(keys, rows, strict=True)], dtype=np.uint32),
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }


def check_shard(folder: Path, shard: Shard, *, content: bool) -> str | None:
    """What is wrong with a listed shard, in words; None if nothing is. `content`: read all of it."""
    path = folder / shard.file
    if not path.is_file():
        return f"{shard.file} is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        return f"{shard.file} has {size} bytes, not {shard.bytes}: it is cut short or was changed"
    if content and checksum(path) != shard.checksum:
        return f"{shard.file} has another checksum than when it was written: its bytes are damaged"
    return None


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped into memory, not read; bfloat16 as its 16 bits.

    Raises:
        CacheError: If the file is not one.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, 1 << 24):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        arrays = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            count = int(np.prod(shape, dtype=object))
            if not (0 <= begin <= end <= size - 8 - length and end - begin == count * dtype.itemsize):
                raise ValueError(f"{name} lies outside the file")
            arrays[name] = (
                np.memmap(path, dtype, "r", 8 + length + begin, shape) if count else np.empty(shape, dtype)
            )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CacheError(f"{path} is damaged ({error}): run hf-kd cache again to write it anew") from error
    return arrays


@contextlib.contextmanager
def locked(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Be the folder's only writer; the lock goes with the process, however it ends.

    Args:
        folder: The cache.
        patience: Seconds to wait for another writer to leave.

    Raises:
        CacheError: If another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise CacheError(
                        f"{folder} is being written by another process: wait for it, or choose another folder"
                    ) from error
            time.sleep(0.02)
        yield


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise CacheError(f"{path.parent} {missing}: there is no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path} is damaged ({error}): make the cache again") from error
    if not isinstance(content, dict):
        raise CacheError(f"{path} is damaged: it holds no mapping; make the cache again")
    return content
