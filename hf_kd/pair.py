"""Student and teacher on one batch: each gets its own columns, and what they answer is lined up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from .ahead import Ahead, Ask, Question
from .answers import Answer, Exits, answer, count
from .features import Seen
from .fusing import Fusion, HiddenStudent, Result
from .projection import Projection
from .tasks import Batch, Task
from .teachers.deadline import deadline
from .teachers.deeper import DeeperTeacher
from .teachers.models import TEACHER_PREFIX, forward_parameters
from .teachers.signal import Teacher, TeacherSignal, named_logits


class Pair:
    """The two models of a run.

    Args:
        student: The student, not wrapped.
        teacher: The teacher, if there is one.
        task: Their head.
        device: Where a projection is trained.
        timeout: Seconds that the teacher may take for a batch; None: no limit.
        ahead: Who asks the teacher early, if anybody does.

    Attributes:
        projection: The trained map between the widths of two encoders; None where the widths agree.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        task: Task,
        *,
        device: Any,
        timeout: float | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """Look at the models."""
        self.student, self.teacher, self.task, self.timeout = student, teacher, task, timeout
        self._ahead = ahead
        self._parameters = forward_parameters(student)
        self.projection: Projection | None = None
        models = student, getattr(teacher, "model", None)
        widths: list[Any] = [getattr(getattr(m, "config", None), "hidden_size", None) for m in models]
        if task.kind == "vectors" and None not in widths and widths[0] != widths[1]:
            dtype = next(student.parameters()).dtype
            self.projection = Projection(*widths).to(device, dtype)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What both models may read: the batch without its labels."""
        return self.task.model_inputs(batch, self.student)

    def student_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a batch that the student's forward declares; everything, if it declares nothing."""
        if not self._parameters:
            return {k: v for k, v in batch.items() if not k.startswith(TEACHER_PREFIX)}
        return {k: v for k, v in batch.items() if k in self._parameters}

    def _watching(self, distil: bool) -> AbstractContextManager[dict[str, Any] | None]:
        """Room for what the student's layers return, where the last of them teaches the others."""
        watched = distil and isinstance(self.teacher, DeeperTeacher)
        return self.teacher.watching() if watched else nullcontext()  # type: ignore[union-attr]

    def asker(self, fusion: Fusion | None) -> Ask:
        """How the teacher is asked."""
        assert self.teacher is not None
        return self.teacher if fusion is None else partial(fusion.ask, self.teacher)

    def _ask(self, inputs: Batch, fusion: Fusion | None, question: Question | None) -> TeacherSignal:
        with deadline(self.timeout):
            early = None if question is None else question.take()
            if early is not None:
                return early
            if self._ahead is not None:
                self._ahead.wait()
            return self.asker(fusion)(inputs)

    def positions(self, outputs: Any, batch: Batch) -> Tensor:
        """The student's outputs as `[P, C]`, in the teacher's width where a projection is trained."""
        values = self.task.flat(named_logits(outputs, self.task.logits), batch)
        return values if self.projection is None else self.projection(values)

    def dense(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        distil: bool,
        seen: Seen | None = None,
        question: Question | None = None,
    ) -> tuple[Any, Tensor, Answer | None]:
        """Run both models.

        Args:
            model: The student as it is wrapped for training: gradients are synchronised and autocast there.
            batch: One batch.
            distil: Whether the teacher is asked.
            seen: Room for what is seen inside both.
            question: What the teacher may have been asked about this batch before.

        Returns:
            The student's outputs, its logits `[P, C]`, and the teacher's answer for the same positions.

        Raises:
            ValueError: If the two have different numbers of positions, or the head can't be distilled from
                the fidelity of the teacher's signal.
        """
        inputs = self.inputs(batch)
        own = self.student_inputs(inputs)
        with nullcontext() if seen is None else seen.on_student(), self._watching(distil) as states:
            outputs = model(**own)
        student = self.positions(outputs, batch)
        if isinstance(self.teacher, DeeperTeacher) and states is not None:
            exits = [self.positions(self.student(**own), batch) for _ in self.teacher.exits(states)]
            return outputs, student, Exits(tuple(exits))
        if not distil or self.teacher is None:
            return outputs, student, None
        with nullcontext() if seen is None else seen.on_teacher():
            signal = self._ask(inputs, None, question)
        teacher = answer(signal, self.task, batch)
        if count(teacher) != len(student):
            raise ValueError(
                f"The student has {len(student)} positions in this batch, the teacher {count(teacher)}: the "
                "two models divide the input differently (patch size, stride or tokenizer), so their logits "
                "don't correspond."
            )
        return outputs, student, teacher

    def fused(
        self,
        fusion: Fusion,
        model: nn.Module,
        batch: Batch,
        use: Callable[[HiddenStudent, Answer | None], Result],
        *,
        distil: bool,
        seen: Seen | None = None,
        question: Question | None = None,
    ) -> Result:
        """Run both models up to their heads: what `use` makes of both; see `Fusion.run`."""
        inputs = self.inputs(batch)
        own = self.student_inputs(inputs)
        if isinstance(self.teacher, DeeperTeacher) and distil:
            with nullcontext() if seen is None else seen.on_student(), self._watching(distil) as states:
                student = fusion.run_student(lambda: model(**own))
            assert states is not None
            again = partial(self.student, **own)
            return use(student, Exits(tuple(fusion.run_student(again) for _ in self.teacher.exits(states))))

        def forward() -> Any:
            with nullcontext() if seen is None else seen.on_student():
                return model(**own)

        def ask() -> Answer | None:
            if not distil or self.teacher is None:
                return None
            with nullcontext() if seen is None else seen.on_teacher():
                signal = self._ask(inputs, fusion, question)
            return answer(signal, self.task, batch)

        return fusion.run(forward, ask, use)
