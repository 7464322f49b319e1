"""`results.json` as one self-contained HTML page, and as Markdown with its charts beside it."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_kd.charts import charts
from hf_kd.drawing import save_png, svg
from hf_kd.records import write_text
from hf_kd.report import comparison, headline, latencies, provenance, slice_table
from hf_kd.results import Results

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"

# What Markdown or the HTML inside it would act on.
_ACTIVE = re.compile(r"([\\`*_{}\[\]<>#|!&])")

_CAPTIONS = {
    "quality": "Quality on the evaluation rows",
    "cost": "Quality against cost: {way} and to the left is better",
    "slices": "Quality on parts of the evaluation rows, with their number",
    "calibration": "Calibration: on the dotted line a model is right as often as it says",
    "agreement": "Rows by the teacher's class and the student's; shade is the share of the teacher's class",
    "positions": "KL to the teacher along the sequence, T = 1",
    "loss": "Training: every term of the loss",
    "kl": "Evaluation during training: KL to the teacher",
    "schedules": "Weight of distillation and temperature",
    "learning-rate": "Learning rate",
    "balance": "Which term moves the weights: norms of the two gradients, weighted as in the loss",
    "mass": "Share of the distribution on the entries that the teacher gives",
}
#: The charts that a model card has too.
CARD_CHARTS = ("quality", "cost")
_SECTIONS = {
    "Quality and cost": CARD_CHARTS,
    "Quality by slice": ("slices",),
    "Behaviour": ("calibration", "agreement", "positions"),
    "Training": ("loss", "kl", "schedules", "learning-rate", "balance", "mass"),
}


def write_html(results: Results, folder: Path) -> Path:
    """Write `report.html`: no scripts, nothing from the network, light and dark, every string escaped."""
    drawn = {name: Markup(svg(figure, name)) for name, figure in charts(results).items()}
    sections = [
        {
            "title": title,
            "charts": [
                {"svg": drawn[name], "caption": _caption(results, name)} for name in names if name in drawn
            ],
        }
        for title, names in _SECTIONS.items()
    ]
    behaviour = results.behaviour
    text = (
        environment(autoescape=True)
        .get_template(HTML_FILE)
        .render(
            **content(results),
            sections=[section for section in sections if section["charts"]],
            behaviour=behaviour,
            texts=behaviour is not None and any(d.text for d in behaviour.differences),
            latencies=latencies(results),
            of_text=any(row["length"] is not None for row in latencies(results)),
            slices=slice_table(results),
            made=_yaml(
                {k: v for k, v in results.provenance.items() if k != "resolved"}
                | {"machine": results.machine}
            ),
            resolved=_yaml(results.provenance.get("resolved") or {}),
        )
    )
    path = folder / HTML_FILE
    write_text(path, text)
    return path


def write_markdown(results: Results, folder: Path) -> Path:
    """Write `report.md`, and its charts as `report-<name>.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    images = write_images(results, folder)
    text = environment(autoescape=False).get_template(MARKDOWN_FILE).render(**content(results), images=images)
    path = folder / MARKDOWN_FILE
    write_text(path, text)
    return path


def write_images(
    results: Results, folder: Path, names: Collection[str] | None = None
) -> list[tuple[Markup, str]]:
    """Write charts as `report-<name>.png`: their files' names and captions, for Markdown."""
    return [
        (Markup(save_png(figure, folder / f"report-{name}.png").name), _caption(results, name))
        for name, figure in charts(results, names).items()
    ]


def _caption(results: Results, name: str) -> str:
    return _CAPTIONS[name].format(way="up" if results.greater_is_better else "down")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=True, allow_unicode=True) if value else ""


def content(results: Results) -> dict[str, Any]:
    """What every page says: title, verdict, headline numbers, the comparison and where it comes from."""
    names = list(results.arms)
    return {
        "title": f"{results.task}: teacher and student",
        "verdict": results.verdict,
        "provenance": provenance(results),
        "numbers": headline(results),
        "table": {"corner": results.task, "arms": names, "rows": comparison(results, names)},
    }


def environment(*, autoescape: bool) -> Environment:
    """The templates; with `autoescape` for HTML, without it for Markdown, escaped as that needs."""
    return Environment(
        loader=PackageLoader("hf_kd", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        # In Markdown nothing else would escape what comes from data and models.
        finalize=None if autoescape else _plain,
        trim_blocks=True,
    )


def _plain(value: Any) -> Any:
    """A string with nothing that Markdown acts on and on one line; `Markup` is said to be safe as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _ACTIVE.sub(r"\\\1", " ".join(value.split()))
