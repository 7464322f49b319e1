"""An option: a dataclass field with a help text, and what is said of a value that it can't take."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

DTYPE_NAMES = ("auto", "float32", "float16", "bfloat16", "float64")


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


def nearest(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the nearest known name, or nothing when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def raise_problems(problems: list[str]) -> None:
    """Raise one `ValueError` that lists every problem, or return when there is none."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        lines = "\n".join(f"  - {text}" for text in problems)
        raise ValueError(f"{len(problems)} options are wrong:\n{lines}")


def as_mapping(value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The dict that an option holds, whether it came from Python or YAML (a dict) or from a flag (JSON)."""
    if value is None:
        return {}
    parsed = json.loads(value) if isinstance(value, str) else value
    if not isinstance(parsed, Mapping):
        raise ValueError(f"{value!r} is not a mapping")
    return dict(parsed)


def mapping_problems(options: object, names: tuple[str, ...]) -> list[str]:
    """Turn the named options into dicts in place; say which ones are not mappings."""
    found = []
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        try:
            setattr(options, name, as_mapping(value))
        except ValueError:
            found.append(f"""{name}={value!r} is not a mapping: write it as JSON, e.g. '{{"key": 1}}'""")
    return found


def unset(options: object, needed: Mapping[str, str]) -> list[str]:
    """Every problem of options that have to be given; `needed` says what, by name."""
    return [f"{name} is not set: {what}" for name, what in needed.items() if not getattr(options, name)]


def unknown_names(options: object, known: Mapping[str, tuple[str | None, ...]]) -> list[str]:
    """Every problem of options that are one of a few names (None among them: it may be left out)."""
    found = []
    for name, names in known.items():
        value = getattr(options, name)
        if value not in names:
            found.append(f"{name}={value!r} is not known: use one of {', '.join(filter(None, names))}")
    return found
