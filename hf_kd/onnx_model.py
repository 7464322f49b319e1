"""A student as an ONNX file: written by PyTorch's exporter, run by ONNX Runtime, compared with PyTorch."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_kd.measure import eval_mode
from hf_kd.pair import Pair
from hf_kd.tasks import Task
from hf_kd.tasks.base import full_precision
from hf_kd.teachers.models import forward_parameters
from hf_kd.teachers.signal import named_logits

_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def require_onnx() -> None:
    """Raise a `ValueError` that says how to install what an export needs, if it is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"export needs {', '.join(missing)}: pip install 'hf-kd[export]'")


class _Heads(nn.Module):
    """A model whose forward takes a dict of inputs and returns the task's outputs alone."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.outputs = model, task.logits
        self.more = {"use_cache": False} if "use_cache" in forward_parameters(model) else {}

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The task's outputs, in order."""
        return tuple(named_logits(self.model(**inputs, **self.more), self.outputs).values())


def export_onnx(model: nn.Module, batch: Mapping[str, Any], path: Path, *, task: Task) -> Path:
    """Write a model's forward pass, from the inputs of a batch to the task's outputs, as ONNX.

    The number of rows is free, and so is the length of text and sound.

    Args:
        model: On the CPU; its mode is as before.
        batch: Two rows or more, as the data collator makes them.
        path: The file.
        task: Which outputs are wanted.

    Raises:
        ValueError: If the extra `export` is not installed, the task generates with a decoder, or PyTorch
            can't export the model; says why.
    """
    require_onnx()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"task={task.name!r} has an encoder and a decoder that generates step by step, which one ONNX "
            "graph of a forward pass can't: export encoders, classifiers and decoders alone"
        )
    inputs = tensors_of(model, batch, task)
    dimensions = {name: _free(name, value, inputs) for name, value in inputs.items()}
    wrapped = _Heads(model, task)
    try:
        with eval_mode(wrapped), torch.no_grad(), _silent():
            program = torch.onnx.export(
                wrapped,
                (),
                kwargs={"inputs": inputs},
                dynamic_shapes={"inputs": dimensions},
                input_names=list(inputs),
                output_names=list(task.logits),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"PyTorch can't export {type(model).__name__} to ONNX: {reason[0] if reason else error!r}. A "
            "model with another attention may do: load it with attn_implementation='eager'"
        ) from error
    assert program is not None
    program.save(str(path))
    return path


def tensors_of(model: nn.Module, batch: Mapping[str, Any], task: Task) -> dict[str, Tensor]:
    """The tensors of a batch that a model's forward takes, without labels."""
    inputs = Pair(model, None, task, device="cpu").student_inputs(task.model_inputs(batch, model))
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def _free(name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> dict[int, Any]:
    """The axes whose size may change: rows, and the length of text and sound."""
    free: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
    text = inputs.get("input_ids")
    long = (text is not None and value.shape == text.shape) or name in ("input_values", "input_features")
    if long and value.ndim > 1:
        free[value.ndim - 1] = torch.export.Dim.DYNAMIC
    return free


def quantise(source: Path, target: Path) -> Path:
    """Write an ONNX model with its weights in 8 bits (dynamic quantisation, one scale a channel).

    Activations are quantised as the model runs. One bit of range is left free, since 8-bit products overflow
    on processors without VNNI.
    """
    require_onnx()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a pre-processing that the exporter did
    try:
        quantize_dynamic(
            str(source), str(target), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
        )
    finally:
        root.setLevel(level)
    return target


class OnnxModel(nn.Module):
    """An ONNX file as a module: the same inputs and named outputs as the student it was made of.

    Args:
        path: The file.
        config: The student's, for its label names.
    """

    def __init__(self, path: Path, config: Any = None) -> None:
        """Open the file on the CPU, with PyTorch's number of threads."""
        require_onnx()
        import onnxruntime

        super().__init__()
        self.config, self.path = config, path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        outputs = [made.name for made in session.get_outputs()]

        def forward(**batch: Any) -> dict[str, Tensor]:
            missing = [name for name in names if not isinstance(batch.get(name), Tensor)]
            if missing:
                raise ValueError(f"{path.name} takes {names}, and the batch has no {missing}")
            found = session.run(outputs, {name: batch[name].cpu().numpy() for name in names})
            return dict(zip(outputs, map(torch.from_numpy, found), strict=True))

        parameters = [Parameter(name, Parameter.KEYWORD_ONLY) for name in names]
        forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    @property
    def bytes(self) -> int:
        """Of the file, and of the weights that lie beside it."""
        beside = self.path.with_name(self.path.name + ".data")
        return self.path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


@dataclass(frozen=True)
class Agreement:
    """How an exported model answers beside the original.

    Attributes:
        difference: The largest absolute difference of a logit.
        scale: The largest absolute logit of the original.
        same: Share of positions with the same top class; None for heads without classes.
        positions: How many positions were compared.
    """

    difference: float
    scale: float
    same: float | None
    positions: int

    @property
    def relative(self) -> float:
        """The difference relative to the largest logit, where that is above 1."""
        return self.difference / max(1.0, self.scale)


@torch.no_grad()
def compare(
    model: nn.Module, exported: OnnxModel, batches: Iterable[Mapping[str, Any]], *, task: Task
) -> Agreement:
    """Run both on batches and compare what they answer at every position that counts.

    Args:
        model: The PyTorch student, on the CPU.
        exported: The ONNX model.
        batches: As the data collator makes them.
        task: Where positions are.
    """
    difference = scale = 0.0
    same = positions = 0
    with eval_mode(model):
        for batch in batches:
            inputs = tensors_of(model, batch, task)
            counted = task.supervise_batch(batch).kd_weight > 0
            ours, theirs = (
                full_precision(task.flat(named_logits(run(**inputs), task.logits), batch))
                for run in (model, exported)
            )
            if len(counted) == len(ours):
                ours, theirs = ours[counted], theirs[counted]
            difference = max(difference, float((ours - theirs).abs().max()))
            scale = max(scale, float(ours.abs().max()))
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            positions += len(ours)
    return Agreement(difference, scale, same / positions if task.kind == "classes" else None, positions)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Leave out the exporter's remarks about packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
