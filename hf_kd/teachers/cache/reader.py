"""A teacher that has already said everything: a `Teacher` that reads a cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...losses.tiles import Head
from ..models import TEACHER_PREFIX
from ..signal import Teacher, TeacherSignal
from .adding import Additions
from .asking import ask_about, refuse_crossing
from .keys import KEY_BYTES, Piece, once, pieces, present, teacher_view
from .record import signal_of
from .store import (
    HEAD_FILE,
    CacheError,
    Manifest,
    check_shard,
    checksum,
    map_arrays,
    read_shards,
    row_sum,
)

logger = logging.getLogger(__name__)

MISSES = ("error", "compute")


class CachedTeacher:
    """What a teacher said about each row, found by the row's content.

    Args:
        folder: A cache that `hf-kd cache` made.
        device: Where signals are wanted.
        live: The teacher itself, for rows that are not there; not kept where it isn't asked.
        miss: What happens with such rows: "error", or "compute": `live` is asked, and its answer is added to
            the folder (see `flush`).
        rank: Of this process, for what it adds.

    Raises:
        CacheError: If the cache is damaged (names the part) or empty.
        ValueError: If `miss` is not known, or needs a teacher that isn't given.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        live: Teacher | None = None,
        miss: str = "error",
        rank: int = 0,
    ) -> None:
        """Open the shards; nothing but keys is read."""
        self.folder, self.device, self.miss = Path(folder), torch.device(device), miss
        if miss not in MISSES:
            raise ValueError(f"cache_miss={miss!r} is not known: use one of {', '.join(MISSES)}")
        if miss == "compute" and live is None:
            raise ValueError("cache_miss='compute' needs a teacher to ask: give one beside teacher_cache")
        #: Who is asked about rows that are not there.
        self.live = live if miss == "compute" else None
        self.manifest = Manifest.read(self.folder)
        self._shards: list[dict[str, np.ndarray]] = []
        self._names: set[str] = set()
        self._lists: dict[str, tuple[int, int]] = {}
        self._refresh()
        if not self._shards and self.live is None:
            raise CacheError(f"{self.folder} has no rows: run hf-kd cache to its end")
        self._head = self._load_head() if self.manifest.fidelity == "hidden" else None
        self._added = Additions(self.folder, rank)
        self._apart = False  # whether it is known that packed texts don't see each other
        #: The teacher's id of each of the student's tokens, where the student's vocabulary was trimmed.
        self.tokens: Tensor | None = None

    @property
    def identity(self) -> dict[str, str]:
        """The identity of the teacher that was asked."""
        return dict(self.manifest.teacher)

    @property
    def config(self) -> SimpleNamespace:
        """What is known of the teacher's classes: their names, and the size of its vocabulary."""
        note = self.manifest.note
        names = {int(key): str(name) for key, name in dict(note.get("id2label") or {}).items()}
        return SimpleNamespace(
            num_labels=len(names) or None, id2label=names, vocab_size=note.get("classes") or 0
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """What the teacher read, plain and with the `teacher_` prefix."""
        names = self.manifest.columns
        return (*names, *(TEACHER_PREFIX + name for name in names))

    @property
    def rows(self) -> int:
        """Rows in the cache."""
        return len(self._hi)

    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """Find what was said about each row.

        Raises:
            CacheError: If a row is not there; says which, and why that may be.
        """
        view = teacher_view(batch, self.manifest.columns, self.tokens)
        mask = present(view, self.manifest.pad) if self.manifest.per_position else None
        asked = pieces(view, self.manifest.pad, whole=mask is None)
        places = self._find(asked)
        missing = self._missing(asked, places)
        if missing and self.live is not None and self._refresh():
            places = self._find(asked)  # another process has added some
            missing = self._missing(asked, places)
        if missing and self.live is None:
            raise CacheError(self._why(missing[0], view, mask))
        if missing:
            self._ask(batch, mask, missing)
        rows = [self._row(piece.key, place) for piece, place in zip(asked, places, strict=True)]
        lengths = [len(next(iter(row.values()))) for row in rows]
        there = [1] * len(rows) if mask is None else mask.sum(-1).tolist()
        expected = [there[p.row] if p.stop is None else p.stop - p.start for p in asked]
        if lengths != expected:
            i = next(i for i, (a, b) in enumerate(zip(lengths, expected, strict=True)) if a != b)
            raise CacheError(
                f"row {asked[i].row} has {expected[i]} positions, its record in {self.folder} {lengths[i]}: "
                "it is damaged. Run the same hf-kd cache command again: it writes it anew"
            )
        arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        if self._added.due:
            self.flush()
        return signal_of(
            arrays, mask, self.manifest, len(rows), head=self._head, device=self._device_of(view)
        )

    def flush(self) -> None:
        """Write what the live teacher was asked about since the last time; called by the trainer too.

        Raises:
            CacheError: If the disk is full, or `hf-kd cache` is writing the same folder.
        """
        if self._added.flush() is not None:
            self._refresh()

    def _refresh(self) -> bool:
        """Open shards that were listed since the last look; whether there are any."""
        paths = sorted(self.folder.glob("shards-*.json"))
        lists = {path.name: ((stat := path.stat()).st_mtime_ns, stat.st_size) for path in paths}
        if lists == self._lists and lists:
            return False
        self._lists = lists
        new = [shard for shard in read_shards(self.folder) if shard.file not in self._names]
        self._shards += [self._open(shard) for shard in new]
        self._names |= {shard.file for shard in new}
        self._index()
        return bool(new)

    def _missing(self, asked: list[Piece], places: list[int]) -> list[Piece]:
        """The inputs that nothing is known of, each once."""
        pairs = zip(asked, places, strict=True)
        return once(piece for piece, place in pairs if place < 0 and piece.key not in self._added.rows)

    def _device_of(self, view: Mapping[str, Tensor]) -> torch.device:
        return next(iter(view.values())).device if view else self.device

    def _open(self, shard: Any) -> dict[str, np.ndarray]:
        path = self.folder / shard.file
        problem = check_shard(self.folder, shard, content=False)
        if problem is None:
            arrays = map_arrays(path)
            problem = self._problem(arrays, shard)
        if problem is not None:
            raise CacheError(
                f"{self.folder}: {problem}. Run the same hf-kd cache command again: it writes what is missing"
            )
        return arrays

    def _problem(self, arrays: Mapping[str, np.ndarray], shard: Any) -> str | None:
        """Whether a shard's arrays fit together, so that no row can be read from outside its own."""
        names = {"sparse"} if self.manifest.fidelity == "sparse" else set(self.manifest.outputs)
        if set(arrays) != {"keys", "starts", "sums", *names}:
            return f"{shard.file} holds {sorted(arrays)}"
        keys, starts = arrays["keys"], arrays["starts"]
        if arrays["sums"].dtype != np.uint32 or arrays["sums"].shape != (shard.rows,):
            return f"the checksums of {shard.file} are not those of its rows"
        if keys.dtype != np.uint8 or keys.shape != (shard.rows, KEY_BYTES):
            return f"the keys of {shard.file} are {keys.dtype} {keys.shape}"
        if starts.dtype != np.int64 or starts.shape != (shard.rows + 1,):
            return f"the rows of {shard.file} are not marked"
        if starts[-1] != shard.positions:
            return f"{shard.file} has {starts[-1]} positions, not {shard.positions}"
        if shard.rows and (starts[0] != 0 or bool((np.diff(starts) < 0).any())):
            return f"the rows of {shard.file} are not in order"
        if any(array.ndim < 1 or len(array) != starts[-1] for name, array in arrays.items() if name in names):
            return f"{shard.file} has other numbers of positions than its rows"
        for name in names if self.manifest.fidelity != "sparse" else ():
            if list(arrays[name].shape[1:]) != self.manifest.shapes.get(name):
                return f"{name} of {shard.file} has the shape {arrays[name].shape}"
            stored = "uint16" if self.manifest.stored == "bfloat16" else self.manifest.stored
            if arrays[name].dtype != stored:
                return f"{name} of {shard.file} is {arrays[name].dtype}, not {self.manifest.stored}"
        return None

    def _index(self) -> None:
        """Sort all keys by their first half; the second decides where that is not enough."""
        none = np.zeros((0, KEY_BYTES), dtype=np.uint8)
        keys = np.concatenate([none, *(np.asarray(arrays["keys"]) for arrays in self._shards)])
        halves = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        lengths = [len(arrays["keys"]) for arrays in self._shards]
        shard = np.repeat(np.arange(len(lengths)), lengths)
        row = np.arange(len(keys)) - np.repeat(np.cumsum([0, *lengths])[:-1], lengths)
        self._hi, self._lo = halves[order, 0], halves[order, 1]
        self._shard, self._at = shard[order], row[order]

    def _find(self, asked: list[Piece]) -> list[int]:
        """Place of each input in the index; -1 where there is none."""
        keys = b"".join(piece.key for piece in asked)
        wanted = np.frombuffer(keys, dtype=">u8").astype(np.uint64).reshape(-1, 2)
        first = np.searchsorted(self._hi, wanted[:, 0], side="left")
        found = []
        for place, (hi, lo) in zip(first.tolist(), wanted, strict=True):
            while place < len(self._hi) and self._hi[place] == hi and self._lo[place] != lo:
                place += 1
            here = place < len(self._hi) and self._hi[place] == hi and self._lo[place] == lo
            found.append(place if here else -1)
        return found

    def _row(self, key: bytes, place: int) -> Mapping[str, np.ndarray]:
        if place < 0:
            return self._added.rows[key]
        arrays, row = self._shards[self._shard[place]], self._at[place]
        begin, end = int(arrays["starts"][row]), int(arrays["starts"][row + 1])
        about = ("keys", "starts", "sums")
        found = {name: np.asarray(a)[begin:end] for name, a in arrays.items() if name not in about}
        if row_sum(key, found) != arrays["sums"][row]:
            raise CacheError(
                f"{self.folder}: a row of shard {self._shard[place]} has another checksum than when it was "
                "written: its bytes are damaged. Run the same hf-kd cache command again: it writes them anew"
            )
        return found

    def _ask(
        self,
        batch: Mapping[str, Any],
        mask: Tensor | None,
        missing: list[Piece],
    ) -> None:
        assert self.live is not None
        if not self._added.started:
            logger.warning(
                "%s lacks rows of this data: the teacher is asked, and they are added.", self.folder
            )
        answer = ask_about(self.live, batch, mask, self.manifest.fidelity, missing)
        self._apart = self._apart or refuse_crossing(self.live, answer)
        for piece, arrays in zip(missing, answer.records(self.manifest), strict=True):
            self._added.add(piece.key, arrays)

    def _load_head(self) -> Head:
        path, about = self.folder / HEAD_FILE, self.manifest.head or {}
        if not path.is_file() or checksum(path) != about.get("checksum"):
            raise CacheError(
                f"{path} is missing or damaged: run the same hf-kd cache command again in a new folder"
            )
        tensors = {name: tensor.to(self.device) for name, tensor in load_file(path).items()}
        return Head(tensors["weight"], tensors.get("bias"), about.get("softcap"), about.get("scale", 1.0))

    def _why(self, piece: Piece, view: Mapping[str, Tensor], mask: Tensor | None) -> str:
        """Which row is missing, and what usually brings that about."""
        row = piece.row
        name = next((n for n in ("input_ids", "decoder_input_ids") if n in view), next(iter(view)))
        start = view[name][row].flatten()[piece.start : piece.stop][:8].tolist()
        reasons = []
        if mask is not None:
            lengths = [int(np.diff(a["starts"]).max(initial=0)) for a in self._shards]
            length = len(piece.positions(mask))
            reasons.append(
                f"another max_length (this row has {length} positions, the longest cached one {max(lengths)})"
            )
            reasons += ["another tokenizer", "tokens masked at random"]
            reasons += [] if piece.packed else ["texts packed or cut into blocks in another way"]
        if any(value.is_floating_point() for value in view.values()):
            reasons += ["random augmentation or mixup", "another image or audio processor"]
        reasons.append("rows that were not there when the cache was made")
        return (
            f"{'a text packed into ' if piece.packed else ''}row {row} of this batch is not in the cache "
            f"{self.folder} ({self.rows} rows, read by {', '.join(sorted(view))}): its {name} begins with "
            f"{start}. Usual reasons: {'; '.join(reasons)}. Make the cache with this run's data, or set "
            "cache_miss='compute' to ask the teacher."
        )
