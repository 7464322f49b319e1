"""Logits one tile at a time: heads, what a teacher gives, and how large a piece of work may be.

A tile is `[n, w]`: `n` tokens of a chunk by `w` classes of the vocabulary. It is small enough to stay in
cache while the point-wise work passes over it, and it is all that ever exists of a `[tokens, vocabulary]`
matrix beyond one chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DenseTeacher", "Head", "HiddenTeacher", "SparseTeacher"]

#: A draw of which the student thinks far more often than the teacher would outweigh all others: 3.5 nats.
LOG_MOST_RATIO = math.log(32)

# Two MiB a thread stay in cache and keep barriers far apart; on an accelerator, launches should be few.
_TILE_BYTES = 1 << 21
_ACCELERATOR_TILE_BYTES = 1 << 25
_MAX_TOKENS = 512
_MIN_TOKENS = 8
# Products are up to a third slower where the number of tokens is not a multiple of this.
_ALIGNED = 16
# What BLAS and the allocator hold beside our own buffers.
_OVERHEAD_BYTES = 8 << 20
# Classes of a tile; a budget reserves for each token what this many tiles' statistics take.
_NARROW = 512
# A copy of some rows of the heads in the dtype of the maths, where theirs is another.
_UPCAST_BYTES = 16 << 20


@dataclass(frozen=True)
class Head:
    """A linear layer, `z = scale * (hidden @ weight.T + bias)`, then `softcap * tanh(z / softcap)`.

    Attributes:
        weight: `[V, H]`; for tied embeddings, the embedding matrix.
        bias: `[V]` or None. Entries may be `-inf`: such classes have no mass.
        softcap: Bound of the logits, or None for none.
        scale: Factor of the logits.
        rows: `[C]` rows of the weight that are the classes, in their order, of a teacher whose student has
            other or fewer ones; None: all of them, in theirs. They are gathered tile by tile.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse shapes and numbers that can't be a head."""
        if self.weight.ndim != 2:
            raise ValueError(f"Head.weight has shape {tuple(self.weight.shape)}; give a [V, H] matrix.")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"Head.bias has shape {tuple(self.bias.shape)}, the weight {tuple(self.weight.shape)}; "
                "give one bias per class."
            )
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"Head.softcap={self.softcap} must be positive; give None for no soft-cap.")
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"Head.scale={self.scale} must be finite and not 0.")

    @property
    def classes(self) -> int:
        """Size of the vocabulary, padding included."""
        return self.weight.shape[0] if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class HiddenTeacher:
    """A teacher as its last hidden state `[..., H]` and its head: lossless, small at large vocabularies."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher as logits `[..., V]`, before any temperature; `-inf` removes a class. Never edited."""

    logits: Tensor


@dataclass(frozen=True)
class SparseTeacher:
    """A teacher as a few entries per position, at the temperature of the loss (`teacher_temperature`).

    Either with the mass of all other classes as one class more (`log_tail`; any divergence, on `k + 1`
    classes), or as an unbiased sample (`weights`; forward KL only).

    Attributes:
        ids: `[..., k]` class of each entry; -1 is no entry. Distinct per position with `log_tail`.
        log_probs: `[..., k]` the teacher's log-probability of each.
        log_tail: `[...]` log of the mass of all classes not in `ids`; `-inf` if there are none.
        weights: `[..., k]` what each entry stands for: its probability if it is there for certain; for a
            draw, what makes the expectation the probability (tau, for one kept with probability `p / tau`).
            Classes may repeat.
        control: With weights, how much of a control variate is added to quieten the draws: the gradient of
            `sum_i w_i q_i / p_i`, of the student's q. It is 0 on average, because `w_i / p_i` is one over the
            probability of having drawn i and q sums to 1; where q is near p it undoes most of what the draws
            add by chance. Entries with q above 32 p, which are rare and would shake a step, are left out of
            it: those classes are pushed down by `1 - control` of what they should. The value stays as it is.
            0: none.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor | None = None
    weights: Tensor | None = None
    control: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a signal that would have to be renormalised, which turns the gradient."""
        if (self.log_tail is None) == (self.weights is None):
            raise ValueError(
                "A SparseTeacher needs either log_tail (mass of all other classes) or weights (unbiased "
                f"draws); got {'neither' if self.log_tail is None else 'both'}. Where the entries are all "
                "classes, log_tail is -inf."
            )
        if self.control and (self.weights is None or not math.isfinite(self.control)):
            raise ValueError(
                f"SparseTeacher.control={self.control} takes chance out of draws: it must be finite, and "
                "needs weights; with log_tail nothing is drawn, give 0."
            )
        if self.ids.shape != self.log_probs.shape:
            raise ValueError(
                f"SparseTeacher.ids is {tuple(self.ids.shape)}, log_probs {tuple(self.log_probs.shape)}; "
                "they must match."
            )


