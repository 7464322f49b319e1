"""Every divergence against a dense float64 reference, its properties, and the naive versions that fail."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_kd.losses.divergences import (
    DIVERGENCES,
    alpha_beta,
    entropy,
    forward_kl,
    jeffreys,
    jsd,
    log_probs,
    logit_mse,
    resolve_divergence,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    tvd,
)

CASES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jeffreys", {}),
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.999}),
    ("skew_kl", {"lam": 0.1}),
    ("skew_kl", {"lam": 0.001}),
    ("skew_reverse_kl", {"lam": 0.1}),
    ("skew_reverse_kl", {"lam": 0.9}),
    ("tvd", {}),
    ("alpha_beta", {"a": 0.2, "b": 0.7}),
    ("alpha_beta", {"a": 0.8, "b": 0.3}),
    ("alpha_beta", {"a": 2.0, "b": 1.0}),
    ("alpha_beta", {"a": 0.5, "b": 0.0}),
    ("alpha_beta", {"a": 0.0, "b": 0.5}),
    ("alpha_beta", {"a": 0.0, "b": 0.0}),
    ("logit_mse", {}),
    ("adaptive_kl", {}),
    ("adaptive_kl", {"mu": 0.9}),
    ("uld", {}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in CASES]
every_divergence = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def oracle(name: str, z: Tensor, t: Tensor, temperature: float = 1.0, **options: float) -> Tensor:
    """The textbook formula, in float64."""
    log_q, log_p = F.log_softmax(z.double() / temperature, -1), F.log_softmax(t.double() / temperature, -1)

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (one.exp() * (one - other)).sum(-1)

    def mix(share_of_p: float) -> Tensor:
        return torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log(1 - share_of_p))

    def alpha_beta(a: float, b: float) -> Tensor:
        s = a + b
        if s == 0:
            return (log_p - log_q).square().sum(-1) / 2
        if b == 0:  # the limits of Cichocki et al.
            return ((a * log_p).exp() * a * (log_p - log_q) - (a * log_p).exp() + (a * log_q).exp()).sum(
                -1
            ) / a**2
        if a == 0:
            return ((b * log_q).exp() * b * (log_q - log_p) - (b * log_q).exp() + (b * log_p).exp()).sum(
                -1
            ) / b**2
        terms = (s * log_p).exp() * a / s + (s * log_q).exp() * b / s - (a * log_p + b * log_q).exp()
        return terms.sum(-1) / (a * b)

    def adaptive_kl(mu: float = 0.5) -> Tensor:
        shares = []
        for p, q in zip(log_p.exp().detach(), log_q.exp().detach(), strict=True):
            held, head = 0.0, []
            for c in p.argsort(descending=True).tolist():
                if held < mu:
                    head.append(c)
                held += float(p[c])
            gap = (p - q).abs()
            shares.append(gap[head].sum() / gap.sum().clamp_min(1e-300))
        share = torch.stack(shares)
        return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)

    formulas = {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "jeffreys": lambda: (kl(log_p, log_q) + kl(log_q, log_p)) / 2,
        "jsd": lambda beta: beta * kl(log_p, mix(beta)) + (1 - beta) * kl(log_q, mix(beta)),
        "skew_kl": lambda lam: kl(log_p, mix(lam)),
        "skew_reverse_kl": lambda lam: kl(log_q, mix(1 - lam)),
        "tvd": lambda: (log_q.exp() - log_p.exp()).abs().sum(-1) / 2,
        "alpha_beta": alpha_beta,
        "logit_mse": lambda: ((z - t).double() / temperature).var(-1, correction=0),
        "adaptive_kl": adaptive_kl,
        "uld": lambda: (log_q.exp().sort(-1)[0] - log_p.exp().sort(-1)[0]).abs().sum(-1),
    }
    return formulas[name](**options)


def random_pair(rows: int, classes: int, *, std: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, classes, generator=generator) * std for _ in range(2))


def value_and_grad(name: str, z: Tensor, t: Tensor, temperature: float = 1.0, **options: float) -> tuple:
    z = z.detach().clone().requires_grad_()
    log_q, log_p = log_probs(z, t, temperature=temperature)
    values = DIVERGENCES[name](log_q, log_p, **options)
    (grad,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), grad


def oracle_value_and_grad(
    name: str, z: Tensor, t: Tensor, temperature: float = 1.0, **options: float
) -> tuple:
    z = z.detach().double().requires_grad_()
    values = oracle(name, z, t, temperature, **options)
    (grad,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), grad


def test_cases_cover_every_divergence() -> None:
    assert {name for name, _ in CASES} == set(DIVERGENCES)


@every_divergence
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("classes", [2, 7, 1000])
def test_equals_the_oracle(name: str, options: dict, temperature: float, classes: int) -> None:
    z, t = random_pair(5, classes)
    values, grad = value_and_grad(name, z, t, temperature, **options)
    expected, expected_grad = oracle_value_and_grad(name, z, t, temperature, **options)
    torch.testing.assert_close(values.double(), expected, rtol=2e-5, atol=1e-7)
    # A one-hot student has slopes of the size of d, which all but cancel in the softmax.
    scale = (1 + expected.max()) / temperature
    torch.testing.assert_close(grad.double() / scale, expected_grad / scale, rtol=1e-4, atol=1e-7)


@every_divergence
def test_float64_in_float64_out(name: str, options: dict) -> None:
    z, t = (x.double() for x in random_pair(4, 50))
    values, grad = value_and_grad(name, z, t, 2.0, **options)
    expected, expected_grad = oracle_value_and_grad(name, z, t, 2.0, **options)
    assert values.dtype == grad.dtype == torch.float64
    torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-13)


@every_divergence
def test_equal_models_have_no_loss_and_no_gradient(name: str, options: dict) -> None:
    z, _ = random_pair(4, 1000, std=10)
    for temperature in (0.05, 1.0, 20.0):
        values, grad = value_and_grad(name, z, z, temperature, **options)
        assert values.tolist() == [0.0] * 4
        assert grad.abs().max() == 0.0


@every_divergence
@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(2, 40),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.sampled_from([0.05, 1.0, 20.0]),
)
def test_properties(
    name: str, options: dict, seed: int, classes: int, std: float, temperature: float
) -> None:
    """Never negative, blind to the order of classes and to a constant added to a row; rows don't touch."""
    z, t = random_pair(3, classes, std=std, seed=seed)
    values, grad = value_and_grad(name, z, t, temperature, **options)
    assert (values >= 0).all()
    assert grad.isfinite().all()
    tolerance = {"rtol": 1e-3, "atol": 1e-6 * (1 + std / temperature)}
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    permuted, permuted_grad = value_and_grad(name, z[:, order], t[:, order], temperature, **options)
    torch.testing.assert_close(permuted, values, **tolerance)
    torch.testing.assert_close(permuted_grad * temperature, grad[:, order] * temperature, **tolerance)
    shifted, _ = value_and_grad(name, z.double() + 3, t.double() - 5, temperature, **options)
    torch.testing.assert_close(shifted.float(), values, **tolerance)
    alone, _ = value_and_grad(name, z[1:2], t[1:2], temperature, **options)
    torch.testing.assert_close(alone, values[1:2], **tolerance)
    # A gradient through a softmax moves no mass in or out.
    torch.testing.assert_close(
        grad.sum(-1) * temperature, torch.zeros(3), rtol=0, atol=tolerance["atol"] * 10
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.floats(0.01, 20), st.floats(0.001, 0.999))
def test_relations_between_siblings(seed: int, classes: int, std: float, weight: float) -> None:
    log_q, log_p = log_probs(*random_pair(4, classes, std=std, seed=seed), temperature=1.0)
    close = torch.testing.assert_close
    forward, reverse = forward_kl(log_q, log_p), reverse_kl(log_q, log_p)
    close(forward, reverse_kl(log_p, log_q))
    close(jeffreys(log_q, log_p), (forward + reverse) / 2, rtol=1e-3, atol=1e-6)
    close(jeffreys(log_q, log_p), jeffreys(log_p, log_q))
    assert torch.equal(jsd(log_q, log_p, beta=0), forward)
    assert torch.equal(jsd(log_q, log_p, beta=1), reverse)
    close(jsd(log_q, log_p, beta=weight), jsd(log_p, log_q, beta=1 - weight), rtol=1e-3, atol=1e-6)
    both = weight * skew_kl(log_q, log_p, lam=weight)
    both = both + (1 - weight) * skew_reverse_kl(log_q, log_p, lam=1 - weight)
    close(jsd(log_q, log_p, beta=weight), both, rtol=1e-3, atol=1e-6)
    assert torch.equal(skew_kl(log_q, log_p, lam=0), forward)
    assert torch.equal(skew_reverse_kl(log_q, log_p, lam=0), reverse)
    close(skew_reverse_kl(log_q, log_p, lam=weight), skew_kl(log_p, log_q, lam=weight))
    close(alpha_beta(log_q, log_p, a=1, b=0), forward)
    close(alpha_beta(log_q, log_p, a=0, b=1), reverse)
    hellinger = (log_q.exp().sqrt() - log_p.exp().sqrt()).square().sum(-1) / 2
    close(alpha_beta(log_q, log_p, a=0.5, b=0.5), 4 * hellinger, rtol=1e-2, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 200), st.floats(0.001, 0.999))
