"""Small caches for tests: what a made teacher says of rows, by their content alone, written to a folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_kd import TeacherSignal
from hf_kd.losses.tiles import Head, HiddenTeacher
from hf_kd.teachers.cache import CacheWriter
from hf_kd.teachers.cache.make import CacheSettings, describe, fill, save_head
from hf_kd.teachers.cache.store import locked

CLASSES = 37
SHARD_BYTES = 2000
Batch = dict[str, Tensor]


class MadeTeacher:
    """Logits `[B, L, CLASSES]` or hidden states `[B, L, 8]`: functions of the token and its place."""

    columns = ("input_ids", "attention_mask")

    def __init__(self, *, hidden: bool = False, seed: int = 0, **identity: str) -> None:
        self.identity = {"name": "made", "revision": "a", "fingerprint": f"seed {seed}", **identity}
        g = torch.Generator().manual_seed(seed)
        self.table = torch.randn(CLASSES, 8, generator=g)
        self.head = Head(torch.randn(CLASSES, 8, generator=g), torch.randn(CLASSES, generator=g))
        self.hidden, self.asked = hidden, 0

    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        self.asked += 1
        ids = batch["input_ids"]
        place = batch["attention_mask"].cumsum(-1).unsqueeze(-1)
        hidden = self.table[ids] + 0.1 * place
        if self.hidden:
            return TeacherSignal(hidden=HiddenTeacher(hidden, self.head))
        assert self.head.bias is not None
        return TeacherSignal({"logits": hidden @ self.head.weight.T + self.head.bias})


def batches(rows: int = 60, size: int = 4, seed: int = 0) -> list[Batch]:
    """Ragged rows, each of its own, padded on the right."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(0, rows, size):
        lengths = torch.randint(2, 9, (size,), generator=g)
        mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)).long()
        made.append(
            {
                "input_ids": torch.randint(1, CLASSES, mask.shape, generator=g) * mask,
                "attention_mask": mask,
            }
        )
    return made


def write(
    folder: Path,
    *,
    teacher: MadeTeacher | None = None,
    data: list[Batch] | None = None,
    delay: float = 0.0,
    rank: int = 0,
    **settings: Any,
) -> Path:
    """Write a cache as the command line does."""
    settings = {"fidelity": "sparse", "entries": 6, **settings}
    teacher = teacher or MadeTeacher(hidden=settings["fidelity"] == "hidden")
    data = batches() if data is None else data
    with locked(folder):
        manifest, head = describe(teacher, data[0], CacheSettings(**settings))
        if not (folder / "manifest.json").exists():
            if head is not None:
                manifest = replace(manifest, head=save_head(head, folder))
            manifest.write(folder)
        elif head is not None:
            manifest = replace(manifest, head=None)
        writer = CacheWriter(folder, manifest, rank=rank, shard_bytes=SHARD_BYTES)
        fill(writer, teacher, data, progress=lambda rows: time.sleep(delay))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name; the lock holds nothing."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}
