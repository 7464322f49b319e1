"""Do ten thousand steps leave memory, open files and the loss where they should be?

    python benchmarks/soak.py --steps 10000 --out soak.json

A student of a few thousand weights distils a teacher, with a log and a checkpoint now and then, and every
hundredth step is looked at: resident memory after a collection, open files, threads, the loss. Memory is flat
if the median of the last tenth is within 1 % of that of the second tenth (the first one warms up).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from tests.faults.runs import trainer  # noqa: E402


class Watch(TrainerCallback):
    """Memory in KiB, open files and threads, every so many steps."""

    def __init__(self, every: int) -> None:
        """Start with nothing seen."""
        self.every, self.seen = every, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look."""
        if state.global_step % self.every == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            kib, files = pages * os.sysconf("SC_PAGE_SIZE") // 1024, len(os.listdir("/proc/self/fd"))
            threads = threading.active_count()
            self.seen.append({"step": state.global_step, "kib": kib, "files": files, "threads": threads})


def main() -> None:
    """Run and print what was seen."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    watch = Watch(max(1, args.steps // 100))
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(
            Path(folder), max_steps=args.steps, save_steps=max(1, args.steps // 20), save_total_limit=2,
            logging_steps=max(1, args.steps // 100), learning_rate=1e-4,
        )  # fmt: skip
        run.add_callback(watch)
        run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    tenth = max(1, len(watch.seen) // 10)
    first = statistics.median(row["kib"] for row in watch.seen[tenth : 2 * tenth])
    last = statistics.median(row["kib"] for row in watch.seen[-tenth:])
    files = [row["files"] for row in watch.seen]
    found = {
        "steps": run.state.global_step, "memory_kib_second_tenth": first, "memory_kib_last_tenth": last,
        "memory_change_percent": 100 * (last / first - 1), "files_first": files[0], "files_most": max(files),
        "files_last": files[-1], "threads_most": max(row["threads"] for row in watch.seen),
        "losses_finite": all(math.isfinite(loss) for loss in losses), "logs": len(losses),
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if args.out:
        args.out.write_text(json.dumps({**found, "seen": watch.seen}) + "\n")


if __name__ == "__main__":
    main()
