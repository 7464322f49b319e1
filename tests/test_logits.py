"""Losses on logits: float64 oracles, the identities that their papers state, and what they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_kd.losses import (
    LOGIT_LOSSES,
    adaptive_kl,
    dist,
    dkd,
    forward_kl,
    hard_labels,
    log_probs,
    nkd,
    resolve_divergence,
    reverse_kl,
    standardised_kl,
    uld,
)
from hf_kd.losses.needs import Needs, needs_of

from .heads import HEADS, models, naive_divergence, oracle, rows_of
from .test_gradient import assert_same, step

ZERO_WHEN_EQUAL = ("dkd", "dist", "standardised_kl")


def pair(rows: int, classes: int, *, std: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(rows, classes, generator=generator) * std for _ in range(2))
    return one, other


def value_and_grad(
    name: str, z: Tensor, t: Tensor, labels: Tensor | None, temperature: float = 2.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """As the objective calls it."""
    z = z.detach().clone().requires_grad_()
    log_q, log_p = log_probs(z, t, temperature=temperature)
    context = {
        "labels": labels,
        "student_logits": z,
        "teacher_logits": t,
        "temperature": temperature,
        "teacher_temperature": temperature,
    }
    function = LOGIT_LOSSES[name]
    values = function(log_q, log_p, **{k: context[k] for k in needs_of(function).reads}, **options)
    (grad,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), grad


def naive(name: str, z: Tensor, t: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Row by row and class by class, in float64."""
    z, t = z.detach().double().requires_grad_(), t.double()
    values = torch.stack(
        [
            naive_divergence(
                name,
                (a / temperature).softmax(-1),
                (b / temperature).softmax(-1),
                z=a,
                t=b,
                label=int(y),
                temperature=temperature,
            )
            for a, b, y in zip(z, t, labels, strict=True)
        ]
    )
    (grad,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_equals_the_oracle(name: str, classes: int, temperature: float, dtype: torch.dtype) -> None:
    """Value and gradient; labels on some rows, the teacher's decision on the others."""
    z, t = (x.to(dtype) for x in pair(6, classes))
    labels = torch.arange(6) % classes
    labels[4:] = -100
    options = {"gamma": 0} if name == "dist" else {}
    found = value_and_grad(name, z, t, labels, temperature, **options)
    expected = naive(name, z, t, labels, temperature)
    exact = dtype == torch.float64
    # Two classes correlate by 1 or -1, which is a step: nothing but rounding is left of the slope.
    atol = 1e-9 if exact else (1e-4 if name == "dist" else 1e-6)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-7 if exact else 2e-4, atol=atol)


def test_dist_compares_rows() -> None:
    """Both terms against correlation matrices, in value and gradient."""
    z, t = (x.double() for x in pair(5, 4))
    found, grad = value_and_grad("dist", z, t, None, 2.0, beta=2.0, gamma=3.0)
    leaf = z.clone().requires_grad_()
    q, p = (leaf / 2).softmax(-1), (t / 2).softmax(-1)
    across = torch.stack([1 - torch.corrcoef(torch.stack([q[i], p[i]]))[0, 1] for i in range(5)])
    along = torch.stack([1 - torch.corrcoef(torch.stack([q[:, c], p[:, c]]))[0, 1] for c in range(4)])
    expected = 2 * across + 3 * along.mean()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-8, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 50), st.floats(0.1, 8), st.floats(0.5, 8))
def test_dkd_adds_up_to_kd(seed: int, classes: int, std: float, temperature: float) -> None:
    """Trap 14: KD = TCKD + (1 - p_target) * NCKD, to 1e-12 in float64."""
    z, t = (x.double() for x in pair(6, classes, std=std, seed=seed))
    log_q, log_p = log_probs(z, t, temperature=temperature)
    labels = torch.randint(0, classes, (6,), generator=torch.Generator().manual_seed(seed))
    target = dkd(log_q, log_p, labels=labels, alpha=1, beta=0)
    rest = dkd(log_q, log_p, labels=labels, alpha=0, beta=1)
    p = log_p.exp().gather(1, labels[:, None]).squeeze(1)
    assert (target + (1 - p) * rest - forward_kl(log_q, log_p)).abs().max() < 1e-12
    if classes == 2:
        assert (rest == 0).all()


