"""What the site is made of: pages in their places, pictures that are current, nothing from other hosts."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import hf_kd

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    return load("mkdocs_hooks")


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<script src="https://cdn.example/x.js"></script>', ["https://cdn.example/x.js"]),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', ["//fonts.example/a.css"]),
        ("<style>@import url('https://fonts.example/b');</style>", ["https://fonts.example/b"]),
        ('<img src="http://example/p.png">', ["http://example/p.png"]),
        ('<link rel="canonical" href="https://example/page">', []),
        ('<a href="https://arxiv.org/abs/1503.02531">paper</a><img src="pictures/uses.svg">', []),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(hooks: ModuleType, html: str, found: list[str]) -> None:
    assert hooks.loaded_from_elsewhere(html) == found


def test_pages_are_in_the_navigation_and_exist(hooks: ModuleType) -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    placed = hooks._leaves(nav)
    assert len(placed) == len(set(placed))
    for name in placed:
        folder, source = ROOT / "docs", name
        if name.startswith("notebooks/"):
            folder, source = ROOT, name.replace(".md", ".ipynb")
        assert (folder / source).is_file(), name


def test_links_out_of_docs_lead_to_pages_of_the_site(hooks: ModuleType) -> None:
    """A file of the repository is found; what does not exist stays, and the build warns of it."""
    docs = ROOT / "docs"
    assert hooks._address(hooks._in_repository(docs, "../examples/linear_pair.py")) == (
        "repository/examples/linear_pair.py.md"
    )
    assert hooks._in_repository(docs, "../examples/nothing.py") is None
    assert hooks._in_repository(docs, "../docs/index.md") is None
    assert hooks._in_repository(docs, "../../etc/passwd") is None


def test_pictures_are_current(tmp_path: Path) -> None:
    """`python scripts/pictures.py` was run after the last change."""
    for made in load("pictures").draw(tmp_path):
        assert made.read_bytes() == (ROOT / "docs" / "pictures" / made.name).read_bytes(), made.name


def test_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    for name in hf_kd.__all__:
        assert re.search(rf"^::: hf_kd\S*\.{name}$|`{name}`", text, re.MULTILINE), name
