"""Who teaches: what a model in memory is given, answers, and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_kd import DistillationTrainer, Teacher, TeacherSignal
from hf_kd.teachers import ModelTeacher
from hf_kd.teachers.models import fingerprint, forward_parameters
from hf_kd.teachers.signal import named_logits

from .heads import HEADS, VOCAB, Collator, bert, models, rows_of
from .test_trainer import arguments, classifiers, text_rows


def batch_of(count: int = 4) -> dict[str, Tensor]:
    """Some rows as a batch, without labels."""
    rows = text_rows(count).remove_columns("labels").with_format("torch")
    return dict(rows[:])


class Normed(nn.Module):
    """A head over a batch norm, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head, self.dropout = nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(x)))


def test_teacher_does_not_drift() -> None:
    """Trap 21, counter-example: in train mode its dropout is on and each batch moves its batch norm."""
    torch.manual_seed(0)
    model, x = Normed(), 3 + torch.randn(8, 6)
    teacher = ModelTeacher(model, ("logits",))
    before = model.norm.running_mean.clone()
    first = teacher({"x": x}).logits["logits"]
    model.train()  # as a parent module's `.train()` would
    assert torch.equal(teacher({"x": x}).logits["logits"], first)
    assert torch.equal(model.norm.running_mean, before)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(x), first)
    assert not torch.equal(model.norm.running_mean, before)


def test_teacher_has_no_gradient() -> None:
    """Trap 11: its answer is outside autograd and its weights are frozen."""
    _, model = classifiers()
    logits = ModelTeacher(model, ("logits",))(batch_of()).logits["logits"]
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in model.parameters())


class Placed(nn.Linear):
    """A model that must stay where it is, and as precise as it is."""

    dtype = torch.bfloat16

    def __init__(self, **attributes: Any) -> None:
        super().__init__(4, 3)
        self.seen: list[torch.dtype] = []
        self.moves = 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def to(self, *args: Any, **kwargs: Any) -> Placed:
        self.moves += 1
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return super().forward(x.float())


@pytest.mark.parametrize(
    "attributes,moves,seen",
    [
        ({}, 1, torch.bfloat16),
        ({"is_quantized": True}, 0, torch.float32),
        ({"hf_device_map": {"": 0}}, 0, torch.bfloat16),
    ],
)
def test_placement(attributes: dict[str, Any], moves: int, seen: torch.dtype) -> None:
    """Trap 27: a quantised teacher or one with a device map is never moved; inputs take its dtype."""
    model = Placed(**attributes)
    teacher = ModelTeacher(model, ("logits",), device=torch.device("cpu"))
    teacher({"x": torch.zeros(2, 4)})
    assert model.moves == moves
    assert model.seen == [seen]


def test_each_model_keeps_its_precision(tmp_path: Path) -> None:
    """Trap 27: the teacher's dtype is not the student's; the loss compares them in fp32."""
    head = HEADS["image"]
    student, _ = models(head, dtype=torch.float32)
    _, teacher = models(head, dtype=torch.bfloat16)
    trainer = DistillationTrainer(
        student, arguments(tmp_path, remove_unused_columns=False), teacher=teacher,
        train_dataset=rows_of(head, 4), data_collator=Collator(head, dtype=torch.float32),
    )  # fmt: skip
    trainer.train()
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert trainer.teacher({"pixel_values": torch.zeros(1, 1, 8, 8)}).logits["logits"].dtype == torch.bfloat16


def test_arguments_swallowed_in_silence() -> None:
    """Trap 20, counter-example: DistilBERT takes any argument, so a call tells nothing about its columns."""
    student = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCAB, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=4)
    ).eval()
    _, teacher = classifiers()
    batch = batch_of()
    assert "token_type_ids" not in forward_parameters(student)
    assert "token_type_ids" in ModelTeacher(teacher, ("logits",)).columns
    torch.testing.assert_close(
        student(**batch).logits, student(**{**batch, "token_type_ids": 0 * batch["token_type_ids"]}).logits
    )
    alone = teacher.eval()(**batch).logits
    starved = teacher(**{k: v for k, v in batch.items() if k in forward_parameters(student)}).logits
    torch.testing.assert_close(ModelTeacher(teacher, ("logits",))(batch).logits["logits"], alone)
    assert not torch.allclose(alone, starved)


def test_other_processor_for_the_same_images() -> None:
    """Trap 42: `teacher_pixel_values` from the teacher's own processor are what the teacher sees."""
    _, model = models(HEADS["image"], dtype=torch.float32)
    teacher = ModelTeacher(model, ("logits",))
    images = torch.rand(2, 1, 8, 8)
    ours, theirs = (images - 0.5) / 0.5, (images - 0.1) / 0.3
    expected = model(pixel_values=theirs).logits
    both = teacher({"pixel_values": ours, "teacher_pixel_values": theirs}).logits["logits"]
    torch.testing.assert_close(both, expected)
    assert not torch.allclose(teacher({"pixel_values": ours}).logits["logits"], expected)


def test_identity() -> None:
    """A fingerprint follows the weights, and not where or how they are kept."""
    student, teacher = classifiers()
    assert fingerprint(student) != fingerprint(teacher)
    twin = BertForSequenceClassification(bert(16, num_labels=4))
    twin.load_state_dict(student.state_dict())
    assert fingerprint(twin.double()) == fingerprint(student)
    twin.classifier.bias.data[0] += 1e-3
    assert fingerprint(twin) != fingerprint(student)
    twin.name_or_path = "org/name"
    assert ModelTeacher(twin, ("logits",), revision="abc").identity["name"] == "org/name"


def test_protocol() -> None:
    """Anything with an answer, an identity and columns is a teacher; a bare function is not."""
    _, model = classifiers()
    assert isinstance(ModelTeacher(model, ("logits",)), Teacher)
    assert not isinstance(lambda batch: batch, Teacher)
    with pytest.raises(ValueError, match="at least one"):
        TeacherSignal({})


def test_outputs_are_read_by_name() -> None:
    """Trap 23, counter-example: unpacking a model's output as a tuple gives the names of its fields."""
    logits = torch.zeros(2, 3)
    output = SequenceClassifierOutput(loss=torch.zeros(()), logits=logits, hidden_states=(torch.ones(2, 4),))
    loss, second, *_ = output
    assert (loss, second) == ("loss", "logits")
    for outputs in (output, output.to_tuple(), (logits,), logits, {"logits": logits, "extra": None}):
        assert named_logits(outputs, ("logits",))["logits"] is logits


def test_outputs_that_are_missing() -> None:
    """What a model returned is named beside what the task reads."""
    with pytest.raises(ValueError, match=r"\['scores'\] but the task reads \['logits'\]"):
        named_logits({"scores": torch.zeros(2, 3)}, ("logits",))
    with pytest.raises(ValueError, match="returned 1 tensors"):
        named_logits((torch.zeros(2, 3),), ("start_logits", "end_logits"))
    with pytest.raises(ValueError, match="returned a str"):
        named_logits("logits", ("logits",))
