"""Models from a config: the sizes asked for, the rest the teacher's, errors that name the nearest key."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from hf_kd.fresh import build_model, fresh_student

LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "num_hidden_layers": 4, "max_position_embeddings": 32,
}  # fmt: skip


def test_fresh_student_has_the_head_and_the_overrides():
    names = {0: "no", 1: "perhaps", 2: "yes"}
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=4,
        id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    teacher = tf.BertForSequenceClassification(config)
    student = fresh_student(teacher, {"hidden_size": 16, "num_hidden_layers": 2})
    assert type(student) is type(teacher) and student.classifier.out_features == 3
    assert student.config.id2label == names and student.config.vocab_size == 64
    assert (student.config.hidden_size, len(student.bert.encoder.layer)) == (16, 2)
    assert teacher.config.hidden_size == 32


def test_derived_options_are_derived_again():
    """The size of a head and the kinds of layers follow from the options that changed."""
    teacher = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).to(torch.bfloat16)
    student = fresh_student(teacher, {"hidden_size": 16, "num_attention_heads": 2})
    assert (student.config.head_dim, student.config.num_key_value_heads) == (8, 2)
    assert student.dtype == torch.float32
    qwen = tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA, num_key_value_heads=2))
    assert len(fresh_student(qwen, {"num_hidden_layers": 2}).config.layer_types) == 2
    chosen = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, head_dim=16))
    assert fresh_student(chosen, {"hidden_size": 16}).config.head_dim == 16


def test_names_of_other_models_work_where_the_config_maps_them():
    config = tf.GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=4, n_positions=32)
    student = fresh_student(tf.GPT2LMHeadModel(config), {"hidden_size": 16, "n_layer": 2})
    assert (student.config.n_embd, student.config.n_layer) == (16, 2)


def test_seed_decides_the_weights_and_leaves_no_trace():
    teacher = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))
    state = torch.get_rng_state()
    one, same, other = (fresh_student(teacher, {"num_hidden_layers": 1}, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, teacher.lm_head.weight)


def test_unknown_options_name_the_nearest():
    teacher = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))
    with pytest.raises(
        ValueError, match=r"student_config has 'num_layer'.* did you mean .*num_hidden_layers"
    ):
        fresh_student(teacher, {"num_layer": 2})
    with pytest.raises(ValueError, match="model_type='bert' but the teacher is 'llama'"):
        fresh_student(teacher, {"model_type": "bert"})
    with pytest.raises(ValueError, match="teacher_config has 'hiden_size'.*hidden_size"):
        build_model({"model_type": "vit", "hiden_size": 4}, task="image-classification")
    with pytest.raises(ValueError, match="model_type='vitt'.*did you mean vit"):
        build_model({"model_type": "vitt"}, task="image-classification")
    with pytest.raises(ValueError, match="model_type=None"):
        build_model({"hidden_size": 4}, task="image-classification")


def test_invalid_sizes_are_said_with_the_option():
    qwen = tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA, num_key_value_heads=2))
    with pytest.raises(ValueError, match="student_config does not make a valid Qwen2Config"):
        fresh_student(qwen, {"layer_types": ["full_attention"]})


def test_build_model_takes_labels_and_tokenizer():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    vit = build_model(
        {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, **sizes},
        task="image-classification", label_names=["cat", "dog", "emu"],
    )  # fmt: skip
    assert isinstance(vit, tf.ViTForImageClassification)
    assert vit.config.id2label == {0: "cat", 1: "dog", 2: "emu"} and vit.config.label2id["emu"] == 2

    class Tokenizer:
        pad_token_id, bos_token_id, eos_token_id = 0, 1, 1

        def __len__(self):
            return 50

    lm = build_model({"model_type": "llama", **sizes}, task="causal-lm", tokenizer=Tokenizer())
    assert (lm.config.vocab_size, lm.config.pad_token_id) == (50, 0)
    several = build_model(
        {"model_type": "bert", **sizes}, task="sequence-classification", num_labels=5,
        problem_type="multi_label_classification",
    )  # fmt: skip
    assert several.config.num_labels == 5 and several.config.problem_type == "multi_label_classification"


def test_options_that_configs_take_without_declaring_them():
    """T5's start token is in no signature, and a model without it cannot be trained."""
    config = {"model_type": "t5", "d_model": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    assert build_model(config, task="seq2seq-lm").config.decoder_start_token_id == 0
