"""The examples do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_linear_pair() -> None:
    """The classic loop reaches its threshold."""
    assert load("linear_pair").main() <= 1e-4


def test_custom_head() -> None:
    """A head described in three lines is distilled."""
    assert load("custom_head").main() < 0.05
