"""Teachers that are models in memory."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .signal import TeacherSignal, named_logits

logger = logging.getLogger(__name__)

#: A column with this prefix is the teacher's own version of a column (another processor's pixels, say).
TEACHER_PREFIX = "teacher_"


def base_model(model: Any) -> Any:
    """The model itself, or the one under its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a model's `forward` declares (those of the base model under adapters).

    Arguments swallowed by `**kwargs` do not count: a model that ignores `token_type_ids` in silence must not
    hide that another model needs them.
    """
    base = base_model(model)
    parameters = inspect.signature(base.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in parameters if p.kind in kinds)


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights: names, shapes and a fixed sample of each tensor's values.

    A sample keeps a billion parameters cheap to identify; any training step changes nearly all of them.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue  # quantised modules keep settings among their weights
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.device.type == "meta" or tensor.numel() == 0:
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)]
        # Quantised storage has integer dtypes: one float type makes the hash independent of it.
        digest.update(sample.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class ModelTeacher:
    """One model, frozen and in evaluation mode, that answers with dense logits.

    Args:
        model: The teacher. Its parameters are frozen (`requires_grad_(False)`) and it is put in evaluation
            mode. It is moved to `device` unless it is quantised or already spread by a device map.
        outputs: The outputs that the task reads, for example `("logits",)`.
        device: Where to put it.
        name: What to call it in checkpoints; default: the model's `name_or_path`.
        revision: The revision that it was loaded at, if any.
        fingerprint: Of its weights, where they can't be read any more (packed by quantisation).
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: tuple[str, ...],
        *,
        device: torch.device | None = None,
        name: str | None = None,
        revision: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Freeze and place the model."""
        self.model = model.eval().requires_grad_(False)
        self.outputs = outputs
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        config = getattr(model, "config", None)
        self.revision = revision or getattr(config, "_commit_hash", None) or ""
        placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
        if device is not None and not placed:
            model.to(device)
        #: Applied to the student's `pixel_values` where the two models normalise differently.
        self.pixels: Callable[[Tensor], Tensor] | None = None
        #: The teacher's id of each of the student's tokens, where the student's vocabulary was trimmed.
        self.tokens: Tensor | None = None
        #: Of columns that are this teacher's own, the first that is there wins.
        self.prefixes: tuple[str, ...] = (TEACHER_PREFIX,)
        self._parameters = forward_parameters(model)
        self._fingerprint = fingerprint
        self._identity: dict[str, str] | None = None

    @property
    def identity(self) -> dict[str, str]:
        """Name, revision and weight fingerprint. The fingerprint decides whether teachers differ."""
        if self._identity is None:
            self._identity = {
                "name": self.name,
                "revision": str(self.revision),
                "fingerprint": self._fingerprint or fingerprint(self.model),
            }
        return dict(self._identity)

    @property
    def columns(self) -> tuple[str, ...]:
        """The arguments of the model's forward, plain and with the `teacher_` prefix."""
        own = (prefix + name for prefix in self.prefixes for name in self._parameters)
        return (*self._parameters, *own)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a batch that this model's forward declares; its own `teacher_` columns win."""
        own = {}
        for name in self._parameters:
            found = next((p + name for p in (*self.prefixes, "") if p + name in batch), None)
            if found is not None:
                own[name] = batch[found]
            if self.pixels is not None and found == name == "pixel_values":
                own[name] = self.pixels(batch[name])
        if self.tokens is not None:
            for name in ("input_ids", "decoder_input_ids"):
                if name in own and own[name] is batch.get(name):
                    own[name] = self.tokens.to(batch[name].device)[batch[name]]
        if "use_cache" in self._parameters:
            # A key-value cache would be built for every batch and thrown away.
            own["use_cache"] = False
        return own

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """Run the model on its own columns of the batch, without autograd and without dropout."""
        return self._ask(batch)

    def _ask(self, batch: Mapping[str, Any], *, dropout: bool = False) -> TeacherSignal:
        if dropout:
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()  # its running statistics would drift
        elif self.model.training:
            self.model.eval()
        inputs = {
            name: self._cast(value) if isinstance(value, Tensor) else value
            for name, value in self.inputs(batch).items()
        }
        return TeacherSignal(logits=named_logits(self.model(**inputs), self.outputs))

    def _cast(self, value: Tensor) -> Tensor:
        """Pixels and audio follow the teacher's dtype, which is not the student's."""
        dtype = getattr(self.model, "dtype", None)
        quantised = getattr(self.model, "is_quantized", False)
        if value.is_floating_point() and isinstance(dtype, torch.dtype) and not quantised:
            return value.to(dtype)
        return value
