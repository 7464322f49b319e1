"""Every option that is not one of Trainer's own, as dataclasses that need neither torch nor transformers.

The command line, the YAML files, the Python API and the help text all read these fields, so an option is
named, typed, described and checked in one place. `hf_kd.config` joins `DistillationOptions` with
`TrainingArguments`; the others are for the command line only.
"""

from .distillation import DistillationOptions
from .fields import as_mapping, nearest, raise_problems
from .generate import GenerateOptions
from .layers import without_features
from .run import RunOptions
from .shrink import ShrinkOptions
from .student import StudentOptions
from .teach import TeachOptions

__all__ = [
    "DistillationOptions",
    "GenerateOptions",
    "RunOptions",
    "ShrinkOptions",
    "StudentOptions",
    "TeachOptions",
    "as_mapping",
    "nearest",
    "raise_problems",
    "without_features",
]
