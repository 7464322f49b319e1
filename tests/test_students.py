"""Students cut from a teacher: the right layers, nothing shared, and they generate, save and load."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf
from torch import nn

from hf_kd.config import DistillationArguments
from hf_kd.students import init_student, layer_map, remembered_layers
from hf_kd.trainer import DistillationTrainer

TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {
    **TEXT,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
LLAMA = {**BERT, "num_key_value_heads": 1}


def make(model_class, config, seed=0):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():  # norms and biases start equal in all layers: make every layer different
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def bert(n=4, **extra):
    config = tf.BertConfig(**BERT, num_hidden_layers=n, num_labels=3, **extra)
    return make(tf.BertForSequenceClassification, config)


def llama(n=5):
    return make(tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA, num_hidden_layers=n, tie_word_embeddings=True))


def qwen2(n=6):
    config = tf.Qwen2Config(
        **LLAMA, num_hidden_layers=n, use_sliding_window=True, sliding_window=4, max_window_layers=3
    )
    return make(tf.Qwen2ForCausalLM, config)


def qwen3(n=6):
    kinds = ["sliding_attention", "full_attention"] * (n // 2)
    config = tf.Qwen3Config(
        **LLAMA, head_dim=8, num_hidden_layers=n, layer_types=kinds, sliding_window=4, use_sliding_window=True
    )
    return make(tf.Qwen3ForCausalLM, config)


def t5(n=4):
    config = tf.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=n, num_decoder_layers=n + 1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return make(tf.T5ForConditionalGeneration, config)


def bart(n=4, m=4):
    config = tf.BartConfig(
        **TEXT, d_model=16, encoder_layers=n, decoder_layers=m, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40,
        forced_eos_token_id=None,
    )  # fmt: skip
    return make(tf.BartForConditionalGeneration, config)


def gpt2(n=4):
    config = tf.GPT2Config(vocab_size=64, n_embd=16, n_head=2, n_layer=n, n_positions=40, eos_token_id=2)
    return make(tf.GPT2LMHeadModel, config)


def distilbert(n=4):
    config = tf.DistilBertConfig(vocab_size=64, dim=16, n_heads=2, hidden_dim=32, n_layers=n, num_labels=3)
    return make(tf.DistilBertForTokenClassification, config)


def vit(n=4):
    config = tf.ViTConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=n, image_size=8,
        patch_size=4, num_channels=1,
    )  # fmt: skip
    return make(tf.ViTForImageClassification, config)


def roberta(n=4):
    return make(tf.RobertaForMaskedLM, tf.RobertaConfig(**BERT, num_hidden_layers=n))


def token_batch(rows=2, length=9):
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def batch_for(model):
    if isinstance(model, tf.ViTForImageClassification):
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))}
    batch = token_batch()
    return {**batch, "labels": batch["input_ids"]} if model.config.is_encoder_decoder else batch


# model maker, {module path of a stack: the teacher layers that a student of 3 layers keeps}
FAMILIES = {
    "bert": (bert, {"bert.encoder.layer": [0, 2, 3]}),
    "roberta": (roberta, {"roberta.encoder.layer": [0, 2, 3]}),
    "distilbert": (distilbert, {"distilbert.transformer.layer": [0, 2, 3]}),
    "vit": (vit, {None: [0, 2, 3]}),
    "gpt2": (gpt2, {"transformer.h": [0, 2, 3]}),
    "llama": (llama, {"model.layers": [0, 2, 4]}),
    "qwen2": (qwen2, {"model.layers": [0, 3, 5]}),
    "qwen3": (qwen3, {"model.layers": [0, 3, 5]}),
    "t5": (t5, {"encoder.block": [0, 2, 3], "decoder.block": [0, 2, 4]}),
    "bart": (bart, {"model.encoder.layers": [0, 2, 3], "model.decoder.layers": [0, 2, 3]}),
}


def stacks_of(model, expected):
    """The stacks by module path; ViT's path differs between versions of Transformers."""
    found = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and "layer." not in name
    }
    return {name if name in expected else None: stack for name, stack in found.items() if len(stack) > 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_keeps_the_mapped_layers_and_everything_else(family):
    """Trap 44: evenly spaced with first and last; each layer equals the teacher's, the rest is copied."""
    build, expected = FAMILIES[family]
    teacher = build()
    student = init_student(teacher, num_layers=3)
    theirs, mine = stacks_of(teacher, expected), stacks_of(student, expected)
    for path, kept in expected.items():
        assert len(mine[path]) == 3
        for layer, origin in zip(mine[path], (theirs[path][i] for i in kept), strict=True):
            assert layer.state_dict().keys() == origin.state_dict().keys()
            for name, value in layer.state_dict().items():
                assert torch.equal(value, origin.state_dict()[name]), name
    in_stack = [id(p) for stack in mine.values() for p in stack.parameters()]
    source = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if id(parameter) not in in_stack:
            assert torch.equal(parameter, source[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_round_trips(family, tmp_path):
    """Trap 43: the saved student loads with plain from_pretrained and gives the same logits."""
    student = init_student(FAMILIES[family][0](), num_layers=3)
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 3
    batch = batch_for(student)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, student(**batch).logits)
    for name, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3", "t5", "bart"])
def test_cached_generation_equals_uncached(family):
    """Trap 43: layers that keep the teacher's layer_idx break the cache; with it generation is the same."""
    student = init_student(FAMILIES[family][0](), num_layers=3)
    batch = {**token_batch(rows=1, length=6), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = student.generate(**batch, use_cache=True)
    assert torch.equal(cached, student.generate(**batch, use_cache=False))


def test_naive_cut_breaks_cached_generation():
    """Trap 43, counter-example: picking layers from a copy leaves layer_idx [0, 2, 4]; generation fails."""
    naive = llama()
    naive.model.layers = nn.ModuleList([naive.model.layers[i] for i in (0, 2, 4)])
    naive.config.num_hidden_layers = 3
    with pytest.raises(IndexError):
        naive.generate(**token_batch(rows=1), max_new_tokens=3, use_cache=True)


def test_layer_types_follow_the_layers():
    """Trap 43: layer_types are those of the kept layers, not the first ones."""
    student = init_student(qwen3(), num_layers=3)
    assert student.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert init_student(qwen2(), num_layers=2).config.layer_types == ["full_attention", "sliding_attention"]


def test_equal_depth_is_an_exact_copy():
    """Trap 38: a student of all layers computes exactly what the teacher does."""
    for build, _ in FAMILIES.values():
        teacher = build()
        count = teacher.config.num_hidden_layers
        several = {"num_layers": count, "num_decoder_layers": count + 1}
        student = init_student(teacher, num_layers=several if build is t5 else count)
        batch = batch_for(teacher)
        with torch.no_grad():
            torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "roberta"])
def test_student_shares_no_storage_with_the_teacher(family):
    """Trap 11: training the student must not change the teacher."""
    teacher = FAMILIES[family][0]()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    student = init_student(teacher, num_layers=2)
    tensors = [*teacher.parameters(), *teacher.buffers()]
    theirs = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    mine = [*student.parameters(), *student.buffers()]
    assert not theirs & {t.untyped_storage().data_ptr() for t in mine if t.numel()}
    assert all(p.requires_grad for p in student.parameters())
    if teacher.can_generate():
        assert student.generation_config is not teacher.generation_config


def test_ties_stay_ties():
    """Trap 43: tied weights stay one parameter, in the student and after loading."""
    student = init_student(llama(), num_layers=2)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_mode_dtype_and_generation_config_follow_the_teacher():
    teacher = llama().to(torch.bfloat16)
    teacher.generation_config.max_new_tokens = 7
    student = init_student(teacher, num_layers=2)
    assert student.dtype == torch.bfloat16 and not student.training
    assert student.model.rotary_emb.inv_freq.dtype == torch.float32
    assert student.generation_config.max_new_tokens == 7
    assert init_student(teacher.train(), num_layers=2).training


def test_random_state_is_left_alone():
    teacher = bert()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    init_student(teacher, num_layers=2)
    assert torch.equal(before, torch.get_rng_state())


def test_map_is_even_and_logged(caplog):
    """Trap 44: no silent 'first n' for a count that is not in a table; the map is logged."""
    assert layer_map(12, 6) == [0, 2, 4, 7, 9, 11]
    assert layer_map(12, 3) == [0, 6, 11]
    assert layer_map(7, 1) == [0]
    assert layer_map(5, 5) == [0, 1, 2, 3, 4]
    for teacher in range(2, 20):
        for student in range(2, teacher + 1):
            chosen = layer_map(teacher, student)
            gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
            assert chosen[0] == 0 and chosen[-1] == teacher - 1 and len(chosen) == student
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
    with caplog.at_level(logging.INFO, logger="hf_kd.students"):
        init_student(bert(), num_layers=2)
    assert "0 <- 0, 1 <- 3" in caplog.text


def test_default_is_half():
    assert init_student(bert(5)).config.num_hidden_layers == 3


def test_chosen_layers_and_one_side_of_an_encoder_decoder():
    assert init_student(bert(), layers=[1, 2]).config.num_hidden_layers == 2
    student = init_student(bart(4, 4), num_layers={"decoder_layers": 2})
    assert (student.config.encoder_layers, student.config.decoder_layers) == (4, 2)
    teacher = bart(3, 5)
    student = init_student(teacher, layers={"decoder_layers": [0, 4], "encoder_layers": [2]})
    assert (len(student.model.encoder.layers), len(student.model.decoder.layers)) == (1, 2)
    origin = teacher.model.encoder.layers[2].fc1.weight
    assert torch.equal(student.model.encoder.layers[0].fc1.weight, origin)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 9}, "num_layers=9 does not fit a teacher of 4 layers"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"layers": "best"}, "layers='best' is not known"),
        ({"layers": [2, 1]}, "ascending"),
        ({"layers": [0, 4]}, "from 0 to 3"),
        ({"layers": [0, 1], "num_layers": 3}, "set one of the two"),
        ({"num_layers": {"decoder_layers": 2}}, "the teacher's stacks are"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        init_student(bert(), **options)


def test_refuses_a_plain_module():
    with pytest.raises(ValueError, match="merge adapters"):
        init_student(nn.Linear(2, 2), num_layers=1)


def test_refuses_shared_layers():
    """ALBERT uses one layer n times: there is no stack of layers to cut."""
    albert = tf.AlbertConfig(
        vocab_size=64, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=32,
        num_hidden_layers=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="finds no stack of layers"):
        init_student(tf.AlbertForMaskedLM(albert), num_layers=2)


def swin(depths=(2, 6)):
    config = tf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=list(depths), num_heads=[1, 2], window_size=4,
        num_channels=1,
    )  # fmt: skip
    return make(tf.SwinForImageClassification, config)


