"""A cache from a teacher and the batches of a run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ...alignment import tokenizer_of
from ...losses.tiles import Head
from ..models import TEACHER_PREFIX
from ..signal import SparseSignal, Teacher, TeacherSignal
from .asking import ask, ask_about, refuse_crossing
from .codec import SparseCodec
from .keys import once, pieces, present, teacher_view
from .record import DTYPES
from .store import HEAD_FILE, CacheError, Manifest, checksum
from .writer import CacheWriter

logger = logging.getLogger(__name__)

# Up to so many classes, logits as they are take less room than a sparse signal is worth.
_FEW_CLASSES = 256


@dataclass(frozen=True)
class CacheSettings:
    """What is kept of a teacher's answers.

    Attributes:
        fidelity: "logits", "hidden", "sparse", or "auto": logits of up to 256 classes, else sparse.
        entries: Per position of a sparse signal.
        bits: Of a sparse signal's log-probabilities, 8 or 16.
        temperature: Of a sparse signal.
        dtype: Of stored logits (default: the teacher's own) and hidden states (default: float16).
    """

    fidelity: str = "auto"
    entries: int = 28
    bits: int = 16
    temperature: float = 1.0
    dtype: str | None = None


def describe(
    teacher: Teacher, batch: Mapping[str, Any], settings: CacheSettings, *, processor: Any = None
) -> tuple[Manifest, Head | None]:
    """What a cache of a teacher will hold, found by asking it about one batch.

    Args:
        teacher: Whoever is asked.
        batch: What it reads of some rows.
        settings: What is to be kept.
        processor: The tokenizer of the data, for its hash.

    Returns:
        The manifest, and the teacher's head where hidden states are kept.

    Raises:
        CacheError: If the head can't be cached that way.
        ValueError: If the settings are not known.
    """
    columns = [name for name in teacher.columns if not name.startswith(TEACHER_PREFIX)]
    tokens = getattr(teacher, "tokens", None)
    view = teacher_view(batch, columns, tokens)
    model = getattr(teacher, "model", None)
    config = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None) if "decoder_input_ids" in view else None
    signal = ask(teacher, batch, "sparse" if settings.fidelity == "auto" else settings.fidelity)
    if signal.sparse is not None:
        return _of_sparse(teacher, signal.sparse, settings, processor=processor), None
    classes = _classes(signal)
    fidelity = settings.fidelity
    if fidelity == "auto":
        fidelity = "logits" if classes is None or classes <= _FEW_CLASSES else "sparse"
    if fidelity == "logits":
        signal = ask(teacher, batch, fidelity)
    tensors = _tensors(signal)
    mask = present(view, pad)
    per_position = mask is not None and all(t.shape[:2] == mask.shape for t in tensors.values())
    own = next(iter(tensors.values())).dtype
    stored = settings.dtype or ("float16" if fidelity == "hidden" else str(own).removeprefix("torch."))
    if stored not in DTYPES:
        raise ValueError(f"cache_dtype={stored!r} is not known: use one of {', '.join(DTYPES)}")
    codec = None
    if fidelity == "sparse":
        if len(tensors) != 1 or classes is None or _rank(tensors) != 2 + per_position:
            raise CacheError(
                "fidelity='sparse' keeps one softmax per row or token; choose 'logits' for this head"
            )
        codec = SparseCodec(classes, min(settings.entries, classes), settings.temperature, settings.bits)
    if fidelity == "hidden" and not per_position:
        raise CacheError("fidelity='hidden' keeps one state per token; choose 'logits' for this head")
    start = 2 if per_position else 1
    manifest = Manifest(
        fidelity=fidelity,
        teacher=dict(teacher.identity),
        columns=columns,
        outputs=["sparse"] if codec else list(tensors),
        dtype=str(getattr(model, "dtype", own)).removeprefix("torch."),
        stored=stored,
        shapes={} if codec else {name: list(t.shape[start:]) for name, t in tensors.items()},
        per_position=per_position,
        # Rows are known by the teacher's ids, whatever part of its vocabulary the student has.
        tokenizer="" if tokens is not None else tokenizer_hash(processor),
        pad=pad,
        codec=codec.describe() if codec else None,
        versions=_versions(),
        note=_note(config, classes),
    )
    return manifest, signal.hidden.head if fidelity == "hidden" and signal.hidden is not None else None


def _of_sparse(
    teacher: Teacher, signal: SparseSignal, settings: CacheSettings, *, processor: Any
) -> Manifest:
    """What a cache holds of a teacher that is sparse itself: its entries as they are."""
    if settings.fidelity not in ("auto", "sparse"):
        raise CacheError(
            f"fidelity={settings.fidelity!r}, but the teacher's signal is sparse, a few entries of its "
            "distribution: choose 'sparse'"
        )
    classes = getattr(teacher, "vocab_size", None) or getattr(
        getattr(teacher, "config", None), "vocab_size", 0
    )
    return sparse_manifest(
        teacher,
        entries=signal.ids.shape[-1],
        classes=classes or int(signal.ids.max()) + 1,
        temperature=signal.temperature,
        bits=settings.bits,
        draws=signal.has_draws,
        processor=processor,
        per_position=signal.ids.ndim == 3,
    )


def sparse_manifest(
    teacher: Teacher,
    *,
    entries: int,
    classes: int,
    temperature: float,
    draws: bool,
    bits: int = 16,
    processor: Any = None,
    per_position: bool = True,
) -> Manifest:
    """What a cache will hold of a teacher whose signal is sparse itself, before it is asked anything.

    Raises:
        ValueError: If a cache can't hold so many entries, at most 255 and no more than there are classes.
    """
    codec = SparseCodec(classes, entries, temperature, bits, draws)
    # A server doesn't say what it computes in.
    dtype = str(getattr(getattr(teacher, "model", None), "dtype", "unknown")).removeprefix("torch.")
    return Manifest(
        fidelity="sparse",
        teacher=dict(teacher.identity),
        columns=[name for name in teacher.columns if not name.startswith(TEACHER_PREFIX)],
        outputs=["sparse"],
        dtype=dtype,
        stored=dtype,
        shapes={},
        per_position=per_position,
        tokenizer=tokenizer_hash(processor),
        codec=codec.describe(),
        versions=_versions(),
        note={"classes": classes, "id2label": {}},
    )


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def _tensors(signal: TeacherSignal) -> Mapping[str, Tensor]:
    """What there is to keep of an answer, by name."""
    if signal.hidden is not None:
        return {"hidden": signal.hidden.hidden}
    return signal.dense()


def _rank(tensors: Mapping[str, Tensor]) -> int:
    return next(iter(tensors.values())).ndim


def save_head(head: Head, folder: Path) -> dict[str, Any]:
    """Write a teacher's output layer; what the manifest says of it."""
    parts = {"weight": head.weight, "bias": head.bias}
    state = {
        name: part.detach().cpu().contiguous().clone() for name, part in parts.items() if part is not None
    }
    temporary = folder / f".{HEAD_FILE}"
    save_file(state, temporary)
    temporary.replace(folder / HEAD_FILE)
    return {"softcap": head.softcap, "scale": head.scale, "checksum": checksum(folder / HEAD_FILE)}


def fill(
    writer: CacheWriter,
    teacher: Teacher,
    batches: Iterable[Mapping[str, Any]],
    *,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Ask the teacher about all rows that are not there yet.

    A batch is asked whole or not at all: what is stored of a row does not depend on where a writer stopped.

    Args:
        writer: Where answers go; its last shard is written too.
        teacher: Whoever is asked.
        batches: What the teacher reads.
        progress: Told the number of rows of each finished batch.
    """
    manifest, apart = writer.manifest, False
    for batch in batches:
        view = teacher_view(batch, manifest.columns, getattr(teacher, "tokens", None))
        mask = present(view, manifest.pad) if manifest.per_position else None
        asked = pieces(view, manifest.pad, whole=mask is None)
        wanted = once(piece for piece in asked if piece.key not in writer)
        if wanted:
            answer = ask_about(teacher, batch, mask, manifest.fidelity, wanted)
            apart = apart or refuse_crossing(teacher, answer)
            for piece, arrays in zip(wanted, answer.records(manifest), strict=True):
                writer.add(piece.key, arrays)
        progress(len({piece.row for piece in asked}))
    writer.flush()


def changing_columns(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Columns in which two batches of the same rows differ: what is random in the data.

    Dynamic masking and augmentation make another input of a row each time, so that no cache can know it.
    """
    found = []
    for name in sorted({*first, *second}):
        pair = first.get(name), second.get(name)
        if not all(isinstance(value, Tensor) for value in pair):
            continue
        if pair[0].shape != pair[1].shape or not torch.equal(pair[0], pair[1]):  # type: ignore[union-attr,arg-type]
            found.append(name)
    return found


def tokenizer_hash(processor: Any) -> str:
    """A hash of a tokenizer's vocabulary and special tokens; "" where there is no tokenizer."""
    tokens = tokenizer_of(processor)
    if tokens is None:
        return ""
    content = {"vocabulary": sorted(tokens.get_vocab().items()), "special": tokens.special_tokens_map}
    text = json.dumps(content, default=str, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _classes(signal: TeacherSignal) -> int | None:
    if signal.hidden is not None:
        return signal.hidden.head.classes
    if signal.logits and len(signal.logits) == 1:
        return int(np.prod(next(iter(signal.logits.values())).shape[-1:]))
    return None


def _note(config: Any, classes: int | None) -> dict[str, Any]:
    """What a run without the teacher needs to know of its head."""
    labels = getattr(config, "id2label", None) or {}
    return {"classes": classes, "id2label": {str(key): str(value) for key, value in labels.items()}}
