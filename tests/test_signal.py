"""What a teacher can say about a batch: validation, and what a sparse signal stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_kd import SparseSignal, TeacherSignal
from hf_kd.losses.tiles import Head, HiddenTeacher

from .fidelities import threshold_sample


def mean_of_draws(log_p: Tensor, entries: int, times: int) -> Tensor:
    """The average of what some draws stand for, `[C]`."""
    generator = torch.Generator().manual_seed(0)
    signal = threshold_sample(log_p.expand(times, -1), entries, generator).draws()
    assert signal.weights is not None
    out = torch.zeros(log_p.shape[-1], dtype=torch.float64)
    return out.index_add_(0, signal.ids.clamp_min(0).view(-1), signal.weights.view(-1)) / times


def test_draws_average_to_the_distribution() -> None:
    """Trap 12, counter-example: the entries' weights have the teacher as their mean; top-k alone has not."""
    log_p = torch.linspace(0, -6, 40, dtype=torch.float64).log_softmax(-1)
    p = log_p.exp()
    mean = mean_of_draws(log_p, 8, 40_000)
    assert (mean - p).abs().max() < 3e-3
    top = threshold_sample(log_p, 8, torch.Generator().manual_seed(0)).tail()
    kept = torch.zeros_like(p)
    kept[top.ids[top.ids >= 0]] = p[top.ids[top.ids >= 0]]
    assert (kept / kept.sum() - p).abs().max() > 0.05


def test_tail_is_the_rest() -> None:
    """The certain entries and the tail add up to 1, whatever was drawn beside them."""
    log_p = torch.randn(50, 30, dtype=torch.float64).mul(2).log_softmax(-1)
    signal = threshold_sample(log_p, 6, torch.Generator().manual_seed(1))
    tail = signal.tail()
    assert signal.certain is not None and tail.log_tail is not None
    assert ((tail.ids >= 0).sum(-1) == signal.certain).all()
    mass = torch.where(tail.ids >= 0, tail.log_probs.exp(), 0.0).sum(-1) + tail.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones(50, dtype=torch.float64))
    assert tail.weights is None
    whole = threshold_sample(log_p, 30)
    assert not whole.has_draws
    assert (whole.tail().ids == whole.ids).all()


def test_signal_without_draws() -> None:
    """Draws that were not stored can't be asked for."""
    signal = SparseSignal(torch.zeros(2, 1).long(), torch.zeros(2, 1), torch.full((2,), -torch.inf))
    with pytest.raises(ValueError, match="sparse_estimator='draws' can't be; set sparse_estimator='tail'"):
        signal.draws()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"ids": torch.zeros(2, 3, 4)}, "float32 of shape .2, 3, 4.; give integers"),
        ({"log_probs": torch.zeros(2, 3, 5)}, "log_probs is .2, 3, 5., ids .2, 3, 4."),
        ({"log_tail": torch.zeros(2)}, "log_tail is .2,., ids .2, 3, 4.; give one value per position"),
        ({"certain": torch.zeros(2, 3).long()}, "log_tau=None: their weight is not known"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    """A signal that does not fit together is refused where it is made."""
    good = {
        "ids": torch.zeros(2, 3, 4).long(),
        "log_probs": torch.zeros(2, 3, 4),
        "log_tail": torch.zeros(2, 3),
    }
    SparseSignal(**good)
    with pytest.raises(ValueError, match=message):
        SparseSignal(**{**good, **changes})


def test_fidelities() -> None:
    """A signal is at least one of the three, and says which; logits are not made up."""
    hidden = HiddenTeacher(torch.zeros(2, 3, 4), Head(torch.zeros(5, 4)))
    sparse = SparseSignal(torch.zeros(2, 1).long(), torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="got none"):
        TeacherSignal()
    with pytest.raises(ValueError, match="got none"):
        TeacherSignal(logits={})
    for signal, name in (
        (TeacherSignal({"logits": torch.zeros(2, 3)}), "logits"),
        (TeacherSignal(hidden=hidden), "hidden"),
        (TeacherSignal(sparse=sparse), "sparse"),
        (TeacherSignal(hidden=hidden, sparse=sparse), "hidden"),
    ):
        assert signal.fidelity == name
    with pytest.raises(ValueError, match="its signal is 'sparse'"):
        TeacherSignal(sparse=sparse).dense()
