"""Models from a directory or the Hub, loaded by the class that their task needs."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .tasks import TASKS, task_of_class

logger = logging.getLogger(__name__)


class NewHeadError(ValueError):
    """A checkpoint has no weights for the head that was asked for."""


def load_model(
    name_or_path: str,
    task: str | None = None,
    *,
    role: str,
    dtype: str | torch.dtype | None = None,
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_head: bool = False,
    **config_changes: Any,
) -> nn.Module:
    """Load a model with the head of a task.

    Args:
        name_or_path: Hub id or directory.
        task: Name in `TASKS`; None: from the architecture that the checkpoint names.
        role: `"teacher"` or `"student"`, the option that messages name.
        dtype: A dtype or its name; None: the checkpoint's own.
        device_map: Passed to `from_pretrained`.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run code that comes with the checkpoint.
        new_head: Accept a checkpoint without weights for this head and initialise one (for a model that is
            trained next). Otherwise that is an error: a random teacher teaches noise.
        **config_changes: Config fields to set, for example `num_labels`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If the path does not exist, the task cannot be told, or the head has no weights.
    """
    import transformers

    check_path(name_or_path, role)
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    task = task or task_of_checkpoint(name_or_path, role=role, **shared)
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not known; choose one of {sorted(TASKS)}.")
    auto_class = getattr(transformers, TASKS[task].auto_class)
    extra: dict[str, Any] = {"device_map": device_map} if device_map else {}
    try:
        with _whole(), _unreported():
            model, info = auto_class.from_pretrained(
                name_or_path,
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=new_head,
                **shared,
                **extra,
                **config_changes,
            )
    except OSError as error:
        raise _cannot_load(name_or_path, role, error) from error
    absent = sorted(info["missing_keys"]) + sorted(key for key, *_ in info.get("mismatched_keys", ()))
    named = ", ".join(absent[:4]) + (" ..." if len(absent) > 4 else "")
    if absent and new_head:
        logger.warning("%s=%r: %d weights are new, to be trained: %s", role, name_or_path, len(absent), named)
    elif absent:
        raise NewHeadError(
            f"{role}={name_or_path!r} has no weights for {named}: that part of {type(model).__name__} would "
            f"be random. Fine-tune the {role} on the task first (on the command line: train_teacher=true) or "
            "choose a checkpoint that was."
        )
    return model


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Leave out Transformers' table of weights that are missing or do not fit: we name them in one line."""

    def of_something_else(record: logging.LogRecord) -> bool:
        said = str(record.msg)
        return "LOAD REPORT" not in said or not ("MISSING" in said or "MISMATCH" in said)

    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(of_something_else)
    try:
        yield
    finally:
        loader.removeFilter(of_something_else)


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Load whole weights, also while DeepSpeed's ZeRO-3 is on: pieces mean something to an engine only.

    A teacher has none, a student is read (cut, compared, copied) before it has one.
    """
    from transformers.integrations import deepspeed

    active = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = active


def config_of_checkpoint(name_or_path: str, *, role: str, **shared: Any) -> Any:
    """The config of a checkpoint, without its weights."""
    from transformers import AutoConfig

    check_path(name_or_path, role)
    try:
        return AutoConfig.from_pretrained(name_or_path, **shared)
    except (OSError, ValueError) as error:
        raise _cannot_load(name_or_path, role, error) from error


def task_of_checkpoint(name_or_path: str, *, role: str, **shared: Any) -> str:
    """The task of a checkpoint, from the architecture that its config names."""
    config = config_of_checkpoint(name_or_path, role=role, **shared)
    for architecture in config.architectures or []:
        task = task_of_class(architecture)
        if task is not None:
            return task
    raise ValueError(
        f"{role}={name_or_path!r} names the architecture {config.architectures}, whose head is not known. "
        f"Set task to one of {sorted(TASKS)}."
    )


def _cannot_load(name_or_path: str, role: str, error: Exception) -> ValueError:
    """What to do about a model that is neither here nor on the Hub."""
    path = Path(name_or_path).expanduser()
    first = str(error).strip().splitlines()[0]
    if path.is_dir():
        files = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        return ValueError(
            f"{role}={name_or_path!r} is a folder, but no model can be loaded from it ({first}): it has "
            f"{files}. Give the folder that save_pretrained wrote."
        )
    near = difflib.get_close_matches(name_or_path, [p.name for p in Path().iterdir() if p.is_dir()], n=1)
    hint = f" Did you mean the folder {near[0]!r}?" if near else ""
    return ValueError(
        f"{role}={name_or_path!r} is no folder here, and can't be had from the Hub ({first}).{hint} Check "
        "the name, the network and HF_HUB_OFFLINE, and `hf auth login` for a private model."
    )


def check_path(name_or_path: str, option: str) -> None:
    """Refuse a local path that does not exist, before the Hub is asked for it as if it were an id.

    Raises:
        ValueError: Names the nearest existing neighbour.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return
    # "org/name" is a Hub id unless a folder "org" is here.
    here = "/" in name_or_path and path.parent.is_dir()
    if not (here or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1):
        return
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f" Did you mean {str(path.parent / near[0])!r}?" if near else ""
    raise ValueError(f"{option}={name_or_path!r}: this path does not exist.{hint}")
