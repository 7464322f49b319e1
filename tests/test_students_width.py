"""Narrower students of every family: exact where the removed channels are dead, whole models otherwise."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_kd.students import init_student, initial_losses
from hf_kd.students.depth import find_stacks

SMALL = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def text(k, **extra):
    return {
        **SMALL,
        "hidden_size": 16 * k,
        "num_attention_heads": 2 * k,
        "intermediate_size": 24 * k,
        "max_position_embeddings": 40,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        **extra,
    }


def grouped(k, **extra):
    return text(k, num_attention_heads=4 * k, num_key_value_heads=2 * k, head_dim=6, **extra)


def pixels(k, **extra):
    sizes = text(k)
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    return {**{name: sizes[name] for name in names}, **image, **extra}


def bart(k):
    return tf.BartConfig(
        **SMALL, d_model=16 * k, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2 * k,
        decoder_attention_heads=2 * k, encoder_ffn_dim=24 * k, decoder_ffn_dim=20 * k,
        max_position_embeddings=40, forced_eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip


def t5(k):
    return tf.T5Config(
        vocab_size=48, d_model=16 * k, d_kv=6, d_ff=24 * k, num_heads=2 * k, num_layers=2,
        decoder_start_token_id=0, tie_word_embeddings=False, feed_forward_proj="gated-gelu",
    )  # fmt: skip


def gpt2(k):
    return tf.GPT2Config(
        vocab_size=48, n_embd=16 * k, n_head=2 * k, n_layer=2, n_positions=40, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def whisper(k):
    return tf.WhisperConfig(
        **SMALL, d_model=16 * k, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2 * k,
        decoder_attention_heads=2 * k, encoder_ffn_dim=24 * k, decoder_ffn_dim=24 * k, num_mel_bins=8,
        max_source_positions=10, max_target_positions=40, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None, tie_word_embeddings=False,
    )  # fmt: skip


def wav2vec2(k):  # the positional convolution works on groups of hidden channels, which stay
    return tf.Wav2Vec2Config(
        vocab_size=32, hidden_size=16, num_attention_heads=2, intermediate_size=24 * k, num_hidden_layers=2,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip


def clip(k):
    tower = {"hidden_size": 16 * k, "num_attention_heads": 2 * k, "intermediate_size": 24 * k}
    words = {**SMALL, **tower, "num_hidden_layers": 2, "max_position_embeddings": 40}
    return tf.CLIPConfig(text_config=words, vision_config=pixels(k), projection_dim=8)


def deberta(k):
    return tf.DebertaV2Config(
        **text(k), relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"],
        pooler_hidden_size=16 * k, type_vocab_size=0, position_biased_input=False, num_labels=3,
        share_att_key=False, norm_rel_ebd="layer_norm",
    )  # fmt: skip


def modernbert(k):
    return tf.ModernBertConfig(
        **text(k), cls_token_id=1, sep_token_id=2, local_attention=4, global_attn_every_n_layers=2
    )  # fmt: skip


def gemma3(k):
    kinds = ["sliding_attention", "full_attention"]
    return tf.Gemma3TextConfig(**grouped(k, sliding_window=4, layer_types=kinds))


# family: class, config of a scale, the fused layers and how many runs of channels they hold
FAMILIES = {
    "bert": (tf.BertForSequenceClassification, lambda k: tf.BertConfig(**text(k)), {}),
    "roberta": (tf.RobertaForMaskedLM, lambda k: tf.RobertaConfig(**text(k)), {}),
    "deberta-v2": (tf.DebertaV2ForSequenceClassification, deberta, {}),
    "modernbert": (tf.ModernBertForSequenceClassification, modernbert, {"Wqkv": 3, "Wi": 2}),
    "vit": (tf.ViTForImageClassification, lambda k: tf.ViTConfig(**pixels(k)), {}),
    "deit": (tf.DeiTForImageClassification, lambda k: tf.DeiTConfig(**pixels(k)), {}),
    "whisper": (tf.WhisperForConditionalGeneration, whisper, {}),
    "wav2vec2": (tf.Wav2Vec2ForCTC, wav2vec2, {}),
    "bart": (tf.BartForConditionalGeneration, bart, {}),
    "t5": (tf.T5ForConditionalGeneration, t5, {}),
    "gpt2": (tf.GPT2LMHeadModel, gpt2, {"c_attn": 3}),
    "llama": (tf.LlamaForCausalLM, lambda k: tf.LlamaConfig(**grouped(k)), {}),
    "qwen2": (tf.Qwen2ForCausalLM, lambda k: tf.Qwen2Config(**text(k, num_key_value_heads=k)), {}),
    "qwen3": (tf.Qwen3ForCausalLM, lambda k: tf.Qwen3Config(**grouped(k)), {}),
    "gemma2": (tf.Gemma2ForCausalLM, lambda k: tf.Gemma2Config(**grouped(k, sliding_window=4)), {}),
    "gemma3": (tf.Gemma3ForCausalLM, gemma3, {}),
    "mistral": (tf.MistralForCausalLM, lambda k: tf.MistralConfig(**grouped(k)), {}),
    "clip": (tf.CLIPModel, clip, {}),
}
GENERATE = ["bart", "t5", "gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral"]
# The scale of their embeddings follows from the hidden size, which changes what the stream holds.
SCALED = ("gemma2", "gemma3")


def make(family, scale, seed=0, kind=None):
    config = FAMILIES[family][1]
    kind = kind or FAMILIES[family][0]
    torch.manual_seed(seed)
    model = kind(config(scale)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_for(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 48, (2, 9), generator=g)
    ids[:, -1] = 47  # CLIP pools at the largest id
    name = model.main_input_name
    if name == "input_features":
        features = torch.randn(2, 8, 20, generator=g)
        return {"input_features": features, "decoder_input_ids": ids}
    if name == "input_values":
        return {"input_values": torch.randn(2, 400, generator=g)}
    image = torch.randn(2, 1, 8, 8, generator=g)
    if name == "pixel_values":
        return {"pixel_values": image}
    if isinstance(model, tf.CLIPModel):
        return {"input_ids": ids, "pixel_values": image}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids} if model.config.is_encoder_decoder else batch


@torch.no_grad()
def logits(model, batch):
    outputs = model(**batch)
    if isinstance(model, tf.T5Model):  # whose first channels are compared, since T5 ties its head
        return outputs.last_hidden_state[..., :16]
    return outputs.logits if hasattr(outputs, "logits") else outputs.logits_per_image


def sizes(family, share=0.5):
    width = {"hidden_size": share, "intermediate_size": share}
    if family == "wav2vec2":
        return {"intermediate_size": share}
    if family in ("t5", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral"):
        width["num_attention_heads"] = share
    return width


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@torch.no_grad()
def with_dead_channels(small, large, fused):
    """Make `large` compute what `small` does: its other channels mirror the first and are never read."""
    source, owners = dict(small.named_parameters()), dict(large.named_modules())
    for name, parameter in large.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner, value = owners[path], source[name]
        for axis in range(value.ndim):
            if value.shape[axis] == parameter.shape[axis]:
                continue
            reads = leaf == "weight" and axis == {nn.Linear: 1, Conv1D: 0}.get(
                type(owner), 1 if isinstance(owner, nn.Conv1d | nn.Conv2d) else -1
            )
            blocks = 1 if reads else fused.get(path.rpartition(".")[2], 1)
            parts = value.chunk(blocks, axis)
            value = torch.cat([torch.cat([p, 0 * p if reads else p], axis) for p in parts], axis)
        parameter.copy_(value)
    return large


@pytest.mark.parametrize("family", FAMILIES)
def test_student_is_exact_where_the_rest_is_dead(family):
    """The removed channels are read by nothing: the narrow student computes what the teacher does."""
    headless = tf.T5Model if family == "t5" else None
    small = make(family, 1, kind=headless)
    teacher = with_dead_channels(small, make(family, 2, seed=3, kind=headless), FAMILIES[family][2])
    batch = batch_for(small)
    width = sizes(family)
    if family in SCALED:
        width.pop("hidden_size")
        kind, config, _ = FAMILIES[family]
        options = {**config(2).to_dict(), "hidden_size": 16}
        small = kind(type(config(1)).from_dict({**config(1).to_dict()})).eval()
        small.load_state_dict(make(family, 1).state_dict())
        teacher = with_dead_channels(small, kind(type(config(1)).from_dict(options)).eval(), {})
    torch.testing.assert_close(logits(teacher, batch), logits(small, batch), rtol=1e-4, atol=1e-4)
    student = init_student(teacher, **width)
    assert shapes(student) == shapes(small)
    torch.testing.assert_close(logits(student, batch), logits(teacher, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_and_width_at_once_save_and_load(family, tmp_path):
    """Trap 43: an ordinary model of the same class that runs after loading, channels by importance."""
    teacher = make(family, 2)
    batch = batch_for(teacher)
    student = init_student(teacher, num_layers=1, calibration=batch, **sizes(family))
    assert type(student) is type(teacher)
    assert sum(p.numel() for p in student.parameters()) < 0.7 * sum(p.numel() for p in teacher.parameters())
    before = logits(student, batch)
    assert before.isfinite().all()
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch), before)
    again = init_student(teacher, num_layers=1, calibration=batch, **sizes(family))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "family", ["deberta-v2", "modernbert", "deit", "whisper", "gemma2", "gemma3", "clip"]
)
def test_depth_alone(family):
    """Trap 44: the layers that stay are the teacher's, at the places that the config remembers."""
    teacher = make(family, 1)
    last = 0 if family == "modernbert" else 1  # whose first layer alone has no norm in front
    student = init_student(teacher, num_layers=1, layers="last" if last else "first")
    kept = student.config.hf_kd_layers
    assert kept and all(layers == [last] for layers in kept.values())
    origin = teacher.state_dict()
    stacks = [stack.module for stack in find_stacks(teacher)]
    assert len(stacks) == len(kept)
    moved = 0
    for name, value in student.state_dict().items():
        path = next((stack for stack in stacks if name.startswith(f"{stack}.0.")), None)
        moved += path is not None
        theirs = name if path is None else name.replace(f"{path}.0.", f"{path}.{last}.", 1)
        assert torch.equal(value, origin[theirs]), name
    if family == "modernbert":
        with pytest.raises(ValueError, match="attn_norm is 'Identity' and was 'LayerNorm'"):
            init_student(teacher, layers=[1])
    assert moved and logits(student, batch_for(teacher)).isfinite().all()


