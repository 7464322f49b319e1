"""Losses on what lies inside the two models, as options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .fields import mapping_problems, option

LAYER_MAP_NAMES = ("auto", "even", "last", "skip")
RELATION_NAMES = ("qq", "kk", "vv")
#: Losses on layers, each with an option `<name>_weight`.
FEATURE_WEIGHTS = ("hidden", "attention", "relation", "embedding", "last_hidden")

# The options of losses on layers, and the weights under which each has an effect.
_FEATURE_OPTIONS: dict[str, tuple[str, ...]] = {
    **{f"{name}_weight": () for name in FEATURE_WEIGHTS},
    "hidden_loss": ("hidden", "embedding"),
    "attention_loss": ("attention",),
    "relations": ("relation",),
    "relation_heads": ("relation",),
    "layer_map": ("hidden", "attention", "relation", "embedding"),
}


@dataclass(kw_only=True)
class LayerOptions:
    """Losses on hidden states, attentions, relations and embeddings of paired layers."""

    hidden_weight: float = option(0.0, "weight of the loss on hidden states of paired layers")
    hidden_loss: Callable[..., Any] | str | None = option(
        "normalized_mse", "normalized_mse, mse, cosine or package.module:function"
    )
    attention_weight: float = option(0.0, "weight of the loss on attentions of paired layers")
    attention_loss: Callable[..., Any] | str | None = option(
        "kl", "kl, mse or package.module:function; reads scores before the softmax"
    )
    relation_weight: float = option(0.0, "weight of the loss on self-relations in the last paired layer")
    relations: str = option("vv", "which of them, comma-separated: qq, kk, vv")
    relation_heads: int | None = option(None, "heads that they are split into (default: the student's)")
    embedding_weight: float = option(0.0, "weight of hidden_loss on what the first layers read")
    last_hidden_weight: float = option(0.0, "weight of the cosine loss on the last hidden states")
    layer_map: dict[str, Any] | str | None = option(
        "auto", """auto, even, last, skip, or student: teacher layers as JSON: '{"-1": -1}'"""
    )

    def layer_problems(self) -> list[str]:
        """Every problem of these options, each with the option's name, its value and the fix."""
        found = []
        weights = {name: getattr(self, f"{name}_weight") for name in FEATURE_WEIGHTS}
        for name, weight in weights.items():
            if not 0.0 <= weight < math.inf:
                found.append(f"{name}_weight={weight} is not 0 or above and finite: set e.g. {name}_weight=1")
        relations = [name.strip() for name in str(self.relations).split(",")]
        if not set(relations) <= set(RELATION_NAMES) or len(set(relations)) < len(relations):
            found.append(
                f"relations={self.relations!r} is not known: use qq, kk, vv, each once, as in 'qq,kk,vv'"
            )
        if self.relation_heads is not None and self.relation_heads < 1:
            found.append(f"relation_heads={self.relation_heads} is below 1: set e.g. 12, or leave it out")
        defaults = without_features()
        for name, users in _FEATURE_OPTIONS.items():
            value = getattr(self, name)
            if value != defaults[name] and users and not any(weights[user] > 0 for user in users):
                needed = " or ".join(f"{user}_weight" for user in users)
                found.append(
                    f"{name}={value!r} has no effect while {needed} is 0: set it above 0, or drop {name}"
                )
        layer_map = self.layer_map
        if isinstance(layer_map, str) and layer_map.lstrip().startswith("{"):
            found += mapping_problems(self, ("layer_map",))
        elif not isinstance(layer_map, Mapping) and layer_map not in LAYER_MAP_NAMES:
            found.append(
                f"layer_map={layer_map!r} is not known: use one of {', '.join(LAYER_MAP_NAMES)}, or pairs of "
                """a student's and a teacher's layer, '{"0": 3, "-1": -1}'"""
            )
        return found


def without_features() -> dict[str, Any]:
    """The options of losses on layers at their defaults, under which there are none."""
    names = {spec.name: spec.default for spec in fields(LayerOptions)}
    return {name: names[name] for name in _FEATURE_OPTIONS}
