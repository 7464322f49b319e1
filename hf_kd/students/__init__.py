"""Students made out of their teacher: fewer layers, and the weights that stay are the teacher's.

A student is an ordinary Transformers model: it saves, loads, generates and trains without this package.
"""

from __future__ import annotations

from hf_kd.fresh import build_model, fresh_student

from .depth import layer_map
from .initial import init_student, initial_losses
from .memory import remembered_layers
from .vocabulary import trim_vocabulary

__all__ = [
    "build_model",
    "fresh_student",
    "init_student",
    "initial_losses",
    "layer_map",
    "remembered_layers",
    "trim_vocabulary",
]
