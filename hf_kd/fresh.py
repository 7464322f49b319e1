"""Models with random weights: a student like its teacher but for some sizes, or any model from a config."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kd.tasks import TASKS

# Options that every config takes, though most do not declare them.
_EVERY_CONFIG = (
    "num_labels",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
)


def fresh_student(
    teacher: PreTrainedModel, overrides: Mapping[str, Any], *, seed: int = 0
) -> PreTrainedModel:
    """A student of the teacher's class and head with other sizes and random weights (float32).

    Args:
        teacher: Only its class and config are used.
        overrides: Config options that differ, e.g. `{"hidden_size": 64, "num_hidden_layers": 2}`. What the
            teacher's config derived from other options (such as the size of a head) is derived again.
        seed: Of the random weights; the state of torch's generator is left as it was.

    Raises:
        ValueError: If an option is not one of the config's, naming the nearest.
    """
    kind = type(teacher.config)
    if overrides.get("model_type", kind.model_type) != kind.model_type:
        raise ValueError(
            f"student_config names model_type={overrides['model_type']!r} but the teacher is "
            f"{kind.model_type!r}: a fresh student is of the teacher's kind, use build_model for another"
        )
    config = _derive_config(teacher.config, overrides, "student_config")
    return _seeded(type(teacher), config, seed)


def build_model(
    config: Mapping[str, Any],
    *,
    task: str,
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    problem_type: str | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    option: str = "teacher_config",
) -> PreTrainedModel:
    """A model with random weights from a config dict with a `model_type`, under the head of a task.

    Args:
        config: `{"model_type": "vit", "hidden_size": 64, ...}`.
        task: A key of `hf_kd.tasks.TASKS`.
        label_names: Names of the classes in order; they also set their number.
        num_labels: Number of outputs where there are no names.
        problem_type: Kind of classification, as in Transformers.
        tokenizer: Gives `vocab_size` and the ids of special tokens, where `config` does not.
        seed: Of the random weights; the state of torch's generator is left as it was.
        option: What an error calls `config`.

    Raises:
        ValueError: If `model_type` is missing or unknown, or an option is not one of its config's.
    """
    values = dict(config)
    model_type = values.pop("model_type", None)
    known_types = list(transformers.CONFIG_MAPPING)
    if model_type not in known_types:
        raise ValueError(
            f"{option} has model_type={model_type!r}, which Transformers does not know"
            + _nearest(model_type, known_types)
        )
    kind = transformers.CONFIG_MAPPING[model_type]
    _check_keys(kind, values, option)
    for name, value in _tokenizer_values(tokenizer).items():
        if name in _known_keys(kind):
            values.setdefault(name, value)
    if label_names:
        values["id2label"] = dict(enumerate(label_names))
        values["label2id"] = {name: i for i, name in enumerate(label_names)}
    elif num_labels is not None:
        values["num_labels"] = num_labels
    if problem_type is not None:
        values["problem_type"] = problem_type
    auto_class = getattr(transformers, TASKS[task].auto_class)
    return _seeded(auto_class.from_config, _make_config(kind, values, option), seed)


def _seeded(make: Any, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = make(config)
    return model


def _derive_config(config: PreTrainedConfig, overrides: Mapping[str, Any], option: str) -> PreTrainedConfig:
    """`config` with overrides; values that the config's class derives when left out are derived again."""
    kind = type(config)
    _check_keys(kind, overrides, option, config.to_dict())
    wanted = {kind.attribute_map.get(name, name): value for name, value in overrides.items()}
    values = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "transformers_version", "dtype", *wanted):
        values.pop(name, None)
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is None and values.get(name) is not None:
            without = {key: value for key, value in config.to_dict().items() if key != name}
            if getattr(kind.from_dict(without), name, None) == values[name]:
                del values[name]
    for name, value in wanted.items():
        child = getattr(config, name, None)
        if isinstance(child, PreTrainedConfig) and isinstance(value, Mapping):
            wanted[name] = _derive_config(child, value, f"{option}.{name}").to_dict()
    return _make_config(kind, {**values, **wanted}, option)


def _make_config(kind: type[PreTrainedConfig], values: Mapping[str, Any], option: str) -> PreTrainedConfig:
    try:
        return kind.from_dict(dict(values))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{option} does not make a valid {kind.__name__}: {error}") from error


def _known_keys(kind: type[PreTrainedConfig]) -> set[str]:
    return {*_EVERY_CONFIG, *inspect.signature(kind).parameters, *kind.attribute_map} - {"self", "kwargs"}


def _check_keys(
    kind: type[PreTrainedConfig], given: Mapping[str, Any], option: str, also: Iterable[str] = ()
) -> None:
    known = _known_keys(kind) | set(also)
    for name in given:
        if name not in known:
            raise ValueError(
                f"{option} has {name!r}, which is no option of {kind.__name__}{_nearest(name, known)}"
            )


def _nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), sorted(known), n=3)
    return f": did you mean {' or '.join(near)}?" if near else ""


def _tokenizer_values(tokenizer: Any) -> dict[str, int]:
    if tokenizer is None:
        return {}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    return {"vocab_size": len(tokenizer), **{name: value for name, value in ids.items() if value is not None}}
