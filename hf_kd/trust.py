"""What a file from elsewhere may not do: name code that then runs here.

Options that name code are `"package.module:function"`, `trust_remote_code` and metrics that are not built in.
They are taken from the command line, from Python and from files that somebody put here; not from a
configuration that lies where the Hub's client puts its downloads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from .metrics import BUILT_IN


def downloaded(path: Path) -> bool:
    """Whether a file was put there by the Hub's client: in its cache, or in a folder that it filled."""
    given = path.expanduser().absolute()
    caches = [Path(place).absolute() for place in (constants.HF_HUB_CACHE, constants.HF_HOME)]
    caches += [place.resolve() for place in caches]
    if any(one.is_relative_to(place) for one in (given, given.resolve()) for place in caches):
        return True
    records = [parent / ".cache" / "huggingface" / "download" for parent in given.parents]
    return any(
        (record / given.relative_to(record.parents[2])).with_name(f"{given.name}.metadata").exists()
        for record in records
        if record.is_dir()
    )


def refuse_code(path: Path, values: Mapping[str, Any], callables: Iterable[str]) -> None:
    """Refuse a downloaded configuration that names code.

    Args:
        path: The configuration.
        values: Its options.
        callables: Options that take a function.

    Raises:
        ValueError: Names the options, and what to do about them.
    """
    named = [name for name in callables if isinstance(values.get(name), str) and ":" in values[name]]
    if values.get("trust_remote_code"):
        named.append("trust_remote_code")
    if code_metrics(values.get("metrics")):
        named.append("metrics")
    if named and downloaded(path):
        said = ", ".join(f"{name}={values[name]!r}" for name in named)
        raise ValueError(
            f"config={str(path)!r} was downloaded, and names code that would run here: {said}. Read it; then "
            "give these options as flags, or copy the file to a folder of yours."
        )


def code_metrics(names: Iterable[str] | None) -> list[str]:
    """Metrics that `evaluate` would fetch from the Hub as a program."""
    return [name for name in names or () if name not in (*BUILT_IN, "loss") and not Path(name).exists()]
