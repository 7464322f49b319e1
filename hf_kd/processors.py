"""Pixels and sound that two models prepare differently: re-normalised where exact, else refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .alignment import AlignmentError
from .teachers.models import TEACHER_PREFIX


@dataclass(frozen=True)
class PixelMap:
    """The affine map from the student's normalised pixels to the teacher's, per channel.

    `x = (p - mean_s) / std_s` becomes `(x * std_s + mean_s - mean_t) / std_t`: exact, since both processors
    start from the same resized picture.
    """

    student_mean: tuple[float, ...]
    student_std: tuple[float, ...]
    teacher_mean: tuple[float, ...]
    teacher_std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map `[..., channels, height, width]` pixels; a new tensor."""

        def channel(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1)

        raw = pixels * channel(self.student_std) + channel(self.student_mean)
        return (raw - channel(self.teacher_mean)) / channel(self.teacher_std)


def align_processors(student: Any, teacher: Any) -> PixelMap | None:
    """What has to be done to the student's pixels or sound before the teacher reads them.

    Args:
        student: The student's image processor, feature extractor or processor that holds one; None: not
            known.
        teacher: The teacher's.

    Returns:
        A map of pixels, or None where both prepare their inputs alike or one of the two is not known.

    Raises:
        AlignmentError: If the difference cannot be undone: another size, crop, scale or sampling rate.
    """
    student, teacher = (getattr(p, "image_processor", None) or getattr(p, "feature_extractor", p) for p in
                        (student, teacher))  # fmt: skip
    if student is None or teacher is None or student is teacher:
        return None
    different = [
        f"{name} is {ours!r} for the student and {theirs!r} for the teacher"
        for name in _FIXED
        if (ours := _setting(student, name)) != (theirs := _setting(teacher, name))
    ]
    if different:
        raise AlignmentError(
            f"processing_class: the two models prepare their inputs differently ({'; '.join(different)}). "
            f"Give the teacher its own column, made by its own processor: {TEACHER_PREFIX}pixel_values or "
            f"{TEACHER_PREFIX}input_values."
        )
    ours, theirs = _normalisation(student), _normalisation(teacher)
    if ours is None or theirs is None or ours == theirs:
        return None
    return PixelMap(*ours, *theirs)


# What decides which samples a model sees, and can't be undone afterwards.
_FIXED = (
    "size", "do_resize", "resample", "crop_size", "do_center_crop", "rescale_factor", "do_rescale",
    "do_convert_rgb", "sampling_rate", "feature_size", "n_fft", "hop_length",
)  # fmt: skip


def _setting(processor: Any, name: str) -> Any:
    value: Any = getattr(processor, name, None)
    if name in ("crop_size", "size") and not getattr(
        processor, "do_center_crop" if name == "crop_size" else "do_resize", True
    ):
        return None
    return dict(value) if hasattr(value, "items") else value


def _normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Per-channel mean and std; (0, 1) where the processor does not normalise."""
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None:
        return None
    mean, std = ((v,) if isinstance(v, int | float) else tuple(v) for v in (mean, std))
    return (
        (mean, std) if getattr(processor, "do_normalize", True) else ((0.0,) * len(mean), (1.0,) * len(std))
    )
