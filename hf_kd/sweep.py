"""Several runs on one page: a sweep over depths or recipes, with what is worth its cost (Pareto)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from hf_kd.drawing import (
    COLOURS,
    INK,
    MARKERS,
    OTHER_MARKERS,
    OTHERS,
    logarithmic,
    new_figure,
    save_png,
    style,
    svg,
)
from hf_kd.pages import environment
from hf_kd.paired import between
from hf_kd.records import write_text
from hf_kd.report import decimal, provenance
from hf_kd.results import Arm, Results
from hf_kd.verdict import number

HTML_FILE, MARKDOWN_FILE = "sweep.html", "sweep.md"


@dataclass(frozen=True)
class Cost:
    """A cost that quality is drawn against: its axis, its column, and how an arm shows it."""

    axis: str
    column: str
    of: Callable[[Arm], float | None]


def _millions(count: int | None) -> float | None:
    return None if count is None else count / 1e6


COSTS: dict[str, Cost] = {
    "parameters": Cost("parameters (millions)", "M parameters", lambda arm: _millions(arm.parameters)),
    "latency": Cost(
        "latency of a batch (ms, median)",
        "latency (ms)",
        lambda arm: arm.latency[0].median_ms if arm.latency else None,
    ),
    "bytes": Cost(
        "size on disk (MB; in memory where not saved)",
        "MB",
        lambda arm: _millions(arm.bytes if arm.bytes_on_disk is None else arm.bytes_on_disk),
    ),
}


@dataclass(frozen=True)
class Entry:
    """One model of the sweep.

    Attributes:
        name: Shown in the table.
        role: "teacher", "student", "control", or a further student's own name.
        arm: Its quality and cost.
        score: The primary metric.
        error: Its standard error, where that is known.
    """

    name: str
    role: str
    arm: Arm
    score: float
    error: float | None


@dataclass(frozen=True)
class Sweep:
    """Several runs that can be compared.

    Attributes:
        metric: What quality is judged by.
        greater_is_better: Whether more of it is.
        entries: All models, a teacher that runs share once.
        runs: The runs by name.
        notes: What a reader should know.
        same_rows: Whether all are known to have been scored on the same rows.
    """

    metric: str
    greater_is_better: bool
    entries: list[Entry]
    runs: dict[str, Results]
    notes: list[str]
    same_rows: bool = False

    def front(self, cost: str) -> list[Entry]:
        """Teachers and students that no other beats (as good and as cheap, better in one), cheapest first.

        Controls are there to be compared with, and are left out.
        """
        entries = [entry for entry in self.entries if entry.role != "control"]
        known = [(e, value) for e in entries if (value := COSTS[cost].of(e.arm)) is not None]
        sign = 1.0 if self.greater_is_better else -1.0

        def beaten(entry: Entry, value: float) -> bool:
            return any(
                sign * other.score >= sign * entry.score
                and price <= value
                and (sign * other.score > sign * entry.score or price < value)
                for other, price in known
            )

        return [e for e, value in sorted(known, key=lambda item: item[1]) if not beaten(e, value)]

    @property
    def verdict(self) -> str:
        """The smallest student that can't be told from the best one, in a sentence."""
        students = [e for e in self.entries if e.role not in ("teacher", "control")]
        sign = 1.0 if self.greater_is_better else -1.0
        best = max(students, key=lambda e: sign * e.score)
        small, how = best, ""
        for entry in sorted(students, key=_size):
            said = None if entry is best else self._near(entry, best)
            if said is not None:
                small, how = entry, said
                break
        said = f"The best of {len(students)} students is {best.name} ({self.metric} {best.score:.4g})."
        if _size(small) >= _size(best):
            return said
        share = _size(small) / _size(best)
        return f"{said} {small.name} ({small.score:.4g}), with {share:.0%} of its parameters, {how}."

    def _near(self, entry: Entry, best: Entry) -> str | None:
        """How a student is near the best one; None if it is known to be worse."""
        named = (entry.name, entry.arm), (best.name, best.arm)
        paired = between(*named, self.metric) if self.same_rows else None
        if paired is not None:
            ends = f"95 % interval of the difference {number(paired.low)} to {number(paired.high)}"
            return None if paired.is_clear else f"can't be told from it on these rows ({ends})"
        apart = math.hypot(best.error or 0, entry.error or 0)
        return "is within the standard error of it" if abs(best.score - entry.score) <= apart else None