def test_bounds(seed: int, std: float, weight: float) -> None:
    log_q, log_p = log_probs(*random_pair(4, 9, std=std, seed=seed), temperature=1.0)
    slack = 1 + 1e-5
    pair_entropy = -weight * math.log(weight) - (1 - weight) * math.log(1 - weight)
    assert (jsd(log_q, log_p, beta=weight) <= pair_entropy * slack).all()
    assert (skew_kl(log_q, log_p, lam=weight) <= -math.log(weight) * slack).all()
    assert (skew_reverse_kl(log_q, log_p, lam=weight) <= -math.log(weight) * slack).all()
    distance = tvd(log_q, log_p)
    assert (distance <= slack).all()
    assert (distance <= (forward_kl(log_q, log_p) / 2).sqrt() * slack + 1e-6).all()  # Pinsker


def test_parameters_are_continuous_at_their_ends() -> None:
    log_q, log_p = log_probs(*(x.double() for x in random_pair(4, 9, std=1)), temperature=1.0)
    forward, reverse = forward_kl(log_q, log_p), reverse_kl(log_q, log_p)
    close = {"rtol": 2e-2, "atol": 0.0}
    torch.testing.assert_close(skew_kl(log_q, log_p, lam=1e-3), forward, **close)
    torch.testing.assert_close(skew_reverse_kl(log_q, log_p, lam=1e-3), reverse, **close)
    torch.testing.assert_close(jsd(log_q, log_p, beta=1e-3) / 1e-3, forward, **close)
    torch.testing.assert_close(jsd(log_q, log_p, beta=0.999) / 1e-3, reverse, **close)
    for a, b in ((0.6, 0.0), (0.0, 0.6), (0.0, 0.0)):
        # The interior, extrapolated linearly to the axis.
        near, far = (alpha_beta(log_q, log_p, a=a or step, b=b or step) for step in (0.01, 0.02))
        torch.testing.assert_close(alpha_beta(log_q, log_p, a=a, b=b), 2 * near - far, **close)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jsd", {"beta": -0.1}),
        ("jsd", {"beta": 1e-9}),
        ("skew_kl", {"lam": 0.9999}),
        ("jsd", {"beta": "0.5"}),
        ("skew_kl", {"lam": 1.0}),
        ("skew_kl", {"lam": float("nan")}),
        ("skew_reverse_kl", {"lam": True}),
        ("alpha_beta", {"a": -0.5}),
        ("alpha_beta", {"b": 0.001}),
        ("alpha_beta", {"a": float("inf")}),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name: str, options: dict) -> None:
    option, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}: {option}={value!r} must be 0"):
        resolve_divergence(name, options)


