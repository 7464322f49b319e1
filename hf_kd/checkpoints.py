"""Reading a checkpoint whose weights are saved under other names than they have in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def saved_names(folder: str | os.PathLike[str]) -> set[str]:
    """Names of the tensors in the safetensors weights of a folder; empty where there are none."""
    folder = Path(folder)
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        return set(index["weight_map"])
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
            return set(file.keys())
    return set()


def restore_renamed(model: nn.Module, folder: str | os.PathLike[str]) -> bool:
    """Read the weights of a checkpoint into a model whose architecture saves them under other names.

    Some architectures (ViT in Transformers 5.23) have names in memory that differ from those in their files.
    `from_pretrained` translates. Trainer, when it resumes or goes back to the best model, does not: it warns
    of missing keys and goes on with the weights that the model happens to have.

    Args:
        model: What to restore, in place.
        folder: A checkpoint.

    Returns:
        Whether there was anything to translate; if not, the model is left alone.
    """
    if not isinstance(model, PreTrainedModel) or saved_names(folder) <= set(model.state_dict()):
        return False
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True
