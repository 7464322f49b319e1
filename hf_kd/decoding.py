"""Text sampled from a model, the same for every row whatever it is decoded with, and what the model thought.

A row's random numbers come from the seed and the row's own number, one for every token. So neither the order
of the work nor who does it decides the text, and what is interrupted goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: The most tokens of a row.
        temperature: Of the distribution that tokens are drawn from; 0: always the likeliest token.
        top_p: Draw from the likeliest tokens that have this much mass together (Holtzman et al. 2020).
        top_k: Draw from so many of the likeliest tokens; None: from all.
        seed: Of all random numbers.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def uniforms(self, row: int) -> np.ndarray:
        """`[max_new_tokens]` numbers in [0, 1) that belong to a row."""
        key = np.random.SeedSequence([self.seed, row])
        return np.random.Generator(np.random.Philox(key)).random(self.max_new_tokens)


@dataclass(frozen=True)
class Decoded:
    """One row.

    Attributes:
        tokens: What was sampled, the end token included if it came.
        seen: What `see` returned for each of the tokens, in order.
    """

    tokens: list[int]
    seen: list[Any]


#: Looks at the raw logits `[B, V]` (float32) of one step and keeps something of each row.
See = Callable[[Tensor], Sequence[Any]]


def choose(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draw a token per row by inverse transform.

    Args:
        logits: `[B, V]` raw.
        uniforms: `[B]` in [0, 1).
        sampling: Temperature, top-k and top-p, applied in this order.

    Returns:
        `[B]` token ids.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    kept, order = (
        (logits.double() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    )
    if sampling.top_k is not None:
        kept[:, sampling.top_k :] = 0.0
    mass = kept.cumsum(-1)
    if sampling.top_p < 1.0:
        # The token that reaches the mass is among those kept.
        kept = kept.masked_fill(mass - kept >= sampling.top_p * mass[:, -1:], 0.0)
        mass = kept.cumsum(-1)
    target = uniforms.to(mass).unsqueeze(1) * mass[:, -1:]
    place = torch.searchsorted(mass, target, right=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1  # rounding must not choose what has no mass
    return order.gather(1, torch.minimum(place, last)).squeeze(1)


class _Chooser(LogitsProcessor):
    """Chooses the next tokens of a batch and leaves `generate` no other choice."""

    def __init__(self, sampling: Sampling, rows: Sequence[int], see: See | None, forced: int | None) -> None:
        self.sampling, self.see, self.forced = sampling, see, forced
        self.uniforms = torch.tensor(np.stack([sampling.uniforms(row) for row in rows]))
        self.seen: list[Sequence[Any]] = []
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.chosen)
        if self.see is not None:
            self.seen.append(self.see(scores))
        if step == 0 and self.forced is not None:
            token = torch.full_like(input_ids[:, -1], self.forced)
        else:
            token = choose(scores, self.uniforms[:, step], self.sampling)
        self.chosen.append(token)
        return torch.full_like(scores, -torch.inf).scatter(1, token.unsqueeze(1), 0.0)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    sampling: Sampling,
    *,
    pad: int,
    end: Sequence[int] = (),
    see: See | None = None,
) -> list[Decoded]:
    """Sample a continuation of each prompt (a causal model) or an answer to it (sequence to sequence).

    The model's generation config decides nothing but start tokens: no repetition penalty, no suppressed
    tokens, so that what `see` is shown is the model's own distribution, before temperature, top-k and top-p.

    Args:
        model: In evaluation mode.
        prompts: Token ids, at least one each.
        rows: Number of each row, which its random numbers belong to.
        sampling: How to choose.
        pad: Fills up prompts, on the side that the model needs.
        end: Tokens that end a row.
        see: Looks at the logits of every step.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    encodes = bool(model.config.is_encoder_decoder)
    for i, prompt in enumerate(prompts):
        part = slice(0, len(prompt)) if encodes else slice(longest - len(prompt), longest)
        ids[i, part], mask[i, part] = torch.tensor(list(prompt)), 1
    own = model.generation_config
    start = {name: start_token(model, name) for name in ("bos_token_id", "decoder_start_token_id")}
    forced = getattr(own, "forced_bos_token_id", None) if encodes else None
    chooser = _Chooser(sampling, rows, see, forced)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=list(end) or None,
        use_cache=True,
        **start,
    )
    # Whatever is set there would be merged into ours.
    model.generation_config, kept = config, own
    run: Any = model.generate  # a mixin that mypy takes for a tensor
    try:
        run(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([chooser]),
        )
    finally:
        model.generation_config = kept
    chosen = torch.stack(chooser.chosen, 1).tolist()
    return [_cut(tokens, i, chooser.seen, set(end)) for i, tokens in enumerate(chosen)]


def start_token(model: PreTrainedModel, name: str) -> int | None:
    """A token that the generation config or the config names, the first of several; None: neither does."""
    for config in (model.generation_config, model.config):
        token = getattr(config, name, None)
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return None


def _cut(tokens: list[int], i: int, seen: list[Sequence[Any]], end: set[int]) -> Decoded:
    """A row up to its end; the batch went on for others."""
    length = next((n for n, token in enumerate(tokens, start=1) if token in end), len(tokens))
    return Decoded(tokens[:length], [step[i] for step in seen[:length]])
