"""`hf-kd cache plan`: what each fidelity would take and what it would lose, measured on some batches."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_kd.caching import inputs_of, prepare, splits_of, whole_logits
from hf_kd.losses.divergences import forward_kl
from hf_kd.losses.entries import sparse_divergence
from hf_kd.sample import sample_batches
from hf_kd.teachers.cache import FIDELITIES, CacheError
from hf_kd.teachers.cache.asking import ask
from hf_kd.teachers.cache.keys import pieces, present, teacher_view
from hf_kd.teachers.cache.make import CacheSettings, describe
from hf_kd.teachers.cache.record import records, signal_of
from hf_kd.teachers.signal import SparseSignal, TeacherSignal
from hf_kd.trainer import DistillationTrainer

_BATCHES = 4


@dataclass(frozen=True)
class Estimate:
    """One fidelity, on the calibration batches.

    Attributes:
        fidelity: Its name.
        bytes: Per position.
        total: Bytes of all rows of the run.
        minutes: To write them.
        kl: KL(exact, stored) per position in nats, over kept classes and tail where it is sparse.
        angle: Degrees between the student's gradients with the stored signal and with the whole one; of the
            better estimator where it is sparse.
    """

    fidelity: str
    bytes: float
    total: float
    minutes: float
    kl: float
    angle: float


def plan(argv: Sequence[str]) -> int:
    """Print a table of the fidelities, and which one to take for the room there is."""
    asked, setting, trainer = prepare("cache plan", argv)
    if len(trainer.task.logits) != 1 or trainer.task.kind != "classes":
        raise ValueError(
            f"hf-kd cache plan compares softmaxes; task {trainer.task.name!r} has none: use 'logits'"
        )
    batches = [inputs_of(trainer, b) for b in sample_batches(trainer, trainer.train_dataset, _BATCHES)]
    rows = sum(map(len, splits_of(setting)))
    table = Table("fidelity", "bytes a position", "in all (MB)", "minutes", "KL error (nats)", "angle")
    found = []
    for fidelity in FIDELITIES:
        try:
            one = estimate(trainer, batches, replace(asked.settings, fidelity=fidelity), rows)
        except CacheError as error:
            table.add_row(fidelity, *["–"] * 4, str(error))
            continue
        found.append(one)
        table.add_row(
            fidelity, f"{one.bytes:.1f}", f"{one.total / 1e6:,.2f}", f"{one.minutes:.1f}", f"{one.kl:.1e}",
            f"{one.angle:.1f}°",
        )  # fmt: skip
    console, best = Console(), recommend(found, asked.disk_bytes)
    console.print(table)
    budget = "" if math.isinf(asked.disk_bytes) else f" within {asked.disk_bytes / 1e6:,.0f} MB"
    if best is None:
        console.print(f"Nothing fits{budget}: give more room, or fewer --cache_entries.")
    else:
        console.print(f"Recommended{budget}: --cache_fidelity {best.fidelity}")
    return 0


def recommend(found: Sequence[Estimate], disk_bytes: float) -> Estimate | None:
    """Of what fits, the smallest that keeps the gradient's direction to a degree; else the most faithful."""
    fitting = [one for one in found if one.total <= disk_bytes]
    faithful = [one for one in fitting if one.angle <= 1.0]
    if faithful:
        return min(faithful, key=lambda one: one.total)
    return min(fitting, key=lambda one: one.angle, default=None)