def test_pyramids_are_cut_inside_their_stages(tmp_path):
    """Trap 43: every second window of Swin is shifted by a rule; kept blocks go to places of their kind."""
    teacher = swin()
    student = init_student(teacher, num_layers=3)
    assert student.config.depths == [2, 3] and student.config.num_layers == 2
    kept = student.config.hf_kd_layers
    assert kept == {"depths.0": [0, 1], "depths.1": [0, 3, 4]}
    for i, j in enumerate(kept["depths.1"]):
        mine, origin = (m.swin.encoder.layers[1].blocks for m in (student, teacher))
        for ours, theirs in zip(mine[i].parameters(), origin[j].parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert mine[i].shift_size == origin[j].shift_size
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    pixels = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, student(pixels).logits)
        whole = init_student(teacher, num_layers={"depths.0": 2, "depths.1": 6})
        assert torch.equal(whole(pixels).logits, teacher(pixels).logits)
    assert init_student(teacher, num_layers=0.5).config.depths == [1, 3]
    with pytest.raises(ValueError, match="shift_size"):
        init_student(teacher, layers={"depths.1": [0, 2], "depths.0": [0]})


def qwen2_moe():
    config = tf.Qwen2MoeConfig(
        **LLAMA, num_hidden_layers=4, decoder_sparse_step=2, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=8,
    )  # fmt: skip
    return make(tf.Qwen2MoeForCausalLM, config)


