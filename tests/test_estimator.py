"""Tail or draws: what is measured without the full teacher is what the full teacher would show."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kd import DistillationTrainer, SparseSignal
from hf_kd.estimator import ESTIMATOR_FILE, HORIZON, Estimator, angles, measure, random_signs
from hf_kd.losses import forward_kl
from hf_kd.losses.entries import sparse_divergence
from hf_kd.losses.fused import fused_distillation
from hf_kd.losses.tiles import LOG_MOST_RATIO, Head
from hf_kd.objective import Counts, Mix, select
from hf_kd.sample import _spread, sample_batches
from hf_kd.whole import LIST_FILE

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


@pytest.mark.parametrize("distance", [None, 0.1, 0.02])
def test_angles_are_those_of_the_full_teacher(tmp_path: Path, distance: float | None) -> None:
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
    draws = partial(SparseSignal.draws, control=measured.control)
    for seed in range(1, 9):
        teacher.seed = seed
        drawn = gradient(made, lambda x: teacher(x).sparse.flat(), batches, draws)
        noise.append(float((drawn - full).norm() ** 2 / full.norm() ** 2))
    expected = math.degrees(math.atan(math.sqrt(sum(noise) / len(noise) * measured.positions / HORIZON)))
    assert measured.angle_tail == pytest.approx(degrees(tail, full), abs=4.0)
    assert measured.angle_draws == pytest.approx(expected, rel=0.25)
    assert measured.name == ("draws" if expected < degrees(tail, full) else "tail")
    # From scratch there is little that a control could undo; near the teacher it undoes most of the noise.
    assert measured.control < 0.3 if distance is None else measured.control > 0.6


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
    assert made.objective.estimator.keywords == {"control": made.estimator.control}
    lines = [
        r.getMessage() for r in caplog.records if "sparse_estimator='auto' takes 'draws'" in r.getMessage()
    ]
    assert len(lines) == 1
    logged = [x for x in made.state.log_history if "sparse_angle_tail" in x]
    assert logged[0]["sparse_angle_draws"] == pytest.approx(made.estimator.angle_draws)
    assert 0 < made.estimator.control == pytest.approx(logged[0]["sparse_control"])
    path = tmp_path / "checkpoint-2" / ESTIMATOR_FILE
    (path.parent / LIST_FILE).unlink()  # which would tell that the file was changed
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
    nothing = angles(torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]), HORIZON)
    assert nothing.name == "draws" and nothing.control == 0.0
    assert nothing.angle_tail == pytest.approx(90.0)
    assert nothing.angle_draws == pytest.approx(45.0)
    noise = angles(torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 4.0, 6.0]), HORIZON)
    assert noise.name == "tail" and noise.control == 0.0
    assert noise.angle_draws is not None and noise.angle_draws > 89
    # R at 0 and 1: (1, 1) and (-1, 1), so that a half of each is (0, 1), with half the noise.
    quiet = angles(torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 2.0]), 4 * HORIZON)
    assert quiet.control == pytest.approx(0.5)
    assert quiet.angle_draws == pytest.approx(math.degrees(math.atan(2.0)))
    assert quiet.angle_tail == pytest.approx(0.0)
    assert angles(torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 0.5, 0.1]), HORIZON).control == 1.0
    # A twentieth of the noise is not worth it.
    assert angles(torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 2.0, 1.8, 3.6]), HORIZON).control == 0.0


# ---- controlled draws ----

CLASSES, CERTAIN, TAU = 10, 2, 0.09
PROBABILITIES = torch.tensor(
    [0.31, 0.24, 0.085, 0.08, 0.075, 0.07, 0.06, 0.04, 0.03, 0.01], dtype=torch.float64
)


def every_draw() -> tuple[SparseSignal, Tensor]:
    """All choices of classes that can be drawn, and how likely each is: classes are drawn independently."""
    tail = CLASSES - CERTAIN
    chosen = torch.tensor(list(itertools.product((False, True), repeat=tail)))
    share = PROBABILITIES[CERTAIN:] / TAU
    chance = torch.where(chosen, share, 1 - share).prod(-1)
    ids = torch.arange(CLASSES).expand(len(chosen), CLASSES).clone()
    ids[:, CERTAIN:].masked_fill_(~chosen, -1)
    count, size = len(chosen), torch.ones(len(chosen), dtype=torch.float64)
    signal = SparseSignal(
        ids, PROBABILITIES.log().expand(count, CLASSES), PROBABILITIES[CERTAIN:].sum().log() * size,
        certain=torch.full((count,), CERTAIN), log_tau=math.log(TAU) * size,
    )  # fmt: skip
    return signal, chance


def student_logits(distance: float) -> Tensor:
    """`[C]` of a student that far from the probabilities above, in nats."""
    noise = torch.randn(CLASSES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return PROBABILITIES.log() + distance * noise


def dense_gradients(z: Tensor, signal: SparseSignal, control: float) -> tuple[Tensor, Tensor]:
    """`[N]` values and `[N, C]` gradients, one row for each choice."""
    logits = z.expand(len(signal.ids), CLASSES).clone().requires_grad_()
    values = sparse_divergence(logits, signal.draws(control), forward_kl, temperature=1.0)
    (gradients,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), gradients


@pytest.mark.parametrize("control", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("distance", [0.3, 1.0])
def test_controlled_draws_are_right_on_average(control: float, distance: float) -> None:
    """Trap 12: over all choices that can be drawn, value and gradient are those of KL."""
    signal, chance = every_draw()
    z = student_logits(distance)
    log_q, log_p = z.log_softmax(-1), PROBABILITIES.log()
    kl, full = (PROBABILITIES * (log_p - log_q)).sum(), log_q.exp() - PROBABILITIES
    values, gradients = dense_gradients(z, signal, control)
    torch.testing.assert_close((chance * values).sum(), kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chance @ gradients, full, rtol=1e-11, atol=1e-12)


def test_control_takes_noise_out_near_the_teacher() -> None:
    """The variance over all choices falls near the teacher, and is least at the control that is derived."""
    signal, chance = every_draw()

    def noise(distance: float, control: float) -> float:
        z = student_logits(distance)
        gradients = dense_gradients(z, signal, control)[1]
        full = z.softmax(-1) - PROBABILITIES
        return float(chance @ (gradients - full).square().sum(-1))

    assert noise(0.1, 1.0) < 0.05 * noise(0.1, 0.0)
    # R of the weights' standard deviations with random signs, whose square has the variance for its mean.
    z, pairs = student_logits(0.7), []
    for control in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        logits = z.expand(len(signal.ids), CLASSES).clone().requires_grad_()
        teacher = random_signs(signal, generator=generator, control=control)
        values = sparse_divergence(logits, teacher, forward_kl, temperature=1.0)
        pairs.append(torch.autograd.grad(values.sum(), logits)[0])
    (zero, one), nothing = pairs, [0.0] * 6
    mean = [float(chance @ (a * b).sum(-1)) for a, b in ((zero, zero), (zero, one), (one, one))]
    best = angles(torch.tensor([*nothing, *mean]), HORIZON).control
    assert 0.3 < best < 1.0
    assert noise(0.7, best) < 0.6 * noise(0.7, 0.0)
    assert min(noise(0.7, best - 0.2), noise(0.7, min(1.0, best + 0.2))) > 0.98 * noise(0.7, best)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_controlled_draws_are_the_dense_ones(temperature: float) -> None:
    """Value and gradient agree, and a draw that the student likes 32 times as much is left as it was."""
    signal, chance = every_draw()
    z = student_logits(1.0) * temperature
    z[-1] += 6.0 * temperature
    inputs = z.expand(len(chance), CLASSES).clone().requires_grad_()
    head = Head(torch.eye(CLASSES, dtype=torch.float64))
    out = fused_distillation(
        inputs, head, teacher=signal.draws(0.8), alpha=1.0, temperature=temperature,
        kd_weights=chance, kd_count=torch.ones((), dtype=torch.float64),
    )  # fmt: skip
    out.loss.backward()
    values, gradients = dense_gradients(z / temperature, signal, 0.8)
    torch.testing.assert_close(out.kd_sum, (chance * values).sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        inputs.grad, temperature * chance.unsqueeze(-1) * gradients, rtol=1e-9, atol=1e-12
    )
    last = signal.ids[:, -1] >= 0
    others = dense_gradients(z / temperature, signal.map(lambda x: x[last]), 0.0)[1][:, -1]
    log_q = (z / temperature).log_softmax(-1)
    assert log_q[-1] - PROBABILITIES[-1].log() > LOG_MOST_RATIO
    assert bool((gradients[last][:, -1] < others).all()) and bool(gradients.abs().amax() < 32 * TAU)


def test_control_needs_draws() -> None:
    """A tail has nothing to be controlled, and an infinite factor is none."""
    signal, _ = every_draw()
    with pytest.raises(ValueError, match=r"control=0\.5 takes chance out of draws"):
        replace(signal.tail(), control=0.5)
    with pytest.raises(ValueError, match="control=nan"):
        signal.draws(math.nan)


@pytest.mark.parametrize("count,size,most", [(10, 4, 3), (48, 8, 32), (100, 7, 5), (3, 8, 4), (0, 4, 2)])
def test_samples_are_spread(count: int, size: int, most: int) -> None:
    """Batches are disjoint, cover the data from its start, and are no more than asked for."""
    ranges = _spread(count, size, most)
    indices = [i for one in ranges for i in one]
    assert len(indices) == len(set(indices))
    assert len(ranges) == min(most, -(-count // size))
    assert all(0 <= i < count for i in indices)
    assert not count or ranges[0][0] == 0


@pytest.mark.parametrize("text", ["{", "[1]", '{"nome": "tail"}', "null"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    """What a checkpoint says of the estimator is read back or refused, with the file and the way out."""
    Estimator("draws").save(tmp_path)
    assert Estimator.load(tmp_path) == Estimator("draws")
    (tmp_path / ESTIMATOR_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{ESTIMATOR_FILE} is damaged.*another checkpoint"):
        Estimator.load(tmp_path)
