"""Several runs on one page: which models are worth their cost, and which runs can't be compared."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hf_kd import cli
from hf_kd.drawing import logarithmic, new_figure, style
from hf_kd.results import Results
from hf_kd.sweep import charts, combine, table

from .test_report import arm, results


def run_in(folder, accuracy, scale, **changes):
    """A run with a student of some size; the teacher is the same in all."""
    made = results(control=accuracy - 0.02)
    arms = {"teacher": arm(0.98), "student": arm(accuracy, scale), "control": arm(accuracy - 0.02, scale)}
    data = {
        "data": {"test": {"hash": "abc"}},
        "teacher_identity": {"fingerprint": "f"},
        "dataset": "<b>rows</b>",
    }
    replace(made, arms=arms, provenance=data, **changes).write(folder / "results.json")
    return folder


@pytest.fixture
def depths(tmp_path):
    return [
        run_in(tmp_path / "layers-2", 0.90, 0.2),
        run_in(tmp_path / "layers-3", 0.90, 0.3),
        run_in(tmp_path / "layers-4", 0.97, 0.4),
        run_in(tmp_path / "layers-6", 0.975, 0.6),
    ]


def test_the_front_is_what_no_other_model_beats(depths):
    sweep = combine(depths)
    assert [entry.name for entry in sweep.entries if entry.role == "teacher"] == ["teacher"]
    assert [entry.name for entry in sweep.front("parameters")] == [
        "layers-2",
        "layers-4",
        "layers-6",
        "teacher",
    ]
    # layers-3 is as good as layers-2 and dearer; a control is as dear as its student and worse.
    assert not any(entry.role == "control" for entry in sweep.front("latency"))


def test_where_less_is_better_the_front_turns_around(depths, tmp_path):
    made = [run_in(tmp_path / f"loss-{i}", score, size, primary_metric="loss", greater_is_better=False)
            for i, (score, size) in enumerate(((0.5, 0.2), (0.6, 0.3)))]  # fmt: skip
    sweep = combine(made)
    assert [entry.name for entry in sweep.front("bytes")] == ["loss-0"]


def test_the_smallest_student_within_the_error_of_the_best_is_named(depths):
    assert combine(depths).verdict.startswith("The best of 4 students is layers-6 (accuracy 0.975).")
    assert (
        "layers-4 (0.97), with 67% of its parameters, is within the standard error of it."
        in combine(depths).verdict
    )


@pytest.mark.parametrize(
    ("good", "said"),
    [
        (True, "layers-4 (0.97), with 67% of its parameters, can't be told from it on these rows"),
        (False, "The best of 4 students is layers-6 (accuracy 0.975)."),
    ],
)
def test_the_same_rows_tell_more_than_the_errors_of_the_scores(depths, good, said):
    """Two students may be within each other's errors, and one be better on every row where they differ."""
    best = "1" * 351 + "0" * 9
    other = "0" * 5 + "1" * 347 + "0" * 8 if good else "1" * 340 + "0" * 20
    for folder, right in ((depths[2], other), (depths[3], best)):
        run = Results.read(folder / "results.json")
        student = replace(run.arms["student"], right=right)
        replace(run, arms={**run.arms, "student": student}).write(folder / "results.json")
    verdict = combine(depths).verdict
    assert verdict.startswith("The best of 4 students is layers-6 (accuracy 0.975).") and said in verdict
    assert good or "layers-4" not in verdict
    for folder in depths[2:]:  # other rows, or nobody knows
        run = Results.read(folder / "results.json")
        replace(run, provenance={}).write(folder / "results.json")
    assert "is within the standard error of it" in combine(depths).verdict


def test_runs_whose_teacher_was_elsewhere_have_a_page(depths):
    for folder in depths:
        run = Results.read(folder / "results.json")
        arms = {
            name: replace(arm, eval_kl=None, metrics={**arm.metrics, "kl_tail": 0.25})
            for name, arm in run.arms.items()
            if name != "teacher"
        }
        replace(run, arms=arms).write(folder / "results.json")
    sweep = combine(depths)
    header, rows = table(sweep)
    assert len(rows) == 8 and all(row[3] == "–" and row[4] == "≥ 0.2500" for row in rows), rows
    assert list(charts(sweep)) == ["parameters", "latency", "bytes"]


def test_the_table_has_every_model_once_with_stars_on_the_front(depths):
    header, rows = table(combine(depths))
    assert len(rows) == 9 and header[2] == "accuracy"
    by_name = {row[1]: row for row in rows}
    assert by_name["layers-4"][3] == "99.0 %" and by_name["layers-4"][5].endswith("★")
    assert not any("★" in cell for cell in by_name["layers-3"])


def test_the_command_writes_one_page_and_one_markdown_of_all_runs(depths, tmp_path, capsys):
    assert cli.main(["report", *map(str, depths), "--out", str(tmp_path / "page")]) == 0
    said = capsys.readouterr().out
    assert "The best of 4 students" in said and "sweep.html" in said
    page = (tmp_path / "page" / "sweep.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and "<script" not in page and "<b>rows" not in page
    assert "prefers-color-scheme: dark" in page and "layers-6" in page
    markdown = (tmp_path / "page" / "sweep.md").read_text(encoding="utf-8")
    images = re.findall(r"\]\((sweep-[a-z]+\.png)\)", markdown)
    assert len(images) == 3 and all((tmp_path / "page" / name).stat().st_size > 1000 for name in images)


def test_runs_that_say_nothing_of_each_other_are_refused(depths, tmp_path):
    other = run_in(tmp_path / "other", 0.9, 0.2, task="token-classification")
    with pytest.raises(ValueError, match="layers-2 has task 'image-classification', other has task"):
        combine([depths[0], other])
    with pytest.raises(ValueError, match="is named twice"):
        combine([depths[0], depths[0] / "results.json"])
    elsewhere = run_in(tmp_path / "elsewhere", 0.9, 0.2)
    text = (elsewhere / "results.json").read_text().replace('"abc"', '"xyz"')
    (elsewhere / "results.json").write_text(text)
    with pytest.raises(ValueError, match="different rows"):
        combine([depths[0], elsewhere])
    assert cli.main(["report", str(depths[0]), str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("ends", [(0.014, 0.026), (25, 160), (0.06, 0.114), (1, 1e7), (3, 3.2), (0.02, 6e2)])
def test_a_cost_axis_has_round_numbers_however_much_it_spans(ends):
    """Between three and six, none of them outside and none written twice."""
    with style():
        figure, axes = new_figure()
    axes.plot(ends, (0.5, 0.9))
    logarithmic(axes)
    axes.margins(0.18)
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    marks = [tick for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    labels = [tick.label1.get_text() for tick in marks]
    assert 3 <= len(set(labels)) == len(labels) <= 6
    values = [float(text.replace(",", "")) for text in labels]
    assert values == pytest.approx([tick.get_loc() for tick in marks])
    assert not axes.xaxis.get_minorticklocs().size
