"""`results.json` for people: a table on the terminal, the verdict, and where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_kd.results import SPIKES, Arm, Results
from hf_kd.slices import Interval
from hf_kd.verdict import number

# Rows of the table after the task's metrics: a label and how an arm shows it. A row no arm has is left out.
_ROWS: dict[str, Callable[[Arm], str | None]] = {
    "KL to teacher (nats)": lambda arm: None if arm.eval_kl is None else decimal(arm.eval_kl),
    "agreement": lambda arm: None if arm.eval_agreement is None else _percent(arm.eval_agreement),
    "parameters": lambda arm: None if arm.parameters is None else _count(arm.parameters),
    "MB in memory": lambda arm: None if arm.bytes is None else decimal(arm.bytes / 1e6),
    "MB on disk": lambda arm: None if arm.bytes_on_disk is None else decimal(arm.bytes_on_disk / 1e6),
    "peak MB, forward": lambda arm: None if arm.peak_memory is None else decimal(arm.peak_memory / 1e6),
    "latency (ms ± IQR)": lambda arm: _latency(arm),
    "latency p95 (ms)": lambda arm: decimal(arm.latency[0].p95_ms) if arm.latency else None,
    "rows a second": lambda arm: decimal(arm.latency[0].examples_per_second) if arm.latency else None,
}

# Metrics that describe the data or the teacher and not the arm: in the file, not in the table.
NOT_SHOWN = {"teacher_entropy", "teacher_mass_kept"}
# What is said of a teacher of which some entries are known alone.
_SHOWN_AS = {
    "kl_tail": "KL to teacher, at least (nats)",
    "kl_draws": "KL to teacher, estimate (nats)",
    "student_mass_kept": "mass on the teacher's entries",
}

_ARMS_IN_A_TABLE = 3


def print_table(results: Results, console: Console | None = None) -> None:
    """Print teacher, student, control and further students side by side, then verdict and provenance.

    Readable from 80 columns on; more than three arms make several tables.

    Args:
        results: what to show.
        console: where to print; the default is standard output.
    """
    console = console or Console()
    names = list(results.arms)
    for first in range(0, len(names), _ARMS_IN_A_TABLE):
        console.print(_table(results, names[first : first + _ARMS_IN_A_TABLE]))
    lines = headline(results)
    width = max(len(label) for label, _ in lines) + 2
    for label, said in lines:
        console.print(Text.assemble((f"{label + ':':<{width}}", "bold"), said))
    console.print(Text(results.verdict, style="bold"))
    if results.slices:
        console.print(_slice_table(results))
    console.print(Text(provenance(results), style="dim"))


def provenance(results: Results) -> str:
    """One line: the data, what it ran on, and how latency was measured; nothing that was not recorded."""
    machine = results.machine
    parts = [f"{results.examples} examples" if results.examples else ""]
    parts.append(str(results.provenance.get("dataset") or ""))
    if "seed" in results.provenance:
        parts.append(f"seed {results.provenance['seed']}")
    parts.append(_hardware(results))
    if version := machine.get("versions", {}).get("torch"):
        parts.append(f"torch {version}")
    timed = next((arm.latency[0] for arm in results.arms.values() if arm.latency), None)
    if timed:
        threads = f"{timed.threads} thread" + ("s" if timed.threads != 1 else "")
        parts.append(f"batch {timed.batch_size}, {threads}, {timed.repeats} repeats")
        if timed.padding >= 0.005:
            parts.append(f"{100 * timed.padding:.0f} % padding")
    return " · ".join(part for part in parts if part)


def _hardware(results: Results) -> str:
    """The device the models ran on: the accelerator's name, or the processor and its cores."""
    machine = results.machine
    device = str(machine.get("device") or "")
    if device not in ("", "cpu") or "cpu" not in machine:
        return device
    name = str(machine["cpu"]).partition(" @ ")[0].replace("(R)", "").replace("(TM)", "")
    cores = f", {machine['cores']} cores" if machine.get("cores") else ""
    return name + cores


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a label and each arm's cell; `primary` is what quality is judged by."""

    label: str
    cells: list[str]
    primary: bool = False


def comparison(results: Results, names: Sequence[str]) -> list[Row]:
    """The lines of the comparison of the named arms, metrics first; what no arm has is left out."""
    rows = []
    for metric in _metrics(results):
        primary = metric == results.primary_metric
        known = any(results.standard_error(name, metric) is not None for name in names)
        label = f"{metric} (± SE)" if known else _SHOWN_AS.get(metric, metric)
        rows.append(Row(label, [_metric(results, name, metric) for name in names], primary))
    for label, show in _ROWS.items():
        cells = [show(results.arms[name]) or "–" for name in names]
        if any(cell != "–" for cell in cells):
            rows.append(Row(label, cells))
    return rows


