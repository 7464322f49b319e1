"""Knowledge distillation for Transformers models: an ordinary Trainer script, a teacher and a mix."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import DistillationArguments
    from .losses.divergences import DIVERGENCES
    from .students import init_student
    from .tasks import TASKS, Task
    from .teachers import Ensemble, ModelTeacher, ServedTeacher, SparseSignal, Teacher, TeacherSignal
    from .trainer import DistillationTrainer

# Loaded when asked for: `import hf_kd` must not import torch, or `hf-kd --help` would take seconds.
_HOME = {
    "DIVERGENCES": ".losses.divergences",
    "DistillationArguments": ".config",
    "DistillationTrainer": ".trainer",
    "Ensemble": ".teachers",
    "ModelTeacher": ".teachers",
    "ServedTeacher": ".teachers",
    "SparseSignal": ".teachers",
    "TASKS": ".tasks",
    "Task": ".tasks",
    "Teacher": ".teachers",
    "TeacherSignal": ".teachers",
    "init_student": ".students",
}

__all__ = [
    "DIVERGENCES",
    "TASKS",
    "DistillationArguments",
    "DistillationTrainer",
    "Ensemble",
    "ModelTeacher",
    "ServedTeacher",
    "SparseSignal",
    "Task",
    "Teacher",
    "TeacherSignal",
    "init_student",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted({*globals(), *__all__})
