"""Tokenizers, image processors and feature extractors: loaded, or made for a model from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from datasets import DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from hf_kd.data.columns import input_columns
from hf_kd.loading import check_path
from hf_kd.options import RunOptions, as_mapping

IMAGE_TASKS = ("image-classification",)
AUDIO_TASKS = ("audio-classification",)
_VOCABULARY = 8192
# Text that a new tokenizer is trained on, in characters: more changes few merges and takes minutes.
_TRAINING_TEXT = 5_000_000
_PROBE = ("Hello, World! 123", "déjà vu  in\tNAÏVE cafés", "x = [i**2 for i in range(10)]  # 数")


def load_processor(
    options: RunOptions,
    raw: DatasetDict,
    *,
    task: str,
    role: str = "teacher",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The tokenizer, image processor or feature extractor of the teacher or the student.

    It is `processor`, else the one beside the model's weights. A teacher from scratch gets a new one: a BPE
    tokenizer trained on the data, or an image processor for the size of its config. A student that is no
    checkpoint of its own uses the teacher's.

    Args:
        options: What was asked for.
        raw: The data, to train a tokenizer on.
        task: What kind of processor is wanted.
        role: `"teacher"` or `"student"`.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run code that comes with a checkpoint.

    Raises:
        ValueError: If it cannot be loaded.
    """
    name = options.processor or (options.student if role == "student" else None) or options.teacher
    if name is None:
        return _make_processor(as_mapping(options.teacher_config), options, raw, task)
    option = "processor" if options.processor else role
    check_path(name, option)
    auto: Any = AutoTokenizer
    if task in IMAGE_TASKS + AUDIO_TASKS:
        auto = AutoImageProcessor if task in IMAGE_TASKS else AutoFeatureExtractor
    try:
        processor = auto.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{option}={name!r} has no {auto.__name__.removeprefix('Auto')} that can be loaded ({error}). "
            "Set processor to a directory or id that has one"
        ) from error
    if isinstance(processor, PreTrainedTokenizerBase) and processor.pad_token is None:
        processor.pad_token = processor.eos_token  # only fills rows up; it is never attended to or a label
    return processor


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, task: str = "causal-lm"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on texts. The same texts give the same tokenizer.

    Args:
        texts: Text, of which the first 5 million characters are read.
        vocab_size: Number of tokens, special ones included; fewer if the text has no more pairs to merge.
        task: Causal models get `<pad>` and `<eos>`; others `[CLS]`, `[SEP]` and `[MASK]` too, and each row
            gets the first two.
    """
    causal = task == "causal-lm"
    special = ["<pad>", "<eos>"] if causal else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_characters(texts, _TRAINING_TEXT), trainer)
    if causal:
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="<eos>",
            bos_token="<eos>",
            model_input_names=["input_ids", "attention_mask"],
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_image_processor(config: Mapping[str, Any]) -> ViTImageProcessorPil:
    """An image processor for the `image_size` and `num_channels` of a config: values from -1 to 1."""
    size = config.get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    channels = config.get("num_channels", 3)
    return ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    )


def treat_alike(one: Any, other: Any) -> bool:
    """Whether two processors make the same of the same input, whatever they are called."""
    if one is other:
        return True
    text = isinstance(one, PreTrainedTokenizerBase)
    if text != isinstance(other, PreTrainedTokenizerBase):
        return False
    if text:
        same = one.get_vocab() == other.get_vocab()
        return same and all(one(probe)["input_ids"] == other(probe)["input_ids"] for probe in _PROBE)
    if hasattr(one, "sampling_rate") or hasattr(other, "sampling_rate"):
        return _as_plain(one) == _as_plain(other)
    return all(
        _same_arrays(process_image(one, image), process_image(other, image)) for image in _probe_images()
    )


def process_image(processor: Any, image: Any) -> np.ndarray:
    """Pixels `[C, H, W]` in float32 of a PIL image, in the colours that the processor normalises."""
    mean = getattr(processor, "image_mean", None)
    grey = isinstance(mean, list | tuple) and len(mean) == 1
    pixels = processor(image.convert("L" if grey else "RGB"), return_tensors="np")["pixel_values"]
    return np.asarray(pixels[0], dtype=np.float32)


def _make_processor(config: Mapping[str, Any], options: RunOptions, raw: DatasetDict, task: str) -> Any:
    if task in IMAGE_TASKS:
        return make_image_processor(config)
    if task in AUDIO_TASKS:
        raise ValueError("teacher_config makes no feature extractor for audio: set processor to one")
    columns = input_columns(raw["train"], options, task)
    texts = _texts(raw["train"], columns)
    return train_tokenizer(texts, int(config.get("vocab_size", _VOCABULARY)), task=task)


def _texts(rows: Any, columns: list[str]) -> Iterator[str]:
    for row in rows.select_columns(columns):
        for value in row.values():
            yield " ".join(value) if isinstance(value, list) else value or ""


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)


def _probe_images() -> list[Any]:
    from PIL.Image import fromarray

    shades = np.random.default_rng(0)
    return [fromarray(shades.integers(0, 256, size, dtype=np.uint8)) for size in ((37, 50, 3), (8, 8, 3))]


def _same_arrays(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool(np.allclose(one, other, atol=1e-6))


def _as_plain(processor: Any) -> dict[str, Any]:
    return {
        k: v for k, v in processor.to_dict().items() if k != "processor_class" and not k.endswith("_type")
    }
