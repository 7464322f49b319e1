r"""Whether a sparse teacher is read by its tail's mass or by its draws: measured where training starts.

The tail bucket's gradient G_T is exact but biased: it says nothing about the classes in the tail. The draws'
gradient G_D is right on average but noisy. What matters is the angle to the full gradient G, which a sparse
signal does not show, but whose products can be estimated without bias:

    <G_T, G> = E <G_T, G_D>            the certain entries are no random choice: G_T is a constant
    |G|^2 = E |G_D|^2 - sigma^2        sigma^2 = E |G_D - G|^2
    sigma^2 = E |R|^2                  R: the gradient with the weights s_i sqrt(tau (tau - p_i)) for
                                       each draw, s_i = +1 or -1 at random, 0 for certain entries

The last line: a class drawn with probability `p / tau` at weight tau has the variance `p (tau - p)`, of which
`tau (tau - p)` in each draw is the estimate of Horvitz and Thompson (1952); the signs make products between
classes vanish on average, so that |R|^2 sums the variances in the space of the parameters.

The draws may be controlled (`SparseTeacher.control`, c below), which turns each weight w into w (1 - c q / p)
and leaves their mean as it is. So G_D and R are linear in c, as (1 - c) of that at 0 and c of that at 1, and
sigma^2 is least at

    c = <R_0, R_0 - R_1> / |R_0 - R_1|^2.

A student from scratch gets a c near 0, one near its teacher a c near 1. With G_D and sigma at that c,

    cos(tail) = <G_T, G_D> / (|G_T| |G|),    tan(draws) = sigma / |G|.

Noise falls with the number of positions that are averaged, bias does not: both angles are given for a
gradient over 2,048 positions. Draws made together (a fixed number per position) vary less than is assumed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .fusing import HiddenStudent
from .losses.tiles import SparseTeacher
from .objective import Counts, Objective, select
from .records import read_record, write_record
from .sample import sample_batches
from .teachers.signal import SparseSignal

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)

ESTIMATOR_FILE = "sparse_estimator.json"
#: Positions that a gradient is taken to be averaged over.
HORIZON = 2048
_MOST_BATCHES = 32
# Gradients of more parameters than these, from the last ones on, are not compared: seven of them are held.
_MOST_PARAMETERS = 1 << 27
_SIGNS = 2
# A control that takes away less of the noise is none: it is not worth the classes that it leaves out.
_LEAST_GAIN = 0.1


@dataclass(frozen=True)
class Estimator:
    """How a sparse signal is read, and why.

    Attributes:
        name: "tail" or "draws".
        angle_tail: Degrees between the gradient with the tail's mass and the full one; None: not measured.
        angle_draws: The same of the draws, over `HORIZON` positions.
        positions: What it was measured on.
        control: Of the draws: see `SparseTeacher`.
    """

    name: str
    angle_tail: float | None = None
    angle_draws: float | None = None
    positions: int = 0
    control: float = 0.0

    def apply(self, objective: Objective) -> Objective:
        """The same objective, reading signals this way."""
        draws = partial(SparseSignal.draws, control=self.control) if self.control else SparseSignal.draws
        readings = {"tail": SparseSignal.tail, "draws": draws}
        return replace(objective, estimator=readings[self.name])

    def save(self, folder: Path) -> None:
        """Record the choice in a checkpoint."""
        write_record(folder / ESTIMATOR_FILE, self)

    @staticmethod
    def load(folder: Path) -> Estimator | None:
        """The choice of a checkpoint, if it has one."""
        return read_record(folder / ESTIMATOR_FILE, Estimator)


def settle(trainer: DistillationTrainer) -> Estimator:
    """The estimator of a run whose teacher is sparse: the option's, or the one with the smaller angle."""
    if trainer.args.sparse_estimator != "auto":
        return Estimator(trainer.args.sparse_estimator)
    if trainer.objective.divergence_name != "forward_kl":
        return Estimator("tail")  # draws have no unbiased estimate of other divergences
    if any(hasattr(p, "ds_id") for p in trainer.student.parameters()):
        raise ValueError(
            "sparse_estimator='auto' compares whole gradients, which ZeRO-3 never holds: set "
            "sparse_estimator='tail' or 'draws'."
        )
    measured = measure(trainer)
    if measured is None:
        logger.warning(
            "sparse_estimator='auto' takes 'tail': the teacher's signal has no unbiased draws (log_tau), "
            "only the likeliest classes and the mass of all others."
        )
        return Estimator("tail")
    logger.warning(
        "sparse_estimator='auto' takes %r: over %d positions its gradient is nearer to the full one (tail "
        "%.1f degrees, draws with control %.2g %.1f; measured on %d positions).",
        measured.name,
        HORIZON,
        measured.angle_tail,
        measured.control,
        measured.angle_draws,
        measured.positions,
    )
    assert measured.angle_tail is not None and measured.angle_draws is not None
    angles_found = {"sparse_angle_tail": measured.angle_tail, "sparse_angle_draws": measured.angle_draws}
    trainer.log({**angles_found, "sparse_control": measured.control})
    return measured


