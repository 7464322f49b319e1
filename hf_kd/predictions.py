"""What `compute_metrics` sees of the student: its outputs, or text that it generates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .teachers.signal import named_logits

_EVALUATION_ARGUMENTS = ("eval_dataset", "test_dataset", "ignore_keys", "metric_key_prefix")


def predictions(outputs: Any, names: tuple[str, ...], config: Any, ignore_keys: Iterable[str] | None) -> Any:
    """A model's outputs for metrics, without cache, hidden states and attentions.

    Args:
        outputs: What the student returned.
        names: The task's logits, for models that return tuples.
        config: The student's, whose `keys_to_ignore_at_inference` are left out.
        ignore_keys: What to leave out instead.

    Returns:
        One tensor, or a tuple of several.
    """
    if isinstance(outputs, Tensor):
        return outputs.detach()
    if not isinstance(outputs, Mapping):
        return tuple(named_logits(outputs, names).values())
    if ignore_keys is None:
        ignore_keys = [*getattr(config, "keys_to_ignore_at_inference", ()), "past_key_values"]
        # A config may ask for these; gathered over a data set they would fill the memory.
        ignore_keys += [key for key in outputs if key.endswith(("hidden_states", "attentions"))]
        # The two halves of a student with a distillation token; `logits` is their mean.
        ignore_keys += ["cls_logits", "distillation_logits"]
    kept = tuple(value for key, value in outputs.items() if key not in {"loss", *ignore_keys})
    return kept[0] if len(kept) == 1 else kept


class Generation:
    """How an evaluation generates, if it does.

    Args:
        wanted: The option `predict_with_generate`.
        max_length: Length of the text in tokens; None: the model's own.
        num_beams: Number of beams; None: the model's own.
    """

    def __init__(self, wanted: bool, *, max_length: int | None, num_beams: int | None) -> None:
        """Keep the options."""
        self.wanted = wanted
        self._defaults = {"max_length": max_length, "num_beams": num_beams}
        self._options: dict[str, Any] = dict(self._defaults)

    def take(self, arguments: dict[str, Any]) -> None:
        """Take the generation options out of the keyword arguments of `evaluate` or `predict`.

        Raises:
            ValueError: If there are any, but nothing is generated.
        """
        own = {k: arguments.pop(k) for k in list(arguments) if k not in _EVALUATION_ARGUMENTS}
        if own and not self.wanted:
            raise ValueError(
                f"{sorted(own)} are for generation; set predict_with_generate=True, or leave them out."
            )
        self._options = {**self._defaults, **own}
        if "max_new_tokens" in own:
            self._options["max_length"] = None

    @torch.no_grad()
    def __call__(self, student: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Generate from a batch whose labels and decoder inputs are left out: nothing is given away.

        Returns:
            `[B, L]` token ids, padded on the right to `max_length`, if that is set.

        Raises:
            ValueError: If the model does not generate.
        """
        generate: Any = getattr(student, "generate", None)
        if generate is None:
            raise ValueError(
                f"predict_with_generate=True needs a model that generates, but {type(student).__name__} does "
                "not; set it to False."
            )
        answers = ("labels", "decoder_input_ids", "decoder_attention_mask")
        given = {k: v for k, v in inputs.items() if k not in answers}
        tokens = generate(**given, **{k: v for k, v in self._options.items() if v is not None})
        pad = getattr(getattr(student, "generation_config", None), "pad_token_id", None) or 0
        return F.pad(tokens, (0, max((self._options["max_length"] or 0) - tokens.shape[1], 0)), value=pad)
