"""A rank that dies, stalls or raises: the other ends with the reason, in bounded time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from hf_kd import whole

from .runs import join, two_ranks


def _train_until(folder: Path, rank: int, step: int, how: str) -> None:
    """Two ranks train; one of them meets its end at a step."""
    from .runs import trainer

    run = trainer(folder, ddp_timeout=20, save_steps=4)
    if int(os.environ["RANK"]) == rank:
        original = run.training_step

        def fatal(*args: Any, **kwargs: Any) -> Any:
            if run.state.global_step == step:
                if how == "raise":
                    raise OSError("the data is gone")
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
            return original(*args, **kwargs)

        run.training_step = fatal  # type: ignore[method-assign]
    run.train()


def ends(folder: Path, logs: Path, rank: int, how: str) -> str:
    """What the surviving rank says."""
    processes = two_ranks(_train_until, folder, rank, 6, how, logs=logs)
    survivor = processes[1 - rank]
    start = time.monotonic()
    status = join(survivor, 100)
    assert status == 1 and time.monotonic() - start < 100
    processes[rank].kill()
    join(processes[rank])
    return (logs / f"rank{1 - rank}.log").read_text()


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    """By the system's memory guard, say; what is on the disk is whole, and one rank alone can go on."""
    said = ends(tmp_path / "out", tmp_path, 1, "kill")
    assert "rank 0 of 2 lost the others after step" in said and "resume_from_checkpoint=True" in said
    assert whole.newest(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-4")


def test_a_rank_that_raises(tmp_path: Path) -> None:
    said = ends(tmp_path / "out", tmp_path, 0, "raise")
    assert "rank 1 of 2 lost the others after step" in said
    assert "the data is gone" in (tmp_path / "rank0.log").read_text()


def test_a_rank_that_stalls(tmp_path: Path) -> None:
    """Stopped, not dead: `ddp_timeout` is what bounds the wait."""
    said = ends(tmp_path / "out", tmp_path, 1, "stop")
    assert "rank 0 of 2 lost the others after step" in said and "ddp_timeout=20 s" in said
