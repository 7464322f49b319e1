"""Steps that go wrong are found by a rule that can be worked out by hand, dropped, and counted."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_kd.report import headline
from hf_kd.results import Arm, Results
from hf_kd.spikes import COUNTS, SPIKES_FILE, SpikeWatch, drop_step

from .test_trainer import arguments, classifiers, text_rows


def fill(watch: SpikeWatch, values: list[float], **more: Any) -> list[str | None]:
    return [watch.judge(step=i + 1, norm=v, kl=more.get("kl")) for i, v in enumerate(values)]


NOISE = [1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 1.0, 0.7] * 8


def test_the_bound_is_the_documented_one() -> None:
    """Median and 1.4826 MAD of the logarithms, worked out here in another way."""
    logs = torch.tensor(NOISE, dtype=torch.float64).log()
    middle = float((logs.sort().values[31] + logs.sort().values[32]) / 2)
    deviations = (logs - middle).abs().sort().values
    spread = 1.4826 * float((deviations[31] + deviations[32]) / 2)
    assert spread > 0.1
    bound = math.exp(middle + 3 * spread)
    for factor, expected in ((0.999, None), (1.001, "skip")):
        watch = SpikeWatch("skip", threshold=3.0)
        assert fill(watch, NOISE) == [None] * 64
        assert watch.judge(step=65, norm=bound * factor, kl=None) == expected


def test_steps_of_one_size_have_a_least_spread() -> None:
    """A median deviation of 0 would make every rounding error a spike."""
    watch = SpikeWatch("skip", threshold=8.0)
    fill(watch, [1.0] * 30)
    assert watch.judge(step=31, norm=1.5, kl=None) is None
    assert watch.judge(step=32, norm=math.exp(0.81), kl=None) == "skip"


def test_no_verdict_before_sixteen_steps_and_none_downwards() -> None:
    watch = SpikeWatch("skip")
    assert fill(watch, [1.0] * 15 + [1e9]) == [None] * 15 + [None]
    watch = SpikeWatch("skip")
    assert fill(watch, [1.0] * 16 + [1e9, 1e-9]) == [None] * 16 + ["skip", None]
    assert watch.counts == {"spikes_grad_norm": 1, "spikes_kl": 0, "kl_growth": 0, "steps_skipped": 1}


def test_a_kl_of_nothing_is_no_spike() -> None:
    """Noise around 0 has no scale: 1e-9 after 1e-14 is not a factor of 100,000."""
    watch = SpikeWatch("skip")
    for i in range(40):
        assert watch.judge(step=i, norm=1.0, kl=1e-14) is None
    assert watch.judge(step=41, norm=1.0, kl=1e-9) is None
    assert watch.judge(step=42, norm=1.0, kl=1e-2) == "skip"
    assert watch.counts["spikes_kl"] == 1


def test_a_new_level_is_accepted_after_half_a_window() -> None:
    """Skipping may not go on for ever: the window takes spikes in, and the median follows."""
    watch = SpikeWatch("skip")
    found = fill(watch, [1.0] * 64 + [50.0] * 64)
    assert found[64] == "skip" and found[-1] is None
    assert 20 <= watch.counts["steps_skipped"] <= 33


def test_growth_is_said_once_and_ends_training_under_stop(caplog: pytest.LogCaptureFixture) -> None:
    """Ten times as much over 300 steps: no step is a spike, the median doubles."""
    kls = [0.1 * math.exp(i / 130) for i in range(300)]
    for action, expected in (("warn", None), ("skip", None), ("stop", "stop")):
        watch = SpikeWatch(action)
        with caplog.at_level(logging.WARNING):
            found = [watch.judge(step=i, norm=1.0, kl=kl) for i, kl in enumerate(kls)]
        assert watch.counts["spikes_kl"] == 0 and watch.counts["kl_growth"] == 1
        assert [v for v in found if v] == ([expected] if expected else [])
    assert "the distillation term grows: its median over 64 steps is" in caplog.text
    watch = SpikeWatch("stop")
    assert not any(watch.judge(step=i, norm=1.0, kl=kl) for i, kl in enumerate(reversed(kls)))


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(norm: float) -> None:
    for action in ("warn", "stop"):
        with pytest.raises(FloatingPointError, match=r"norm is (nan|inf) at step 7.*spike_action='skip'"):
            SpikeWatch(action).judge(step=7, norm=norm, kl=0.1)
    watch = SpikeWatch("skip")
    assert watch.judge(step=7, norm=norm, kl=0.1) == "skip" and not watch.norms
    assert SpikeWatch("warn").judge(step=7, norm=norm, kl=0.1, scaled=True) is None


def test_state_survives(tmp_path: Path) -> None:
    """A resumed watch decides as the first would have: to the last bit."""
    torch.manual_seed(0)
    values = torch.rand(200).double().exp().tolist()
    values[150] = 1e4
    whole, first, second = SpikeWatch("skip"), SpikeWatch("skip"), SpikeWatch("skip")
    expected = [whole.judge(step=i, norm=v, kl=v / 3) for i, v in enumerate(values)]
    found = [first.judge(step=i, norm=v, kl=v / 3) for i, v in enumerate(values[:100])]
    first.save(tmp_path)
    second.load(tmp_path)
    found += [second.judge(step=100 + i, norm=v, kl=v / 3) for i, v in enumerate(values[100:])]
    assert found == expected and "skip" in found
    assert (second.counts, second.norms, second.best) == (whole.counts, whole.norms, whole.best)
    SpikeWatch().load(tmp_path / "nothing")


class Multiply(TrainerCallback):
    """Multiply one step's gradient, as a bad batch would: seen before the callbacks that judge it."""

    def __init__(self, trainer: Any, step: int, factor: float) -> None:
        self.step = step
        original = trainer.training_step

        def training_step(model: nn.Module, inputs: Any, *args: Any) -> Tensor:
            loss = original(model, inputs, *args)
            if trainer.state.global_step + 1 == step:
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.mul_(factor)
            return loss

        trainer.training_step = training_step