Teacher = HiddenTeacher | DenseTeacher | SparseTeacher


class Projection:
    """Logits of one model over a temperature for a chunk of tokens, tile by tile."""

    def __init__(self, head: Head, temperature: float, dtype: torch.dtype) -> None:
        self.head = head
        self.dtype = dtype
        self.weight = head.weight.detach()
        # Soft-cap over temperature, and all that multiplies the product, folded into the hidden states.
        self.cap = None if head.softcap is None else head.softcap / temperature
        self.divisor = temperature if head.softcap is None else head.softcap
        self.factor = head.scale / self.divisor
        self.rows = None if head.rows is None else head.rows.to(self.weight.device)
        bias = head.bias if head.bias is None or self.rows is None else head.bias[self.rows]
        self.bias = None if bias is None else bias.detach().to(dtype) * self.factor
        self.has_masked = self.bias is not None and bool(torch.isneginf(self.bias).any())
        self._upcast: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns of the hidden state."""
        return self.weight.shape[1]

    @property
    def copies(self) -> bool:
        """Whether each tile of the weight is copied before it is used."""
        return self.weight.dtype != self.dtype or self.rows is not None

    def prepare(self, hidden: Tensor | None, rows: Tensor) -> Tensor:
        """Hidden states `[n, H]` of some rows, in the dtype of the maths and scaled."""
        assert hidden is not None
        return hidden.detach().index_select(0, rows).to(self.dtype).mul_(self.factor)

    def rows_of_weight(self, start: int, stop: int) -> Tensor:
        """Rows of the head `[w, H]`: a view if the dtype is right, else a copy that the next call overwrites.

        One tile is upcast at a time: without hardware for half precision a product in fp32 is far faster, and
        exact.
        """
        if self.rows is not None:
            part = self.weight.index_select(0, self.rows[start:stop])
        else:
            part = self.weight[start:stop]
        if part.dtype == self.dtype:
            return part
        if self._upcast is None or self._upcast.shape[0] < stop - start:
            self._upcast = torch.empty(stop - start, self.width, dtype=self.dtype, device=part.device)
        return self._upcast[: stop - start].copy_(part)

    def tile(self, hidden: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
        """Write the logits of classes `start` to `stop` over the temperature into `out [n, w]`."""
        torch.mm(self.rows_of_weight(start, stop), hidden.T, out=out.T)
        if self.bias is not None:
            out.add_(self.bias[start:stop])
        if self.cap is not None:
            out.tanh_().mul_(self.cap)
        return out

    def at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits over the temperature `[n, k]` of a few classes `ids [n, k]` per token."""
        out = torch.empty(ids.shape, dtype=self.dtype, device=hidden.device)
        places = ids if self.rows is None else self.rows[ids]
        step = max(1, _TILE_BYTES // (4 * self.width * max(1, ids.shape[1])))
        for first in range(0, ids.shape[0], step):
            part = slice(first, first + step)
            rows = self.weight[places[part]].to(self.dtype)
            out[part] = torch.bmm(rows, hidden[part].unsqueeze(-1)).squeeze(-1)
        if self.bias is not None:
            out.add_(self.bias[ids])
        if self.cap is not None:
            out.tanh_().mul_(self.cap)
        return out

    def elements(self, hidden: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        """Logits over the temperature `[m]` of single pairs of a row and a class."""
        step = max(1, _TILE_BYTES // (4 * self.width))
        parts = [
            self.at(hidden[r], c.unsqueeze(1)).squeeze(1)
            for r, c in zip(rows.split(step), classes.split(step), strict=True)
        ]
        return torch.cat(parts) if parts else hidden.new_empty(0)


class DenseSource:
    """The same tiles, read from logits that already exist."""

    has_masked = True  # not known before they are read
    width = 0

    def __init__(self, logits: Tensor, temperature: float) -> None:
        self.logits = logits.detach()
        self.temperature = temperature

    def prepare(self, _: Tensor | None, rows: Tensor) -> Tensor:
        """The rows themselves: logits are read tile by tile, never copied whole."""
        return rows

    def tile(self, rows: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
        """Write the logits of classes `start` to `stop` over the temperature into `out [n, w]`."""
        out.copy_(self.logits[:, start:stop].index_select(0, rows))
        return out if self.temperature == 1 else out.div_(self.temperature)


@dataclass(frozen=True)
class Tile:
    """Classes `start` to `stop`; `shared` if the teacher knows them, else only cross-entropy does."""

    start: int
    stop: int
    shared: bool

    @property
    def width(self) -> int:
        """Number of classes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """How many tokens a chunk has, and which tiles the vocabulary is cut into."""

    tokens: int
    tiles: tuple[Tile, ...]
    widest: int


def make_plan(
    rows: int,
    *,
    classes: int,
    shared: int,
    kept_columns: int,
    chunk_bytes: int,
    row_bytes: int,
    scratch: int,
    upcast_columns: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """Choose chunk and tile so that everything temporary fits into `chunk_bytes`.

    Args:
        rows: Tokens there are.
        classes: Size of the student's vocabulary.
        shared: Classes that the teacher knows too: the first ones.
        kept_columns: Columns that a chunk holds between the passes, both models together.
        chunk_bytes: The budget.
        row_bytes: Bytes a token needs beside its kept columns.
        scratch: Number of tiles held at a time.
        upcast_columns: Widths of the heads of which a copy in `dtype` is made, tile by tile, together.
        dtype: Of the maths.
        device: Where.
    """
    item = dtype.itemsize
    tile_bytes = _ACCELERATOR_TILE_BYTES if device.type != "cpu" else _TILE_BYTES * torch.get_num_threads()
    tile_bytes = min(tile_bytes, max(1 << 16, chunk_bytes // 64))
    upcast_bytes = min(_UPCAST_BYTES, chunk_bytes // 8) if upcast_columns else 0
    reserved = upcast_bytes + scratch * tile_bytes + min(_OVERHEAD_BYTES, chunk_bytes // 16)
    left = chunk_bytes - reserved
    tokens = max(_MIN_TOKENS, min(_MAX_TOKENS, left // (item * kept_columns + row_bytes)))
    if not kept_columns:  # statistics are most of what is left: tiles not so narrow that there are many
        tokens = max(_MIN_TOKENS, min(tokens, tile_bytes // (item * _NARROW)))
    # Equal chunks: a small last one would be slow.
    if tokens >= _ALIGNED:
        tokens = tokens // _ALIGNED * _ALIGNED
    even = -(-rows // -(-rows // tokens)) if rows else 1
    tokens = min(tokens, -(-even // _ALIGNED) * _ALIGNED)
    width = tile_bytes // (item * tokens)
    if upcast_columns:
        width = min(width, upcast_bytes // (item * upcast_columns))
    width = max(64, width // 64 * 64)
    tiles = [Tile(a, min(a + width, shared), True) for a in range(0, shared, width)]
    tiles += [Tile(a, min(a + width, classes), False) for a in range(shared, classes, width)]
    return Plan(tokens, tuple(tiles), min(width, max(classes, 1)))


def power(base: Tensor, exponent: float, out: Tensor) -> Tensor:
    """`base ** exponent` for a base in [0, 1] and an exponent of at least 1; `out` may not be `base`.

    `torch.pow` takes five times as long as an exponential; whole exponents are products.
    """
    if exponent == 1:
        return out.copy_(base)
    if exponent == int(exponent) and exponent <= 32:
        bits = bin(int(exponent))[3:]
        torch.mul(base, base, out=out)
        if bits[0] == "1":
            out.mul_(base)
        for bit in bits[1:]:
            out.mul_(out)
            if bit == "1":
                out.mul_(base)
        return out
    return torch.log(base, out=out).mul_(exponent).exp_()
