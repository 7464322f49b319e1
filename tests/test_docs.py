"""Pages that are made from the library are current."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from hf_kd.options import DistillationOptions, GenerateOptions, RunOptions, ShrinkOptions, TeachOptions

from . import losses_page, options_page, results_page
from .heads_table import table

ROOT = Path(__file__).resolve().parents[1]


def test_heads_page_is_current() -> None:
    """`python -m tests.heads_table > docs/heads.md` was run after the last change."""
    assert (ROOT / "docs" / "heads.md").read_text() == table()


def test_readme_is_short_and_names_existing_files() -> None:
    """Under 200 lines; every file of the tree that it shows exists."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 200
    tree = [line.split() for line in lines if line.startswith("  ")]
    shown = [word.strip(",") for words in tree for word in words[:2] if word.strip(",").endswith(".py")]
    assert len(shown) > 8
    for name in shown:
        assert any(ROOT.glob(f"**/{name}")), name


def test_options_page_is_current() -> None:
    """`python -m tests.options_page > docs/options.md` was run after the last change."""
    assert (ROOT / "docs" / "options.md").read_text() == options_page.page()


def test_options_page_has_every_option_once() -> None:
    """Each field of the dataclasses has a row, with its help."""
    rows = [line for line in options_page.page().splitlines() if line.startswith("| `")]
    for cls in (DistillationOptions, RunOptions, GenerateOptions, TeachOptions):
        for field in fields(cls):
            assert any(row.startswith(f"| `{field.name}` |") for row in rows), field.name
    own = ShrinkOptions.__annotations__
    assert all(any(row.startswith(f"| `{name}` |") for row in rows) for name in own)
    shared = sum(len(fields(cls)) for cls in (DistillationOptions, RunOptions, GenerateOptions, TeachOptions))
    assert len(rows) == shared + len(own)


def test_results_page_is_current_and_has_every_field() -> None:
    """`python -m tests.results_page > docs/results.md` was run after the last change."""
    text = (ROOT / "docs" / "results.md").read_text()
    assert text == results_page.page()
    for cls in results_page.CLASSES:
        part = text.partition(f"## {cls.__name__}\n")[2].partition("\n## ")[0]
        assert all(f"| `{field.name}` |" in part for field in fields(cls)), cls


def test_losses_page_is_current() -> None:
    """`python -m tests.losses_page > docs/losses.md` was run after the last change."""
    assert (ROOT / "docs" / "losses.md").read_text() == losses_page.page()


def test_losses_page_has_every_loss_and_its_parts() -> None:
    """Formula, source, use, inputs and a command for each."""
    for name, function in losses_page.LOSSES.items():
        parts = losses_page.sections(function)
        assert {"When", "Source", "Args", "Returns"} <= parts.keys(), name
        assert "\n    " in parts[""], f"{name} has no formula"
        assert f"--divergence {name}" in losses_page.page()
