"""Losses on hidden states, attentions and relations, against definitions in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kd.losses import rows
from hf_kd.losses.features import ATTENTION_LOSSES, HIDDEN_LOSSES, attention_kl, relation_kl
from hf_kd.losses.scores import Products, product_kl


def states(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_hidden(name: str, s: Tensor, t: Tensor) -> Tensor:
    """One position."""
    if name == "cosine":
        return 1 - (s * t).sum() / (s.norm() * t.norm())
    if name == "normalized_mse":
        s, t = ((x - x.mean()) / (x - x.mean()).square().mean().sqrt() for x in (s, t))
    return (s - t).square().mean()


def naive_relation(s: Tensor, t: Tensor, heads: int, visible: Callable[[int], list[int]], i: int) -> Tensor:
    """KL of position i of one row, head by head and key by key."""
    total = torch.zeros((), dtype=torch.float64)
    for a in range(heads):
        rows = []
        for x in (t, s):
            d = x.shape[-1] // heads
            part = x[:, a * d : (a + 1) * d]
            rows.append(torch.stack([part[i] @ part[j] / d**0.5 for j in visible(i)]).softmax(0))
        total = total + (rows[0] * (rows[0].log() - rows[1].log())).sum() / heads
    return total


def assert_equal(ours: Tensor, theirs: Tensor, student: Tensor) -> None:
    """Value and gradient."""
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    weights = states(*ours.shape, seed=9)
    grads = [torch.autograd.grad((x * weights).sum(), student, retain_graph=True)[0] for x in (ours, theirs)]
    assert grads[1].norm() > 1e-6
    assert torch.allclose(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", HIDDEN_LOSSES)
def test_hidden_losses(name: str) -> None:
    s, t = states(2, 3, 8).requires_grad_(), 4 * states(2, 3, 8, seed=1) + 1
    ours = HIDDEN_LOSSES[name](s, t)
    theirs = torch.stack(
        [torch.stack([naive_hidden(name, s[b, i], t[b, i]) for i in range(3)]) for b in (0, 1)]
    )
    assert_equal(ours, theirs, s)


def test_the_default_is_free_of_scale() -> None:
    """Trap 39: a state before the final norm and one after it differ by a scale; counter-example: the MSE."""
    s = states(2, 3, 8)
    assert HIDDEN_LOSSES["normalized_mse"](s, 30 * s + 2).max() < 1e-20
    assert HIDDEN_LOSSES["cosine"](s, 30 * s).abs().max() < 1e-12
    assert HIDDEN_LOSSES["mse"](s, 30 * s).min() > 1


@pytest.mark.parametrize("name", ATTENTION_LOSSES)
@pytest.mark.parametrize("masked", [torch.finfo(torch.float64).min, -torch.inf])
def test_attention_losses(name: str, masked: float) -> None:
    """Masked keys contribute nothing, whichever way they are masked."""
    s, t = states(2, 3, 4, 5).requires_grad_(), states(2, 3, 4, 5, seed=1)
    mask = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    mask[1, ..., 3:] = True
    ours = ATTENTION_LOSSES[name](s.masked_fill(mask, masked), t.masked_fill(mask, masked))
    rows = []
    for b, keys in ((0, 5), (1, 3)):
        p, q = (x[b, ..., :keys].softmax(-1) for x in (t, s))
        value = p * (p.log() - q.log()) if name == "kl" else (p - q).square()
        rows.append(value.sum(-1).mean(0))
    assert_equal(ours, torch.stack(rows), s)


def by_position(loss: Callable[[Tensor], Tensor], rows: int, length: int) -> Tensor:
    """`[B, L]`: a weighted sum over positions, at each of them."""
    each = torch.eye(rows * length, dtype=torch.float64).view(-1, rows, length)
    return torch.stack([loss(weight) for weight in each]).view(rows, length)


@pytest.mark.parametrize("block", [1, 40, 1 << 17])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added", "bias"])
def test_products(mask: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of scores give the scores' value and gradient, in tiles of some queries or of several rows."""
    monkeypatch.setattr(rows, "_CPU_BLOCK", block)
    length = 70 if mask == "causal" else 5  # several tiles, of which the first see few keys
    q, k = states(3, 4, length, 6).requires_grad_(), states(3, 2, length, 6, seed=1).requires_grad_()
    # Without a mask also far apart, where a share of q is more than any multiple of p.
    scale = 40.0 if mask == "none" else 0.7
    given: dict[str, Any] = {"scale": scale, "enable_gqa": True, "is_causal": mask == "causal"}
    seen = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    seen[1, ..., 3:] = seen[2, :, 1] = False
    if mask in ("bool", "added"):
        lowest = torch.finfo(torch.float64).min
        given["attn_mask"] = seen if mask == "bool" else torch.zeros(5, 5).double().masked_fill(~seen, lowest)
    elif mask == "bias":
        given["attn_mask"] = states(1, 4, 5, 5, seed=4).masked_fill(~seen, -torch.inf)
    student = Products.of_call(q, k, None, **given)
    others = states(3, 4, length, 6, seed=2), states(3, 2, length, 6, seed=3)
    teacher = Products.of_call(*others, None, **given)
    expected = attention_kl(student.scores(), teacher.scores())
    if length == 5:
        ours = by_position(lambda weight: product_kl(student, teacher, weight), 3, 5)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    eye = torch.eye(length).double().expand(3, 2, length, length)
    attention = F.scaled_dot_product_attention(q, k, eye, **given)
    softmax = student.scores().softmax(-1)
    sees = ~softmax.isnan()
    torch.testing.assert_close(attention[sees], softmax[sees])
    weight = states(3, length, seed=5)
    sums = product_kl(student, teacher, weight), (expected * weight).sum()
    torch.testing.assert_close(*sums, rtol=1e-9, atol=1e-12)
    one, other = (torch.autograd.grad(value, (q, k)) for value in sums)
    for found, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "widths"), [(1, (6, 4)), (4, (8, 12)), (3, (6, 6))])
