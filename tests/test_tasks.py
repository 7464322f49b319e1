"""Every head as `[P, C]`: where the classes are, which positions count, and by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, CLIPModel, T5ForConditionalGeneration

from hf_kd import DistillationTrainer, Task
from hf_kd.losses.divergences import forward_kl
from hf_kd.tasks import TASKS, resolve_task

from .heads import HEADS, VOCAB, Collator, bert, clip, models, rows_of, t5
from .test_trainer import arguments

SEEDS = st.integers(0, 10**6)


def kl(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor:
    """KL(teacher || student) over one axis, from its definition."""
    log_q, log_p = student.log_softmax(dim), teacher.log_softmax(dim)
    return (log_p.exp() * (log_p - log_q)).sum(dim)


def counted(name: str, batch: dict[str, Any], **changes: Any) -> list[list[bool]]:
    """Which positions of each row of a batch are distilled."""
    task = resolve_task(name, None, **changes)
    supervision = task.supervise_batch(batch)
    return (supervision.kd_weight > 0).view(supervision.rows, -1).tolist()


@pytest.mark.parametrize("name", HEADS)
def test_head_is_found_from_the_class(name: str) -> None:
    head = HEADS[name]
    assert resolve_task(None, head.build(16)).name == head.task


def test_names_that_are_not_known() -> None:
    with pytest.raises(ValueError, match="task='sequence_classification'.*sequence-classification"):
        resolve_task("sequence_classification", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="supervise='some'"):
        resolve_task("masked-lm", nn.Linear(2, 2), supervise="some")


def test_pair_scores_by_sigmoids_are_refused() -> None:
    class SiglipModel(nn.Module):
        config = type("Config", (), {"model_type": "siglip"})()

    with pytest.raises(ValueError, match="independent sigmoids"):
        resolve_task(None, SiglipModel())


def test_head_of_ones_own(tmp_path: Path) -> None:
    """A head that is not known takes three things, and then trains like any other."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Embedding(VOCAB, 5)

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"scores": self.inner(input_ids), "extra": input_ids}

    task = Task(logits=("scores",), labels=("targets",), mask=lambda batch: batch["input_ids"] != 0)
    student, teacher = Scores(), Scores()
    rows = [{"input_ids": [3, 4, 5, 0], "targets": [1, -100, 2, -100]} for _ in range(8)]
    collate = lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}  # noqa: E731
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, task=task, train_dataset=rows, eval_dataset=rows,
        data_collator=collate,
    )  # fmt: skip
    trainer.train()
    ids = torch.tensor([3, 5])
    with torch.no_grad():
        expected = kl(student.inner(ids), teacher.inner(ids)).mean()
    assert trainer.evaluate()["eval_kl"] == pytest.approx(float(expected), rel=1e-4)


def test_classes_are_on_their_own_axis() -> None:
    """Trap 4, counter-example: classes on axis 1 read row by row, or a softmax over the width."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=g) for _ in range(2))
    batch = {"pixel_values": torch.zeros(2, 1, 4, 5), "labels": torch.zeros(2, 4, 5, dtype=torch.long)}
    expected = torch.stack(
        [kl(student[b, :, i, j], teacher[b, :, i, j]) for b in range(2) for i in range(4) for j in range(5)]
    )
    task = TASKS["semantic-segmentation"]
    z, t = (task.flat({"logits": x}, batch) for x in (student, teacher))
    torch.testing.assert_close(kl(z, t), expected)
    channels_first = Task(class_axis=1)
    torch.testing.assert_close(channels_first.flat({"logits": student}, batch), z)
    unmoved = kl(student.reshape(-1, 3), teacher.reshape(-1, 3))
    assert not torch.allclose(unmoved, expected, rtol=0.1)
    assert not torch.allclose(kl(student, teacher).mean(), expected.mean(), rtol=0.02)


def test_tokens_have_classes_on_the_last_axis() -> None:
    """Trap 4, counter-example: a softmax over the tokens of `[B, L, C]` is blind to what tells rows apart."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 5, generator=g)
    other = logits + 3 * torch.randn(2, 1, 5, generator=g)  # the same for each token
    z, t = (TASKS["token-classification"].flat({"logits": x}, {}) for x in (logits, other))
    assert z.shape == (12, 5)
    assert torch.equal(z[7], logits[1, 1])
    assert kl(z, t).mean() > 0.3
    assert kl(logits, other, dim=1).abs().max() < 1e-5


