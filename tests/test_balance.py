"""Norms of the two gradients: against autograd by hand, without any effect on training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_kd import DistillationArguments, DistillationTrainer, balance
from hf_kd.balance import Balance
from hf_kd.losses.divergences import forward_kl, log_probs


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 3), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x))


def train(folder, times, accumulation=1):
    torch.manual_seed(0)
    teacher, student = Linear(), Linear()
    rows = [{"x": torch.randn(6), "labels": torch.tensor(i % 3)} for i in range(32)]
    args = DistillationArguments(
        output_dir=str(folder), alpha=0.7, temperature=2.0, max_steps=4, use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        logging_steps=1, save_strategy="no", report_to="none", term_gradients=times, max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = DistillationTrainer(student, args, teacher=teacher, train_dataset=rows)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    trainer.train()
    return trainer, teacher, start, rows


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_norms_are_those_of_the_whole_step_and_training_is_as_without_them(tmp_path, accumulation):
    trainer, teacher, start, rows = train(tmp_path / "with", 2, accumulation)
    plain, _, _, _ = train(tmp_path / "without", 0, accumulation)
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    )
    logged = [row for row in trainer.state.log_history if "grad_norm_ratio" in row]
    assert [row["step"] for row in logged] == [1, 3]
    assert not any("grad_norm_ratio" in row for row in plain.state.log_history)

    model = Linear().eval()
    model.load_state_dict(start)
    x, labels = torch.stack([row["x"] for row in rows[:8]]), torch.stack([row["labels"] for row in rows[:8]])
    with torch.no_grad():
        taught = teacher.eval()(x)
    task = 0.3 * nn.functional.cross_entropy(model(x), labels)
    pair = log_probs(model(x), taught, temperature=2.0, teacher_temperature=2.0)
    kd = 0.7 * 4 * forward_kl(*pair).mean()
    norms = [
        float(sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))).sqrt())
        for loss in (task, kd)
    ]
    assert logged[0]["grad_norm_task"] == pytest.approx(norms[0], rel=1e-5)
    assert logged[0]["grad_norm_kd"] == pytest.approx(norms[1], rel=1e-5)
    assert logged[0]["grad_norm_ratio"] == pytest.approx(norms[1] / norms[0], rel=1e-5)


def test_the_steps_are_spread_over_the_run():
    five = Balance(5)
    assert [step for step in range(100) if five.due(step, 100, 1)] == [0, 20, 40, 60, 80]
    assert [step for step in range(3) if five.due(step, 3, 3)] == [0, 1, 2]
    assert len([step for step in range(103) if five.due(step, 103, 103)]) == 5
    assert not any(Balance(0).due(step, 1000, 1000) for step in range(1000))


@pytest.mark.parametrize(
    ("total", "logs", "times"), [(199, 199, 0), (400, 400, 2), (10000, 10000, 20), (10000, 3, 3), (400, 0, 0)]
)
def test_unasked_it_costs_no_more_than_a_percent_and_is_logged_each_time(total, logs, times):
    """A measurement is two steps' work at most."""
    steps = [step for step in range(total) if Balance(None).due(step, total, logs)]
    assert len(steps) == times and 2 * times <= 0.01 * total
    each = total // logs if logs else total
    assert len({step // each for step in steps}) == times, "two measurements before one log"


def test_it_is_measured_by_default_where_nothing_is_in_the_way(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(balance, "_STEPS_EACH", 2)
    trainer, *_ = train(tmp_path / "default", None)
    logged = [row["grad_norm_ratio"] for row in trainer.state.log_history if "grad_norm_ratio" in row]
    assert len(logged) == 2 and all(ratio > 0 for ratio in logged)
    monkeypatch.setattr(Linear, "forward", no_gradient_in_evaluation)
    with caplog.at_level("WARNING", logger="hf_kd.balance"):
        trainer, *_ = train(tmp_path / "fails", None)
    assert trainer.state.global_step == 4 and "term_gradients=None: nothing is measured" in caplog.text
    with pytest.raises(RuntimeError, match="does not require grad"):
        train(tmp_path / "asked", 2)


def no_gradient_in_evaluation(self, x):
    found = self.dropout(self.linear(x))
    return found if self.training else found.detach()


def test_losses_on_layers_are_no_part_of_the_ratio(tmp_path):
    with pytest.raises(ValueError, match="term_gradients=3 tells task and distillation apart"):
        DistillationArguments(output_dir=str(tmp_path), term_gradients=3, hidden_weight=1.0)
    with pytest.raises(ValueError, match="term_gradients=-1 is below 0"):
        DistillationArguments(output_dir=str(tmp_path), term_gradients=-1)