def estimate(
    trainer: DistillationTrainer, batches: Sequence[Mapping[str, Any]], settings: CacheSettings, rows: int
) -> Estimate:
    """Store some batches in memory, read them back, and compare."""
    teacher = trainer.teacher
    assert teacher is not None
    manifest, head = describe(teacher, batches[0], settings, processor=trainer.processing_class)
    size = positions = seen = 0
    seconds, kl = 0.0, 0.0
    parameters = [p for p in trainer.student.parameters() if p.requires_grad]
    sums: dict[str, list[Tensor]] = {}
    trainer.student.eval()
    for batch in batches:
        view = teacher_view(batch, manifest.columns)
        mask = present(view, manifest.pad) if manifest.per_position else None
        asked = pieces(view, manifest.pad, whole=mask is None)
        start = time.monotonic()
        answer = ask(teacher, batch, manifest.fidelity)
        stored = records(answer, mask, manifest, asked)
        seconds += time.monotonic() - start
        arrays = {name: np.concatenate([row[name] for row in stored]) for name in stored[0]}
        size += sum(array.nbytes for array in arrays.values())
        seen += len(next(iter(view.values())))
        device = next(iter(view.values())).device
        read = signal_of(arrays, mask, manifest, len(stored), head=head, device=device)
        pair = Pairing.of(trainer, batch, whole_logits(answer), mask, settings.temperature)
        positions += len(pair.log_p)
        kl += float(pair.error(read).clamp_min(0).sum())
        for name, loss in {"whole": pair.whole(), **pair.losses(read)}.items():
            gradient = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            filled = [
                torch.zeros_like(p) if g is None else g for g, p in zip(gradient, parameters, strict=True)
            ]
            old = sums.get(name)
            sums[name] = filled if old is None else [a + b for a, b in zip(old, filled, strict=True)]
    whole = sums.pop("whole")
    scale = rows / max(1, seen)
    return Estimate(
        manifest.fidelity,
        bytes=size / max(1, positions),
        total=size * scale,
        minutes=seconds * scale / 60,
        kl=kl / max(1, positions),
        angle=min(angle(whole, other) for other in sums.values()),
    )


@dataclass(frozen=True)
class Pairing:
    """Student and teacher on the positions of one batch that exist: `[N, C]`, at the cache's temperature."""

    logits: Tensor
    log_p: Tensor
    mask: Tensor | None
    temperature: float

    @classmethod
    def of(
        cls,
        trainer: DistillationTrainer,
        batch: Mapping[str, Any],
        teacher: Tensor,
        mask: Tensor | None,
        temperature: float,
    ) -> Pairing:
        """Run the student; what both models have of the vocabulary is compared."""
        output = trainer.student(**trainer.pair.student_inputs(batch))
        logits = output[trainer.task.logits[0]]
        shared = min(logits.shape[-1], teacher.shape[-1])
        pair = [(x if mask is None else x[mask])[..., :shared].float() for x in (logits, teacher)]
        z, t = (x.reshape(-1, shared) for x in pair)
        return cls(z, (t / temperature).log_softmax(-1), mask, temperature)

    def whole(self) -> Tensor:
        """The student's loss with all that the teacher says."""
        return forward_kl(self._log_q(), self.log_p).sum()

    def losses(self, read: TeacherSignal) -> dict[str, Tensor]:
        """The same with what was stored, for each way to read it."""
        if read.sparse is None:
            return {"stored": forward_kl(self._log_q(), self._again(read)).sum()}
        signal = self._positions(read.sparse)
        return {
            name: sparse_divergence(self.logits, entries, forward_kl, temperature=self.temperature).sum()
            for name, entries in (("tail", signal.tail()), ("draws", signal.draws()))
        }

    @torch.no_grad()
    def error(self, read: TeacherSignal) -> Tensor:
        """`[N]` KL(exact, stored), on kept classes and the tail where it is sparse."""
        if read.sparse is None:
            return forward_kl(self._again(read), self.log_p)
        tail = self._positions(read.sparse).tail()
        there = tail.ids >= 0
        exact = self.log_p.gather(-1, tail.ids.clamp_min(0))
        p = torch.where(there, exact.exp(), 0.0)
        kept = torch.where(there, p * (exact - tail.log_probs), 0.0).sum(-1)
        rest = (1 - p.sum(-1)).clamp_min(0.0)
        assert tail.log_tail is not None
        outside = torch.where(rest > 1e-6, rest * (rest.clamp_min(1e-30).log() - tail.log_tail), 0.0)
        return kept + outside

    def _log_q(self) -> Tensor:
        return (self.logits / self.temperature).log_softmax(-1)

    def _again(self, read: TeacherSignal) -> Tensor:
        logits = whole_logits(read)
        logits = (logits if self.mask is None else logits[self.mask]).float()
        return (
            logits.reshape(-1, logits.shape[-1])[:, : self.log_p.shape[-1]] / self.temperature
        ).log_softmax(-1)

    def _positions(self, signal: SparseSignal) -> SparseSignal:
        flat = signal.flat()
        return flat if self.mask is None else flat.select(self.mask.reshape(-1).nonzero().squeeze(-1))


def angle(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Degrees between two gradients."""
    dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))
    norms = [math.sqrt(sum(float(a.double().square().sum()) for a in g)) for g in (one, other)]
    if not all(norms):
        return 0.0 if norms[0] == norms[1] else 90.0
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / (norms[0] * norms[1])))))
