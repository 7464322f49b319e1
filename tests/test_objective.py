"""The mix, from logits to one number: weights, counts, temperature, and what must not change the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_kd.alignment import ClassMap
from hf_kd.objective import Counts, Mix, Objective, Selection, counts_of, resolve_objective, select
from hf_kd.tasks import TASKS, Task

from .heads import naive_divergence

TOKENS = TASKS["token-classification"]
HALF = Mix(alpha=0.5, temperature=2.0, teacher_temperature=2.0)
SEEDS = st.integers(0, 10**6)
ROWS = st.integers(1, 4)


@dataclass
class Rows:
    """Logits of both models for some rows of tokens, `[B, L, C]`, and labels `[B, L]`."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None

    def __getitem__(self, rows: Any) -> Rows:
        labels = None if self.labels is None else self.labels[rows]
        return Rows(self.student[rows], self.teacher[rows], labels)

    def batch(self) -> dict[str, Tensor]:
        """What the collator would give."""
        mask = torch.ones(self.student.shape[:2])
        return {"attention_mask": mask} | ({} if self.labels is None else {"labels": self.labels})


def make_rows(seed: int, rows: int = 3, length: int = 5, classes: int = 4) -> Rows:
    """Random rows in float64, about a third of the tokens without a label, at least one with."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        2 * torch.randn(rows, length, classes, generator=g, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(0, classes, (rows, length), generator=g)
    labels[torch.rand(rows, length, generator=g) < 0.3] = -100
    labels[0, 0] = 0
    return Rows(student, teacher, labels)


def make(task: Task = TOKENS, divergence: str = "forward_kl", **changes: Any) -> Objective:
    """The objective of a task."""
    options = {"divergence_options": None, "classes": ClassMap(), "label_smoothing": 0.0}
    return resolve_objective(task, divergence=divergence, **{**options, **changes})


def step(batches: list[Rows], mix: Mix = HALF, objective: Objective | None = None, ranks: int = 1) -> Any:
    """Loss of an optimizer step over some micro-batches, and the gradient of each one's logits."""
    objective = objective or make()
    task = objective.task
    supervisions = [task.supervise_batch(rows.batch()) for rows in batches]
    counts = Counts(*counts_of(supervisions))
    loss, grads = torch.zeros((), dtype=torch.float64), []
    for rows, supervision, selection in zip(batches, supervisions, select(supervisions), strict=True):
        logits = rows.student.clone().requires_grad_()
        z, t = (task.flat({"logits": x}, rows.batch()) for x in (logits, rows.teacher))
        teacher = t if mix.alpha > 0 else None
        terms = objective(z, teacher, supervision, selection=selection, counts=counts, mix=mix, ranks=ranks)
        grads.append(torch.autograd.grad(terms.loss, logits)[0])
        loss = loss + terms.loss.detach()
    return loss, grads


def oracle(rows: Rows, mix: Mix = HALF, divergence: str = "forward_kl") -> Tensor:
    """The mix, token by token."""
    task, kd = [], []
    for z, t, y in zip(rows.student.flatten(0, 1), rows.teacher.flatten(0, 1), rows.labels.flatten()):  # noqa: B905
        if y != -100:
            task.append(-z.log_softmax(-1)[y])
            p, q = (t / mix.teacher_temperature).softmax(-1), (z / mix.temperature).softmax(-1)
            value = naive_divergence(divergence, q, p, z=z, t=t, label=int(y), temperature=mix.temperature)
            kd.append(mix.temperature**2 * value)
    return (1 - mix.alpha) * torch.stack(task).mean() + mix.alpha * torch.stack(kd).mean()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_value_and_gradient(alpha: float, divergence: str) -> None:
    """Traps 2, 5: equal to the oracle, the teacher's own temperature included."""
    mix = Mix(alpha=alpha, temperature=2.0, teacher_temperature=3.0)
    rows = make_rows(0)
    loss, (grad,) = step([rows], mix, make(divergence=divergence))
    student = rows.student.clone().requires_grad_()
    expected = oracle(replace(rows, student=student), mix, divergence)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, student)[0])


