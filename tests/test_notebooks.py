"""The notebooks run as they are, and what is stored with them is of the cells that they have."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What a cell shows."""
    return {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_ends_with_its_result(path: Path, tmp_path: Path) -> None:
    """From the top in an empty folder; a table and a plot at the end, now and in the stored outputs."""
    stored = nbformat.read(path, as_version=4)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "stored from the top"
    shown = [kinds(cell) for cell in code]
    notebook = nbformat.from_dict({**stored, "cells": [dict(cell) for cell in stored.cells]})
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    for now, before in zip([c for c in notebook.cells if c.cell_type == "code"], shown, strict=True):
        assert kinds(now) == before, now.source
    assert "image/png" in shown[-1]
    assert any("text/html" in kinds for kinds in shown[-3:]), "a table near the end"


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_distillation", "language_model", "self_distillation"]
