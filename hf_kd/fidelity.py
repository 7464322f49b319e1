"""What can't be had from a sparse teacher, found before step 0 and refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .targets import sparse_problems
from .teachers.signal import SparseSignal

if TYPE_CHECKING:
    from .findings import Report
    from .trainer import DistillationTrainer

#: Divergences that may be taken with all unseen classes as one. Merging classes only lowers them (data
#: processing inequality); `alpha_beta` stays what it is, a divergence, between the merged distributions.
MERGEABLE = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
    "alpha_beta",
)
#: Mass of a tail that may be anywhere: a student with a trimmed vocabulary has no better use of it.
_LITTLE = 0.01


def check_sparse(
    trainer: DistillationTrainer, signal: SparseSignal, weight: Tensor, classes: int, report: Report
) -> None:
    """Add every option that a sparse signal can't serve to the report.

    Args:
        trainer: The run.
        signal: The teacher's answer to the first batch.
        weight: `[P]` how much each position counts.
        classes: The student's.
        report: Where problems go.
    """
    args, objective = trainer.args, trainer.objective
    report.sparse = True
    kept = -torch.expm1(signal.log_tail.double()[weight > 0]).mean()
    report.facts.append(
        (
            "teacher's signal",
            f"sparse, {signal.ids.shape[-1]} entries at T = {signal.temperature:g}, "
            f"{'with' if signal.has_draws else 'without'} draws; its mass on the certain ones {kept:.3g}",
        )
    )
    name = objective.divergence_name or getattr(objective.divergence, "__name__", "the given function")
    if name not in MERGEABLE:
        report.add(
            "divergence",
            f"divergence={name!r} compares whole rows of classes, but the teacher's signal is sparse. Choose "
            f"one of {', '.join(MERGEABLE)}, or a teacher that gives logits or hidden states.",
        )
    for option, message in sparse_problems(args):
        report.add(option, message)
    for option, value in _temperatures(trainer).items():
        if value == "auto":
            report.add(
                option,
                f"{option}='auto' looks for a temperature, but the teacher's sparse signal is at "
                f"{signal.temperature:g}; set {option}={signal.temperature:g}.",
            )
        elif isinstance(value, float | int) and value != signal.temperature:
            report.add(
                option,
                f"{option}={value:g}, but the teacher's sparse signal is at temperature "
                f"{signal.temperature:g}, and a few entries can't be brought to another one. Set "
                f"{option}={signal.temperature:g}, or make the signal at {value:g}.",
            )
    _check_estimator(trainer, signal, weight, name, report)
    if args.kl_threshold is not None:
        report.add(
            "kl_threshold",
            f"kl_threshold={args.kl_threshold} is compared with eval_kl, but a sparse signal gives only a "
            "lower bound (eval_kl_tail) and an estimate (eval_kl_draws). Remove it, or evaluate with a "
            "teacher that gives logits or hidden states.",
        )
    if args.metric_for_best_model in ("kl", "eval_kl", "teacher_entropy", "eval_teacher_entropy"):
        report.add(
            "metric_for_best_model",
            f"metric_for_best_model={args.metric_for_best_model!r} is not known of a sparse teacher; set "
            "'loss', 'kl_tail', or 'kl_draws' if it has draws.",
        )
    if objective.classes.kept:
        _check_trimmed(args.sparse_estimator, signal, weight, name, report)
    _check_ids(trainer, signal, classes, report)


def _temperatures(trainer: DistillationTrainer) -> dict[str, float | str]:
    """Every temperature that the teacher's softmax takes in a run, by the option that says so."""
    args = trainer.args
    if args.teacher_temperature is not None:
        return {"teacher_temperature": args.teacher_temperature}
    end = {} if args.temperature_end is None else {"temperature_end": args.temperature_end}
    return {"temperature": args.temperature, **end}


def _check_estimator(
    trainer: DistillationTrainer, signal: SparseSignal, weight: Tensor, divergence: str, report: Report
) -> None:
    """Whether the tail can be read as the option says."""
    wanted = trainer.args.sparse_estimator
    if wanted == "draws" and not signal.has_draws:
        report.add(
            "sparse_estimator",
            "sparse_estimator='draws', but the teacher's sparse signal has no draws from the tail; set "
            "sparse_estimator='tail', or store draws.",
        )
    if wanted == "draws" and divergence != "forward_kl":
        report.add(
            "sparse_estimator",
            f"sparse_estimator='draws' has no unbiased estimate of divergence={divergence!r}; set "
            "divergence='forward_kl', or sparse_estimator='tail'.",
        )
    if wanted == "tail" or signal.log_tau is None or divergence != "forward_kl":
        return
    if wanted == "auto" and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        report.add(
            "sparse_estimator",
            "sparse_estimator='auto' measures gradients of whole parameters, which FSDP and DeepSpeed keep "
            "in pieces; set sparse_estimator='draws' (a student far from its teacher) or 'tail'.",
        )
    unseen = torch.isneginf(signal.log_tau) & ~torch.isneginf(signal.log_tail)
    if bool((unseen & (weight > 0)).any()):
        report.add(
            "sparse_estimator",
            f"sparse_estimator={wanted!r}, but the teacher's sparse signal has positions with a tail of "
            "which nothing was drawn (log_tau is -inf there); set sparse_estimator='tail'.",
        )


def _check_trimmed(estimator: str, signal: SparseSignal, weight: Tensor, name: str, report: Report) -> None:
    """Draws show how much of a tail is on tokens that a trimmed vocabulary lacks; its mass does not."""
    tail = float(signal.log_tail.double()[weight > 0].exp().mean())
    if (estimator != "tail" and signal.has_draws and name == "forward_kl") or tail <= _LITTLE:
        return
    report.add(
        "sparse_estimator",
        f"teacher: {tail:.2g} of its mass is in the tail of its sparse signal, which does not say how much "
        "of that is on tokens that the student's trimmed vocabulary lacks. Read draws "
        "(sparse_estimator='draws' with divergence='forward_kl'), or give the teacher as a model, or a cache "
        "made with --cache_fidelity hidden or logits, or with so many entries that the tail has "
        f"{_LITTLE:g} or less.",
    )


def _check_ids(trainer: DistillationTrainer, signal: SparseSignal, classes: int, report: Report) -> None:
    known = trainer.objective.classes
    limit = len(known.order) if known.order is not None else classes
    largest = int(signal.ids.max()) if signal.ids.numel() else -1
    if largest >= limit and not known.drops:
        report.add(
            "teacher",
            f"teacher: its sparse signal has class {largest}, but the student has {limit} classes; give both "
            "the same labels or tokenizer.",
        )
    values: Tensor = signal.log_probs[signal.ids >= 0]
    if bool((values.isnan() | (values > 1e-3)).any()):
        report.add(
            "teacher",
            "teacher: the log-probabilities of its sparse signal are NaN or above 0; give "
            "log_softmax(logits / T).",
        )
