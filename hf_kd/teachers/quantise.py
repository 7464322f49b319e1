"""Teachers in fewer bits: dynamic int8 on the CPU, or bitsandbytes where it is installed."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import nn

INT8 = "int8-dynamic"


def quantise(model: nn.Module, name: str, device: torch.device) -> nn.Module:
    """A copy whose linear layers hold int8 weights and quantise their inputs as they come.

    Args:
        model: The teacher; left as it is.
        name: The option `teacher_quantization`.
        device: Where it will run.

    Raises:
        ValueError: If the model is there already and bitsandbytes was asked for, or int8 off the CPU.
    """
    if name != INT8:
        if getattr(model, "is_quantized", False):
            return model  # by `from_pretrained`
        raise ValueError(
            f"teacher_quantization={name!r} is done while a checkpoint is read, but the teacher is a "
            f"{type(model).__name__} in memory: pass its id or directory, or load it with a "
            "BitsAndBytesConfig."
        )
    if device.type != "cpu":
        raise ValueError(
            f"teacher_quantization={name!r} runs on the CPU, but the device is {str(device)!r}: set "
            "use_cpu=True, or teacher_quantization='bnb-8bit'."
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(f"teacher_quantization={name!r}, but the teacher is quantised already: drop it.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces a successor
        copy: Any = torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)
    copy.is_quantized = True
    return copy


def loading_options(name: str | None) -> dict[str, Any]:
    """What `from_pretrained` needs for a quantisation that is done there; empty for the others.

    Raises:
        ValueError: If bitsandbytes is not installed.
    """
    if name is None or name == INT8:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"teacher_quantization={name!r} needs bitsandbytes, which is not installed: pip install "
            f"bitsandbytes, or set teacher_quantization={INT8!r} on a CPU."
        )
    from transformers import BitsAndBytesConfig

    bits = {"load_in_8bit": True} if name == "bnb-8bit" else {"load_in_4bit": True}
    return {"quantization_config": BitsAndBytesConfig(**bits)}