def test_dkd_of_softmaxes_does_not_add_up() -> None:
    """Trap 14, counter-example: a second softmax over the others, of probabilities, is not NCKD."""
    z, t = (x.double() for x in pair(6, 5))
    log_q, log_p = log_probs(z, t, temperature=2.0)
    labels = torch.arange(6) % 5
    index = labels[:, None]
    others = torch.ones(6, 5).scatter(1, index, 0).bool()
    q, p = (x.exp()[others].view(6, 4).softmax(-1) for x in (log_q, log_p))
    wrong = (p * (p / q).log()).sum(-1)
    target = dkd(log_q, log_p, labels=labels, alpha=1, beta=0)
    kd = target + (1 - log_p.exp().gather(1, index).squeeze(1)) * wrong
    assert (kd - forward_kl(log_q, log_p)).abs().max() > 1e-2


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 3), st.floats(-2, 2))
def test_invariance(seed: int, scale: float, shift: float) -> None:
    """DIST: scale and shift of probabilities. Standardised KL: of logits. ULD: the order of the classes."""
    z, t = (x.double() for x in pair(5, 7, seed=seed))
    log_q, log_p = log_probs(z, t, temperature=1.0)
    moved = (scale * log_q.exp() + abs(shift)).log()
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(dist(moved, log_p), dist(log_q, log_p), **close)
    scaled, _ = log_probs(scale * z + shift, t, temperature=1.0)
    expected = standardised_kl(log_q, log_p, temperature=2.0)
    torch.testing.assert_close(standardised_kl(scaled, log_p, temperature=2.0), expected, **close)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(uld(log_q[:, order], log_p), uld(log_q, log_p), **close)


def test_ends_of_adaptive_kl() -> None:
    """A head of all classes is forward KL, of none reverse KL; in between it is between."""
    log_q, log_p = log_probs(*pair(8, 9), temperature=1.0)
    forward, reverse = forward_kl(log_q, log_p), reverse_kl(log_q, log_p)
    assert torch.equal(adaptive_kl(log_q, log_p, mu=1), forward)
    assert torch.equal(adaptive_kl(log_q, log_p, mu=0), reverse)
    middle = adaptive_kl(log_q, log_p)
    assert (middle >= torch.minimum(forward, reverse) - 1e-6).all()
    assert (middle <= torch.maximum(forward, reverse) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ZERO_WHEN_EQUAL)
def test_equal_models_have_no_loss_and_no_gradient(name: str, dtype: torch.dtype) -> None:
    z, _ = pair(4, 1000, std=5)
    values, grad = value_and_grad(name, z.to(dtype), z.to(dtype), torch.arange(4))
    assert values.abs().max() == 0
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_finite(name: str, temperature: float, dtype: torch.dtype) -> None:
    """Traps 7, 9: value and gradient are finite at any T, in half precision, with masked classes."""
    for size in (10.0, 1e3):
        z, t = (x.clamp(-1, 1).mul(size).to(dtype) for x in pair(9, 40, std=1))
        z[0] = t[0] = -size
        z[0, 0] = t[0, 1] = size
        z[1:4, 3] = t[1:6, 7] = -torch.inf
        z[6, 1:] = -torch.inf  # nothing left but the target
        labels = torch.tensor([0, 1, 2, 3, 4, -100, 0, 8, 9])
        values, grad = value_and_grad(name, z, t, labels, temperature)
        assert values.isfinite().all(), size
        assert (values >= 0).all()
        assert grad.dtype == dtype
        assert grad.isfinite().all(), size


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_masked_classes_are_as_if_absent(name: str) -> None:
    """Trap 9: a class at -inf in either model changes nothing but its own gradient, which is 0."""
    z, t = (x.double() for x in pair(6, 8))
    labels = torch.tensor([0, 2, 3, 5, -100, 6])
    keep = torch.tensor([True, False, True, True, False, True, True, True])
    new = torch.tensor([0, -1, 1, 2, -1, 3, 4, 5])
    fewer = torch.where(labels < 0, labels, new[labels.clamp_min(0)])
    expected, expected_grad = value_and_grad(name, z[:, keep], t[:, keep], fewer)
    z[:, 1] = -torch.inf
    t[:, 4] = -torch.inf
    values, grad = value_and_grad(name, z, t, labels)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(grad[:, keep], expected_grad)
    assert (grad[:, ~keep] == 0).all()


def test_temperature_of_the_terms_at_one() -> None:
    """Trap 1: what the papers take at temperature 1 has the same gradient at any T, after `T^2`."""
    z, t = (x.double() for x in pair(5, 6))
    labels = torch.arange(5)
    for name, options in (("hard_labels", {}), ("nkd", {"gamma": 0})):
        grads = [value_and_grad(name, z, t, labels, T, **options)[1] * T**2 for T in (1.0, 2.0, 8.0)]
        torch.testing.assert_close(grads[1], grads[0])
        torch.testing.assert_close(grads[2], grads[0])
    plain = torch.nn.functional.cross_entropy(z, t.argmax(-1), reduction="none")
    torch.testing.assert_close(value_and_grad("hard_labels", z, t, None, 4.0)[0] * 16, plain)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("name", sorted({*LOGIT_LOSSES} - {"dist"}) + ["adaptive_kl", "uld"])
