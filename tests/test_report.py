"""What a person sees on the terminal."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from hf_kd.report import print_table, provenance
from hf_kd.results import Arm, Latency, Results

MACHINE = {
    "cpu": "Maker(R) Model CPU @ 2.50GHz",
    "cores": 2,
    "device": "cpu",
    "versions": {"torch": "2.13.0"},
}


def arm(accuracy, scale=1.0, **changes):
    latency = Latency(
        40.0 * scale, 1.0, 50.0, 30, 32, {"pixel_values": [32, 1, 8, 8]}, 0.0, "cpu", "float32", 2
    )
    parameters = int(8_534_210 * scale)
    metrics = {"loss": 0.1234, "accuracy": accuracy, "teacher_entropy": 0.3}
    values = Arm(metrics, parameters, 4 * parameters, 0.0423, 0.961, 4 * parameters + 1200, [latency])
    return replace(values, **changes)


def results(teacher=0.98, student=0.97, control=0.94, **changes):
    arms = {"teacher": arm(teacher), "student": arm(student, 0.1), "control": arm(control, 0.1)}
    made = Results(
        "image-classification", "accuracy", True, arms, 360, MACHINE, {"dataset": "digits", "seed": 42}
    )
    return replace(made, **changes)


def text(shown, width=80):
    out = io.StringIO()
    print_table(shown, Console(file=out, width=width))
    return out.getvalue()


def row(said, label):
    return next(line for line in said.splitlines() if line.strip().startswith(label))


def test_the_table_shows_the_three_arms_within_80_columns():
    said = text(results())
    assert all(len(line) <= 80 for line in said.splitlines())
    assert row(said, "image-classification").split() == [
        "image-classification",
        "teacher",
        "student",
        "control",
    ]
    assert row(said, "parameters").split() == ["parameters", "8.53", "M", "853", "k", "853", "k"]
    assert row(said, "KL to teacher").split()[-1] == "0.0423"
    assert row(said, "agreement").split()[-2:] == ["96.1", "%"]
    assert row(said, "MB on disk").split()[-3:] == ["34.1", "3.41", "3.41"]
    assert "40.0 ± 1.0" in row(said, "latency")
    assert "0.9700 ± 0.0090" in row(said, "accuracy (± SE)")
    assert "teacher_entropy" not in said


def test_the_primary_metric_comes_first_and_only_once():
    lines = [
        line.split()[0] for line in text(results()).splitlines() if line.startswith((" accuracy", " loss"))
    ]
    assert lines == ["accuracy", "loss"]


def test_ratios_and_verdict_follow_the_table():
    said = " ".join(text(results()).split())
    assert "Quality kept: 99.0 %" in said
    assert "Gap closed: 75.0 %" in said
    assert "these rows can show (accuracy 0.9700 with it, 0.9400 without; 1.9 standard errors apart)" in said
    assert "The teacher helped" in " ".join(text(replace(results(), examples=10_000)).split())


def test_the_table_says_that_the_student_lost_to_the_control():
    """Trap 52: a reader of the terminal alone learns that the teacher did not help."""
    said = " ".join(text(results(0.90, 0.80, 0.95, examples=10_000)).split())
    assert "The teacher did not help" in said
    assert "Gap closed: not defined: the control (0.9500) is better than the teacher (0.9000)" in said


def test_what_was_not_measured_is_a_dash_or_left_out():
    bare = replace(arm(0.5), eval_kl=None, bytes_on_disk=None, latency=[])
    made = results()
    said = text(replace(made, arms={**made.arms, "control": bare}))
    assert row(said, "KL to teacher").split()[-1] == "–"
    said = text(replace(made, arms=dict.fromkeys(made.arms, bare)))
    assert "latency" not in said.split("Quality kept")[0]
    assert "KL to teacher" not in said


@pytest.mark.parametrize(
    ("kl", "shown"),
    [
        (0.0, "0"),
        (2.3e-7, "2.30e-07"),
        (0.00123, "0.00123"),
        (0.5, "0.5000"),
        (12.34, "12.3"),
        (1234.5, "1234"),
        (math.nan, "nan"),
    ],
)
def test_numbers_keep_their_digits(kl, shown):
    made = results()
    said = text(replace(made, arms={**made.arms, "control": arm(0.9, eval_kl=kl)}))
    assert row(said, "KL to teacher").split()[-1] == shown


def test_many_arms_make_several_tables_within_80_columns():
    made = results()
    further = {f"student-{depth}-layers": arm(0.95) for depth in (2, 4, 6, 8)}
    said = text(replace(made, arms={**made.arms, **further}))
    assert all(len(line) <= 80 for line in said.splitlines())
    assert all(name in said for name in further)


def test_names_are_text_and_never_markup():
    made = results()
    said = text(replace(made, arms={**made.arms, "[red]x": arm(0.9)}, task="[bold]task"))
    assert "[red]x" in said
    assert "[bold]task" in said


def test_provenance_is_one_line_that_tells_how_it_was_measured():
    """Trap 50: a latency without device, threads, batch and repeats cannot be compared."""
    line = provenance(results())
    assert line == (
        "360 examples · digits · seed 42 · Maker Model CPU, 2 cores · torch 2.13.0 · "
        "batch 32, 2 threads, 30 repeats"
    )
    made = results()
    padded = arm(0.9, latency=[replace(made.arms["teacher"].latency[0], padding=0.34)])
    assert "34 % padding" in provenance(replace(made, arms={**made.arms, "teacher": padded}))
    assert "An accelerator" in provenance(replace(made, machine={**MACHINE, "device": "An accelerator"}))
    assert provenance(replace(made, machine={}, provenance={}, examples=None)).startswith("batch 32")
