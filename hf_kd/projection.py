"""A trained map from the student's width to the teacher's, that never reaches the exported student.

While training, it is a submodule of the student: so it is in the optimizer, synchronised between ranks,
clipped and resumed like any other parameter. It is saved in a file of its own, beside each checkpoint only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: The submodule's name in the student while it trains.
NAME = "hf_kd_projection"
FILE = "projection.safetensors"


class Projection(nn.Linear):
    """`[..., H_student] -> [..., H_teacher]`, linear, without bias; starts as a (partial) identity.

    A deterministic start makes it the same on every rank and after a restart.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        """Make the map."""
        super().__init__(student_width, teacher_width, bias=False)
        with torch.no_grad():
            nn.init.eye_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Map vectors in the map's own dtype."""
        return super().forward(input.to(self.weight.dtype))


@contextmanager
def attached(student: nn.Module, projection: Projection | None) -> Iterator[None]:
    """Make the projection part of the student for the duration of training."""
    if projection is None:
        yield
        return
    setattr(student, NAME, projection)
    try:
        yield
    finally:
        delattr(student, NAME)


def without(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the projection's entries."""
    return {name: value for name, value in state.items() if NAME not in name.split(".")}


def save(projection: Projection, folder: Path) -> None:
    """Write the projection beside a checkpoint."""
    state = {name: value.detach().cpu().contiguous() for name, value in projection.state_dict().items()}
    save_file(state, folder / FILE)


def load(projection: Projection, folder: Path) -> None:
    """Read the projection of a checkpoint.

    Raises:
        ValueError: If the checkpoint has none.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} has no {FILE}: it was made without a projection, but "
            "the two models' widths differ in this run. Start again in another output_dir."
        )
    projection.load_state_dict(load_file(path))
