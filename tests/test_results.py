"""The results file, and what is computed from it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest

from hf_kd.paired import PairedDifference
from hf_kd.results import SCHEMA_VERSION, Arm, Latency, Results

LATENCY = Latency(4.0, 0.5, 5.0, 30, 8, {"input_ids": [8, 16]}, 0.0, "cpu", "float32", 2)


def make(
    teacher=0.9, student=0.85, control=0.8, *, metric="accuracy", greater=True, examples=None, error=None
):
    scores = {"teacher": teacher, "student": student, "control": control}
    arms = {
        name: Arm({metric: value}, 1000 if name == "teacher" else 250, 4000, 0.1, 0.9, 4100, [LATENCY])
        for name, value in scores.items()
        if value is not None
    }
    if error is not None:
        arms = {name: replace(arm, errors={metric: error}) for name, arm in arms.items()}
    return Results("sequence-classification", metric, greater, arms, examples=examples)


def test_gap_closed_is_measured_against_the_control():
    """Trap 51: retention flatters a student that reaches most of its score without the teacher."""
    results = make(0.90, 0.81, 0.80)
    assert results.quality_kept.value == pytest.approx(0.9)
    assert results.gap_closed.value == pytest.approx(0.1)


def test_lower_is_better_turns_the_ratios_around():
    results = make(10.0, 20.0, 30.0, metric="perplexity", greater=False)
    assert results.quality_kept.value == pytest.approx(0.5)
    assert results.gap_closed.value == pytest.approx(0.5)
    assert "The teacher helped" not in results.verdict  # nobody knows how sure these numbers are
    assert "helped" in make(10.0, 20.0, 30.0, metric="perplexity", greater=False, error=0.5).verdict


@pytest.mark.parametrize(
    ("scores", "greater", "reason"),
    [
        ((0.9, 0.9, 0.9), True, "score the same"),
        ((0.3, 0.2, 0.1 + 0.2), True, "score the same"),
        ((0.8, 0.85, 0.9), True, "the control (0.9000) is better than the teacher (0.8000)"),
        ((12.0, 11.0, 10.0), False, "the control (10) is better than the teacher (12)"),
        ((0.9, 0.8, None), True, "no control was trained"),
        ((0.9, math.nan, 0.8), True, "not finite (student nan)"),
        ((0.9, 0.8, math.inf), True, "not finite (control inf)"),
    ],
)
def test_gap_closed_is_refused_with_a_reason(scores, greater, reason):
    """Trap 51: without a gap between teacher and control, any number would be noise divided by zero."""
    gap = make(*scores, greater=greater).gap_closed
    assert gap.value is None
    assert reason in gap.reason


@pytest.mark.parametrize(
    "scores", [(0.0, 0.5, 0.2), (-0.2, 0.5, 0.2), (0.9, -0.1, 0.2), (0.9, math.nan, 0.2)]
)
def test_quality_kept_is_refused_where_the_ratio_says_nothing(scores):
    kept = make(*scores, metric="matthews_correlation").quality_kept
    assert kept.value is None
    assert kept.reason


def test_the_verdict_says_that_the_student_lost():
    """Trap 52: plain distillation can lose to no distillation, and the report says so."""
    verdict = make(0.95, 0.85, 0.90, examples=10_000).verdict
    assert "did not help" in verdict
    assert "0.8500 with it, 0.9000 without" in verdict
    lost = make(10.0, 30.0, 20.0, metric="perplexity", greater=False, error=1.0)
    assert "did not help" in lost.verdict


@pytest.mark.parametrize(
    ("examples", "said"),
    [(100, "these rows can show"), (1_000, "1.3 standard errors apart"), (100_000, "The teacher helped")],
)
def test_the_verdict_knows_the_standard_error(examples, said):
    """Trap 52: the same two points are nothing on 100 and on 1,000 rows, and a fact on 100,000."""
    verdict = make(0.95, 0.87, 0.85, examples=examples).verdict
    assert said in verdict
    assert ("The teacher helped" in verdict) == (examples == 100_000)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.001, 0.039, "The teacher helped"),
        (-0.001, 0.041, "No difference between with and without the teacher that these rows can show"),
    ],
)
def test_the_interval_of_the_same_rows_beats_the_errors_of_the_scores(low, high, said):
    """Trap 52: both models fail on the hard rows, so their difference is surer than either score."""
    paired = PairedDifference("student", "control", "accuracy", 0.02, low, high, "mcnemar")
    results = replace(make(0.95, 0.87, 0.85, examples=100), differences=[paired])
    assert said in results.verdict and f"{low:.4f} to {high:.4f}" in results.verdict
    assert results.difference("student", "teacher") is None


def test_perplexities_that_differ_in_the_fourth_digit_are_no_help():
    """Trap 52: 282.1 beside 282.2 was called help."""
    results = make(250.0, 282.1, 282.2, metric="perplexity", greater=False)
    paired = PairedDifference("student", "control", "perplexity", -0.1, -0.9, 0.7, "bootstrap")
    for made in (results, replace(results, differences=[paired])):
        assert "helped" not in made.verdict
    assert "-0.1000, 95 % interval -0.9000 to 0.7000" in replace(results, differences=[paired]).verdict


def test_standard_error_is_that_of_a_proportion():
    results = make(0.9, 0.8, 0.5, examples=100)
    assert results.standard_error("control") == pytest.approx(0.05)
    assert results.standard_error_of_difference("student", "control") == pytest.approx(math.hypot(0.04, 0.05))
    percent = make(90.0, 80.0, 50.0, metric="exact_match", examples=100)
    assert percent.standard_error("control") == pytest.approx(5.0)
    assert make(0.9, 0.8, 0.5).standard_error("control") is None
    assert make(0.9, 0.8, 0.5, metric="macro_f1", examples=100).standard_error("control") is None
    assert (
        make(9.0, 8.0, 5.0, metric="perplexity", examples=100, greater=False).standard_error("control")
        is None
    )


def test_a_perfect_tie_and_an_absent_control_have_a_verdict():
    assert "made no difference that these rows can show" in make(1.0, 1.0, 1.0, examples=360).verdict
    assert "no control was trained" in make(control=None).verdict
    assert "not known: accuracy is not finite (student nan)" in make(student=math.nan).verdict


def test_without_labels_the_verdict_speaks_of_behaviour():
    results = replace(make(), primary_metric=None)
    assert results.quality_kept.value is None
    assert "agrees with the teacher on 90.0 % of the positions, 0.1 nats" in results.verdict


def test_of_a_teacher_that_gives_entries_alone_the_verdict_says_how_far_at_least():
    whole = make(None, 30.0, 40.0, metric="perplexity", greater=False, error=0.5)
    arms = {
        name: replace(arm, eval_kl=None, metrics={**arm.metrics, "kl_tail": 0.25})
        for name, arm in whole.arms.items()
    }
    results = replace(whole, arms=arms)
    agreed = "The student agrees with the teacher on 90.0 % of the positions, at least 0.25 nats (KL) away."
    assert results.verdict.startswith(f"{agreed} The teacher helped")
    assert results.quality_kept.reason == "the teacher's own score is not known"
    sized = {**arms, "teacher": Arm({"perplexity": 15.0}, 1000, 4000)}
    kept = "keeps 50.0 % of the teacher's quality (perplexity 30, teacher 15) at 25.0 % of its parameters."
    assert kept in replace(results, arms=sized).verdict


def test_cost_is_in_the_verdict():
    results = make()
    fast = replace(results.arms["student"], latency=[replace(LATENCY, median_ms=1.0)])
    verdict = replace(results, arms={**results.arms, "student": fast}).verdict
    assert "25.0 % of its parameters and 25.0 % of its latency" in verdict


def test_written_results_are_read_back_whole(tmp_path):
    results = replace(
        make(0.9, math.nan, -math.inf, examples=360),
        machine={"cpu": "A processor", "versions": {"torch": "2"}},
        provenance={"seed": 42, "scores": [1.0, math.inf]},
    )
    path = results.write(tmp_path / "new" / "results.json")
    assert os.listdir(path.parent) == ["results.json"]
    back = Results.read(path)
    assert math.isnan(back.arms["student"].metrics["accuracy"])
    assert back.arms["control"].metrics["accuracy"] == -math.inf
    assert back.provenance["scores"] == [1.0, "Infinity"]
    assert back.arms["teacher"] == results.arms["teacher"]
    assert back.machine == results.machine


def test_the_file_is_strict_json_and_carries_the_summary(tmp_path):
    path = make(0.9, 0.85, 0.8, examples=10_000).write(tmp_path / "results.json")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["schema_version"] == SCHEMA_VERSION
    assert content["summary"]["gap_closed"]["value"] == pytest.approx(0.5)
    assert content["summary"]["quality_kept"]["reason"] is None
    assert "teacher helped" in content["summary"]["verdict"]


def test_the_summary_is_never_believed(tmp_path):
    path = make(0.9, 0.85, 0.8).write(tmp_path / "results.json")
    content = json.loads(path.read_text())
    content["summary"]["gap_closed"]["value"] = 7
    path.write_text(json.dumps(content))
    assert Results.read(path).gap_closed.value == pytest.approx(0.5)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = make().write(tmp_path / "results.json")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        make(student=0.1).write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_json_cannot_hold_is_refused_before_the_file_is_touched(tmp_path):
    with pytest.raises(TypeError):
        replace(make(), provenance={"model": object()}).write(tmp_path / "results.json")
    assert os.listdir(tmp_path) == []


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(schema_version=SCHEMA_VERSION + 1), "upgrade"),
        (lambda c: c.pop("schema_version"), "no schema_version"),
        (lambda c: c.pop("task"), "task is missing"),
        (lambda c: c.update(taks="x"), "taks is unknown, did you mean 'task'?"),
        (lambda c: c.update(greater_is_better="yes"), 'greater_is_better is "yes", not true or false'),
        (lambda c: c["arms"].pop("student"), "arms has no 'student'"),
        (
            lambda c: c["arms"]["student"].update(parameters=1.5),
            "arms.student.parameters is 1.5, not an integer",
        ),
        (lambda c: c["arms"]["student"].update(parameters=True), "arms.student.parameters is true"),
        (lambda c: c["arms"]["student"].update(parameters=-1), "arms.student.parameters is -1, below 0"),
        (lambda c: c["arms"]["student"].update(metrics={}), "no primary metric 'accuracy'"),
        (lambda c: c["arms"]["student"]["metrics"].update(accuracy="x"), "arms.student.metrics.accuracy"),
        (lambda c: c["arms"]["student"].update(eval_agreement=91.0), "outside [0, 1]"),
        (lambda c: c["arms"]["student"].update(right="012"), "right has other characters than 0, 1 and -"),
        (
            lambda c: c["arms"]["student"]["latency"][0].pop("device"),
            "arms.student.latency[0].device is missing",
        ),
        (lambda c: c["arms"].update(extra=3), "arms.extra is 3, not an object"),
        (lambda c: c.update(examples=0), "examples is 0"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_field(tmp_path, change, said):
    path = edit(make(examples=10).write(tmp_path / "results.json"), change)
    with pytest.raises(ValueError) as error:
        Results.read(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_all_problems_of_a_file_come_at_once(tmp_path):
    def change(content):
        content["task"] = 3
        content["arms"]["student"]["bytes"] = "many"

    with pytest.raises(ValueError, match=r"task is 3, not a string; arms.student.bytes"):
        Results.read(edit(make().write(tmp_path / "results.json"), change))


def test_files_that_are_torn_absent_or_something_else_are_named(tmp_path):
    path = make().write(tmp_path / "results.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="cut short"):
        Results.read(path)
    with pytest.raises(FileNotFoundError, match="no results at"):
        Results.read(tmp_path / "absent.json")
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="no schema_version"):
        Results.read(path)


def test_throughput_follows_from_the_median():
    assert LATENCY.examples_per_second == pytest.approx(2000.0)


def test_a_measured_error_is_that_of_the_verdict():
    """A metric that is no share of rows has the error that was measured for it."""
    made = make(10.0, 12.0, 12.5, metric="perplexity", greater=False, examples=100)
    assert made.standard_error("student") is None
    arms = {name: replace(arm, errors={"perplexity": 0.4}) for name, arm in made.arms.items()}
    known = replace(made, arms=arms)
    assert known.standard_error("student") == 0.4
    assert "that these rows can show" in known.verdict and "can't be told" in made.verdict