class Weights(TrainerCallback):
    """A copy of all weights and of the optimizer's state after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Tensor], Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inner = kwargs["optimizer"].state_dict()["state"]
        moments = {i: {k: torch.as_tensor(v).clone() for k, v in s.items()} for i, s in inner.items()}
        self.seen.append(({k: v.clone() for k, v in kwargs["model"].state_dict().items()}, moments))


def run(folder: Path, action: str, *, factor: float = 1e6, resume: str | None = None, **options: Any) -> Any:
    from hf_kd import DistillationTrainer

    student, teacher = classifiers()
    weights = Weights()
    trainer = DistillationTrainer(
        student,
        arguments(folder, max_steps=24, spike_action=action, learning_rate=1e-3, **options),
        teacher=teacher,
        train_dataset=text_rows(32),
        callbacks=[weights],
    )
    Multiply(trainer, 20, factor)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, weights.seen


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b)


@pytest.mark.parametrize("factor", [1e6, math.nan])
def test_a_dropped_step_changes_nothing(tmp_path: Path, factor: float) -> None:
    """Weights and both moments after step 20 are those after step 19; the schedule goes on."""
    trainer, seen = run(tmp_path, "skip", factor=factor)
    assert same(seen[18][0], seen[19][0]) and same(seen[18][1], seen[19][1])
    assert not same(seen[19][0], seen[20][0])
    assert trainer.state.global_step == 24 and trainer.spikes.counts["steps_skipped"] == 1
    assert all(v.isfinite().all() for v in seen[-1][0].values())
    last = trainer.state.log_history[-1]
    assert last["steps_skipped"] == last["spikes_grad_norm"] == 1
    assert "steps_skipped" not in trainer.state.log_history[10]


def test_warn_and_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer, seen = run(tmp_path / "warn", "warn")
    assert "Step 20: the gradient's norm is" in caplog.text and "spike_action='warn'" in caplog.text
    assert not same(seen[18][0], seen[19][0]) and trainer.state.global_step == 24
    trainer, seen = run(tmp_path / "stop", "stop", save_strategy="steps", save_steps=100)
    assert trainer.state.global_step == 20 and same(seen[18][0], seen[19][0])
    assert json.loads((tmp_path / "stop" / "checkpoint-20" / SPIKES_FILE).read_text())["counts"][
        "steps_skipped"
    ]
    with pytest.raises(FloatingPointError, match="gradient's norm is nan at step 20"):
        run(tmp_path / "nan", "warn", factor=math.nan)


def test_resumed_before_a_spike(tmp_path: Path) -> None:
    """The window of a checkpoint decides as if nothing had been stopped."""
    _, seen = run(tmp_path, "skip", save_strategy="steps", save_steps=18)
    trainer, resumed = run(tmp_path, "skip", resume=str(tmp_path / "checkpoint-18"))
    assert same(resumed[-1][0], seen[-1][0]) and trainer.spikes.counts["steps_skipped"] == 1


def test_options() -> None:
    from hf_kd import DistillationArguments

    with pytest.raises(
        ValueError, match=r"(?s)spike_action='explode' is not known: use one of warn.*spike_threshold=0 is"
    ):
        DistillationArguments("x", use_cpu=True, spike_action="explode", spike_threshold=0)


def test_optimizers_leave_alone_what_has_no_gradient() -> None:
    """What dropping a step rests on."""
    for make in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop):
        weight = nn.Parameter(torch.ones(3, 3))
        optimizer = make([weight], lr=0.1, weight_decay=0.1)
        weight.grad = torch.ones(3, 3)
        optimizer.step()
        before, state = weight.detach().clone(), json.dumps(str(optimizer.state_dict()))
        weight.grad = torch.full((3, 3), 1e9)
        drop_step(optimizer)
        optimizer.step()
        assert torch.equal(weight, before) and json.dumps(str(optimizer.state_dict())) == state


def test_reported() -> None:
    arm = Arm(metrics={"accuracy": 0.5}, parameters=1, bytes=1)
    log = [{"loss": 1.0}, {"loss": 1.0, "spikes_kl": 1.0}, {"spikes_kl": 2.0, "steps_skipped": 2.0}]
    results = Results("t", "accuracy", True, {"teacher": arm, "student": arm}, training=log)
    assert results.spikes == {"spikes_kl": 2, "steps_skipped": 2}
    assert ("Training", "spikes of the distillation term: 2 · steps dropped: 2") in headline(results)
    assert len(headline(Results("t", "accuracy", True, {"teacher": arm, "student": arm}))) == 2
    from hf_kd.results import SPIKES

    assert tuple(SPIKES) == COUNTS
