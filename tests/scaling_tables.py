"""The tables of docs/scaling.md, from the cost model and the benchmark: `python -m tests.scaling_tables`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_kd.cost_model import Machine, Run, bytes_per_token, gradient_bytes, hours, step, teacher_bytes

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "scaling.json"
#: Assumed, not measured: operations a second reached, bytes a second to another device, and of a cache.
MACHINES = {
    "a laptop": (1, Machine(flops=5e12, link=1e9, disk=1e9)),
    "8 GPUs": (8, Machine(flops=4e14, link=2e11, disk=2e9)),
    "1,024 GPUs": (1024, Machine(flops=4e14, link=5e10, disk=1e9)),
}
#: Weights of student and teacher, the teacher's vocabulary and width; what a device takes in a step.
PAIRS = {
    "0.1 B from 0.5 B": (1e8, 5e8, 32_000, 1024),
    "8 B from 70 B": (8e9, 7e10, 128_256, 8192),
}
TOKENS_A_STEP = 16_384
SPANS = {"1 B": 1e9, "10 B": 1e10, "1 T": 1e12}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def size(count: float) -> str:
    """Bytes in the unit that leaves at most four digits."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 1000 or unit == "PB":
            return f"{count:,.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def duration(value: float) -> str:
    """Hours, or years where they are many."""
    if value >= 24 * 365:
        return f"{value / 24 / 365:,.3g} years"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def placed(run: Run, total: int) -> Run:
    """A group that shares the devices with the students in the ratio of their work."""
    body = 2 * (run.teacher - run.head)
    own = 6 * run.student + 2 * run.head
    students = min(total - 1, max(1, round(total * own / (own + body))))
    return replace(run, devices=students, teachers=total - students)


def ways(name: str, devices: int) -> dict[str, Run]:
    """One pair on so many devices, with the teacher at every place."""
    student, teacher, vocabulary, width = PAIRS[name]
    base = Run(student, teacher, TOKENS_A_STEP, devices=devices)
    told = {
        kind: bytes_per_token(kind, vocabulary=vocabulary, width=width)
        for kind in ("logits", "hidden", "sparse")
    }
    head = vocabulary * width
    found = {
        "none": replace(base, where="none"),
        "local": base,
        "cache, sparse": replace(base, where="cache", signal=told["sparse"]),
        "cache, hidden": replace(base, where="cache", signal=told["hidden"], head=head),
    }
    if devices > 1:
        found["group, hidden"] = placed(
            replace(base, where="group", signal=told["hidden"], head=head), devices
        )
    return found


def hours_table() -> str:
    """Hours of 1 B, 10 B and 1 T tokens, and what lasts longest in a step."""
    rows = []
    for place, pair in (
        ("a laptop", "0.1 B from 0.5 B"), ("8 GPUs", "0.1 B from 0.5 B"), ("8 GPUs", "8 B from 70 B"),
        ("1,024 GPUs", "8 B from 70 B"),
    ):  # fmt: skip
        devices, machine = MACHINES[place]
        for way, run in ways(pair, devices).items():
            split = f" ({run.devices} + {run.teachers})" if run.where == "group" else ""
            spans = [duration(hours(run, machine, tokens)) for tokens in SPANS.values()]
            rows.append([place, pair, way + split, *spans, step(run, machine).bound])
        filling = 2 * PAIRS[pair][1] / machine.flops / devices / 3600
        rows.append(
            [place, pair, "filling a cache, once", *(duration(filling * n) for n in SPANS.values()), ""]
        )
    return table(["on", "models", "teacher", *(f"{span} tokens, h" for span in SPANS), "longest"], rows)


def cache_table() -> str:
    """Bytes of a cache."""
    rows = []
    for pair, (_, _, vocabulary, width) in PAIRS.items():
        for kind in ("logits", "hidden", "sparse"):
            each = bytes_per_token(kind, vocabulary=vocabulary, width=width)
            sizes = [size(each * tokens) for tokens in SPANS.values()]
            rows.append([pair, kind, f"{each:,.0f}", *sizes])
    return table(["models", "fidelity", "bytes a token", *(f"{span} tokens" for span in SPANS)], rows)


def gradient_table() -> str:
    """Bytes that each device sends for gradients."""
    rows = []
    for place, pair in (
        ("8 GPUs", "0.1 B from 0.5 B"),
        ("8 GPUs", "8 B from 70 B"),
        ("1,024 GPUs", "8 B from 70 B"),
    ):
        devices, _ = MACHINES[place]
        each = gradient_bytes(PAIRS[pair][0], devices)
        steps = [tokens / (TOKENS_A_STEP * devices) for tokens in SPANS.values()]
        rows.append(
            [place, pair, size(each), f"{each / TOKENS_A_STEP:,.0f}", *(size(each * n) for n in steps)]
        )
    head = ["on", "models", "a step", "bytes a token", *(f"{span} tokens" for span in SPANS)]
    return table(head, rows)


def teacher_table() -> str:
    """What a teacher that does not fit moves, by where it is."""
    _, teacher, vocabulary, width = PAIRS["8 B from 70 B"]
    run = Run(8e9, teacher, TOKENS_A_STEP)
    rows = []
    for way, name in (
        ("device_map", "`teacher_device_map`, layers over 8 devices"), ("sharded", "FSDP 2 over 8 devices"),
        ("offload", "weights in the host's memory"),
    ):  # fmt: skip
        rows.append([name, size(teacher_bytes(way, run, width=width, devices=8))])
    for kind in ("logits", "hidden", "sparse"):
        each = bytes_per_token(kind, vocabulary=vocabulary, width=width)
        rows.append(
            [f"a group, {kind}", size(teacher_bytes("group", replace(run, signal=each), width=width))]
        )
    return table(["teacher of 70 B", "bytes a token"], rows)


def measured_table(found: dict[str, Any]) -> str:
    """Seconds of a step, predicted and measured."""
    rows = []
    for cell, one in found["cells"].items():
        guess = found["model"]["cells"][cell]
        given = cell == "none, 1 rank"
        rows.append(
            [cell, f"{one['seconds']:.3f}", "given" if given else f"{guess['seconds']:.3f}",
             "" if given else f"{guess['error']:+.0%}", f"{one['bytes_per_token']:,.0f}"]
        )  # fmt: skip
    return table(["cell", "s a step", "model", "error", "loopback bytes a token"], rows)


def ratio_table(found: dict[str, Any]) -> str:
    """What one run's ratios say."""
    return table(["ratio", ""], [[name, f"{value:.2f}"] for name, value in found["ratios"].items()])


def tables() -> list[str]:
    """All of them, as they stand in the page."""
    found = json.loads(RESULTS.read_text())
    made = hours_table(), cache_table(), gradient_table(), teacher_table()
    return [ratio_table(found), measured_table(found), *made]


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(tables()) + "\n")
