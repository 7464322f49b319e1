"""Standard errors: as large as scores differ when the whole measurement is done again."""

from __future__ import annotations

import numpy as np
import pytest

from hf_kd.errors import bootstrap, of_mean


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


def test_the_bootstrap_of_accuracy_is_the_error_of_a_proportion():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 400)
    logits = np.eye(2)[np.where(rng.random(400) < 0.8, labels, 1 - labels)]

    def accuracy(predicted):
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    found = bootstrap(accuracy, logits, labels, "accuracy")
    assert found == pytest.approx(np.sqrt(0.8 * 0.2 / 400), rel=0.2)
    assert found == bootstrap(accuracy, logits, labels, "accuracy")
    assert bootstrap(accuracy, logits, labels, "f1") is None
    assert bootstrap(lambda _: {"f1": float("nan")}, logits, labels, "f1") is None
