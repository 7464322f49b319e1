"""Bad input: one clear message, before step 0, that names the option, both values and the fix."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_kd import DistillationTrainer, checks

from .heads import HEADS, Collator, bert, llama, rows_of
from .heads import models as models_of
from .test_trainer import arguments, classifiers, text_rows


def trainer(folder: Path, **changes: Any) -> DistillationTrainer:
    """A trainer that would run, but for the changes."""
    student, teacher = classifiers()
    options = changes.pop("options", {})
    parts: dict[str, Any] = {"model": student, "teacher": teacher, "train_dataset": text_rows(), **changes}
    return DistillationTrainer(args=arguments(folder, **options), **parts)


def problems(made: DistillationTrainer) -> str:
    """What training would be refused for."""
    with pytest.raises(ValueError) as caught:
        made.train()
    return str(caught.value)


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=words[0], pad_token=words[0])


def test_everything_is_fine(tmp_path: Path) -> None:
    """No problem, no false alarm."""
    assert checks.inspect(trainer(tmp_path)).problems == []


def test_numbers_of_labels(tmp_path: Path) -> None:
    """Heads of different size: both numbers and the fix."""
    teacher = BertForSequenceClassification(bert(16, num_labels=6))
    text = problems(trainer(tmp_path, teacher=teacher))
    assert "4 labels" in text
    assert "teacher 6" in text
    assert "num_labels=teacher.config.num_labels" in text


def test_label_names_are_permuted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trap 32: the same names in another order are permuted by name, and logged; the naive order is wrong."""
    student, _ = classifiers()
    student.classifier.weight.data *= 30
    teacher = BertForSequenceClassification(bert(16, num_labels=4))
    teacher.load_state_dict(student.state_dict())
    order = torch.tensor([2, 0, 3, 1])
    teacher.classifier.weight.data = teacher.classifier.weight.data[order]
    teacher.classifier.bias.data = teacher.classifier.bias.data[order]
    names = ["anger", "joy", "fear", "calm"]
    student.config.id2label = dict(enumerate(names))
    teacher.config.id2label = {i: names[int(j)].upper() for i, j in enumerate(order)}
    made = trainer(tmp_path, model=student, teacher=teacher, eval_dataset=text_rows())
    assert made.evaluate()["eval_kl"] < 1e-6
    assert "permuted" in caplog.text
    made.objective = type(made.objective)(task=made.task, divergence=made.objective.divergence)
    assert made.evaluate()["eval_kl"] > 1e-4  # what ignoring the names would compare


@pytest.mark.parametrize("named", ["student", "teacher"])
def test_label_names_on_one_side(tmp_path: Path, named: str) -> None:
    """Trap 32: names on one side only are refused, since the order can't be known."""
    student, teacher = classifiers()
    {"student": student, "teacher": teacher}[named].config.id2label = dict(enumerate("abcd"))
    text = problems(trainer(tmp_path, model=student, teacher=teacher))
    assert f"only the {named} has label names" in text


def test_other_label_names(tmp_path: Path) -> None:
    """Trap 32: other names are refused, both lists shown."""
    student, teacher = classifiers()
    student.config.id2label, teacher.config.id2label = dict(enumerate("abcd")), dict(enumerate("abce"))
    text = problems(trainer(tmp_path, model=student, teacher=teacher))
    assert "['a', 'b', 'c', 'd']" in text
    assert "['a', 'b', 'c', 'e']" in text