def test_one_number_is_regression() -> None:
    """Trap 10, counter-example: the softmax of one logit is 1, so its KL is 0 whatever the models say."""
    student, teacher = models(HEADS["regression"], dtype=torch.float32)
    assert resolve_task(None, student).kind == "regression"
    rows = Collator(HEADS["regression"], dtype=torch.float32)(rows_of(HEADS["regression"], 3))
    rows.pop("labels")
    z, t = (m(**rows).logits for m in (student, teacher))
    assert kl(z, t).sum() == 0
    assert (z - t).square().mean() > 1e-3


def test_labels_that_do_not_exclude_each_other() -> None:
    """Trap 10, counter-example: a softmax over independent labels cannot see that all of them rise."""
    task = resolve_task(None, HEADS["multi-label"].build(16))
    student = torch.tensor([[-2.0, -1.0, -3.0]])
    teacher = student + 4
    z, t = (task.flat({"logits": x}, {}) for x in (student, teacher))
    p, q = teacher.sigmoid()[0], student.sigmoid()[0]
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(kl(z, t), expected)
    assert expected.mean() > 1
    assert kl(student, teacher).abs().item() < 1e-6
    weight = task.supervise_batch({"labels": torch.ones(2, 3)}).kd_weight
    torch.testing.assert_close(weight, torch.full((6,), 1 / 3))


def test_losses_that_look_across_the_batch() -> None:
    """Trap 13: heads that compare rows say so, refuse a batch of one, and depend on the micro-batch."""
    torch.manual_seed(0)
    student, teacher = (CLIPModel(clip(width)).eval() for width in (16, 24))
    task = resolve_task(None, student)
    assert task.batch_coupled
    ids = torch.randint(3, VOCAB - 1, (4, 5))
    batch = {"input_ids": ids, "pixel_values": torch.randn(4, 1, 8, 8)}
    for model in (student, teacher):
        model.logit_scale.data.fill_(3.0)

    def value(part: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            z, t = (task.flat(m(**part), part) for m in (student, teacher))
        return kl(z, t).mean()

    halves = [value({k: v[i : i + 2] for k, v in batch.items()}) for i in (0, 2)]
    assert not torch.isclose(value(batch), torch.stack(halves).mean(), rtol=1e-2)
    with pytest.raises(ValueError, match="1 row.*per_device_train_batch_size"):
        value({k: v[:1] for k, v in batch.items()})
    coupled = TASKS["embedding-similarity"]
    assert coupled.batch_coupled
    hidden = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="2 .*rows.*per_device_train_batch_size"):
        coupled.flat({"last_hidden_state": hidden}, {"input_ids": torch.ones(2, 3)})
    assert {name for name, task in TASKS.items() if task.batch_coupled} == {
        "image-text",
        "embedding-similarity",
    }


def test_boxes_of_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 17, counter-example: the model's own loss divides by what other ranks have, and waits for them."""
    from transformers.loss import loss_for_object_detection

    head = HEADS["detection"]
    student, _ = models(head)
    task = resolve_task(None, student)
    batch = Collator(head)(rows_of(head, 3))
    outputs = student(pixel_values=batch["pixel_values"])
    z, supervision = task.flat(outputs, batch), task.supervise_batch(batch)
    PartialState()
    monkeypatch.setattr(loss_for_object_detection, "reduce", lambda boxes: 2 * boxes)  # a busier rank
    ours = task.task_terms(outputs, z, supervision, None, 0.0).losses
    naive = [student(batch["pixel_values"][i : i + 1], labels=[batch["labels"][i]]).loss for i in range(3)]
    assert not torch.isclose(ours, torch.stack(naive), rtol=1e-2).any()
    monkeypatch.undo()
    alone = [student(batch["pixel_values"][i : i + 1], labels=[batch["labels"][i]]).loss for i in range(3)]
    torch.testing.assert_close(ours, torch.stack(alone))


@settings(max_examples=25, deadline=None)
@given(labels=st.lists(st.lists(st.sampled_from([-100, 1]), min_size=5, max_size=5), min_size=1, max_size=3))
def test_position_counts_for_the_next_label(labels: list[list[int]]) -> None:
    """Trap 33: position i counts if and only if `labels[i + 1]` is a label."""
    batch = {"input_ids": torch.ones(len(labels), 5).long(), "labels": torch.tensor(labels)}
    assert counted("causal-lm", batch) == [
        [i + 1 < 5 and row[i + 1] != -100 for i in range(5)] for row in labels
    ]


