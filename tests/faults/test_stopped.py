"""SIGTERM and SIGKILL at random moments: what is left is whole, and the resumed run ends as a quiet one."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from hf_kd import whole
from hf_kd.results import Arm, Results

from .runs import STEPS, child, join, same, train, weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quiet run leaves, and how long it takes."""
    folder = tmp_path_factory.mktemp("quiet") / "out"
    assert join(child(train, folder)) == 0
    return folder


def all_whole(folder: Path) -> None:
    """Every checkpoint that has its name is whole, and so is a student, if there is one."""
    for path in folder.glob("checkpoint-*"):
        assert whole.problem(path) is None, path
    if (folder / "model.safetensors").exists():
        weights(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("seed", range(3))
def test_training(undisturbed: Path, tmp_path: Path, number: signal.Signals, seed: int) -> None:
    """Stopped up to five times, anywhere in training and saving, once it was seen to have come so far."""
    chance, folder, hits = random.Random(f"{seed} {number}"), tmp_path / "out", 0
    for target in sorted(chance.sample(range(1, STEPS - 4), 5)):
        steps = tmp_path / f"until-{target}"
        process = child(train, folder, resume=True, delay=0.01, steps=steps)
        while process.is_alive() and not (steps.exists() and len(steps.read_bytes()) >= target):
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.02))  # somewhere in the step, or in what is saved after it
        if process.is_alive():
            hits += 1
            os.kill(process.pid or 0, number)
        join(process)
        all_whole(folder)
    assert hits
    assert join(child(train, folder, resume=True)) == 0
    all_whole(folder)
    assert same(weights(folder), weights(undisturbed))
    assert not list(folder.glob(f"{whole.SAVING}*"))


def _in_the_middle(folder: Path, after: int) -> None:
    """Die by SIGKILL at the `after`-th file that saving brings to the disk."""
    real, count = os.fsync, 0

    def deadly(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == after:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = deadly
    train(folder)


@pytest.mark.parametrize("after", [1, 4, 12, 13, 40, 78, 79, 80])
def test_saving(undisturbed: Path, tmp_path: Path, after: int) -> None:
    """Killed between any two files of a checkpoint, before its rename, or within the final student."""
    folder = tmp_path / "out"
    status = join(child(_in_the_middle, folder, after))
    assert status == -signal.SIGKILL
    all_whole(folder)
    assert join(child(train, folder, resume=True)) == 0
    assert same(weights(folder), weights(undisturbed))


def _report(folder: Path) -> None:
    from hf_kd.pages import write_html

    arm = Arm(metrics={"accuracy": 0.5}, parameters=1, bytes=1)
    log = [{"step": float(i), "loss": 1.0 / (i + 1)} for i in range(200)]
    while True:
        results = Results("t", "accuracy", True, {"teacher": arm, "student": arm}, training=log)
        results.write(folder / "results.json")
        write_html(results, folder)


def test_reporting(tmp_path: Path) -> None:
    """Killed while it writes results and page, again and again: a file is the old one or the new one."""
    chance = random.Random(0)
    for _ in range(6):
        process = child(_report, tmp_path)
        while not (tmp_path / "report.html").exists() and process.is_alive():
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 0.6))
        process.kill()
        process.join()
        if (tmp_path / "results.json").exists():
            assert len(Results.read(tmp_path / "results.json").training) == 200
        if (tmp_path / "report.html").exists():
            assert (tmp_path / "report.html").read_text().rstrip().endswith("</html>")
    assert (tmp_path / "report.html").exists()


def test_the_undisturbed_run(undisturbed: Path) -> None:
    """What the others are compared with went to its end and kept its limit of checkpoints."""
    names = sorted(path.name for path in undisturbed.glob("checkpoint-*"))
    assert names == sorted(f"checkpoint-{step}" for step in (STEPS - 10, STEPS - 5, STEPS))
    assert not list(undisturbed.rglob("training_args.bin"))
