"""Ask a teacher about every row once, and keep what it says."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .keys import KEY_BYTES
from .store import (
    CacheError,
    Manifest,
    Shard,
    check_shard,
    map_arrays,
    read_shards,
    shard_arrays,
    write_list,
    write_shard,
)

logger = logging.getLogger(__name__)

# What decides whether two writers make the same cache.
_MUST_AGREE = (
    "fidelity", "columns", "outputs", "dtype", "stored", "shapes", "per_position", "tokenizer", "pad",
    "codec",
)  # fmt: skip


class CacheWriter:
    """One rank's writer of a cache's rows.

    A shard is written when its bytes are full; a writer that is killed loses the shard in hand, and one that
    starts again goes on after the last whole one. The folder is locked by the caller (`store.locked`).

    Args:
        folder: The cache.
        manifest: What it holds; it is written if there is none.
        rank: Of this writer.
        shard_bytes: Size of a shard.

    Raises:
        CacheError: If the folder holds something else than the manifest says.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, rank: int = 0, shard_bytes: int = 256 << 20
    ) -> None:
        """Find out what is there already."""
        self.folder, self.manifest, self.rank, self.shard_bytes = folder, manifest, rank, shard_bytes
        refuse_other(folder, manifest)
        # What a writer that was killed had in hand.
        for pattern in (f".shard-{rank:05d}-*", f".shards-{rank:05d}.json.*"):
            for left in folder.glob(pattern):
                left.unlink(missing_ok=True)
        self._shards = self._sound()
        self._known = known_keys(folder, [s for s in read_shards(folder) if s not in self._lost])
        self._keys: list[bytes] = []
        self._arrays: list[dict[str, np.ndarray]] = []
        self._bytes = 0
        self.rows = sum(shard.rows for shard in self._shards)
        self.bytes = sum(shard.bytes for shard in self._shards)

    def _sound(self) -> list[Shard]:
        """This rank's shards that are whole; torn ones are forgotten, and written again."""
        prefix = f"shard-{self.rank:05d}-"
        own = [shard for shard in read_shards(self.folder) if shard.file.startswith(prefix)]
        found, self._lost = [], []
        for shard in own:
            problem = check_shard(self.folder, shard, content=True)
            if problem is None:
                found.append(shard)
            else:
                self._lost.append(shard)
                logger.warning("%s: its %d rows are written again.", problem, shard.rows)
        if self._lost:
            write_list(self.folder, self.rank, found)
        return found

    def __contains__(self, key: bytes) -> bool:
        """Whether a row is stored, or in hand."""
        return key in self._known

    def add(self, key: bytes, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a row; one that is there already is left as it is."""
        if key in self._known:
            return
        self._known.add(key)
        self._keys.append(key)
        self._arrays.append(dict(arrays))
        self._bytes += KEY_BYTES + sum(array.nbytes for array in arrays.values())
        self.rows += 1
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the shard in hand.

        Raises:
            CacheError: If the disk is full; what was written before stays.
        """
        if not self._keys:
            return
        arrays = shard_arrays(self._keys, self._arrays)
        shard = append_shard(self.folder, self.rank, self._shards, arrays)
        self._shards.append(shard)
        self.bytes += shard.bytes
        self._keys, self._arrays, self._bytes = [], [], 0


def append_shard(folder: Path, rank: int, own: Sequence[Shard], arrays: Mapping[str, np.ndarray]) -> Shard:
    """Write and list one more shard of a rank that has some; the folder is locked by the caller.

    Raises:
        CacheError: If the disk is full; what was written before stays.
    """
    taken = {shard.file for shard in own}
    numbers = (f"shard-{rank:05d}-{i:06d}.safetensors" for i in range(len(taken) + 1))
    name = next(name for name in numbers if name not in taken)
    try:
        shard = write_shard(folder, name, arrays)
        write_list(folder, rank, [*own, shard])
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        safe = sum(done.rows for done in own)
        raise CacheError(
            f"the disk of {folder} is full: {safe} rows of this writer are safe. Make room and run "
            "the same command again: it goes on from there"
        ) from error
    return shard


def refuse_other(folder: Path, manifest: Manifest) -> None:
    """Refuse to mix what two teachers, or two settings, say.

    Raises:
        CacheError: Names what differs, and both values.
    """
    if not (folder / "manifest.json").exists():
        return
    there = Manifest.read(folder)
    pairs: dict[str, tuple[Any, Any]] = {
        name: (asdict(there)[name], asdict(manifest)[name]) for name in _MUST_AGREE
    }
    for name in ("name", "revision", "fingerprint"):
        pairs[f"teacher {name}"] = (there.teacher.get(name), manifest.teacher.get(name))
    # Where the weights are the same, their name may be another folder.
    if pairs["teacher fingerprint"][0] == pairs["teacher fingerprint"][1]:
        del pairs["teacher name"], pairs["teacher revision"]
    if manifest.head and there.head:
        pairs["head"] = (there.head.get("checksum"), manifest.head.get("checksum"))
    differing = [
        f"{name}: it has {old!r}, this run {new!r}" for name, (old, new) in pairs.items() if old != new
    ]
    if differing:
        raise CacheError(
            f"{folder} was made with something else than this run asks for ({'; '.join(differing)}): choose "
            "another folder, or the same settings"
        )


def known_keys(folder: Path, shards: list[Shard]) -> set[bytes]:
    """Keys of all rows in some shards."""
    found: set[bytes] = set()
    for shard in shards:
        if check_shard(folder, shard, content=False) is None:
            keys = np.array(map_arrays(folder / shard.file)["keys"])
            found |= {row.tobytes() for row in keys}
    return found
