"""The head of any language model, found and checked through the model's own forward."""

from __future__ import annotations

import copy
import types

import peft
import pytest
import torch
import transformers
from torch import nn

from hf_kd.losses.fused import fused_distillation
from hf_kd.losses.heads import UnsupportedHead, find_head, head_inputs

SMALL = {
    "vocab_size": 67, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER_DECODER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 67,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 67, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": (transformers.LlamaConfig, {**SMALL, "tie_word_embeddings": True}, "CausalLM"),
    "gpt2": (transformers.GPT2Config, {"vocab_size": 67, "n_embd": 16, "n_layer": 1, "n_head": 2},
             "CausalLM"),
    "gemma2": (transformers.Gemma2Config, {**SMALL, "final_logit_softcapping": 30.0}, "CausalLM"),
    "cohere": (transformers.CohereConfig, {**SMALL, "logit_scale": 0.0625}, "CausalLM"),
    "granite": (transformers.GraniteConfig, {**SMALL, "logits_scaling": 8.0}, "CausalLM"),
    "bert": (transformers.BertConfig, SMALL, "MaskedLM"),
    "distilbert": (transformers.DistilBertConfig, {"vocab_size": 67, "dim": 16, "n_layers": 1, "n_heads": 2,
                                                   "hidden_dim": 32}, "MaskedLM"),
    "bart": (transformers.BartConfig, ENCODER_DECODER, "Seq2SeqLM"),
    "marian": (transformers.MarianConfig, ENCODER_DECODER, "Seq2SeqLM"),
    "t5": (transformers.T5Config, T5, "Seq2SeqLM"),
    "t5, untied": (transformers.T5Config, {**T5, "tie_word_embeddings": False}, "Seq2SeqLM"),
}  # fmt: skip


def make(name: str):
    config, options, kind = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config(**options)).eval()
    for module in model.modules():
        if isinstance(getattr(module, "final_logits_bias", None), torch.Tensor):
            module.final_logits_bias.normal_()
    g = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(3, 60, (2, 7), generator=g),
        "attention_mask": torch.ones(2, 7).long(),
    }
    if kind == "Seq2SeqLM":
        batch["decoder_input_ids"] = torch.randint(3, 60, (2, 5), generator=g)
    return model, batch


@pytest.mark.parametrize("name", MODELS)
def test_head_and_its_input_give_the_models_own_logits(name):
    """Trap 19: hidden states come from the model's own call; the head computes what the model does."""
    model, batch = make(name)
    wanted = model(**batch).logits
    spec = find_head(model, batch)
    with head_inputs(spec) as captured:
        model(**batch)
    hidden, head = captured[0]
    z = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    torch.testing.assert_close(z, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(**batch).logits, wanted)  # nothing is left behind


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "bart", "t5"])
def test_fused_step_has_the_dense_gradient(name):
    """Tied embeddings, soft-cap, scale and bias: all parameters get the gradient of the dense loss."""
    model, batch = make(name)
    other = copy.deepcopy(model)
    labels = (batch.get("decoder_input_ids", batch["input_ids"]) + 1).clone()
    labels[0, :2] = -100
    logits = other(**batch).logits.flatten(0, 1)
    nn.functional.cross_entropy(logits, labels.flatten()).backward()
    spec = find_head(model, batch)
    with head_inputs(spec) as captured:
        model(**batch)
    fused_distillation(*captured[0], labels=labels, alpha=0.0).loss.backward()
    for (key, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        grad = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(
            mine.grad if mine.grad is not None else grad * 0, grad, msg=key, rtol=1e-3, atol=1e-6
        )


def test_lora_on_the_head():
    """An adapter of the output embedding gets its gradient; the frozen matrix gets none."""
    model, batch = make("llama")
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    spec = find_head(model, batch)
    logits = model(**batch).logits.flatten(0, 1)
    labels = batch["input_ids"].flatten()
    wanted = torch.autograd.grad(
        nn.functional.cross_entropy(logits, labels), [p for p in model.parameters() if p.requires_grad]
    )
    with head_inputs(spec) as captured:
        model(**batch)
    fused_distillation(*captured[0], labels=batch["input_ids"], alpha=0.0).loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(found, list(wanted), rtol=1e-3, atol=1e-6)


class Odd(nn.Module):
    """A model that does something else to its logits."""

    def __init__(self, change):
        super().__init__()
        self.body, self.lm_head, self.change = nn.Embedding(9, 4), nn.Linear(4, 9), change

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        return types.SimpleNamespace(logits=self.change(self.lm_head(self.body(input_ids))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z.clamp(-20, 20), "neither a scale"),
        (lambda z: z[..., :5], "shape of its logits"),
        (lambda z: z.log_softmax(-1), "neither a scale"),
    ],
)
def test_what_is_not_understood_is_refused(change, message):
    """An unknown kind of post-processing says so; it is never approximated."""
    with pytest.raises(UnsupportedHead, match=message):
        find_head(Odd(change), {"input_ids": torch.zeros(1, 3, dtype=torch.long)})


def test_no_linear_head():
    """A model without one says so."""
    with pytest.raises(UnsupportedHead, match="no output embedding"):
        find_head(nn.Linear(2, 2), {})
    odd = Odd(lambda z: z)
    odd.lm_head = nn.Sequential(nn.Linear(4, 9))
    with pytest.raises(UnsupportedHead, match="Sequential"):
        find_head(odd, {"input_ids": torch.zeros(1, 3, dtype=torch.long)})
