"""Built-in metrics against hand-made cases and independent implementations, and what Trainer hands them."""

from __future__ import annotations

import math

import evaluate
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import EvalPrediction

from hf_kd.metrics import (
    BUILT_IN,
    default_metrics,
    entities,
    keep_top_class,
    load_metric,
    make_compute_metrics,
    perplexity,
)
from hf_kd.metrics.predictions import best_spans


def score(name, predictions, references, **options):
    return load_metric(name).compute(predictions=predictions, references=references, **options)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_is_an_evaluate_metric(name):
    assert isinstance(load_metric(name), evaluate.Metric)


def test_accuracy_and_agreement():
    assert score("accuracy", [0, 1, 2, 1], [0, 1, 1, 1]) == {"accuracy": 0.75}
    assert score("agreement", [0, 1], [1, 1]) == {"agreement": 0.5}


def test_f1_is_the_mean_over_classes():
    # class 0: precision 1, recall 1/3 -> 1/2; class 1: precision 1/3, recall 1 -> 1/2; class 2: 1
    assert score("f1", [0, 1, 1, 1, 2], [0, 0, 0, 1, 2])["f1"] == pytest.approx((0.5 + 0.5 + 1) / 3)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("O O", []),
        ("O I-PER I-PER", [("PER", 1, 2)]),  # an I- that continues nothing starts an entity
        ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("B-PER O I-PER", [("PER", 0, 0), ("PER", 2, 2)]),
        ("B-PER I-PER", [("PER", 0, 1)]),  # up to the end of the row
        ("S-PER B-LOC E-LOC O", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("B-e-mail I-e-mail", [("e-mail", 0, 1)]),
        ("B I O B", [("", 0, 1), ("", 3, 3)]),
        ("", []),
    ],
)
def test_entities(tags, expected):
    assert list(entities(tags.split())) == expected


def test_entity_f1_counts_whole_entities():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-MISC", "B-ORG"]]
    # found: PER(0,0) wrong end, LOC right, MISC wrong, ORG right; there: PER, LOC, ORG
    result = score("seqeval", predicted, true)
    assert result["entity_precision"] == pytest.approx(2 / 4)
    assert result["entity_recall"] == pytest.approx(2 / 3)
    assert result["entity_f1"] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    assert result["tag_accuracy"] == pytest.approx(4 / 6)
    assert score("entity_f1", true, true)["entity_f1"] == 1.0
    assert score("entity_f1", [["O"]], [["O"]])["entity_f1"] == 0.0


def test_entity_f1_differs_from_tag_f1():
    """Counting tags would give 2/3 for half an entity; an entity with a wrong end counts nothing."""
    assert score("entity_f1", [["B-PER", "O", "O"]], [["B-PER", "I-PER", "O"]])["entity_f1"] == 0.0


def test_perplexity():
    assert load_metric("perplexity").compute(predictions=[1.0, 3.0])["perplexity"] == pytest.approx(
        math.exp(2)
    )
    assert perplexity(0.0) == 1.0 and perplexity(1e4) == math.inf


def test_calibration_error_by_hand():
    # two rows with confidence 0.9, one right: gap 0.4; two with 0.6, both right: gap 0.4
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]
    result = score("expected_calibration_error", probabilities, [0, 1, 0, 0])
    assert result["expected_calibration_error"] == pytest.approx(0.4)
    certain = score("expected_calibration_error", [[1.0, 0.0], [0.0, 1.0]], [0, 1])
    assert certain["expected_calibration_error"] == 0.0


def test_calibration_error_against_a_loop():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], size=300)
    labels = rng.integers(0, 3, size=300)
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for low in range(15):
        rows = (top > low / 15) & (top <= (low + 1) / 15)
        if rows.any():
            expected += rows.mean() * abs(right[rows].mean() - top[rows].mean())
    result = score("expected_calibration_error", probabilities, labels)
    assert result["expected_calibration_error"] == pytest.approx(expected)


def test_correlations_against_scipy():
    rng = np.random.default_rng(0)
    a = rng.normal(size=50)
    b = np.round(a + rng.normal(size=50))  # ties
    assert score("pearson", a, b)["pearson"] == pytest.approx(scipy.stats.pearsonr(a, b)[0])
    assert score("spearman", a, b)["spearman"] == pytest.approx(scipy.stats.spearmanr(a, b)[0])
    assert score("mse", a, b)["mse"] == pytest.approx(((a - b) ** 2).mean())
    assert math.isnan(score("pearson", [1.0, 2.0], [3.0, 3.0])["pearson"])


def test_unknown_metric_says_why_and_what_works(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(evaluate, "load", offline)
    with pytest.raises(ValueError, match=r"'acuracy' is not built in, did you mean 'accuracy'.*no network"):
        load_metric("acuracy")


def test_other_names_go_to_evaluate(monkeypatch):
    """A name that is not built in is whatever evaluate finds, and gets classes."""

    class Mine(evaluate.Metric):
        def _info(self):
            features = load_metric("accuracy").features
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions, references):
            return {"mine": float(sum(predictions)), "detail": [1, 2]}

    monkeypatch.setattr(evaluate, "load", lambda name, config=None: Mine())
    compute = make_compute_metrics(["mine", "accuracy"], "image-classification")
    assert compute(EvalPrediction(np.eye(3), np.array([0, 1, 1]))) == {"mine": 3.0, "accuracy": 2 / 3}


