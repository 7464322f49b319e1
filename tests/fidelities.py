"""A teacher that answers at any fidelity, made from a model that is run for its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_kd import SparseSignal, TeacherSignal
from hf_kd.losses.tiles import Head, HiddenTeacher
from hf_kd.teachers import ModelTeacher


def threshold_sample(
    log_p: Tensor, entries: int, generator: torch.Generator | None = None, temperature: float = 1.0
) -> SparseSignal:
    """Keep `p > tau` for sure and draw the others with probability `p / tau`: about `entries` per position.

    Args:
        log_p: `[..., C]` log-probabilities, float64.
        entries: `sum min(1, p / tau)`.
        generator: Of the draws; None: the classes are all kept.
        temperature: What `log_p` was made with.
    """
    flat = log_p.reshape(-1, log_p.shape[-1])
    p, order = flat.exp().sort(-1, descending=True)
    classes = p.shape[-1]
    if generator is None or entries >= classes:
        return SparseSignal(
            ids=order.view(log_p.shape), log_probs=p.log().view(log_p.shape),
            log_tail=torch.full(log_p.shape[:-1], -torch.inf, dtype=log_p.dtype), temperature=temperature,
        )  # fmt: skip
    rest = p.flip(-1).cumsum(-1).flip(-1)
    taus = rest / (entries - torch.arange(classes)).clamp_min(1)
    certain = (p[:, :entries] > taus[:, :entries]).long().cumprod(-1).sum(-1).clamp_max(entries - 1)
    tau = taus.gather(1, certain[:, None])
    sure = torch.arange(classes) < certain[:, None]
    kept = sure | (torch.rand(p.shape, generator=generator, dtype=p.dtype) < p / tau)
    width = int(kept.sum(-1).max())
    first = (~kept).long().argsort(dim=-1, stable=True)[:, :width]
    there = kept.gather(1, first)
    shape = log_p.shape[:-1]
    return SparseSignal(
        ids=order.gather(1, first).masked_fill(~there, -1).view(*shape, width),
        log_probs=p.gather(1, first).log().view(*shape, width),
        log_tail=torch.where(sure, 0.0, p).sum(-1).log().view(shape), temperature=temperature,
        certain=certain.view(shape), log_tau=tau.log().view(shape),
    )  # fmt: skip


class FidelityTeacher:
    """A model's logits as one of the fidelities.

    Args:
        model: The teacher.
        outputs: Its logits.
        fidelity: "logits", "hidden" or "sparse".
        entries: Of a sparse signal; None: all classes.
        temperature: Of a sparse signal.
        seed: Of the draws, which depend on a row's content and on nothing else, as in a cache.
    """

    def __init__(
        self, model: nn.Module, fidelity: str, *, outputs: tuple[str, ...] = ("logits",),
        entries: int | None = None, temperature: float = 2.0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.inner = ModelTeacher(model, outputs)
        self.fidelity, self.entries, self.temperature, self.seed = fidelity, entries, temperature, seed
        self.config = model.config

    @property
    def identity(self) -> dict[str, str]:
        return {"name": "fake", "fingerprint": f"{self.fidelity} {self.entries}"}

    @property
    def columns(self) -> tuple[str, ...]:
        return self.inner.columns

    def __call__(self, batch: Any) -> TeacherSignal:
        dense = self.inner(batch)
        if self.fidelity == "logits":
            return dense
        (logits,) = dense.dense().values()
        if self.fidelity == "hidden":
            return TeacherSignal(hidden=as_hidden(logits))
        log_p = (logits.double() / self.temperature).log_softmax(-1)
        if self.entries is None:
            return TeacherSignal(sparse=threshold_sample(log_p, log_p.shape[-1], None, self.temperature))
        rows = [self._row(row, batch["input_ids"][i]) for i, row in enumerate(log_p)]
        return TeacherSignal(sparse=_stack(rows))

    def _row(self, log_p: Tensor, ids: Tensor) -> SparseSignal:
        content = int((ids * torch.arange(1, len(ids) + 1)).sum()) + self.seed * 100_003
        generator = torch.Generator().manual_seed(content)
        assert self.entries is not None
        return threshold_sample(log_p, self.entries, generator, self.temperature)


def as_hidden(logits: Tensor) -> HiddenTeacher:
    """Hidden states and a head (scale, bias) that give these logits."""
    classes = logits.shape[-1]
    g = torch.Generator().manual_seed(3)
    weight = torch.eye(classes, dtype=torch.float64)
    weight = weight + 0.1 * torch.randn(classes, classes, generator=g, dtype=torch.float64) / classes**0.5
    bias = torch.randn(classes, generator=g, dtype=torch.float64)
    hidden = (logits.double() / 2.0 - bias) @ torch.linalg.inv(weight).T
    head = Head(weight.to(logits.dtype), bias.to(logits.dtype), scale=2.0)
    return HiddenTeacher(hidden.to(logits.dtype), head)


def _stack(rows: list[SparseSignal]) -> SparseSignal:
    """Rows of `[L, n]` as `[B, L, n]`, entries filled up with -1."""
    width = max(row.ids.shape[-1] for row in rows)

    def padded(values: Tensor, fill: float) -> Tensor:
        return nn.functional.pad(values, (0, width - values.shape[-1]), value=fill)

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(row, name) for row in rows])

    return SparseSignal(
        ids=torch.stack([padded(row.ids, -1) for row in rows]),
        log_probs=torch.stack([padded(row.log_probs, 0.0) for row in rows]),
        log_tail=stacked("log_tail"), temperature=rows[0].temperature,
        certain=stacked("certain"), log_tau=stacked("log_tau"),
    )  # fmt: skip