@pytest.mark.parametrize("family", GENERATE)
def test_cached_generation_equals_uncached(family):
    """Trap 43: also with fewer heads."""
    student = init_student(make(family, 2), num_layers=1, **sizes(family))
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = student.generate(ids, **options)
    assert torch.equal(cached, student.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "clip"])
def test_equal_sizes_are_an_exact_copy(family):
    """Trap 38: what keeps everything computes exactly what the teacher does."""
    teacher = make(family, 1)
    size = teacher.config.text_config.hidden_size if family == "clip" else teacher.config.hidden_size
    student = init_student(teacher, hidden_size=size)
    batch = batch_for(teacher)
    assert torch.equal(logits(student, batch), logits(teacher, batch))


def test_importance_keeps_the_channels_that_matter():
    """Minitron: dead channels at any place are the ones that go; with their weights the student is exact."""
    teacher = make("llama", 2)
    batch = batch_for(teacher)
    g = torch.Generator().manual_seed(5)
    gone = torch.randperm(48, generator=g)[:24]
    layer = teacher.model.layers[0]
    with torch.no_grad():
        for each in teacher.model.layers:
            each.mlp.down_proj.weight[:, gone] = 0
        layer.self_attn.o_proj.weight[:, 12:24] = 0  # the second key-value head's two query heads
        teacher.model.layers[1].self_attn.o_proj.weight[:, 36:48] = 0  # elsewhere in another layer
    student = init_student(teacher, intermediate_size=24, num_attention_heads=6, calibration=batch)
    assert student.config.num_key_value_heads == 3
    torch.testing.assert_close(logits(student, batch), logits(teacher, batch), rtol=1e-4, atol=1e-5)
    by_slices = init_student(teacher, intermediate_size=24, num_attention_heads=6)
    assert not torch.allclose(logits(by_slices, batch), logits(teacher, batch), atol=1e-3)


