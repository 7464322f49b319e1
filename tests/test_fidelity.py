"""One optimizer step is the same whatever the fidelity of the teacher's signal; what can't be is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_kd import DIVERGENCES, DistillationTrainer, SparseSignal, TeacherSignal, checks
from hf_kd.alignment import ClassMap
from hf_kd.answers import fidelity_obstacle
from hf_kd.fidelity import MERGEABLE
from hf_kd.losses.fused import FUSED_DIVERGENCES
from hf_kd.losses.projected import head_logits
from hf_kd.losses.tiles import Head, HiddenTeacher
from hf_kd.tasks import TASKS

from .fidelities import FidelityTeacher, as_hidden, threshold_sample
from .heads import HEADS, Collator, models, naive_divergence, oracle, rows_of
from .test_checks import lms, problems, tokenizer
from .test_gradient import assert_same, step
from .test_objective import HALF, make, make_rows
from .test_trainer import arguments

ONE_SOFTMAX = [
    "single-label", "token", "masked-lm", "causal-lm", "seq2seq-lm", "speech-seq2seq", "image",
    "multiple-choice", "next-sentence", "ctc", "audio", "image-text-to-text", "detection",
]  # fmt: skip
OTHERS = ["multi-label", "regression", "segmentation", "question-answering", "embedding"]


def sharp(model: nn.Module) -> nn.Module:
    """The same teacher with an opinion: some classes are certain, others are drawn."""
    for name, parameter in model.named_parameters():
        if name.startswith(("lm_head", "classifier")):
            parameter.data.mul_(8)
    return model


def trainer(folder: Path, name: str, teacher: Any = None, **options: Any) -> DistillationTrainer:
    """A trainer of tiny models; `teacher` makes one from the teacher's model."""
    head = HEADS[name]
    student, model = models(head)
    return DistillationTrainer(
        student, arguments(folder, remove_unused_columns=False, per_device_eval_batch_size=3, **options),
        teacher=model if teacher is None else teacher(model), train_dataset=rows_of(head, 8),
        eval_dataset=rows_of(head, 7), data_collator=Collator(head), task=head.task,
    )  # fmt: skip


@pytest.mark.parametrize("fidelity", ["hidden", "sparse"])
@pytest.mark.parametrize("divergence", sorted({*DIVERGENCES, "dkd", "standardised_kl"}))
def test_same_step(tmp_path: Path, divergence: str, fidelity: str) -> None:
    """Trap 12: hidden states, and all classes as entries, give the oracle's gradient, per divergence."""
    head = HEADS["causal-lm"]
    student, model = models(head)
    rows = rows_of(head, 4)
    options = {"divergence": divergence, "gradient_accumulation_steps": 2, "sparse_estimator": "tail"}
    teacher = FidelityTeacher(model, fidelity)
    if fidelity == "sparse" and divergence not in MERGEABLE:
        with pytest.raises(ValueError, match=f"divergence='{divergence}' compares whole rows"):
            step(tmp_path, head, student, teacher, rows, **options)
        return
    expected = oracle(head, student, model, rows, divergence=divergence)[1]
    both = divergence in ("forward_kl", "jsd")
    for fused in ("on", "off") if both else ("on" if divergence in FUSED_DIVERGENCES else "off",):
        _, grads = step(tmp_path, head, student, teacher, rows, fused=fused, **options)
        assert_same(grads, expected)


@pytest.mark.parametrize("name", ONE_SOFTMAX)
def test_every_head_with_one_softmax(tmp_path: Path, name: str) -> None:
    """Trap 12: with all classes as entries, each such head has the oracle's gradient; logits likewise."""
    head = HEADS[name]
    student, model = models(head)
    rows = rows_of(head, 4)
    teacher = FidelityTeacher(model, "sparse")
    _, grads = step(tmp_path, head, student, teacher, rows, gradient_accumulation_steps=2)
    assert_same(grads, oracle(head, student, model, rows)[1], head.tolerance)


@pytest.mark.parametrize("name", ["single-label", "multi-label", "regression", "ctc"])
def test_hidden_states_of_any_layer(tmp_path: Path, name: str) -> None:
    """What reads the output of one layer can be had from what that layer reads."""
    head = HEADS[name]
    student, model = models(head)
    rows = rows_of(head, 4)
    _, grads = step(tmp_path, head, student, FidelityTeacher(model, "hidden"), rows)
    assert_same(grads, oracle(head, student, model, rows)[1], head.tolerance)


