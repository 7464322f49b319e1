"""Several teachers as one, against their average in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from hf_kd import DistillationTrainer, Ensemble, ModelTeacher, TeacherSignal
from hf_kd.tasks import TASKS
from hf_kd.teachers.ensemble import learned_weights, normalised

from .heads import HEADS, Collator, bert, models, rows_of
from .test_gradient import assert_same, step
from .test_trainer import arguments, text_rows


class Said:
    """A teacher that answers what it was told."""

    columns = ("x",)

    def __init__(self, **logits: Tensor) -> None:
        self.logits = logits
        self.identity = {"name": "said", "fingerprint": str(sorted(logits))}

    def __call__(self, batch: Any) -> TeacherSignal:
        rows = batch["x"].long()
        return TeacherSignal(logits={k: v[rows] for k, v in self.logits.items()})


HEAD: Any = TASKS["sequence-classification"]
MULTI, NUMBERS = (replace(HEAD, problem_type=kind) for kind in ("multi", "regression"))
NUMBERS = replace(NUMBERS, kind="regression")
VECTORS = TASKS["embedding"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mean(logits: list[Tensor], weights: list[float], at: float = 1.0) -> Tensor:
    """The oracle: probabilities, averaged."""
    return sum(w * (t / at).softmax(-1) for w, t in zip(weights, logits, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("at", [1.0, 2.5])
def test_average_is_of_probabilities(at: float) -> None:
    """At its own temperature the softmax of the answer is the mean, not that of averaged logits."""
    logits = [random(6, 4, seed=i) for i in range(3)]
    weights = [0.5, 0.3, 0.2]
    teachers = [Said(logits=t) for t in logits]
    ensemble = Ensemble(teachers, HEAD, weights=[5, 3, 2], temperature=at)
    answer = ensemble({"x": torch.arange(6)}).dense()["logits"]
    expected = mean(logits, weights, at)
    torch.testing.assert_close((answer / at).softmax(-1), expected, rtol=1e-12, atol=0)
    naive = sum(w * t for w, t in zip(weights, logits, strict=True)).softmax(-1)
    assert (naive - expected).abs().max() > 0.05


def test_confidence_weights_each_position() -> None:
    """A sure teacher counts more; weights are made per row from its entropy."""
    logits = [random(6, 4, seed=i) for i in range(2)]
    ensemble = Ensemble([Said(logits=t) for t in logits], HEAD, weighting="confidence")
    answer = ensemble({"x": torch.arange(6)}).dense()["logits"].softmax(-1)
    p = torch.stack([t.softmax(-1) for t in logits])
    sure = 1 + (p * p.log()).sum(-1) / torch.tensor(4.0, dtype=torch.float64).log()
    expected = (p * (sure / sure.sum(0)).unsqueeze(-1)).sum(0)
    torch.testing.assert_close(answer, expected, rtol=1e-9, atol=0)


def test_labels_among_several_and_numbers() -> None:
    """Bernoulli probabilities are averaged label by label, numbers as they are."""
    logits = [random(5, 3, seed=i) for i in range(2)]
    batch = {"x": torch.arange(5)}
    teachers = [Said(logits=t) for t in logits]
    multi = Ensemble(teachers, MULTI, weights=[1, 3])(batch).dense()["logits"]
    expected = 0.25 * logits[0].sigmoid() + 0.75 * logits[1].sigmoid()
    torch.testing.assert_close(multi.sigmoid(), expected, rtol=1e-12, atol=0)
    number = Ensemble(teachers, NUMBERS, weights=[1, 3])(batch).dense()["logits"]
    torch.testing.assert_close(number, 0.25 * logits[0] + 0.75 * logits[1])


def test_learned_weights_minimise_the_loss_of_the_mean() -> None:
    """Expectation and maximisation reach the optimum of the convex problem, found by a grid."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (400,), generator=g)
    ll = []
    for strength, seed in ((2.0, 1), (1.0, 2)):
        logits = torch.randn(400, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        logits[torch.arange(400), labels] += strength
        ll.append(logits.log_softmax(-1)[torch.arange(400), labels])
    both = torch.stack(ll)
    found = learned_weights(both)
    grid = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    losses = -(grid[:, None] * both[0].exp() + (1 - grid[:, None]) * both[1].exp()).log().mean(-1)
    assert float(found[0]) == pytest.approx(float(grid[losses.argmin()]), abs=2e-3)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-12)


