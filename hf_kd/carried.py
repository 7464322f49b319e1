"""What a checkpoint carries beside the student, so that a resumed run is the run that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import projection
from .estimator import Estimator
from .records import TEACHER_FILE, check_teacher, write_teacher
from .settling import Settled
from .streams import save_place
from .teachers import EMATeacher

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


def save(trainer: DistillationTrainer, folder: Path) -> None:
    """Write everything that the run has measured, averaged or trained besides its student."""
    teacher = trainer.teacher
    parts = [
        trainer.spikes,
        teacher if isinstance(teacher, EMATeacher) else None,
        trainer.settled,
        trainer.estimator,
    ]
    for part in parts:
        if part is not None:
            part.save(folder)
    save_place(trainer, folder)
    if trainer.projections:
        projection.save(trainer.projections, folder)
    if teacher is not None and trainer.distils:
        write_teacher(folder / TEACHER_FILE, teacher.identity)


def load(trainer: DistillationTrainer, folder: Path) -> None:
    """Go on from what `save` wrote, before the student's weights are read.

    Raises:
        ValueError: If it is of another teacher or other options, is damaged, or lacks what this run needs.
    """
    teacher = trainer.teacher
    if teacher is not None and trainer.distils:
        check_teacher(folder / TEACHER_FILE, teacher.identity)
    if isinstance(teacher, EMATeacher):
        teacher.load(folder)
    if trainer.settled is not None:
        trainer.settled = (Settled.load(folder) or trainer.settled).apply(teacher)
    if trainer.args.sparse_estimator == "auto":
        trainer.estimator = Estimator.load(folder)
    trainer.spikes.load(folder)
    if trainer.projections:
        projection.load(trainer.projections, folder)