def test_heads_that_are_no_softmax() -> None:
    """The other heads refuse by name: entries of a softmax mean nothing to them."""
    for name in (*OTHERS, "image-text", "embedding-similarity"):
        task = TASKS[HEADS[name].task if name in HEADS else name]
        if name == "multi-label":
            task = replace(task, problem_type="multi")
        if name == "regression":
            task = replace(task, kind="regression")
        assert f"task {task.name!r}" in str(fidelity_obstacle("sparse", task)), name
        assert fidelity_obstacle("logits", task) is None
    assert "signal is 'hidden'" in str(fidelity_obstacle("hidden", TASKS["embedding"]))
    assert "start_logits" in str(fidelity_obstacle("hidden", TASKS["question-answering"]))


def test_refused_before_training(tmp_path: Path) -> None:
    """The refusal comes with the other checks of the first batch."""
    teacher = lambda model: FidelityTeacher(model, "sparse")  # noqa: E731
    text = problems(trainer(tmp_path, "multi-label", teacher))
    assert "signal is 'sparse'" in text
    assert "'sequence-classification'" in text


@pytest.mark.parametrize("estimator", ["tail", "draws"])
@pytest.mark.parametrize("name", ["causal-lm", "token"])
def test_few_entries(tmp_path: Path, name: str, estimator: str) -> None:
    """Trap 12: fused, dense, and any micro-batches agree with a few entries too."""
    head = HEADS[name]
    rows = rows_of(head, 8)
    found = []
    for options in (
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "fused": "off"},
    ):
        student, model = models(head)
        entries = 12 if name == "causal-lm" else 3
        teacher = FidelityTeacher(sharp(model), "sparse", entries=entries)
        found.append(
            step(tmp_path, head, student, teacher, rows, sparse_estimator=estimator, alpha=1.0, **options)
        )
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert_same(grads, found[0][1])
    full = oracle(head, student, model, rows, alpha=1.0)[1]
    with pytest.raises(AssertionError, match="relative gradient error"):
        assert_same(found[0][1], full)


def test_hidden_states_in_any_micro_batches(tmp_path: Path) -> None:
    """Half-precision hidden states, as a cache has them, are the same teacher in every path."""

    class Half(FidelityTeacher):
        def __call__(self, batch: Any) -> TeacherSignal:
            hidden = super().__call__(batch).hidden
            head = replace(hidden.head, weight=hidden.head.weight.half(), bias=hidden.head.bias.half())
            return TeacherSignal(hidden=HiddenTeacher(hidden.hidden.half(), head))

    head = HEADS["causal-lm"]
    rows = rows_of(head, 8)
    found = []
    for options in ({}, {"gradient_accumulation_steps": 4}, {"fused": "off"}):
        student, model = models(head)
        found.append(step(tmp_path, head, student, Half(model, "hidden"), rows, **options)[1])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0], 1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_of_a_head(softcap: float | None) -> None:
    """Scale, bias and soft-cap, for more classes than are projected at a time."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 5, generator=g), torch.randn(9000, 5, generator=g)
    bias = torch.randn(9000, generator=g)
    made = head_logits(HiddenTeacher(hidden.half(), Head(weight.half(), bias, softcap, 0.5)))
    expected = 0.5 * (hidden.half().double() @ weight.half().double().T + bias)
    if softcap is not None:
        expected = softcap * (expected / softcap).tanh()
    torch.testing.assert_close(made, expected.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="5 columns, its head 4"):
        head_logits(HiddenTeacher(hidden, Head(torch.zeros(3, 4))))


def test_bad_temperature_at_run_time() -> None:
    """A signal at another temperature never reaches the loss, even if the first batch was fine."""
    signal = threshold_sample(make_rows(0).teacher.flatten(0, 1).log_softmax(-1), 2, torch.Generator(), 3.0)
    with pytest.raises(ValueError, match="teacher_temperature=2, but .* at temperature 3"):
        make().reader.entries(signal, 2.0)


def naive_tail(z: Tensor, log_p: Tensor, kept: int, divergence: str, temperature: float) -> Tensor:
    """One position: the teacher's `kept` likeliest classes, and one class for the others."""
    q, p = (z / temperature).softmax(-1), log_p.exp()
    order = p.argsort(descending=True)
    top, rest = order[:kept], order[kept:]
    merged = [torch.cat([x[top], x[rest].sum()[None]]) for x in (q, p)]
    return naive_divergence(divergence, *merged, z=z, t=log_p, label=0, temperature=temperature)


