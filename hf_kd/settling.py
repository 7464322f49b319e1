"""What of the target is measured before training: temperature, calibration, and weights of an ensemble."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .answers import answer, logits_of, pick
from .matching import first_eval_dataset
from .objective import select
from .records import read_record, write_record
from .sample import sample_batches
from .teachers.ensemble import Ensemble, learned_weights
from .teachers.signal import SparseSignal

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)

TARGET_FILE = "target.json"
#: What `temperature="auto"` aims at: the mean mass that the teacher leaves to all classes but the likeliest.
NON_TOP_MASS = 0.2
#: Where it looks.
AUTO_RANGE = (1.0, 10.0)
_CALIBRATION_RANGE = (0.05, 20.0)
_MOST_POSITIONS = 8192
_MOST_VALUES = 1 << 26
_MOST_BATCHES = 256
_BINS = 15


@dataclass(frozen=True)
class Settled:
    """What was measured; a run that is resumed keeps it.

    Attributes:
        temperature: Of `temperature="auto"`; None: the option says it.
        calibration: What the teacher's logits are divided by, besides the temperature.
        weights: Of the teachers, where they are learned.
    """

    temperature: float | None = None
    calibration: float = 1.0
    weights: list[float] | None = None

    def apply(self, teacher: Any) -> Settled:
        """Give an ensemble its weights."""
        if self.weights is not None and isinstance(teacher, Ensemble):
            teacher.weights = torch.tensor(self.weights, dtype=torch.float64)
        return self

    def save(self, folder: Path) -> None:
        """Record it in a checkpoint."""
        write_record(folder / TARGET_FILE, self)

    @staticmethod
    def load(folder: Path) -> Settled | None:
        """What a checkpoint recorded, if it did."""
        return read_record(folder / TARGET_FILE, Settled)


def settle(trainer: DistillationTrainer) -> Settled:
    """Measure what the options leave to be measured, say it once, and put it in force.

    Weights first, then the calibration of the weighted teacher, then the temperature of the calibrated one.
    Labels come from the evaluation data; the temperature alone is content with training rows. Every rank
    measures the same rows.

    Raises:
        ValueError: If there are no labelled evaluation rows where they are needed, or the signal is sparse.
    """
    args, teacher = trainer.args, trainer.teacher
    weights, calibration, temperature = None, 1.0, None
    if args.ensemble_weighting == "learned" and isinstance(teacher, Ensemble) and teacher.routes is None:
        weights = learned_weights(_log_likelihoods(trainer, teacher)).tolist()
        teacher.weights = torch.tensor(weights, dtype=torch.float64)
        logger.warning("ensemble_weighting='learned': weights %s.", [round(w, 4) for w in weights])
    if args.teacher_calibration:
        logits, labels = teacher_logits(trainer, _validation(trainer, "teacher_calibration=True"))
        known = labels >= 0
        if not bool(known.any()):
            raise ValueError("teacher_calibration=True needs labels in eval_dataset; it has none.")
        before, after = logits[known], labels[known]
        calibration = fit_temperature(before, after)
        logger.warning(
            "teacher_calibration: the teacher's logits are divided by %.4g (its loss on %d validation labels "
            "%.4g -> %.4g, ECE %.3g -> %.3g).",
            calibration,
            len(after),
            F.cross_entropy(before, after),
            F.cross_entropy(before / calibration, after),
            calibration_error(before, after),
            calibration_error(before / calibration, after),
        )
    if args.temperature == "auto":
        dataset = first_eval_dataset(trainer)
        logits, _ = teacher_logits(trainer, trainer.train_dataset if dataset is None else dataset)
        temperature = auto_temperature(logits / calibration)
        logger.warning(
            "temperature='auto' takes %.4g: the teacher leaves %.3g of its mass to classes but the likeliest "
            "there (%.3g at T = 1).",
            temperature,
            non_top_mass(logits / calibration, temperature),
            non_top_mass(logits / calibration, 1.0),
        )
    return Settled(temperature=temperature, calibration=calibration, weights=weights)


def needs_settling(trainer: DistillationTrainer) -> bool:
    """Whether anything is to be measured."""
    args = trainer.args
    learned = args.ensemble_weighting == "learned" and isinstance(trainer.teacher, Ensemble)
    return trainer.distils and (args.temperature == "auto" or args.teacher_calibration or learned)


# ---- rules ----


def auto_temperature(logits: Tensor) -> float:
    """The rule of `temperature="auto"`.

    The smallest T in `AUTO_RANGE` at which the mean of `1 - max_c softmax(t / T)_c` reaches `NON_TOP_MASS`;
    the upper end if none does. The mass grows with T at each position, so bisection finds it. A confident
    classifier is softened until its mistakes show, a language model that is unsure anyway stays at T = 1.

    Args:
        logits: `[N, C]` teacher logits.
    """
    low, high = AUTO_RANGE
    if non_top_mass(logits, low) >= NON_TOP_MASS:
        return low
    if non_top_mass(logits, high) < NON_TOP_MASS:
        return high
    return _bisect(lambda t: non_top_mass(logits, t) - NON_TOP_MASS, low, high)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The c that minimises the cross-entropy of `softmax(logits / c)` (temperature scaling, Guo et al. 2017).

    The cross-entropy is convex in `1 / c`, so its derivative `mean(E_p[t] - t_label)` grows with it and is
    bisected in float64. A teacher that is never wrong has no finite optimum: c is within [0.05, 20].

    Args:
        logits: `[N, C]`.
        labels: `[N]` classes.
    """
    t = logits.double()
    t = t - t.amax(-1, keepdim=True)
    label = t.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    finite = t.masked_fill(t.isneginf(), 0.0)

    def slope(beta: float) -> float:
        return float((((t * beta).softmax(-1) * finite).sum(-1) - label).mean())

    low, high = 1 / _CALIBRATION_RANGE[1], 1 / _CALIBRATION_RANGE[0]
    if slope(low) >= 0:
        return 1 / low
    if slope(high) <= 0:
        return 1 / high
    return 1 / _bisect(slope, low, high)


