"""Tail or draws: what is measured without the full teacher is what the full teacher would show."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kd import DistillationTrainer, SparseSignal
from hf_kd.estimator import ESTIMATOR_FILE, HORIZON, Estimator, angles, measure
from hf_kd.objective import Counts, Mix, select
from hf_kd.sample import _spread, sample_batches

from .fidelities import FidelityTeacher
from .test_checks import problems
from .test_trainer import arguments

VOCAB, ENTRIES = 300, 16


def language_models(distance: float | None) -> tuple[Any, Any]:
    """A teacher with an opinion, and a student from scratch, or one that far from it."""

    def make(width: int) -> Any:
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    torch.manual_seed(0)
    teacher = make(16)
    zipf = -0.8 * torch.arange(1.0, VOCAB + 1).log()
    basis = torch.randn(VOCAB, 16)
    basis[:, 0] = 4 * zipf
    for p in teacher.parameters():
        p.data.normal_(0, 0.3)
    teacher.model.norm.weight.data.fill_(1.0)
    teacher.lm_head.weight.data = 0.5 * basis
    if distance is None:
        return make(12), teacher
    student = make(16)
    student.load_state_dict(teacher.state_dict())
    for p in student.parameters():
        p.data += distance * p.data.std() * torch.randn_like(p)
    return student, teacher


def rows() -> list[dict[str, Any]]:
    """Random text."""
    ids = torch.randint(0, VOCAB, (48, 24), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def trainer(
    folder: Path, distance: float | None = None, entries: int | None = ENTRIES, **options: Any
) -> DistillationTrainer:
    """A trainer with a sparse teacher."""
    student, teacher = language_models(distance)
    return DistillationTrainer(
        student, arguments(folder, per_device_train_batch_size=8, alpha=1.0, **options),
        teacher=FidelityTeacher(teacher, "sparse", entries=entries), train_dataset=rows(),
    )  # fmt: skip


def gradient(made: DistillationTrainer, answer: Any, batches: list[Any], estimator: Any) -> Tensor:
    """The whole gradient, summed over positions, on the dense path."""
    total = torch.zeros(sum(p.numel() for p in made.student.parameters()))
    one = torch.ones(())
    mix = Mix(alpha=1.0, temperature=2.0, teacher_temperature=2.0)
    for batch in batches:
        supervision = made.task.supervise_batch(batch)
        inputs = made.pair.inputs(batch)
        z = made.student(**made.pair.student_inputs(inputs)).logits.flatten(0, 1)
        terms = replace(made.objective, estimator=estimator)(
            z, answer(inputs), supervision, selection=select([supervision])[0], counts=Counts(one, one),
            mix=mix,
        )  # fmt: skip
        made.student.zero_grad()
        terms.loss.backward()
        total += torch.cat([p.grad.flatten() for p in made.student.parameters()])
    return total


def degrees(a: Tensor, b: Tensor) -> float:
    """The angle between two gradients."""
    cosine = (a.double() @ b.double()) / (a.double().norm() * b.double().norm())
    return math.degrees(math.acos(min(1.0, float(cosine))))


@pytest.mark.parametrize("distance,name", [(None, "draws"), (0.1, "draws"), (0.02, "tail")])
def test_angles_are_those_of_the_full_teacher(tmp_path: Path, distance: float | None, name: str) -> None:
    """Trap 12: both angles, estimated from the sparse signal alone, agree with the full gradient's."""
    made = trainer(tmp_path, distance)
    measured = measure(made)
    assert measured is not None
    batches = sample_batches(made, made.train_dataset, 32)
    teacher = made.teacher
    assert isinstance(teacher, FidelityTeacher)
    full = gradient(made, lambda x: teacher.inner(x).logits["logits"].flatten(0, 1), batches, None)
    tail = gradient(made, lambda x: teacher(x).sparse.flat(), batches, SparseSignal.tail)
    noise = []
    for seed in range(1, 9):
        teacher.seed = seed
        drawn = gradient(made, lambda x: teacher(x).sparse.flat(), batches, SparseSignal.draws)
        noise.append(float((drawn - full).norm() ** 2 / full.norm() ** 2))
    expected = math.degrees(math.atan(math.sqrt(sum(noise) / len(noise) * measured.positions / HORIZON)))
    # Where noise is most of what the draws say, the full gradient's norm is known less well.
    assert measured.angle_tail == pytest.approx(degrees(tail, full), abs=4.0 if name == "draws" else 8.0)
    assert measured.angle_draws == pytest.approx(expected, rel=0.25)
    assert measured.name == name == ("draws" if expected < degrees(tail, full) else "tail")


