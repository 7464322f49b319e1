"""`init_student`: a smaller model of the teacher's class that starts from the teacher's weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from . import depth, vocabulary
from .depth import Ranking, Stack
from .importance import Calibration, batches_of, block_influence, mean_loss
from .memory import VOCABULARY
from .plan import Plan
from .search import Target, search
from .sizes import Size
from .weights import fill, refuse_unreadable
from .width import OPTIONS

logger = logging.getLogger(__name__)

_Size = Size | Mapping[str, Size] | None


def init_student(
    teacher: PreTrainedModel,
    *,
    num_layers: _Size = None,
    layers: str | Sequence[int] | Mapping[str, Sequence[int]] = "even",
    hidden_size: _Size = None,
    num_attention_heads: _Size = None,
    num_key_value_heads: _Size = None,
    intermediate_size: _Size = None,
    vocab: Sequence[int] | None = None,
    max_parameters: Size | None = None,
    max_bytes: Size | None = None,
    max_latency_ms: float | None = None,
    calibration: Calibration | None = None,
    importance: str = "influence",
    seed: int = 0,
) -> PreTrainedModel:
    """Make a smaller model of the teacher's class out of the teacher's weights.

    **Depth** works for every model whose stack of layers is a module list as long as its config's layer
    count: encoders, decoders and encoder-decoders, and the stages of a pyramid (Swin), whatever the head.
    Layer indices, per-layer settings such as `layer_types`, tied weights and the generation config follow.
    **Width** cuts heads, feed-forward and hidden channels; which axis of which weight is what is found from
    the config (see `hf_kd.students.axes`), and every weight on the residual stream keeps the same hidden
    channels. Whole heads are kept or dropped: a model whose heads fill its hidden size (BERT, ViT, GPT-2)
    takes hidden sizes that are multiples of a head's width, and loses heads with them.
    **Targets** (`max_...`) search the depth and widths that are not given, on the meta device; what was tried
    and why one was chosen is logged (see `hf_kd.students.search`).

    The student has the teacher's class, dtype, device and train or eval mode, shares no memory with it, and
    loads with `from_pretrained` like any other. `student.config.hf_kd_layers` keeps the map of layers, and
    `hf_kd_vocabulary` that of tokens, until the trainer exports the student.

    Args:
        teacher: The model to cut; it is not changed.
        num_layers: Layers to keep: a number, or a share of the teacher's between 0 and 1, as for all sizes
            here. Default: all where another size is given, else half of them, rounded up. One number is for
            every stack of the model (and is the most that a stage of a pyramid keeps); a mapping names them
            by config option: `{"encoder_layers": 6, "decoder_layers": 0.5}`, `{"depths.2": 2}`.
        layers: `"even"` (see `layer_map`), `"first"`, `"last"`, `"importance"` (needs `calibration`), or the
            teacher layers to keep, in ascending order; for several stacks a mapping as above. Where a rule of
            the config says what layer i is, "even" takes the nearest layers of the kind of their new place.
        hidden_size: Channels of the residual stream; a mapping (`{"text_config.hidden_size": 64}`) for
            models of several parts.
        num_attention_heads: Query heads, where a head's width is an option of its own (Llama, Qwen, T5).
        num_key_value_heads: Default: as many query heads for each as in the teacher, if that divides.
        intermediate_size: Feed-forward channels.
        vocab: Ids of the tokens to keep, in the student's order; see `trim_vocabulary`.
        max_parameters: The most parameters, each counted once; or a share of the teacher's.
        max_bytes: The most bytes of its weights in the teacher's dtype, or a share of the teacher's.
        max_latency_ms: The most milliseconds of a forward pass of one row on the teacher's device: the first
            of `calibration`, or a made-up one. Some shapes are built with random weights and timed.
        calibration: A batch of model inputs, or several. With it channels are kept by importance
            (`E[x^2] * |w|^2` where they are read), without it the first ones; with labels, the loss of
            teacher, student, and a student of random weights is logged before any training.
        importance: Of layers: `"influence"` (block influence) or `"loss"` (the loss without the layer).
        seed: Of the random weights that the student is compared with.

    Returns:
        A smaller model of the same class.

    Raises:
        ValueError: If a size does not fit the teacher, nothing meets a target, or the model cannot be cut
            without changing what the remaining weights compute.
    """
    refuse_unreadable(teacher)
    widths: dict[str, Any] = {
        "hidden": hidden_size,
        "heads": num_attention_heads,
        "kv": num_key_value_heads,
        "ffn": intermediate_size,
    }
    batches = [] if calibration is None else batches_of(calibration)
    narrow = any(size is not None for size in widths.values()) or vocab is not None
    stacks = depth.find_stacks(teacher)
    if not stacks and not (narrow and num_layers is None):
        raise ValueError(
            f"init_student finds no stack of layers in {type(teacher).__name__}: none of its module lists is "
            "as long as a layer count of its config. Give a smaller checkpoint as student, or student_config"
        )
    rankings = _rankings(teacher, stacks, batches, importance)
    target = Target(max_parameters, max_bytes, max_latency_ms)
    if target != Target():
        found = search(
            teacher,
            stacks,
            target,
            num_layers=num_layers,
            layers=layers,
            rankings=rankings,
            widths=widths,
            vocab=vocab,
            batches=batches,
        )
        found.log()
        num_layers = found.chosen.layers if isinstance(layers, str) else None
        searched = found.chosen.widths
        widths = {k: searched.get(OPTIONS[k]) if size is None else size for k, size in widths.items()}
        narrow = narrow or bool(searched)
    if num_layers is None and isinstance(layers, str):
        num_layers = {s.option: s.count if narrow else (s.count + 1) // 2 for s in stacks}
    cuts = depth.choose_layers(stacks, num_layers, layers, rankings)
    plan = Plan(teacher, stacks, cuts, may_move=layers == "even")
    if narrow:
        plan.narrow(widths, vocab, batches)
    student = plan.build()
    plan.log()
    if batches:
        initial_losses(teacher, student, batches, seed=seed)
    return student


def initial_losses(
    teacher: PreTrainedModel, student: PreTrainedModel, calibration: Calibration, *, seed: int = 0
) -> dict[str, float]:
    """The models' own losses on labelled batches, before any training; logged.

    Args:
        teacher: The whole model.
        student: From `init_student`.
        calibration: Batches with labels, in the teacher's token ids.
        seed: Of the random weights.

    Returns:
        `"teacher"`, `"student"`, and `"random"`: a model of the student's shape with random weights. Empty
        where the batches have no labels, or tokens that the student does not have.
    """
    batches = batches_of(calibration)
    vocab = getattr(student.config, VOCABULARY, None)
    own = batches if vocab is None else [vocabulary.to_student(batch, vocab) for batch in batches]
    known = [batch for batch in own if batch is not None]
    loss = mean_loss(student, known) if len(known) == len(own) else None
    if loss is None:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random: Any = type(student)(student.config)
    random = random.to(student.device, student.dtype)
    found = {"teacher": mean_loss(teacher, batches), "student": loss, "random": mean_loss(random, known)}
    values = {name: value for name, value in found.items() if value is not None}
    text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    logger.info("loss on the calibration data before training: %s", text)
    return values


def _rankings(
    teacher: PreTrainedModel, stacks: Sequence[Stack], batches: Sequence[Mapping[str, Any]], importance: str
) -> dict[str, Ranking]:
    def important(path: str, count: int) -> list[int]:
        if not batches:
            raise ValueError("layers='importance' is measured: give calibration, a batch of model inputs")
        if importance not in _IMPORTANCE:
            raise ValueError(f"importance={importance!r} is not known: use one of {', '.join(_IMPORTANCE)}")
        scores = _IMPORTANCE[importance](teacher, stacks, path, batches)
        depth.layer_map(len(scores), count)  # refuses a count that does not fit
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
        logger.info("importance of %s: %s", path, ", ".join(f"{score:.3g}" for score in scores))
        return sorted(best)

    return {
        "even": depth.even(stacks),
        "first": depth.ends(stacks, last=False),
        "last": depth.ends(stacks, last=True),
        "importance": important,
    }


def _influence(
    teacher: PreTrainedModel, _: Sequence[Stack], path: str, batches: Sequence[Mapping[str, Any]]
) -> list[float]:
    return block_influence(teacher, [path], batches)[path]


def _loss_without(
    teacher: PreTrainedModel, stacks: Sequence[Stack], path: str, batches: Sequence[Mapping[str, Any]]
) -> list[float]:
    """The loss of the model without each layer; the models share the teacher's weights."""
    whole = {stack.module: list(range(stack.count)) for stack in stacks}
    losses = []
    for skipped in whole[path]:
        cuts = {**whole, path: [i for i in whole[path] if i != skipped]}
        model = Plan(teacher, stacks, cuts, may_move=False).model
        fill(teacher, model, cuts, lambda _, tensor: tensor)
        loss = mean_loss(model, batches)
        if loss is None:
            raise ValueError("importance='loss' needs labels in the calibration batches")
        losses.append(loss)
    return losses


_IMPORTANCE = {"influence": _influence, "loss": _loss_without}
