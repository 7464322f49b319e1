"""Data for the command line: the Hub, local files and folders, and what every machine has.

`load_raw` finds rows, `load_processor` what reads them, and `prepare` makes of both what a Trainer takes.
"""

from hf_kd.data.builtin import BUILTIN
from hf_kd.data.labels import Labels, describe_labels, label_names
from hf_kd.data.prepare import Prepared, prepare
from hf_kd.data.processors import load_processor, make_image_processor, train_tokenizer
from hf_kd.data.sources import load_raw

__all__ = [
    "BUILTIN",
    "Labels",
    "Prepared",
    "describe_labels",
    "label_names",
    "load_processor",
    "load_raw",
    "make_image_processor",
    "prepare",
    "train_tokenizer",
]
