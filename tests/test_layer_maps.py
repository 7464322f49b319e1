"""Which layer teaches which."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import (
    BertModel,
    CLIPModel,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetModel,
    T5ForConditionalGeneration,
)

from hf_kd.layer_maps import LAYER_MAPS, pair_layers

from .heads import bert, clip, llama, t5


def encoder(layers: int) -> nn.Module:
    """A BERT of so many layers."""
    config = bert(8)
    config.num_hidden_layers = layers
    return BertModel(config)


def translator(encoder: int, decoder: int) -> nn.Module:
    """A T5 of so many layers."""
    config = t5(8)
    config.num_layers, config.num_decoder_layers = encoder, decoder
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("name", "expected"), [("even", [0, 4, 7, 11]), ("last", [8, 9, 10, 11]), ("skip", [2, 5, 8, 11])]
)
def test_maps(name: str, expected: list[int]) -> None:
    """Traps 38, 44: the teacher's last layer is always among them, and every map is of equal length."""
    assert LAYER_MAPS[name](12, 4) == expected
    for teacher in range(1, 14):
        for student in range(2, teacher + 1):
            found = LAYER_MAPS[name](teacher, student)
            assert len(found) == student
            assert found[-1] == teacher - 1
            assert found == sorted(set(found))
            assert found[0] >= 0


def layers(student: nn.Module, teacher: nn.Module, wanted: Any) -> dict[str, list[tuple[int, int]]]:
    """The pairs by the student's stack."""
    return {pair.student.path: list(pair.layers) for pair in pair_layers(student, teacher, wanted)}


def test_one_stack() -> None:
    student, teacher = encoder(2), encoder(5)
    assert layers(student, teacher, "auto") == {"encoder.layer": [(0, 0), (1, 4)]}
    assert layers(student, teacher, "skip") == {"encoder.layer": [(0, 1), (1, 4)]}
    assert layers(student, teacher, {"0": 2, -1: "-1"}) == {"encoder.layer": [(0, 2), (1, 4)]}
    assert layers(student, teacher, {"encoder.layer.1": "encoder.layer.3"}) == {"encoder.layer": [(1, 3)]}
    assert layers(encoder(1), teacher, "last") == {"encoder.layer": [(0, 4)]}
    assert layers(student, LlamaForCausalLM(llama(8)), "even") == {"encoder.layer": [(0, 0), (1, 1)]}


def test_two_stacks() -> None:
    """Encoder to encoder, decoder to decoder; parts of a model likewise."""
    student, teacher = translator(2, 1), translator(4, 3)
    assert layers(student, teacher, "last") == {"encoder.block": [(0, 2), (1, 3)], "decoder.block": [(0, 2)]}
    assert layers(student, teacher, {"decoder.block.0": "decoder.block.1"}) == {"decoder.block": [(0, 1)]}
    found = layers(CLIPModel(clip(16)), CLIPModel(clip(16)), "even")
    assert found == {"text_model.encoder.layers": [(0, 0)], "vision_model.encoder.layers": [(0, 0)]}
    inner = {p.student.path: p.student.inner for p in pair_layers(student, teacher, "even")}
    assert inner == {"encoder.block": True, "decoder.block": False}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("middle", "layer_map='middle' is not known: use one of auto, even, last, skip"),
        ({"0": 5}, "the teacher has no layer 5; it has 5, encoder.layer.0 to encoder.layer.4"),
        ({"-3": 0}, "the student has no layer -3"),
        ({"encoder.layers.0": 0}, "the student has no layer 'encoder.layers.0'; it has encoder.layer.0 to"),
        ({}, "has no pair"),
    ],
)
def test_what_does_not_exist(wanted: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_layers(encoder(2), encoder(5), wanted)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"the student's encoder.layer has 3 layers, the teacher's .* 2"):
        pair_layers(encoder(3), encoder(2), "even")
    with pytest.raises(ValueError, match="could be a layer of several stacks"):
        pair_layers(translator(2, 2), translator(2, 2), {"0": "0"})
    with pytest.raises(ValueError, match="don't correspond one to one"):
        pair_layers(encoder(2), translator(2, 2), "even")
    stages = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_channels=1))
    with pytest.raises(
        ValueError, match="none of the module lists of ResNetModel is as long as a layer count"
    ):
        pair_layers(stages, stages, "even")


def test_the_map_that_the_student_remembers() -> None:
    """What the student was cut from comes before any rule; a map of another teacher does not count."""
    student, teacher = encoder(2), encoder(5)
    student.config.hf_kd_layers = {"num_hidden_layers": [1, 3]}
    assert layers(student, teacher, "auto") == {"encoder.layer": [(0, 1), (1, 3)]}
    assert layers(student, teacher, "even") == {"encoder.layer": [(0, 0), (1, 4)]}
    assert layers(student, encoder(3), "auto") == {"encoder.layer": [(0, 0), (1, 2)]}