def test_routes_send_each_row_to_its_teacher() -> None:
    """Rows of two domains in one batch, in any order; a domain without a teacher is named."""
    logits = [random(6, 4, seed=i) for i in range(2)]
    teachers = [Said(logits=t) for t in logits]
    ids = torch.tensor([7, 9, 9, 7, 7, 9])
    ensemble = Ensemble(teachers, HEAD, routes={7: 1, 9: 0})
    answer = ensemble({"x": torch.arange(6), "teacher_id": ids}).dense()["logits"]
    expected = torch.where((ids == 7)[:, None], logits[1], logits[0])
    assert torch.equal(answer, expected)
    assert "teacher_id" in ensemble.columns
    with pytest.raises(ValueError, match="teacher_id=3"):
        ensemble({"x": torch.arange(6), "teacher_id": torch.full((6,), 3)})
    with pytest.raises(ValueError, match="'teacher_id' column"):
        ensemble({"x": torch.arange(6)})


@pytest.mark.parametrize(
    "problem,match",
    [
        (lambda: Ensemble([Said()], HEAD), "needs two"),
        (lambda: Ensemble([Said(), Said()], HEAD, weights=[1.0]), "one weight for each"),
        (lambda: Ensemble([Said(), Said()], HEAD, routes={0: 2}), "outside 0 to 1"),
        (lambda: Ensemble([Said(), Said()], HEAD, offload=True), "ensemble_offload=True"),
        (lambda: Ensemble([Said(), Said()], VECTORS), "no common axes"),
        (lambda: normalised([-1.0, 2.0], 2), "0 or more"),
    ],
)
def test_what_does_not_fit_is_named(problem: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        problem()


def named(width: int, labels: list[str], seed: int) -> nn.Module:
    """A classifier whose classes have names."""
    torch.manual_seed(seed)
    config = bert(width, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)})
    return BertForSequenceClassification(config).double()


def test_each_teacher_has_its_own_label_order(tmp_path: Path) -> None:
    """Trap 32: members are permuted one by one before they are averaged."""
    student = named(16, ["a", "b", "c", "d"], 0)
    teachers = [named(24, ["a", "b", "c", "d"], 1), named(24, ["d", "b", "a", "c"], 2)]
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teachers, train_dataset=text_rows())
    batch = {k: torch.tensor(text_rows()[k]) for k in ("input_ids", "attention_mask", "token_type_ids")}
    answer = trainer.teacher(batch).dense()["logits"].softmax(-1)
    with torch.no_grad():
        one, two = (t(**batch).logits.softmax(-1) for t in teachers)
    torch.testing.assert_close(answer, (one + two[:, [2, 1, 3, 0]]) / 2, rtol=1e-9, atol=1e-12)


def test_each_teacher_has_its_own_columns(tmp_path: Path) -> None:
    """Trap 20: `teacher_1_input_ids` is the second teacher's alone, `teacher_input_ids` any teacher's."""
    teachers = [ModelTeacher(named(16, list("abcd"), i), ("logits",)) for i in (1, 2)]
    ensemble = Ensemble(teachers, HEAD)
    plain, shared, own = (torch.full((2, 3), i) for i in (4, 5, 6))
    batch = {"input_ids": plain, "teacher_input_ids": shared, "teacher_1_input_ids": own}
    assert torch.equal(teachers[0].inputs(batch)["input_ids"], shared)
    assert torch.equal(teachers[1].inputs(batch)["input_ids"], own)
    assert {"teacher_0_input_ids", "teacher_1_input_ids", "teacher_input_ids"} <= set(ensemble.columns)


