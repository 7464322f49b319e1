"""Standard errors: as large as scores differ when the whole measurement is done again."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from transformers import EvalPrediction

from hf_kd import errors
from hf_kd.errors import RESAMPLES, bootstrap, draws, of_mean, of_ratio
from hf_kd.metrics import make_compute_metrics
from hf_kd.metrics.predictions import take
from hf_kd.paired import PairedDifference, of_samples, of_shares


def test_the_error_of_a_mean_over_tokens_is_the_spread_of_such_means():
    """Rows whose tokens are alike: the error of so many independent tokens would be far too small."""
    rng = np.random.default_rng(0)

    def sample():
        counts = rng.integers(5, 60, 200)
        return (rng.normal(3.0, 1.0, 200) * counts).astype(float), counts.astype(float)

    means, said = [], []
    for _ in range(600):
        sums, counts = sample()
        means.append(sums.sum() / counts.sum())
        said.append(of_mean(sums, counts))
    assert np.mean(said) == pytest.approx(np.std(means), rel=0.1)
    naive = 1.0 / np.sqrt(counts.sum())
    assert np.mean(said) > 4 * naive
    assert of_mean(np.ones(1), np.ones(1)) is None
    assert of_mean(np.ones(5), np.ones(5)) == 0.0


def accuracy(predicted):
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def answers(seed=1, rows=400):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    return EvalPrediction(np.eye(2)[np.where(rng.random(rows) < 0.8, labels, 1 - labels)], labels)


def test_the_bootstrap_of_accuracy_is_the_error_of_a_proportion():
    seen = answers()
    found = bootstrap(accuracy, seen)
    assert found["accuracy"].std(ddof=1) == pytest.approx(np.sqrt(0.8 * 0.2 / 400), rel=0.2)
    assert (found["accuracy"] == bootstrap(accuracy, seen)["accuracy"]).all()
    assert bootstrap(lambda _: {"f1": float("nan")}, seen) == {}
    assert bootstrap(accuracy, EvalPrediction(seen.predictions, None)) == {}


def test_the_bootstrap_of_perplexity_is_that_of_a_ratio():
    rng = np.random.default_rng(2)
    counts = rng.integers(5, 60, 300).astype(float)
    sums = rng.normal(3.0, 1.0, 300) * counts
    assert of_ratio(sums, counts).std(ddof=1) == pytest.approx(of_mean(sums, counts), rel=0.2)
    assert of_ratio(np.ones(3), np.zeros(3)) is None and of_ratio(np.ones(1), np.ones(1)) is None


def test_a_metric_that_reads_more_than_its_rows_has_no_error():
    """Answers in a list beside the data don't follow the rows that are drawn."""
    seen = answers()
    kept = seen.label_ids.copy()

    def beside(predicted):
        right = predicted.predictions.argmax(-1) == kept[: len(predicted.label_ids)]
        return {"exact": float((right * np.arange(len(right))).mean()), **accuracy(predicted)}

    assert bootstrap(beside, seen).keys() == {"accuracy"}


def test_a_metric_that_would_take_minutes_is_left_out(monkeypatch):
    monkeypatch.setattr(errors, "_LIMIT", 0.0)
    assert bootstrap(accuracy, answers()) == {}


