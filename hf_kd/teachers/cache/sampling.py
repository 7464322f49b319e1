"""Which entries of a distribution to keep: the likeliest for sure, the rest by chance, without bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..signal import SparseSignal

# Rows that are worked on at once: what fits a processor's cache is read again for nothing.
_CHUNK_BYTES = 4 << 20
# Classes are looked at in blocks: only the best blocks are searched, only those that are hit are summed up.
_BLOCK = 128
# Classes this near to the threshold are kept for sure: rounding can't make one be drawn twice.
_NEAR = 1e-5


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

    Probabilities are in the logits' dtype, at least float32; sums, tau and what is returned of the entries
    are computed in float64.

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
        ValueError: If the numbers don't fit, or a row has no largest logit that is finite.
    """
    if logits.ndim != 2 or not 1 <= entries <= logits.shape[-1] or not 0 <= least_certain <= entries:
        raise ValueError(
            f"threshold_sample: logits {tuple(logits.shape)}, entries={entries}, least_certain="
            f"{least_certain}; give [N, V] with 0 <= least_certain <= entries <= V."
        )
    start = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator)
    rows = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    parts = [
        _sample(part, entries, temperature, least_certain, begin)
        for part, begin in zip(logits.split(rows), start.split(rows), strict=True)
    ]
    ids, log_probs, log_tail, certain, log_tau = (torch.cat(column) for column in zip(*parts, strict=True))
    return SparseSignal(ids, log_probs, log_tail, temperature, certain, log_tau)


def _sample(
    logits: Tensor, entries: int, temperature: float, least: int, start: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    mass = F.pad(logits.to(wide), (0, -logits.shape[-1] % _BLOCK), value=-torch.inf)
    blocks = mass.unflatten(-1, (mass.shape[-1] // _BLOCK, _BLOCK))
    best = blocks.amax(-1)
    top, ids = _top(blocks, best, entries)
    most = top[:, :1]
    if not bool(most.isfinite().all()):
        raise ValueError("threshold_sample: a row's largest logit is NaN or infinite: check the teacher")
    mass.sub_(most).mul_(1 / temperature).exp_()
    mass.scatter_(-1, ids, 0.0)
    # What is outside the likeliest is summed up by itself: 1 - (almost 1) would have no digits left.
    sums = blocks.sum(-1).double()
    outside = sums.sum(-1)
    scaled = (top.double() - most.double()) / temperature
    p = scaled.exp()
    log_total = (p.sum(-1) + outside).log().unsqueeze(-1)

    place = torch.arange(entries, device=p.device)
    rest = p.flip(-1).cumsum(-1).flip(-1) + outside.unsqueeze(-1)  # mass outside the first j entries
    tau = rest / (entries - place)
    # The fewest certain entries after which no other is above the threshold; all if nothing else has mass.
    fits = (p <= tau * (1 - _NEAR)) & (place >= least) & (rest > 0)
    fits[:, -1] = (outside > 0) & (least < entries)
    drawn = fits.any(-1)
    finite = (top > -torch.inf).sum(-1)
    certain = torch.where(drawn, fits.int().argmax(-1), finite)
    sure = place < certain.unsqueeze(-1)
    log_tail = torch.cat([rest, outside.unsqueeze(-1)], -1).gather(-1, certain.unsqueeze(-1)).log()
    log_tau = tau.gather(-1, certain.clamp_max(entries - 1).unsqueeze(-1)).log() - log_total
    log_tau = log_tau.squeeze(-1).masked_fill(~drawn, -torch.inf)

    # The likeliest that are not certain may be drawn too.
    again = p.masked_fill(sure, 0.0).to(wide)
    mass.scatter_(-1, ids, again)
    sums.scatter_add_(-1, ids // _BLOCK, again.double())
    found = _draw(blocks, sums, start, entries - certain, entries)
    shift = (place - certain.unsqueeze(-1)).clamp_min(0)
    ids = torch.where(sure, ids, torch.where(drawn.unsqueeze(-1), found.gather(-1, shift), -1))
    values = logits.gather(-1, ids.clamp_min(0)).double()
    log_probs = ((values - most.double()) / temperature - log_total).masked_fill(ids < 0, 0.0)
    log_tail = (log_tail - log_total).squeeze(-1)
    return ids, log_probs.float(), log_tail.float(), certain, log_tau.float()


def _top(blocks: Tensor, best: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """The largest entries of each row, in order, and where they are: all in the blocks of largest maxima."""
    chosen = best.topk(min(entries, best.shape[-1]), -1).indices
    near = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, blocks.shape[-1]))
    top = near.flatten(1).topk(entries, -1)
    block = chosen.gather(-1, top.indices // blocks.shape[-1])
    return top.values, block * blocks.shape[-1] + top.indices % blocks.shape[-1]


def _draw(blocks: Tensor, sums: Tensor, start: Tensor, wanted: Tensor, entries: int) -> Tensor:
    """Systematic sampling: the first `wanted` of `[N, entries]` classes, at equal steps of mass."""
    ladder = sums.cumsum(-1)
    step = ladder[:, -1:] / wanted.clamp_min(1).unsqueeze(-1)
    ticks = (torch.arange(entries, device=sums.device) + start) * step
    ticks = torch.minimum(ticks, _below(ladder[:, -1:]))
    block = torch.searchsorted(ladder, ticks, right=True).clamp_max(sums.shape[-1] - 1)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, blocks.shape[-1])).double().cumsum(-1)
    size = sums.gather(-1, block)
    share = 1 - (ladder.gather(-1, block) - ticks) / size
    local = torch.minimum((share * inside[..., -1]).clamp_min(0.0), _below(inside[..., -1]))
    within = torch.searchsorted(inside, local.unsqueeze(-1), right=True).squeeze(-1)
    return block * blocks.shape[-1] + within.clamp_max(blocks.shape[-1] - 1)


def _below(values: Tensor) -> Tensor:
    """The numbers just below; 0 below 0."""
    return torch.nextafter(values, torch.zeros_like(values))
