"""Which entries of a distribution to keep: the likeliest for sure, the rest by chance, without bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..signal import SparseSignal

# Rows whose whole distribution is in double precision at once.
_CHUNK_BYTES = 64 << 20


@torch.no_grad()
def threshold_sample(
    logits: Tensor,
    entries: int,
    *,
    temperature: float = 1.0,
    least_certain: int = 0,
    generator: torch.Generator | None = None,
) -> SparseSignal:
    """Keep `entries` classes of each row: threshold sampling (Duffield, Lund, Thorup 2005).

    With tau such that `sum_i min(1, p_i / tau) = entries`, classes with `p > tau` are kept for sure, the
    others with probability `p / tau` at a weight of tau: of all unbiased choices of that many entries the one
    of least variance. The draws are systematic: exactly `entries` in all, none twice.

    Args:
        logits: `[N, V]`; `-inf` for classes without mass.
        entries: How many to keep of each row.
        temperature: Of the softmax.
        least_certain: Keep at least so many of the likeliest for sure, below `entries` if there is to be
            anything left to draw.
        generator: Of the draws, on the logits' device.

    Returns:
        Entries `[N, entries]`, certain ones first; -1 where a row has fewer classes with mass.

    Raises:
        ValueError: If the numbers don't fit.
    """
    classes = logits.shape[-1]
    if logits.ndim != 2 or not 1 <= entries <= classes or not 0 <= least_certain <= entries:
        raise ValueError(
            f"threshold_sample: logits {tuple(logits.shape)}, entries={entries}, least_certain="
            f"{least_certain}; give [N, V] with 0 <= least_certain <= entries <= V."
        )
    rows = max(1, _CHUNK_BYTES // (8 * classes))
    parts = [_sample(part, entries, temperature, least_certain, generator) for part in logits.split(rows)]
    if not parts:
        parts = [_sample(logits, entries, temperature, least_certain, generator)]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    ids, log_probs, log_tail, certain, log_tau = columns
    return SparseSignal(
        ids=ids,
        log_probs=log_probs,
        log_tail=log_tail,
        temperature=temperature,
        certain=certain,
        log_tau=log_tau,
    )


def _sample(
    logits: Tensor, entries: int, temperature: float, least: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_p = (logits.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    top = p.topk(entries, dim=-1)
    # rest[:, j]: mass outside the j likeliest; summed from below, since 1 - (almost 1) has no digits left.
    outside = (p.sum(-1) - top.values.sum(-1)).clamp_min(0.0)
    beyond = p.scatter(-1, top.indices, 0.0).sum(-1)
    outside = torch.where(outside < 1e-6, beyond, outside)
    rest = top.values.flip(-1).cumsum(-1).flip(-1) + outside.unsqueeze(-1)
    left = torch.arange(entries, 0, -1, device=p.device)
    tau = rest / left
    # The fewest certain entries after which no other is above the threshold; all of them if nothing is left.
    fits = (top.values <= tau) & (torch.arange(entries, device=p.device) >= least)
    fits &= rest > 0
    certain = torch.where(fits.any(-1), fits.int().argmax(-1), torch.full_like(fits.sum(-1), entries))
    present = (top.values > 0).sum(-1)
    certain = torch.where(fits.any(-1), certain, torch.minimum(certain, present))

    log_tail = _at(rest, certain, outside).log()
    log_tau = torch.where(fits.any(-1), _at(tau, certain, outside), torch.zeros_like(outside)).log()
    place = torch.arange(entries, device=p.device).expand_as(top.indices)
    sure = place < certain.unsqueeze(-1)
    ids = torch.where(sure, top.indices, torch.full_like(top.indices, -1))
    _draw(p.scatter(-1, top.indices, p.gather(-1, top.indices) * ~sure), ids, certain, generator)
    log_probs = log_p.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0)
    single = torch.float32
    return ids, log_probs.to(single), log_tail.to(single), certain, log_tau.to(single)


def _at(values: Tensor, index: Tensor, beyond: Tensor) -> Tensor:
    """`values[n, index[n]]`, or `beyond[n]` where the index is one past the end."""
    return torch.cat([values, beyond.unsqueeze(-1)], -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _draw(p: Tensor, ids: Tensor, certain: Tensor, generator: torch.Generator | None) -> None:
    """Fill the places after the certain entries by systematic sampling from what is left of `p`."""
    entries = ids.shape[-1]
    wanted = entries - certain
    total = p.cumsum(-1)
    step = total[:, -1:] / wanted.clamp_min(1).unsqueeze(-1)
    start = torch.rand(len(p), 1, dtype=torch.float64, device=p.device, generator=generator)
    ticks = (torch.arange(entries, device=p.device) + start) * step
    found = torch.searchsorted(total, ticks.clamp_max(math.inf), right=True).clamp_max(p.shape[-1] - 1)
    draws = (torch.arange(entries, device=p.device) < wanted.unsqueeze(-1)) & (total[:, -1:] > 0)
    target = (certain.unsqueeze(-1) + torch.arange(entries, device=p.device)).clamp_max(entries - 1)
    row = torch.arange(len(p), device=p.device).unsqueeze(-1).expand_as(ids)
    ids[row[draws], target[draws]] = found[draws]