@pytest.mark.parametrize(
    ("task", "metrics", "names"),
    [
        ("token-classification", ("entity_f1",), ["O", "B-A", "I-A"]),
        ("token-classification", ("entity_f1", "accuracy", "f1"), ["O", "B-A", "I-A"]),
        ("sequence-classification", ("f1", "accuracy", "expected_calibration_error"), None),
        ("causal-lm", ("accuracy", "f1"), None),
        ("question-answering", ("span_f1",), None),
        ("regression", ("pearson", "spearman", "mse"), None),
    ],
)
def test_the_samples_are_the_metrics_of_the_rows_that_are_drawn(monkeypatch, task, metrics, names):
    """Trap 52: heads with several positions a row are drawn by the row, as fast or slow."""
    rng = np.random.default_rng(3)
    if task == "token-classification" or task == "causal-lm":
        labels = rng.integers(0, 3, (40, 7))
        labels[:, 5:] = np.where(rng.random((40, 2)) < 0.5, -100, labels[:, 5:])
        labels[3] = -100
        predictions = np.where(rng.random((40, 7)) < 0.7, labels.clip(0), rng.integers(0, 3, (40, 7)))
        seen = EvalPrediction(predictions, labels)
    elif task == "question-answering":
        spans = rng.integers(0, 5, 40)
        seen = EvalPrediction((rng.normal(size=(40, 9)), rng.normal(size=(40, 9))), (spans, spans + 2))
    elif task == "regression":
        labels = rng.normal(size=40)
        seen = EvalPrediction((labels + rng.normal(size=40))[:, None], labels)
    else:
        seen = EvalPrediction(rng.normal(size=(40, 3)), rng.integers(0, 3, 40))
    monkeypatch.setattr(errors, "_LIMIT", np.inf)
    problem = "regression" if task == "regression" else None
    task = "sequence-classification" if task == "regression" else task
    compute = make_compute_metrics(metrics, task, problem_type=problem, label_names=names)
    found = bootstrap(compute, seen)
    assert found.keys() == compute(seen).keys()
    for i, rows in zip(range(3), draws(40), strict=False):
        for name, value in compute(take(seen, rows)).items():
            assert found[name][i] == pytest.approx(value, abs=1e-6), name
    assert all(len(values) == RESAMPLES for values in found.values())


@pytest.mark.parametrize(("better", "worse"), [(5, 0), (6, 0), (0, 6), (12, 3), (9, 3), (30, 14), (30, 15)])
def test_zero_is_outside_the_interval_of_two_shares_where_mcnemar_says_so(better, worse):
    one = np.array([1.0] * better + [0.0] * worse + [1.0] * 50 + [np.nan])
    other = np.array([0.0] * better + [1.0] * worse + [1.0] * 50 + [0.0])
    low, high = of_shares(one, other)
    found = PairedDifference("a", "b", "accuracy", (better - worse) / (len(one) - 1), low, high, "mcnemar")
    assert found.is_clear == (binomtest(better, better + worse).pvalue < 0.05)
    assert low <= found.value <= high
    assert of_shares(other, one) == pytest.approx((-high, -low))


def test_models_that_never_differ_may_still_differ_elsewhere():
    low, high = of_shares(np.ones(40), np.ones(40))
    assert high == pytest.approx(1 - 0.025 ** (1 / 40)) and low == -high
    assert binomtest(0, 40).proportion_ci(0.95).high == pytest.approx(high)


def test_rows_that_are_hard_for_both_don_t_hide_the_difference():
    """Trap 52: a loss of 3 ± 2 nats on all rows, and one model better by 0.1 on nearly each."""
    rng = np.random.default_rng(4)
    hard, counts = rng.normal(3.0, 2.0, 200) * 20, np.full(200, 20.0)
    better = hard - 20 * rng.normal(0.1, 0.1, 200)
    one, other = of_ratio(better, counts), of_ratio(hard, counts)
    value = (better - hard).sum() / counts.sum()
    low, high = of_samples(value, one, other)
    assert low < value < high < 0
    assert of_mean(hard, counts) > abs(value)


def test_the_interval_of_a_difference_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(5)
    inside, runs = 0, 80
    for _ in range(runs):
        hard = rng.normal(3.0, 1.0, 60)
        one, other = hard + rng.normal(0.1, 0.3, 60), hard
        counts = np.ones(60)
        low, high = of_samples(one.mean() - other.mean(), of_ratio(one, counts), of_ratio(other, counts))
        inside += low < 0.1 < high
    assert 0.86 < inside / runs < 0.99