def lm_rows() -> Dataset:
    """Rows for a language model."""
    ids = torch.randint(1, 10, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def lms(student_size: int, teacher_size: int) -> dict[str, Any]:
    """Two Llamas with vocabularies of these sizes."""
    torch.manual_seed(0)
    configs = [llama(16), llama(16)]
    for config, size in zip(configs, (student_size, teacher_size), strict=True):
        config.vocab_size = size
    return {
        "model": LlamaForCausalLM(configs[0]),
        "teacher": LlamaForCausalLM(configs[1]),
        "train_dataset": lm_rows(),
    }


def test_another_tokenizer(tmp_path: Path) -> None:
    """Trap 31: another tokenizer is refused for token-level losses, with the first token that differs."""
    ours, theirs = tokenizer(["<u>", *"abcdefghi"]), tokenizer(["<u>", *"abxdefghi"])
    text = problems(trainer(tmp_path, **lms(10, 10), processing_class=ours, teacher_processing_class=theirs))
    assert "token id 3 is 'c' for the student and 'x' for the teacher" in text


def test_tokenizer_is_found_beside_the_teacher(tmp_path: Path) -> None:
    """Trap 31: the teacher's tokenizer is looked up where its weights are."""
    parts = lms(10, 10)
    parts["teacher"].save_pretrained(tmp_path / "teacher")
    tokenizer(["<u>", *"abxdefghi"]).save_pretrained(tmp_path / "teacher")
    parts["teacher"] = str(tmp_path / "teacher")
    text = problems(trainer(tmp_path, **parts, processing_class=tokenizer(["<u>", *"abcdefghi"])))
    assert "different tokenizers" in text


def test_another_tokenizer_for_whole_rows(tmp_path: Path) -> None:
    """Trap 31: row heads may use two tokenizers, but only with columns that the teacher's own one made."""
    ours, theirs = tokenizer(["<u>", *"abcdefghi"]), tokenizer(["<u>", *"abxdefghi"])
    both = {"processing_class": ours, "teacher_processing_class": theirs}
    assert "teacher_input_ids" in problems(trainer(tmp_path, **both))
    rows = text_rows()
    rows = rows.add_column("teacher_input_ids", rows["input_ids"][::-1])
    assert checks.inspect(trainer(tmp_path, **both, train_dataset=rows)).problems == []


def test_padded_vocabularies(tmp_path: Path) -> None:
    """Trap 30: the same tokens with more padding are cut, renormalised, the mass logged."""
    same = tokenizer(["<u>", *"abcdefghi"])
    parts = lms(12, 16)
    made = trainer(
        tmp_path, **parts, processing_class=same, teacher_processing_class=same, eval_dataset=lm_rows()
    )
    metrics = made.evaluate()
    ids = torch.tensor(lm_rows()["input_ids"])
    with torch.no_grad():
        p = parts["teacher"](ids).logits[:, :-1, :12].double().softmax(-1)
        q = parts["model"](ids).logits[:, :-1, :12].double().softmax(-1)
        dropped = parts["teacher"](ids).logits[:, :-1].double().softmax(-1)[..., 12:].sum(-1).mean()
    assert metrics["eval_kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert metrics["eval_teacher_mass_dropped"] == pytest.approx(float(dropped), rel=1e-4)
    made.train()


def test_unknown_padding(tmp_path: Path) -> None:
    """Trap 30: sizes that differ with no tokenizer known are refused, both sizes named."""
    text = problems(trainer(tmp_path, **lms(12, 16)))
    assert "predicts 12 tokens, the teacher 16" in text


def test_missing_labels(tmp_path: Path) -> None:
    """A data set without the labels that alpha < 1 needs."""
    text = problems(trainer(tmp_path, train_dataset=text_rows().remove_columns("labels")))
    assert "alpha=0.5" in text
    assert "'labels'" in text
    assert "alpha=1" in text


def test_best_model_without_labels(tmp_path: Path) -> None:
    """Trap 24: without labels the best model can be chosen by the KL, not by a loss that is not there."""
    rows = text_rows().remove_columns("labels")
    options = {
        "alpha": 1.0,
        "load_best_model_at_end": True,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    }
    parts = {"train_dataset": rows, "eval_dataset": rows}
    assert "metric_for_best_model='kl'" in problems(trainer(tmp_path, **parts, options=options))
    best = {**options, "metric_for_best_model": "kl", "greater_is_better": False}
    made = trainer(tmp_path, **parts, options=best)
    made.train()
    assert made.state.best_metric == made.evaluate()["eval_kl"]


def test_missing_input_column(tmp_path: Path) -> None:
    """A data set without the columns that the models read."""
    text = problems(trainer(tmp_path, train_dataset=text_rows().rename_column("input_ids", "ids")))
    assert "input_ids" in text


def test_empty_dataset(tmp_path: Path) -> None:
    """An empty data set."""
    assert "train_dataset has 0 rows" in problems(trainer(tmp_path, train_dataset=text_rows().select([])))


def test_labels_out_of_range(tmp_path: Path) -> None:
    """A label that is no class."""
    rows = text_rows().map(lambda row: {"labels": 7})
    assert "[7], outside the student's classes 0 to 3" in problems(trainer(tmp_path, train_dataset=rows))


def test_all_labels_masked(tmp_path: Path) -> None:
    """Every label is -100."""
    rows = lm_rows().map(lambda row: {"labels": [-100] * 6})
    text = problems(trainer(tmp_path, **{**lms(10, 10), "train_dataset": rows}))
    assert "All labels of the first batch are -100" in text


def test_fp16_on_a_cpu(tmp_path: Path) -> None:
    """Half precision needs a GPU."""
    made = trainer(tmp_path)
    made.args.fp16 = True  # the command line sets it before the device is known
    assert "fp16=True" in problems(made)


@pytest.mark.parametrize(
    "options", [{"alpha": 1.5}, {"alpha": -0.1}, {"temperature": 0.0}, {"temperature": -1.0}]
)
def test_option_ranges(tmp_path: Path, options: dict[str, float]) -> None:
    """Options outside their range name themselves and their value."""
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        arguments(tmp_path, **options)


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_path_that_does_not_exist(tmp_path: Path, role: str) -> None:
    """A path that does not exist, with its neighbour."""
    (tmp_path / "teachers").mkdir()
    with pytest.raises(ValueError, match="does not exist.*teachers"):
        trainer(tmp_path, **{role: str(tmp_path / "teacherz")})


def test_teacher_head_without_weights(tmp_path: Path) -> None:
    """Trap 37: a checkpoint without this head would teach noise."""
    BertModel(bert(16)).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="no weights for.*classifier"):
        trainer(tmp_path, teacher=str(tmp_path / "encoder"), task="sequence-classification")


def test_teacher_at_chance_is_noticed(tmp_path: Path) -> None:
    """Trap 37: a teacher no better than a uniform guess is reported, a good one is not."""
    made = trainer(tmp_path)
    assert any("uniform guess" in warning for warning in checks.inspect(made).warnings)

    class Knows(nn.Module):
        config = made.model.config

        def forward(self, input_ids: torch.Tensor, labels: Any = None) -> torch.Tensor:
            return 5.0 * nn.functional.one_hot(self.answers, 4).float()

    knows = Knows()
    knows.answers = torch.tensor(text_rows()["labels"][:4])
    assert not checks.inspect(trainer(tmp_path, teacher=knows)).warnings


def test_no_teacher(tmp_path: Path) -> None:
    """Alpha without a teacher."""
    with pytest.raises(ValueError, match="alpha=0.5.*teacher=None"):
        trainer(tmp_path, teacher=None)


def test_threshold_without_evaluation(tmp_path: Path) -> None:
    """A threshold that no evaluation compares."""
    text = problems(trainer(tmp_path, options={"kl_threshold": 0.1}))
    assert "kl_threshold=0.1" in text
    assert "eval_strategy='no'" in text


def test_teacher_made_of_the_student(tmp_path: Path) -> None:
    """A teacher that shares trainable weights with the student would freeze them."""
    student, _ = classifiers()
    teacher = BertForSequenceClassification(bert(16, num_labels=4))
    teacher.bert = student.bert
    with pytest.raises(ValueError, match="shares trainable parameters"):
        trainer(tmp_path, model=student, teacher=teacher)


def test_teacher_is_the_student(tmp_path: Path) -> None:
    """One object for both."""
    student, _ = classifiers()
    with pytest.raises(ValueError, match="same object"):
        trainer(tmp_path, model=student, teacher=student)


def test_unknown_head(tmp_path: Path) -> None:
    """A head that is not known: the three things to supply."""

    class Odd(PreTrainedModel):
        config_class = BertConfig

        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.layer = nn.Linear(2, 2)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.layer(input_ids)

    class Derived(BertForSequenceClassification):
        pass

    with pytest.raises(ValueError, match=r"logits=.*labels=.*mask="):
        trainer(tmp_path, model=Odd(bert(16, num_labels=4)))
    assert trainer(tmp_path, model=Derived(bert(16, num_labels=4))).task.name == "sequence-classification"


def test_all_problems_at_once(tmp_path: Path) -> None:
    """Several problems come in one message, numbered."""
    teacher = BertForSequenceClassification(bert(16, num_labels=6))
    text = problems(
        trainer(
            tmp_path,
            teacher=teacher,
            train_dataset=text_rows().map(lambda row: {"labels": 9}),
            options={"kl_threshold": 0.1},
        )
    )
    assert text.startswith("3 problems")
    assert all(part in text for part in ("6", "kl_threshold", "[9]"))


def detectors(folder: Path, **options: Any) -> DistillationTrainer:
    """Two detectors with queries of their own."""
    head = HEADS["detection"]
    student, teacher = models_of(head)
    return trainer(
        folder, model=student, teacher=teacher, train_dataset=rows_of(head, 4),
        data_collator=Collator(head), options={"remove_unused_columns": False, **options},
    )  # fmt: skip


def test_queries_of_their_own(tmp_path: Path) -> None:
    """Detectors that were trained apart don't correspond query by query, and the checks say so."""
    made = detectors(tmp_path)
    assert any("different object queries" in warning for warning in checks.inspect(made).warnings)
    made.teacher.model = made.student
    assert not any("object queries" in warning for warning in checks.inspect(made).warnings)


def test_label_smoothing_of_a_matching_loss(tmp_path: Path) -> None:
    """An option that a head's loss has no use for is refused, not ignored."""
    found = checks.inspect(detectors(tmp_path, label_smoothing_factor=0.1)).problems
    assert [problem.option for problem in found] == ["label_smoothing_factor"]


def test_checks_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second evaluation, or one after training, looks at the first batch no more."""
    made, seen = trainer(tmp_path, eval_dataset=text_rows()), []
    look = checks.inspect
    monkeypatch.setattr(checks, "inspect", lambda t, **k: seen.append(k["training"]) or look(t, **k))
    made.evaluate()
    made.evaluate()
    made.train()
    made.evaluate()
    assert seen == [False, True]


def test_report_is_readable(tmp_path: Path) -> None:
    """Models side by side, terms, positions, and a decoded example with its mask."""
    same = tokenizer(["<u>", *"abcdefghi"])
    made = trainer(tmp_path, **lms(10, 10), processing_class=same, teacher_processing_class=same)
    console = Console(file=io.StringIO(), width=100)
    checks.inspect(made).render(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "teacher",
        "student",
        "LlamaForCausalLM",
        "0.5 x task",
        "4 (T^2) x forward_kl",
        "20 x predicted token",
    ):
        assert part in text
    assert made.model.training == trainer(tmp_path, **lms(10, 10)).model.training


def test_checks_leave_random_numbers_alone(tmp_path: Path) -> None:
    """Looking at the first batch must not change what training draws."""
    made = trainer(tmp_path)
    torch.manual_seed(3)
    checks.inspect(made)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))
