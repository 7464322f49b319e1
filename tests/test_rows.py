"""Log-probabilities at a temperature, and sums over classes in blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_kd.losses import DIVERGENCES, rows
from hf_kd.losses.divergences import entropy, forward_kl
from hf_kd.losses.rows import log_probs, sum_over_classes


def pair(*shape: int, std: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator) * std for _ in range(2))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(2, 40),
    st.sampled_from([0.05, 0.7, 1.0, 20.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_log_probs_equal_log_softmax(seed: int, classes: int, temperature: float, dtype: torch.dtype) -> None:
    z, t = (x.to(dtype) for x in pair(3, classes, seed=seed))
    z.requires_grad_()
    log_q, log_p = log_probs(z, t, temperature=temperature, teacher_temperature=2.0)
    weight = torch.randn(3, classes, generator=torch.Generator().manual_seed(seed + 1))
    (grad,) = torch.autograd.grad((log_q * weight).sum(), z)
    exact = z.detach().double().requires_grad_()
    expected = F.log_softmax(exact / temperature, -1)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), exact)
    assert log_q.dtype == log_p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    torch.testing.assert_close(log_q.double(), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(log_p.double(), F.log_softmax(t.double() / 2, -1), rtol=1e-5, atol=2e-5)
    coarse = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(
        grad.double() * temperature, expected_grad * temperature, rtol=coarse, atol=coarse / 10
    )


def test_low_temperature_keeps_its_digits() -> None:
    """Trap 8: dividing first rounds numbers 1 / T times as large."""
    z = 30 + 0.05 * pair(16, 100, std=1)[0]
    expected = F.log_softmax(z.double() / 0.05, -1)

    def error(log_q: Tensor) -> float:
        return (log_q.double() - expected).abs().max().item()

    log_q, _ = log_probs(z, z, temperature=0.05)
    assert error(log_q) < 2e-6
    assert error(F.log_softmax(z / 0.05, -1)) > 2e-5


def test_masked_on_either_side_is_masked_on_both() -> None:
    """Trap 9: the mask is shared, the rest renormalised, and nothing is NaN."""
    z, t = pair(2, 6)
    z[0, 1] = t[0, 2] = t[1, 5] = z[1, 5] = -torch.inf
    z.requires_grad_()
    log_q, log_p = log_probs(z, t, temperature=2.0)
    assert torch.equal(log_q.isneginf(), log_p.isneginf())
    assert log_q.isneginf().nonzero().tolist() == [[0, 1], [0, 2], [1, 5]]
    for side in (log_q, log_p):
        torch.testing.assert_close(side.exp().sum(-1), torch.ones(2))
    (grad,) = torch.autograd.grad((log_q.exp() * torch.arange(6)).sum(), z)
    assert grad.isfinite().all()


def test_a_row_without_classes_and_a_nan_are_not_hidden() -> None:
    z, t = pair(3, 4)
    z[0, :2] = t[0, 2:] = -torch.inf
    z[1, 0] = torch.nan
    log_q, log_p = log_probs(z, t, temperature=1.0)
    for name, divergence in DIVERGENCES.items():
        assert divergence(log_q, log_p).isnan().tolist() == [True, True, False], name


def test_inputs_are_left_alone() -> None:
    """Trap 11: logits of a cache must not be edited; the teacher may come from inference mode."""
    z, t = pair(3, 4)
    z[0, 0] = -torch.inf
    before = z.clone(), t.clone()
    z.requires_grad_()
    with torch.inference_mode():
        frozen = t * 1
    log_q, log_p = log_probs(z, frozen, temperature=2.0)
    forward_kl(log_q, log_p).sum().backward()
    assert torch.equal(z.detach(), before[0])
    assert torch.equal(frozen, before[1])


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3), (2, 4)), {}, r"student_logits has shape \[2, 3\], teacher_logits \[2, 4\]"),
        (((2, 1), (2, 1)), {}, "num_labels=1"),
        (((2, 3), (2, 3)), {"temperature": 0.0}, "temperature=0.0 must be a finite number above 0"),
        (((2, 3), (2, 3)), {"temperature": -1.0}, "temperature=-1.0"),
        (((2, 3), (2, 3)), {"temperature": float("nan")}, "temperature=nan"),
        (((2, 3), (2, 3)), {"teacher_temperature": 0}, "teacher_temperature=0 must"),
    ],
)
def test_bad_input(shapes: tuple, options: dict, message: str) -> None:
    """Trap 10, among others: a head with one class has no distribution."""
    with pytest.raises(ValueError, match=message):
        log_probs(torch.zeros(shapes[0]), torch.zeros(shapes[1]), **{"temperature": 1.0, **options})


def test_half_precision_log_probs_are_refused() -> None:
    """Trap 8: 1e-8 is 0 in fp16; log-probabilities come in fp32 or better."""
    log_q, log_p = log_probs(*pair(2, 3), temperature=1.0)
    with pytest.raises(ValueError, match="torch.float16"):
        forward_kl(log_q.half(), log_p.half())
    with pytest.raises(ValueError, match="torch.float64"):
        forward_kl(log_q, log_p.double())
    with pytest.raises(ValueError, match="log_q has shape"):
        forward_kl(log_q, log_p[:1])


# The weights of adaptive KL carry no gradient, on purpose.
@pytest.mark.parametrize("name", [*(name for name in DIVERGENCES if name != "adaptive_kl"), "entropy"])
def test_slopes_are_the_derivative_of_terms(name: str) -> None:
    """Also away from normalised log-probabilities, where each term stands for itself."""
    log_q, log_p = (-x.abs().double() for x in pair(3, 5, std=1.5))
    log_q.requires_grad_()
    call = entropy if name == "entropy" else lambda log_q: DIVERGENCES[name](log_q, log_p)
    assert torch.autograd.gradcheck(call, log_q, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any block size, any leading shape, any memory layout: the same numbers."""
    z, t = pair(2, 9, 7)
    z.requires_grad_()

    def run(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        values = DIVERGENCES[name](*log_probs(z, t, temperature=2.0))
        (grad,) = torch.autograd.grad(values.square().sum(), z)
        return values.detach(), grad

    values, grad = run(z, t)
    assert values.shape == (2, 9)
    strided, strided_grad = run(z.transpose(0, 1), t.transpose(0, 1))
    monkeypatch.setattr(rows, "_CPU_BLOCK", 3 * 7)
    blocked, blocked_grad = run(z, t)
    torch.testing.assert_close(blocked, values)
    torch.testing.assert_close(blocked_grad, grad)
    torch.testing.assert_close(strided.transpose(0, 1), values)
    torch.testing.assert_close(strided_grad.transpose(0, 1), grad)


class _FullSize(TorchDispatchMode):
    """Counts the tensors of at least `elements` elements that are made."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.numel() >= self.elements:
            self.count += out.untyped_storage().data_ptr() not in known
        return out


# Those two sort whole rows.
@pytest.mark.parametrize("name", sorted({*DIVERGENCES} - {"adaptive_kl", "uld"}))
def test_no_full_size_temporaries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The naive form makes four `[N, C]` temporaries for its value alone; here there are only results."""
    monkeypatch.setattr(rows, "_CPU_BLOCK", 64)
    z, t = pair(32, 16)
    z.requires_grad_()
    with _FullSize(32 * 16) as made:
        log_q, log_p = log_probs(z, t, temperature=2.0)
    assert made.count == 2
    log_q = log_q.detach().requires_grad_()
    with _FullSize(32 * 16) as made:
        values = DIVERGENCES[name](log_q, log_p)
    assert made.count == 0
    with _FullSize(32 * 16) as made:
        values.sum().backward()
    assert made.count == 1


def test_rounding_below_zero_is_cut_off_without_cutting_the_gradient() -> None:
    """Trap 12: a clamp outside would also kill the gradient."""
    log_q, log_p = log_probs(*(x.requires_grad_() for x in pair(2, 3)), temperature=1.0)
    log_q = log_q.detach().requires_grad_()
    values = sum_over_classes(log_q, log_p, lambda q, p: 0 * q - 1e-9, lambda q, p: q - p)
    values.sum().backward()
    assert values.tolist() == [0.0, 0.0]
    torch.testing.assert_close(log_q.grad, log_q.detach() - log_p)


def test_no_rows_keep_the_graph() -> None:
    """Trap 17: a rank without a supervised position contributes an exact zero that has a gradient."""
    z, t = (x.requires_grad_() for x in pair(4, 3))
    none = torch.zeros(0, dtype=torch.long)
    loss = forward_kl(*log_probs(z[none], t[none], temperature=2.0)).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert z.grad.abs().sum() == 0.0


def test_second_derivative_is_refused() -> None:
    z, t = (x.requires_grad_() for x in pair(2, 3))
    loss = forward_kl(*log_probs(z, t, temperature=1.0)).sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_compiles_without_a_graph_break() -> None:
    z, t = pair(4, 6)
    z.requires_grad_()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return forward_kl(*log_probs(z, t, temperature=2.0)).mean()

    (expected,) = torch.autograd.grad(loss(z, t), z)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)(z, t)
    torch.testing.assert_close(compiled, loss(z, t))
    (grad,) = torch.autograd.grad(compiled, z)
    torch.testing.assert_close(grad, expected)


def test_autocast_changes_nothing() -> None:
    """Trap 19, the maths: under bf16 autocast the divergence is still fp32."""
    z, t = (x.bfloat16() for x in pair(4, 50))
    expected = forward_kl(*log_probs(z, t, temperature=2.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = forward_kl(*log_probs(z, t, temperature=2.0))
    assert values.dtype == torch.float32
    assert torch.equal(values, expected)
