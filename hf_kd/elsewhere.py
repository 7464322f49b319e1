"""A run whose teacher is at an address, a server's or a teacher group's: its weights are not here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_kd.loading import task_of_checkpoint
from hf_kd.teachers.link import is_link
from hf_kd.teachers.server import is_address

if TYPE_CHECKING:
    from hf_kd.config import DistillationArguments
    from hf_kd.options import RunOptions
    from hf_kd.setting import Setting
    from hf_kd.trainer import DistillationTrainer


def is_elsewhere(teacher: Any) -> bool:
    """Whether a teacher's name is an address, of a server or of a teacher group."""
    return is_address(teacher) or is_link(teacher)


@dataclass(frozen=True)
class Elsewhere:
    """What stands in a run's place of such a teacher until a trainer has joined it.

    Attributes:
        name_or_path: Its address.
        config: What is known of the model: nothing.
    """

    name_or_path: str
    config: None = None


def obstacles(run: RunOptions) -> list[str]:
    """What a run wants that can't be had without the teacher's weights."""
    found = []
    if run.train_teacher:
        found.append(f"train_teacher=True, but teacher={run.teacher!r} is elsewhere: train it there")
    if not run.student:
        found.append(
            f"student is not set, and teacher={run.teacher!r} is elsewhere, of which no student can be cut: "
            "give the id or directory of one"
        )
    if (run.teachers or [])[1:]:
        found.append(
            f"teachers={run.teachers!r}, but {run.teacher!r} is elsewhere, and teaches alone: give one, "
            "or use DistillationTrainer in Python"
        )
    if is_address(run.teacher) and run.task not in (None, "causal-lm"):
        found.append(f"task={run.task!r}, but teacher={run.teacher!r} is a server, for causal-lm alone")
    return found


def task_of(run: RunOptions, args: DistillationArguments) -> str:
    """The task of a run that does not say it: a server continues text, a group has the student's head."""
    if is_address(run.teacher):
        return "causal-lm"
    return task_of_checkpoint(str(run.student), role="student", trust_remote_code=args.trust_remote_code)


def joined(setting: Setting, trainer: DistillationTrainer) -> Setting:
    """The same run with the teacher that its trainer joined at the address, to be asked by all others."""
    if not isinstance(setting.teacher, Elsewhere) or trainer.teacher is None:
        return setting
    found: Any = trainer.teacher
    return replace(setting, teacher=found)
