"""What a student's config remembers of how it was made; an exported student has none of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

#: Config attribute: for each stack (by config option), the teacher layer of every student layer.
LAYERS = "hf_kd_layers"
#: Config attribute: for each token of the student, its id in the teacher's vocabulary.
VOCABULARY = "hf_kd_vocabulary"


def remembered_layers(config: Any) -> dict[str, list[int]] | None:
    """The teacher layer of every student layer, by stack; None for a model that `init_student` did not make.

    Stacks are named by the config option that counts them, such as `num_hidden_layers` or `decoder_layers`.
    """
    return getattr(config, LAYERS, None)


@contextlib.contextmanager
def forgotten(config: Any, *, wanted: bool = True) -> Iterator[None]:
    """Leave out, while something is saved, what only distillation needs."""
    own = getattr(config, "__dict__", {}) if wanted else {}
    held = {name: own.pop(name) for name in (LAYERS, VOCABULARY) if name in own}
    try:
        yield
    finally:
        for name, value in held.items():
            setattr(config, name, value)