def test_gradient_is_that_of_the_logged_value() -> None:
    """Trap 1, counter-example: `T^2` in the log alone leaves a gradient that falls with the temperature."""
    rows = make_rows(1)
    rows = replace(rows, student=rows.student / 8, teacher=rows.teacher / 8)
    norms, naive = [], []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        mix = Mix(alpha=1.0, temperature=temperature, teacher_temperature=temperature)
        loss, (grad,) = step([rows], mix)
        moved, _ = step([replace(rows, student=rows.student - 1e-6 * grad)], mix)
        torch.testing.assert_close((loss - moved) / 1e-6, grad.square().sum(), rtol=1e-4, atol=1e-9)
        norms.append(float(grad.norm()))
        naive.append(float(grad.norm()) / temperature**2)
    assert max(norms) / min(norms) < 1.3
    assert naive[0] / naive[-1] > 40


def test_terms_at_the_ends_of_alpha() -> None:
    """Trap 2: `T^2` and the weights hold at both ends and next to them; each end needs one term only."""
    rows = make_rows(2)
    for end, near in ((0.0, 1e-9), (1.0, 1 - 1e-9)):
        values = [step([rows], replace(HALF, alpha=alpha)) for alpha in (end, near)]
        torch.testing.assert_close(values[0][0], values[1][0], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(values[0][1], values[1][1], rtol=1e-6, atol=1e-7)
    unlabelled, _ = step([replace(rows, labels=None)], replace(HALF, alpha=1.0))
    everything, _ = step([replace(rows, labels=rows.labels.clamp_min(0))], replace(HALF, alpha=1.0))
    torch.testing.assert_close(unlabelled, everything)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
def test_repetition_and_length() -> None:
    """Trap 3, counter-example: `batchmean` on `[B, L, C]` doubles with the length; "mean" shrinks with C."""
    rows = make_rows(3)
    twice = Rows(*(torch.cat([x, x], dim=1) for x in (rows.student, rows.teacher, rows.labels)))
    torch.testing.assert_close(step([rows])[0], step([twice])[0])

    def naive(rows: Rows, reduction: str) -> Tensor:
        log_q, p = rows.student.log_softmax(-1), rows.teacher.softmax(-1)
        return F.kl_div(log_q, p, reduction=reduction)

    torch.testing.assert_close(naive(twice, "batchmean"), 2 * naive(rows, "batchmean"))
    assert naive(rows, "batchmean") > 4 * naive(rows, "mean")


def test_swapped_arguments() -> None:
    """Trap 5, counter-example: the divergence gets the student first, and swapping gives another number."""
    seen: list[Tensor] = []

    def spy(log_q: Tensor, log_p: Tensor) -> Tensor:
        seen.extend((log_q, log_p))
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    rows = make_rows(4)
    mix = replace(HALF, alpha=1.0)
    loss, _ = step([rows], mix, make(divergence=spy))
    labelled = rows.labels != -100
    torch.testing.assert_close(seen[0].detach(), (rows.student[labelled] / 2).log_softmax(-1))
    torch.testing.assert_close(seen[1], (rows.teacher[labelled] / 2).log_softmax(-1))
    torch.testing.assert_close(loss, oracle(rows, mix))
    swapped = oracle(replace(rows, student=rows.teacher, teacher=rows.student), mix)
    assert (swapped - loss).abs() > 0.05 * loss


@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_suppressed_classes(where: str) -> None:
    """Trap 9, counter-example: a class at -inf on either side is left out; `0 * -inf` would be NaN."""
    rows = make_rows(5)
    rows.labels[rows.labels == 2] = 0
    for side in ("student", "teacher"):
        if where in (side, "both"):
            getattr(rows, side)[..., 2] = float("-inf")
    loss, (grad,) = step([rows], replace(HALF, alpha=1.0))
    keep = [0, 1, 3]
    without = replace(rows, student=rows.student[..., keep], teacher=rows.teacher[..., keep])
    without.labels[without.labels == 3] = 2
    torch.testing.assert_close(loss, step([without], replace(HALF, alpha=1.0))[0])
    assert grad.isfinite().all()
    assert grad[..., 2].abs().max() == 0
    if where == "teacher":
        log_q, log_p = rows.student.log_softmax(-1), rows.teacher.log_softmax(-1)
        assert (log_p.exp() * (log_p - log_q)).sum().isnan()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
def test_temperatures_far_apart(divergence: str) -> None:
    """Trap 7: gradients are finite from T = 0.05 to 20 for half-precision logits of any size."""
    rows = make_rows(6)
    student, teacher = 300 * rows.student, 300 * rows.teacher
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for temperature in (0.05, 1.0, 20.0):
            cast = replace(rows, student=student.to(dtype), teacher=teacher.to(dtype))
            mix = Mix(alpha=1.0, temperature=temperature, teacher_temperature=temperature)
            loss, (grad,) = step([cast], mix, make(divergence=divergence))
            assert loss.isfinite()
            assert grad.isfinite().all()


def test_teacher_logits_are_left_alone() -> None:
    """Trap 11: they may come from a cache: no gradient reaches them and no value changes, permuted or cut."""
    for classes in (ClassMap(), ClassMap(order=(1, 0, 3, 2)), ClassMap(shared=3)):
        rows = make_rows(7)
        rows.labels[rows.labels == 3] = 0
        rows.teacher.requires_grad_()
        before = rows.teacher.detach().clone()
        step([rows], HALF, make(classes=classes))
        assert torch.equal(rows.teacher.detach(), before)
        assert rows.teacher.grad is None


def test_ranks_average_gradients() -> None:
    """Trap 17, counter-example: averaged over two ranks, a loss without the factor has half the gradient."""
    rows = make_rows(8, rows=4)
    _, (expected,) = step([rows])
    shards = [rows[:1], rows[1:]]  # unequal supervision; the counts are the sum of both
    _, ours = step(shards, ranks=2)
    torch.testing.assert_close(torch.cat(ours) / 2, expected)
    _, naive = step(shards, ranks=1)
    torch.testing.assert_close(torch.cat(naive) / 2, expected / 2)


def test_rank_without_supervision() -> None:
    """Trap 17, counter-example: an exact zero with a gradient; a plain mean over nothing is NaN."""
    rows = make_rows(9, rows=2)
    rows.labels[1] = -100
    _, (full, empty) = step([rows[:1], rows[1:]], ranks=2)
    assert empty.abs().max() == 0
    torch.testing.assert_close(full / 2, step([rows[:1]])[1][0])
    assert F.cross_entropy(rows.student[1], rows.labels[1]).isnan()


def test_mean_of_means() -> None:
    """Trap 18, counter-example: one long row and one short; the mean of their means is another number."""
    rows = make_rows(10, rows=2, length=9)
    rows.student[1] = -2 * rows.teacher[1]
    rows.labels[:] = 1
    rows.labels[1, 1:] = -100  # nine tokens in one micro-batch, one in the other
    parts = [rows[:1], rows[1:]]
    torch.testing.assert_close(step(parts)[0], oracle(rows))
    naive = torch.stack([oracle(part) for part in parts]).mean()
    assert naive > 1.5 * oracle(rows)


def test_two_counts() -> None:
    """Trap 16: rows without a label count in the distillation term alone."""
    task = TASKS["image-classification"]
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    supervision = task.supervise_batch({"labels": torch.tensor([1, -100, -100, 2])})
    assert counts_of([supervision]).tolist() == [2, 4]
    counts, (selection,) = Counts(*counts_of([supervision])), select([supervision])
    terms = make(task)(z, t, supervision, selection=selection, counts=counts, mix=HALF)
    torch.testing.assert_close(terms.task, F.cross_entropy(z[[0, 3]], torch.tensor([1, 2])))
    log_q, log_p = ((x / 2).log_softmax(-1) for x in (z, t))
    torch.testing.assert_close(terms.kd, 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_selection_is_none_when_all_count() -> None:
    """No copy of the logits is made where every position counts."""
    every = TOKENS.supervise_batch({"labels": torch.ones(2, 3).long()})
    some = TOKENS.supervise_batch({"labels": torch.tensor([[1, -100, 2]])})
    selected = select([every, some])
    assert selected[0] == Selection(None, None)
    assert selected[1].task.tolist() == selected[1].kd.tolist() == [0, 2]


def test_evaluation_ignores_the_training_temperature() -> None:
    """Traps 6, 24: `eval_kl` is the KL at T = 1, not the cross-entropy, whose floor is the entropy."""
    rows = make_rows(11)
    objective = make()
    z, t = (x.flatten(0, 1) for x in (rows.student, rows.teacher))
    supervision = TOKENS.supervise_batch(rows.batch())
    made = objective.summarise(objective.evaluate(z, t, supervision).sum(0), "eval")
    plain = Mix(alpha=1.0, temperature=1.0, teacher_temperature=1.0)
    assert made["eval_kl"] == pytest.approx(float(oracle(rows, plain)))
    assert made["eval_loss"] == pytest.approx(float(oracle(rows, replace(plain, alpha=0.0))))
    itself = objective.summarise(objective.evaluate(t, t, supervision).sum(0), "eval")
    assert itself["eval_kl"] == 0
    assert itself["eval_agreement"] == 1
    assert itself["eval_teacher_entropy"] > 0.1  # what a soft cross-entropy would have shown instead of 0


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, rows=ROWS, repeats=st.integers(2, 4))
def test_repeated_rows(seed: int, rows: int, repeats: int) -> None:
    """Trap 3: rows that come several times change no loss; each copy gets its share of the gradient."""
    one = make_rows(seed, rows)
    many = Rows(*(torch.cat([x] * repeats) for x in (one.student, one.teacher, one.labels)))
    (loss, (grad,)), (loss_many, (grad_many,)) = step([one]), step([many])
    torch.testing.assert_close(loss_many, loss)
    torch.testing.assert_close(grad_many[:rows] * repeats, grad)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, order=st.permutations(range(4)), cuts=st.sets(st.integers(1, 3)))
