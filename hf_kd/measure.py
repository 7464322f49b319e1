"""What a model costs, measured so that two models can be compared: parameters, bytes, latency.

The measurements go into a `hf_kd.results.Results`:

    times = latency({"teacher": teacher, "student": student, "control": control}, batch)
    arms = {name: measure_arm(models[name], evaluations[name], latency=[times[name]]) for name in models}
    scored = {"primary_metric": "accuracy", "greater_is_better": True, "examples": len(data)}
    Results("sequence-classification", **scored, arms=arms, machine=machine()).write("results.json")
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import logging
import numbers
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_kd.results import Arm, Latency, Ratio, Results

__all__ = [
    "Arm",
    "Latency",
    "Ratio",
    "Results",
    "count_parameters",
    "latency",
    "machine",
    "measure_arm",
    "model_bytes",
    "saved_bytes",
]

logger = logging.getLogger(__name__)

# A batch with more padding than this says little about real requests.
_MUCH_PADDING = 0.25

# What `evaluate()` returns about itself rather than about the model.
RUNTIME = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch"}


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, each counted once however many modules share it.

    Sharing is seen by memory: two `Parameter` objects over the same numbers (as after `b.data = a.data`, or a
    transposed view) are one. Weights that a quantisation packs count as the numbers they are packed into.
    """
    views: dict[object, set[tuple[object, ...]]] = {}
    counts: dict[object, int] = {}
    for parameter in model.parameters():
        key, view = _storage(parameter), (parameter.storage_offset(), parameter.shape, parameter.stride())
        if view not in views.setdefault(key, set()):
            views[key].add(view)
            # Different views of one memory can overlap, but never hold more numbers than it has room for.
            room = parameter.untyped_storage().nbytes() // max(1, parameter.element_size())
            counts[key] = min(room, counts.get(key, 0) + parameter.numel())
    return sum(counts.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes that parameters and buffers occupy in memory, shared memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def saved_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of the weight files that `from_pretrained(folder)` reads, not of other formats or checkpoints.

    Raises:
        FileNotFoundError: the folder, its weights, or a shard that its index names does not exist.
    """
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return (folder / name).stat().st_size
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{index} names {missing[0]}, which is not there: save the model again"
                )
            return sum((folder / shard).stat().st_size for shard in shards)
    raise FileNotFoundError(f"no weights in {folder}: give a folder that `save_pretrained` wrote")


def latency(
    models: Mapping[str, nn.Module],
    batch: Mapping[str, Any] | Tensor,
    *,
    repeats: int = 30,
    warmup: int = 3,
) -> dict[str, Latency]:
    """Time one forward pass of each model on the same inputs, without gradient, in eval mode.

    The models take turns, each round starting with another one, so that a slow phase of the machine falls on
    all of them. The device is synchronised before and after each pass. Labels are left out of the batch, and
    each model gets the inputs that its `forward` takes; moving them to the device is not timed.

    Args:
        models: by name; all on one device.
        batch: what a data collator returns, or one tensor. Best without padding.
        repeats: timed passes of each model.
        warmup: passes of each model before, which are not timed.

    Returns:
        A `Latency` for each name. Modes and weights of the models are as they were.

    Raises:
        ValueError: `repeats` or `warmup` is too small, the batch has no tensors, or the models are on
            different devices.
        RuntimeError: a model fails on the batch; the message names it.
    """
    if repeats < 5 or warmup < 1:
        raise ValueError(f"repeats is {repeats} and warmup {warmup}: give at least 5 and 1")
    rows, shapes, padding = _describe(batch)
    devices = {name: device_of(model) for name, model in models.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"models are on different devices ({places}): move them to one with `.to(device)`")
    if padding > _MUCH_PADDING:
        logger.warning(
            "latency on a batch of which %.0f %% is padding: use rows of one length", 100 * padding
        )
    calls = {name: arguments(model, batch, devices[name]) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    with contextlib.ExitStack() as stack:
        # Not inference_mode: buffers that a model makes on the way could not be trained with afterwards.
        stack.enter_context(torch.no_grad())
        for model in models.values():
            stack.enter_context(eval_mode(model))
        for turn in range(warmup + repeats):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds = _timed(name, models[name], *calls[name], devices[name])
                if turn >= warmup:
                    times[name].append(1000 * seconds)
    return {
        name: Latency(
            **_spread(times[name]),
            repeats=repeats,
            batch_size=rows,
            inputs=shapes,
            padding=padding,
            device=_device_name(devices[name]),
            dtype=str(_dtype(model)).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )
        for name, model in models.items()
    }


def measure_arm(
    model: nn.Module | None,
    evaluation: Mapping[str, Any],
    *,
    latency: Iterable[Latency] = (),
    folder: str | os.PathLike[str] | None = None,
    peak_memory: int | None = None,
    errors: Mapping[str, float] | None = None,
    prefix: str = "eval_",
    **rest: Any,
) -> Arm:
    """One arm of the comparison from a model and what `trainer.evaluate()` returned for it.

    Args:
        model: measured for its size; None: it is elsewhere, and `rest` says its size if that is known.
        evaluation: metrics by name; those of the run itself (runtime, epoch) and what is not a number are
            left out.
        latency: what `latency` measured, one entry per input shape.
        folder: where the model is saved, for its bytes on disk.
        peak_memory: what `hf_kd.costs.peak_memory` measured, in bytes.
        errors: standard errors by metric, without prefix.
        prefix: of the names in `evaluation` (the `metric_key_prefix` and "_"); taken off.
        **rest: further fields of the arm.
    """
    metrics = {
        name.removeprefix(prefix): float(value)
        for name, value in evaluation.items()
        if name.removeprefix(prefix) not in RUNTIME and isinstance(value, numbers.Real)
    }
    size: dict[str, int | None] = {"parameters": None, "bytes": None}
    if model is not None:
        size = {"parameters": count_parameters(model), "bytes": model_bytes(model)}
    return Arm(
        eval_kl=metrics.pop("kl", None),
        eval_agreement=metrics.pop("agreement", None),
        metrics=metrics,
        **{**size, **rest},
        bytes_on_disk=None if folder is None else _bytes_if_saved(folder),
        latency=list(latency),
        peak_memory=peak_memory,
        errors=dict(errors or {}),
    )


def _bytes_if_saved(folder: str | os.PathLike[str]) -> int | None:
    try:
        return saved_bytes(folder)
    except FileNotFoundError:
        return None


def machine(device: torch.device | str | None = None) -> dict[str, Any]:
    """What the measurements run on: processor, device, threads and versions; nothing that names the machine.

    Args:
        device: the device to name; by default the accelerator if there is one.
    """
    if device is None:
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "device": _device_name(torch.device(device)),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions},
    }


def _storage(tensor: Tensor) -> object:
    """What two tensors over the same memory have in common."""
    pointer = tensor.untyped_storage().data_ptr()
    # Tensors on the meta device have no memory: each is its own.
    return (tensor.device, pointer) if pointer else id(tensor)


def _describe(batch: Mapping[str, Any] | Tensor) -> tuple[int, dict[str, list[int]], float]:
    """Rows, shape of each tensor, and share of padding of a batch."""
    named = {"input": batch} if isinstance(batch, Tensor) else batch
    shapes = {
        name: list(value.shape)
        for name, value in named.items()
        if isinstance(value, Tensor) and value.ndim and not _is_label(name)
    }
    if not shapes:
        raise ValueError(
            f"batch has no input tensors, only {sorted(named)}: give what the data collator returns"
        )
    mask = named.get("attention_mask")
    padding = 1 - mask.float().mean().item() if isinstance(mask, Tensor) and mask.numel() else 0.0
    return next(iter(shapes.values()))[0], shapes, padding


def _is_label(name: str) -> bool:
    return "label" in name or name in ("start_positions", "end_positions")


def arguments(
    model: nn.Module, batch: Mapping[str, Any] | Tensor, device: torch.device | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The batch as the positional and keyword arguments of `model`, on its device and in its dtype."""
    device, dtype = device or device_of(model), _dtype(model)

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() and dtype else value.to(device)

    if isinstance(batch, Tensor):
        return (place(batch),), {}
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # An encoder-decoder without decoder inputs makes them from the labels.
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    needs_labels = encoder_decoder and "decoder_input_ids" not in batch
    return (), {
        name: place(value)
        for name, value in batch.items()
        if (takes_all or name in parameters) and (needs_labels or not _is_label(name))
    }


def _timed(
    name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> float:
    """Seconds of one forward pass, the device idle before and after."""
    try:
        _synchronize(device)
        start = time.perf_counter()
        model(*args, **kwargs)
        _synchronize(device)
        return time.perf_counter() - start
    except Exception as error:
        raise RuntimeError(f"latency: the model called {name!r} fails on the batch: {error}") from error


def _synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; a CPU already has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, and afterwards each module's own mode again (they can differ)."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _spread(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    p95 = statistics.quantiles(times, n=20, method="inclusive")[-1]
    return {"median_ms": median, "iqr_ms": high - low, "p95_ms": p95}


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first weight is; the CPU for one without weights."""
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


def _dtype(model: nn.Module) -> torch.dtype | None:
    tensors = [*model.parameters(), *model.buffers()]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cpu_name() -> str:
    """The processor's name as its maker gives it, or its architecture where the system does not tell."""
    if platform.system() == "Linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
                if line.lower().startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    if platform.system() == "Darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()
