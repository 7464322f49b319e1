"""The page of losses, made from their docstrings: `python -m tests.losses_page > docs/losses.md`."""

from __future__ import annotations

import inspect
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_kd.losses import DIVERGENCES, LOGIT_LOSSES
from hf_kd.losses.needs import CONTEXT, needs_of

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
LOSSES: dict[str, Callable[..., Any]] = {**DIVERGENCES, **LOGIT_LOSSES}

_INTRO = """# Losses

What `divergence=` names. Each compares the student with the teacher at every supervised position; `T^2`, mask
and mean are the same for all and stay outside. Parameters go into `divergence_options`, as a dict in Python
and YAML, as JSON on the command line. A function of your own does as well, as a callable or as
`"package.module:function"`; it gets the log-probabilities of both and, if it names them as keywords, labels,
raw logits and temperatures (`hf_kd/losses/needs.py`).

Which one when: [Choosing a loss](choose-loss.md).

With two classes some lose their meaning: `dkd` at `alpha = 1` is `forward_kl`, and the correlation over
classes in `dist` is 1 or -1, so that only its second term teaches.

"""
_SECTION = re.compile(r"^(When|Siblings|Source|Args|Returns|Raises|Example): ?(.*)$")
_ARGUMENT = re.compile(r"^ {4}(\w+): (.*)$")


def sections(function: Callable[..., Any]) -> dict[str, str]:
    """The docstring by part; the text before the first named part is under ""."""
    parts: dict[str, list[str]] = {"": []}
    name = ""
    for line in (inspect.getdoc(function) or "").splitlines():
        found = _SECTION.match(line)
        if found:
            name = found[1]
            parts[name] = [found[2]]
        elif name in ("When", "Siblings", "Source") and not line.strip():
            name = ""
        else:
            parts[name].append(line)
    return {key: "\n".join(lines).strip("\n") for key, lines in parts.items()}


def _flow(text: str) -> str:
    return " ".join(text.split())


def _body(text: str) -> Iterator[str]:
    """Paragraphs as they are, indented formulas as code."""
    for block in re.split(r"\n{2,}", text.strip("\n")):
        if all(line.startswith("    ") for line in block.splitlines()):
            yield "```text\n" + textwrap.dedent(block) + "\n```"
        else:
            yield _flow(block)


def _arguments(text: str) -> Iterator[tuple[str, str]]:
    name, words = "", ""
    for line in text.splitlines():
        found = _ARGUMENT.match(line)
        if found:
            if name:
                yield name, _flow(words)
            name, words = found[1], found[2]
        elif name:
            words += " " + line
    if name:
        yield name, _flow(words)


def _entry(name: str, function: Callable[..., Any]) -> Iterator[str]:
    parts, parameters = sections(function), inspect.signature(function).parameters
    summary, _, rest = parts[""].partition("\n")
    yield f"### `{name}`"
    yield summary
    yield from _body(rest)
    for key in ("When", "Siblings", "Source"):
        if key in parts:
            yield f"**{key}:** {_flow(parts[key])}"
    rows = ["| input | | default |", "|---|---|---|"]
    for argument, words in _arguments(parts["Args"]):
        default = parameters[argument].default
        given = "given" if argument in ("log_q", "log_p", *CONTEXT) else f"`{default}`"
        rows.append(f"| `{argument}` | {words} | {given} |")
    yield "\n".join(rows)
    yield f"**Returns:** {_flow(parts['Returns'])}"
    if "Raises" in parts:
        yield f"**Raises:** {_flow(parts['Raises'])}"
    options = {
        p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in CONTEXT
    }
    command = f"hf-kd distill ... --divergence {name}"
    if options:
        command += f" --divergence_options '{json.dumps(options)}'"
    yield f"```sh\n{command}\n```"


def _measured() -> Iterator[str]:
    """What our own benchmarks say about losses, from their results."""
    tables = []
    for name, title in (("digits", "digits"), ("mnist", "MNIST")):
        path = RESULTS / f"quality_{name}.json"
        if path.exists():
            tables.append((title, json.loads(path.read_text())))
    if not tables:
        return
    yield "## Measured"
    yield (
        "A small ViT teaches a far smaller one handwritten digits: equal steps, on test rows, mean and "
        "standard deviation where there is more than one seed. [quality.md](quality.md) says how; "
        "the options of each arm are in `benchmarks/quality/images.py`."
    )
    for title, data in tables:
        teacher = data["teacher"]["test"]
        known = f"{data['settings']['train_rows']} training rows; teacher {100 * teacher['accuracy']:.1f} %"
        yield f"{title} ({known}):"
        rows = ["| loss | seeds | accuracy, % | KL to the teacher | agreement, % | calibration error, % |"]
        rows.append("|---|--:|---|---|---|---|")
        for arm in dict.fromkeys(run["arm"] for run in data["runs"]):
            if arm in ("by hand", "TextBrewer") or arm.endswith("cut from the teacher"):
                continue
            runs = [run["test"] for run in data["runs"] if run["arm"] == arm]
            cells = [_cell(runs, "accuracy", 100, 1), _cell(runs, "kl", 1, 3)]
            cells += [_cell(runs, "agreement", 100, 1), _cell(runs, "ece", 100, 1)]
            label = {
                "control": "none (control)",
                "default": "forward_kl, alpha=0.9, T=1 (the default)",
                "alpha=0.5, T=2": "forward_kl, alpha=0.5, T=2",
            }
            rows.append(f"| {label.get(arm, arm)} | {len(runs)} | " + " | ".join(cells) + " |")
        yield "\n".join(rows)
        right, rows_tested = teacher["accuracy"], data["settings"]["test_rows"]
        error = 100 * math.sqrt(right * (1 - right) / rows_tested)
        yield (
            f"One standard error of an accuracy on {rows_tested} rows is {error:.1f} points; "
            "smaller differences say nothing. Read KL and calibration first."
        )


def _cell(runs: list[dict[str, float]], key: str, scale: float, digits: int) -> str:
    values = [scale * run[key] for run in runs]
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def page() -> str:
    """The whole page."""
    parts = [_INTRO.rstrip("\n"), *_measured(), "## One by one"]
    for name, function in LOSSES.items():
        parts += _entry(name, function)
        if needs_of(function).couples_rows:
            parts.append("Compares the rows of a micro-batch: not invariant to accumulation.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