@pytest.mark.parametrize("name", ["token", "causal-lm", "question-answering"])
def test_accumulation_does_not_change_the_gradient(tmp_path: Path, name: str) -> None:
    """Trap 15: the gradient of a step with an ensemble equals that of one batch, and one of the mean."""
    head = HEADS[name]
    student, teacher = models(head)
    other = models(head, seed=5)[1]
    rows = rows_of(head, 8)
    state = copy.deepcopy(student.state_dict())
    found = []
    for accumulation in (1, 4):
        student.load_state_dict(state)
        options: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "fused": "off"}
        found.append(step(tmp_path, head, student, [teacher, other], rows, **options)[1])  # type: ignore[arg-type]
    assert_same(found[0], found[1])
    twice = step(tmp_path, head, student, [teacher, teacher], rows, fused="off")[1]  # type: ignore[arg-type]
    assert_same(twice, step(tmp_path, head, student, teacher, rows, fused="off")[1], 1e-6)


def test_routed_run_does_not_depend_on_accumulation(tmp_path: Path) -> None:
    """Trap 15: domains mixed in a batch, or a micro-batch of one domain: the same gradient."""
    head = HEADS["single-label"]
    student, teacher = models(head)
    rows = [{**row, "teacher_id": i % 2} for i, row in enumerate(rows_of(head, 8))]

    class Numbered(Collator):
        def __call__(self, features: Any) -> Any:
            ids = torch.tensor([f["teacher_id"] for f in features])
            rest = [{k: v for k, v in f.items() if k != "teacher_id"} for f in features]
            return {**super().__call__(rest), "teacher_id": ids}

    found = []
    for accumulation in (1, 8):
        options: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "teacher_routes": {}}
        two: Any = [teacher, models(head, seed=4)[1]]
        found.append(step(tmp_path, head, student, two, rows, collator=Numbered(head), **options)[1])
    assert_same(found[0], found[1])


def test_offload_keeps_one_teacher_on_the_device() -> None:
    """Trap 27: each model goes to the device for its turn and back."""
    where: list[tuple[int, str]] = []

    class Moved(nn.Linear):
        def __init__(self, number: int) -> None:
            super().__init__(4, 3)
            self.number = number

        def to(self, device: Any, *args: Any, **kwargs: Any) -> Any:
            where.append((self.number, str(device)))
            return self

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    members = [ModelTeacher(Moved(i), ("logits",)) for i in range(2)]
    for member in members:
        member._parameters = ("input",)
        member.model.forward = lambda input, model=member.model: nn.Linear.forward(model, input)  # type: ignore[misc]
    ensemble = Ensemble(members, HEAD, offload=True, device=torch.device("meta"))
    assert where == [(0, "cpu"), (1, "cpu")]
    where.clear()
    ensemble({"input": torch.zeros(2, 4)})
    assert where == [(0, "meta"), (0, "cpu"), (1, "meta"), (1, "cpu")]


def test_learned_weights_are_in_force_and_in_the_checkpoint(tmp_path: Path) -> None:
    """The teacher that knows the labels gets the weight; a resumed run keeps it."""
    student = named(16, list("abcd"), 0)
    rows, labels = text_rows(16), torch.tensor(text_rows(16)["labels"])
    ids = torch.tensor(rows["input_ids"])[:, 0]

    class Knows(Said):
        columns = ("input_ids",)

        def __call__(self, batch: Any) -> TeacherSignal:
            # The first tokens of the rows stand for the rows.
            place = (batch["input_ids"][:, 0][:, None] == ids).long().argmax(-1)
            return TeacherSignal(logits={"logits": self.logits["logits"][place]})

    right = torch.nn.functional.one_hot(labels, 4).double() * 4
    good, bad = Knows(logits=right), Knows(logits=torch.zeros(16, 4, dtype=torch.float64))
    args = arguments(tmp_path, ensemble_weighting="learned", save_strategy="steps", save_steps=2)
    trainer = DistillationTrainer(student, args, teacher=[bad, good], train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert float(trainer.teacher.weights[1]) > 0.6
    again = DistillationTrainer(
        student, args, teacher=[bad, good], train_dataset=rows, eval_dataset=text_rows(8, 3)
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.teacher.weights, trainer.teacher.weights)


def test_options_of_several_need_several(tmp_path: Path) -> None:
    student, teacher = named(16, list("abcd"), 0), named(16, list("abcd"), 1)
    for options in ({"ensemble_offload": True}, {"ensemble_temperature": 2.0}, {"teacher_routes": {"0": 0}}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*there is one"):
            DistillationTrainer(student, arguments(tmp_path, **options), teacher=teacher)
