"""What `hf-kd generate` samples, from which teacher, and where it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .fields import DTYPE_NAMES, option, raise_problems, unknown_names, unset


@dataclass(kw_only=True)
class GenerateOptions:
    """Prompts, sampling, and the folder of the data."""

    teacher: str | None = option(None, "Hub id or directory of a causal or sequence-to-sequence model")
    teacher_revision: str | None = option(None, "its branch, tag or commit on the Hub")
    teacher_dtype: str | None = option(None, "its dtype (default: its checkpoint's)")
    teacher_device_map: str | None = option(None, "its device map (default: one device a process)")
    trust_remote_code: bool = option(False, "run model code that comes with its checkpoint")
    processor: str | None = option(None, "tokenizer (default: the teacher's)")
    task: str | None = option(None, "causal-lm or seq2seq-lm (default: from the teacher's class)")
    output_dir: str | None = option(None, "folder of the data; an unfinished one is gone on with")
    dataset: str | None = option(None, "prompts: Hub id, directory, file (default: none, from nothing)")
    dataset_config: str | None = option(None, "configuration of a Hub dataset")
    split: str = option("train", "split of the prompts")
    prompt_column: str | None = option(None, "their column (default: prompt, or by task)")
    max_prompt_length: int = option(256, "tokens that a prompt is cut to")
    num_rows: int | None = option(None, "rows to sample from nothing, or the most prompts to take")
    samples_per_prompt: int = option(1, "rows of each prompt")
    max_new_tokens: int = option(128, "the most tokens of a row")
    temperature: float = option(1.0, "of the sampling; 0 takes the likeliest token")
    top_p: float = option(1.0, "sample from the likeliest tokens with this much mass")
    top_k: int | None = option(None, "sample from so many of the likeliest tokens (default: all)")
    seed: int = option(42, "of all random numbers")
    batch_size: int = option(16, "rows decoded together")
    shard_rows: int = option(1024, "rows a file; what is lost at most when the run is stopped")
    signal_entries: int = option(32, "entries of the teacher's distribution per token; 0: store none")
    signal_temperature: float = option(1.0, "temperature of that distribution")

    def validate(self) -> None:
        """Raise one `ValueError` that lists every problem of these options."""
        found = unset(self, {"teacher": "give a directory or Hub id", "output_dir": "give a folder"})
        positive = "max_prompt_length num_rows samples_per_prompt max_new_tokens top_k batch_size shard_rows"
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name}={value} is below 1: set it higher or leave it out")
        if not 0.0 <= self.temperature < math.inf:
            found.append(f"temperature={self.temperature} is not 0 or above: set e.g. 1")
        if not 0.0 < self.top_p <= 1.0:
            found.append(f"top_p={self.top_p} is outside (0, 1]: set e.g. 0.95")
        if not 0 <= self.signal_entries <= 255:
            found.append(f"signal_entries={self.signal_entries} is outside 0 to 255: set e.g. 32")
        if not 0.0 < self.signal_temperature < math.inf:
            found.append(f"signal_temperature={self.signal_temperature} is not above 0: set e.g. 1")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed} is not in [0, 2^63): set e.g. 42")
        raise_problems(found + self._other_problems())

    def _other_problems(self) -> list[str]:
        found = []
        if self.shard_rows % max(self.batch_size, 1):
            found.append(
                f"shard_rows={self.shard_rows} is no multiple of batch_size={self.batch_size}: set "
                f"shard_rows={self.batch_size * max(1, self.shard_rows // max(self.batch_size, 1))}"
            )
        if self.task not in (None, "causal-lm", "seq2seq-lm"):
            found.append(f"task={self.task!r} does not generate: use causal-lm or seq2seq-lm")
        if self.dataset is None and self.num_rows is None:
            found.append("num_rows is not set: without a dataset of prompts, say how many rows to sample")
        if self.dataset is None and self.task == "seq2seq-lm":
            found.append("dataset is not set: a sequence-to-sequence model answers prompts")
        return found + unknown_names(self, {"teacher_dtype": (*DTYPE_NAMES, None)})
