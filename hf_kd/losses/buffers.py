"""Memory of a chunk of the fused loss, allocated once and reused by every chunk.

A tile `[n, w]` lies in memory as `[w, n]`: with the head's rows first, BLAS packs each of them once whatever
the number of tokens, which is worth a quarter of the product's time at 64 tokens.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .tiles import Plan, Tile

_HUGE_PAGE = 1 << 21
_HAS_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")


def allocate(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised `[elements]` tensor, on the CPU in huge pages where the system has them.

    Large blocks come from the system at every call, and to fault them in page by page takes up to a tenth of
    the time of all products.
    """
    size = elements * dtype.itemsize
    if device.type != "cpu" or not _HAS_HUGE_PAGES or size < 2 * _HUGE_PAGE:
        return torch.empty(elements, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=elements)


@dataclass
class Buffers:
    """All that a chunk may occupy: kept tiles of both models, and a few scratch tiles, allocated once."""

    plan: Plan
    dtype: torch.dtype
    device: torch.device
    keep_student: bool
    keep_teacher: bool
    _flat: dict[str, Tensor] = field(default_factory=dict)

    def _get(self, name: str, elements: int) -> Tensor:
        flat = self._flat.get(name)
        if flat is None:
            flat = self._flat[name] = allocate(elements, self.dtype, self.device)
        return flat

    def student(self, n: int, tile: Tile) -> Tensor:
        """What is kept of the student's tile, `[n, w]`."""
        if not self.keep_student:
            return self.scratch("student", n, tile)
        flat = self._get("kept student", self.plan.tokens * self.plan.tiles[-1].stop)
        return flat[n * tile.start : n * tile.stop].view(tile.width, n).T

    def teacher(self, n: int, tile: Tile) -> Tensor:
        """What is kept of the teacher's tile, `[n, w]`."""
        if not self.keep_teacher:
            return self.scratch("teacher", n, tile)
        shared = max(part.stop for part in self.plan.tiles if part.shared)
        flat = self._get("kept teacher", self.plan.tokens * shared)
        return flat[n * tile.start : n * tile.stop].view(tile.width, n).T

    def scratch(self, name: str, n: int, tile: Tile) -> Tensor:
        """A tile `[n, w]` whose content lasts until the name is used again."""
        flat = self._get("scratch " + name, self.plan.tokens * self.plan.widest)
        return flat[: n * tile.width].view(tile.width, n).T
