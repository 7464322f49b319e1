"""Two CPU ranks, started as a user would, give the gradient of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_kd import DistillationArguments, DistillationTrainer

from .heads import HEADS, Collator, models, oracle, rows_of
from .rank_teachers import CASES, all_runs, trained
from .test_features import feature_oracle, merged
from .test_gradient import assert_same
from .two_ranks import FEATURES, rows_for

ROOT = Path(__file__).resolve().parents[1]


def launch(*arguments: str) -> None:
    """Run a launcher to its end, with what it printed if it fails."""
    run = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=1200,  # for a launcher that hangs; slow machines are none of our business
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Where the runs on one rank and on two put their checkpoints."""
    return {ranks: tmp_path_factory.mktemp(f"on_{ranks}") for ranks in (1, 2)}


@pytest.fixture(scope="module")
def two_ranks(folders: dict[int, Path], one_rank: dict[str, Any]) -> dict[str, Any]:
    """What two ranks computed, for all heads in one launch."""
    config, script = ROOT / "hf_kd" / "accelerate" / "cpu2.yaml", ROOT / "tests" / "two_ranks.py"
    where = str(folders[2]), str(folders[1])
    launch("accelerate.commands.launch", "--config_file", str(config), str(script), *where)
    return torch.load(folders[2] / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def zero(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What two ranks of a DeepSpeed stage computed, with the configuration that ships."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: .ci/deepspeed runs these")
    folder = tmp_path_factory.mktemp(f"zero_{request.param}")
    for name, model in zip(("student", "teacher"), models(HEADS["causal-lm"]), strict=True):
        model.save_pretrained(folder / name)
    config = ROOT / "hf_kd" / "accelerate" / f"zero{request.param}.yaml"
    script = ROOT / "tests" / "zero_ranks.py"
    launch("accelerate.commands.launch", "--config_file", str(config), str(script), str(folder))
    return folder, torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", HEADS)
def test_two_ranks(two_ranks: dict[str, Any], name: str) -> None:
    """Trap 17: the gradient of two ranks is that of one, also when one rank has no supervised position."""
    head = HEADS[name]
    student, teacher = models(head)
    expected, expected_grads = oracle(head, student, teacher, rows_for(name))
    assert two_ranks[name]["loss"] == pytest.approx(float(expected), rel=max(head.tolerance, 1e-6))
    assert_same(two_ranks[name]["grads"], expected_grads, head.tolerance)


def test_a_cached_teacher_on_two_ranks(two_ranks: dict[str, Any]) -> None:
    """Traps 17, 45: each rank finds its own rows, in another order than they were written."""
    head = HEADS["causal-lm"]
    expected, grads = oracle(head, *models(head), rows_for("causal-lm"))
    assert two_ranks["from a cache"]["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert_same(two_ranks["from a cache"]["grads"], grads, head.tolerance)


@pytest.fixture(scope="module")
def one_rank(folders: dict[int, Path]) -> dict[str, Any]:
    """The same runs with teachers of several kinds in one process."""
    return all_runs(folders[1], 1)


@pytest.mark.parametrize("name", CASES)
def test_teachers_on_two_ranks(two_ranks: dict[str, Any], one_rank: dict[str, Any], name: str) -> None:
    """Traps 16, 17: averaged, routed and own teachers, a stream, a dropped step: weights of one process."""
    start = dict(models(HEADS["single-label"])[0].named_parameters())
    for what, theirs in one_rank[name].items():
        ours = two_ranks["teachers"][name][what]
        if what == "averages of the ranks":
            assert ours[0] == ours[1] and len(ours) == 2
            continue
        if what == "norms of the terms":
            assert ours == pytest.approx(theirs, rel=1e-9) and len(ours) == 4
            continue
        assert any(not torch.equal(values, start[n]) for n, values in ours.items())
        for n, values in theirs.items():
            torch.testing.assert_close(ours[n], values, rtol=1e-9, atol=1e-12)


def test_a_cache_that_two_ranks_fill(two_ranks: dict[str, Any], one_rank: dict[str, Any]) -> None:
    """Trap 45: two shuffled epochs; what one rank was told the other reads, and the run is the live one."""
    for name, values in one_rank["one"]["student"].items():
        for found in (two_ranks["teachers"], one_rank):
            torch.testing.assert_close(found["filled"]["student"][name], values, rtol=1e-9, atol=1e-12)


def test_the_average_is_exact_when_two_ranks_go_on(
    two_ranks: dict[str, Any], one_rank: dict[str, Any]
) -> None:
    """Trap 26: resumed from the middle, on one rank and on two, student and average agree to the bit."""
    for found in (two_ranks["teachers"], one_rank):
        for what in ("student", "average"):
            for name, values in found["ema"][what].items():
                assert torch.equal(values, found["ema, resumed"][what][name])


def test_a_run_goes_on_with_another_number_of_ranks(
    two_ranks: dict[str, Any], one_rank: dict[str, Any], folders: dict[int, Path], tmp_path: Path
) -> None:
    """From two to one and from one to two: student and average of the undisturbed run, but for rounding."""
    checkpoint = folders[2] / "teachers" / "ema" / "checkpoint-2"
    for found in (two_ranks["from one rank"], trained(tmp_path, "ema", 1, resume=checkpoint)):
        for what in ("student", "average"):
            for name, values in one_rank["ema"][what].items():
                torch.testing.assert_close(found[what][name], values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FEATURES)
def test_features_on_two_ranks(two_ranks: dict[str, Any], name: str) -> None:
    """Traps 17, 26: losses on layers, and the projections that they train, are those of one process."""
    head, (student, teacher) = HEADS[name], models(HEADS[name])
    expected, grads = feature_oracle(name, student, teacher, rows_of(head, 8, seed=2), head.alpha)
    ours = two_ranks[f"{name} with features"]
    assert ours["loss"] == pytest.approx(expected, rel=1e-6)
    assert_same(merged(ours["grads"]), grads)


def test_evaluation_is_exact(two_ranks: dict[str, Any], tmp_path: Path) -> None:
    """Trap 24: means over supervised positions at T = 1, whatever the batch size and the number of ranks."""
    head = HEADS["causal-lm"]
    student, teacher = models(head)
    loss, _ = oracle(head, student, teacher, rows_of(head, 7), alpha=0.0)
    kl, _ = oracle(head, student, teacher, rows_of(head, 7), alpha=1.0, temperature=1.0)
    for batch_size in (1, 3, 7):
        trainer = DistillationTrainer(
            student,
            DistillationArguments(
                output_dir=str(tmp_path),
                per_device_eval_batch_size=batch_size,
                remove_unused_columns=False,
                disable_tqdm=True,
                temperature=4.0,
            ),
            teacher=teacher,
            eval_dataset=rows_of(head, 7),
            data_collator=Collator(head),
        )
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-9)
        assert metrics["eval_kl"] == pytest.approx(float(kl), rel=1e-9)
        for name in ("eval_loss", "eval_kl", "eval_agreement", "eval_teacher_entropy"):
            assert two_ranks["evaluate"][name] == pytest.approx(metrics[name], rel=1e-9)


# Without the scope each case would have a launch of its own.
@pytest.mark.parametrize(
    ("zero", "case"),
    [(2, "names"), (3, "models"), (3, "tied"), (3, "names")],
    indirect=["zero"],
    scope="module",
)
def test_zero(zero: tuple[Path, dict[str, Any]], case: str, tmp_path: Path) -> None:
    """Traps 17, 19: DeepSpeed's ZeRO-2 and ZeRO-3: gradient, scores and the saved student are exact.

    Also for models that are named while ZeRO-3 is on: the teacher is whole on each rank.
    """
    folder, results = zero
    head, ours = HEADS["causal-lm"], results[case]
    student, teacher = models(head)
    if case == "tied":
        student.config.tie_word_embeddings = True
        student.tie_weights()
    loss, grads = oracle(head, student, teacher, rows_of(head, 8))
    assert ours["fused"]
    assert ours["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_same(ours["grads"], grads)
    saved = AutoModelForCausalLM.from_pretrained(folder / case, dtype=torch.float64).state_dict()
    assert all(torch.equal(saved[name], values) for name, values in student.state_dict().items())
    options = DistillationArguments(
        output_dir=str(tmp_path), remove_unused_columns=False, disable_tqdm=True, fused="off", use_cpu=True
    )
    alone = DistillationTrainer(
        student, options, teacher=teacher, eval_dataset=rows_of(head, 7), data_collator=Collator(head)
    ).evaluate()
    for name in ("eval_loss", "eval_kl", "eval_agreement", "eval_teacher_entropy"):
        assert ours["scores"][name] == pytest.approx(alone[name], rel=1e-6)
