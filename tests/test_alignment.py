"""Which teacher class is which student class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig

from hf_kd.alignment import (
    PLACE_TASKS,
    VOCABULARY_TASKS,
    AlignmentError,
    ClassMap,
    align_labels,
    align_vocabulary,
    label_names,
)
from hf_kd.losses.divergences import forward_kl, log_probs
from hf_kd.tasks import TASKS

from .test_checks import tokenizer

WORDS = ["<u>", *"abcdefghi"]


def config(names: list[str] | None, count: int | None = None) -> BertConfig:
    """A config with these label names, or with the default ones."""
    if names is None:
        return BertConfig(num_labels=count or 3)
    return BertConfig(id2label=dict(enumerate(names)))


def test_names_without_label2id() -> None:
    """Trap 32: `BertConfig(id2label=...)` leaves `label2id` empty, so names are read from `id2label`."""
    made = config(["x", "y", "z"])
    assert made.label2id is None
    assert label_names(made) == ["x", "y", "z"]
    assert label_names(config(None)) is None
    assert align_labels(made, config(["z", "x", "y"])).order == (1, 2, 0)


def test_names_with_keys_from_json() -> None:
    """Trap 32: keys may be text, as in a config file, and there `"10"` sorts before `"2"`."""
    names = [f"name{i}" for i in range(12)]
    made = config(names)
    made.id2label = {str(i): name for i, name in enumerate(names)}
    assert label_names(made) == names
    assert align_labels(made, config(names)).order is None


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(5)))
def test_every_order_comes_back(order: list[int]) -> None:
    """Trap 32: whatever the teacher's order, class c meets the class of its own name."""
    names = ["B-PER", "I-PER", "B-LOC", "I-LOC", "O"]
    theirs = [names[i].lower() for i in order]
    classes = align_labels(config(names), config(theirs))
    logits = torch.tensor([[float(names.index(name.upper())) for name in theirs]])
    assert classes.teacher(logits).tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]]
    assert bool(classes.notes) == (order != list(range(5)))


@pytest.mark.parametrize(
    "ours,theirs,message",
    [
        (["a", "b"], None, "only the student has label names"),
        (None, ["a", "b"], "only the teacher has label names"),
        (["a", "b"], ["a", "c"], r"\['a', 'b'\], the teacher's \['a', 'c'\]"),
        (["a", "a"], ["a", "A"], None),
        (["a", "a", "b"], ["a", "b", "a"], "same class has the same name"),
    ],
)
def test_order_that_cannot_be_known(
    ours: list[str] | None, theirs: list[str] | None, message: str | None
) -> None:
    """Trap 32: refused where a guess would be needed; lists that agree as they are need none."""
    models = config(ours, 2), config(theirs, 2)
    if message is None:
        assert align_labels(*models) == ClassMap()
        return
    with pytest.raises(AlignmentError, match=message):
        align_labels(*models)


def test_default_names_on_both_sides() -> None:
    assert align_labels(config(None), config(None)) == ClassMap()


def test_padding_gives_fake_ids_mass() -> None:
    """Trap 30, counter-example: a student widened by logits of 0 wastes its mass on ids that don't exist."""
    same = tokenizer(WORDS)
    g = torch.Generator().manual_seed(0)
    teacher = torch.cat([2 * torch.randn(4, 10, generator=g), torch.full((4, 6), -20.0)], -1)
    student = teacher[:, :10].clone()
    classes = align_vocabulary(10, 16, same, same)
    assert classes.shared == 10

    def kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return forward_kl(*log_probs(student, teacher, temperature=1.0)).mean()

    assert kl(classes.student(student), classes.teacher(teacher)) < 1e-6
    padded = torch.cat([student, torch.zeros(4, 6)], -1)
    assert padded.softmax(-1)[:, 10:].sum(-1).mean() > 0.1
    assert kl(padded, teacher) > 0.1


def test_sizes_are_not_vocabularies() -> None:
    """Trap 30, counter-example: equal sizes with other tokens pass a comparison of sizes."""
    ours, theirs = tokenizer(WORDS), tokenizer(["<u>", *"abcdefgih"])
    assert len(ours) == len(theirs)
    with pytest.raises(AlignmentError, match="token id 8 is 'h' for the student and 'i' for the teacher"):
        align_vocabulary(16, 16, ours, theirs)


def test_other_tokenizer_is_told_what_would_work() -> None:
    """Trap 31: the error shows the first differing token, also one that only one side has, and a way out."""
    with pytest.raises(AlignmentError, match="token id 9 is 'i' for the student and None.*alpha=0"):
        align_vocabulary(10, 9, tokenizer(WORDS), tokenizer(WORDS[:-1]))


def test_tokenizer_larger_than_a_model() -> None:
    """Trap 30: the shared range must hold every real token."""
    same = tokenizer(WORDS)
    with pytest.raises(AlignmentError, match="10 tokens but one model predicts only 8"):
        align_vocabulary(8, 16, same, same)


class Processor:
    """What speech and image-text models come with: a tokenizer beside a feature extractor."""

    def __init__(self, tokens: Any) -> None:
        self.tokenizer = tokens


def test_tokenizer_inside_a_processor() -> None:
    """Trap 31: the tokenizers of two processors are compared; a feature extractor has none."""
    ours, theirs = Processor(tokenizer(WORDS)), Processor(tokenizer(["<u>", *"abxdefghi"]))
    with pytest.raises(AlignmentError, match="token id 3"):
        align_vocabulary(10, 10, ours, theirs)
    assert align_vocabulary(10, 16, ours, Processor(tokenizer(WORDS))).shared == 10
    with pytest.raises(AlignmentError, match="without both tokenizers"):
        align_vocabulary(10, 16, object(), ours)


def test_every_head_over_a_vocabulary_is_one() -> None:
    """Trap 31: heads that predict tokens, speech and images included, are matched by their tokenizers."""
    predicts_tokens = {name for name, task in TASKS.items() if "-lm" in name or "token" in task.position}
    predicts_tokens |= {"ctc", "speech-seq2seq"}
    predicts_tokens.remove("token-classification")
    assert set(VOCABULARY_TASKS) == predicts_tokens
    assert {name for name in TASKS if name.startswith("embedding")} <= set(PLACE_TASKS)
    assert not set(VOCABULARY_TASKS) & set(PLACE_TASKS)
