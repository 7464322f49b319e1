"""Models in pieces over the ranks: FSDP 2 for the teacher as well, and a student that is saved whole."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .teachers import EMATeacher, Ensemble, ModelTeacher, Teacher

logger = logging.getLogger(__name__)


def in_pieces(model: nn.Module) -> bool:
    """Whether some of a model's parameters are distributed over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def shard_teacher(
    teacher: Teacher | None,
    accelerator: Accelerator,
    wanted: bool | None,
    student: nn.Module | None = None,
) -> None:
    """Distribute a teacher's parameters over the ranks, if it is a model and the student is distributed so.

    Each layer is gathered for its forward and let go after it, so that a rank holds its share of the teacher
    and one whole layer. What is asked of the teacher stays the same.

    Args:
        teacher: Any teacher; models in memory are changed in place.
        accelerator: Of the run.
        wanted: The option `shard_teacher`; None: where FSDP 2 shards the student.
        student: Not changed.

    Raises:
        ValueError: If it is wanted where there is no FSDP 2, or of a teacher that can't be sharded; or if a
            model lies in DeepSpeed's pieces.
    """
    for role, model in (("teacher", getattr(teacher, "model", None)), ("model", student)):
        if isinstance(model, nn.Module) and any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError(
                f"{role}: its weights lie in pieces, since it was loaded while DeepSpeed's ZeRO-3 was on. "
                f"Give its name instead ({role}='DIR_OR_ID' is loaded whole, the engine takes the student "
                "apart), or load it before DistillationArguments is made."
            )
    if wanted and not accelerator.is_fsdp2:
        kind = accelerator.distributed_type.value
        raise ValueError(
            f"shard_teacher=True needs FSDP 2, but the run is distributed as {kind}: "
            "launch with hf_kd/accelerate/fsdp2.yaml, or drop shard_teacher (teacher_device_map spreads a "
            "teacher over the devices of one process)."
        )
    if wanted is False or not accelerator.is_fsdp2 or teacher is None:
        return
    for one in [member.teacher for member in teacher.members] if isinstance(teacher, Ensemble) else [teacher]:
        obstacle = _obstacle(one)
        if obstacle is None:
            assert isinstance(one, ModelTeacher)
            one.identity  # noqa: B018 -- the fingerprint is of whole weights
            shard(one.model, accelerator)
        elif wanted:
            raise ValueError(f"shard_teacher=True, but this teacher {obstacle}; drop shard_teacher.")


def _obstacle(teacher: Teacher) -> str | None:
    if not isinstance(teacher, ModelTeacher) or isinstance(teacher, EMATeacher):
        return "is not a model of its own in memory"
    if getattr(teacher.model, "hf_device_map", None) is not None:
        return "is spread by teacher_device_map already"
    if any(not p.is_floating_point() for p in teacher.model.parameters()):
        return "is quantised"
    return None


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Distribute a frozen model in place: a unit a layer, one for its head, and one for the rest.

    The head stays whole once it was read: the fused loss reads it after the forward, and it never changes.

    Args:
        model: Of any architecture; its `_no_split_modules` are the layers.
        accelerator: Whose FSDP 2 plugin says whether shards lie in the CPU's memory.
    """
    if isinstance(model, FSDPModule):
        return
    plugin: Any = accelerator.state.fsdp_plugin
    offload = CPUOffloadPolicy() if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else OffloadPolicy()
    units = layer_classes(model)
    for module in list(model.modules()):
        if type(module).__name__ in units:
            fully_shard(module, reshard_after_forward=True, offload_policy=offload)
    head, embedding = _part(model, "get_output_embeddings"), _part(model, "get_input_embeddings")
    if head is not None and head is not model:
        tied = embedding is not None and embedding.weight is getattr(head, "weight", None)
        fully_shard([embedding, head] if tied else head, reshard_after_forward=False, offload_policy=offload)
    fully_shard(model, reshard_after_forward=True, offload_policy=offload)


def layer_classes(model: nn.Module) -> list[str]:
    """Names of a model's layers, without what holds its input embedding: that may be tied to its head."""
    embedding = _part(model, "get_input_embeddings")
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: set[str] = set()
    holders: set[str] = set()
    for module in model.modules():
        kind = holders if embedding is not None and embedding in module.modules() else found
        kind.add(type(module).__name__)
    return sorted((names & found) - holders)


def _part(model: nn.Module, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def name_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """Tell FSDP 2 which layers to wrap, where nobody did.

    Accelerate takes all of `_no_split_modules`, then shards the input embedding once more, which fails where
    one of them holds it (BERT's `BertEmbeddings`).
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.is_fsdp2 and plugin.transformer_cls_names_to_wrap is None and layer_classes(model):
        plugin.transformer_cls_names_to_wrap = layer_classes(model)


def prepare_for_evaluation(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard a student that is evaluated before it is trained; Accelerate does so only beside an optimizer."""
    if accelerator.is_fsdp2 and not accelerator._models:
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))


def refuse_pieces(model: nn.Module, accelerator: Accelerator) -> None:
    """Training begins with whole parameters: Accelerate gives an optimizer their pieces only then.

    Raises:
        ValueError: If the model was sharded before, by an evaluation or another training.
    """
    if accelerator.is_fsdp2 and in_pieces(model):
        raise ValueError(
            "train() was called with a model that FSDP 2 holds in pieces already, from evaluate() or another "
            "train(): make a new trainer with a model that is whole (evaluate first with eval_on_start=True; "
            "go on with resume_from_checkpoint)."
        )


def whole_state(model: nn.Module, accelerator: Accelerator) -> dict[str, Any] | None:
    """The weights of a model in pieces, whole on rank 0; None where Trainer gathers them itself."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if not accelerator.is_fsdp2 or "FULL_STATE_DICT" in str(plugin.state_dict_type):
        return None
    return accelerator.get_state_dict(model)