@pytest.mark.parametrize("divergence", MERGEABLE)
def test_tail_bucket_equals_its_oracle(divergence: str) -> None:
    """Trap 12: value and gradient of the dense path on `k + 1` classes."""
    rows = make_rows(7, classes=9)
    objective = make(divergence=divergence)
    supervision = objective.task.supervise_batch(rows.batch())
    z = rows.student.flatten(0, 1).clone().requires_grad_()
    log_p = (rows.teacher.flatten(0, 1) / 2).log_softmax(-1)
    signal = threshold_sample(log_p, 4, torch.Generator().manual_seed(0), 2.0)
    assert signal.certain is not None
    total = objective.kd_sum(z, signal, supervision, None, HALF)
    counted = (rows.labels.flatten() != -100).nonzero().squeeze(-1).tolist()
    expected = 4 * sum(
        naive_tail(z[i], log_p[i], int(signal.certain[i]), divergence, 2.0) for i in counted
    )  # fmt: skip
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (total, expected)))


def test_draws_average_to_the_full_gradient() -> None:
    """Trap 12, counter-example: the mean over draws is the full gradient; the tail bucket's is another."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 20, generator=g, dtype=torch.float64)
    log_p = (2 * torch.randn(1, 20, generator=g, dtype=torch.float64)).log_softmax(-1)
    objective, weight = replace(make(), estimator=SparseSignal.draws), torch.ones(20_000)
    supervision = replace(make().task.supervise_batch(make_rows(0).batch()), kd_weight=weight)
    mix = replace(HALF, temperature=1.0, teacher_temperature=1.0)
    leaf = z.clone().requires_grad_()
    signal = threshold_sample(log_p.expand(20_000, -1), 5, g)
    total = objective.kd_sum(leaf.expand(20_000, -1), signal, supervision, None, mix) / 20_000
    full = z.softmax(-1) - log_p.exp()
    (grad,) = torch.autograd.grad(total, leaf)
    assert (grad - full).norm() < 0.02 * full.norm()
    kl = (log_p.exp() * (log_p - z.log_softmax(-1))).sum()
    assert float(total.detach()) == pytest.approx(float(kl), rel=0.02)
    leaf = z.clone().requires_grad_()
    tail = replace(objective, estimator=SparseSignal.tail)
    (grad,) = torch.autograd.grad(
        tail.kd_sum(leaf, signal.select(torch.tensor([0])), supervision, None, mix), leaf
    )  # noqa: E501
    assert (grad - full).norm() > 0.1 * full.norm()


def test_evaluation(tmp_path: Path) -> None:
    """Trap 12: what is known is named for what it is; fused and dense agree; the masses are logged."""
    scores = {}
    for fused in ("on", "off"):
        for entries in (12, None):
            made = trainer(
                tmp_path, "causal-lm", temperature=1.0, fused=fused,
                teacher=lambda m, n=entries: FidelityTeacher(sharp(m), "sparse", entries=n, temperature=1.0),
            )  # fmt: skip
            scores[fused, entries] = made.evaluate()
    names = {"eval_kl_tail", "eval_agreement", "eval_teacher_mass_kept", "eval_student_mass_kept"}
    for entries in (12, None):
        on, off = scores["on", entries], scores["off", entries]
        assert on.keys() >= names and "eval_kl" not in on and "eval_teacher_entropy" not in on
        assert ("eval_kl_draws" in on) == (entries is not None)
        for name in {"eval_loss", *names} | (on.keys() & {"eval_kl_draws"}):
            assert on[name] == pytest.approx(off[name], rel=1e-5), name
    dense = trainer(tmp_path, "causal-lm", sharp, temperature=1.0).evaluate()
    whole, few = scores["on", None], scores["on", 12]
    assert whole["eval_kl_tail"] == pytest.approx(dense["eval_kl"], rel=1e-5)
    assert whole["eval_agreement"] == few["eval_agreement"] == pytest.approx(dense["eval_agreement"])
    assert whole["eval_teacher_mass_kept"] == pytest.approx(1.0)
    assert 0.05 * dense["eval_kl"] < few["eval_kl_tail"] < 0.99 * dense["eval_kl"]
    assert few["eval_kl_draws"] == pytest.approx(dense["eval_kl"], rel=0.1)
    assert few["eval_student_mass_kept"] < few["eval_teacher_mass_kept"] < 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_masses_kept(temperature: float) -> None:
    """Trap 12: the masses are those of the certain entries, at the signal's temperature."""
    rows = make_rows(3, classes=9)
    z = rows.student.flatten(0, 1)
    log_p = (rows.teacher.flatten(0, 1) / temperature).log_softmax(-1)
    signal = threshold_sample(log_p, 4, torch.Generator().manual_seed(0), temperature)
    seen = make().reader.columns(z, signal)
    q = (z / temperature).softmax(-1)
    for i in range(len(z)):
        ids = signal.ids[i, : int(signal.certain[i])]
        assert float(seen["teacher_mass_kept"][i]) == pytest.approx(float(log_p[i, ids].exp().sum()))
        assert float(seen["student_mass_kept"][i]) == pytest.approx(float(q[i, ids].sum()))


