"""The teacher answers for the next batch while the student works on this one.

    batch i      student: forward, backward          batch i + 1   student: forward, backward
                 teacher: batch i + 1                               teacher: batch i + 2

Nothing else changes: the same batches in the same order, the same answers, the same random numbers. The
micro-batches of an optimizer step are at hand when it begins; of the next step one is fetched early, and only
where fetching was seen to leave this process's random state alone, because dropout draws from it too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .fetching import Source
from .rows import ROW
from .sharding import in_pieces
from .teachers import (
    AdaptersOffTeacher,
    CachedTeacher,
    DeeperTeacher,
    EMATeacher,
    Ensemble,
    FrozenTeacher,
    ModelTeacher,
    Teacher,
    TeacherSignal,
)
from .teachers.deadline import deadline
from .teachers.worker import SideStream, Worker

if TYPE_CHECKING:
    from .tasks import Batch
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)

Ask = Callable[["Batch"], TeacherSignal]


class Question:
    """What the teacher is asked about one micro-batch.

    Attributes:
        following: The question after it.
    """

    def __init__(self, ahead: Ahead, batch: Batch, ask: Ask) -> None:
        """Ask nothing yet."""
        self._ahead, self._ask = ahead, ask
        self._batch: Batch | None = batch
        self._future: Future[TeacherSignal] | None = None
        self.following: Question | None = None

    def begin(self) -> None:
        """Ask, if that wasn't done yet."""
        if self._batch is not None and self._future is None:
            self._future = self._ahead.submit(self._ask, self._batch)

    def take(self) -> TeacherSignal | None:
        """The answer, waited for; None if it was taken before, or the question was not asked.

        Raises:
            Exception: What the teacher raised.
        """
        future, self._future, self._batch = self._future, None, None
        return None if future is None else self._ahead.receive(future)


