"""The page of the results file, from its dataclasses: `python -m tests.results_page > docs/results.md`."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from typing import Any

from hf_kd.behaviour import Behaviour, Calibration, Difference, PositionKL
from hf_kd.paired import PairedDifference
from hf_kd.results import SCHEMA_VERSION, Arm, Latency, Results
from hf_kd.slices import Interval, Slice

#: In the order of the page: the whole file first.
CLASSES = (
    *(Results, Arm, Latency, PairedDifference, Slice, Interval),
    *(Behaviour, Calibration, Difference, PositionKL),
)
_WORDS: dict[Any, str] = {
    **{str: "string", int: "integer", float: "number", bool: "true, false"},
    **{type(None): "null", Any: "anything"},
}
_INTRO = f"""# results.json

What a run found, for other tools. `hf-kd distill`, `hf-kd export` and `trainer.report()` write it;
`hf-kd report` makes table, page and Markdown from it alone; in Python it is `hf_kd.results.Results`:

```python
from hf_kd.results import Results

args = DistillationArguments(output_dir="out", max_steps=10)
trainer = DistillationTrainer(
    student, args, teacher=teacher, train_dataset=train, eval_dataset=dev, processing_class=tokenizer
)
trainer.train()
trainer.report()
results = Results.read("out/results.json")
print(results.verdict, results.gap_closed, results.arms["student"].metrics)
```

`schema_version` is {SCHEMA_VERSION}. It goes up whenever a field is added or changes its meaning. Files of
older versions are read (what they lack is empty), files of newer ones refused. Unknown or missing fields and
values of another type are refused by their place in the file, all at once. Numbers that JSON does not have
are the strings `"NaN"`, `"Infinity"`, `"-Infinity"`.

`summary` holds what follows from the rest, for readers that are not Python, and is not read back:
`quality_kept` and `gap_closed` (each with `value`, or null and a `reason`), and `verdict`.
"""


def kind(hint: Any) -> str:
    """A type in JSON's words, with a link where it is an object of this page."""
    if hint in CLASSES:
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    if hint in _WORDS:
        return _WORDS[hint]
    parts = [kind(part) for part in typing.get_args(hint)]
    origin = typing.get_origin(hint)
    if origin is list:
        return f"array of {parts[0]}"
    return f"object of {parts[1]} by name" if origin is dict else " or ".join(parts)


def meanings(cls: type) -> dict[str, str]:
    """What the docstring says of each attribute."""
    text = (cls.__doc__ or "").partition("Attributes:\n")[2].partition("\n    Raises:")[0]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", text, re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in found}


def page() -> str:
    """The page."""
    parts = [_INTRO]
    for cls in CLASSES:
        hints, said = typing.get_type_hints(cls), meanings(cls)
        first = " ".join((cls.__doc__ or "").partition("\n\n")[0].split())
        parts.append(f"## {cls.__name__}\n\n{first}\n\n| field | type | meaning |\n|---|---|---|")
        for entry in dataclasses.fields(cls):
            about = said.get(
                entry.name, "the version of this schema" if entry.name == "schema_version" else ""
            )
            assert about, f"{cls.__name__}.{entry.name} is not in its docstring"
            about = re.sub(r"\bNone\b", "null", about).replace("|", "\\|")
            parts.append(f"| `{entry.name}` | {kind(hints[entry.name])} | {about} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