@pytest.mark.parametrize("estimator", ["tail", "draws"])
@pytest.mark.parametrize("classes", [ClassMap(order=(2, 0, 3, 1)), ClassMap(shared=3)])
def test_class_maps(classes: ClassMap, estimator: str) -> None:
    """Traps 30, 32: permuted labels and trimmed vocabularies, with entries as with logits."""
    rows = make_rows(4)
    objective = make(classes=classes)
    supervision = objective.task.supervise_batch(rows.batch())
    z, t = (x.flatten(0, 1) for x in (rows.student, rows.teacher))
    log_p = (t / 2).log_softmax(-1)
    signal = threshold_sample(log_p, 4, None, 2.0)
    if estimator == "draws":
        everything = torch.full((len(z),), 4), torch.full((len(z),), -9.0, dtype=torch.float64)
        signal = replace(signal, certain=everything[0], log_tau=everything[1])
        objective = replace(objective, estimator=SparseSignal.draws)
    torch.testing.assert_close(
        objective.kd_sum(z, signal, supervision, None, HALF), objective.kd_sum(z, t, supervision, None, HALF)
    )
    seen = objective.evaluate(z, signal, supervision).sum(0)
    dense = objective.evaluate(z * 2, t, supervision).sum(0)
    summary = objective.summarise(seen, "eval")
    if classes.shared is not None:
        dropped = (log_p.exp()[:, 3] * supervision.kd_weight).sum() / supervision.kd_weight.sum()
        assert summary["eval_teacher_mass_dropped"] == pytest.approx(float(dropped))
    assert summary["eval_agreement"] == pytest.approx(objective.summarise(dense, "eval")["eval_agreement"])


REFUSED: list[tuple[dict[str, Any], int | None, str]] = [
    ({"divergence": "logit_mse"}, 12, "divergence='logit_mse' compares whole rows of classes"),
    ({"temperature": 3.0}, 12, "temperature=3, but the teacher's sparse signal is at temperature 2"),
    ({"teacher_temperature": 3.0}, 12, "teacher_temperature=3, but the teacher's sparse signal"),
    ({"temperature_end": 1.0, "temperature_schedule": "linear"}, 12, "temperature_end=1, but"),
    ({"sparse_estimator": "draws"}, None, "no draws from the tail; set sparse_estimator='tail'"),
    ({"sparse_estimator": "draws", "divergence": "jsd"}, 12, "no unbiased estimate of divergence='jsd'"),
    ({"metric_for_best_model": "eval_kl"}, 12, "metric_for_best_model='eval_kl' is not known of a sparse"),
    ({"kl_threshold": 0.1, "eval_strategy": "epoch"}, 12, "kl_threshold=0.1 is compared with eval_kl"),
]


@pytest.mark.parametrize("options,entries,message", REFUSED)
def test_refused(tmp_path: Path, options: dict[str, Any], entries: int | None, message: str) -> None:
    """Trap 12: what a sparse signal can't serve is refused by the option's name before step 0."""
    made = trainer(tmp_path, "causal-lm", lambda m: FidelityTeacher(m, "sparse", entries=entries), **options)
    assert message in problems(made)


def test_what_the_checks_say(tmp_path: Path) -> None:
    """`hf-kd check` shows what a sparse teacher gives, and how much of its mass is known class by class."""
    made = trainer(tmp_path, "causal-lm", lambda m: FidelityTeacher(sharp(m), "sparse", entries=12))
    facts = dict(checks.inspect(made).facts)
    assert "entries at T = 2, with draws" in facts["teacher's signal"]
    assert 0.1 < float(facts["teacher's signal"].split()[-1]) < 1


