"""Dataclasses from JSON and back: every field checked, and a message that says where a file is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from typing import Any

# How an error message names a type to whoever looks at the JSON file.
_TYPE_NAMES: dict[Any, str] = {
    **{str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "an array"},
    **{dict: "an object"},
}


def to_json(value: Any) -> Any:
    """`value` with the numbers that JSON does not have written as strings, which `float` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def build(hint: Any, raw: Any, where: str, problems: list[str]) -> Any:
    """`raw` from JSON as the type `hint`; what does not fit goes to `problems`, by its place in the file."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (type(None) in parts and raw is None):
        return raw
    if type(None) in parts:
        return build(parts[0], raw, where, problems)
    if hint is float and raw in ("NaN", "Infinity", "-Infinity"):
        return float(raw)
    kind: Any = dict if dataclasses.is_dataclass(hint) else origin or hint
    fits = isinstance(raw, int | float if kind is float else kind)
    if not fits or (isinstance(raw, bool) and kind is not bool):
        problems.append(f"{where} is {json.dumps(raw)[:40]}, not {_TYPE_NAMES[kind]}")
        return None
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, raw, where, problems)
    if kind is list:
        return [build(parts[0], item, f"{where}[{i}]", problems) for i, item in enumerate(raw)]
    if kind is dict:
        return {key: build(parts[1], item, f"{where}.{key}", problems) for key, item in raw.items()}
    try:
        return kind(raw)
    except OverflowError:
        problems.append(f"{where} is too large")
        return None


def _build_dataclass(cls: Any, raw: dict[str, Any], where: str, problems: list[str]) -> Any:
    before, prefix = len(problems), f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    for name in sorted(raw.keys() - hints.keys()):
        near = difflib.get_close_matches(name, hints, n=1)
        problems.append(f"{prefix}{name} is unknown" + (f", did you mean {near[0]!r}?" if near else ""))
    for entry in dataclasses.fields(cls):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in raw:
            problems.append(f"{prefix}{entry.name} is missing")
    known = {name: item for name, item in raw.items() if name in hints}
    values = {name: build(hints[name], item, prefix + name, problems) for name, item in known.items()}
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(str(error))
        return None
