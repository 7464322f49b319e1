"""The page and the Markdown: complete, self-contained, and safe with hostile names and texts."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from hf_kd import cli
from hf_kd.behaviour import PositionKL, describe_behaviour
from hf_kd.charts import charts
from hf_kd.drawing import svg
from hf_kd.pages import write_html, write_markdown
from hf_kd.results import Results
from hf_kd.slices import slice_rows

from .test_report import results

HOSTILE = "<script>alert('x')</script> | **bold** [a](javascript:b) & \"quoted\""


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.said = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said += data


@pytest.fixture
def full():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    logits = {name: 3 * np.eye(3)[labels] + rng.normal(size=(60, 3)) for name in ("teacher", "student")}
    texts = {i: HOSTILE for i in range(60)}
    training = [
        {
            **{
                "step": float(i),
                "loss": 1 / i,
                "loss_kd": 0.5 / i,
                "learning_rate": 0.1,
                "alpha": 0.9 - i / 10,
            },
            **{"temperature": 4.0, "grad_norm_ratio": float(i)},
        }
        for i in range(1, 9)
    ]
    training += [{"step": 4.0 * i, "eval_kl": 0.4 / i, "eval_teacher_mass_kept": 0.9} for i in (1, 2)]
    return results(
        behaviour=describe_behaviour(logits, labels, classes=["<b>one</b>", "two", "three"], texts=texts),
        training=training,
        slices=slice_rows(
            {HOSTILE: [HOSTILE] * 20 + ["b"] * 40}, {n: [0.0, 1.0] * 30 for n in logits}, metric="accuracy"
        ),
        positions=[PositionKL(8 * i, 8 * i + 7, {"student": 0.3, "control": 0.4}, 50) for i in range(4)],
        provenance={"dataset": HOSTILE, "seed": 1, "options": {"kl_threshold": 0.3, "alpha": 0.5}},
    )


def test_results_with_all_parts_are_read_as_they_were_written(full, tmp_path):
    assert Results.read(full.write(tmp_path / "results.json")) == full


def test_the_page_has_every_chart_and_number_and_nothing_from_the_network(full, tmp_path):
    text = write_html(full, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert len([tag for tag, _ in page.tags if tag == "figure"]) == 12
    assert "Quality kept" in page.said and "75.0 %" in page.said and full.verdict in page.said
    assert "0.9700 ± 0.0090" in page.said
    for caption in ("Which term moves the weights", "along the sequence", "parts of the evaluation rows"):
        assert caption in page.said
    assert "95 % intervals" in page.said and "0.500" in page.said
    outside = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert all(value.startswith("#") for value in outside)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "prefers-color-scheme: dark" in text and "currentColor" in text


def test_what_comes_from_data_and_models_is_shown_and_never_acted_on(full, tmp_path):
    page = Page(write_html(full, tmp_path).read_text(encoding="utf-8"))
    assert "alert('x')" in page.said and "<b>one</b>" in page.said
    markdown = write_markdown(full, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in markdown.replace("\\<", "")
    assert not re.search(r"(?<!\\)\[a\]", markdown)


def test_the_ids_of_charts_on_one_page_are_different(full):
    found = [set(re.findall(r'id="([^"]+)"', svg(figure, name))) for name, figure in charts(full).items()]
    defined = [{i for i in ids if re.match(r"[mpc][0-9a-f]{8,}", i)} for ids in found]
    assert sum(map(len, defined)) == len(set().union(*defined)) > 0


def test_every_input_that_was_timed_is_in_the_page(full, tmp_path):
    """Trap 50: a latency is one of a batch size and a length."""
    slow = replace(
        full.arms["teacher"].latency[0], batch_size=1, median_ms=250.0, inputs={"input_ids": [1, 64]}
    )
    arms = {name: replace(arm, latency=[*arm.latency, slow]) for name, arm in full.arms.items()}
    said = Page(write_html(replace(full, arms=arms), tmp_path).read_text(encoding="utf-8")).said
    assert "Cost by batch size and length" in said and "250 ms" in said and "4.00 rows/s" in said


def test_a_run_with_nothing_but_the_arms_has_a_page_too(tmp_path):
    bare = results(examples=None)
    bare = replace(bare, primary_metric=None)
    page = Page(write_html(bare, tmp_path).read_text(encoding="utf-8"))
    assert "Where the two differ most" not in page.said
    assert "not defined" in page.said


def test_the_command_prints_the_table_and_writes_both(full, tmp_path, capsys):
    full.write(tmp_path / "results.json")
    assert cli.main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "image-classification" in said and "report.html" in said
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    images = re.findall(r"\]\((report-[a-z-]+\.png)\)", markdown)
    assert len(images) == 12 and all((tmp_path / name).stat().st_size > 1000 for name in images)
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no results at" in capsys.readouterr().err
    full.write(tmp_path / "above" / "a run" / "results.json")
    assert cli.main(["report", str(tmp_path / "above")]) == 2
    assert f"there are some in {tmp_path / 'above' / 'a run'}" in capsys.readouterr().err
