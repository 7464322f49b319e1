"""A longer run in small: memory and open files stay where they are. `benchmarks/soak.py` is the long one."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .runs import trainer


class Watch(TrainerCallback):
    """Open files and tracked Python objects, every fifty steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 50 == 0:
            gc.collect()
            self.seen.append((len(os.listdir("/proc/self/fd")), len(gc.get_objects())))


def test_nothing_grows(tmp_path: Path) -> None:
    watch = Watch()
    run = trainer(tmp_path, max_steps=300, save_steps=50, save_total_limit=1, logging_steps=1000)
    run.add_callback(watch)
    run.train()
    files, objects = zip(*watch.seen[1:], strict=True)
    assert len(set(files)) == 1, files
    assert max(objects) - min(objects) < 0.01 * min(objects), objects
