"""Several teachers as one: averaged, or one for each row.

Teachers are averaged as probabilities: the answer is the logarithm of the mean,
`T_a log sum_m w_m softmax(t_m / T_a)`, whose softmax at `T_a` is the mean itself. `T_a` is 1 unless
`ensemble_temperature` says otherwise: the average is then one distribution, the same in training and
evaluation, and the loss's temperature softens it as it softens any teacher's. With `ensemble_temperature`
equal to `temperature` the softened ones are averaged instead, as Hinton et al. (2015) do; evaluation,
at T = 1, then sees the mean sharpened.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..alignment import ClassMap
from ..losses.projected import head_logits
from ..targets import confidence
from ..tasks import Task
from ..tasks.base import first_tensor, full_precision
from ..tasks.text import QuestionAnswering, SequenceClassification
from .models import ModelTeacher
from .signal import Teacher, TeacherSignal

logger = logging.getLogger(__name__)

#: The batch column that says which teacher answers for a row.
TEACHER_ID = "teacher_id"
_FLOOR = 1e-6  # of a confidence: a mean needs some weight


@dataclass(eq=False)
class Member:
    """One teacher of several.

    Attributes:
        teacher: A teacher whose signal has logits, or hidden states and a head.
        classes: How its classes correspond to the student's.
    """

    teacher: Teacher
    classes: ClassMap = ClassMap()

    def logits(self, batch: Mapping[str, Any], task: Task, shared: int | None) -> dict[str, Tensor]:
        """Its logits by name, in the student's classes, classes on the last axis, in fp32 at least.

        Raises:
            ValueError: If its signal is sparse, which has no probabilities to average.
        """
        signal = self.teacher(batch)
        if signal.fidelity == "sparse":
            raise ValueError(
                f"teachers: {name_of(self.teacher)} answers with a sparse signal, a few classes of its "
                "distribution, which can't be averaged with others or routed. Use teachers that give logits."
            )
        if signal.logits:
            raw = {name: signal.logits[name].movedim(task.class_axis, -1) for name in task.logits}
        else:
            assert signal.hidden is not None
            raw = {task.logits[0]: head_logits(signal.hidden)}
        found = {}
        for name, values in raw.items():
            flat = self.classes.teacher(values.reshape(-1, values.shape[-1]))[:, :shared]
            found[name] = full_precision(flat).unflatten(0, values.shape[:-1])
        return found


class Ensemble:
    """Several teachers, each run on its own columns, that answer as one.

    A member's own columns are `teacher_<i>_<name>`, else `teacher_<name>`, else `<name>`.

    Args:
        teachers: At least two teachers.
        task: Their head, any but embeddings.
        weights: One positive number each; they are divided by their sum. None: equal.
        weighting: "fixed": these weights everywhere; "confidence": at each position, the weights times one
            minus the member's entropy as a share of the largest, `1 - H(p_m) / log C`.
        temperature: `T_a` above.
        routes: Answer each row by one member alone: the one whose number the batch's `teacher_id` maps to,
            `{17: 0, 23: 1}`; an empty mapping: `teacher_id` is the number. None: average.
        offload: Keep the models in the CPU's memory and move one at a time to `device`.
        device: Where they run.

    Raises:
        ValueError: If the teachers are too few, weights don't fit, or the head can't be averaged.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        task: Task,
        *,
        weights: Sequence[float] | None = None,
        weighting: str = "fixed",
        temperature: float = 1.0,
        routes: Mapping[int, int] | None = None,
        offload: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Check what fits and mark each member's columns."""
        count = len(teachers)
        if count < 2:
            raise ValueError(f"teachers has {count} entries; an ensemble needs two, else use teacher=.")
        if task.kind == "vectors":
            raise ValueError(
                f"teachers: vectors of task {task.name!r} have no common axes to average; use one teacher."
            )
        self.members = [Member(teacher) for teacher in teachers]
        self.task, self.weighting, self.temperature = task, weighting, temperature
        self.weights = normalised(weights, count)
        self._asked = None if weights is None else self.weights.tolist()
        self.routes = None if routes is None else {int(k): int(v) for k, v in routes.items()}
        if self.routes is not None and not all(0 <= v < count for v in self.routes.values()):
            raise ValueError(
                f"teacher_routes={self.routes} names teachers outside 0 to {count - 1}: "
                "give each id one of these."
            )
        #: Leading classes that are compared; None: all.
        self.shared: int | None = None
        self._offloaded: Callable[[Member], Any] = _here
        for i, teacher in enumerate(teachers):
            if isinstance(teacher, ModelTeacher):
                teacher.prefixes = (f"teacher_{i}_", *teacher.prefixes)
        if offload:
            self._offload(device or torch.device("cpu"))

    def _offload(self, device: torch.device) -> None:
        fixed = [name_of(m.teacher) for m in self.members if not _movable(m.teacher)]
        if fixed:
            raise ValueError(
                f"ensemble_offload=True moves models between devices, but {', '.join(fixed)} can't be moved "
                "(quantised, spread by teacher_device_map, or not a model in memory); set "
                "ensemble_offload=False."
            )

        @contextmanager
        def moved(member: Member) -> Iterator[None]:
            model = member.teacher.model  # type: ignore[attr-defined]
            model.to(device)
            try:
                yield
            finally:
                model.to("cpu")

        for member in self.members:
            member.teacher.model.to("cpu")  # type: ignore[attr-defined]
        self._offloaded = moved

    @property
    def offloaded(self) -> bool:
        """Whether the models are moved to the device one at a time."""
        return self._offloaded is not _here

    @property
    def identity(self) -> dict[str, str]:
        """The members' identities, and how they are mixed."""
        parts = [member.teacher.identity for member in self.members]
        mixed = f"{self.weighting} {self._asked} {self.temperature:g} {self.routes}"
        text = repr([sorted(part.items()) for part in parts]) + mixed
        return {
            "name": " + ".join(part.get("name", "?") for part in parts),
            "revision": "",
            "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16],
        }

    @property
    def columns(self) -> tuple[str, ...]:
        """What any member reads, and `teacher_id` where rows are routed."""
        names = {name: None for member in self.members for name in member.teacher.columns}
        return (*names, TEACHER_ID) if self.routes is not None else tuple(names)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """The members' common answer."""
        if self.routes is not None:
            return self._signal(self._routed(batch, self.routes))
        answers = self.answers(batch)
        return self._signal({name: self._mean([a[name] for a in answers], name) for name in answers[0]})

    def answers(self, batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Each member's logits, by output name, `[B, ..., C]` in the student's classes."""
        found = []
        for member in self.members:
            with self._offloaded(member):
                found.append(self._masked(member.logits(batch, self.task, self.shared), batch))
        return found

    def _signal(self, logits: dict[str, Tensor]) -> TeacherSignal:
        return TeacherSignal(logits={k: v.movedim(-1, self.task.class_axis) for k, v in logits.items()})

    def _masked(self, logits: dict[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Places that are no answer have no part in a mean of probabilities."""
        if not isinstance(self.task, QuestionAnswering):
            return logits
        allowed = self.task.allowed(batch)
        return {name: values.masked_fill(~allowed, float("-inf")) for name, values in logits.items()}

    def _mean(self, logits: list[Tensor], name: str) -> Tensor:
        """`[..., C]` from the members' `[..., C]`."""
        shapes = {tuple(values.shape) for values in logits}
        if len(shapes) > 1:
            raise ValueError(
                f"teachers: their {name} have the shapes {sorted(shapes)} for one batch: they divide the "
                "input differently (patch size, stride or tokenizer) or have other classes. Use "
                "teachers that fit."
            )
        stacked = torch.stack(logits)
        if self.task.kind == "regression":
            return torch.tensordot(self.weights.to(stacked), stacked, 1)
        bernoulli = isinstance(self.task, SequenceClassification) and self.task.problem_type == "multi"
        if bernoulli:
            stacked = torch.stack([stacked, torch.zeros_like(stacked)], dim=-1)
        log_p = (stacked / self.temperature).log_softmax(-1)
        mean = (log_p + self._log_weights(stacked)).logsumexp(0) * self.temperature
        return mean[..., 0] - mean[..., 1] if bernoulli else mean

    def _log_weights(self, logits: Tensor) -> Tensor:
        """`[M, ..., 1]` for `[M, ..., C]` logits."""
        weights = self.weights.to(logits).view(-1, *[1] * (logits.ndim - 1))
        if self.weighting == "confidence":
            weights = weights * confidence(logits).unsqueeze(-1).clamp_min(_FLOOR)
            weights = weights / weights.sum(0)
        return weights.log()

    def _routed(self, batch: Mapping[str, Any], routes: Mapping[int, int]) -> dict[str, Tensor]:
        ids = batch.get(TEACHER_ID)
        if not isinstance(ids, Tensor):
            raise ValueError(
                f"teacher_routes sends each row to a teacher by its {TEACHER_ID!r} column, but the batch has "
                f"only {sorted(batch)}. Add the column (a whole number for each row)."
            )
        table = routes or {i: i for i in range(len(self.members))}
        ids = ids.reshape(-1)
        unknown = sorted(set(ids.tolist()) - set(table))
        if unknown:
            raise ValueError(
                f"{TEACHER_ID}={unknown[0]} is in the data, but teacher_routes knows {sorted(table)} only: "
                "add it there, or drop its rows."
            )
        out: dict[str, Tensor] = {}
        for number, member in enumerate(self.members):
            chosen = [place for place, of in table.items() if of == number]
            mine = torch.isin(ids, torch.tensor(chosen, dtype=ids.dtype, device=ids.device))
            rows = mine.nonzero().squeeze(-1)
            if not len(rows):
                continue
            part = _rows(batch, rows, len(ids))
            with self._offloaded(member):
                answer = self._masked(member.logits(part, self.task, self.shared), part)
            for name, values in answer.items():
                whole = out.get(name)
                if whole is None:
                    whole = out[name] = values.new_zeros((len(ids), *values.shape[1:]))
                if whole.shape[1:] != values.shape[1:]:
                    raise ValueError(
                        f"teachers: {name} is {tuple(values.shape[1:])} a row from "
                        f"{name_of(member.teacher)}, {tuple(whole.shape[1:])} from another teacher. Use "
                        "teachers that divide the input alike."
                    )
                whole[rows] = values
        return out


def learned_weights(log_likelihoods: Tensor, *, steps: int = 5000, tolerance: float = 1e-12) -> Tensor:
    """Weights that make the average likeliest: minimise `-mean_i log sum_m w_m p_m(y_i)` on the simplex.

    The problem is convex. Each step of expectation and maximisation for mixture proportions (Dempster, Laird
    and Rubin 1977), `w_m <- mean_i w_m p_m(y_i) / sum_k w_k p_k(y_i)`, lowers it and stays on the simplex.

    Args:
        log_likelihoods: `[M, N]` log-probability of the label under each teacher, nats.
        steps: The most steps.
        tolerance: Change of the objective, nats per label, at which to stop.

    Returns:
        `[M]` weights in float64.
    """
    likelihoods = log_likelihoods.double()
    weights = torch.full((len(likelihoods),), 1.0 / len(likelihoods), dtype=torch.float64)
    before = -math.inf
    for _ in range(steps):
        joint = likelihoods + weights.log().unsqueeze(-1)
        total = joint.logsumexp(0)
        weights = (joint - total).exp().mean(-1)
        value = float(total.mean())
        if value - before < tolerance:
            break
        before = value
    return weights / weights.sum()


def normalised(weights: Sequence[float] | None, count: int) -> Tensor:
    """Weights in float64 that add up to 1.

    Raises:
        ValueError: If there are too few or too many, or one is negative.
    """
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(given) != count:
        raise ValueError(f"ensemble_weights={given} for {count} teachers: give one weight for each.")
    if min(given) < 0 or not 0 < sum(given) < math.inf:
        raise ValueError(f"ensemble_weights={given} must be 0 or more, and not all 0.")
    values = torch.tensor(given, dtype=torch.float64)
    return values / values.sum()


def name_of(teacher: Teacher) -> str:
    """What to call a teacher in messages."""
    return repr(teacher.identity.get("name", type(teacher).__name__))


def _rows(batch: Mapping[str, Any], rows: Tensor, count: int) -> dict[str, Any]:
    """The chosen rows of a batch; what has another first axis is left as it is."""
    first_tensor(batch)
    return {
        key: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for key, value in batch.items()
    }


def _movable(teacher: Teacher) -> bool:
    model = getattr(teacher, "model", None)
    placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    return isinstance(teacher, ModelTeacher) and not placed


@contextmanager
def _here(member: Member) -> Iterator[None]:
    yield