def test_order_and_micro_batches(seed: int, order: list[int], cuts: set[int]) -> None:
    """Traps 15, 18: rows in any order, cut into micro-batches anywhere, give one step."""
    rows = make_rows(seed, rows=4)
    loss, (grad,) = step([rows])
    ends = [0, *sorted(cuts), 4]
    parts = [rows[order[a:b]] for a, b in zip(ends, ends[1:], strict=False)]
    loss_parts, grads = step(parts)
    torch.testing.assert_close(loss_parts, loss)
    torch.testing.assert_close(torch.cat(grads), grad[order])


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding(seed: int, left: int, right: int) -> None:
    """Tokens without a label, on either side and with any logits, change nothing and get no gradient."""
    rows = make_rows(seed)
    noise = make_rows(seed + 1, length=6)
    wide = Rows(
        *(
            torch.cat([n[:, :left], x, n[:, 6 - right :]], dim=1)
            for n, x in ((noise.student, rows.student), (noise.teacher, rows.teacher))
        ),
        F.pad(rows.labels, (left, right), value=-100),
    )
    (loss, (grad,)), (loss_wide, (grad_wide,)) = step([rows]), step([wide])
    torch.testing.assert_close(loss_wide, loss)
    torch.testing.assert_close(grad_wide, F.pad(grad, (0, 0, left, right)))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, order=st.permutations(range(4)), shift=st.floats(-50, 50))
def test_names_and_level_of_the_classes(seed: int, order: list[int], shift: float) -> None:
    """Renumbering the classes of all three, or adding a constant to the logits, changes nothing."""
    rows = make_rows(seed)
    inverse = torch.tensor(order).argsort()
    labels = torch.where(rows.labels == -100, -100, inverse[rows.labels.clamp_min(0)])
    renamed = Rows(rows.student[..., order] + shift, rows.teacher[..., order] - shift, labels)
    torch.testing.assert_close(step([renamed])[0], step([rows])[0])


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, alpha=st.floats(0, 1), temperature=st.floats(0.25, 8))
def test_mix_is_linear_and_never_negative(seed: int, alpha: float, temperature: float) -> None:
    """Trap 2: the loss is the straight line between its two ends, and 0 at the far end for equal models."""
    rows = make_rows(seed)

    def value(alpha: float, rows: Rows = rows) -> Tensor:
        return step([rows], Mix(alpha=alpha, temperature=temperature, teacher_temperature=temperature))[0]

    torch.testing.assert_close(value(alpha), (1 - alpha) * value(0.0) + alpha * value(1.0))
    assert value(1.0) >= 0
    assert value(1.0, replace(rows, student=rows.teacher)) == 0
