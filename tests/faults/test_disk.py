"""Disks that are full, read-only or lie; folders that are in use; clocks that jump."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from hf_kd import whole
from hf_kd.locks import alone, output_dir
from hf_kd.whole import CheckpointError

from .runs import STEPS, child, join, same, train, trainer, weights


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("done") / "out"
    train(folder)
    return folder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_while_saving(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Says what is safe; nothing half written stays; after room was made the end is the same."""
    folder, real, calls = tmp_path / "out", os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(CheckpointError) as caught:
            train(folder)
    message = str(caught.value)
    assert os.strerror(number) in message and "MiB are free" in message
    assert "The newest whole checkpoint is" in message and "resume_from_checkpoint=True" in message
    assert not list(folder.glob(f"{whole.SAVING}*"))
    assert all(whole.problem(path) is None for path in folder.glob("checkpoint-*"))
    train(folder, resume=True)
    assert same(weights(folder), weights(done))


def test_torch_save_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's state is written by torch, whose error names no disk: ours does."""
    import torch

    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="unexpected pos.*MiB are free there. There is no whole"):
        train(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*checkpoint-*"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the first step."""
    real = Path.open

    def read_only(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode and self.parent == tmp_path:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(self, mode, *args, **kwargs)

    run = trainer(tmp_path)
    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(ValueError, match="can't be written.*Read-only file system.*choose another folder"):
        run.train()
    assert run.state.global_step == 0


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        trainer(tmp_path / "out").train()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["cut", "remove"])
def test_a_checkpoint_that_lost_a_part(
    done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    """The newest whole one is used, and said; asked for by name, the damaged one is refused."""
    import shutil

    folder = Path(shutil.copytree(done, tmp_path / "out"))
    path = folder / f"checkpoint-{STEPS}" / file
    path.write_bytes(path.read_bytes()[:-9]) if damage == "cut" else path.unlink()
    with caplog.at_level(logging.WARNING):
        assert whole.newest(folder) == str(folder / f"checkpoint-{STEPS - 5}")
    assert f"checkpoint-{STEPS} is not whole" in caplog.text and "an older checkpoint is used" in caplog.text
    with pytest.raises(CheckpointError, match=f"is not whole: .*The newest whole .*-{STEPS - 5}"):
        trainer(folder).train(resume_from_checkpoint=str(path.parent))
    if file == "model.safetensors":
        (folder / "model.safetensors").unlink()
        train(folder, resume=True)
        assert same(weights(folder), weights(done))


def test_checkpoints_of_plain_trainer(done: Path, tmp_path: Path) -> None:
    """They have no list: what can be told is told."""
    import shutil

    folder = Path(shutil.copytree(done / f"checkpoint-{STEPS}", tmp_path / "checkpoint-7"))
    (folder / whole.LIST_FILE).unlink()
    assert whole.problem(folder) is None
    model = folder / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-9])
    assert whole.problem(folder)
    (folder / "trainer_state.json").unlink()
    assert whole.problem(folder) == "it has no trainer_state.json"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "\0"])
def test_a_list_that_leads_elsewhere(done: Path, tmp_path: Path, name: str) -> None:
    import shutil

    folder = Path(shutil.copytree(done / f"checkpoint-{STEPS}", tmp_path / "checkpoint-7"))
    (folder / whole.LIST_FILE).write_text(json.dumps({"files": {name: 1}}))
    assert "is no file of it" in str(whole.problem(folder))


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    """The second is refused before it writes; the lock goes with its process, however that ends."""
    process = child(train, tmp_path / "out", delay=0.2)
    while not (tmp_path / "out" / "checkpoint-5").exists():
        time.sleep(0.05)
        assert process.is_alive()
    with pytest.raises(ValueError, match="is in use by another run: wait for it, or choose another folder"):
        trainer(tmp_path / "out").train()
    process.kill()
    join(process)
    train(tmp_path / "out", resume=True)


def test_a_process_may_hold_its_lock_twice(tmp_path: Path) -> None:
    with output_dir(tmp_path), output_dir(tmp_path / "." / "."), alone(tmp_path, RuntimeError):
        pass
    with output_dir(tmp_path):
        pass


def test_a_clock_that_jumps(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day back between two checkpoints: the older one looks newer, and is deleted all the same."""
    folder, real, calls = tmp_path / "out", time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return real() + (-86_400 if calls % 3 else 86_400)

    original = whole.rotate

    def rotate(home: Path, new: str, *args: Any) -> None:
        step = int(new.rpartition("-")[2])
        os.utime(home / new, (real() - 1000 * step,) * 2)  # each checkpoint older than the one before
        original(home, new, *args)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(whole, "rotate", rotate)
    train(folder)
    assert same(weights(folder), weights(done))
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == sorted(
        p.name for p in done.glob("checkpoint-*")
    )


def test_left_over_by_a_kill(tmp_path: Path) -> None:
    """Half a checkpoint is removed; one that was set aside for a newer that never came is put back."""
    (tmp_path / f"{whole.SAVING}checkpoint-9").mkdir()
    (tmp_path / f"{whole.SAVING}old-checkpoint-5").mkdir()
    (tmp_path / f"{whole.SAVING}old-checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6").mkdir()
    whole.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    """`save_total_limit` keeps the best and the newest, by step."""
    for step in (5, 10, 15, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    whole.rotate(tmp_path, "checkpoint-20", 2, str(tmp_path / "checkpoint-5"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-5"]
    whole.rotate(tmp_path, "checkpoint-20", 1, None)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-20"]
