"""How much a teacher's layers and channels matter, measured on a calibration batch."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

#: One batch of model inputs, or several; labels among them give losses.
Calibration = Mapping[str, Any] | Iterable[Mapping[str, Any]]


def batches_of(calibration: Calibration) -> list[dict[str, Any]]:
    """The batches, as a list.

    Raises:
        ValueError: If there are none.
    """
    given = [calibration] if isinstance(calibration, Mapping) else list(calibration)
    batches = [dict(batch) for batch in given if isinstance(batch, Mapping)]
    if not batches or len(batches) != len(given):
        raise ValueError(
            "calibration is a batch of model inputs, such as tokenizer(texts, return_tensors='pt'), or a "
            f"list of them, not {type(calibration).__name__} of {[type(item).__name__ for item in given[:3]]}"
        )
    return batches


@torch.no_grad()
def run(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """The outputs of a model in evaluation mode for each batch."""
    known = inspect.signature(model.forward).parameters
    training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            yield model(**{k: v for k, v in inputs.items() if k in known})
    finally:
        model.train(training)


def mean_loss(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> float | None:
    """The model's own loss, averaged over batches; None where they have no labels."""
    losses = [getattr(outputs, "loss", None) for outputs in run(model, batches)]
    values = [float(loss) for loss in losses if loss is not None]
    return sum(values) / len(values) if values and len(values) == len(losses) else None


def block_influence(
    model: PreTrainedModel, stacks: Iterable[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, list[float]]:
    """How far each layer turns the residual stream: `1 - cos(input, output)`, mean over positions.

    Men et al. 2024, "ShortGPT", equation 1.

    Args:
        model: The teacher.
        stacks: Module paths of its stacks of layers.
        batches: Calibration data; padded positions count like others.

    Returns:
        One number a layer, by stack.
    """
    totals: dict[str, list[list[float]]] = {}

    def watch(path: str, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            totals[path][index].append(float(1 - cosine.mean()))

        return hook

    with contextlib.ExitStack() as stack:
        for path in stacks:
            layers: Any = model.get_submodule(path)
            totals[path] = [[] for _ in layers]
            for i, layer in enumerate(layers):
                handle = layer.register_forward_hook(watch(path, i), with_kwargs=True)
                stack.callback(handle.remove)
        for _ in run(model, batches):
            pass
    return {path: [sum(v) / max(len(v), 1) for v in values] for path, values in totals.items()}


def reader_importance(
    model: PreTrainedModel, readers: Iterable[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """How much each input channel of some linear layers adds to their outputs.

    `E[x_c^2] * |W_c|^2` over positions: the squared norm of what the channel contributes, as in Minitron
    (Muralidharan et al. 2024, section 2.2) with the weights that read an activation beside it.

    Args:
        model: The teacher.
        readers: Module paths of the layers.
        batches: Calibration data.

    Returns:
        `[in_features]` by path; layers that never ran are left out.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            sums[path] = sums.get(path, 0) + rows.square().sum(0)
            counts[path] = counts.get(path, 0) + len(rows)

        return hook

    with contextlib.ExitStack() as stack:
        for path in readers:
            handle = model.get_submodule(path).register_forward_pre_hook(watch(path))
            stack.callback(handle.remove)
        for _ in run(model, batches):
            pass
    scores = {}
    for path, total in sums.items():
        module: Any = model.get_submodule(path)
        outputs = 1 if isinstance(module, Conv1D) else 0
        scores[path] = total / counts[path] * module.weight.detach().float().square().sum(outputs)
    return scores