# The traps.


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_exact_near_convergence(temperature: float) -> None:
    """Trap 8: relative error <= 1e-2 at KL = 2e-7 in fp32, logit std 10; a difference of sums misses it."""
    _, t = random_pair(16, 1000, std=10)
    noise, _ = random_pair(16, 1000, std=1, seed=1)
    step = torch.full((16, 1), 1e-4)
    for _ in range(20):  # scale the step until KL is 2e-7
        kl = oracle("forward_kl", t + step * noise, t, temperature)
        step = step * (2e-7 / kl.clamp_min(1e-12)).sqrt().float().clamp(0.1, 10).unsqueeze(1)
    z = t + step * noise
    kl = oracle("forward_kl", z, t, temperature)
    reached = (kl > 1e-7) & (kl < 4e-7)  # at T = 0.05 a row may be one-hot, and can't get there
    assert reached.sum() >= 4

    for name, options in CASES:
        if name not in ("tvd", "uld", "logit_mse") and options.get("a", 1) > 0:
            values, _ = value_and_grad(name, z, t, temperature, **options)
            expected = oracle(name, z, t, temperature, **options)
            errors = (values.double() - expected).abs() / expected.clamp_min(1e-8)
            assert errors[reached].max() < 1e-2, (name, options)

    log_q, log_p = F.log_softmax(z / temperature, -1), F.log_softmax(t / temperature, -1)
    naive = (log_p.exp() * (log_p - log_q)).sum(-1).double()
    assert ((naive - kl).abs() / kl)[reached].max() > 1e-1
    if temperature < 1:  # the exact form can't make up for digits lost before it
        d = log_q - log_p
        naive = (log_p.exp() * (torch.expm1(d) - d)).sum(-1).double()
        assert ((naive - kl).abs() / kl)[reached].max() > 1e-2