class Ahead:
    """Asks a run's teacher one micro-batch ahead, where its answers depend on nothing but the batch.

    Args:
        wanted: The option `teacher_ahead`: "auto" (teachers that work elsewhere), "on", "off".
        teacher: The teacher.
        student: The student.
        device: Where it is trained.
        timeout: Seconds that the teacher may take for a batch; None: no limit.
        features: Whether losses on layers look into the teacher.

    Raises:
        ValueError: If it is "on" and can't be.
    """

    def __init__(
        self,
        wanted: str,
        teacher: Teacher | None,
        *,
        student: nn.Module,
        device: torch.device,
        timeout: float | None = None,
        features: bool = False,
    ) -> None:
        """Find whether and how."""
        self.timeout = timeout
        self._runner: Worker | SideStream | None = None
        self._latest: Future[TeacherSignal] | None = None
        self._source: Source | None = None
        self._foreseen: Question | None = None
        if teacher is None or wanted == "off":
            return
        reason = _obstacle(teacher, student, features)
        if wanted == "on" and reason is not None:
            raise ValueError(
                f"teacher_ahead='on' asks the teacher while the student works, but this one {reason}: set "
                "teacher_ahead='auto' or 'off'."
            )
        if wanted == "auto" and (reason is not None or not works_elsewhere(teacher)):
            reason = reason or "computes here, where a second forward needs memory (ask for it: 'on')"
            logger.info("teacher_ahead='auto': not used, since the teacher %s.", reason)
            return
        local = not works_elsewhere(teacher) and not isinstance(teacher, CachedTeacher)
        self._runner = (
            SideStream(device) if local and device.type == "cuda" else Worker("teacher-ahead", device)
        )

    @property
    def used(self) -> bool:
        """Whether questions are asked ahead."""
        return self._runner is not None

    # ---- batches ----

    def source(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """The micro-batches of an epoch, the one that was fetched early first."""
        if not self.used:
            return iterator
        if self._source is None or self._source.iterator is not iterator:
            quiet = None if self._source is None else self._source.quiet
            self._source, self._foreseen = Source(iterator, quiet), None
        return self._source

    def line_up(self, trainer: DistillationTrainer, batches: list[dict[str, Any]]) -> list[Question | None]:
        """The questions of an optimizer step's micro-batches; the first is asked.

        Args:
            trainer: The run.
            batches: On the device, without anything that no collator made but row numbers.
        """
        first, self._foreseen = self._foreseen, None
        if not self.used or not trainer.distils or trainer.mix().alpha == 0.0:
            return [None] * len(batches)
        found = [first] if first is not None else []
        found += [self._question(trainer, batch) for batch in batches[len(found) :]]
        assert self._source is not None
        state = trainer.state
        if state.global_step + 1 < state.max_steps and steady(trainer):
            raw = self._source.peek()
            if raw is not None:
                self._source.early = dict(trainer._prepare_inputs(raw))
                self._foreseen = self._question(trainer, self._source.early)
        for one, following in zip(found, [*found[1:], self._foreseen], strict=True):
            one.following = following
        found[0].begin()
        return list(found)

    def _question(self, trainer: DistillationTrainer, batch: dict[str, Any]) -> Question:
        clean = {name: value for name, value in batch.items() if name != ROW}
        return Question(self, trainer.pair.inputs(clean), trainer.pair.asker(trainer.fusion_for(clean)))

    def turn(self, question: Question | None) -> Question | None:
        """It is a micro-batch's turn: the question after its own is asked, before the student works."""
        if question is not None:
            question.begin()
            if question.following is not None:
                question.following.begin()
                question.following = None
        return question

    # ---- asking ----

    def submit(self, ask: Ask, batch: Batch) -> Future[TeacherSignal]:
        """Ask about a batch."""
        assert self._runner is not None
        if isinstance(self._runner, SideStream):
            self._runner.lend(batch)
            with deadline(self.timeout):
                self._latest = self._runner.submit(lambda: ask(batch))
        else:
            self._latest = self._runner.submit(lambda: ask(batch))
        return self._latest

    def receive(self, future: Future[TeacherSignal]) -> TeacherSignal:
        """An answer, readable on the main stream."""
        signal = future.result()
        if isinstance(self._runner, SideStream):
            self._runner.receive(signal)
        return signal

    def wait(self) -> None:
        """Wait until the teacher has nothing in hand: somebody asks it directly now."""
        if self._latest is not None:
            wait([self._latest])
            self._latest = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """A training, at whose end the teacher is left alone."""
        self._source = self._foreseen = None
        try:
            yield
            with deadline(self.timeout) if self._latest is not None else nullcontext():
                self.wait()
        finally:
            self._source = self._foreseen = None


def steady(trainer: DistillationTrainer) -> bool:
    """Whether each rank fetches its own batches: one that does so for others must not choose the time."""
    return trainer.accelerator.num_processes == 1 or not trainer.accelerator.dispatch_batches


def works_elsewhere(teacher: Teacher) -> bool:
    """Whether a teacher's answers are made by other processes."""
    return bool(getattr(teacher, "works_elsewhere", False))


def _obstacle(teacher: Teacher, student: nn.Module, features: bool) -> str | None:
    """Why a teacher can't be asked while the student works; None if it can."""
    if features:
        return "is looked into by losses on layers, while it answers for the same batch"
    if isinstance(teacher, Ensemble):
        if teacher.offloaded:
            return "is moved to and from the device (ensemble_offload)"
        found = [_obstacle(member.teacher, student, features) for member in teacher.members]
        return next(filter(None, found), None)
    if isinstance(teacher, EMATeacher):
        return "changes with each step (self_teacher='ema')"
    if isinstance(teacher, AdaptersOffTeacher | DeeperTeacher):
        return "is the student itself"
    if isinstance(teacher, FrozenTeacher) and teacher.dropout:
        return "draws random numbers, in the order of the batches (self_teacher_dropout)"
    if isinstance(teacher, CachedTeacher):
        return None if teacher.live is None else "is added to a cache (cache_miss='compute')"
    if isinstance(teacher, ModelTeacher):
        return _model_obstacle(teacher.model, student)
    if works_elsewhere(teacher) or getattr(teacher, "asked_ahead", False):
        return None
    return (
        f"is a {type(teacher).__name__}, which does not say that its answers depend on nothing but the batch "
        "and can be made in another thread (its attribute asked_ahead = True)"
    )


def _model_obstacle(model: nn.Module, student: nn.Module) -> str | None:
    if in_pieces(model):
        return "is in pieces over the ranks (shard_teacher), which exchange them in one order"
    if len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1:
        return "is spread over several devices (teacher_device_map)"
    ours = {id(module) for module in student.modules()}
    if any(id(module) in ours for module in model.modules()):
        return "shares modules with the student"
    return None
