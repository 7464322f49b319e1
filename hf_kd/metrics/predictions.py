"""`compute_metrics` functions made of metrics: what Trainer hands over, brought to what a metric takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

from hf_kd.metrics.builtin import BUILT_IN, are_entity_tags, load_metric

IGNORE = -100
Compute = Callable[[EvalPrediction], dict[str, float]]

#: What is measured by default, by task; the first ranks models. Language models are ranked by their loss.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "sequence-classification": ("accuracy", "f1"),
    "image-classification": ("accuracy", "f1"),
    "audio-classification": ("accuracy", "f1"),
    "multiple-choice": ("accuracy",),
    "next-sentence": ("accuracy",),
    "token-classification": ("entity_f1",),
    "question-answering": ("span_f1",),
    "masked-lm": ("perplexity",),
    "causal-lm": ("perplexity",),
    "seq2seq-lm": ("perplexity",),
    "regression": ("pearson", "spearman", "mse"),
}
#: Metrics for which less is better.
LOWER_IS_BETTER = ("loss", "perplexity", "mse", "expected_calibration_error")


def default_metrics(
    task: str, problem_type: str | None = None, label_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Names of what is measured for a task when nothing is asked for; the first one ranks models."""
    if task == "token-classification" and not are_entity_tags(label_names):
        return ("accuracy", "f1")
    return DEFAULTS.get("regression" if problem_type == "regression" else task, ())


def make_compute_metrics(
    names: Sequence[str],
    task: str,
    *,
    problem_type: str | None = None,
    label_names: Sequence[str] | None = None,
    allowed: Callable[[Any], np.ndarray | None] | None = None,
) -> Compute | None:
    """A `compute_metrics` for Trainer. Positions labelled -100 (NaN for numbers) are left out.

    Perplexity is not computed here: it is `perplexity(eval_loss)`, which needs no logits kept.

    Args:
        names: Metrics, built in or of the Hub. Those of the Hub get `predictions` and `references` as
            classes, or as numbers where the problem is a regression.
        task: A key of `hf_kd.tasks.TASKS`.
        problem_type: Kind of classification, as in Transformers.
        label_names: Names of the classes; needed where entities are counted.
        allowed: For question answering, gives the tokens `[N, L]` that an answer may consist of for the
            labels of an evaluation, or None where they are not known.

    Returns:
        A function of an `EvalPrediction`, whose values are floats by metric name, or None if nothing needs
        predictions.

    Raises:
        ValueError: If a metric is unknown or does not fit the task.
    """
    wanted = [name for name in names if name not in ("perplexity", "loss")]
    if not wanted:
        return None
    forms = _forms(task, problem_type, label_names)
    several = "multilabel" if problem_type == "multi_label_classification" else None
    modules = [load_metric(name, several if name in BUILT_IN else None) for name in wanted]
    takes = [getattr(module, "takes", forms[0]) for module in modules]
    takes = ["labels" if several and form == "classes" else form for form in takes]
    for name, form in zip(wanted, takes, strict=True):
        if form not in forms:
            ours = "classes" if forms == ("labels",) else forms
            fit = [known for known, kind in BUILT_IN.items() if kind.takes in ours]
            raise ValueError(
                f"metrics: {name!r} takes {form}, and {task} with problem_type={problem_type} and "
                f"{len(label_names or ())} label names gives {' and '.join(forms)}: use {', '.join(fit)}"
            )

    return _Computed(modules, takes, task, label_names, allowed)


class _Computed:
    """What `make_compute_metrics` returns."""

    def __init__(self, modules: Sequence[Any], takes: Sequence[str], *about: Any) -> None:
        self.modules, self.takes, self.about = modules, takes, about

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        return self._values(prediction, lambda module, found: module.compute(**found))

    def resamples(
        self, prediction: EvalPrediction, draws: Iterable[np.ndarray]
    ) -> Iterator[dict[str, float]]:
        """The metrics of each draw `[N]` of row numbers.

        What is built in is computed from the arrays, without the tables of `evaluate`, and where it is made
        of counts a row, from these.
        """
        counted = {m: self._counts(m, prediction) for m in self.modules if hasattr(m, "count")}

        def again(module: Any, found: dict[str, Any]) -> dict[str, Any]:
            if type(module) not in BUILT_IN.values():
                return module.compute(**found)
            return getattr(module, "again", module._compute)(**found)

        for rows in draws:
            values: dict[str, Any] = {}
            for module, counts in counted.items():
                values.update(module.of_counts(counts[rows].sum(0)))
            rest = [module for module in self.modules if module not in counted]
            yield values | (self._values(take(prediction, rows), again, rest) if rest else {})

    def _values(
        self,
        prediction: EvalPrediction,
        compute: Callable[[Any, dict[str, Any]], dict[str, Any] | None],
        modules: Sequence[Any] | None = None,
    ) -> dict[str, float]:
        if prediction.label_ids is None:
            return {}
        values: dict[str, Any] = {}
        views: dict[str, Any] = {}
        for module, form in zip(self.modules, self.takes, strict=True):
            if modules is not None and module not in modules:
                continue
            if form not in views:
                views[form] = _VIEWS[form](prediction, *self.about)
            predictions, references = views[form]
            if len(references) > 0:
                values.update(compute(module, {"predictions": predictions, "references": references}) or {})
        return {key: float(value) for key, value in values.items() if np.ndim(value) == 0}

    def _counts(self, module: Any, prediction: EvalPrediction) -> np.ndarray:
        """`[N, K]` counts of a metric in each row."""
        form = self.takes[self.modules.index(module)]
        rows = range(len(_first(prediction.label_ids)))
        seen = [_VIEWS[form](take(prediction, np.array([row])), *self.about) for row in rows]
        return np.array([module.count(*row) for row in seen], dtype=np.int64)


