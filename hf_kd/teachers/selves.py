"""A student that teaches itself: its moving average, its start, its base without adapters, or its last layer.

None of them needs labels (alpha = 1). Without labels and without a difference between the two views of a row
(own `teacher_` columns, or dropout) a student equal to its teacher has no gradient at all, and with an
average that follows fast the two may agree on a constant: watch `eval_teacher_entropy` and a metric.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..schedules import schedule
from .deeper import DeeperTeacher
from .models import ModelTeacher
from .signal import TeacherSignal

if TYPE_CHECKING:
    from ..trainer import DistillationTrainer

EMA_FILE = "ema.safetensors"


class FrozenTeacher(ModelTeacher):
    """The student as it was before training ("born again", Furlanello et al. 2018).

    Args:
        student: Copied now.
        outputs: The outputs that the task reads.
        device: Where to put the copy.
        dropout: Answer with dropout on. Batch norms stay in evaluation mode.
    """

    def __init__(
        self,
        student: nn.Module,
        outputs: tuple[str, ...],
        *,
        device: torch.device | None = None,
        dropout: bool = False,
    ) -> None:
        """Copy and freeze the student."""
        super().__init__(copy.deepcopy(student), outputs, device=device, name="the student's start")
        self.dropout = dropout

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """Run the copy on its own columns of the batch."""
        return self._ask(batch, dropout=self.dropout)


class EMATeacher(FrozenTeacher):
    """The exponential moving average of the student's weights (Mean Teacher, Tarvainen and Valpola 2017).

    After each optimizer step, `ema <- d * ema + (1 - d) * student` with `d = min(decay, (1 + t) / (10 + t))`
    after t steps, so that a random start is forgotten soon. The average is kept in fp32 for students in half
    precision, which could not hold its small steps. Buffers (batch norm) are copied. Each rank computes the
    same average of the same weights.

    Args:
        student: What is averaged; the start is a copy of it.
        outputs: The outputs that the task reads.
        decay: d, from 0 to 1.
        decay_end: d at the end of training, reached by a cosine (BYOL, Grill et al. 2020); None: constant.
        device: Where to put the average.
        dropout: Answer with dropout on.
    """

    def __init__(
        self,
        student: nn.Module,
        outputs: tuple[str, ...],
        *,
        decay: float = 0.999,
        decay_end: float | None = None,
        device: torch.device | None = None,
        dropout: bool = False,
    ) -> None:
        """Start as a copy of the student."""
        super().__init__(student, outputs, device=device, dropout=dropout)
        self.name = "moving average of the student"
        self.decay, self.decay_end = decay, decay_end
        for parameter in self.model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    @property
    def identity(self) -> dict[str, str]:
        """The rule: the weights are not known before they are averaged."""
        rule = f"ema {self.decay:g} {self.decay_end} {self.dropout}"
        return {"name": self.name, "revision": "", "fingerprint": rule}

    @torch.no_grad()
    def update(self, student: nn.Module, *, step: int, progress: float) -> None:
        """Average once more, after optimizer step `step` (from 1 on), at `progress` of training (0 to 1)."""
        path = "constant" if self.decay_end is None else "cosine"
        decay = min(schedule(path, self.decay, self.decay_end, progress), (1 + step) / (10 + step))
        theirs = dict(student.named_parameters())
        for name, mean in self.model.named_parameters():
            mean.lerp_(theirs[name].detach().to(mean), 1.0 - decay)
        buffers = dict(student.named_buffers())
        for name, mine in self.model.named_buffers():
            mine.copy_(buffers[name])

    def save(self, folder: Path) -> None:
        """Write the average beside a checkpoint."""
        save_file({name: t.detach().cpu().contiguous() for name, t in self._state()}, folder / EMA_FILE)

    def load(self, folder: Path) -> None:
        """Read the average of a checkpoint.

        Raises:
            ValueError: If the checkpoint has none, or it is of another student.
        """
        path = folder / EMA_FILE
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint={str(folder)!r} has no {EMA_FILE}: it was made without "
                "self_teacher='ema'. Start again in another output_dir."
            )
        saved, state = load_file(path), dict(self._state())
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in state.items()}:
            raise ValueError(
                f"resume_from_checkpoint={str(folder)!r} has the average of another student in {EMA_FILE}: "
                "names or shapes differ. Resume with the student that it was made with."
            )
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(saved[name])

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        # Each tied weight once; buffers too, also those that a state dict leaves out.
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()


class AdaptersOffTeacher:
    """The base model under the student's adapters: no second copy of the weights.

    The base answers in evaluation mode; every module of the student is put back into the mode it had, so the
    student's dropout stays on.

    Args:
        student: A `peft` model, or a Transformers model with adapters.
        outputs: The outputs that the task reads.
        dropout: Answer with dropout on.

    Raises:
        ValueError: If the student has no adapters.
    """

    def __init__(self, student: nn.Module, outputs: tuple[str, ...], *, dropout: bool = False) -> None:
        """Find how the student's adapters are switched off."""
        self._off = _adapters_off(student)
        # Not an attribute `model`: that would be a model of the teacher's own, to be placed and prepared.
        self._asked = _Borrowed(student, outputs)
        self.dropout = dropout

    @property
    def identity(self) -> dict[str, str]:
        """The base's name; its weights are the student's own."""
        model = self._asked.model
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        return {"name": f"{name} without adapters", "revision": "", "fingerprint": "adapters_off"}

    @property
    def columns(self) -> tuple[str, ...]:
        """What the student reads, plain and with the `teacher_` prefix."""
        return self._asked.columns

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """Run the student without its adapters."""
        model = self._asked.model
        modes = [(module, module.training) for module in model.modules()]
        try:
            with self._off():
                return self._asked._ask(batch, dropout=self.dropout)
        finally:
            for module, training in modes:
                module.training = training


