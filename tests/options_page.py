"""The page of options, made from the dataclasses: `python -m tests.options_page > docs/options.md`."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainingArguments

from hf_kd.cli import SPECIAL, TRAINING
from hf_kd.config import DistillationArguments
from hf_kd.options import DistillationOptions, GenerateOptions, RunOptions, ShrinkOptions, TeachOptions

_INTRO = """# Options

Every option of a run is a flag (`--alpha 0.9`), a key of a YAML file (`alpha: 0.9`) and, but for the models
and data of the command line, an argument in Python (`DistillationArguments(alpha=0.9)`). Flags beat the file.
Options that are JSON on the command line are a mapping in YAML and a dict in Python. A value that contradicts
another one is refused before anything is loaded, with every other problem in the same message.

`DistillationArguments` has Transformers' `TrainingArguments` besides, with these defaults of its own:

"""
_KINDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true, false",
    dict: "JSON",
    type(None): "",
}


def kind(hint: Any) -> str:
    """The type of an option in words."""
    origin = typing.get_origin(hint)
    if origin is list:
        return f"list of {_KINDS[typing.get_args(hint)[0]]}"
    if origin in (dict, Callable):
        return "JSON" if origin is dict else "function"
    if hint in _KINDS:
        return _KINDS[hint]
    parts = [kind(part) for part in typing.get_args(hint)]
    if "JSON" in parts:
        return "JSON"
    return " or ".join(dict.fromkeys(part for part in parts if part))


def _default(value: Any) -> str:
    if value is None:
        return ""
    return f"`{json.dumps(value) if isinstance(value, bool) else value}`"


def _rows(cls: type, names: typing.Iterable[str]) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    by_name = {field.name: field for field in dataclasses.fields(cls)}
    yield "| option | | default | what it does |"
    yield "|---|---|---|---|"
    for name in names:
        help = by_name[name].metadata["help"].replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{name}` | {kind(hints[name])} | {_default(by_name[name].default)} | {help} |"


def page() -> str:
    """The whole page."""
    changed = []
    stock = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(DistillationArguments):
        if field.name in stock and field.default != stock[field.name]:
            changed.append(
                f"- `{field.name}={field.default}` (there {stock[field.name]}): {field.metadata['help']}"
            )
    grouped = {name for names in SPECIAL.values() for name in names}
    plain = [field.name for field in dataclasses.fields(DistillationOptions) if field.name not in grouped]
    run = [field.name for field in dataclasses.fields(RunOptions) if field.name not in grouped]
    parts = [_INTRO + "\n".join(changed)]
    parts += ["## Distillation", "\n".join(_rows(DistillationOptions, plain))]
    for title, names in SPECIAL.items():
        heading = f"## {_title(title)}"
        for cls in (DistillationOptions, RunOptions):
            own = [name for name in names if name in {field.name for field in dataclasses.fields(cls)}]
            if own:
                parts += [heading, "\n".join(_rows(cls, own))]
                heading = "On the command line:"
    parts += ["## Models and data of the command line", "\n".join(_rows(RunOptions, run))]
    parts += [
        "## Training",
        "Of the options of `transformers.TrainingArguments` these are used most: "
        + ", ".join(f"`{name}`" for name in TRAINING)
        + ". `hf-kd distill --help-all` describes all of them.",
        "## `hf-kd generate`",
        "\n".join(_rows(GenerateOptions, [field.name for field in dataclasses.fields(GenerateOptions)])),
        "## `hf-kd teach`",
        "\n".join(_rows(TeachOptions, [field.name for field in dataclasses.fields(TeachOptions)])),
        "## `hf-kd shrink`",
        "And all options of a run that begin with `student_`.",
        "\n".join(_rows(ShrinkOptions, list(ShrinkOptions.__annotations__))),
    ]
    return "\n\n".join(parts) + "\n"


def _title(text: str) -> str:
    return text.split(" (")[0]


if __name__ == "__main__":
    sys.stdout.write(page())
