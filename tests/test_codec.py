"""The sparse codec: its stated error is kept, its bytes are counted, and damage is noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_kd import SparseSignal
from hf_kd.teachers.cache import SparseCodec, threshold_sample

CLASSES = 5000
#: Nats per position, as stated in the codec's text.
BOUNDS = {16: 3e-8, 8: 5e-4}


def curves() -> dict[str, Tensor]:
    """`[rows, CLASSES]` logits of many shapes."""
    g = torch.Generator().manual_seed(0)
    rank = torch.arange(1, CLASSES + 1, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    found = {f"random logits, std {s}": s * normal(20, CLASSES) for s in range(1, 11)}
    for power in (0.5, 1.0, 1.5, 3.0):
        found[f"Zipf {power}"] = -power * rank.log().expand(4, -1)
    for gap in (1.0, 5.0, 20.0, 100.0):
        peaked = 0.1 * normal(4, CLASSES)
        peaked[:, 3] += gap
        found[f"peaked {gap}"] = peaked
    found["flat"] = torch.zeros(2, CLASSES, dtype=torch.float64)
    one_hot = torch.full((2, CLASSES), -torch.inf, dtype=torch.float64)
    one_hot[:, 7] = 0.0
    found["one-hot"] = one_hot
    found["two classes"] = one_hot.clone()
    found["two classes"][:, 11] = -3.3
    uniform = torch.rand(20, CLASSES, generator=g, dtype=torch.float64)
    found["heavy tails"] = (torch.pi * (uniform - 0.5)).tan().clamp(-1e4, 1e4)
    found["exponential"] = (-0.02 * rank).expand(2, -1)
    return found


CURVES = curves()


def renormalised(signal: SparseSignal) -> Tensor:
    """`[N, k + 1]` log-probabilities of the certain entries and the tail, which add up to 1."""
    tail = signal.tail()
    assert tail.log_tail is not None
    kept = tail.log_probs.double().masked_fill(tail.ids < 0, -torch.inf)
    return torch.cat([kept, tail.log_tail.double().unsqueeze(-1)], -1).log_softmax(-1)


@pytest.mark.parametrize("bits", BOUNDS)
@pytest.mark.parametrize("name", CURVES)
def test_error_is_below_the_stated_bound(name: str, bits: int) -> None:
    """Trap 47: KL of what was said and what is read, over kept classes and tail, whatever the shape."""
    logits = CURVES[name]
    for entries, least in ((1, 0), (28, 14), (28, 28), (64, 32)):
        signal = threshold_sample(
            logits, entries, least_certain=least, generator=torch.Generator().manual_seed(1)
        )
        codec = SparseCodec(CLASSES, entries, bits=bits)
        read = codec.decode(codec.encode(signal))
        assert (read.ids == signal.ids).all()
        assert (read.certain == signal.certain).all()
        log_p, log_q = renormalised(signal), renormalised(read)
        there = log_p > -torch.inf
        # Below the range an entry is stored as the range: its share of the divergence is its own mass.
        terms = torch.where(there, log_p.exp() * (log_p - log_q), 0.0)
        kl = terms.sum(-1)
        assert kl.isfinite().all(), "an entry with mass was stored as none"
        assert float(kl.max()) <= BOUNDS[bits] + 1e-9, f"{float(kl.max()):.2e} nats"


def test_the_bound_is_no_idle_one() -> None:
    """Trap 47: counter-example: seven bits of the same range break what is stated for eight."""
    logits = 3 * torch.randn(200, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signal = threshold_sample(logits, 28, least_certain=28)
    exact = renormalised(signal)

    def error(steps: int) -> float:
        step = 16.0 / steps
        read = renormalised(
            SparseSignal(
                signal.ids, (signal.log_probs / step).round() * step, (signal.log_tail / step).round() * step,
                1.0, signal.certain, signal.log_tau,
            )
        )  # fmt: skip
        return float((exact.exp() * (exact - read)).sum(-1).max())

    assert error(254) <= BOUNDS[8] < error(63)


@pytest.mark.parametrize("classes", [2, 255, 256, 151_936, 1 << 20])
def test_ids_come_back(classes: int) -> None:
    """Every id of every width, and the mark for none."""
    entries = min(classes, 28)
    codec = SparseCodec(classes, entries)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, classes, (300, entries), generator=g)
    ids[0], ids[1], ids[2] = classes - 1, 0, -1
    signal = SparseSignal(ids, torch.zeros(ids.shape), torch.zeros(300))
    assert (codec.decode(codec.encode(signal)).ids == ids).all()


def test_bytes_of_a_token() -> None:
    """28 entries of a vocabulary of 151,936 take at most 128 bytes, as many as are written."""
    for bits, most in ((16, 128), (8, 100)):
        codec = SparseCodec(151_936, 28, bits=bits)
        ids = torch.zeros(3, 28, dtype=torch.long)
        data = codec.encode(SparseSignal(ids, torch.zeros(3, 28), torch.zeros(3)))
        assert data.shape == (3, codec.stride) and codec.stride <= most
    assert SparseCodec(151_936, 28).stride == 5 + -(-28 * 18 // 8) + 2 * 28


@given(st.integers(1, 60), st.integers(0, 1 << 30), st.sampled_from([8, 16]), st.data())
@settings(max_examples=30, deadline=None)
def test_round_trip(entries: int, seed: int, bits: int, data: st.DataObject) -> None:
    """What was read and is written again is the same bytes; each value is within half a step."""
    classes = data.draw(st.integers(max(entries, 2), 1 << 20))
    g = torch.Generator().manual_seed(seed)
    rows = data.draw(st.integers(0, 5))
    log_probs = -torch.rand(rows, entries, generator=g) * 40
    signal = SparseSignal(
        torch.randint(-1, classes, (rows, entries), generator=g), log_probs,
        -torch.rand(rows, generator=g) * 40, 2.5,
        torch.randint(0, entries + 1, (rows,), generator=g), -torch.rand(rows, generator=g) * 40,
    )  # fmt: skip
    codec = SparseCodec(classes, entries, 2.5, bits)
    stored = codec.encode(signal)
    read = codec.decode(stored)
    assert (read.ids == signal.ids).all() and (read.certain == signal.certain).all()
    assert read.temperature == 2.5
    half = {8: 16 / 254 / 2, 16: 32 / 65534 / 2}
    edge = {8: 16.0, 16: 32.0}
    for name, width in (("log_probs", bits), ("log_tail", 16), ("log_tau", 16)):
        expected = getattr(signal, name).clamp_min(-edge[width])
        assert ((getattr(read, name) - expected).abs() <= half[width] + 1e-5).all()
    assert (codec.encode(read) == stored).all()


@given(st.integers(2, 300), st.integers(0, 1 << 30), st.data())
@settings(max_examples=40, deadline=None)
def test_damaged_bytes(classes: int, seed: int, data: st.DataObject) -> None:
    """Any bytes are refused or are a signal that fits together; no id is outside of the vocabulary."""
    entries = data.draw(st.integers(1, min(classes, 30)))
    codec = SparseCodec(classes, entries)
    stored = np.random.default_rng(seed).integers(0, 256, (4, codec.stride), dtype=np.uint8)
    if data.draw(st.booleans()):
        stored[:, 0] = stored[:, 0] % (entries + 1)
    try:
        read = codec.decode(stored)
    except ValueError as error:
        assert "damaged" in str(error)
        return
    assert read.certain is not None
    assert int(read.ids.min()) >= -1 and int(read.ids.max()) < classes
    assert int(read.certain.max()) <= entries
    assert (read.log_probs <= 0).all() and (read.log_tail <= 0).all()


def test_bytes_of_another_codec() -> None:
    codec = SparseCodec(100, 4)
    for bad in (np.zeros((2, codec.stride + 1), np.uint8), np.zeros((2, codec.stride), np.int8)):
        with pytest.raises(ValueError, match="this codec reads uint8"):
            codec.decode(bad)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"classes": 10, "entries": 11}, "entries=11 does not fit 10 classes: set 1 to 10"),
        ({"classes": 1000, "entries": 256}, "set 1 to 255"),
        ({"classes": 10, "entries": 0}, "entries=0"),
        ({"classes": 10, "entries": 2, "bits": 4}, "use 8 or 16"),
        ({"classes": 1 << 26, "entries": 2}, "more than 25 bits"),
    ],
)
def test_layouts_that_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseCodec(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"ids": torch.full((2, 4), 100)}, "outside the 100 classes"),
        ({"ids": torch.full((2, 4), -2)}, "outside the 100 classes"),
        ({"temperature": 2.0}, "temperature 2.0, the codec at 1.0"),
        ({"log_tail": torch.full((2,), torch.nan)}, "NaN"),
    ],
)
def test_signals_that_are_refused(changes: dict[str, object], message: str) -> None:
    good = {
        "ids": torch.zeros(2, 4, dtype=torch.long), "log_probs": torch.zeros(2, 4),
        "log_tail": torch.zeros(2),
    }  # fmt: skip
    codec = SparseCodec(100, 4)
    codec.encode(SparseSignal(**good))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        codec.encode(SparseSignal(**{**good, **changes}))  # type: ignore[arg-type]
    wide = SparseSignal(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5), torch.zeros(2))
    with pytest.raises(ValueError, match=r"the codec stores \[N, 4\]"):
        codec.encode(wide)
