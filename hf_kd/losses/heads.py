"""The output layer of a Transformers model, and its input, through the model's own forward.

Nothing of a model is written again here: the output embedding is found by the model's own
`get_output_embeddings`, and what happens to the logits afterwards (a scale, a soft-cap, a bias) is observed:
known logits are put in the head's place, and the model's answer is compared with each form that `Head` can
express. A model that does anything else is refused, with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .tiles import Head

__all__ = ["HeadSpec", "UnsupportedHead", "find_head", "head_inputs", "tied"]

# Far above and below any soft-cap in use, so that one can't be taken for the identity.
_PROBE_STD = 40.0


class UnsupportedHead(ValueError):
    """The model's logits can't be computed from the input of a linear layer; the message says why."""


@dataclass(frozen=True)
class HeadSpec:
    """Where a model's output layer is, and what follows it.

    Attributes:
        linear: The output embedding, inside the model.
        scale: Factor of its output.
        softcap: Bound of the logits, or None.
        bias_owner: The module whose `final_logits_bias` `[1, V]` is added to the logits, or None.
    """

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    bias_owner: nn.Module | None = None

    def head(self, *, bias: Any = None) -> Head:
        """The head as it is now: its tensors are the parameters themselves, so gradients reach them.

        Args:
            bias: What is added to the logits, `[1, V]`; by default that of `bias_owner`.
        """
        extra: Any = bias
        if extra is None and self.bias_owner is not None:
            extra = self.bias_owner.final_logits_bias
        weight, bias = _weight_and_bias(self.linear)
        if extra is not None:
            bias = extra.reshape(-1) if bias is None else bias + extra.reshape(-1)
        return Head(weight, bias, self.softcap, self.scale)


def find_head(model: nn.Module, batch: Mapping[str, Any]) -> HeadSpec:
    """Find a language model's output layer.

    Args:
        model: A Transformers model, not wrapped; with or without PEFT adapters.
        batch: Arguments of its forward, a few tokens of one row are enough; `labels` are left out.

    Returns:
        What `head_inputs` and the fused loss need.

    Raises:
        UnsupportedHead: If the logits are not a linear layer's, or something unknown follows it.
    """
    getter = getattr(model, "get_output_embeddings", None)
    linear = None if getter is None else getter()
    if linear is None:
        raise UnsupportedHead(f"{type(model).__name__} has no output embedding.")
    _weight_and_bias(linear)
    probe, answer, own, output = _probe(model, linear, batch)
    if own.shape != output.shape or not torch.allclose(own.float(), output.float(), rtol=1e-2, atol=1e-2):
        raise UnsupportedHead(
            f"The output layer of {type(model).__name__} adds something to its linear part."
        )
    if answer.shape != probe.shape:
        raise UnsupportedHead(
            f"{type(model).__name__} changes the shape of its logits, from {tuple(probe.shape)} to "
            f"{tuple(answer.shape)}."
        )
    spec = _recognise(model, linear, probe.float(), answer.float())
    if spec is None:
        raise UnsupportedHead(
            f"{type(model).__name__} does something to its logits that is neither a scale, a soft-cap nor a "
            "bias."
        )
    return spec


@contextlib.contextmanager
def head_inputs(spec: HeadSpec, read: Callable[[Tensor, Head], Any] | None = None) -> Iterator[list[Any]]:
    """Let the model's own forward stop short of its logits.

    Within the context, each call of the model, however it is wrapped, adds to the list the hidden states
    `[..., H]` that its head was given, with their graph, and the head as it was then: where FSDP shards the
    parameters, they are whole only in the forward. Its `logits` are placeholders with one class. Call it
    without `labels`.

    Args:
        spec: The head.
        read: Where the parameters are in pieces again once the head's forward is over (ZeRO-3): what to make
            of hidden states and head within it, added to the list instead. A gradient reaches the head only
            if what is differentiated is `tied` to the placeholder.
    """
    captured: list[Any] = []

    def stand_in(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        head = spec.head(bias=extra)
        captured.append((hidden, head) if read is None else read(hidden, head))
        if read is not None and hidden.requires_grad:
            return hidden[..., :1]
        # DDP looks for unused parameters in the graph of what the forward returns: the head's must be there.
        touched = [p.reshape(-1)[:1].sum() for p in spec.linear.parameters() if p.requires_grad]
        return hidden[..., :1] + sum(touched, hidden.new_zeros(()))

    extra = None if spec.bias_owner is None else spec.bias_owner.final_logits_bias
    with contextlib.ExitStack() as stack:
        stack.enter_context(_patched(spec.linear, "forward", stand_in))
        if spec.bias_owner is not None:
            owner = spec.bias_owner
            bias = owner.final_logits_bias
            assert isinstance(bias, Tensor)
            owner.final_logits_bias = bias.new_zeros(1, 1)
            stack.callback(setattr, owner, "final_logits_bias", bias)
        yield captured


def tied(value: Tensor, placeholder: Tensor) -> Tensor:
    """`value`, whose gradient passes the placeholder first, with 0 for it.

    An engine that gathers parameters for a layer's backward does so when a gradient reaches that layer's
    output; without this, none would.
    """
    if not (value.requires_grad and placeholder.requires_grad):
        return value
    return _Tied.apply(value, placeholder)


class _Tied(torch.autograd.Function):
    """The first of two tensors; the second gets a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, placeholder: Tensor) -> Tensor:
        ctx.like = placeholder.shape, placeholder.dtype, placeholder.device
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return gradients[0], torch.zeros(shape, dtype=dtype, device=device)