def mixtral():
    config = tf.MixtralConfig(**LLAMA, num_hidden_layers=4, num_local_experts=3, num_experts_per_tok=2)
    return make(tf.MixtralForCausalLM, config)


def test_layers_that_a_rule_makes_keep_their_kind():
    """Trap 43: where a rule of the config, not a list, says what layer i is, the rule meets another layer."""
    teacher = qwen2_moe()
    with pytest.raises(ValueError, match="cannot be cut"):
        init_student(teacher, layers=[0, 2])
    assert init_student(teacher, layers=[0, 3]).config.num_hidden_layers == 2
    kept = init_student(teacher, num_layers=3).config.hf_kd_layers["num_hidden_layers"]
    assert kept == [0, 1, 2]  # even would be [0, 2, 3], with a dense layer where a sparse one goes


@pytest.mark.parametrize("build", [qwen2_moe, mixtral])
def test_mixture_of_experts_generates_with_a_cache(build):
    """Trap 43: experts and routers come along with their layer."""
    student = init_student(build(), num_layers=2)
    batch = {**token_batch(rows=1, length=6), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(student.generate(**batch), student.generate(**batch, use_cache=False))


def test_shares_first_and_last():
    teacher = llama(5)
    for options, kept in (
        ({"num_layers": 0.4}, [0, 4]),
        ({"num_layers": 2, "layers": "first"}, [0, 1]),
        ({"num_layers": 0.6, "layers": "last"}, [2, 3, 4]),
        ({"layers": "last"}, [2, 3, 4]),
    ):
        student = init_student(teacher, **options)
        assert remembered_layers(student.config) == {"num_hidden_layers": kept}
        origin = teacher.model.layers[kept[0]].mlp.up_proj.weight
        assert torch.equal(student.model.layers[0].mlp.up_proj.weight, origin)


@pytest.mark.parametrize("value", [1.0, 2.5, 0.0, -0.5, True, "3", float("nan")])
def test_a_size_is_a_number_or_a_share(value):
    with pytest.raises(ValueError, match="num_layers=.* is neither a number"):
        init_student(bert(), num_layers=value)


def test_the_map_of_layers_is_remembered_until_export(tmp_path):
    """The config of a saved student has it; the trainer's own save leaves it out, its checkpoints don't."""
    student = init_student(bart(4, 4), num_layers={"decoder_layers": 2})
    wanted = {"encoder_layers": [0, 1, 2, 3], "decoder_layers": [0, 3]}
    student.save_pretrained(tmp_path / "kept")
    assert tf.AutoConfig.from_pretrained(tmp_path / "kept").hf_kd_layers == wanted
    again = init_student(student, num_layers={"decoder_layers": 1})
    assert again.config.hf_kd_layers["decoder_layers"] == [0]
    args = DistillationArguments(
        output_dir=str(tmp_path / "run"), alpha=0, max_steps=1, save_steps=1, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": [1, 5, 6, 2], "labels": [5, 6, 2, -100]}] * 4
    trainer = DistillationTrainer(student, args, train_dataset=rows, task="seq2seq-lm")
    trainer.train()
    trainer.save_model()
    assert "hf_kd" not in (tmp_path / "run" / "config.json").read_text()
    assert student.config.hf_kd_layers == wanted
    assert "hf_kd_layers" in (tmp_path / "run" / "checkpoint-1" / "config.json").read_text()


def test_alternating_attention_is_kept(tmp_path):
    """Trap 43: GPT-Neo writes its pattern of attentions as a rule; the student's rule is its own list."""
    config = tf.GPTNeoConfig(
        vocab_size=64, hidden_size=16, num_layers=6, num_heads=2, attention_types=[[["global", "local"], 3]],
        max_position_embeddings=40, window_size=4,
    )  # fmt: skip
    student = init_student(make(tf.GPTNeoForCausalLM, config), num_layers=3)
    student.save_pretrained(tmp_path)
    loaded = tf.GPTNeoForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.attention_layers == ["global", "local", "local"]
    batch = token_batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, student(**batch).logits)


def test_pair_of_models_of_one_class():
    """Encoder and decoder have a config of the same class each: each stack is cut by its own."""
    sizes = {**BERT, "num_hidden_layers": 4}
    parts = tf.BertConfig(**sizes), tf.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    teacher = make(tf.EncoderDecoderModel, config)
    student = init_student(
        teacher, num_layers={"encoder.num_hidden_layers": 3, "decoder.num_hidden_layers": 2}
    )
    assert (len(student.encoder.encoder.layer), len(student.decoder.bert.encoder.layer)) == (3, 2)
    assert student.config.encoder.num_hidden_layers == 3 and student.config.decoder.num_hidden_layers == 2


def test_lists_that_happen_to_be_as_long_are_not_layers():
    """Wav2Vec2 with as many layers as convolutions: the convolutions and their settings stay whole."""
    config = tf.Wav2Vec2Config(
        vocab_size=32, hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=3,
        conv_dim=(8, 8, 8), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    student = init_student(make(tf.Wav2Vec2ForCTC, config), num_layers=2)
    assert len(student.wav2vec2.encoder.layers) == 2
    assert len(student.wav2vec2.feature_extractor.conv_layers) == 3 and len(student.config.conv_dim) == 3


def test_configs_that_name_layers_as_stages(tmp_path):
    """Trap 43: BEiT and DINOv2 list a stage per layer; a list that is too long does not load again."""
    config = tf.BeitConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=4, image_size=8,
        patch_size=4, vocab_size=10,
    )  # fmt: skip
    student = init_student(make(tf.BeitForImageClassification, config), num_layers=2)
    student.save_pretrained(tmp_path)
    assert tf.BeitForImageClassification.from_pretrained(tmp_path).config.out_features == ["stage2"]