def test_shift_of_logits_alone() -> None:
    """Trap 33, counter-example: an unshifted mask trains on what follows, not on the first answer token."""
    labels = torch.tensor([[-100, -100, 7, 8, -100, -100]])  # prompt of two, answer of two
    batch = {"input_ids": torch.arange(6)[None], "labels": labels}
    assert counted("causal-lm", batch) == [[False, True, True, False, False, False]]
    unshifted = (labels != -100).tolist()
    assert unshifted == [[False, False, True, True, False, False]]
    task = TASKS["causal-lm"]
    supervision = task.supervise_batch(batch)
    assert supervision.labels.tolist() == [-100, 7, 8, -100, -100, -100]
    # One side shifted: a student that equals its teacher would be told to change.
    logits = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0))
    keep = supervision.kd_weight > 0
    assert kl(*[task.flat({"logits": logits}, batch)[keep]] * 2).abs().max() == 0
    assert kl(logits[:, 1:], logits[:, :-1]).mean() > 0.1


def test_packed_sequences_do_not_predict_each_other() -> None:
    """Trap 33: without labels, the last token of a packed sequence does not predict the next one's first."""
    batch = {"input_ids": torch.ones(1, 6).long(), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    assert counted("causal-lm", batch) == [[True, True, False, True, True, False]]


@pytest.mark.parametrize("labelled", [True, False])
def test_padding_predicts_nothing(labelled: bool) -> None:
    """Trap 33: the last of the left padding does not predict the row's first token."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": mask * 4, "attention_mask": mask}
    if labelled:
        batch["labels"] = torch.where(mask == 1, 4, -100)
    assert counted("causal-lm", batch) == [
        [False, False, True, True, False],
        [True, True, False, False, False],
    ]


def test_decoder_start_that_equals_padding() -> None:
    """Trap 34, counter-example: `decoder_input_ids != pad` drops position 0 of T5, whose start is its pad."""
    student = T5ForConditionalGeneration(t5(16))
    task = resolve_task(None, student)
    labels = torch.tensor([[5, 6, 1, -100], [7, 1, -100, -100]])
    batch = {"input_ids": torch.tensor([[4, 5], [6, 7]]), "labels": labels}
    assert counted("seq2seq-lm", batch) == [[True, True, True, False], [True, True, False, False]]
    inputs = task.model_inputs(batch, student)["decoder_input_ids"]
    assert inputs.tolist() == [[0, 5, 6, 1], [0, 7, 1, 0]]
    naive = (inputs != 0).tolist()
    assert naive == [[False, True, True, True], [False, True, True, False]]


def test_both_models_read_the_same_decoder_inputs(tmp_path: Path) -> None:
    """Trap 34, counter-example: each model shifting the labels itself starts from its own token."""
    head = HEADS["seq2seq-lm"]
    student, teacher = models(head)
    teacher.config.decoder_start_token_id = 2
    rows = rows_of(head, 3)
    trainer = DistillationTrainer(
        student, arguments(tmp_path, remove_unused_columns=False), teacher=teacher, train_dataset=rows,
        data_collator=Collator(head),
    )  # fmt: skip
    batch = Collator(head)(rows)
    seen: list[Tensor] = []
    for model in (student, teacher):
        model.decoder.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
        )
    trainer.compute_loss(student, batch)
    # Each forward of the student has one of the teacher; the first step has a pair more (it looks at a row).
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert seen[-1].shape == batch["labels"].shape
    seen.clear()
    for model in (student, teacher):
        model(**batch)
    assert not torch.equal(*seen)


def test_sub_words_and_special_tokens() -> None:
    """Trap 35, counter-example: the attention mask alone supervises `[CLS]` and the tail of each word."""
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    batch = {
        "input_ids": torch.tensor([[1, 5, 6, 2, 0]]),
        "attention_mask": mask,
        "labels": torch.tensor([[-100, 3, -100, -100, -100]]),
    }
    expected = [[False, True, False, False, False]]
    assert counted("token-classification", batch) == expected
    assert (mask == 1).tolist() != expected
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    special = torch.tensor([[1, 0, 0, 1, 1]])
    assert counted("token-classification", {**unlabelled, "special_tokens_mask": special}) == [
        [False, True, True, False, False]
    ]


def test_masked_tokens_only_unless_all_are_asked_for() -> None:
    """Trap 35: masked LM distils masked positions; `supervise="all"` adds the others, but no padding."""
    batch = {
        "input_ids": torch.tensor([[4, 3, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 5, -100, -100]]),
    }
    assert counted("masked-lm", batch) == [[False, True, False, False]]
    assert counted("masked-lm", batch, supervise="all") == [[True, True, True, False]]
    everywhere = resolve_task("masked-lm", None, supervise="all").supervise_batch(batch)
    assert everywhere.task_weight.tolist() == [0, 1, 0, 0]  # the task loss is still on the masked ones


def spans(length: int) -> dict[str, Tensor]:
    """`[CLS]`, two tokens of question, three of context, padding to a length."""
    pad = length - 6
    return {
        "input_ids": torch.tensor([[1, 5, 6, 7, 8, 9] + [0] * pad]),
        "attention_mask": torch.tensor([[1] * 6 + [0] * pad]),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1] + [0] * pad]),
    }


def test_spans_lie_in_the_context() -> None:
    """Trap 36, counter-example: unmasked, padding gets much of the mass, and the loss depends on it."""
    torch.manual_seed(0)
    student, teacher = (BertForQuestionAnswering(bert(width)).eval() for width in (16, 24))
    task = resolve_task(None, student)
    values, naive, on_padding = [], [], []
    for length in (10, 14):
        batch = spans(length)
        with torch.no_grad():
            z, t = (m(**batch) for m in (student, teacher))
        flat = task.flat(t, batch)
        padding = [False] * (length - 6)
        assert flat.isfinite().tolist() == [[True, False, False, True, True, True, *padding]] * 2
        allowed = [0, 3, 4, 5]
        assert torch.equal(flat[:, allowed], torch.cat([t.start_logits, t.end_logits])[:, allowed])
        values.append(kl(task.flat(z, batch)[:, allowed], flat[:, allowed]).mean())
        naive.append(kl(z.start_logits, t.start_logits).mean())
        on_padding.append(float(t.start_logits.softmax(-1)[0, 6:].sum()))
    torch.testing.assert_close(*values)
    assert not torch.isclose(*naive, rtol=1e-2)
    assert min(on_padding) > 0.3


def test_span_mask_and_answers_outside_of_it() -> None:
    """Trap 36: a `span_mask` column decides where there is one; a label on an excluded token is no label."""
    task = TASKS["question-answering"]
    batch = {**spans(8), "span_mask": torch.tensor([[1, 0, 0, 0, 1, 1, 1, 1]])}
    batch |= {"start_positions": torch.tensor([4]), "end_positions": torch.tensor([3])}
    assert task.allowed(batch).tolist() == [[True, False, False, False, True, True, False, False]]
    supervision = task.supervise_batch(batch)
    assert supervision.labels.tolist() == [4, -100]
    assert supervision.task_weight.tolist() == [0.5, 0]
    assert supervision.kd_weight.tolist() == [0.5, 0.5]


def test_segments_that_are_never_the_second() -> None:
    """Trap 36: where no token is marked as context, one token would be left, whose KL is always 0."""
    batch = spans(8) | {"token_type_ids": torch.zeros(1, 8).long()}
    assert TASKS["question-answering"].allowed(batch).sum() == 6


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(["single-label", "multi-label", "token", "masked-lm", "causal-lm", "seq2seq-lm",
                             "question-answering", "ctc", "segmentation"]), seed=SEEDS)  # fmt: skip
def test_rows_are_supervised_one_by_one(name: str, seed: int) -> None:
    """Permuting or repeating rows permutes or repeats their weights; nothing leaks from row to row."""
    head = HEADS[name]
    task = TASK_OF[name]
    rows = rows_of(head, 3, seed=seed)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed)).tolist()

    def weights(rows: list[Any]) -> list[tuple[list[float], list[float]]]:
        made = task.supervise_batch(Collator(head)(rows))
        parts = (made.task_weight.view(made.rows, -1), made.kd_weight.view(made.rows, -1))
        return list(zip(*(p.tolist() for p in parts), strict=True))

    plain = weights(rows)
    assert weights([rows[i] for i in order]) == [plain[i] for i in order]
    assert weights(rows + rows) == plain + plain


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(["single-label", "token", "masked-lm", "causal-lm", "seq2seq-lm", "ctc"]),
       seed=SEEDS, extra=st.integers(1, 5), left=st.booleans())  # fmt: skip
def test_padding_adds_nothing(name: str, seed: int, extra: int, left: bool) -> None:
    """Supervision, in total and position by position, is that of the unpadded rows."""
    head, task = HEADS[name], TASK_OF[name]
    left = left and name == "causal-lm"
    rows = rows_of(head, 3, seed=seed)
    plain = [task.supervise_batch(Collator(head)([row])) for row in rows]
    padded = task.supervise_batch(Collator(head, extra=extra * (10 if name == "ctc" else 1), left=left)(rows))
    for part in ("kd_weight", "task_weight"):
        kept = [[w for w in row if w] for row in getattr(padded, part).view(3, -1).tolist()]
        assert kept == [[w for w in getattr(one, part).tolist() if w] for one in plain]


TASK_OF = {name: resolve_task(None, HEADS[name].build(16)) for name in HEADS}


def test_kl_here_is_that_of_the_library() -> None:
    """The oracle above and the library's divergence are the same quantity."""
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(kl(z, t), forward_kl(F.log_softmax(z, -1), F.log_softmax(t, -1)))