def test_accumulation(tmp_path: Path, name: str, accumulation: int) -> None:
    """Trap 15: the step's gradient does not depend on the micro-batches; some rows have no label."""
    head = HEADS["single-label"]
    student, teacher = models(head)
    rows = rows_of(head, 8)
    for row in rows[::3]:
        row["labels"] = -100
    _, grads = step(
        tmp_path, head, student, teacher, rows, divergence=name, gradient_accumulation_steps=accumulation
    )
    assert_same(grads, oracle(head, student, teacher, rows, divergence=name)[1])


def test_dist_depends_on_the_micro_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trap 13: that is said before the first step, and one row alone is refused by name."""
    head = HEADS["single-label"]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    grads = []
    for accumulation in (1, 2):
        caplog.clear()
        grads.append(
            step(
                tmp_path,
                head,
                student,
                teacher,
                rows,
                divergence="dist",
                alpha=1.0,
                gradient_accumulation_steps=accumulation,
            )[1]
        )
        said = "divergence='dist' compares the rows of a micro-batch" in caplog.text
        assert said == (accumulation > 1)
    with pytest.raises(AssertionError, match="relative gradient error"):
        assert_same(grads[1], grads[0], 1e-3)
    with pytest.raises(ValueError, match=r"1 supervised row.*per_device_train_batch_size to 2 or more"):
        step(tmp_path, head, student, teacher, rows[:1], divergence="dist")
    log_q, log_p = log_probs(*pair(1, 5), temperature=1.0)
    assert dist(log_q, log_p, gamma=0).shape == (1,)
    assert dist(log_q[:0], log_p[:0]).shape == (0,)


def test_labels_that_are_missing_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trap 2: alpha = 1 runs without labels; the target is then the teacher's decision, and that is said."""
    head = HEADS["single-label"]
    student, teacher = models(head)
    rows = rows_of(head, 4)
    for labelled in (True, False):
        caplog.clear()
        if not labelled:
            for row in rows:
                del row["labels"]
        _, grads = step(tmp_path, head, student, teacher, rows, divergence="dkd", alpha=1.0)
        assert ("take the teacher's most likely class" in caplog.text) == (not labelled)
        for row in rows:
            row.setdefault("labels", -100)
        assert_same(grads, oracle(head, student, teacher, rows, alpha=1.0, divergence="dkd")[1])


def test_needs() -> None:
    """What a divergence names as keywords is handed over; options bound to it count."""

    def own(log_q: Tensor, log_p: Tensor, *, labels: Tensor, scale: float) -> Tensor:
        return scale * log_q.gather(1, labels[:, None]).squeeze(1).neg()

    assert needs_of(forward_kl) == Needs(reads=())
    assert needs_of(nkd).reads == ("labels", "student_logits", "teacher_logits", "temperature")
    assert needs_of(dist).couples_rows
    assert needs_of(resolve_divergence("dist", {"beta": 2})).couples_rows
    assert not needs_of(resolve_divergence("dist", {"gamma": 0})).couples_rows
    assert needs_of(uld).unlike_classes and not needs_of(adaptive_kl).unlike_classes
    found = resolve_divergence(own, {"scale": 2.0})
    assert needs_of(found).reads == ("labels",)
    log_q, log_p = log_probs(*pair(3, 5), temperature=1.0)
    labels = torch.tensor([1, 2, 3])
    assert torch.equal(found(log_q, log_p, labels=labels), own(log_q, log_p, labels=labels, scale=2.0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dkd", {"labels": 3}, "divergence_options: dkd has no option 'labels'. Its options: alpha, beta"),
        ("dkd", {"beta": -1}, "dkd: beta=-1 is a weight"),
        ("dkd", {"alpha": 0, "beta": 0}, "dkd: alpha and beta are both 0"),
        ("dist", {"gamma": "1"}, "dist: gamma='1' is a weight"),
        ("nkd", {"gama": 1}, "did you mean 'gamma'"),
        ("adaptive_kl", {"mu": 1.5}, "adaptive_kl: mu=1.5 must be a number from 0 to 1"),
        ("hard_labels", {"temperature": 2}, "hard_labels has no option 'temperature'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_divergence(name, options)


def test_shapes_are_checked() -> None:
    log_q, log_p = log_probs(*pair(3, 5), temperature=1.0)
    with pytest.raises(ValueError, match="log_q has shape"):
        uld(log_q, log_p[:2])
    with pytest.raises(ValueError, match="float32, or float64"):
        dkd(log_q.half(), log_p.half(), labels=None)
    with pytest.raises(ValueError, match=r"must be rows, \[N, C\]"):
        dist(log_q[None], log_p[None])
    assert hard_labels(log_q, log_p, student_logits=log_q, teacher_logits=log_p, temperature=1.0).shape == (
        3,
    )
