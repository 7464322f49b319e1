"""The fused loss equals a dense float64 oracle in value and gradient, whatever the options."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_kd.losses import chunks, divergences, tiles
from hf_kd.losses.fused import (
    FUSED_DIVERGENCES,
    DenseTeacher,
    FusedLoss,
    Head,
    HiddenTeacher,
    SparseTeacher,
    fused_distillation,
    fused_evaluation,
)

KINDS = [(name, None) for name in FUSED_DIVERGENCES]
KINDS += [("jsd", {"beta": 0.2}), ("jsd", {"beta": 0.0}), ("jsd", {"beta": 1.0}), ("skew_kl", {"lam": 0.6})]
DEFAULTS = {
    "alpha": 0.5, "temperature": 2.0, "teacher_temperature": None, "divergence": "forward_kl",
    "divergence_options": None, "label_smoothing": 0.0, "z_loss": 0.0, "shared_classes": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles and chunks, at sizes where one would do."""
    monkeypatch.setattr(tiles, "_TILE_BYTES", 4096)
    monkeypatch.setattr(tiles, "_MAX_TOKENS", 5)
    monkeypatch.setattr(tiles, "_MIN_TOKENS", 1)


class Problem:
    """A student, a teacher and labels, in float64."""

    def __init__(
        self, n=11, v=301, teacher_v=301, h=8, teacher_h=6, std=1.0, bias=True, masked=False, softcap=None,
        scale=1.0, unlabelled=0.3, seed=0,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        self.hidden, self.teacher_hidden = normal(n, h), normal(n, teacher_h)
        self.head = Head(
            normal(v, h, scale=std / h**0.5), normal(v, scale=0.1) if bias else None, softcap, scale
        )
        self.teacher_head = Head(
            normal(teacher_v, teacher_h, scale=std / teacher_h**0.5), normal(teacher_v, scale=0.1)
        )
        self.labels = torch.randint(0, v, (n,), generator=g)
        if masked:
            self.head.bias[::7] = -math.inf
            self.teacher_head.bias[::5] = -math.inf
            self.labels = (self.labels // 7 * 7 + 1).clamp_max(v - 2)
        self.labels[torch.rand(n, generator=g) < unlabelled] = -100
        self.weights = torch.rand(n, generator=g, dtype=torch.float64)
        self.weights[torch.rand(n, generator=g) < unlabelled] = 0

    def teacher_logits(self) -> Tensor:
        return logits(self.teacher_hidden, self.teacher_head)

    def teacher(self, kind="hidden", dtype=torch.float64):
        if kind == "dense":
            return DenseTeacher(self.teacher_logits().to(dtype))
        return HiddenTeacher(self.teacher_hidden.to(dtype), cast(self.teacher_head, dtype))

    def oracle(self, **options) -> tuple[Tensor, list[Tensor]]:
        leaves = [self.hidden, self.head.weight, self.head.bias]
        leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
        head = Head(leaves[1], leaves[2], self.head.softcap, self.head.scale)
        loss = dense_loss(
            logits(leaves[0], head), self.teacher_logits(), self.labels, self.weights, **DEFAULTS | options
        )
        return loss.detach(), gradients(loss, leaves)

    def fused(self, teacher=None, dtype=torch.float64, **options) -> tuple[FusedLoss, list[Tensor]]:
        leaves = [self.hidden, self.head.weight, self.head.bias]
        leaves = [None if x is None else x.to(dtype).clone().requires_grad_() for x in leaves]
        out = fused_distillation(
            leaves[0], Head(leaves[1], leaves[2], self.head.softcap, self.head.scale),
            teacher=teacher or self.teacher(dtype=dtype), labels=self.labels, kd_weights=self.weights,
            **DEFAULTS | options,
        )  # fmt: skip
        return out, gradients(out.loss, leaves)


def cast(head: Head, dtype: torch.dtype) -> Head:
    return Head(
        head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype), head.softcap, head.scale
    )


def logits(hidden: Tensor, head: Head) -> Tensor:
    z = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def gradients(loss: Tensor, leaves: list[Tensor | None]) -> list[Tensor]:
    given_leaves = [x for x in leaves if x is not None]
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in given_leaves]
    found = torch.autograd.grad(loss, given_leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, given_leaves, strict=True)]