def test_student_starts_better_than_random_weights(caplog):
    """After a little training a shrunk model has a lower loss than one of its shape with random weights."""
    teacher = make("llama", 2)
    g = torch.Generator().manual_seed(0)
    starts = torch.randint(3, 48, (64, 1), generator=g)
    ids = 3 + (starts - 3 + torch.arange(12)) % 45  # counting: the next token is the last one plus one
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        teacher(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    batch = {"input_ids": ids, "labels": ids}
    with caplog.at_level(logging.INFO, logger="hf_kd.students"):
        student = init_student(teacher, intermediate_size=0.75, hidden_size=0.75, calibration=batch)
    losses = initial_losses(teacher, student, batch)
    assert losses["teacher"] < losses["student"] < losses["random"]
    assert "loss on the calibration data before training" in caplog.text
    assert "hidden_size: 24 of 32" in caplog.text


def test_layers_by_importance():
    """ShortGPT: the layer that leaves the stream alone goes; the loss without a layer agrees."""
    torch.manual_seed(0)
    teacher = tf.LlamaForCausalLM(tf.LlamaConfig(**{**grouped(2), "num_hidden_layers": 4})).eval()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            teacher.model.layers[1].get_submodule(name).weight.zero_()
    ids = batch_for(teacher)["input_ids"]
    batch = {"input_ids": ids, "labels": ids}
    student = init_student(teacher, num_layers=3, layers="importance", calibration=batch)
    assert student.config.hf_kd_layers == {"num_hidden_layers": [0, 2, 3]}
    torch.testing.assert_close(logits(student, batch), logits(teacher, batch))
    by_loss = init_student(teacher, num_layers=3, layers="importance", importance="loss", calibration=batch)
    assert len(by_loss.model.layers) == 3
    with pytest.raises(ValueError, match="give calibration"):
        init_student(teacher, num_layers=3, layers="importance")
    with pytest.raises(ValueError, match="importance='size' is not known"):
        init_student(teacher, num_layers=3, layers="importance", importance="size", calibration=batch)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", {"hidden_size": 20}, "hidden_size=20 is no multiple of 8"),
        ("bert", {"hidden_size": 16, "num_attention_heads": 3}, "set hidden_size=24 or leave one out"),
        ("bert", {"hidden_size": 64}, "does not fit the teacher's hidden_size=32"),
        ("bert", {"num_key_value_heads": 1}, "no such size"),
        ("bert", {"hidden_size": 1.0}, "neither a number"),
        ("llama", {"num_attention_heads": 5}, "num_attention_heads=5 and num_key_value_heads"),
        ("llama", {"num_key_value_heads": 2}, "at most the teacher's 2"),
        ("clip", {"hidden_size": {"hidden_size": 16}}, "text_config.hidden_size"),
        ("wav2vec2", {"hidden_size": 8}, "cannot be cut"),
        ("bert", {"intermediate_size": 8, "calibration": [1]}, "calibration is a batch"),
    ],
)
def test_sizes_that_do_not_fit_are_named(family, options, message):
    with pytest.raises(ValueError, match=message):
        init_student(make(family, 2), **options)


