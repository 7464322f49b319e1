"""Kill -9 at any moment of a run that trains from a cache and fills it: the same cache and the same student.

By hand, for other numbers: `python -m tests.test_killed 10`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.teachers import CachedTeacher, EMATeacher, ModelTeacher
from hf_kd.teachers.cache import adding
from hf_kd.teachers.cache.store import check_shard, read_shards

from . import cached
from .heads import HEADS, Collator, models, rows_of
from .test_cached import write

FORK = multiprocessing.get_context("fork")
HEAD = HEADS["single-label"]
ROWS = rows_of(HEAD, 24, seed=3)
STEPS = 12
CASES: dict[str, dict[str, Any]] = {
    "cache": {"alpha": 0.7},
    "ema": {"alpha": 0.7, "self_teacher": "ema", "ema_decay": 0.9},
}


def train(folder: Path, name: str) -> None:
    """Train to the end, from the last checkpoint if there is one; a checkpoint a step."""
    torch.set_num_threads(1)
    adding._SHARD_BYTES = 500
    student, model = models(HEAD)
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": 4, "max_steps": STEPS,
        "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3,
        "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
        "report_to": "none", "logging_steps": 1,
        **CASES[name],
    }  # fmt: skip
    teacher = None
    if name == "cache":
        live = ModelTeacher(model, ("logits",))
        teacher = CachedTeacher(folder / "cache", live=live, miss="compute")
    trainer = DistillationTrainer(
        student,
        DistillationArguments(**settings),
        teacher=teacher,
        train_dataset=ROWS,
        data_collator=Collator(HEAD),
    )
    trainer.train(resume_from_checkpoint=newest_whole(folder / "out"))
    if isinstance(trainer.teacher, EMATeacher):
        trainer.teacher.save(folder)
    trainer.save_model(str(folder / "student"))


def reached(folder: Path) -> int:
    """The last step of which there is a checkpoint."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("out/checkpoint-*")), default=0)


def newest_whole(out: Path) -> str | None:
    """The last checkpoint that was finished: Trainer writes its state last."""
    for path in sorted(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            if json.loads((path / "trainer_state.json").read_text())["global_step"] > 0:
                return str(path)
        except (OSError, ValueError):
            continue
    return None


def quietly(folder: Path, name: str) -> None:
    """In a process of its own, which says nothing."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    train(folder, name)


def begin(folder: Path, name: str) -> Path:
    """A folder with a cache that has a few rows, where the case wants one."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "cache":
        write("single-label", *models(HEAD), ROWS[:4], folder)
    return folder


def killed(folder: Path, name: str, times: int, seed: int) -> tuple[int, int]:
    """Start and kill as often, then let it end: how often it was killed, and the steps it had by then.

    The first may be killed before any checkpoint; each other one soon after a checkpoint of its own, so that
    there is work to lose on a machine of any speed.
    """
    chance, count = random.Random(seed), 0
    quiet = FORK.Process(target=quietly, args=(begin(folder / "whole", name), name))
    quiet.start()
    quiet.join()
    assert quiet.exitcode == 0
    ours = begin(folder / "killed", name)
    for turn in range(times):
        process = FORK.Process(target=quietly, args=(ours, name))
        process.start()
        begun = reached(ours)
        while turn and process.is_alive() and reached(ours) == begun:
            time.sleep(0.001)
        process.join(chance.uniform(0, 0.05 if turn else 0.3))
        count += process.is_alive()
        process.kill()
        process.join()
        for shard in read_shards(ours / "cache") if name == "cache" else []:
            assert check_shard(ours / "cache", shard, content=True) is None
    steps = reached(ours)
    last = FORK.Process(target=quietly, args=(ours, name))
    last.start()
    last.join()
    assert last.exitcode == 0
    return count, steps


def compare(folder: Path, name: str) -> None:
    """Student, average and cache of the killed run are those of the other one."""
    ours, theirs = folder / "killed", folder / "whole"
    files = ["student/model.safetensors", *(["ema.safetensors"] if name == "ema" else [])]
    for file in files:
        one, other = load_file(ours / file), load_file(theirs / file)
        assert one.keys() == other.keys() and len(one) > 10
        for key, values in one.items():
            assert torch.equal(values, other[key]), (file, key)
    if name != "cache":
        return
    read = [CachedTeacher(path / "cache") for path in (ours, theirs)]
    assert read[0].rows >= read[1].rows == len(ROWS)
    for row in ROWS:
        batch = Collator(HEAD)([row])
        a, b = (teacher(batch).dense()["logits"] for teacher in read)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_killed_while_training(tmp_path: Path) -> None:
    """Trap 48: killed at random moments of steps, checkpoints and shards: it ends as if it had not been."""
    count, steps = killed(tmp_path, "cache", 4, seed=0)
    assert count >= 3 and steps > 0
    compare(tmp_path, "cache")


def killed_writer(folder: Path, times: int, seed: int) -> int:
    """The same of a process that writes a cache and does nothing else; the files are equal byte for byte."""
    chance, count = random.Random(seed), 0
    whole = cached.write(folder / "whole")
    for _ in range(times):
        process = FORK.Process(target=cached.write, args=(folder / "killed",), kwargs={"delay": 0.05})
        process.start()
        process.join(chance.uniform(0.02, 0.5))
        count += process.is_alive()
        process.kill()
        process.join()
    assert cached.contents(cached.write(folder / "killed")) == cached.contents(whole)
    return count


def main(times: int) -> None:
    """The same, as often as is asked for, with what happened."""
    with tempfile.TemporaryDirectory() as folder:
        count = killed_writer(Path(folder), times, seed=1)
    sys.stdout.write(f"writing: killed {count} of {times} times; the same files\n")
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            count, steps = killed(Path(folder), name, times, seed=1)
            compare(Path(folder), name)
        sys.stdout.write(
            f"{name}: killed {count} of {times} times, at step {steps} of {STEPS} then; the same student\n"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