def test_zero_at_a_vocabulary_of_150_000_in_bf16() -> None:
    """Trap 8: KL(s, s) <= 1e-6 at V = 150k in bf16, never below 0, also if one side was upcast before."""
    z, _ = random_pair(2, 150_000, std=10)
    half = z.bfloat16()
    for other in (half, half.float(), half.double()):
        log_q, log_p = log_probs(half, other, temperature=1.0)
        for name in DIVERGENCES:
            assert DIVERGENCES[name](log_q, log_p).tolist() == [0.0, 0.0]
    # The same sum made in bf16 is noise: here the student is 0.1 nats away, and half the digits are gone.
    near = half + 0.5 * random_pair(2, 150_000, std=1, seed=1)[0].bfloat16()
    expected = oracle("forward_kl", near, half)
    values, _ = value_and_grad("forward_kl", near, half)
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=0)
    log_q, log_p = F.log_softmax(near, -1), F.log_softmax(half, -1)
    naive = (log_p.exp() * (log_p - log_q)).sum(-1).double()
    assert ((naive - expected).abs() / expected).max() > 1e-2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.floats(-9, 0), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
def test_never_negative_near_convergence(seed: int, exponent: float, dtype: torch.dtype) -> None:
    """Trap 8: the naive difference goes below 0 near convergence; these values don't."""
    t, noise = random_pair(4, 300, std=8, seed=seed)
    log_q, log_p = log_probs((t + 10**exponent * noise).to(dtype), t.to(dtype), temperature=1.0)
    for name, options in CASES:
        assert (DIVERGENCES[name](log_q, log_p, **options) >= 0).all()


def test_naive_difference_goes_negative() -> None:
    """Trap 8, counter-example."""
    t, noise = random_pair(64, 300, std=8)
    log_q, log_p = F.log_softmax(t + 1e-6 * noise, -1), F.log_softmax(t, -1)
    assert F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).min() < 0


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_finite(name: str, options: dict, dtype: torch.dtype, temperature: float) -> None:
    """Trap 7: value and gradient are finite for T in [0.05, 20], half precision, and logits up to 1e4."""
    for size in (10.0, 1e4):
        z, t = (x.clamp(-1, 1).mul(size).to(dtype) for x in random_pair(9, 40, std=1))
        z[0] = t[0] = -size
        z[0, 0] = t[0, 1] = size  # opposite and one-hot
        values, grad = value_and_grad(name, z, t, temperature, **options)
        assert values.isfinite().all()
        assert grad.dtype == dtype
        _, exact = oracle_value_and_grad(name, z, t, temperature, **options)
        representable = exact.abs() < torch.finfo(dtype).max  # squared errors may leave the range of fp16
        assert representable.any()
        assert grad[representable].isfinite().all()


def test_reverse_kl_through_a_differentiable_target_is_nan() -> None:
    """Trap 7, counter-example: the usual spelling has a finite loss and a NaN gradient."""
    z = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    log_p = F.log_softmax(torch.tensor([[1.0, 2.0, 3.0]]), -1)
    naive = F.kl_div(log_p, F.softmax(z, -1), reduction="none").sum(-1)
    (grad,) = torch.autograd.grad(naive.sum(), z)
    assert naive.isfinite().all()
    assert grad.isnan().any()
    values, grad = value_and_grad("reverse_kl", z, torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(values, naive.detach())
    assert grad.isfinite().all()


@every_divergence
def test_masked_classes(name: str, options: dict) -> None:
    """Trap 9: -inf on either side removes a class from both; the rest is what it would be without it."""
    z, t = random_pair(6, 12)
    keep = torch.ones(12, dtype=torch.bool)
    keep[[1, 4, 7]] = False
    expected, expected_grad = value_and_grad(name, z[:, keep], t[:, keep], 2.0, **options)
    z[:, [1, 4]] = -torch.inf
    t[:, [4, 7]] = -torch.inf
    values, grad = value_and_grad(name, z, t, 2.0, **options)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[:, keep], expected_grad, rtol=1e-4, atol=1e-6)
    assert (grad[:, ~keep] == 0).all()
    equal, grad = value_and_grad(name, t, t, 2.0, **options)
    assert equal.abs().max() == grad.abs().max() == 0