def combine(paths: Sequence[Path]) -> Sweep:
    """Read the results of several runs as one sweep.

    Args:
        paths: `results.json` files, or the folders that hold them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the runs can't be compared: another task, metric or evaluation data, or no metric.
    """
    files = [path / "results.json" if path.is_dir() else path for path in paths]
    runs = dict(zip(_names(files), map(Results.read, files), strict=True))
    first_name, first = next(iter(runs.items()))
    for name, run in runs.items():
        for what in ("task", "primary_metric", "greater_is_better"):
            if getattr(run, what) != getattr(first, what):
                raise ValueError(
                    f"{first_name} has {what} {getattr(first, what)!r}, {name} has "
                    f"{what} {getattr(run, what)!r}: "
                    "only runs on one task, judged by one metric, go on one page"
                )
    if first.primary_metric is None:
        raise ValueError(f"{first_name} has no metric to judge by (no labels): there is nothing to draw")
    rows = {name: _data(run) for name, run in runs.items()}
    known = {name: found for name, found in rows.items() if found}
    if len(set(known.values())) > 1:
        said = ", ".join(f"{name} {found}" for name, found in known.items())
        raise ValueError(f"the runs were evaluated on different rows (hashes: {said}): give runs on the same")
    notes = [] if len(known) == len(runs) else ["Whether all runs saw the same rows is not recorded."]
    machines = {
        str((run.machine.get("cpu"), run.machine.get("device"), run.machine.get("threads")))
        for run in runs.values()
    }
    if len(machines) > 1:
        notes.append("The runs were timed on different machines or threads: latencies can't be compared.")
    same = len(known) == len(runs) and len({run.examples for run in runs.values()}) == 1
    return Sweep(first.primary_metric, first.greater_is_better, _entries(runs), runs, notes, same)


def _size(entry: Entry) -> int:
    return entry.arm.parameters or 0


def _names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parts = [file.resolve().parent.parts for file in files]
    if len(set(parts)) < len(parts):
        raise ValueError(f"{' '.join(map(str, files))}: a run is named twice")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different ends")


def _data(run: Results) -> str | None:
    data = run.provenance.get("data") or {}
    found = data.get("test") or data.get("eval") or {}
    return found.get("hash")


def _entries(runs: dict[str, Results]) -> list[Entry]:
    made: list[Entry] = []
    teachers: dict[Any, str] = {}
    for name, run in runs.items():
        for role, arm in run.arms.items():
            score = run.score(role)
            assert score is not None
            shown = name if role == "student" else f"{role} of {name}"
            if role == "teacher":
                identity = (run.provenance.get("teacher_identity") or {}).get("fingerprint")
                key = identity or (arm.parameters, tuple(sorted(arm.metrics.items())))
                if key in teachers:
                    continue
                teachers[key] = name
            made.append(Entry(shown, role, arm, score, run.standard_error(role)))
    if len(teachers) == 1:
        made = [Entry("teacher", e.role, e.arm, e.score, e.error) if e.role == "teacher" else e for e in made]
    return sorted(made, key=lambda e: (e.role != "teacher", -_size(e), e.role == "control"))


def charts(sweep: Sweep) -> dict[str, Figure]:
    """Quality against each cost that every student has, with the front as a line."""
    made = {}
    for name, cost in COSTS.items():
        values = [cost.of(entry.arm) for entry in sweep.entries if entry.role != "teacher"]
        if any(value is None or not value > 0 for value in values):
            continue
        with style():
            made[name] = _draw(sweep, name, cost)
    return made