@contextlib.contextmanager
def _patched(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one instance for a while."""
    had = name in module.__dict__
    before = module.__dict__.get(name)
    module.__dict__[name] = function
    try:
        yield
    finally:
        if had:
            module.__dict__[name] = before
        else:
            del module.__dict__[name]


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The effective matrix of a linear layer, adapters included, with its graph."""
    if _plain(linear):
        return linear.weight, linear.bias  # type: ignore[return-value]
    wrapped: Any = getattr(linear, "modules_to_save", None)
    if wrapped is not None:  # PEFT trains a copy of the whole layer
        active: Any = linear.active_adapter
        return _weight_and_bias(wrapped[active if isinstance(active, str) else active[0]])
    base = getattr(linear, "base_layer", None)
    delta = getattr(linear, "get_delta_weight", None)
    if base is None or not _plain(base) or delta is None:
        raise UnsupportedHead(f"The output embedding is a {type(linear).__name__}, not a linear layer.")
    weight = base.weight
    if getattr(linear, "merged", False) or getattr(linear, "disable_adapters", False):
        return weight, base.bias
    dropouts: Any = getattr(linear, "lora_dropout", {})
    for adapter in linear.active_adapters:  # type: ignore[union-attr]
        if adapter not in getattr(linear, "lora_A", {}):
            continue
        if getattr(dropouts[adapter], "p", 0):
            raise UnsupportedHead(
                "The LoRA adapter of the output embedding has dropout, which acts per token."
            )
        weight = weight + delta(adapter)
    return weight, base.bias


def _plain(linear: nn.Module) -> bool:
    """Whether a layer is a linear one and nothing else; what FSDP 2 shards has a class of its own."""
    kinds = type(linear).__bases__ if isinstance(linear, FSDPModule) else (type(linear),)
    return nn.Linear in kinds


def _probe(
    model: nn.Module, linear: nn.Module, batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the model with known logits in the head's place.

    Returns:
        The known logits, the model's `logits`, the output of the head's linear part, and its true output.
    """
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    forward = linear.forward

    def substitute(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Not a hook after the forward: where FSDP shards the layer, its parameters are in pieces again there.
        output = forward(hidden, *args, **kwargs)
        g = torch.Generator().manual_seed(0)
        known = torch.randn(output.shape, generator=g).mul_(_PROBE_STD).to(output)
        weight, bias = _weight_and_bias(linear)
        own_bias = None if bias is None else bias.to(hidden.dtype)
        calls.append((known, nn.functional.linear(hidden, weight.to(hidden.dtype), own_bias), output))
        return known.clone()

    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _patched(linear, "forward", substitute):
            outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        model.train(training)
    if len(calls) != 1:
        raise UnsupportedHead(
            f"{type(model).__name__} called its output embedding {len(calls)} times, not once."
        )
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedHead(f"{type(model).__name__} returns no `logits`.")
    known, own, output = calls[0]
    return known, logits, own, output


def _recognise(model: nn.Module, linear: nn.Module, z: Tensor, y: Tensor) -> HeadSpec | None:
    """Which of the known forms maps `z` to `y`."""
    tolerance = 2e-2 if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else 1e-4

    def same(candidate: Tensor) -> bool:
        return torch.allclose(y, candidate, rtol=tolerance, atol=tolerance * _PROBE_STD / 10)

    for owner in model.modules():
        bias = getattr(owner, "final_logits_bias", None)
        if isinstance(bias, Tensor) and bias.numel() == z.shape[-1] and same(z + bias.reshape(-1).float()):
            return HeadSpec(linear, bias_owner=owner)
    if same(z):
        return HeadSpec(linear)
    scale = _configured(model, z, y)
    if scale is not None and same(z * scale):
        return HeadSpec(linear, scale=scale)
    for cap in _numbers(model, "softcap"):
        # Near 0 a soft-cap is the identity, which leaves the scale.
        small = z.abs() < 0.02 * cap
        factor = float((y[small] / z[small]).median()) if bool(small.any()) else 1.0
        for guess in (1.0, factor):
            if same(cap * torch.tanh(guess * z / cap)):
                return HeadSpec(linear, scale=guess, softcap=cap)
    return None


def _configured(model: nn.Module, z: Tensor, y: Tensor) -> float | None:
    """The factor between logits, taken from the config where a number there is the one observed."""
    large = z.abs() > 1
    if not bool(large.any()):
        return None
    factor = float((y[large] / z[large]).median())
    for number in _numbers(model, "logit"):
        for guess in (number, 1 / number):
            if abs(guess - factor) <= 2e-2 * abs(factor):
                return guess
    return factor if factor else None


def _numbers(model: nn.Module, part: str) -> list[float]:
    """Positive numbers of the model's config whose name contains a word."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return []
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = config.to_dict().items()
    return [
        float(v) for k, v in values if part in k and isinstance(v, int | float) and v is not True and v > 0
    ]
