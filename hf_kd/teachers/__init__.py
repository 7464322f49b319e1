"""Who teaches: every teacher is a callable from a batch to a `TeacherSignal`."""

from __future__ import annotations

from .models import ModelTeacher
from .signal import Teacher, TeacherSignal

__all__ = ["ModelTeacher", "Teacher", "TeacherSignal"]
