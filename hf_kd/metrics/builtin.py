"""Metrics that are `evaluate.Metric`s made in code: no network, no script files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets import Features, Value
from sklearn.metrics import f1_score

from hf_kd.options import nearest

_STARTS, _INSIDE = ("B", "S", "U"), ("I", "E", "L")
_NUMBER, _CLASS, _NAME = Value("float64"), Value("int64"), Value("string")


class _BuiltIn(evaluate.Metric):
    """A metric made in code; the subclass says what it takes, and computes."""

    #: What `make_compute_metrics` feeds it: classes, probabilities, numbers or tags.
    takes = "classes"
    about = ""
    inputs: Mapping[str, Any] = {"predictions": _CLASS, "references": _CLASS}

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        # In memory: another process that evaluates at the same time never waits for a file of ours.
        super().__init__(config_name=config_name, keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        inputs = dict(self.inputs)
        if self.config_name == "multilabel":
            inputs = {name: datasets.List(feature) for name, feature in inputs.items()}
        return evaluate.MetricInfo(
            description=self.about, citation="", features=Features(inputs), inputs_description=self.about
        )


class Accuracy(_BuiltIn):
    """Share of predictions that equal the reference; with several labels, of all row and label pairs."""

    about = "Share of predictions that equal the reference, in [0, 1]."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class F1(_BuiltIn):
    """Macro F1: the mean over the classes that occur, each counting the same."""

    about = "Mean over classes of the harmonic mean of precision and recall, in [0, 1]."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        score = f1_score(np.asarray(references), np.asarray(predictions), average="macro", zero_division=0)
        return {"f1": float(score)}

    def again(self, predictions: Any, references: Any) -> dict[str, float]:
        """The same from counts of classes, thirty times as fast: a bootstrap asks hundreds of times."""
        ours, true = np.asarray(predictions), np.asarray(references)
        if ours.ndim != 1:
            return self._compute(ours, true)
        size = int(max(ours.max(), true.max())) + 1
        found, there = (np.bincount(side, minlength=size) for side in (ours, true))
        right = np.bincount(true[ours == true], minlength=size)
        occurs = found + there > 0
        return {"f1": float((2 * right[occurs] / (found + there)[occurs]).mean())}


class EntityF1(_BuiltIn):
    """F1 of whole entities, micro-averaged: an entity counts if its type and both its ends are right.

    Tags are IOB2 (`B-PER I-PER O`), read as conlleval and seqeval read them: an `I-` that continues nothing,
    or something of another type, starts an entity.
    """

    takes = "tags"
    about = "Micro F1, precision and recall of entities (type and both ends), and accuracy of tags."
    inputs = {"predictions": datasets.List(_NAME), "references": datasets.List(_NAME)}

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return self.of_counts(self.count(predictions, references))

    def count(self, predictions: Any, references: Any) -> np.ndarray:
        """`[5]` numbers of entities that were found, are there, are both; of equal tags and of tags."""
        found = right = there = equal = tags = 0
        for predicted, true in zip(predictions, references, strict=True):
            if len(predicted) != len(true):
                raise ValueError(f"a row has {len(predicted)} predicted tags and {len(true)} reference tags")
            ours, theirs = set(entities(predicted)), set(entities(true))
            found, there, right = found + len(ours), there + len(theirs), right + len(ours & theirs)
            equal += sum(a == b for a, b in zip(predicted, true, strict=True))
            tags += len(true)
        return np.array([found, there, right, equal, tags])

    def of_counts(self, counts: Sequence[int] | np.ndarray) -> dict[str, float]:
        """The metrics, from the sums of such numbers."""
        found, there, right, equal, tags = map(int, counts)
        return {
            "entity_f1": 2 * right / (found + there) if found + there else 0.0,
            "entity_precision": right / found if found else 0.0,
            "entity_recall": right / there if there else 0.0,
            "tag_accuracy": equal / tags if tags else 0.0,
        }


class Perplexity(_BuiltIn):
    """The exponential of the mean negative log-likelihood (nats) of the predictions."""

    takes = "nll"
    about = "exp(mean of negative log-likelihoods in nats)."
    inputs = {"predictions": _NUMBER}

    def _compute(self, predictions: Any) -> dict[str, float]:
        return {"perplexity": perplexity(float(np.mean(predictions)))}


class Agreement(_BuiltIn):
    """Share of positions where two models predict the same class; the order of the two does not matter."""

    about = "Share of positions where two models predict the same class, in [0, 1]."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"agreement": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class CalibrationError(_BuiltIn):
    """Expected calibration error of the top class over 15 bins of equal width (Guo et al. 2017, eq. 3)."""

    takes = "probabilities"
    about = "Mean over 15 confidence bins of |accuracy - confidence|, weighted by their rows; in [0, 1]."
    inputs = {"predictions": datasets.List(_NUMBER), "references": _CLASS}

    def _compute(self, predictions: Any, references: Any, bins: int = 15) -> dict[str, float]:
        probabilities = np.asarray(predictions, dtype=np.float64)
        confidence, right = probabilities.max(-1), probabilities.argmax(-1) == np.asarray(references)
        # Bins are open on the left: a confidence of exactly 1 / 2 belongs to the lower of its two bins.
        which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        gaps = np.bincount(which, weights=right - confidence, minlength=bins)
        return {"expected_calibration_error": float(np.abs(gaps).sum() / len(confidence))}


class SpanF1(_BuiltIn):
    """F1 of the tokens of predicted and true spans, mean over rows, and the share of equal spans.

    A span is `[first, last]`, last included. Counted in the model's tokens, so that no text is needed: close
    to, not the same as, SQuAD's figures, which compare words after normalising them.
    """

    takes = "spans"
    about = "Mean F1 of the tokens of two spans, and share of exact matches; in [0, 1]."
    inputs = {"predictions": datasets.List(_CLASS), "references": datasets.List(_CLASS)}

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        ours, theirs = np.asarray(predictions), np.asarray(references)
        first, last = np.maximum(ours[:, 0], theirs[:, 0]), np.minimum(ours[:, 1], theirs[:, 1])
        common = np.maximum(last - first + 1, 0)
        tokens = (ours[:, 1] - ours[:, 0] + 1) + (theirs[:, 1] - theirs[:, 0] + 1)
        return {
            "span_f1": float(np.mean(2 * common / tokens)),
            "exact_match": float(np.mean((ours == theirs).all(-1))),
        }


class MeanSquaredError(_BuiltIn):
    """Mean squared error."""

    takes = "numbers"
    about = "Mean of squared differences."
    inputs = {"predictions": _NUMBER, "references": _NUMBER}

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"mse": float(np.mean((np.asarray(predictions) - np.asarray(references)) ** 2))}


class Pearson(MeanSquaredError):
    """Pearson's correlation; NaN where one side is constant."""

    about = "Pearson's linear correlation, in [-1, 1]."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"pearson": _correlation(np.asarray(predictions), np.asarray(references))}


