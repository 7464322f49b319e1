"""Memory of a chunk of the fused loss, allocated once and reused by every chunk."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .tiles import Plan, Tile


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
            flat = self._flat[name] = torch.empty(elements, dtype=self.dtype, device=self.device)
        return flat

    def student(self, n: int, tile: Tile) -> Tensor:
        """What is kept of the student's tile, `[n, w]`."""
        if not self.keep_student:
            return self.scratch("student", n, tile)
        flat = self._get("kept student", self.plan.tokens * self.plan.tiles[-1].stop)
        return flat[n * tile.start : n * tile.stop].view(n, tile.width)

    def teacher(self, n: int, tile: Tile) -> Tensor:
        """What is kept of the teacher's tile, `[n, w]`."""
        if not self.keep_teacher:
            return self.scratch("teacher", n, tile)
        shared = max(part.stop for part in self.plan.tiles if part.shared)
        flat = self._get("kept teacher", self.plan.tokens * shared)
        return flat[n * tile.start : n * tile.stop].view(n, tile.width)

    def scratch(self, name: str, n: int, tile: Tile) -> Tensor:
        """A tile `[n, w]` whose content lasts until the name is used again."""
        flat = self._get("scratch " + name, self.plan.tokens * self.plan.widest)
        return flat[: n * tile.width].view(n, tile.width)
