"""The model card: metadata that the Hub's own classes read back, and no path of this machine."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from hf_kd.card import write_card
from hf_kd.options import RunOptions

from .test_report import results


def card_of(tmp_path, shown=None, **run):
    folder = tmp_path / "small_model"
    folder.mkdir(exist_ok=True)
    return ModelCard.load(write_card(shown or results(), RunOptions(**run), folder))


def test_the_hubs_own_classes_read_the_metadata_back(tmp_path):
    shown = results()
    shown.arms["student"].metrics["teacher_entropy"] = 0.4  # not how good the student is
    card = card_of(tmp_path, shown, teacher="google/vit-base-patch16-224", dataset="AI-Lab-Makerere/beans")
    data = card.data
    assert data.base_model == "google/vit-base-patch16-224"
    assert data.datasets == ["AI-Lab-Makerere/beans"]
    assert data.pipeline_tag == "image-classification"
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert "teacher_entropy" not in found
    assert found["accuracy"] == pytest.approx(0.97) and found["kl_to_teacher"] == pytest.approx(0.0423)
    assert "| accuracy (± SE) |" in card.text and results().verdict in card.text.replace("\\", "")
    assert 'AutoModelForImageClassification.from_pretrained("small_model")' in card.text


def test_the_charts_of_quality_and_cost_lie_beside_the_card(tmp_path):
    """As PNG, which the Hub shows; each is in the card, with a caption."""
    shown = re.findall(r"!\[(.+?)\]\((\S+)\)", card_of(tmp_path, teacher="a/b", dataset="c/d").text)
    assert [path for _, path in shown] == ["report-quality.png", "report-cost.png"]
    for _, path in shown:
        assert (tmp_path / "small_model" / path).read_bytes().startswith(b"\x89PNG")


def test_paths_of_this_machine_are_in_no_card(tmp_path):
    (tmp_path / "secret place").mkdir()
    local = str(tmp_path / "secret place")
    rows = str(tmp_path / "secret place" / "rows.csv")
    shown = replace(results(), provenance={"dataset": rows, "seed": 42})
    card = card_of(tmp_path, shown, teacher=local, dataset=rows)
    assert "secret place" not in str(card)
    assert card.data.base_model is None and card.data.datasets is None
    assert "a teacher that is not on the Hub" in card.text


def test_a_student_without_labels_has_a_card_of_what_is_known(tmp_path):
    bare = results()
    unlabelled = replace(bare, primary_metric=None)
    assert "agrees with the teacher" in card_of(tmp_path, unlabelled, teacher="a/b", dataset="c/d").text