def test_naive_sum_is_nan_with_a_masked_class() -> None:
    """Trap 9, counter-example: 0 * -inf."""
    z, t = random_pair(2, 5)
    z[:, 0] = t[:, 0] = -torch.inf
    log_q, log_p = F.log_softmax(z, -1), F.log_softmax(t, -1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).isnan().all()
    assert forward_kl(*log_probs(z, t, temperature=1.0)).isfinite().all()


def test_direction_and_arguments() -> None:
    """Trap 5: teacher to student, log-probabilities on both sides; usual mistakes give plausible numbers."""
    z, t = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0]])
    p = t.softmax(-1)
    expected = (p * (p * 3).log()).sum(-1)  # the student is uniform
    log_q, log_p = log_probs(z, t, temperature=1.0)
    torch.testing.assert_close(forward_kl(log_q, log_p), expected)
    torch.testing.assert_close(F.kl_div(log_q, p, reduction="none").sum(-1), expected)
    mistakes = {
        "swapped": F.kl_div(log_p, log_q.exp(), reduction="none").sum(-1),
        "probabilities for log-probabilities": F.kl_div(log_q.exp(), p, reduction="none").sum(-1),
        "a log target without its flag": F.kl_div(log_q, log_p, reduction="none").nansum(-1),
        "softmax of log-probabilities of the wrong axis": F.kl_div(
            F.log_softmax(z, 0), F.softmax(t, 0), reduction="none"
        ).sum(-1),
    }
    for mistake, value in mistakes.items():
        assert (value - expected).abs() > 0.1 * expected, mistake


def test_summed_over_classes() -> None:
    """Trap 3: classes without mass change nothing; `reduction="mean"` divides by their number."""
    z, t = random_pair(4, 10, std=2)
    wide_z, wide_t = (F.pad(x, (0, 90), value=-60.0) for x in (z, t))
    for name in set(DIVERGENCES) - {"logit_mse", "alpha_beta"}:  # these two look at every class on purpose
        narrow, _ = value_and_grad(name, z, t)
        wide, _ = value_and_grad(name, wide_z, wide_t)
        torch.testing.assert_close(wide, narrow, rtol=1e-4, atol=1e-6)

    def naive(z: Tensor, t: Tensor) -> Tensor:
        # What reduction="mean" does.
        return F.kl_div(F.log_softmax(z, -1), F.softmax(t, -1), reduction="none").mean()

    torch.testing.assert_close(naive(wide_z, wide_t) / naive(z, t), torch.tensor(0.1), rtol=1e-3, atol=0)


def test_gradient_norm_does_not_depend_on_temperature() -> None:
    """Trap 1: with T^2, the gradient's norm stays within 1.3x from T = 1 to 8; without, it falls 40-fold."""
    z, t = random_pair(8, 20, std=0.5)
    for name in ("forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl", "logit_mse"):
        norms = [value_and_grad(name, z, t, T)[1].norm() * T**2 for T in (1.0, 2.0, 4.0, 8.0)]
        assert max(norms) / min(norms) < 1.3, name
        assert norms[0] * 8**2 / norms[3] > 40, name


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 50))
def test_limit_of_high_temperature(seed: int, classes: int) -> None:
    """Trap 1: for T to infinity `T^2 KL` tends to `1/(2C) |centred(z - t)|^2`, half of `T^2 logit_mse`."""
    z, t = random_pair(3, classes, std=1, seed=seed)
    d = z - t
    limit = (d - d.mean(-1, keepdim=True)).square().sum(-1) / (2 * classes)
    temperature = 1e3
    log_q, log_p = log_probs(z, t, temperature=temperature)
    for value in (
        forward_kl(log_q, log_p),
        reverse_kl(log_q, log_p),
        jeffreys(log_q, log_p),
        4 * jsd(log_q, log_p),
        skew_kl(log_q, log_p, lam=0.1) / 0.81,
        logit_mse(log_q, log_p) / 2,
    ):
        torch.testing.assert_close(value * temperature**2, limit, rtol=2e-2, atol=1e-4)


