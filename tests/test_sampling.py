"""Threshold sampling: without bias, of fixed size, and nothing that has no mass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_kd import SparseSignal
from hf_kd.teachers.cache import threshold_sample


def logits_of(classes: int, std: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (std * torch.randn(classes, generator=g, dtype=torch.float64)).to(dtype)


def draws(logits: Tensor, entries: int, times: int, **options: object) -> SparseSignal:
    g = torch.Generator().manual_seed(7)
    return threshold_sample(logits.expand(times, -1), entries, generator=g, **options)  # type: ignore[arg-type]


def weights_of(signal: SparseSignal, classes: int) -> Tensor:
    """`[N, V]` what each draw says of the distribution."""
    sparse = signal.draws()
    out = torch.zeros(len(signal.ids), classes, dtype=torch.float64)
    assert sparse.weights is not None
    return out.scatter_add(1, sparse.ids.clamp_min(0), sparse.weights.double())


@pytest.mark.parametrize("classes,entries,least", [(40, 6, 0), (300, 12, 6), (129, 3, 1), (9, 8, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_of_the_draws_is_the_distribution(
    classes: int, entries: int, least: int, dtype: torch.dtype
) -> None:
    """Trap 12: no class is favoured; counter-example: the top ones, renormalised, are far off."""
    logits = logits_of(classes, dtype=dtype)
    p = logits.double().softmax(-1)
    times = 8_000
    signal = draws(logits, entries, times, least_certain=least)
    said = weights_of(signal, classes)
    # Each weight is 0 or tau: a standard error per class.
    tau = signal.log_tau.exp()[0].double()  # type: ignore[union-attr]
    error = (p * (tau - p).clamp_min(0) / times).sqrt()
    assert ((said.mean(0) - p).abs() <= 5 * error + 1e-6).all()
    top = p.topk(entries)
    renormalised = torch.zeros_like(p).scatter(0, top.indices, top.values / top.values.sum())
    assert ((renormalised - p).abs() > 5 * error + 1e-6).any()


@given(st.integers(2, 400), st.floats(0.0, 12.0), st.integers(0, 10_000), st.data())
@settings(max_examples=40, deadline=None)
def test_threshold_and_size(classes: int, std: float, seed: int, data: st.DataObject) -> None:
    """`sum min(1, p / tau)` is the number of entries; all are there, none twice; the tail is what is left."""
    entries = data.draw(st.integers(1, classes))
    least = data.draw(st.integers(0, entries - 1))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 2.0, 7.0]))
    logits = torch.stack([logits_of(classes, std, seed), logits_of(classes, std, seed + 1)])
    log_p = (logits / temperature).log_softmax(-1)
    signal = threshold_sample(logits, entries, temperature=temperature, least_certain=least)
    certain = signal.certain
    assert certain is not None and signal.log_tau is not None
    for row, ids in enumerate(signal.ids.tolist()):
        assert min(ids) >= 0 and len(set(ids)) == entries and max(ids) < classes
        sure = ids[: int(certain[row])]
        assert len(sure) >= least
        assert (log_p[row][sure] == log_p[row].topk(len(sure)).values).all()
        tau = signal.log_tau[row].double().exp()
        p = log_p[row].exp()
        if len(sure) < entries:
            left = p.scatter(0, torch.tensor(sure, dtype=torch.long), 0.0)
            assert float((left / tau).sum()) == pytest.approx(entries - len(sure), rel=1e-5)
            assert (left <= tau * (1 + 1e-5)).all()
            if least == 0:
                assert float((p / tau).clamp_max(1).sum()) == pytest.approx(entries, rel=1e-4)
        else:
            assert float(tau) == 0.0
        rest = torch.ones(classes, dtype=torch.bool)
        rest[sure] = False
        expected = log_p[row][rest].logsumexp(0) if rest.any() else torch.tensor(-torch.inf)
        torch.testing.assert_close(signal.log_tail[row].double(), expected.double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(signal.log_probs[row].double(), log_p[row][ids], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_summed_up_exactly(dtype: torch.dtype) -> None:
    """Trap 8: the tail of a peaked distribution has its digits; counter-example: one minus the top."""
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, 17] = 30.0
    kept = logits.clone()
    signal = threshold_sample(logits, 8)
    assert (logits == kept).all()
    log_p = logits.double().log_softmax(-1)
    for row in range(4):
        sure = signal.tail().ids[row]
        rest = torch.ones(1000, dtype=torch.bool)
        rest[sure[sure >= 0]] = False
        exact = log_p[row][rest].logsumexp(0)
        assert abs(float(signal.log_tail[row].double() - exact)) < 2e-6
        naive = (1 - logits[row].float().softmax(-1)[~rest].sum()).log()
        assert abs(float(naive - exact)) > 1e-2


def test_classes_without_mass_are_never_drawn() -> None:
    """Trap 9: `-inf` is no entry, at the ends of a vocabulary too, and fewer classes leave places empty."""
    logits = torch.randn(200)
    logits[[0, 5, 127, 128, 199]] = -torch.inf
    ids = draws(logits, 20, 500).ids
    assert (ids >= 0).all() and not torch.isin(ids, torch.tensor([0, 5, 127, 128, 199])).any()
    few = torch.full((3, 200), -torch.inf)
    few[:, [3, 150]] = torch.tensor([0.0, 1.0])
    signal = threshold_sample(few, 5)
    assert signal.ids.tolist() == [[150, 3, -1, -1, -1]] * 3
    assert signal.log_tail.tolist() == [-torch.inf] * 3
    assert signal.certain is not None and signal.certain.tolist() == [2] * 3
    assert float(signal.log_probs[0, :2].exp().sum()) == pytest.approx(1.0)


def test_corners() -> None:
    """One class with all the mass; all classes alike; all classes kept; far below what a float holds."""
    one_hot = torch.zeros(1, 50)
    one_hot[0, 9] = 500.0
    signal = threshold_sample(one_hot, 4)
    assert signal.ids[0, 0] == 9 and float(signal.log_probs[0, 0]) == 0.0
    assert float(signal.log_tail[0]) < -400 or float(signal.log_tail[0]) == -torch.inf
    flat = torch.zeros(4000, 10)
    assert weights_of(draws(flat[0], 4, 4000), 10).mean(0).sub(0.1).abs().max() < 0.01
    whole = threshold_sample(flat, 10)
    assert (whole.ids.sort(-1).values == torch.arange(10)).all()
    assert torch.isneginf(whole.log_tail).all() and not whole.drawn.any()
    assert threshold_sample(torch.zeros(0, 10), 4).ids.shape == (0, 4)
    single = threshold_sample(torch.zeros(2, 1), 1)
    assert single.ids.tolist() == [[0], [0]] and single.log_probs.tolist() == [[0.0], [0.0]]


def test_certain_entries_asked_for() -> None:
    """`least_certain` of the likeliest are always there, and the draws stay unbiased."""
    logits = logits_of(200, std=0.3)
    signal = draws(logits, 10, 8_000, least_certain=5)
    assert signal.certain is not None and (signal.certain == 5).all()
    assert (signal.ids[:, :5].sort(-1).values == logits.topk(5).indices.sort().values).all()
    assert (weights_of(signal, 200).mean(0) - logits.softmax(-1)).abs().max() < 4e-3


def test_less_variance_than_multinomial_draws() -> None:
    """At equal entries; counter-example: independent draws say the same again and again."""
    logits = logits_of(500, std=3.0)
    p = logits.softmax(-1)
    ours = (weights_of(draws(logits, 16, 2000), 500) - p).square().sum(-1).mean()
    drawn = torch.multinomial(p, 16 * 2000, True, generator=torch.Generator().manual_seed(0)).view(2000, 16)
    said = torch.zeros(2000, 500, dtype=torch.float64).scatter_add(
        1, drawn, torch.full((2000, 16), 1 / 16, dtype=torch.float64)
    )
    assert ours < (said - p).square().sum(-1).mean() / 4


def test_draws_repeat_with_their_seed_alone() -> None:
    """Rows that are asked together or alone get the same draws, if the generator stands at the same place."""
    logits = torch.randn(40, 70_000)
    one = threshold_sample(logits, 9, generator=torch.Generator().manual_seed(3))
    two = threshold_sample(logits, 9, generator=torch.Generator().manual_seed(3))
    assert (one.ids == two.ids).all() and (one.log_probs == two.log_probs).all()
    other = threshold_sample(logits, 9, generator=torch.Generator().manual_seed(4))
    assert (one.ids != other.ids).any()
    g = torch.Generator().manual_seed(3)
    parts = [threshold_sample(part, 9, generator=g).ids for part in logits.split(7)]
    assert (torch.cat(parts) == one.ids).all()


@pytest.mark.parametrize("entries,least", [(0, 0), (11, 0), (4, 5), (4, -1)])
def test_numbers_that_do_not_fit(entries: int, least: int) -> None:
    with pytest.raises(ValueError, match="threshold_sample: logits .2, 10."):
        threshold_sample(torch.zeros(2, 10), entries, least_certain=least)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_logits(bad: float) -> None:
    """What a broken teacher says is not sampled from."""
    logits = torch.zeros(2, 10)
    logits[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite: check the teacher"):
        threshold_sample(logits, 3)
