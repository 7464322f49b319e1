"""What `hf-kd teach` loads, where students find it, and what it tells them, as options."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .fields import DTYPE_NAMES, option, raise_problems, unknown_names, unset
from .teacher import QUANTIZATION_NAMES

FIDELITY_NAMES = ("auto", "logits", "hidden", "sparse")


@dataclass(kw_only=True)
class TeachOptions:
    """A model that answers students in other processes."""

    teacher: str | None = option(None, "Hub id or directory of a model that reads tokens")
    address: str | None = option(None, "host:port of the first of these processes, as students reach it")
    students: int | None = option(None, "ranks that will ask; it ends when all have left (default: never)")
    fidelity: str = option("auto", "logits, hidden, sparse, or auto: hidden states of large vocabularies")
    entries: int = option(28, "entries a position, sparse")
    bits: int = option(16, "bits of their log-probabilities, 8 or 16")
    temperature: float = option(1.0, "of a sparse signal; the student's must be the same")
    idle_timeout: float = option(3600.0, "seconds without a question after which it ends with an error")
    processor: str | None = option(None, "its tokenizer (default: the one beside the teacher)")
    task: str | None = option(None, "e.g. causal-lm (default: from the teacher's class)")
    teacher_revision: str | None = option(None, "branch, tag or commit of the teacher on the Hub")
    teacher_dtype: str | None = option(None, "dtype of the teacher (default: its checkpoint's)")
    teacher_device_map: str | None = option(None, "device map of the teacher (default: one device)")
    teacher_quantization: str | None = option(None, "int8-dynamic (on the CPU), bnb-8bit, bnb-4bit")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")

    def validate(self) -> None:
        """Raise one `ValueError` that lists every problem of these options."""
        found = unset(self, {"teacher": "give a directory or Hub id", "address": "give host:port"})
        found += unknown_names(
            self,
            {
                "fidelity": FIDELITY_NAMES,
                "teacher_dtype": (*DTYPE_NAMES, None),
                "teacher_quantization": (*QUANTIZATION_NAMES, None),
            },
        )
        if self.students is not None and self.students < 1:
            found.append(f"students={self.students} is below 1: set the number of ranks, or leave it out")
        if not 1 <= self.entries <= 255:
            found.append(f"entries={self.entries} is outside 1 to 255: set e.g. 28")
        if self.bits not in (8, 16):
            found.append(f"bits={self.bits} is not known: use 8 or 16")
        for name in ("temperature", "idle_timeout"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                found.append(f"{name}={value} is not above 0 and finite: leave it out for the default")
        raise_problems(found)
