"""Trained maps from the student's widths to the teacher's, that never reach the exported student.

While training, they are a submodule of the student: so they are in the optimizer, synchronised between ranks,
clipped and resumed like any other parameter. They are saved in a file of their own, beside each checkpoint
only.
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
def attached(student: nn.Module, projections: nn.ModuleDict) -> Iterator[None]:
    """Make the projections, if there are any, part of the student for the duration of training."""
    if not projections:
        yield
        return
    setattr(student, NAME, projections)
    handle = student.register_forward_hook(_reach)
    try:
        yield
    finally:
        handle.remove()
        delattr(student, NAME)


class _Reach(torch.autograd.Function):
    """A tensor as it is, from which a walk along the graph also comes to some parameters."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *[None] * ctx.parameters


def _reach(student: nn.Module, _: Any, output: Any) -> Any:
    """DDP asks the outputs which parameters were used; projections are used after the forward."""
    if not (
        torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()
    ):
        return output
    parameters = list(student.get_submodule(NAME).parameters())
    if isinstance(output, Tensor):
        return _Reach.apply(output, *parameters)
    if isinstance(output, Mapping):
        for name, value in output.items():
            if isinstance(value, Tensor) and value.requires_grad:
                output[name] = _Reach.apply(value, *parameters)  # type: ignore[index]
                return output
    if isinstance(output, tuple):
        return (_Reach.apply(output[0], *parameters), *output[1:])
    return output


def without(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the projections' entries."""
    return {name: value for name, value in state.items() if NAME not in name.split(".")}


def save(projections: nn.ModuleDict, folder: Path) -> None:
    """Write the projections beside a checkpoint."""
    state = {name: value.detach().cpu().contiguous() for name, value in projections.state_dict().items()}
    save_file(state, folder / FILE)


def load(projections: nn.ModuleDict, folder: Path) -> None:
    """Read the projections of a checkpoint.

    Raises:
        ValueError: If the checkpoint has none, or others.
    """
    path, wanted = folder / FILE, projections.state_dict()
    if not path.exists():
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} has no {FILE}: it was made without a projection, but "
            "the two models' widths differ in this run. Start again in another output_dir."
        )
    state = load_file(path)
    shapes, expected = ({k: list(v.shape) for k, v in values.items()} for values in (state, wanted))
    if shapes != expected:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} has the projections {shapes}, this run {expected}: it "
            "was made with other losses on layers or another layer_map. Use its options (distillation.yaml "
            "beside it), or start again in another output_dir."
        )
    projections.load_state_dict(state)
