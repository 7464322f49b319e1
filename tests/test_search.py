"""Depth and width searched for a target: candidates are counted right, and the best of them is taken."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf

from hf_kd import students
from hf_kd.measure import Latency, count_parameters
from hf_kd.students import init_student, space
from tests.test_students import bart, bert, llama, swin
from tests.test_students_width import make


def found(caplog, teacher, **target):
    """The student, and what the search said."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="hf_kd.students"):
        student = init_student(teacher, **target)
    return student, [r.getMessage() for r in caplog.records if r.getMessage().startswith("search")]


def bytes_of(model):
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2", "clip"])
def test_the_student_has_what_the_search_counted(family, caplog):
    """What is counted on the meta device is what the student has, below the target and not far below."""
    teacher = make(family, 2)
    full = count_parameters(teacher)
    student, said = found(caplog, teacher, max_parameters=0.6)
    assert 0.25 * full < count_parameters(student) <= 0.6 * full
    chosen = said[-1]
    assert f"{count_parameters(student):,} parameters, {bytes_of(student):,} bytes" in chosen
    assert "least reduced" in chosen and f"max_parameters={int(0.6 * full + 0.5):,}" in chosen


def test_the_best_of_all_shapes_is_taken(caplog):
    """Against every shape built for real: none that fits keeps more of its most reduced dimension."""
    teacher = bert(4)
    limit = 4500
    student, _ = found(caplog, teacher, max_parameters=limit)
    assert count_parameters(student) <= limit

    def least(n, hidden, ffn):
        return min(n / 4, hidden / 16, ffn / 32)

    shapes = {}
    for n in range(1, 5):
        for hidden, ffn in ((16, 32), (8, 24), (8, 16), (8, 8), (16, 24), (16, 16), (16, 8)):
            config = tf.BertConfig.from_dict(
                {
                    **teacher.config.to_dict(), "num_hidden_layers": n, "hidden_size": hidden,
                    "intermediate_size": ffn, "num_attention_heads": hidden // 8,
                }
            )  # fmt: skip
            size = count_parameters(tf.BertForSequenceClassification(config))
            if size <= limit:
                shapes[n, hidden, ffn] = least(n, hidden, ffn)
    own = student.config
    assert least(own.num_hidden_layers, own.hidden_size, own.intermediate_size) == max(shapes.values())


def test_bytes_follow_the_dtype(caplog):
    teacher = llama().to(torch.bfloat16)
    student, said = found(caplog, teacher, max_bytes=9_000)
    assert bytes_of(student) <= 9_000 < bytes_of(teacher)
    assert f"{bytes_of(student):,} bytes" in said[-1] and student.dtype == torch.bfloat16


def test_what_is_given_is_not_searched(caplog):
    """A depth, a size or layers that are given stay; the rest is searched."""
    teacher = bart(4, 4)
    student, _ = found(caplog, teacher, max_parameters=0.6, num_layers={"decoder_layers": 1})
    assert (student.config.encoder_layers, student.config.decoder_layers) == (4, 1)
    student, _ = found(caplog, bert(4), max_parameters=0.5, hidden_size=8, intermediate_size=8)
    assert (student.config.hidden_size, student.config.intermediate_size) == (8, 8)
    student, _ = found(caplog, bert(4), max_parameters=0.7, layers=[0, 3])
    assert student.config.hf_kd_layers == {"num_hidden_layers": [0, 3]}
    student, _ = found(caplog, bert(4), max_parameters=0.5, vocab=list(range(20)))
    assert student.config.vocab_size == 20 and count_parameters(student) <= 0.5 * count_parameters(bert(4))


def test_what_can_not_be_cut_stays_and_is_said(caplog):
    """A convolution that works on groups of channels, and a pyramid's widths: the rest is searched."""
    student, said = found(caplog, make("wav2vec2", 2), max_parameters=0.8)
    assert student.config.hidden_size == 16 and student.config.intermediate_size < 48
    assert any("hidden_size" in line and "stay" in line for line in said)
    student, _ = found(caplog, swin(), max_parameters=0.6)
    assert count_parameters(student) <= 0.6 * count_parameters(swin())


def test_both_sides_shrink_alike(caplog):
    student, _ = found(caplog, bart(2, 4), max_parameters=0.45, hidden_size=16)
    assert student.config.decoder_layers == 2 * student.config.encoder_layers


def test_nothing_fits(caplog):
    """The error names the smallest that can be made."""
    with pytest.raises(ValueError, match=r"max_parameters=100: the smallest .* num_hidden_layers=1, hidden"):
        init_student(bert(4), max_parameters=100)
    with pytest.raises(ValueError, match="max_parameters=0 is not positive"):
        init_student(bert(4), max_parameters=0)
    with pytest.raises(ValueError, match="max_latency_ms=-1"):
        init_student(bert(4), max_latency_ms=-1)
    with pytest.raises(ValueError, match="max_bytes='1'"):
        init_student(bert(4), max_bytes="1")


def fake_clock(monkeypatch, cost):
    """Latency by a formula, so that no test depends on the clock; the models are real and must run."""
    timed = []

    def latency(models, batch, *, repeats, warmup):
        ((name, model),) = models.items()
        assert repeats > 1 and warmup > 0
        with torch.no_grad():
            model(**{k: v for k, v in batch.items() if k != "labels"})
        timed.append(model)
        return {name: Latency(cost(model), 0, 0, repeats, 1, {}, 0, "cpu", "float32", 1)}

    monkeypatch.setattr(space, "latency", latency)
    return timed


def test_latency_is_measured_on_real_shapes(caplog, monkeypatch):
    """Each layer takes a millisecond at full width, and the rest one: the deepest that fits, per width."""
    timed = fake_clock(monkeypatch, lambda m: 1 + m.config.num_hidden_layers * m.config.hidden_size / 16)
    student, said = found(caplog, bert(8), max_latency_ms=4.5)
    # 16 channels: 3 layers; 8 channels: 7 layers.
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (7, 8)
    assert len(timed) < 16 and any("ms" in line for line in said)
    assert f"{torch.get_num_threads()} threads" in said[-2] and "after" in said[-2]
    both, _ = found(caplog, bert(8), max_latency_ms=4.5, max_parameters=0.2)
    assert count_parameters(both) <= 0.2 * count_parameters(bert(8))
    assert 1 + both.config.num_hidden_layers * both.config.hidden_size / 16 <= 4.5
    with pytest.raises(ValueError, match=r"max_latency_ms=1.2: the smallest .* 1.5 ms"):
        init_student(bert(8), max_latency_ms=1.2)


@pytest.mark.parametrize("family", ["t5", "clip", "vit", "wav2vec2", "whisper", "roberta", "llama"])
def test_an_example_is_made_up_for_each_kind_of_input(family):
    """What a latency is measured on without data: the model runs on it."""
    model = make(family, 1)
    example = students.inputs.example_inputs(model, samples=400)
    with torch.no_grad():
        assert model(**example)[0].isfinite().all()
    row = students.inputs.one_row(model, [{"input_ids": torch.ones(3, 5, dtype=torch.long), "n": 1}])
    assert row["input_ids"].shape == (1, 5)
