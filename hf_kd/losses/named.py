"""Options that name a function: a name from a table, `"package.module:function"`, or the function itself."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def find(
    option: str, spec: str | Callable[..., Any], table: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """Look up a function.

    Args:
        option: The option's name, for messages.
        spec: A key of `table`, `"package.module:function"`, or a callable, which is returned as it is.
        table: The functions that have a name.

    Raises:
        ValueError: If it is none of these, or can't be imported; with the nearest name.
    """
    if callable(spec):
        return spec
    if isinstance(spec, str) and spec in table:
        return table[spec]
    if not isinstance(spec, str) or ":" not in spec:
        raise ValueError(
            f"{option}={spec!r} is not known{nearest(str(spec), table)} Take one of {', '.join(table)}, a "
            "callable, or 'package.module:function'"
        )
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{option}={spec!r} can't be imported: {error}. It must read 'package.module:function', with the "
            "package installed or its folder on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"{option}={spec!r} is of type {type(found).__name__}: name a function")
    return found


def check_call(
    option: str,
    name: str,
    function: Callable[..., Any],
    values: tuple[str, ...],
    options: Mapping[str, Any],
    *,
    given: tuple[str, ...] = (),
) -> None:
    """Check that `function(*values, **options)` is a possible call, without making it.

    Args:
        option: The name of the option that names the function, for messages. The function's keyword arguments
            are then in `<option>_options`.
        name: The function's name.
        function: The function.
        values: Names of the positional arguments.
        options: The keyword arguments.
        given: Names of keyword arguments that the caller fills in; they are no options.

    Raises:
        ValueError: If an option is unknown (with the nearest one) or missing, or the arguments don't fit.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # functions written in C may have none
    parameters = list(signature.parameters.values())
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        known = [p.name for p in parameters[len(values) :] if p.kind in named and p.name not in given]
        for key in options:
            if key not in known:
                raise ValueError(
                    f"{option}_options: {name} has no option {key!r}{nearest(key, known)} Its options: "
                    f"{', '.join(known) or 'none'}"
                )
    try:
        signature.bind(*values, **options, **dict.fromkeys(given))
    except TypeError as error:
        raise ValueError(
            f"{option}={name} can't be called with ({', '.join(values)}) and "
            f"{option}_options={dict(options)}: {error}"
        ) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or a full stop if nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
