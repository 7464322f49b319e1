"""Reading tensors inside a model while its own forward runs, at a few places only.

Hooks are there during one forward and then gone: what gradient checkpointing computes again in the backward
pass, an evaluation, or a saved model never meets them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .losses.scores import Products

#: What is seen at a tap.
Value = Tensor | Products
Kind = Literal["input", "output", "last", "scores"]

# The last part of a projection's name, as Transformers' architectures spell it.
_SEPARATE = {
    "q": ("q_proj", "query", "q_lin", "q", "query_proj", "wq", "q_attn"),
    "k": ("k_proj", "key", "k_lin", "k", "key_proj", "wk"),
    "v": ("v_proj", "value", "v_lin", "v", "value_proj", "wv"),
}
_THIRDS = ("c_attn", "Wqkv", "qkv", "qkv_proj")
_INTERLEAVED = {"gpt_neox": "query_key_value", "bloom": "query_key_value"}
_CROSS = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.IGNORECASE)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
#: The attention implementations whose scores can be seen.
SEEN_KERNELS = ("eager", "sdpa")


@dataclass(frozen=True)
class Tap:
    """One place of a model.

    Attributes:
        path: A module's name.
        kind: Its "input" or "output" `[B, L, H]` (the first of several), the "last" hidden state that it
            returns, or the attention "scores" `[B, A, L, L]` before the softmax inside it (their factors,
            where a fused kernel never holds them).
    """

    path: str
    kind: Kind


@dataclass(frozen=True)
class SelfAttention:
    """Where a layer's self-attention is.

    Attributes:
        path: The module in which its softmax is taken.
        separate: Paths of the projections to queries, keys and values; empty if there is one for all.
        joint: Path of the one projection to all three.
        interleaved: Whether its output is `[heads, 3, d]`, instead of `[3, heads, d]`.
        heads: Number of heads, by the model's config; 0 if it doesn't say.
        causal: Whether a position sees only those before it.
    """

    path: str
    separate: dict[str, str]
    joint: str
    interleaved: bool
    heads: int
    causal: bool

    def tap(self, which: str) -> Tap:
        """Where queries ("q"), keys ("k") or values ("v") come out, perhaps beside the others."""
        return Tap(self.separate.get(which, self.joint), "output")

    def take(self, which: str, values: Tensor) -> Tensor:
        """`[B, L, D]` queries, keys or values of what that tap gave."""
        if which in self.separate:
            return values
        index = "qkv".index(which)
        if not self.interleaved:
            return values.chunk(3, dim=-1)[index]
        split = values.reshape(*values.shape[:-1], self.heads, 3, -1)
        return split[..., index, :].reshape(*values.shape[:-1], -1)


def find_self_attention(model: nn.Module, layer: str, config: Any) -> SelfAttention:
    """Find a layer's self-attention by the names of its projections.

    Args:
        model: The model.
        layer: Path of the layer.
        config: The config of the layer's stack.

    Raises:
        ValueError: If it has none that is known.
    """
    modules = {
        path: module
        for path, module in model.get_submodule(layer).named_modules(prefix=layer)
        if not _CROSS.search(path.removeprefix(layer))
    }
    heads = getattr(config, "num_attention_heads", 0) or 0
    found: dict[str, str] = {}
    for which, names in _SEPARATE.items():
        found[which] = next((path for path in modules if path.rsplit(".", 1)[-1] in names), "")
    joint = next((path for path in modules if path.rsplit(".", 1)[-1] in _THIRDS), "")
    interleaved = False
    name = _INTERLEAVED.get(getattr(config, "model_type", ""))
    if name is not None and heads:
        joint = next((path for path in modules if path.endswith(f".{name}")), "")
        interleaved = bool(joint)
    if joint and not interleaved and (getattr(config, "num_key_value_heads", None) or heads) != heads:
        joint = ""  # queries are wider than keys and values
    if all(found.values()):
        joint = ""
    elif not joint:
        raise ValueError(
            f"attention_weight and relation_weight look for a self-attention in {layer!r} "
            f"({type(model.get_submodule(layer)).__name__}), by the names of its projections to queries, "
            f"keys and values ({', '.join(_SEPARATE['q'][:4])}, ..., or one for all, {', '.join(_THIRDS)}), "
            "but find none. Set both to 0 and use hidden_weight, which every layer has."
        )
    owner = (joint or found["v"]).rsplit(".", 1)[0]
    module = modules.get(owner)
    causal = bool(getattr(module, "is_causal", False))
    return SelfAttention(owner, {} if joint else found, joint, interleaved, heads, causal)


def uncrossed(path: str) -> bool:
    """Whether a module's name is not that of a cross-attention."""
    return not _CROSS.search(path)


@contextlib.contextmanager
def tapped(model: nn.Module, taps: Sequence[Tap], into: dict[Tap, Value]) -> Iterator[None]:
    """Fill `into` with what a forward of the model has at each tap (at its first call, if several)."""
    with contextlib.ExitStack() as stack:
        for tap in taps:
            module = model.get_submodule(tap.path)
            for handle in _hooks(module, tap, into):
                stack.callback(handle.remove)
        yield


def _hooks(module: nn.Module, tap: Tap, into: dict[Tap, Value]) -> list[Any]:
    if tap.kind == "input":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into.setdefault(tap, args[0] if args else kwargs["hidden_states"])

        return [module.register_forward_pre_hook(before, with_kwargs=True)]
    if tap.kind == "scores":
        mode = _Scores(tap, into)
        return [
            module.register_forward_pre_hook(lambda *_: mode.start()),
            module.register_forward_hook(lambda *_: mode.stop(), always_call=True),
        ]

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        value = output if isinstance(output, Tensor) else output[0]
        if tap.kind == "last" and not isinstance(output, Tensor):
            value = getattr(output, "last_hidden_state", value)
        into.setdefault(tap, value)

    return [module.register_forward_hook(after)]


class _Scores(TorchFunctionMode):
    """Keeps the input of the first four-dimensional softmax, or of fused attention: before any dropout."""

    def __init__(self, tap: Tap, into: dict[Tap, Value]) -> None:
        super().__init__()
        self._tap, self._into = tap, into

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _SOFTMAX:
            scores = args[0] if args else given["input"]
            if scores.ndim == 4:
                self._into.setdefault(self._tap, scores)
        elif func is F.scaled_dot_product_attention and self._tap not in self._into:
            self._into[self._tap] = Products.of_call(*args, **given)
        return func(*args, **given)