def test_an_own_divergence_is_refused(tmp_path: Path) -> None:
    """Nobody knows whether a function of the user's may be taken on merged classes."""

    def mine(log_q: Tensor, log_p: Tensor) -> Tensor:
        return (log_q - log_p).square().sum(-1)

    made = trainer(
        tmp_path, "causal-lm", lambda m: FidelityTeacher(m, "sparse"), divergence=mine, fused="off"
    )
    assert "divergence='mine' compares whole rows" in problems(made)


def test_ids_beyond_the_student(tmp_path: Path) -> None:
    """An id that the student has no class for is found with the first batch."""

    class Shifted(FidelityTeacher):
        def __call__(self, batch: Any) -> TeacherSignal:
            sparse = super().__call__(batch).sparse
            return TeacherSignal(sparse=replace(sparse, ids=sparse.ids + 5))

    made = trainer(tmp_path, "causal-lm", lambda m: Shifted(m, "sparse", entries=5))
    assert "the student has 37 classes" in problems(made)


@pytest.mark.parametrize("estimator", ["auto", "draws"])
def test_a_tail_that_was_not_drawn_from(tmp_path: Path, estimator: str) -> None:
    """Trap 12: the likeliest entries alone are no sample, even if there is a place for a threshold."""

    class Top(FidelityTeacher):
        def __call__(self, batch: Any) -> TeacherSignal:
            sparse = super().__call__(batch).sparse
            return TeacherSignal(sparse=replace(sparse, log_tau=torch.full_like(sparse.log_tail, -torch.inf)))

    def top(model: nn.Module) -> Any:
        return Top(model, "sparse", entries=12)

    text = problems(trainer(tmp_path, "causal-lm", top, sparse_estimator=estimator))
    assert "nothing was drawn (log_tau is -inf there); set sparse_estimator='tail'" in text
    trainer(tmp_path, "causal-lm", top, sparse_estimator="tail", max_steps=1).train()


def test_hidden_teacher_of_other_positions(tmp_path: Path) -> None:
    """A signal for another number of positions is named as such."""

    class Short(FidelityTeacher):
        def __call__(self, batch: Any) -> TeacherSignal:
            return TeacherSignal(hidden=as_hidden(self.inner(batch).dense()["logits"][:, :-1]))

    made = trainer(tmp_path, "causal-lm", lambda m: Short(m, "hidden"))
    assert "answers for" in problems(made)


@pytest.mark.parametrize("fidelity", ["hidden", "sparse"])
def test_label_names_of_a_teacher_that_is_no_model(tmp_path: Path, fidelity: str) -> None:
    """Trap 32: its own order of the labels is permuted by name, whatever its fidelity."""
    losses = []
    for order in (["a", "b", "c", "d"], ["c", "a", "d", "b"]):
        student, model = models(HEADS["single-label"])
        student.config.id2label = dict(enumerate("abcd"))
        layer = model.classifier
        index = torch.tensor(["abcd".index(name) for name in order])
        layer.weight.data, layer.bias.data = layer.weight.data[index], layer.bias.data[index]
        model.config.id2label = dict(enumerate(order))
        head = HEADS["single-label"]
        losses.append(step(tmp_path, head, student, FidelityTeacher(model, fidelity), rows_of(head, 4)))
    assert losses[0][0] == pytest.approx(losses[1][0])
    assert_same(losses[0][1], losses[1][1])


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("fidelity", ["hidden", "sparse"])
def test_padded_vocabulary_of_a_teacher_that_is_no_model(tmp_path: Path, fidelity: str, fused: str) -> None:
    """Trap 30: its vocabulary is cut to the student's and renormalised, as a model's is."""
    same = tokenizer(["<u>", *"abcdefghi"])
    losses = []
    for as_model in (True, False):
        pair = lms(12, 16)
        pair["teacher"] = pair["teacher"] if as_model else FidelityTeacher(pair["teacher"], fidelity)
        made = DistillationTrainer(
            args=arguments(tmp_path, fused=fused, max_steps=2), **pair, processing_class=same,
            teacher_processing_class=same,
        )  # fmt: skip
        made.train()
        assert made.objective.classes.shared == 12
        losses.append([x["loss"] for x in made.state.log_history if "loss" in x])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_page_names_what_is_allowed() -> None:
    """docs/signals.md lists the divergences that a tail can be read with."""
    page = (Path(__file__).parents[1] / "docs" / "signals.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `reverse_kl`"))
    assert all(f"`{name}`" in row for name in MERGEABLE if name != "forward_kl")
