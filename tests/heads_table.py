"""The table of heads in the documentation: `python -m tests.heads_table > docs/heads.md`."""

from __future__ import annotations

import sys

from hf_kd.tasks import TASKS, Task
from hf_kd.tasks.dense import CTC, EmbeddingSimilarity, ImageText, ObjectDetection, Segmentation
from hf_kd.tasks.text import CausalLM, QuestionAnswering, Seq2SeqLM, SequenceClassification

_INTRO = """# Heads

Every head is brought to `[positions, classes]`; what differs between heads is one row of this table. The kind
of head is found from the model's class, or named with `task=`. A position that counts has the weight 1, or a
share of 1 where a row is counted as a whole. Labels equal to the ignored value are "no label".

| task | loaded by | logits | labels | a supervised position | distilled where there are no labels |
|---|---|---|---|---|---|
"""

_END = """
Sequence, image, video and audio classification follow the config's `problem_type`: one label (softmax),
several labels (each a Bernoulli variable, mean over labels), or numbers (squared error, no temperature).
`supervise="all"` distils every position that exists also where there are labels.

A head that is not here takes three things: the names of its logits and labels, and a mask for data without
labels; see [`examples/custom_head.py`](../examples/custom_head.py).
"""

_UNLABELLED = {
    SequenceClassification: "every row",
    CausalLM: "tokens whose next token exists (`attention_mask`, `position_ids`)",
    Seq2SeqLM: "`decoder_input_ids` that are not padding",
    QuestionAnswering: "every row; the softmax excludes question and padding (`span_mask`, `token_type_ids`)",
    CTC: "frames that are not padding (always: labels do not choose frames)",
    Segmentation: "every pixel",
    ImageText: "every row: row i belongs to row i",
    ObjectDetection: "every query",
    EmbeddingSimilarity: "every row, against the other rows",
}
_UNLABELLED_BY_NAME = {
    "masked-lm": "tokens that are not padding",
    "token-classification": "tokens, special ones excluded",
}


def unlabelled(task: Task) -> str:
    """What counts on data without labels."""
    for kind, words in _UNLABELLED.items():
        if type(task) is kind:
            return words
    return _UNLABELLED_BY_NAME.get(task.name, "every row")


def table() -> str:
    """The whole page."""
    rows = []
    for task in TASKS.values():
        labels = ", ".join(f"`{name}`" for name in task.labels) or "-"
        if task.labels:
            ignored = (
                f"NaN or {task.ignore_index}"
                if isinstance(task, SequenceClassification)
                else task.ignore_index
            )
            labels += f" (ignored: {ignored})"
        logits = ", ".join(f"`{name}`" for name in task.logits)
        if task.class_axis != -1:
            logits += f" (classes on axis {task.class_axis})"
        cells = (f"`{task.name}`", f"`{task.auto_class}`", logits, labels, task.position, unlabelled(task))
        rows.append("| " + " | ".join(cells) + " |")
    return _INTRO + "\n".join(rows) + "\n" + _END


if __name__ == "__main__":
    sys.stdout.write(table())