def test_token_metrics_leave_out_ignored_positions():
    """Trap 35: sub-words and special tokens, labelled -100, are neither right nor wrong."""
    logits = np.zeros((2, 4, 3))
    logits[0, [0, 1, 2, 3], [2, 1, 2, 2]] = 1
    logits[1, [0, 1, 2, 3], [1, 0, 0, 0]] = 1
    labels = np.array([[-100, 1, 2, -100], [-100, 0, -100, -100]])
    names = ["O", "B-PER", "I-PER"]
    compute = make_compute_metrics(["entity_f1", "accuracy"], "token-classification", label_names=names)
    values = compute(EvalPrediction(logits, labels))
    assert values["entity_f1"] == 1.0 and values["accuracy"] == 1.0 and values["tag_accuracy"] == 1.0


def test_causal_metrics_are_shifted():
    """Trap 33: the prediction at position i is of label i + 1, in logits and in kept classes alike."""
    labels = np.array([[5, 1, 2, -100]])
    classes = np.array([[1, 2, 7, 7]])
    compute = make_compute_metrics(["accuracy"], "causal-lm")
    assert compute(EvalPrediction(classes, labels)) == {"accuracy": 1.0}
    assert compute(EvalPrediction(np.eye(8)[classes], labels)) == {"accuracy": 1.0}
    masked = make_compute_metrics(["accuracy"], "masked-lm")
    assert masked(EvalPrediction(classes, labels)) == {"accuracy": 0.0}


def test_keep_top_class_equals_keeping_logits():
    """The vocabulary axis is dropped before predictions are gathered."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert keep_top_class((logits, "hidden"), None).shape == (2, 3)
    assert torch.equal(keep_top_class(logits, None), logits.argmax(-1))


def test_language_models_keep_no_predictions():
    """Perplexity is exp(eval_loss): without other metrics there is nothing to compute from logits."""
    assert make_compute_metrics(default_metrics("causal-lm"), "causal-lm") is None
    assert make_compute_metrics([], "masked-lm") is None


def test_several_labels():
    logits = np.array([[2.0, -1.0], [-1.0, 3.0], [1.0, 1.0]])
    labels = np.array([[1.0, 0.0], [1.0, 1.0], [-100, -100]])
    kind = "multi_label_classification"
    compute = make_compute_metrics(["accuracy", "f1"], "sequence-classification", problem_type=kind)
    values = compute(EvalPrediction(logits, labels))
    assert values["accuracy"] == 0.75
    assert values["f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_regression_leaves_out_missing_numbers():
    names = default_metrics("sequence-classification", "regression")
    compute = make_compute_metrics(names, "sequence-classification", problem_type="regression")
    labels = np.array([1.0, np.nan, 3.0])
    values = compute(EvalPrediction(np.array([[1.0], [99.0], [2.0]]), labels))
    assert values["mse"] == 0.5 and values["pearson"] == pytest.approx(1.0)


def test_without_labels_there_are_no_metrics():
    """Trap 2: evaluation of unlabelled data gives no quality, and no crash."""
    compute = make_compute_metrics(["accuracy"], "image-classification")
    assert compute(EvalPrediction(np.eye(2), None)) == {}
    assert compute(EvalPrediction(np.eye(2), np.array([-100, -100]))) == {}


def test_spans():
    start, end = np.full((1, 8), -5.0), np.full((1, 8), -5.0)
    start[0, 4], end[0, 5], end[0, 2] = 4.0, 4.0, 9.0
    assert best_spans(start, end).tolist() == [[4, 5]]  # the highest end is before the start
    end[0, 7] = 9.0
    context = np.array([[1, 0, 0, 1, 1, 1, 0, 0]])
    assert best_spans(start, end).tolist() == [[4, 7]]
    assert best_spans(start, end, context).tolist() == [[4, 5]]
    end[0, 0] = start[0, 0] = 6.0
    assert best_spans(start, end, context).tolist() == [[0, 0]]  # no answer
    assert best_spans(start, end, context.astype(bool), max_tokens=1).tolist() == [[0, 0]]


def test_span_scores_by_hand():
    """Trap 36: the question and padding are no answers, also when their logits are highest."""
    result = score("span_f1", [[2, 4], [1, 1], [0, 0]], [[3, 6], [1, 1], [5, 6]])
    assert result["span_f1"] == pytest.approx((2 * 2 / 7 + 1 + 0) / 3)
    assert result["exact_match"] == pytest.approx(1 / 3)
    start, end = np.zeros((2, 5)), np.zeros((2, 5))
    start[:, 1], end[:, 1], start[:, 3], end[:, 3] = 9, 9, 5, 5
    labels = (np.array([3, 3]), np.array([3, 3]))
    allowed = np.array([[1, 0, 0, 1], [1, 0, 0, 1]])
    inside = make_compute_metrics(["span_f1"], "question-answering", allowed=lambda labels: allowed)
    unknown = make_compute_metrics(["span_f1"], "question-answering", allowed=lambda labels: None)
    assert inside(EvalPrediction((start, end), labels))["exact_match"] == 1.0
    assert unknown(EvalPrediction((start, end), labels))["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [
        ("entity_f1", "token-classification", {}),
        ("entity_f1", "image-classification", {"label_names": ["B-PER", "O"]}),
        ("mse", "sequence-classification", {}),
        ("accuracy", "sequence-classification", {"problem_type": "regression"}),
        ("expected_calibration_error", "causal-lm", {}),
        ("accuracy", "question-answering", {}),
    ],
)
def test_metrics_that_do_not_fit_are_refused(name, task, options):
    with pytest.raises(ValueError, match=f"metrics: '{name}' takes .*: use "):
        make_compute_metrics([name], task, **options)


def test_defaults_fit_their_tasks():
    assert default_metrics("token-classification", None, ["O", "B-X", "I-X"]) == ("entity_f1",)
    assert default_metrics("token-classification", None, ["NN", "VB", "I-don't-know"]) == ("accuracy", "f1")
    for task in ("image-classification", "question-answering", "masked-lm", "multiple-choice"):
        assert default_metrics(task)
        make_compute_metrics(default_metrics(task), task)
