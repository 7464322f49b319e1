"""What each model costs at several batch sizes and lengths, on the same inputs, and its peak memory."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_kd import measure
from hf_kd.results import Latency

logger = logging.getLogger(__name__)

#: Rows of a batch; the first is what tables show.
BATCH_SIZES = (32, 1, 8)
# Rows that are looked at to find some of one length.
_SAMPLE = 1024
# Forward passes of the first batch, and of each further one.
_REPEATS, _FURTHER = 30, 10
# A batch that would take all models together longer than this, in seconds, is left out.
_LIMIT = 30.0


def time_models(
    models: Mapping[str, nn.Module], rows: Any, collator: Callable[[list[Any]], Any]
) -> tuple[dict[str, list[Latency]], dict[str, Any] | None]:
    """Time all models on batches of the evaluation rows: 32, 1 and 8 rows, of median and of great length.

    Rows of text are taken in order of length and cut to the shortest of their batch, so that there is no
    padding. The long batch is of the longest rows; where all rows have one length (blocks of a language
    model), a batch cut to a quarter of it is timed instead. What would take longer than half a minute is left
    out, and said.

    Args:
        models: By name; each takes what the collator makes.
        rows: The evaluation rows.
        collator: Makes batches of them.

    Returns:
        The latencies by name, the one that tables show first, and the batch that it was measured on; nothing
        if the models are on different devices.
    """
    devices = {str(measure.device_of(model)) for model in models.values()}
    if len(devices) > 1:
        logger.warning("no latency: the models are on different devices, %s", ", ".join(sorted(devices)))
        return {}, None
    few = sorted((rows[i] for i in range(min(len(rows), _SAMPLE))), key=_length)
    if not few:
        return {}, None
    found: dict[str, list[Latency]] = {name: [] for name in models}
    first: Any = None
    seconds_per_token = 0.0
    for batch in _batches(few, collator):
        size = _size(batch)
        if first is not None and seconds_per_token * size * (_FURTHER + 3) > _LIMIT:
            logger.warning("no latency of %d rows x tokens: it would take over %g s", size, _LIMIT)
            continue
        times = measure.latency(dict(models), batch, repeats=_REPEATS if first is None else _FURTHER)
        for name, seen in times.items():
            found[name].append(seen)
        if first is None:
            first = batch
            seconds_per_token = sum(seen.median_ms for seen in times.values()) / 1000 / max(size, 1)
    return found, first


def _batches(few: list[Any], collator: Callable[[list[Any]], Any]) -> list[Any]:
    """Batches of each size from the middle of the rows, then of the long ones."""

    def made_of(rows: list[Any], length: int | None = None) -> Any:
        return _cut(collator(rows), min(map(_length, rows)) if length is None else length)

    starts = {rows: max(0, (len(few) - rows) // 2) for rows in BATCH_SIZES}
    made = [made_of(few[start : start + rows]) for rows, start in starts.items()]
    middle, longest = _length(few[len(few) // 2]), _length(few[-1])
    if longest > middle:
        made += [made_of(few[-rows:]) for rows in BATCH_SIZES]
    elif middle >= 4:
        made += [made_of(few[-rows:], middle // 4) for rows in BATCH_SIZES]
    return [batch for i, batch in enumerate(made) if _shape(batch) not in map(_shape, made[:i])]


def _cut(batch: Mapping[str, Any], length: int) -> Mapping[str, Any]:
    """The first tokens of every row of text."""
    wide = getattr(batch.get("input_ids"), "shape", ())
    if len(wide) != 2 or not length:
        return batch
    return {
        name: value[:, :length] if isinstance(value, Tensor) and value.shape[:2] == wide else value
        for name, value in batch.items()
    }


def _shape(batch: Mapping[str, Any]) -> tuple[int, ...]:
    ids = batch.get("input_ids")
    return tuple((next(iter(batch.values())) if ids is None else ids).shape)


def _size(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch, or rows where it is not text."""
    shape = _shape(batch)
    return shape[0] * shape[1] if "input_ids" in batch and len(shape) > 1 else shape[0]


def _length(row: Any) -> int:
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    return 0 if ids is None else len(ids)


def peak_memory(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Most bytes that exist at one time during a forward pass without gradient.

    On CUDA what its allocator says. Elsewhere weights, buffers and every tensor that an operator returns,
    for as long as it lives; what a kernel takes and frees within itself is not seen.

    Args:
        model: Its mode and weights are as before.
        batch: What a data collator returns.
    """
    args, kwargs = measure.arguments(model, batch)
    device = measure.device_of(model)
    with torch.no_grad(), measure.eval_mode(model):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            model(*args, **kwargs)
            torch.cuda.synchronize(device)
            return measure.model_bytes(model) + torch.cuda.max_memory_allocated(device) - before
        with _Alive() as alive:
            model(*args, **kwargs)
    return measure.model_bytes(model) + alive.most


class _Alive(TorchDispatchMode):
    """Adds up the bytes of the storages that operators return, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        returned = func(*args, **(kwargs or {}))
        for tensor in _tensors(returned):
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            # A view, or an operator in place: the memory was there before.
            if key in before or key in self._known or not key:
                continue
            self._known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        return returned

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.layout == torch.strided else []
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [found for item in value for found in _tensors(item)] if isinstance(value, list | tuple) else []