def _draw(sweep: Sweep, name: str, cost: Cost) -> Figure:
    figure, axes = new_figure(3.8)
    front = sweep.front(name)
    axes.plot(
        [cost.of(e.arm) or 0.0 for e in front],
        [e.score for e in front],
        "-",
        color=INK,
        alpha=0.5,
        linewidth=1.2,
    )
    further = sorted({e.role for e in sweep.entries} - set(COLOURS))
    named: set[str] = set()
    for place, entry in enumerate(sweep.entries, start=1):
        price = cost.of(entry.arm)
        if not price:
            continue  # of a teacher elsewhere
        ink = COLOURS.get(entry.role) or OTHERS[further.index(entry.role) % len(OTHERS)]
        at = (price, entry.score)
        axes.errorbar(
            [at[0]],
            [at[1]],
            yerr=None if entry.error is None else [entry.error],
            fmt=MARKERS.get(entry.role) or OTHER_MARKERS[further.index(entry.role) % len(OTHER_MARKERS)],
            color=ink,
            mfc=ink if entry in front else "none",
            markersize=8,
            capsize=3,
            elinewidth=0.8,
            label=None if entry.role in named else entry.role,
        )
        named.add(entry.role)
        axes.annotate(
            str(place),
            at,
            xytext=(7, -13 if entry.role == "control" else 5),
            textcoords="offset points",
            fontsize=9,
        )
    logarithmic(axes)
    axes.set_xlabel(f"{cost.axis}, logarithmic")
    known = any(entry.error for entry in sweep.entries)
    axes.set_ylabel(f"{sweep.metric}{' ± standard error' if known else ''}")
    axes.margins(0.18)
    axes.grid(alpha=0.25)
    axes.legend(loc="best")
    return figure


def table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of the table."""
    shown = {
        name: cost for name, cost in COSTS.items() if any(cost.of(e.arm) is not None for e in sweep.entries)
    }
    header = ["", "model", sweep.metric, "quality kept", "KL to teacher", *(c.column for c in shown.values())]
    fronts = {name: sweep.front(name) for name in shown}
    teacher = next((e for e in sweep.entries if e.role == "teacher"), None)
    several = sum(e.role == "teacher" for e in sweep.entries) > 1
    rows = []
    for place, entry in enumerate(sweep.entries, start=1):
        kept = "–"
        if teacher is not None and entry.role != "teacher" and not several:
            above, below = (entry, teacher) if sweep.greater_is_better else (teacher, entry)
            if below.score > 0 and above.score >= 0:
                kept = f"{100 * above.score / below.score:.1f} %"
        error = "" if entry.error is None else f" ± {decimal(entry.error)}"
        costs = []
        for name, cost in shown.items():
            value = cost.of(entry.arm)
            star = " ★" if entry in fronts[name] else ""
            costs.append("–" if value is None else f"{decimal(value)}{star}")
        least = entry.arm.metrics.get("kl_tail")
        kl = "–" if least is None else f"≥ {decimal(least)}"
        kl = kl if entry.arm.eval_kl is None else decimal(entry.arm.eval_kl)
        rows.append([str(place), entry.name, f"{decimal(entry.score)}{error}", kept, kl, *costs])
    return header, rows


def write_pages(sweep: Sweep, folder: Path) -> list[Path]:
    """Write `sweep.html` and `sweep.md`, with the charts as `sweep-<cost>.png`, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    header, rows = table(sweep)
    first = next(iter(sweep.runs.values()))
    shared = {
        "title": f"{first.task}: {len(sweep.runs)} runs",
        "provenance": provenance(first),
        "verdict": sweep.verdict,
        "notes": sweep.notes,
        "header": header,
        "rows": rows,
    }
    drawn = charts(sweep)
    caption = "{} against {}; filled and on the line: no other model is as good and as cheap"
    captions = {name: caption.format(sweep.metric, name) for name in drawn}
    page = environment(autoescape=True).get_template(HTML_FILE)
    shown = [{"svg": Markup(svg(f, f"sweep-{name}")), "caption": captions[name]} for name, f in drawn.items()]
    write_text(folder / HTML_FILE, page.render(**shared, charts=shown))
    images = [(save_png(f, folder / f"sweep-{name}.png").name, captions[name]) for name, f in drawn.items()]
    text = environment(autoescape=False).get_template(MARKDOWN_FILE).render(**shared, images=images)
    write_text(folder / MARKDOWN_FILE, text)
    return [folder / HTML_FILE, folder / MARKDOWN_FILE]
