"""What a student that was cut from its teacher is worth before it has learnt anything."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from hf_kd.students import init_student, initial_losses

SMALL = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}


def causal(g: torch.Generator, rows: int) -> dict[str, torch.Tensor]:
    """Counting: the next token is the last one plus one."""
    starts = torch.randint(0, 45, (rows, 1), generator=g)
    ids = 3 + (starts + torch.arange(10)) % 45
    return {"input_ids": ids, "labels": ids}


def words(g: torch.Generator, rows: int) -> dict[str, torch.Tensor]:
    """Which third of the vocabulary the first token is from."""
    ids = torch.randint(3, 48, (rows, 10), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 0] - 3) // 15}


def images(g: torch.Generator, rows: int) -> dict[str, torch.Tensor]:
    """Which quarter is bright."""
    labels = torch.randint(0, 4, (rows,), generator=g)
    pixels = torch.randn(rows, 1, 8, 8, generator=g)
    for i, label in enumerate(labels.tolist()):
        pixels[i, 0, label // 2 * 4 :, label % 2 * 4 :][:4, :4] += 3.0
    return {"pixel_values": pixels, "labels": labels}


def gpt2() -> tf.PreTrainedModel:
    config = {"vocab_size": 48, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 40, "eos_token_id": 2}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**config))


def llama() -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, **SIZES, num_key_value_heads=2))


def bert() -> tf.PreTrainedModel:
    return tf.BertForSequenceClassification(tf.BertConfig(**SMALL, **SIZES, num_labels=3))


def vit() -> tf.PreTrainedModel:
    shape = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    return tf.ViTForImageClassification(tf.ViTConfig(**SIZES, **shape, num_labels=4))


FAMILIES = {"gpt2": (gpt2, causal), "llama": (llama, causal), "bert": (bert, words), "vit": (vit, images)}
WIDTH = {"hidden_size": 0.75, "intermediate_size": 0.75}
CUTS = {
    "depth": {"num_layers": 2},
    "width": WIDTH,
    "depth and width": {"num_layers": 2, **WIDTH},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_starts_better_than_random_weights(family: str) -> None:
    """Loss of unseen rows, before training: the teacher's, the cut's, and that of its shape at random."""
    build, rows = FAMILIES[family]
    torch.manual_seed(0)
    teacher = build()
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        teacher(**rows(g, 16)).loss.backward()
        optimizer.step()
    teacher.eval()
    calibration, fresh = rows(g, 32), rows(g, 64)
    for name, sizes in CUTS.items():
        student = init_student(teacher, calibration=calibration, **sizes)
        losses = initial_losses(teacher, student, fresh)
        random = initial_losses(teacher, student, fresh, seed=1)["random"]
        assert losses["teacher"] < losses["student"] < min(losses["random"], random), (name, losses, random)


def test_a_cut_whisper_generates_with_a_cache_as_without() -> None:
    """Trap 43: encoder and decoder cut in depth and width, from the features of a sound."""
    torch.manual_seed(0)
    config = tf.WhisperConfig(
        **SMALL, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=10, max_target_positions=40, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None, tie_word_embeddings=False,
    )  # fmt: skip
    teacher = tf.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    features = torch.randn(2, 8, 20)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    for sizes in ({"num_layers": 2}, {"num_layers": 2, "hidden_size": 0.5, "intermediate_size": 0.5}):
        student = init_student(teacher, **sizes)
        assert student.config.decoder_layers == student.config.encoder_layers == 2
        cached = student.generate(features, **options)
        assert torch.equal(cached, student.generate(features, **options, use_cache=False))
        assert len(set(cached.flatten().tolist())) > 3