def non_top_mass(logits: Tensor, temperature: float) -> float:
    """Mean probability of all classes but the likeliest, at a temperature."""
    return float((1.0 - (logits.double() / temperature).softmax(-1).amax(-1)).mean())


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error with 15 bins of equal width (Guo et al. 2017), from 0 to 1."""
    sure, top = logits.double().softmax(-1).max(-1)
    place = (sure * _BINS).ceil().long().clamp(1, _BINS) - 1
    gap = torch.zeros(_BINS, dtype=torch.float64)
    gap.index_add_(0, place, (top == labels).double() - sure)
    return float(gap.abs().sum() / max(len(labels), 1))


def mean_entropy(logits: Tensor, temperature: float) -> float:
    """Mean entropy of `softmax(logits / T)`, nats."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    return float(-(log_p.exp() * log_p.clamp_min(-1e300)).sum(-1).mean())


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


# ---- what they are measured on ----


def describe_target(trainer: DistillationTrainer) -> list[tuple[str, str]]:
    """The teacher on some validation rows (else training rows), as facts for a report."""
    if trainer.teacher is None or not trainer.distils or trainer.objective.task.kind != "classes":
        return []
    if trainer.objective.classes.unlike:
        return []
    dataset = first_eval_dataset(trainer)
    logits, labels = teacher_logits(trainer, trainer.train_dataset if dataset is None else dataset)
    known = labels >= 0
    where = f"on {len(labels):,} {'training' if dataset is None else 'validation'} positions"
    facts = []
    if bool(known.any()):
        right = float((logits[known].argmax(-1) == labels[known]).double().mean())
        error, best = (
            calibration_error(logits[known], labels[known]),
            fit_temperature(logits[known], labels[known]),
        )
        score = f"accuracy {right:.4g}, loss {F.cross_entropy(logits[known], labels[known]):.4g} {where}"
        facts.append(("teacher's own score", score))
        facts.append(
            (
                "teacher's calibration",
                f"ECE {error:.3g}; teacher_calibration would divide its logits by {best:.3g}",
            )
        )
    temperatures = (1, 2, 4, 8)
    entropies = ", ".join(f"{mean_entropy(logits, t):.3g} at T = {t}" for t in temperatures)
    masses = ", ".join(f"{non_top_mass(logits, t):.3g} at T = {t}" for t in temperatures)
    facts.append(
        ("entropy of the target", f"{entropies} (nats; uniform {torch.tensor(logits.shape[-1]).log():.3g})")
    )
    facts.append(("its mass beside the likeliest class", masses))
    facts.append(("temperature='auto'", f"would take {auto_temperature(logits):.3g} (mass {NON_TOP_MASS:g})"))
    return facts


