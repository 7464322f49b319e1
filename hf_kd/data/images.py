"""Images and sound, made into arrays once; large sets of images when they are read."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from datasets import Array3D, Audio, Dataset, Features, IterableDataset, List, Value
from torch.utils.data import Dataset as TorchDataset

from hf_kd.data.labels import encoder
from hf_kd.data.mapping import Context, cached_map
from hf_kd.data.processors import process_image

logger = logging.getLogger(__name__)

# Bytes of processed images that are held in memory, and that are kept on disk.
_IN_MEMORY, _ON_DISK = 2**28, 2**30
_SECONDS = 30


def image_rows(rows: Any, context: Context) -> Any:
    """`pixel_values` `[C, H, W]` in float32 and `labels`; `teacher_pixel_values` where the teacher's differ.

    Small sets are held in memory, medium ones on disk; large ones are processed when they are read.
    """
    processors = {"pixel_values": context.processor}
    if context.teacher_processor is not None:
        processors["teacher_pixel_values"] = context.teacher_processor
    (column,) = context.inputs
    encode = encoder(context.labels, context.config) if context.labels else None

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {
            name: [process_image(processor, image) for image in batch[column]]
            for name, processor in processors.items()
        }
        if encode is not None and context.label_column is not None:
            made["labels"] = [encode(value) for value in batch[context.label_column]]
        return made

    if isinstance(rows, IterableDataset):
        return cached_map(rows, prepare, context)
    first = prepare(rows[:1])
    shapes = {name: first[name][0].shape for name in processors}
    size = sum(4 * int(np.prod(shape)) for shape in shapes.values()) * len(rows)
    if size > _ON_DISK:
        logger.info("%d images are processed when they are read: together they take over 1 GiB", len(rows))
        return LazyRows(rows, prepare)
    features: dict[str, Any] = {name: Array3D(shape, "float32") for name, shape in shapes.items()}
    if "labels" in first:
        several = isinstance(first["labels"][0], list)
        kind = Value("float32" if several or isinstance(first["labels"][0], float) else "int64")
        features["labels"] = List(kind) if several else kind
    made = cached_map(rows, prepare, context, features=Features(features)).with_format("numpy")
    return ArrayRows({name: np.asarray(made[name][:]) for name in features}) if size <= _IN_MEMORY else made


class ArrayRows(TorchDataset):
    """Rows in memory, as one array a column: small ones take longer to read than to train on."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        """Take the columns, `[N, ...]` each."""
        self.columns = columns

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row."""
        return {name: values[index] for name, values in self.columns.items()}


class LazyRows(TorchDataset):
    """Rows of a data set, prepared when they are read."""

    def __init__(self, rows: Dataset, prepare: Any) -> None:
        """Keep the rows and what prepares a batch of them."""
        self.rows = rows
        self.prepare = prepare

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One prepared row."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several prepared rows."""
        made = self.prepare(self.rows[indices])
        return [{name: values[i] for name, values in made.items()} for i in range(len(indices))]


def audio_rows(rows: Dataset, context: Context) -> Dataset:
    """What the feature extractor makes of sound of at most 30 seconds, and `labels`.

    Sound is a column of `datasets.Audio` (resampled to what the model wants), or of lists of numbers, which
    are taken to be at that rate already.
    """
    (column,) = context.inputs
    rate = context.processor.sampling_rate
    if isinstance(rows.features[column], Audio):
        rows = rows.cast_column(column, Audio(sampling_rate=rate))
    encode = encoder(context.labels, context.config) if context.labels else None

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        sounds = [_waveform(sound)[: rate * _SECONDS] for sound in batch[column]]
        made = dict(context.processor(sounds, sampling_rate=rate))
        if context.teacher_processor is not None:
            theirs = context.teacher_processor(sounds, sampling_rate=rate)
            made |= {f"teacher_{name}": values for name, values in theirs.items()}
        if encode is not None and context.label_column is not None:
            made["labels"] = [encode(value) for value in batch[context.label_column]]
        return made

    if context.teacher_processor is not None and context.teacher_processor.sampling_rate != rate:
        raise ValueError(
            f"processor: the student hears {rate} samples per second, the teacher "
            f"{context.teacher_processor.sampling_rate}: choose models for the same rate"
        )
    return cached_map(rows, prepare, context)


def _waveform(sound: Any) -> np.ndarray:
    """Samples of one channel, from a decoded sound or a list of numbers."""
    if hasattr(sound, "get_all_samples"):
        return sound.get_all_samples().data.mean(0).numpy()
    return np.asarray(sound["array"] if isinstance(sound, dict) else sound, dtype=np.float32)