def dense_loss(
    z, t, labels, weights, *, alpha, temperature, teacher_temperature, divergence, divergence_options,
    label_smoothing, z_loss, shared_classes,
) -> Tensor:  # fmt: skip
    loss = torch.zeros((), dtype=torch.float64)
    rows = labels != -100
    if alpha < 1 and rows.any():
        z1, visible = z[rows], ~torch.isneginf(z[0])
        lse = z1.logsumexp(-1)
        own = z1.gather(1, labels[rows, None]).squeeze(1)
        ce = lse - (1 - label_smoothing) * own - label_smoothing * z1[:, visible].mean(-1) + z_loss * lse**2
        loss = loss + (1 - alpha) * ce.sum() / rows.sum()
    rows = weights > 0
    if alpha > 0 and rows.any():
        shared = shared_classes or min(z.shape[1], t.shape[1])
        log_q, log_p = divergences.log_probs(
            z[rows, :shared], t[rows, :shared], temperature=temperature,
            teacher_temperature=teacher_temperature or temperature,
        )  # fmt: skip
        d = divergences.resolve_divergence(divergence, divergence_options)(log_q, log_p)
        loss = loss + alpha * temperature**2 * (weights[rows] * d).sum() / weights.sum()
    return loss


def assert_equal(found, wanted, tolerance: float) -> None:
    (out, grads), (loss, wanted_grads) = found, wanted
    assert abs(out.loss.double() - loss) <= tolerance * max(1.0, abs(float(loss)))
    for grad, want in zip(grads, wanted_grads, strict=True):
        assert torch.isfinite(grad).all()
        assert (grad.double() - want).norm() <= tolerance * max(float(want.norm()), 1e-3)


