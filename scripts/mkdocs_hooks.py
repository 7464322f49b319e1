"""What mkdocs does beside its pages: repository files, notebooks, and a look at what the built site loads.

Pages in `docs/` link to files of the repository (`../examples/linear_pair.py`), which is right where the
repository is read. The site gets those files as pages of its own, and the links are turned towards them.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
_LINK = re.compile(r"(?<=\]\()(\.\./[^)\s#]+)")
_PICTURES = {".png", ".svg", ".jpg"}
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "sh", ".json": "json"}
# Attributes by which a page loads something, by tag; a link that a reader clicks is none.
_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data", "link": "href"}
_NOT_LOADED = {"canonical", "next", "prev", "alternate"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give a page that nobody put anywhere a place under "More"."""
    placed = set(_leaves(config.nav or []))
    docs = Path(config.docs_dir)
    rest = [str(path.relative_to(docs)) for path in sorted(docs.rglob("*.md"))]
    left = [name for name in rest if name not in placed]
    if left:
        config.nav = [*(config.nav or []), {"More": left}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks, and every file of the repository that a page links to."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, pictures = _notebook(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    wanted: dict[str, File] = {}
    for page in files.documentation_pages():
        folder = Path(page.abs_src_path).parent if page.abs_src_path else Path(config.docs_dir)
        for link in _LINK.findall(page.content_string):
            target = _in_repository(folder, link)
            if target is not None and target.suffix != ".ipynb":
                wanted.setdefault(str(target), _as_file(target, config))
    for made in wanted.values():
        files.append(made)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository towards their pages."""
    if page.file.abs_src_path is None:
        return markdown
    folder = Path(page.file.abs_src_path).parent

    def turned(match: re.Match[str]) -> str:
        target = _in_repository(folder, match[1])
        return match[1] if target is None else _address(target)

    return _LINK.sub(turned, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that loads anything from elsewhere."""
    found = []
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        found += [
            f"{path.relative_to(config.site_dir)}: {url}" for url in loaded_from_elsewhere(path.read_text())
        ]
    if found:
        raise PluginError("the site loads from other hosts:\n  " + "\n  ".join(found))


def loaded_from_elsewhere(html: str) -> list[str]:
    """The addresses on other hosts from which a browser would load something to show this page."""
    reader = _Loads()
    reader.feed(html)
    return reader.found


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag loads."""
        values = dict(attrs)
        if tag == "link" and values.get("rel") in _NOT_LOADED:
            return
        url = values.get(_LOADS.get(tag, "")) or ""
        if re.match(r"(https?:)?//", url):
            self.found.append(url)

    def handle_data(self, data: str) -> None:
        """Note what a style sheet in the page imports."""
        self.found += re.findall(r"(?:@import\s+|url\()['\"]?((?:https?:)?//[^'\")\s]+)", data)


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [leaf for part in parts for leaf in _leaves(part)]


def _in_repository(folder: Path, link: str) -> Path | None:
    """The file that a link means, relative to the repository, if it is outside of the pages and exists."""
    target = (folder / link).resolve()
    if not target.is_file() or not target.is_relative_to(ROOT) or target.is_relative_to(ROOT / "docs"):
        return None
    return target.relative_to(ROOT)


def _address(target: Path) -> str:
    """Where a file of the repository is on the site, seen from a page of the first level."""
    if target.suffix == ".ipynb":
        return f"notebooks/{target.stem}.md"
    shown = target.suffix in _PICTURES or target.suffix == ".md"
    return f"repository/{target}" if shown else f"repository/{target}.md"


def _as_file(target: Path, config: MkDocsConfig) -> File:
    path = ROOT / target
    if target.suffix in _PICTURES:
        return File.generated(config, _address(target), content=path.read_bytes())
    text = path.read_text(encoding="utf-8")
    if target.suffix != ".md":
        fence = "````"
        text = f"# {target}\n\n{fence}{_LANGUAGES.get(target.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"
    return File.generated(config, _address(target), content=text)


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its outputs as Markdown, and its pictures by name."""
    exporter = MarkdownExporter()
    resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    text, found = exporter.from_notebook_node(nbformat.read(path, as_version=4), resources=resources)
    return text, found["outputs"]