@torch.no_grad()
def teacher_logits(trainer: DistillationTrainer, dataset: Any) -> tuple[Tensor, Tensor]:
    """The teacher's logits `[N, C]` in the student's classes, and labels `[N]` (-1: none), of some rows.

    Raises:
        ValueError: If the teacher's signal is sparse, or no position is supervised.
    """
    assert trainer.teacher is not None
    found: list[Tensor] = []
    classes: list[Tensor] = []
    for batch in sample_batches(trainer, dataset, _MOST_BATCHES):
        supervision = trainer.task.supervise_batch(batch)
        index = select([supervision])[0].kd
        given = answer(trainer.teacher(trainer.pair.inputs(batch)), trainer.task, batch)
        if isinstance(given, SparseSignal):
            raise ValueError(
                "temperature='auto' and teacher_calibration read the teacher's logits, but its signal is "
                "sparse, at one temperature: set temperature to it, and teacher_calibration=False."
            )
        picked = pick(given, index)
        assert not isinstance(picked, SparseSignal)
        logits = trainer.objective.classes.teacher(logits_of(picked))
        found.append(logits.float().cpu())
        labels = trainer.objective._labels_of(supervision, index)
        none = torch.full((len(logits),), -1)
        classes.append(none if labels is None else labels.clamp_min(-1).long().cpu())
        count = sum(map(len, found))
        if count >= _MOST_POSITIONS or count * logits.shape[-1] >= _MOST_VALUES:
            break
    if not sum(map(len, found)):
        raise ValueError("temperature='auto': no position of the sampled rows is supervised; set a number.")
    return torch.cat(found), torch.cat(classes)


@torch.no_grad()
def _log_likelihoods(trainer: DistillationTrainer, ensemble: Ensemble) -> Tensor:
    """`[M, N]` log-probability of the validation labels under each teacher."""
    dataset = _validation(trainer, "ensemble_weighting='learned'")
    columns = []
    for batch in sample_batches(trainer, dataset, _MOST_BATCHES):
        supervision = trainer.task.supervise_batch(batch)
        index = select([supervision])[0].kd
        labels = trainer.objective._labels_of(supervision, index)
        if labels is None:
            break
        known = labels >= 0
        rows = []
        for logits in ensemble.answers(trainer.pair.inputs(batch)):
            moved = {name: values.movedim(-1, trainer.task.class_axis) for name, values in logits.items()}
            flat = pick(trainer.task.flat(moved, batch), index)
            assert isinstance(flat, Tensor)
            log_p = (flat[known].double() / ensemble.temperature).log_softmax(-1)
            rows.append(log_p.gather(-1, labels[known].unsqueeze(-1)).squeeze(-1).cpu())
        columns.append(torch.stack(rows))
        if sum(c.shape[1] for c in columns) >= _MOST_POSITIONS:
            break
    if not columns or not sum(c.shape[1] for c in columns):
        raise ValueError(
            "ensemble_weighting='learned' fits the weights to labels of eval_dataset, which has none at "
            "single positions; give ensemble_weights, or ensemble_weighting='confidence'."
        )
    return torch.cat(columns, dim=1)


def _validation(trainer: DistillationTrainer, option: str) -> Any:
    dataset = first_eval_dataset(trainer)
    if dataset is None:
        raise ValueError(f"{option} is fitted to validation labels, but eval_dataset is None; give one.")
    return dataset