class Spearman(MeanSquaredError):
    """Spearman's rank correlation, ties sharing their mean rank; NaN where one side is constant."""

    about = "Pearson's correlation of ranks, in [-1, 1]."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from scipy.stats import rankdata

        return {"spearman": _correlation(rankdata(predictions), rankdata(references))}


BUILT_IN: dict[str, type[_BuiltIn]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "entity_f1": EntityF1,
    "seqeval": EntityF1,
    "perplexity": Perplexity,
    "agreement": Agreement,
    "expected_calibration_error": CalibrationError,
    "span_f1": SpanF1,
    "mse": MeanSquaredError,
    "pearson": Pearson,
    "spearman": Spearman,
}


def load_metric(name: str, config_name: str | None = None) -> evaluate.EvaluationModule:
    """A built-in metric by name, or whatever `evaluate` finds under that name (a local script, the Hub).

    Raises:
        ValueError: If the name is not built in and `evaluate` cannot load it; says why.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](config_name)
    try:
        return evaluate.load(name, config_name)
    except Exception as error:  # evaluate raises whatever the network, the script or an import raised
        built_in = ", ".join(sorted(BUILT_IN))
        raise ValueError(
            f"metrics: {name!r} is not built in{nearest(name, BUILT_IN)} and evaluate cannot load it "
            f"({type(error).__name__}: {error}). Check the name and the network, or use one of {built_in}"
        ) from error


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token; infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Entities of one row of IOB2 (or BIOES, BILOU) tags as (type, first, last), last included."""
    kind: str | None = None
    first = 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind is not None and not (prefix in _INSIDE and kind == name):
            yield kind, first, i - 1
            kind = None
        if prefix in _INSIDE + _STARTS and kind is None:
            kind, first = name, i


def are_entity_tags(names: Sequence[str] | None) -> bool:
    """Whether label names are tags that mark entities: `O`, and others with a prefix such as `B-`."""
    marked = [name for name in names or () if name.partition("-")[0] in _INSIDE + _STARTS and "-" in name]
    return bool(marked) and len(marked) >= len(names or ()) - 1


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / norm) if norm > 0 else math.nan
