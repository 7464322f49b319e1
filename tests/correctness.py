"""What breaks distillation code, and the tests that show that this code is not broken so.

    python -m tests.correctness > docs/correctness.md

A test names the traps that it covers at the start of its docstring ("Trap 7: ...", "Traps 15, 16: ..."); one
that also holds the naive version, and shows that it fails, says "counter-example" or "naive" there.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "correctness.md"
_NAMED = re.compile(r"^Traps? (\d+(?:(?:, | and )\d+)*)\b")
_NAIVE = re.compile(r"counter-example|naive", re.IGNORECASE)


@dataclass(frozen=True)
class Trap:
    """One way to be wrong. `missing`: what of it is not tested, and why; empty: all of it is."""

    what: str
    missing: str = ""


@dataclass(frozen=True)
class Test:
    """One test and the traps that it names."""

    file: str
    name: str
    traps: tuple[int, ...]
    naive: bool


SECTIONS: dict[str, dict[int, Trap]] = {
    "The mathematics": {
        1: Trap("`T^2` forgotten, or in the logged value only: distillation fades as T grows"),
        2: Trap("Weights or `T^2` lost at alpha = 0 or 1, or on data without labels"),
        3: Trap("A mean over classes, or a sum over tokens, where a mean over positions is meant"),
        4: Trap("The softmax runs over tokens or pixels instead of classes"),
        5: Trap("Arguments of the KL swapped, or probabilities where their logarithms belong"),
        6: Trap("A soft cross-entropy is logged as KL: it never gets below the teacher's entropy"),
        7: Trap("Reverse KL and JSD with a NaN gradient behind a finite loss"),
        8: Trap("Rounding: negative KLs near convergence, constants that vanish in half precision"),
        9: Trap("Classes at -inf turn the loss into NaN"),
        10: Trap("Softmax KL on one number (always 0), or on labels that do not exclude each other"),
        11: Trap("The teacher gets a gradient, or its cached answer is edited"),
        12: Trap("A teacher cut to its top k: renormalised (wrong direction) or not (over-confident)"),
        13: Trap("Losses that compare the rows of a batch depend on the size of the micro-batch"),
        14: Trap("DKD that does not add up to KD at equal weights"),
    },
    "Trainer and Accelerate": {
        15: Trap("The step's count is ignored: accumulation 4 gives 4 times the gradient"),
        16: Trap("Heads that drop the count: one term grows with accumulation and ranks, the other does not"),
        17: Trap("Ranks average gradients: a factor is missing, or a rank with nothing to learn hangs"),
        18: Trap("A mean of the means of ragged micro-batches"),
        19: Trap("The student called around its wrapper: no gradient exchange, no autocast"),
        20: Trap("Columns that only the teacher reads are dropped"),
        21: Trap("A teacher that trains, drifts, is optimised, or is saved"),
        22: Trap(
            "Student and teacher over one base: evaluation mode silences the student's dropout",
            "a teacher made of the student's own base (adapters off, moving average) does not exist yet",
        ),
        23: Trap("Outputs read by position, hidden states in predictions, other parts of Trainer's contract"),
        24: Trap("The best model chosen on the mixed loss, or evaluation at the training temperature"),
        25: Trap("Label smoothing and custom losses that stop working beside distillation"),
        26: Trap("Projections outside of optimizer, clipping or checkpoint, or left inside the student"),
        27: Trap(
            "A quantised teacher moved, or a teacher that takes over the student's dtype",
            "FSDP and ZeRO-3 placement need GPUs",
        ),
        28: Trap("Schedules that overwrite their base, start late, or restart on resume"),
        29: Trap("A NaN loss that the log hides"),
    },
    "Alignment of teacher and student": {
        30: Trap("Padded vocabularies compared by size, or filled up with zeros that get real mass"),
        31: Trap("Different tokenizers accepted in silence"),
        32: Trap("The same label names in another order"),
        33: Trap("The causal shift on one model, or on the logits and not on the mask"),
        34: Trap(
            "Decoder masks from padding ids lose T5's first position; each model its own decoder inputs"
        ),
        35: Trap("Sub-words, special tokens or unmasked tokens that count"),
        36: Trap("Answers that may start on padding or in the question"),
        37: Trap("A teacher whose head was never trained"),
        38: Trap(
            "Layer maps that are off by one: hidden states begin with the embeddings",
        ),
        39: Trap(
            "The last hidden state is normed in some families and not in others",
        ),
        40: Trap(
            "SDPA returns no attentions, so their loss is 0",
        ),
        41: Trap(
            "Attentions compared across different numbers of heads, or as if they were logits",
        ),
        42: Trap("Teacher and student with other means, sizes or features for the same image or sound"),
        43: Trap("A student cut from layers keeps their numbers: generation with a cache fails"),
        44: Trap("A count of layers that is not in a table falls back to the first ones"),
    },
    "Cached and served teachers": {
        45: Trap("A cache keyed by step or row number"),
        46: Trap("Random augmentation beside a cache"),
        47: Trap("A lossy codec whose error nobody stated"),
        48: Trap("A writer that was killed: torn records, or a silent fallback"),
        49: Trap("A cache of another teacher, tokenizer, dtype or temperature"),
    },
    "Measuring": {
        50: Trap("Tied weights counted twice; latency without warm-up, or on other inputs"),
        51: Trap("Quality kept without a control: it mostly measures the initialisation"),
        52: Trap("Distillation that lost to no distillation, unsaid"),
    },
}
TRAPS = {number: trap for traps in SECTIONS.values() for number, trap in traps.items()}


def find_tests() -> list[Test]:
    """All tests that name a trap, by file and name. The files are read, not imported."""
    return [
        Test(path.name, node.name, tuple(map(int, re.findall(r"\d+", named[1]))), bool(_NAIVE.search(text)))
        for path in sorted(TESTS.glob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for text in [ast.get_docstring(node) or ""]
        if (named := _NAMED.match(text))
    ]


def status(trap: Trap, tests: list[Test]) -> str:
    """What can be said of one trap."""
    if not tests:
        return f"not applicable yet: {trap.missing}" if trap.missing else "**no test**"
    tested = "tested, naive version fails" if any(test.naive for test in tests) else "tested"
    return f"{tested}; not covered: {trap.missing}" if trap.missing else tested


def page() -> str:
    """The whole page."""
    return "\n".join(_lines(find_tests())) + "\n"


def _lines(tests: list[Test]) -> Iterator[str]:
    yield "# Correctness"
    yield ""
    yield (
        "What breaks distillation code in practice, and the tests that show that it does not happen here. "
        '"Naive version fails": the test also holds the code that one would write first, and shows that it '
        "is wrong. Numbers are those that the tests' docstrings name."
    )
    yield ""
    yield "Made from the tests by `python -m tests.correctness > docs/correctness.md`."
    for section, traps in SECTIONS.items():
        yield from ("", f"## {section}", "", "| | what goes wrong | status | tests |", "|--:|---|---|---|")
        for number, trap in traps.items():
            named = [test for test in tests if number in test.traps]
            cell = "<br>".join(f"`{test.file}::{test.name}`" for test in named) or "–"
            yield f"| {number} | {trap.what} | {status(trap, named)} | {cell} |"


if __name__ == "__main__":
    sys.stdout.write(page())