def test_refuses_what_is_not_covered():
    """A clear error and no broken model: experts' channels, and widths of a pyramid."""
    config = tf.MixtralConfig(**grouped(2), num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="no layer after it is seen to read"):
        init_student(tf.MixtralForCausalLM(config), intermediate_size=0.5)
    swin = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2])
    with pytest.raises(ValueError, match="no such size"):
        init_student(tf.SwinForImageClassification(swin), hidden_size=0.5)


@pytest.mark.parametrize(
    ("option", "config", "expected"),
    [
        ("num_layers", "num_hidden_layers", 1),
        ("hidden_size", "hidden_size", 16),
        ("num_attention_heads", "num_attention_heads", 4),
        ("num_key_value_heads", "num_key_value_heads", 2),
        ("intermediate_size", "intermediate_size", 24),
    ],
)
def test_every_size_is_a_number_or_a_share(option, config, expected):
    """0.5 is half of the teacher's, whatever is cut; the number itself says the same."""
    teacher = make("llama", 2)
    more = {"num_attention_heads": 0.5} if option == "num_key_value_heads" else {}
    made = [init_student(teacher, **{**more, option: size}) for size in (0.5, expected)]
    for student in made:
        assert getattr(student.config, config) == expected
    for one, other in zip(*(m.parameters() for m in made), strict=True):
        assert torch.equal(one, other)


def test_one_tower_alone():
    student = init_student(make("clip", 2), hidden_size={"vision_config.hidden_size": 0.5})
    assert (student.config.vision_config.hidden_size, student.config.text_config.hidden_size) == (16, 32)