def latencies(results: Results) -> list[dict[str, Any]]:
    """Every input that was timed: its rows and length, and each arm's median, p95 and throughput."""
    made: dict[tuple[int, int | None], dict[str, tuple[str, str]]] = {}
    for name, arm in results.arms.items():
        for seen in arm.latency:
            cell = (
                f"{decimal(seen.median_ms)} ms",
                f"p95 {decimal(seen.p95_ms)} · {decimal(seen.examples_per_second)} rows/s",
            )
            made.setdefault((seen.batch_size, seen.length), {})[name] = cell
    return [
        {"rows": rows, "length": length, "cells": [cells.get(name, ("–", "")) for name in results.arms]}
        for (rows, length), cells in sorted(made.items(), key=lambda item: (item[0][1] or 0, item[0][0]))
    ]


def slice_table(results: Results) -> list[dict[str, Any]]:
    """Every slice with each arm's score and 95 % interval."""
    return [
        {
            "by": part.by,
            "value": part.value,
            "rows": part.rows,
            "metric": part.metric,
            "cells": [_interval(part.scores.get(name)) for name in results.arms],
        }
        for part in results.slices
    ]


def _interval(score: Interval | None) -> tuple[str, str]:
    if score is None or score.value is None:
        return "–", ""
    if score.low is None or score.high is None:
        return f"{score.value:.3f}", ""
    return f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}"


def headline(results: Results) -> list[tuple[str, str]]:
    """The two ratios that the verdict rests on, in words; and steps of the training that went wrong."""
    shown = (("Quality kept", results.quality_kept), ("Gap closed", results.gap_closed))
    lines = [
        (label, f"not defined: {ratio.reason}" if ratio.value is None else _percent(ratio.value))
        for label, ratio in shown
    ]
    if "teacher" not in results.arms:
        lines = [("Teacher", "its own score is not known")]
    paired = results.difference("student", "control")
    if paired is not None:
        ends = f"{number(paired.low)} to {number(paired.high)}"
        lines.append(("Student - control", f"{number(paired.value)}, 95 % interval {ends}"))
    happened = " · ".join(f"{SPIKES[name]}: {count}" for name, count in results.spikes.items())
    return [*lines, ("Training", happened)] if happened else lines


def _table(results: Results, names: list[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column(Text(results.task), overflow="fold")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in comparison(results, names):
        table.add_row(Text(row.label), *map(Text, row.cells), style="bold" if row.primary else None)
    return table


def _slice_table(results: Results) -> Table:
    """The slices; the arms beyond the first three are in the page alone."""
    names = list(results.arms)[:_ARMS_IN_A_TABLE]
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in (f"{results.slices[0].metric} by slice", "rows", *names):
        table.add_column(Text(column), overflow="fold", justify="left" if "slice" in column else "right")
    for part in slice_table(results):
        cells = [" ".join(cell) for cell in part["cells"][: len(names)]]
        table.add_row(*map(Text, [f"{part['by']}: {part['value']}", str(part["rows"]), *cells]))
    return table


def _metrics(results: Results) -> list[str]:
    """Names of the metrics to show, the primary one first, each once and in the order of the arms."""
    first = [] if results.primary_metric is None else [results.primary_metric]
    names = first + [name for arm in results.arms.values() for name in arm.metrics if name not in NOT_SHOWN]
    return list(dict.fromkeys(names))


def _metric(results: Results, arm: str, metric: str) -> str:
    value = results.arms[arm].metrics.get(metric)
    if value is None:
        return "–"
    error = results.standard_error(arm, metric)
    if error is None or not math.isfinite(value):
        return decimal(value)
    digits = 2 if max(abs(value), error) >= 10 else 4
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _latency(arm: Arm) -> str | None:
    if not arm.latency:
        return None
    median = decimal(arm.latency[0].median_ms)
    return f"{median} ± {arm.latency[0].iqr_ms:.{len(median.partition('.')[2])}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else str(share)


def _count(number: int) -> str:
    for size, unit in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def decimal(value: float) -> str:
    """Three digits and more, without an exponent where a person would not write one."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) < 1e-4 or abs(value) >= 1e7:
        return f"{value:.2e}"
    magnitude = math.floor(math.log10(abs(value)))
    return f"{value:.{max(4, 2 - magnitude) if magnitude < 0 else max(0, 2 - magnitude)}f}"