def measure(trainer: DistillationTrainer) -> Estimator | None:
    """Both angles on some training batches, in evaluation mode; None if the signal has no draws."""
    student, training = trainer.student, trainer.student.training
    parameters = _parameters(student)
    readings: list[Callable[[SparseSignal], SparseTeacher]] = [SparseSignal.tail, SparseSignal.draws]
    readings.append(partial(SparseSignal.draws, control=1.0))
    for sign in range(_SIGNS):
        # The same signs without control and with it.
        seeds = [torch.Generator().manual_seed(_SIGNS * trainer.args.seed + sign) for _ in range(2)]
        readings += [partial(random_signs, generator=g, control=float(c)) for c, g in enumerate(seeds)]
    sums = [[torch.zeros_like(p, dtype=torch.float32) for p in parameters] for _ in readings]
    positions = 0.0
    student.eval()
    try:
        for batch in sample_batches(trainer, trainer.train_dataset, _MOST_BATCHES):
            with trainer.compute_loss_context_manager():
                found = _gradients(trainer, batch, parameters, readings)
            if found is None:
                return None
            for total, gradients in zip(sums, found, strict=True):
                torch._foreach_add_(total, [g.float() for g in gradients])
            positions += float((trainer.task.supervise_batch(batch).kd_weight > 0).sum())
            if positions >= HORIZON:
                break
    finally:
        student.train(training)
    values = products(sums[0], (sums[1], sums[2]), list(zip(sums[3::2], sums[4::2], strict=True)))
    return angles(trainer.accelerator.reduce(values, reduction="mean"), int(positions))


Gradient = list[Tensor]


def products(
    tail: Gradient, draws: tuple[Gradient, Gradient], signs: list[tuple[Gradient, Gradient]]
) -> Tensor:
    """What `angles` is told, of gradients at control 0 and 1.

    Returns:
        `|G_T|^2`; `<G_T, G_D>` of both; `|G_D|^2` at 0, the product of both, `|G_D|^2` at 1; the same of R.
    """
    values = [_product(tail, tail), *(_product(tail, one) for one in draws)]
    for pairs in ([draws], signs):
        squares = [torch.stack([_product(a, a), _product(a, b), _product(b, b)]) for a, b in pairs]
        values += [*torch.stack(squares).mean(0)]
    return torch.stack(values)


def random_signs(signal: SparseSignal, *, generator: torch.Generator, control: float = 0.0) -> SparseTeacher:
    """What the draws add to the gradient by chance: weights whose gradient has the variance of theirs."""
    draws = signal.draws(control)
    assert signal.log_tau is not None
    log_tau = signal.log_tau.unsqueeze(-1)
    spread = (2 * log_tau).exp() - (log_tau + signal.log_probs).exp()
    signs = 2 * torch.randint(0, 2, signal.ids.shape, generator=generator).to(spread.device) - 1
    weights = signs * spread.clamp_min(0).sqrt()
    return replace(draws, weights=weights.masked_fill(~signal.drawn | (signal.ids < 0), 0.0))


def angles(sums: Tensor, positions: int) -> Estimator:
    """The choice, from gradients summed over some positions.

    Args:
        sums: The nine of `products`.
        positions: How many.
    """
    tail, both_0, both_1, *squares = sums.tolist()
    noise_0, noise_01, noise_1 = squares[3:]
    taken = noise_0 - 2 * noise_01 + noise_1
    control = min(max((noise_0 - noise_01) / taken, 0.0), 1.0) if taken > 0 else 0.0
    draws, noise = _controlled(squares, control)
    if noise > (1 - _LEAST_GAIN) * noise_0:
        control = 0.0
        draws, noise = _controlled(squares, control)
    full = max(draws - noise, 1e-6 * draws, 1e-30)
    both = (1 - control) * both_0 + control * both_1
    cosine = both / math.sqrt(tail * full) if tail > 0 else 0.0
    angle_tail = math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))
    angle_draws = math.degrees(math.atan(math.sqrt(noise / full * positions / HORIZON)))
    name = "draws" if angle_draws < angle_tail else "tail"
    return Estimator(name, angle_tail, angle_draws, positions, control)


def _controlled(squares: list[float], control: float) -> tuple[float, float]:
    """`|G_D|^2` and `|R|^2` at a control, from those at 0, the product of both, and those at 1."""
    shares = ((1 - control) ** 2, 2 * control * (1 - control), control**2)
    draws, noise = (sum(map(math.prod, zip(shares, x, strict=True))) for x in (squares[:3], squares[3:]))
    return draws, max(noise, 0.0)


def _gradients(
    trainer: DistillationTrainer,
    batch: dict[str, Tensor],
    parameters: list[Tensor],
    readings: list[Callable[[SparseSignal], SparseTeacher]],
) -> list[list[Tensor]] | None:
    """Gradients summed over a batch's positions, one list for each way to read the signal; None: no draws."""
    supervision = trainer.task.supervise_batch(batch)
    one = torch.ones((), device=supervision.kd_weight.device)
    counts, mix = Counts(one, one), replace(trainer.mix(), alpha=1.0)
    fusion = trainer.fusion_for(batch)
    student: HiddenStudent | Tensor
    if fusion is not None:
        student, signal = trainer.pair.fused(fusion, trainer.student, batch, lambda *both: both, distil=True)
    else:
        _, student, signal = trainer.pair.dense(trainer.student, batch, distil=True)
    if not isinstance(signal, SparseSignal) or not signal.has_draws:
        return None
    found = []
    for reading in readings:
        objective = replace(trainer.objective, estimator=reading)
        if isinstance(student, HiddenStudent):
            assert fusion is not None
            terms = fusion.terms(objective, student, signal, supervision, counts=counts, mix=mix, ranks=1)
        else:
            index = select([supervision])[0]
            terms = objective(student, signal, supervision, selection=index, counts=counts, mix=mix)
        gradients = torch.autograd.grad(terms.loss, parameters, retain_graph=True, allow_unused=True)
        found.append(
            [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        )
    return found


def _parameters(student: torch.nn.Module) -> list[Tensor]:
    """What is trained, from the output on, as far as gradients of it can be held three times."""
    chosen: list[Tensor] = []
    left = _MOST_PARAMETERS
    for parameter in reversed([p for p in student.parameters() if p.requires_grad]):
        left -= parameter.numel()
        if left < 0 and chosen:
            break
        chosen.append(parameter)
    return chosen


def _product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum()