def take(seen: EvalPrediction, rows: np.ndarray) -> EvalPrediction:
    """Some rows of predictions and labels, arrays `[N, ...]` or nested tuples of them."""
    return EvalPrediction(predictions=_take(seen.predictions, rows), label_ids=_take(seen.label_ids, rows))


def _take(values: Any, rows: np.ndarray) -> Any:
    if isinstance(values, tuple | list):
        return type(values)(_take(value, rows) for value in values)
    return values[rows]


def keep_top_class(logits: Any, labels: Any) -> Any:
    """`preprocess_logits_for_metrics` that keeps the most likely class, `[..., C]` to `[...]`.

    A language model's logits are a vocabulary wide for every token; kept until the end of an evaluation they
    fill the memory. `make_compute_metrics` takes both forms.
    """
    first = logits[0] if isinstance(logits, tuple | list) else logits
    return first.argmax(-1)


def best_spans(
    start: np.ndarray, end: np.ndarray, allowed: np.ndarray | None = None, max_tokens: int = 30
) -> np.ndarray:
    """The most likely span of each row: first and last token, `[N, 2]`.

    Args:
        start: Logits `[N, L]` of the first token.
        end: Logits `[N, L]` of the last token.
        allowed: Tokens `[N, L]` that an answer may consist of; None for all.
        max_tokens: Longest answer.
    """
    rows, length = start.shape
    inside = np.ones((rows, length), dtype=bool) if allowed is None else allowed.astype(bool)
    best, span = np.full(rows, -np.inf), np.zeros((rows, 2), dtype=np.int64)
    whole = inside.copy()
    for extra in range(min(max_tokens, length)):
        firsts = length - extra
        whole = whole[:, :firsts] & inside[:, extra:]
        scores = np.where(whole, start[:, :firsts] + end[:, extra:], -np.inf)
        first = scores.argmax(-1)
        score = scores[np.arange(rows), first]
        better = score > best
        best = np.where(better, score, best)
        span[better] = np.stack([first, first + extra], -1)[better]
    return span


def _forms(task: str, problem_type: str | None, label_names: Sequence[str] | None) -> tuple[str, ...]:
    """What predictions of a task can be brought to; the first is what metrics of the Hub get."""
    if task == "question-answering":
        return ("spans",)
    if problem_type == "regression":
        return ("numbers",)
    if problem_type == "multi_label_classification":
        return ("labels",)
    if task.endswith("-lm"):
        return ("classes",)
    if task == "token-classification" and label_names is not None:
        return ("classes", "probabilities", "tags")
    return ("classes", "probabilities")


def _classes(prediction: EvalPrediction, task: str, *_: Any) -> tuple[Any, Any]:
    scores, labels, kept = _aligned(prediction, task)
    classes = scores.argmax(-1) if scores.ndim > labels.ndim else scores
    return classes[kept], labels[kept]


def _probabilities(prediction: EvalPrediction, task: str, *_: Any) -> tuple[Any, Any]:
    scores, labels, kept = _aligned(prediction, task)
    logits = scores[kept].astype(np.float64)
    shifted = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(-1, keepdims=True), labels[kept]


def _tags(prediction: EvalPrediction, task: str, names: Sequence[str], *_: Any) -> tuple[Any, Any]:
    scores, labels, kept = _aligned(prediction, task)
    classes = scores.argmax(-1) if scores.ndim > labels.ndim else scores
    rows = [i for i, row in enumerate(kept) if row.any()]
    named = [[[names[c] for c in side[i][kept[i]]] for i in rows] for side in (classes, labels)]
    return named[0], named[1]


def _labels(prediction: EvalPrediction, *_: Any) -> tuple[Any, Any]:
    logits, labels = _first(prediction.predictions), _first(prediction.label_ids)
    kept = (labels != IGNORE).all(-1)
    return (logits[kept] > 0).astype(np.int64), labels[kept].astype(np.int64)


def _numbers(prediction: EvalPrediction, *_: Any) -> tuple[Any, Any]:
    values = _first(prediction.predictions).reshape(-1)
    labels = _first(prediction.label_ids).reshape(-1)
    kept = ~np.isnan(labels)
    return values[kept], labels[kept]


def _spans(
    prediction: EvalPrediction, _task: str, _names: Any, allowed: Callable[[Any], np.ndarray | None] | None
) -> tuple[Any, Any]:
    logits: Any = prediction.predictions
    start, end = np.asarray(logits[0]), np.asarray(logits[1])
    true = np.stack([np.asarray(side) for side in prediction.label_ids[:2]], -1)
    inside = allowed(prediction.label_ids) if allowed is not None else None
    if inside is not None:
        width = start.shape[1] - inside.shape[1]
        inside = np.pad(inside, ((0, 0), (0, max(width, 0))))[:, : start.shape[1]]
    kept = (true >= 0).all(-1)
    return best_spans(start, end, inside)[kept], true[kept]


_VIEWS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "classes": _classes,
    "probabilities": _probabilities,
    "tags": _tags,
    "labels": _labels,
    "numbers": _numbers,
    "spans": _spans,
}


def _aligned(prediction: EvalPrediction, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits or classes, labels, and which labels count; a causal model's position i predicts label i + 1."""
    scores, labels = _first(prediction.predictions), _first(prediction.label_ids)
    if task == "causal-lm":
        scores, labels = scores[:, :-1], labels[:, 1:]
    return scores, labels, labels != IGNORE


def _first(values: Any) -> np.ndarray:
    return np.asarray(values[0] if isinstance(values, tuple | list) else values)
