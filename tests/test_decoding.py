"""Sampling: the right distribution, the model's own logits, the same text whoever decodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_kd.decoding import Decoded, Sampling, choose, decode, start_token
from tests.served import VOCABULARY, tiny_llama

PROMPTS = [[1, 5, 7, 9], [1], [1, 11]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        initializer_factor=3.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def keep(logits: Tensor) -> list[Tensor]:
    return list(logits.clone())


def rows(model: Any, which: list[int], **settings: Any) -> list[Decoded]:
    sampling = Sampling(**{"max_new_tokens": 8, "seed": 3, **settings})
    return decode(model, [PROMPTS[i % 3] for i in which], which, sampling, pad=0, end=[2], see=keep)


def test_a_row_is_the_same_in_any_company(model: Any) -> None:
    """Alone, in another order, beside longer prompts: the text of a row is a function of seed and number."""
    together = rows(model, [0, 1, 2, 3])
    assert [row.tokens for row in rows(model, [3, 1])] == [together[3].tokens, together[1].tokens]
    assert rows(model, [2])[0].tokens == together[2].tokens
    assert together[0].tokens != together[3].tokens  # the same prompt, another row
    assert rows(model, [0], seed=4)[0].tokens != together[0].tokens


def test_what_is_seen_are_the_raw_logits_of_each_token(model: Any) -> None:
    """Whatever warps the sampling: temperature, top-k and top-p don't touch the distribution that is kept."""
    for row, prompt in zip(rows(model, [0, 1, 2], temperature=0.3, top_k=5, top_p=0.5), PROMPTS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *row.tokens]])).logits[0]
        expected = logits[len(prompt) - 1 : -1]
        assert len(row.seen) == len(row.tokens)
        torch.testing.assert_close(torch.stack(row.seen), expected, atol=2e-5, rtol=1e-4)


def test_sequence_to_sequence_sees_the_decoders_logits() -> None:
    t5 = tiny_t5()
    prompts = [[4, 5, 6, 1], [7, 1]]
    made = decode(t5, prompts, [0, 1], Sampling(max_new_tokens=5), pad=0, end=[1], see=keep)
    for prompt, row in zip(prompts, made, strict=True):
        with torch.no_grad():
            logits = t5(input_ids=torch.tensor([prompt]), labels=torch.tensor([row.tokens])).logits[0]
        torch.testing.assert_close(torch.stack(row.seen), logits, atol=2e-5, rtol=1e-4)


def test_a_forced_first_token_is_forced() -> None:
    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(
        ("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 16
    )
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    bart = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **sizes, **heads)).eval()
    bart.generation_config.forced_bos_token_id = 33
    made = decode(bart, [[4, 5]], [0], Sampling(max_new_tokens=3), pad=1, end=[2])
    assert made[0].tokens[0] == 33


def test_the_end_token_ends_a_row(model: Any) -> None:
    likeliest = rows(model, [0, 1], temperature=0.0)
    end = likeliest[0].tokens[2]
    made = decode(model, PROMPTS[:2], [0, 1], Sampling(8, temperature=0.0), pad=0, end=[end], see=keep)
    first = likeliest[0].tokens.index(end) + 1
    assert made[0].tokens == likeliest[0].tokens[:first]
    assert len(made[0].seen) == first
    if end not in likeliest[1].tokens:
        assert made[1].tokens == likeliest[1].tokens


def test_the_generation_config_has_no_say_and_stays_as_it_was(model: Any) -> None:
    before = [row.tokens for row in rows(model, [0, 1, 2])]
    own = model.generation_config
    model.generation_config = GenerationConfig(
        **{
            **own.to_dict(),
            "repetition_penalty": 9.0,
            "suppress_tokens": before[0],
            "num_beams": 3,
            "max_length": 2,
        }
    )
    changed = model.generation_config.to_dict()
    assert [row.tokens for row in rows(model, [0, 1, 2])] == before
    assert model.generation_config.to_dict() == changed
    model.generation_config = own


def test_temperature_zero_takes_the_likeliest(model: Any) -> None:
    made = rows(model, [0, 1, 2], temperature=0.0)
    theirs = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    assert made[0].tokens == theirs[0, 4:].tolist()[: len(made[0].tokens)]


def frequencies(logits: Tensor, **settings: Any) -> np.ndarray:
    """How often each token is chosen, over evenly spread random numbers."""
    count = 4000
    uniforms = (torch.arange(count) + 0.5) / count
    chosen = choose(logits.expand(count, -1), uniforms, Sampling(max_new_tokens=1, **settings))
    return np.bincount(chosen.numpy(), minlength=logits.shape[-1]) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_have_the_models_probabilities(temperature: float) -> None:
    logits = torch.tensor([1.0, -2.0, 3.0, 0.0, 2.9, -torch.inf])
    found = frequencies(logits, temperature=temperature)
    np.testing.assert_allclose(found, (logits.double() / temperature).softmax(-1), atol=5e-4)
    assert found[5] == 0.0


def test_top_k_and_top_p_leave_out_the_rest() -> None:
    p = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
    logits = torch.tensor(p).log()
    np.testing.assert_allclose(frequencies(logits, top_k=2), np.array([0, 0.4, 0, 0.25, 0]) / 0.65, atol=5e-4)
    # 0.4 and 0.25 have less than 0.7; the token that reaches it is kept.
    np.testing.assert_allclose(
        frequencies(logits, top_p=0.7), np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85, atol=5e-4
    )
    np.testing.assert_allclose(frequencies(logits, top_p=0.05), [0, 1, 0, 0, 0])
    # top-p is of what top-k left
    np.testing.assert_allclose(
        frequencies(logits, top_k=3, top_p=0.7), np.array([0, 0.4, 0, 0.25, 0]) / 0.65, atol=5e-4
    )


def test_random_numbers_are_a_rows_own() -> None:
    sampling = Sampling(max_new_tokens=4000, seed=1)
    one = sampling.uniforms(0)
    assert np.array_equal(one, sampling.uniforms(0))
    assert abs(one.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(one, sampling.uniforms(1))[0, 1]) < 0.06
    assert np.array_equal(one[:10], Sampling(max_new_tokens=10, seed=1).uniforms(0))


def test_start_tokens(model: Any) -> None:
    assert start_token(model, "bos_token_id") == 1
    assert start_token(model, "decoder_start_token_id") is None
