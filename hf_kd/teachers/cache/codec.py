"""A sparse signal as bytes of one length per position, and back.

A position is `[certain: 8 bits][log_tail: 16][log_tau: 16][ids: n x b bits][log-probs: n x 8 or 16]`. Ids
take the bits that the vocabulary needs; one id more means "no entry". A log-probability `x` in nats is stored
as the integer nearest to `-x * (2^bits - 2) / range`, so it is off by at most half a step; below the range it
is stored as the range, and the greatest integer is `-inf`.

Bound. With 16 bits a step is 32 / 65534 nats, so an entry is off by at most e = 2.45e-4 nats; with 8 bits it
is 16 / 254, and e = 3.15e-2 (entries below the range have less than `exp(-range)` each). For distributions
whose log-probabilities are off by at most e, KL after renormalising is at most `e^2 / 2` (Hoeffding's lemma:
the error has a width of 2e): 3e-8 and 5e-4 nats per position, for the kept classes and the tail.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..signal import SparseSignal

#: Range of stored log-probabilities in nats, by bits.
RANGES = {8: 16.0, 16: 32.0}
_HEAD = 5
_MOST_ID_BITS = 25


@dataclass(frozen=True)
class SparseCodec:
    """How positions are laid out.

    Attributes:
        classes: Size of the vocabulary.
        entries: Kept per position.
        temperature: Of the teacher's softmax.
        bits: Of a log-probability: 8 or 16.
        draws: Whether entries beyond the certain ones are draws; without them all are the likeliest.

    Raises:
        ValueError: If these don't fit together.
    """

    classes: int
    entries: int
    temperature: float = 1.0
    bits: int = 16
    draws: bool = True

    def __post_init__(self) -> None:
        """Refuse what could not be decoded."""
        if self.bits not in RANGES:
            raise ValueError(f"bits={self.bits} of a log-probability is not known: use 8 or 16")
        if not 1 <= self.entries <= min(self.classes, 255):
            raise ValueError(
                f"entries={self.entries} does not fit {self.classes} classes: set 1 to "
                f"{min(self.classes, 255)}"
            )
        if self.id_bits > _MOST_ID_BITS:
            raise ValueError(f"classes={self.classes} need more than {_MOST_ID_BITS} bits an id")

    @property
    def id_bits(self) -> int:
        """Bits of an id; the value `classes` means no entry."""
        return int(self.classes).bit_length()

    @property
    def stride(self) -> int:
        """Bytes per position."""
        return _HEAD + self._id_bytes + self.entries * self.bits // 8

    @property
    def _id_bytes(self) -> int:
        return (self.entries * self.id_bits + 7) // 8

    def describe(self) -> dict[str, Any]:
        """The layout as it goes into a manifest; draws are the rule, and only their absence is said."""
        return {name: value for name, value in asdict(self).items() if name != "draws" or not value}

    def encode(self, signal: SparseSignal) -> np.ndarray:
        """`[N, stride]` bytes of a signal `[N, entries]`.

        Raises:
            ValueError: If the signal has other entries, another temperature, draws where there are to be
                none, or ids outside the vocabulary.
        """
        if signal.ids.ndim != 2 or signal.ids.shape[-1] != self.entries:
            raise ValueError(f"signal of {tuple(signal.ids.shape)}; the codec stores [N, {self.entries}]")
        if signal.temperature != self.temperature:
            raise ValueError(f"signal at temperature {signal.temperature}, the codec at {self.temperature}")
        if signal.has_draws and not self.draws:
            raise ValueError("signal with draws, for a codec without")
        ids = signal.ids.cpu().numpy().astype(np.int64)
        if ids.size and (ids.max() >= self.classes or ids.min() < -1):
            raise ValueError(f"ids from {ids.min()} to {ids.max()}, outside the {self.classes} classes")
        rows = len(ids)
        certain = signal.certain
        if certain is None:
            count = (ids >= 0).sum(-1)
        else:
            count = certain.cpu().numpy()
        tau = torch.full_like(signal.log_tail, -torch.inf) if signal.log_tau is None else signal.log_tau
        out = np.zeros((rows, self.stride), dtype=np.uint8)
        out[:, 0] = count
        out[:, 1:3] = _levels(signal.log_tail, 16).view(np.uint8).reshape(rows, 2)
        out[:, 3:5] = _levels(tau, 16).view(np.uint8).reshape(rows, 2)
        stored = np.where(ids < 0, self.classes, ids)
        bits = (stored[..., None] >> np.arange(self.id_bits)) & 1
        flat = bits.astype(np.uint8).reshape(rows, self.entries * self.id_bits)
        packed = np.packbits(flat, axis=-1, bitorder="little")
        out[:, _HEAD : _HEAD + self._id_bytes] = packed
        levels = _levels(signal.log_probs, self.bits)
        out[:, _HEAD + self._id_bytes :] = levels.view(np.uint8).reshape(rows, self.entries * self.bits // 8)
        return out

    def decode(self, data: np.ndarray) -> SparseSignal:
        """The signal `[N, entries]` of `[N, stride]` bytes.

        Raises:
            ValueError: If the bytes can't be of this codec.
        """
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != self.stride:
            raise ValueError(f"{data.dtype} of {data.shape}; this codec reads uint8 [N, {self.stride}]")
        rows = len(data)
        # Ids are read four bytes at a time, wherever they start: three bytes at the end keep that inside.
        padded = np.zeros((rows, self._id_bytes + 3), dtype=np.uint8)
        padded[:, : self._id_bytes] = data[:, _HEAD : _HEAD + self._id_bytes]
        first = np.arange(self.entries) * self.id_bits
        words = np.ndarray((rows, self._id_bytes), "<u4", padded, strides=(padded.shape[1], 1))
        ids = (words[:, first // 8] >> (first % 8).astype(np.uint32)) & np.uint32((1 << self.id_bits) - 1)
        if ids.size and ids.max() > self.classes:
            raise ValueError(f"an id of {ids.max()} among {self.classes} classes: damaged bytes")
        certain = data[:, 0].astype(np.int64)
        if certain.size and certain.max() > self.entries:
            raise ValueError(f"{certain.max()} certain entries of {self.entries}: damaged bytes")
        found = torch.from_numpy(ids.astype(np.int64))
        if ids.size and ids.max() == self.classes:
            found = found.masked_fill(found == self.classes, -1)
        return SparseSignal(
            ids=found,
            log_probs=_nats(data[:, _HEAD + self._id_bytes :], self.bits),
            log_tail=_nats(data[:, 1:3], 16).squeeze(-1),
            temperature=self.temperature,
            certain=torch.from_numpy(certain) if self.draws else None,
            log_tau=_nats(data[:, 3:5], 16).squeeze(-1) if self.draws else None,
        )


def _levels(values: Tensor, bits: int) -> np.ndarray:
    """Log-probabilities as integers, little-endian."""
    most = (1 << bits) - 1
    values = values.detach().cpu().double()
    if bool(values.isnan().any()):
        raise ValueError("the teacher's log-probabilities are NaN: check its dtype")
    scaled = (-values * ((most - 1) / RANGES[bits])).round().clamp(0, most - 1)
    scaled = torch.where(torch.isneginf(values), torch.full_like(scaled, most), scaled)
    return np.ascontiguousarray(scaled.numpy().astype("<u2" if bits == 16 else "u1"))


def _nats(data: np.ndarray, bits: int) -> Tensor:
    levels = np.ascontiguousarray(data)
    levels = levels.view("<u2") if bits == 16 else levels
    most = (1 << bits) - 1
    table = -np.arange(most + 1, dtype=np.float32) * np.float32(RANGES[bits] / (most - 1))
    table[most] = -np.inf
    return torch.from_numpy(table[levels])
