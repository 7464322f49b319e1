"""Pages that are made from the library are current."""

from __future__ import annotations

from pathlib import Path

from . import losses_page
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
