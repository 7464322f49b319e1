"""Whatever ends a run, what it leaves is whole or is not there: checkpoints and models, beside and renamed.

A checkpoint is written into `.saving-checkpoint-N`, brought to the disk, listed with the size of every file
in `checkpoint.json`, and renamed: a rename happens or does not. A model is written into `.saving-model` and
moved file by file, the index of its shards last, so that no set of shards is read before it is complete. What
a killed run left beside is removed by the next. Nothing is pickled but the state of optimizer, scheduler and
random numbers, by Trainer with `torch.save`, which is read back with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import ranks
from .records import write_text

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)

LIST_FILE = "checkpoint.json"
SAVING = ".saving-"
_STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint can't be written or read; the message says why and what to do."""


# ---- checkpoints ----


@contextlib.contextmanager
def written(trainer: DistillationTrainer, home: str) -> Iterator[None]:
    """Have Trainer write a checkpoint beside its place, then put it there; every rank takes part.

    Args:
        trainer: Writes into `trainer.staging` meanwhile.
        home: The folder of the checkpoints.

    Raises:
        CheckpointError: If it could not be written; nothing of it is left.
    """
    name = f"checkpoint-{trainer.state.global_step}"
    staging, main = Path(home) / f"{SAVING}{name}", trainer.is_world_process_zero()
    if main:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.staging = str(staging)
    try:
        yield
        trainer.accelerator.wait_for_everyone()
        best = f"checkpoint-{trainer.state.best_global_step}"
        if trainer.state.best_global_step and (best == name or (Path(home) / best).is_dir()):
            trainer.state.best_model_checkpoint = os.path.join(home, best)
        if main:
            trainer.state.save_to_json(str(staging / name / _STATE_FILE))
            seal(staging / name)
            place(staging / name, Path(home) / name)
    except (OSError, RuntimeError, SafetensorError) as error:
        if trainer.args.world_size > 1 and ranks.lost(error):
            raise
        raise CheckpointError(
            f"{Path(home) / name} was not written ({type(error).__name__}: {_first_line(error)}); "
            f"{_free(Path(home))} are free there. {_last(Path(home))}Make room, or repair the disk, and "
            "start again with resume_from_checkpoint=True."
        ) from error
    finally:
        trainer.staging = None
        if main:
            shutil.rmtree(staging, ignore_errors=True)
    if main:
        rotate(Path(home), name, trainer.args.save_total_limit, trainer.state.best_model_checkpoint)
    trainer.accelerator.wait_for_everyone()


def seal(folder: Path) -> None:
    """Bring every file of a checkpoint to the disk, and list them."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != LIST_FILE):
        _sync(path)
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    write_text(folder / LIST_FILE, json.dumps({"files": sizes}, indent=1) + "\n")
    _sync(folder / LIST_FILE)
    _sync(folder)


def place(source: Path, target: Path) -> None:
    """Rename a folder to its place; one that is there already is set aside first, and removed after."""
    old = target.with_name(f"{SAVING}old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    if not (folder / _STATE_FILE).is_file():
        return f"it has no {_STATE_FILE}"
    try:
        for name, size in _listed(folder).items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}: it is cut short or was changed"
        json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return _first_line(error)
    return None


def _listed(folder: Path) -> dict[str, int]:
    """Size by file; nothing for a checkpoint that another program wrote."""
    path = folder / LIST_FILE
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(type(size) is int for size in files.values()):
        raise ValueError(f"{LIST_FILE} is damaged")
    for name in files:
        # A name in a file from elsewhere must not lead out of the folder.
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"{LIST_FILE} is damaged: {name!r} is no file of it")
    return files


def newest(home: Path) -> str | None:
    """The newest whole checkpoint of a folder; newer ones that are not whole are said."""
    for path in reversed(_checkpoints(home)):
        found = problem(path)
        if found is None:
            return str(path)
        logger.warning("%s is not whole (%s): an older checkpoint is used.", path, found)
    return None


def resumable(wish: str | bool | None, home: Path) -> str | bool | None:
    """What to resume: `True` becomes the newest whole checkpoint; a named one has to be whole.

    Raises:
        CheckpointError: If the named one is not.
    """
    if wish is True:
        return newest(home) or True  # Trainer says that there is none
    if isinstance(wish, str) and Path(wish).is_dir():
        found = problem(Path(wish))
        if found is not None:
            raise CheckpointError(
                f"resume_from_checkpoint={wish!r} is not whole: {found}. {_last(Path(wish).parent)}"
                "resume_from_checkpoint=True takes the newest whole one."
            )
    return wish


def rotate(home: Path, new: str, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, by step: a clock may jump.

    The new one and the best one stay.
    """
    found = _checkpoints(home)
    if limit is None or limit <= 0 or len(found) <= limit:
        return
    kept = {new, Path(best).name if best else new}
    spare = [path for path in found if path.name not in kept]
    for path in spare[: len(found) - max(limit, len(kept))]:
        shutil.rmtree(path, ignore_errors=True)


def sweep(home: Path) -> None:
    """Remove what a run that was killed left beside; the caller holds the folder's lock."""
    for path in home.glob(f"{SAVING}*"):
        old = path.name.removeprefix(f"{SAVING}old-")
        if old != path.name and _NAME.fullmatch(old) and not (home / old).exists():
            os.replace(path, home / old)  # killed between the two renames
        else:
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints(home: Path) -> list[Path]:
    """By step, the oldest first."""
    if not home.is_dir():
        return []
    found = [(int(m[1]), p) for p in home.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


# ---- models ----


def save_student(trainer: DistillationTrainer, folder: Path, state_dict: dict[str, Any] | None) -> None:
    """Write the student as `from_pretrained` reads it, with its processor; every file whole or not at all."""
    model = trainer.accelerator.unwrap_model(trainer.student, keep_torch_compile=False)
    processor: Any = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    writes, staged = trainer.args.should_save, trainer.staging is not None
    target = folder if staged else folder / f"{SAVING}model"
    if writes and not staged:
        shutil.rmtree(target, ignore_errors=True)
    if writes:
        target.mkdir(parents=True, exist_ok=True)
    try:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(target, state_dict=state_dict, is_main_process=writes)
        elif writes:
            state = model.state_dict() if state_dict is None else state_dict
            # Tied weights are one tensor; safetensors wants each to own its memory.
            plain = {name: value.detach().clone().contiguous() for name, value in state.items()}
            save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
        if writes and hasattr(processor, "save_pretrained"):
            processor.save_pretrained(target)
        if writes and not staged:
            move_model(target, folder)
    finally:
        if writes and not staged:
            shutil.rmtree(target, ignore_errors=True)


def move_model(source: Path, target: Path) -> None:
    """Move a saved model into a folder that may hold another; the index goes first and comes last."""
    files = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.name == _INDEX)
    names = {path.name for path in files}
    for path in files:
        _sync(path)
    (target / _INDEX).unlink(missing_ok=True)
    for path in files:
        place_file = target / path.relative_to(source)
        place_file.parent.mkdir(parents=True, exist_ok=True)
        if path.name == _INDEX:
            _remove_weights(target, keep=names)
        os.replace(path, place_file)
    _remove_weights(target, keep=names)
    _sync(target)


def _remove_weights(folder: Path, keep: set[str]) -> None:
    if not any(_WEIGHTS.fullmatch(name) for name in keep):
        return
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in keep:
            path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _last(home: Path) -> str:
    for path in reversed(_checkpoints(home)):
        if problem(path) is None:
            return f"The newest whole checkpoint is {path}. "
    return "There is no whole checkpoint yet. "


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
    except OSError:
        return "unknown MiB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
