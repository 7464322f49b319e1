"""What is written beside the weights: how the student was made, and by which teacher."""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

Record = TypeVar("Record")

OPTIONS_FILE = "distillation.yaml"
TEACHER_FILE = "teacher.json"
_SECRETS = ("_token", "_password", "_secret")


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: beside it first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_record(path: Path, record: Any) -> None:
    """Write a flat dataclass as JSON."""
    write_text(path, json.dumps(asdict(record), indent=2) + "\n")


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """What `write_record` wrote; None if there is no file.

    Raises:
        ValueError: If it is damaged.
    """
    if not path.exists():
        return None
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): resume from another checkpoint") from error


def resolved_options(args: Any) -> dict[str, Any]:
    """Every option of a dataclass that can be given again, as plain YAML values; secrets are left out."""
    plain: dict[str, Any] = {}
    for spec in fields(args):
        if not spec.init or spec.name.endswith(_SECRETS):
            continue
        value = getattr(args, spec.name)
        plain[spec.name] = _plain(value)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}"
    return str(value)


def write_options(folder: Path, trainer: DistillationTrainer) -> None:
    """Write `distillation.yaml`: every resolved value of the run, ready to be run again."""
    options = dict(getattr(trainer, "run_options", None) or {})
    options.update(resolved_options(trainer.args))
    text = yaml.safe_dump({k: v for k, v in options.items() if v is not None}, sort_keys=True)
    write_text(
        folder / OPTIONS_FILE,
        "# How this model was distilled; run it again with: hf-kd distill --config\n" + text,
    )


def write_teacher(path: Path, identity: Mapping[str, str]) -> None:
    """Record which teacher a checkpoint was made with."""
    write_text(path, json.dumps(dict(identity), indent=2) + "\n")


def check_teacher(path: Path, identity: Mapping[str, str]) -> None:
    """Refuse to resume a checkpoint that another teacher made.

    Raises:
        ValueError: Names both teachers.
    """
    if not path.exists():
        return
    recorded = json.loads(path.read_text(encoding="utf-8"))
    if recorded.get("fingerprint") == identity.get("fingerprint"):
        return
    raise ValueError(
        f"resume_from_checkpoint={str(path.parent)!r} was made with the teacher {_named(recorded)}, this run "
        f"has {_named(identity)}. Resume with the first, or start again in another output_dir."
    )


def _named(identity: Mapping[str, str]) -> str:
    revision = f" at {identity['revision']}" if identity.get("revision") else ""
    return f"{identity.get('name', '?')!r}{revision} (weights {identity.get('fingerprint', '?')})"