def test_teacher_gets_no_gradient() -> None:
    """Trap 11: neither through its logits nor through its log-probabilities."""
    z, t = (x.requires_grad_() for x in random_pair(3, 6))
    log_q, log_p = log_probs(z, t, temperature=2.0)
    assert not log_p.requires_grad
    leaf = log_p.clone().requires_grad_()
    for name in DIVERGENCES:
        DIVERGENCES[name](log_q, leaf).sum().backward(retain_graph=True)
    assert t.grad is None and leaf.grad is None
    assert z.grad is not None


def test_entropy_is_the_floor_of_soft_cross_entropy() -> None:
    """Trap 6: cross-entropy with soft labels is entropy plus KL; only KL is 0 for equal models."""
    z, t = random_pair(5, 8)
    t[:, 3] = -torch.inf
    z[:, 3] = -torch.inf
    log_q, log_p = log_probs(z, t, temperature=1.0)
    cross = -(log_p.exp() * log_q.clamp_min(-1e9)).sum(-1)
    torch.testing.assert_close(cross, entropy(log_p) + forward_kl(log_q, log_p))
    uniform, _ = log_probs(torch.zeros(1, 50), torch.zeros(1, 50), temperature=1.0)
    torch.testing.assert_close(entropy(uniform), torch.tensor([math.log(50)]))


def test_labels_of_a_multi_label_head_are_two_classes_each() -> None:
    """Trap 10: per-label Bernoulli KL is the softmax KL of `[0, z]`."""
    z, t = random_pair(4, 6)
    pair = [torch.stack([torch.zeros_like(x), x], -1) for x in (z, t)]
    log_q, log_p = log_probs(*pair, temperature=1.0)
    q, p = z.double().sigmoid(), t.double().sigmoid()
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    values = forward_kl(log_q, log_p)
    assert values.shape == (4, 6)
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-6)


# Names.


def half_squares(log_q: Tensor, log_p: Tensor, *, scale: float) -> Tensor:
    return scale * (log_q.exp() - log_p.exp()).square().sum(-1)


def averaged(log_q: Tensor, log_p: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").mean()


def test_resolve_by_name_path_and_callable() -> None:
    log_q, log_p = log_probs(*random_pair(3, 5), temperature=1.0)
    assert resolve_divergence("forward_kl") is forward_kl
    assert torch.equal(resolve_divergence("jsd", {"beta": 0.1})(log_q, log_p), jsd(log_q, log_p, beta=0.1))
    expected = half_squares(log_q, log_p, scale=0.5)
    for spec in (half_squares, f"{__name__}:half_squares"):
        found = resolve_divergence(spec, {"scale": 0.5})
        assert torch.equal(found(log_q, log_p), expected)
        assert found.__name__ == "half_squares"


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("foward_kl", {}, "divergence='foward_kl' is not known; did you mean 'forward_kl'"),
        ("something", {}, "forward_kl, reverse_kl, jeffreys"),
        (3, {}, "divergence=3 is not known"),
        ("no_such_module:f", {}, "No module named 'no_such_module'"),
        ("math:no_such_name", {}, "no_such_name"),
        ("math:pi", {}, "float: name a function"),
        ("jsd", {"bta": 0.5}, "divergence_options: jsd has no option 'bta'; did you mean 'beta'"),
        ("forward_kl", {"lam": 0.5}, "divergence_options: forward_kl has no option 'lam'. Its options: none"),
        (half_squares, {}, "missing a required argument: 'scale'"),
        (lambda log_q: log_q, {}, "too many positional arguments"),
    ],
)
def test_resolve_names_what_is_wrong(spec: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_divergence(spec, options)


def test_a_divergence_that_averages_is_refused() -> None:
    """Trap 3: one value a row is part of the contract, so a mean over classes or rows can't slip in."""
    log_q, log_p = log_probs(*random_pair(3, 5), temperature=1.0)
    with pytest.raises(ValueError, match=r"returned shape \[\] .* one value a row, shape \[3\]"):
        resolve_divergence(averaged)(log_q, log_p)