@pytest.mark.parametrize(("divergence", "divergence_options"), KINDS)
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 2.0, 20.0])
def test_every_divergence_and_temperature(divergence, divergence_options, temperature):
    """Trap 7: values and gradients are finite and right for T in [0.05, 20]."""
    problem = Problem(std=3.0)
    options = {
        "divergence": divergence, "divergence_options": divergence_options, "temperature": temperature
    }  # fmt: skip
    assert_equal(problem.fused(**options), problem.oracle(**options), 1e-10)
    single = problem.fused(dtype=torch.float32, **options)
    assert_equal(single, problem.oracle(**options), 3e-6 if temperature >= 0.7 else 3e-5)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_combination_of_options(data):
    """Trap 9: masked classes too; a drawn problem with drawn options equals the oracle."""
    draw = data.draw
    kind, kind_options = draw(st.sampled_from(KINDS))
    v, teacher_v = draw(st.sampled_from([(97, 97), (301, 289), (64, 301), (8, 8)]))
    problem = Problem(
        n=draw(st.sampled_from([1, 2, 13])), v=v, teacher_v=teacher_v, bias=draw(st.booleans()) or v == 97,
        masked=v == 97 and draw(st.booleans()), softcap=draw(st.sampled_from([None, None, 3.0, 30.0])),
        scale=draw(st.sampled_from([1.0, 0.25, 2.0])), std=draw(st.sampled_from([0.1, 1.0, 10.0])),
        unlabelled=draw(st.sampled_from([0.0, 0.5, 1.0])), seed=draw(st.integers(0, 5)),
    )  # fmt: skip
    if problem.head.softcap is not None and problem.head.bias is not None:
        problem.head.bias.clamp_(min=-1)  # a soft-cap turns -inf into a number
    options = {
        "divergence": kind, "divergence_options": kind_options,
        "alpha": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "temperature": draw(st.sampled_from([0.05, 0.3, 0.5, 1.0, 1.7, 2.0, 4.0, 20.0])),
        "teacher_temperature": draw(st.sampled_from([None, 1.0, 3.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 1e-3])),
        "shared_classes": draw(st.sampled_from([None, min(v, teacher_v) - 3])),
    }  # fmt: skip
    teacher = problem.teacher(draw(st.sampled_from(["hidden", "dense"])))
    assert_equal(problem.fused(teacher, **options), problem.oracle(**options), 1e-9)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_combination_in_lower_precision(data):
    """Traps 7 and 8: inputs in fp32, bf16 or fp16 equal the oracle of the same rounded numbers."""
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    kind, kind_options = draw(st.sampled_from(KINDS))
    problem = Problem(
        n=draw(st.sampled_from([1, 17, 40])), v=draw(st.sampled_from([97, 301])),
        seed=draw(st.integers(0, 5)), teacher_v=301, std=draw(st.sampled_from([0.5, 3.0])),
        unlabelled=draw(st.sampled_from([0.0, 0.5])),
    )  # fmt: skip
    problem.hidden = problem.hidden.to(dtype).double()
    problem.teacher_hidden = problem.teacher_hidden.to(dtype).double()
    problem.head = cast(cast(problem.head, dtype), torch.float64)
    problem.teacher_head = cast(cast(problem.teacher_head, dtype), torch.float64)
    options = {
        "divergence": kind, "divergence_options": kind_options,
        "alpha": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "temperature": draw(st.sampled_from([1.0, 1.7, 2.0, 8.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
    }  # fmt: skip
    (out, grads), (loss, wanted) = problem.fused(dtype=dtype, **options), problem.oracle(**options)
    assert abs(out.loss.double() - loss) <= 3e-6 * max(1.0, abs(float(loss)))
    for grad, want in zip(grads, wanted, strict=True):
        # What cannot be avoided: the gradient itself is rounded to the dtype of its input.
        rounding = (want.to(dtype).double() - want).norm() if dtype != torch.float32 else 0.0
        assert (grad.double() - want).norm() <= 1.05 * rounding + 5e-6 * max(float(want.norm()), 1e-3)


def test_chunks_of_sixteen(monkeypatch):
    """A number of tokens that is no multiple of what products like: whole chunks, then what is left."""
    monkeypatch.setattr(tiles, "_MAX_TOKENS", 40)
    problem = Problem(n=75)
    assert_equal(problem.fused(), problem.oracle(), 1e-10)


@pytest.mark.parametrize("near", [1e-3, 1e-2, 1.0])
def test_jensen_shannon_where_some_rows_are_almost_equal(near):
    """Trap 8: rows near convergence keep their digits beside rows that are far from it."""
    problem = Problem(n=8, v=601, teacher_v=601, h=16, teacher_h=16, std=3.0, unlabelled=0.0)
    problem.teacher_head = problem.head
    g = torch.Generator().manual_seed(1)
    change = torch.randn(problem.hidden.shape, generator=g, dtype=torch.float64)
    change[::2] *= near
    problem.teacher_hidden = problem.hidden + change
    for part in ("hidden", "teacher_hidden"):
        setattr(problem, part, getattr(problem, part).float().double())
    problem.head = problem.teacher_head = cast(cast(problem.head, torch.float32), torch.float64)
    problem.weights.zero_()[0] = 1
    options = {"divergence": "jsd", "alpha": 1.0, "temperature": 1.0}
    (out, grads), (loss, wanted) = problem.fused(dtype=torch.float32, **options), problem.oracle(**options)
    assert out.loss.item() == pytest.approx(float(loss), rel=2e-2, abs=1e-12)
    assert (grads[0].double() - wanted[0]).norm() <= 1e-2 * wanted[0].norm() + 1e-9


def test_dense_teacher_with_masked_entries_is_not_edited():
    """Traps 9 and 11: `-inf` at any place of a teacher's logits; they stay as they were."""
    problem = Problem(std=3.0)
    t = problem.teacher_logits()
    t[torch.rand(t.shape, generator=torch.Generator().manual_seed(3)) < 0.3] = -math.inf
    problem.teacher_logits = lambda: t
    before = t.clone()
    for kind, options in KINDS:
        found = problem.fused(DenseTeacher(t), divergence=kind, divergence_options=options)
        assert_equal(found, problem.oracle(divergence=kind, divergence_options=options), 1e-10)
    assert torch.equal(t, before)


@pytest.mark.parametrize("kind", FUSED_DIVERGENCES)
def test_equal_models_give_nothing(kind):
    """Trap 8: KL(s, s) is 0 to 1e-6, its gradient too."""
    problem = Problem(std=10.0, teacher_h=8, v=5001, teacher_v=5001)
    problem.teacher_hidden, problem.teacher_head = problem.hidden, problem.head
    for dtype in (torch.float32, torch.bfloat16):
        out, grads = problem.fused(dtype=dtype, divergence=kind, alpha=1.0)
        assert abs(out.kd_sum) <= 1e-6
        assert all(grad.abs().max() <= 1e-6 for grad in grads)


@pytest.mark.parametrize("kind", FUSED_DIVERGENCES)
@pytest.mark.parametrize("step", [1e-1, 6e-4])
def test_digits_near_convergence(kind, step, monkeypatch):
    """Trap 8: relative error of 1e-2 where the KL is 2e-7, in fp32 at logits of std 10, and never below 0."""
    problem = Problem(std=10.0, n=64, v=3001, teacher_v=3001, h=32, teacher_h=32, unlabelled=0.0)
    problem.teacher_hidden = problem.hidden
    g = torch.Generator().manual_seed(1)
    change = torch.randn(problem.head.weight.shape, generator=g, dtype=torch.float64) * step / 32**0.5
    # Rounded as fp32 does, so that both see the same models.
    single = [x.float().double() for x in (problem.head.weight, problem.head.weight + change, problem.hidden)]
    problem.head, problem.teacher_head = Head(single[0]), Head(single[1])
    problem.hidden = problem.teacher_hidden = single[2]
    problem.weights.fill_(1)
    options = {"divergence": kind, "alpha": 1.0, "temperature": 1.0}
    found, wanted = problem.fused(dtype=torch.float32, **options), problem.oracle(**options)
    assert found[0].loss >= 0
    assert found[0].loss.item() == pytest.approx(float(wanted[0]), rel=1e-2)
    # Total variation's slope is a sign, open where logits differ by no more than their rounding, and tiles of
    # a few classes round the two models' products differently. Tiles as large as in use have no such excuse.
    bound = 5e-2 if kind == "tvd" else 2e-2
    assert (found[1][0].double() - wanted[1][0]).norm() <= bound * wanted[1][0].norm()
    for name, value in (("_TILE_BYTES", 1 << 21), ("_MAX_TOKENS", 512), ("_MIN_TOKENS", 8)):
        monkeypatch.setattr(tiles, name, value)
    whole = problem.fused(dtype=torch.float32, **options)[1][0].double()
    assert (whole - wanted[1][0]).norm() <= 2e-2 * wanted[1][0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_meet_fp32_maths(dtype):
    """Trap 8: bf16 and fp16 inputs lose what their rounding loses, and no more."""
    problem = Problem()
    problem.hidden, problem.teacher_hidden = (
        problem.hidden.to(dtype).double(),
        problem.teacher_hidden.to(dtype).double(),
    )
    problem.head, problem.teacher_head = (
        cast(cast(head, dtype), torch.float64) for head in (problem.head, problem.teacher_head)
    )
    (out, grads), (loss, wanted) = problem.fused(dtype=dtype), problem.oracle()
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(float(loss), rel=1e-6)
    assert grads[0].dtype == dtype
    assert (grads[0].double() - wanted[0]).norm() <= (2.5e-3 if dtype == torch.bfloat16 else 1e-3) * wanted[
        0
    ].norm()


def test_sums_for_the_log():
    """Counts, agreement, KL at T = 1 and entropies come with the loss."""
    problem = Problem()
    out, _ = problem.fused(temperature=1.0, divergence="jsd", entropies=True)
    w = problem.weights
    log_q = logits(problem.hidden, problem.head).log_softmax(-1)
    log_p = problem.teacher_logits().log_softmax(-1)
    same = log_q.argmax(-1) == log_p.argmax(-1)
    assert out.task_count == (problem.labels != -100).sum()
    assert out.kd_count == pytest.approx(float(w.sum()))
    assert out.agreement_sum == pytest.approx(float((w * same).sum()))
    assert out.kl_t1_sum == pytest.approx(float((w * divergences.forward_kl(log_q, log_p)).sum()))
    assert out.teacher_entropy_sum == pytest.approx(float((w * divergences.entropy(log_p)).sum()))
    assert out.student_entropy_sum == pytest.approx(float((w * divergences.entropy(log_q)).sum()))
    assert problem.fused(temperature=2.0)[0].kl_t1_sum.isnan()


def test_counts_from_outside_make_micro_batches_add_up():
    """Traps 15, 17 and 18: parts divided by the whole's counts have the whole's gradient; ranks multiply."""
    problem = Problem(n=12)
    whole = problem.fused()
    counts = {"task_count": whole[0].task_count, "kd_count": whole[0].kd_count}
    total = torch.zeros_like(problem.head.weight)
    for part in (slice(0, 5), slice(5, 12)):
        weight = problem.head.weight.clone().requires_grad_()
        out = fused_distillation(
            problem.hidden[part], Head(weight, problem.head.bias), labels=problem.labels[part], scale=2.0,
            teacher=HiddenTeacher(problem.teacher_hidden[part], problem.teacher_head),
            kd_weights=problem.weights[part], **counts,
        )  # fmt: skip
        out.loss.backward()
        total += weight.grad / 2
    torch.testing.assert_close(total, whole[1][1])


def test_nothing_supervised_keeps_the_graph():
    """Trap 17: a rank without a supervised position gives an exact zero and a gradient of zeros."""
    problem = Problem(unlabelled=1.1)
    out, grads = problem.fused()
    assert out.loss == 0 and out.loss.requires_grad
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_no_positions_at_all():
    """An empty batch is a zero, not an error."""
    hidden = torch.zeros(0, 4, requires_grad=True)
    out = fused_distillation(
        hidden, Head(torch.randn(9, 4)), labels=torch.zeros(0, dtype=torch.long), alpha=0.0
    )
    out.loss.backward()
    assert out.loss == 0 and hidden.grad.shape == (0, 4)


def test_frozen_head_and_shapes_of_a_batch():
    """A frozen head gets no gradient; `[B, L, H]` is as good as `[N, H]`."""
    problem = Problem(n=12, unlabelled=0.0)
    hidden = problem.hidden.view(3, 4, -1).clone().requires_grad_()
    out = fused_distillation(
        hidden, problem.head,
        teacher=HiddenTeacher(problem.teacher_hidden.view(3, 4, -1), problem.teacher_head),
        labels=problem.labels.view(3, 4),
    )  # fmt: skip
    out.loss.backward()
    problem.weights.fill_(1)
    loss, wanted = problem.oracle()
    assert out.loss.item() == pytest.approx(float(loss))
    torch.testing.assert_close(hidden.grad.view(12, -1), wanted[0])
    assert problem.head.weight.grad is None


def test_loss_scaling_double_backward_and_no_grad():
    """Backward scales, once; a second derivative is an error; without grad there is only the value."""
    problem = Problem()
    weight = problem.head.weight.clone().requires_grad_()

    def loss() -> Tensor:
        return fused_distillation(
            problem.hidden, Head(weight), teacher=problem.teacher(), labels=problem.labels
        ).loss

    (one,) = torch.autograd.grad(loss(), weight)
    (scaled,) = torch.autograd.grad(loss() * 8, weight)
    torch.testing.assert_close(scaled, one * 8)
    (first,) = torch.autograd.grad(loss(), weight, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()
    twice = loss()
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once"):
        twice.backward()
    with torch.no_grad():
        assert loss().item() == pytest.approx(twice.item())


def test_autocast_does_not_change_the_maths():
    """Trap 19: under autocast the products stay in fp32."""
    problem = Problem()
    plain = problem.fused(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_out = problem.fused(dtype=torch.float32)
    assert torch.equal(plain[0].loss, cast_out[0].loss)
    assert torch.equal(plain[1][1], cast_out[1][1])


def sparse_of_all(problem: Problem, temperature: float) -> SparseTeacher:
    log_p = (problem.teacher_logits() / temperature).log_softmax(-1)
    n, v = log_p.shape
    order = torch.rand(n, v, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return SparseTeacher(order, log_p.gather(1, order), log_p.new_full((n,), -math.inf))


@pytest.mark.parametrize(("divergence", "options"), KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_sparse_teacher_with_all_classes_is_the_dense_one(divergence, options, softcap):
    """Trap 12: k = V gives the dense loss and gradient."""
    problem = Problem(v=61, teacher_v=61, softcap=softcap)
    settings_ = {"divergence": divergence, "divergence_options": options, "label_smoothing": 0.1}
    found = problem.fused(sparse_of_all(problem, 2.0), **settings_)
    assert_equal(found, problem.oracle(**settings_), 1e-9)
    assert found[0].agreement_sum == problem.fused(**settings_)[0].agreement_sum


@pytest.mark.parametrize(("divergence", "options"), KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tail_bucket_is_one_class_more(divergence, options, temperature):
    """Trap 12: the divergence on `k + 1` classes, in value and gradient, with padded entries."""
    problem = Problem(v=301, std=3.0)
    log_p = (problem.teacher_logits() / temperature).log_softmax(-1)
    ids = log_p.topk(7).indices
    ids[::3, 5:] = -1
    present = ids >= 0
    kept = log_p.gather(1, ids.clamp_min(0)).masked_fill(~present, -math.inf)
    tail = torch.log1p(-kept.exp().sum(-1))
    settings_ = {"divergence": divergence, "divergence_options": options, "temperature": temperature}
    found = problem.fused(SparseTeacher(ids, kept, tail), **settings_)

    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.head.weight, problem.head.bias)]
    z = logits(leaves[0], Head(*leaves[1:]))
    loss = dense_loss(
        z, problem.teacher_logits(), problem.labels, problem.weights, **DEFAULTS | settings_ | {"alpha": 0}
    )
    loss = loss * 0.5
    q = (z / temperature).softmax(-1)
    w, f = problem.weights, divergences.resolve_divergence(divergence, options)
    for i in range(len(ids)):
        own = ids[i][present[i]]
        rest = torch.ones(q.shape[1], dtype=torch.bool).index_fill(0, own, False)
        log_q = torch.cat([q[i, own], q[i, rest].sum()[None]]).log()[None]
        d = f(log_q, torch.cat([kept[i, present[i]], tail[i, None]])[None])[0]
        loss = loss + 0.5 * temperature**2 * w[i] * d / w.sum()
    assert_equal(found, (loss.detach(), gradients(loss, leaves)), 1e-8)


def test_small_tails_keep_their_digits():
    """A student that is all but certain of the entries still has a tail, not what rounding leaves of one."""
    head = Head(torch.eye(6) * 1.0)
    hidden = torch.tensor([[20.0, 0, 0, 0, 0, 0]], requires_grad=True)
    teacher = SparseTeacher(torch.tensor([[0]]), torch.tensor([[0.9]]).log(), torch.tensor([0.1]).log())
    out = fused_distillation(hidden, head, teacher=teacher, alpha=1.0, temperature=1.0)
    tail = math.log(5) - 20
    assert out.loss.item() == pytest.approx(0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - tail), rel=1e-5)
    out.loss.backward()
    assert hidden.grad[0, 1:].sum() == pytest.approx(-0.1, rel=1e-4)


def test_unbiased_draws_average_to_the_full_gradient():
    """Trap 12: the expectation over all draws is forward KL, in value and gradient."""
    problem = Problem(n=3, v=6, teacher_v=6, unlabelled=0.0)
    problem.weights.fill_(1)
    log_p = (problem.teacher_logits() / 2).log_softmax(-1)
    total, total_grad = 0.0, 0.0
    for i in range(6):  # one draw, of class i in every row; each row's probability is its weight
        ids = torch.full((3, 1), i)
        out, grads = problem.fused(SparseTeacher(ids, log_p[:, i : i + 1], weights=log_p[:, i : i + 1].exp()))
        total, total_grad = total + out.kd_sum, total_grad + grads[0]
    wanted = problem.fused()
    task = problem.fused(alpha=0.0)[1][0] * 0.5
    assert total == pytest.approx(float(wanted[0].kd_sum))
    torch.testing.assert_close(total_grad - 5 * task, wanted[1][0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_teacher_whose_classes_are_some_rows_of_its_head(dtype, masked):
    """Trap 30: a trimmed student's teacher is read by an index map; bias, soft-cap and scale follow it."""
    problem = Problem(teacher_v=401, softcap=20.0, scale=0.7, masked=masked)
    rows = torch.randperm(problem.teacher_head.classes, generator=torch.Generator().manual_seed(3))
    kept, whole = rows[: problem.head.classes], problem.teacher_head
    if masked:
        kept = torch.arange(problem.head.classes)  # the masked classes of both stay where they are
        rows = torch.cat([kept, torch.arange(problem.head.classes, whole.classes)])
    part = Head(whole.weight[kept], whole.bias[kept], whole.softcap, whole.scale)
    teacher = problem.teacher(dtype=dtype)
    teacher = HiddenTeacher(teacher.hidden, replace(teacher.head, rows=kept))
    found = problem.fused(teacher, dtype=dtype)
    problem.teacher_head = part
    assert teacher.head.classes == len(kept)
    assert_equal(found, problem.oracle(), 1e-9 if dtype == torch.float64 else 1e-4)
    behind = HiddenTeacher(teacher.hidden, replace(teacher.head, rows=rows))
    seen = fused_evaluation(problem.hidden.to(dtype), cast(problem.head, dtype), teacher=behind)
    dropped = 1 - logits(problem.teacher_hidden, whole).softmax(-1)[:, kept].sum(-1)
    torch.testing.assert_close(seen.teacher_mass_dropped.double(), dropped, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="rows is for a teacher"):
        fused_distillation(problem.hidden, replace(problem.head, rows=kept), alpha=0.0, labels=problem.labels)


@pytest.mark.parametrize("kind", ["hidden", "dense"])
def test_evaluation_per_position(kind):
    """Trap 24: T = 1, task loss and KL apart, per position and never per class."""
    problem = Problem(std=3.0, masked=True)
    out = fused_evaluation(problem.hidden, problem.head, teacher=problem.teacher(kind), labels=problem.labels)
    z, t = logits(problem.hidden, problem.head), problem.teacher_logits()
    rows = problem.labels != -100
    log_q, log_p = divergences.log_probs(z[rows], t[rows], temperature=1.0, teacher_temperature=1.0)
    nll = torch.nn.functional.cross_entropy(z, problem.labels, reduction="none")
    assert torch.equal(out.mask, rows)
    torch.testing.assert_close(out.nll[rows], nll[rows])
    torch.testing.assert_close(out.kl[rows], divergences.forward_kl(log_q, log_p))
    torch.testing.assert_close(out.teacher_entropy[rows], divergences.entropy(log_p))
    assert torch.equal(out.agreement[rows], log_q.argmax(-1) == log_p.argmax(-1))
    assert not out.nll[~rows].any()


def test_evaluation_without_teacher_or_labels():
    """Either half alone."""
    problem = Problem()
    out = fused_evaluation(problem.hidden, problem.head, labels=problem.labels)
    assert out.nll.any() and not out.kl.any()
    out = fused_evaluation(problem.hidden, problem.head, teacher=problem.teacher())
    assert out.mask.all() and out.kl.all() and not out.nll.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "logit_mse"}, "no fused form"),
        ({"divergence": "jsd", "divergence_options": {"lam": 0.1}}, r"\['beta'\]"),
        ({"divergence": "jsd", "divergence_options": {"beta": 2}}, "beta=2"),
        ({"alpha": 1.5, "temperature": 0}, r"alpha=1\.5.*temperature=0"),
        ({"labels": None}, "needs labels"),
        ({"teacher": None}, "needs a teacher"),
        ({"shared_classes": 99}, "shared_classes=99"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "labels has shape"),
        ({"chunk_bytes": 10}, "chunk_bytes=10"),
    ],
)  # fmt: skip
def test_errors_name_the_option_and_the_fix(options, message):
    """One message that says what is wrong."""
    given_options = {
        "teacher": DenseTeacher(torch.zeros(4, 9)), "labels": torch.zeros(4, dtype=torch.long), **options
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fused_distillation(torch.zeros(4, 5), Head(torch.zeros(9, 5)), **given_options)


def test_a_sparse_teacher_must_not_be_renormalised():
    """Trap 12: neither a tail nor draws would mean renormalising, which turns the gradient."""
    with pytest.raises(ValueError, match="neither"):
        SparseTeacher(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1))


def test_memory_is_bounded_by_the_budget(monkeypatch):
    """What the pass allocates stays within the budget at any number of tokens and classes."""
    monkeypatch.undo()
    for classes in (32_768, 151_936, 262_144):
        for budget in (32 << 20, 64 << 20, 256 << 20):
            plan = tiles.make_plan(
                10**6, classes=classes, shared=classes, kept_columns=2 * classes, chunk_bytes=budget,
                row_bytes=4096, scratch=5, upcast_columns=768, dtype=torch.float32,
                device=torch.device("cpu"),
            )  # fmt: skip
            held = 8 * plan.tokens * classes + 4 * plan.widest * (5 * plan.tokens + 768)
            assert held <= budget
            assert plan.tokens % 16 == 0 or plan.tokens < 16  # else the products are slow
            assert plan.tiles[-1].stop == classes


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("kind", ["hidden", "dense", "draws", None])
@pytest.mark.parametrize("masked", [False, True])
def test_frozen_head_without_keeping_tiles(monkeypatch, temperature, kind, masked):
    """A frozen head with a small budget: running sums give the same gradient of the hidden states."""
    problem = Problem(std=3.0, masked=masked, seed=2)
    options = {"temperature": temperature, "z_loss": 1e-3, "alpha": 0.5 if kind else 0.0}
    teacher = problem.teacher(kind) if kind != "draws" else None
    if kind == "draws":
        log_p = (problem.teacher_logits() / temperature).log_softmax(-1)
        ids = torch.multinomial(log_p.exp(), 9, generator=torch.Generator().manual_seed(0), replacement=True)
        teacher = SparseTeacher(ids, log_p.gather(1, ids), weights=torch.full(ids.shape, 1 / 9))
    kept, wanted = problem.fused(teacher, **options)
    monkeypatch.setattr(chunks, "_FEW_TOKENS", 10**9)
    hidden = problem.hidden.clone().requires_grad_()
    out = fused_distillation(
        hidden, problem.head, teacher=teacher, labels=problem.labels, kd_weights=problem.weights,
        **DEFAULTS | options,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(kept.loss.item())
    torch.testing.assert_close(hidden.grad, wanted[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("divergence", FUSED_DIVERGENCES)
def test_on_a_gpu(divergence):
    """The same code on CUDA, in fp32, gives the float64 oracle's value and gradient."""
    problem = Problem(n=70, v=3001, teacher_v=3001)
    wanted = problem.oracle(divergence=divergence)
    leaves = [x.float().cuda().requires_grad_() for x in (problem.hidden, *vars_of(problem.head))]
    given = [x.float().cuda() for x in (problem.teacher_hidden, *vars_of(problem.teacher_head))]
    teacher = HiddenTeacher(given[0], Head(given[1], given[2]))
    out = fused_distillation(
        leaves[0], Head(leaves[1], leaves[2]), teacher=teacher, labels=problem.labels.cuda(),
        kd_weights=problem.weights.cuda(), **DEFAULTS | {"divergence": divergence},
    )  # fmt: skip
    out.loss.backward()
    assert abs(float(out.loss) - float(wanted[0])) <= 1e-5 * max(1.0, abs(float(wanted[0])))
    for leaf, want in zip(leaves, wanted[1], strict=True):
        assert (leaf.grad.cpu().double() - want).norm() <= 1e-5 * float(want.norm())


def vars_of(head: Head) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    assert head.bias is not None
    return head.weight, head.bias