def test_relations(heads: int, widths: tuple[int, int], causal: bool) -> None:
    """Trap 41: any widths and numbers of heads; the second row has two positions of padding in front."""
    s, t = states(2, 5, widths[0]).requires_grad_(), states(2, 5, widths[1], seed=1)
    exists = torch.ones(2, 5, dtype=torch.bool)
    exists[1, :2] = False
    ours = by_position(
        lambda weight: relation_kl(s, t, heads=heads, exists=exists, causal=causal, weight=weight), 2, 5
    )
    assert ours.isfinite().all()
    for b in (0, 1):
        for i in range(2 * b, 5):
            expected = naive_relation(
                s[b], t[b], heads, lambda i, b=b: [j for j in range(2 * b, 5) if j <= i or not causal], i
            )
            if i > 2 * b:  # else it sees itself alone
                assert_equal(ours[b, i], expected, s)
            assert float(ours[b, i].detach()) == pytest.approx(float(expected.detach()), abs=1e-12)


def related(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """The loss on relations between all positions, summed over them."""
    shape = student.shape[:2]
    every, weight = torch.ones(shape, dtype=torch.bool), torch.ones(shape)
    return relation_kl(student, teacher, heads=heads, exists=every, causal=False, weight=weight)


def test_relation_heads_divide_the_width() -> None:
    """Trap 41: a number of heads that does not fit is refused."""
    with pytest.raises(ValueError, match="relation_heads=3 does not divide the width 8"):
        related(states(1, 2, 8), states(1, 2, 6), heads=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_models_have_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    """Teacher and student alike: 0 and a gradient of 0, for every loss."""
    s = states(2, 3, 8).to(dtype).requires_grad_()
    scores = states(2, 2, 3, 3).to(dtype).requires_grad_()
    values = [(loss(s, s.detach()), s) for loss in HIDDEN_LOSSES.values()]
    values += [(loss(scores, scores.detach()), scores) for loss in ATTENTION_LOSSES.values()]
    values.append((related(s, s.detach(), heads=2), s))
    for value, student in values:
        assert value.abs().max() < 1e-6
        assert torch.autograd.grad(value.sum(), student)[0].abs().max() < 1e-6


def test_one_position_is_related_to_itself_alone() -> None:
    """A row of one token: nothing to compare, and the graph is kept."""
    one = states(2, 1, 4).requires_grad_()
    value = related(one, states(2, 1, 4, seed=1), heads=2)
    assert value.requires_grad
    assert not value.any()
    scores = states(2, 2, 1, 1).requires_grad_()
    for loss in ATTENTION_LOSSES.values():
        value = loss(scores, states(2, 2, 1, 1, seed=1))
        assert value.shape == (2, 1)
        assert value.requires_grad
        assert not value.any()