def test_dense_path_measures_the_same(tmp_path: Path) -> None:
    """The measurement does not depend on the path, and leaves generators and the student's mode alone."""
    found = []
    for fused in ("on", "off"):
        made = trainer(tmp_path, fused=fused)
        made.student.train()
        state = torch.random.get_rng_state()
        found.append(measure(made))
        assert made.student.training
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(p.grad is None for p in made.student.parameters())
    # The random signs are others, since the dense path reads the positions that count and no others.
    assert found[0].angle_tail == pytest.approx(found[1].angle_tail, rel=0.03)
    assert found[0].angle_draws == pytest.approx(found[1].angle_draws, rel=0.03)


def test_auto_is_measured_logged_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The choice is made before the first step, said, and the same after a resume, whatever would be now."""
    options = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    made = trainer(tmp_path, max_steps=2, **options)
    made.train()
    assert made.estimator is not None and made.estimator.name == "draws"
    assert made.objective.estimator is SparseSignal.draws
    lines = [
        r.getMessage() for r in caplog.records if "sparse_estimator='auto' takes 'draws'" in r.getMessage()
    ]
    assert len(lines) == 1
    logged = [x for x in made.state.log_history if "sparse_angle_tail" in x]
    assert logged[0]["sparse_angle_draws"] == pytest.approx(made.estimator.angle_draws)
    path = tmp_path / "checkpoint-2" / ESTIMATOR_FILE
    record = json.loads(path.read_text())
    assert Estimator(**record) == made.estimator
    path.write_text(json.dumps({**record, "name": "tail"}))
    for wanted, name in (("auto", "tail"), ("draws", "draws")):
        again = trainer(tmp_path, max_steps=3, sparse_estimator=wanted, **options)
        again.train(resume_from_checkpoint=str(path.parent))
        assert again.estimator is not None and again.estimator.name == name


@pytest.mark.parametrize(
    "entries,options,name",
    [
        (None, {}, "tail"),
        (ENTRIES, {"divergence": "reverse_kl"}, "tail"),
        (ENTRIES, {"sparse_estimator": "tail"}, "tail"),
        (ENTRIES, {"sparse_estimator": "draws"}, "draws"),
    ],
)
def test_nothing_to_measure(tmp_path: Path, entries: int | None, options: dict[str, Any], name: str) -> None:
    """Without draws, with another divergence, or with an option, there is one way only."""
    made = trainer(tmp_path, entries=entries, max_steps=1, **options)
    made.train()
    assert made.estimator == Estimator(name)


def test_a_dense_teacher_has_no_estimator(tmp_path: Path) -> None:
    """Nothing is measured, and nothing is recorded, for a teacher that gives everything."""
    made = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    made.teacher.fidelity = "hidden"
    made.train()
    assert made.estimator is None
    assert not (tmp_path / "checkpoint-1" / ESTIMATOR_FILE).exists()


def test_sharded_students_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in pieces can't be compared: the option has to say what to do."""
    made = trainer(tmp_path)
    monkeypatch.setattr(made, "is_fsdp_enabled", True)
    assert "sparse_estimator='auto' measures gradients of whole parameters" in problems(made)


def test_angles_at_their_ends() -> None:
    """A tail without any certain entry says nothing; draws that are all noise are at a right angle."""
    nothing = angles(torch.tensor([0.0, 2.0, 0.0, 1.0]), HORIZON)
    assert nothing.name == "draws"
    assert nothing.angle_tail == pytest.approx(90.0)
    assert nothing.angle_draws == pytest.approx(45.0)
    noise = angles(torch.tensor([1.0, 2.0, 1.0, 3.0]), HORIZON)
    assert noise.name == "tail"
    assert noise.angle_draws is not None and noise.angle_draws > 89


@pytest.mark.parametrize("count,size,most", [(10, 4, 3), (48, 8, 32), (100, 7, 5), (3, 8, 4), (0, 4, 2)])
def test_samples_are_spread(count: int, size: int, most: int) -> None:
    """Batches are disjoint, cover the data from its start, and are no more than asked for."""
    ranges = _spread(count, size, most)
    indices = [i for one in ranges for i in one]
    assert len(indices) == len(set(indices))
    assert len(ranges) == min(most, -(-count // size))
    assert all(0 <= i < count for i in indices)
    assert not count or ranges[0][0] == 0