class _Borrowed(ModelTeacher):
    """A teacher that neither freezes nor moves its model, which is somebody else's."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        modes = [(module, module.training) for module in model.modules()]
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(model, outputs)
        for module, training in modes:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)


class EMACallback(TrainerCallback):
    """Move the average after each optimizer step."""

    def __init__(self, trainer: DistillationTrainer, teacher: EMATeacher) -> None:
        """Watch a trainer."""
        self.trainer, self.teacher = trainer, teacher

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights have just changed; `global_step` still counts the steps before."""
        step = state.global_step + 1
        progress = min(step / state.max_steps, 1.0) if state.max_steps > 0 else 0.0
        self.teacher.update(self.trainer.student, step=step, progress=progress)


def self_teacher(
    name: str, student: nn.Module, outputs: tuple[str, ...], args: Any
) -> FrozenTeacher | AdaptersOffTeacher | DeeperTeacher:
    """The teacher that `self_teacher` names.

    Raises:
        ValueError: If the student is to be sharded, or has no adapters to switch off.
    """
    launched = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # asked for in Accelerate's configuration
    if args.fsdp or args.deepspeed or any(os.environ.get(name, "").lower() == "true" for name in launched):
        raise ValueError(
            f"self_teacher={name!r} needs the student's whole weights on each rank, which FSDP and DeepSpeed "
            "keep in pieces; use DDP, or save a copy of the student and pass it as teacher."
        )
    if name == "deeper":
        if args.torch_compile or args.n_gpu > 1:
            raise ValueError(
                "self_teacher='deeper' looks into the student's layers by hooks, which torch_compile and "
                "several GPUs in one process (DataParallel) don't call: set torch_compile=False, and start "
                "one process per GPU."
            )
        return DeeperTeacher(student, outputs, layers=args.exit_layers)
    if name == "adapters_off":
        return AdaptersOffTeacher(student, outputs, dropout=args.self_teacher_dropout)
    shared: dict[str, Any] = {"device": args.device, "dropout": args.self_teacher_dropout}
    if name == "frozen":
        return FrozenTeacher(student, outputs, **shared)
    return EMATeacher(student, outputs, decay=args.ema_decay, decay_end=args.ema_decay_end, **shared)


def _adapters_off(student: Any) -> Callable[[], Any]:
    if hasattr(student, "disable_adapter"):
        return student.disable_adapter
    if not getattr(student, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"self_teacher='adapters_off' but the student, a {type(student).__name__}, has no adapters: wrap "
            "it (peft.get_peft_model), or set self_teacher='frozen' for a copy of its start."
        )

    @contextmanager
    def off() -> Iterator[None]:
        trained = [p for p in student.parameters() if p.requires_grad]
        student.disable_adapters()
        try:
            yield
        finally:
            student.enable_adapters()
            for parameter in trained:
                parameter.requires_grad_(True)

    return off
