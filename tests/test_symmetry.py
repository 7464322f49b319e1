"""Weights that hold queries, keys and values: cut in the order that they really have, or refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from transformers.models.falcon.modeling_falcon import FalconForCausalLM

from hf_kd.students import init_student
from hf_kd.students.axes import find_axes, make_explicit
from hf_kd.students.depth import find_stacks
from hf_kd.students.symmetry import find_layout
from tests.test_students_width import make

SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def noisy(kind, config, seed=0):
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def neox():
    config = tf.GPTNeoXConfig(**SIZES, **IDS, intermediate_size=48, max_position_embeddings=40)
    return noisy(tf.GPTNeoXForCausalLM, config)


def falcon(**extra):
    options = {"multi_query": False, "alibi": False, "new_decoder_architecture": False, "bias": True, **extra}
    options["tie_word_embeddings"] = False
    return noisy(FalconForCausalLM, tf.FalconConfig(**SIZES, **IDS, ffn_hidden_size=48, **options))


def bloom():
    sizes = {"vocab_size": 48, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    return noisy(tf.BloomForCausalLM, tf.BloomConfig(**sizes, **IDS))


def dead_heads(model, path, output, gone, head=8):
    """Make some heads' outputs unread."""
    with torch.no_grad():
        for layer in model.get_submodule(path):
            weight = layer.get_submodule(output).weight
            for h in gone:
                weight[:, h * head : (h + 1) * head] = 0


@pytest.mark.parametrize(
    ("build", "path", "output"),
    [(neox, "gpt_neox.layers", "attention.dense"), (falcon, "transformer.h", "self_attention.dense")],
)
def test_heads_that_are_interleaved_are_cut_as_such(build, path, output):
    """GPT-NeoX and Falcon keep query, key and value of each head together: two heads that nothing reads go.

    Hidden channels go with the heads, so the channels that go are dead too: they are read by nothing.
    """
    teacher = build()
    dead_heads(teacher, path, output, (1, 2))
    config = make_explicit(type(teacher), teacher.config)
    wanted = {("", "hidden"), ("", "heads")}
    assert find_layout(type(teacher), config, find_stacks(teacher), wanted)
    _, axes = find_axes(type(teacher), config, wanted, interleaved=True)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            for i, axis in axes.get(name, {}).items():
                if axis.kind == "hidden" and axis.reads:
                    parameter.index_fill_(i, torch.arange(16, 32), 0)  # channels that nothing reads
                if axis.kind == "hidden" and not axis.reads:  # as far as norms see, they mirror the first
                    first = parameter.index_select(i, torch.arange(16))
                    parameter.index_copy_(i, torch.arange(16, 32), first)
    ids = torch.randint(3, 48, (4, 9), generator=torch.Generator().manual_seed(1))
    student = init_student(teacher, hidden_size=16, calibration={"input_ids": ids})
    assert student.config.num_attention_heads == 2
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = student.generate(ids[:1], **options)
    assert torch.equal(cached, student.generate(ids[:1], **options, use_cache=False))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (bloom, "heads differ by their place"),
        (lambda: falcon(alibi=True), "heads differ by their place"),
        (lambda: falcon(multi_query=True), "query_key_value.weight is not understood"),
        (lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), "not understood"),
    ],
)
def test_orders_that_are_not_understood_are_refused(build, message):
    """ALiBi gives each head a slope by its place; grouped queries stand between keys and values."""
    teacher = build()
    with pytest.raises(ValueError, match=message):
        init_student(teacher, hidden_size=0.5)
    assert init_student(teacher, num_layers=1)(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


@pytest.mark.parametrize(("family", "fused"), [("gpt2", True), ("modernbert", True), ("llama", False)])
def test_queries_keys_and_values_one_after_another(family, fused):
    """The order that GPT-2 and ModernBERT have is found to be theirs, not only believed."""
    model = make(family, 2)
    config = make_explicit(type(model), model.config)
    wanted = {("", kind) for kind in ("hidden", "heads", "kv", "ffn")}
    assert not find_layout(type(model), config, find_stacks(model), wanted)
    _, axes = find_axes(type(model), config, wanted)
    assert any(axis.fused for own in axes.values() for axis in own.values()) is fused


def test_the_check_can_fail(monkeypatch):
    """Counter-example: cut as if all queries came first, GPT-NeoX is another model, and it shows."""
    from hf_kd.students import symmetry

    def as_blocks(kind, config, wanted, *, interleaved=False):
        return find_axes(kind, config, wanted)

    monkeypatch.setattr(symmetry, "find_axes", as_blocks)
    with pytest.raises(ValueError, match="another order of its heads"):
        init_student(neox(), hidden_size=0.5)
    assert init_student(neox(), intermediate_size=0.5).config.intermediate_size == 24


def test_what_can_not_be_tried_is_refused_only_where_it_matters(monkeypatch):
    """Without inputs for the small copy nothing is known of a fused weight; other models have none."""
    from hf_kd.students import symmetry

    def unknown(model, **_):
        raise ValueError("no example is known")

    monkeypatch.setattr(symmetry, "example_inputs", unknown)
    with pytest.raises(ValueError, match="order can't be found out .* no example is known"):
        init_student(neox(), hidden_size=0.5)
    assert init_student(make("llama", 2), hidden_size=0.5).config.hidden_size == 16
