"""Agreement, calibration and the rows that differ, against numbers made another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_kd.behaviour import MOST_CLASSES, calibration, describe_behaviour, most_different

CLASSES = ["a", "b", "c", "d"]


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    base = 3 * np.eye(4)[labels]
    return {name: base + rng.normal(size=base.shape) for name in ("teacher", "student", "control")}, labels


def torch_kl(logits):
    log_p, log_q = (torch.tensor(logits[name]).log_softmax(-1) for name in ("teacher", "student"))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def test_agreement_counts_every_row_once_teacher_first(answers):
    logits, labels = answers
    made = describe_behaviour(logits, labels, classes=CLASSES)
    counts = np.zeros((4, 4), dtype=int)
    for t, s in zip(logits["teacher"].argmax(1), logits["student"].argmax(1), strict=True):
        counts[t, s] += 1
    assert made.agreement == counts.tolist()
    assert not np.array_equal(counts, counts.T)  # the order of the axes is tested


def test_kl_by_class_and_the_largest_differences_are_those_of_torch(answers):
    logits, labels = answers
    made = describe_behaviour(logits, labels, classes=CLASSES, texts={3: "three"})
    kl, theirs = torch_kl(logits).numpy(), logits["teacher"].argmax(1)
    for i, name in enumerate(CLASSES):
        assert made.kl_by_class[name] == pytest.approx(kl[theirs == i].mean(), rel=1e-9)
    order = np.argsort(-kl)[:10].tolist()
    assert [d.row for d in made.differences] == order == most_different(logits["teacher"], logits["student"])
    assert made.differences[0].kl == pytest.approx(kl.max())
    assert made.differences[0].label == CLASSES[labels[order[0]]]


def test_equal_models_differ_nowhere_and_masked_classes_are_no_nan():
    same = np.array([[0.3, -np.inf, 2.0], [1.0, -np.inf, -1.0]])
    made = describe_behaviour({"teacher": same, "student": same}, None, classes=["x", "y", "z"])
    assert [d.kl for d in made.differences] == [0.0, 0.0]
    assert made.calibration == {}


def test_calibration_error_of_a_model_that_is_always_sure_and_half_right():
    log_probs = np.log(np.array([[0.999, 0.001]] * 10))
    made = calibration(log_probs, np.array([0, 1] * 5))
    assert made.count == [10]
    assert made.ece == pytest.approx(0.499)
    # rows without a label don't count
    assert calibration(log_probs, np.array([0] * 5 + [-100] * 5)).ece == pytest.approx(0.001)


def test_many_classes_have_no_matrix_and_shapes_must_agree(answers):
    logits, labels = answers
    wide = np.random.default_rng(1).normal(size=(5, MOST_CLASSES + 1))
    names = [str(i) for i in range(MOST_CLASSES + 1)]
    assert describe_behaviour({"teacher": wide, "student": wide}, None, classes=names).agreement is None
    with pytest.raises(ValueError, match="shapes"):
        describe_behaviour({**logits, "student": wide}, labels, classes=CLASSES)
    with pytest.raises(ValueError, match="3 class names for 4"):
        describe_behaviour(logits, labels, classes=CLASSES[:3])
