"""Between a teacher's signal for a batch and what is stored of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...losses.projected import head_logits
from ...losses.tiles import Head, HiddenTeacher
from ..signal import SparseSignal, TeacherSignal
from .codec import SparseCodec
from .keys import Piece
from .sampling import threshold_sample
from .store import CacheError, Manifest

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Positions whose logits exist at once while a sparse signal is made.
_LOGIT_BYTES = 128 << 20


def records(
    signal: TeacherSignal, mask: Tensor | None, manifest: Manifest, wanted: Sequence[Piece]
) -> list[dict[str, np.ndarray]]:
    """What is stored of some inputs of a batch: arrays `[positions, ...]` by name, one mapping each.

    Args:
        signal: The teacher's answer.
        mask: `[B, L]` which positions exist; None for heads with one answer a row.
        manifest: What the cache holds.
        wanted: The inputs; the draws of a sparse signal depend on their keys and on nothing else.

    Raises:
        CacheError: If the answer has another shape than the cache holds, or values that it can't hold.
    """
    if manifest.fidelity == "sparse":
        codec = SparseCodec(**(manifest.codec or {}))
        return [{"sparse": codec.encode(_sample(signal, mask, codec, piece))} for piece in wanted]
    if signal.sparse is not None:
        raise CacheError(
            f"the teacher's signal is sparse, which a cache of fidelity {manifest.fidelity!r} can't hold: "
            "choose another folder"
        )
    if manifest.fidelity == "hidden":
        assert signal.hidden is not None
        tensors: Mapping[str, Tensor] = {"hidden": signal.hidden.hidden}
    else:
        tensors = signal.dense()
    found: list[dict[str, np.ndarray]] = []
    for piece in wanted:
        arrays = {}
        for name in manifest.outputs:
            values = tensors[name][piece.row] if mask is None else positions_of(tensors[name], mask, piece)
            shape = list(values.shape if mask is None else values.shape[1:])
            if shape != manifest.shapes[name]:
                raise CacheError(
                    f"{name} of a row has the shape {shape}, others {manifest.shapes[name]}: a cache of "
                    f"fidelity {manifest.fidelity!r} holds one shape. Pad rows to one length or size."
                )
            arrays[name] = _stored(values.unsqueeze(0) if mask is None else values, manifest.stored, name)
        found.append(arrays)
    return found


def signal_of(
    arrays: Mapping[str, np.ndarray],
    mask: Tensor | None,
    manifest: Manifest,
    rows: int,
    *,
    head: Head | None,
    device: torch.device,
) -> TeacherSignal:
    """The signal of a batch from what is stored of its rows, one after the other.

    Args:
        arrays: `[positions of all rows, ...]` by name.
        mask: `[B, L]` where they go; elsewhere is padding, which nobody is taught by.
        manifest: What the cache holds.
        rows: In the batch.
        head: The teacher's output layer, for hidden states.
        device: Where the signal is wanted.
    """
    if manifest.fidelity == "sparse":
        signal = SparseCodec(**(manifest.codec or {})).decode(arrays["sparse"])
        place = None if mask is None else mask.cpu()
        fill = {"ids": -1, "log_probs": 0.0, "log_tail": 0.0, "certain": 0, "log_tau": -torch.inf}
        spread = {
            name: None if (value := getattr(signal, name)) is None else _spread(value, place, empty)
            for name, empty in fill.items()
        }
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in spread.items()
        }
        return TeacherSignal(sparse=SparseSignal(temperature=signal.temperature, **moved))
    found = {}
    for name in manifest.outputs:
        values = _loaded(arrays[name], manifest.stored).to(device)
        if mask is None:
            values = values.reshape(rows, *manifest.shapes[name])
        found[name] = _spread(values, None if mask is None else mask.to(device), 0.0)
    if manifest.fidelity == "hidden":
        assert head is not None
        return TeacherSignal(hidden=HiddenTeacher(found["hidden"], head))
    return TeacherSignal(logits=found)


def as_arrays(tensors: Mapping[str, Tensor], manifest: Manifest) -> dict[str, np.ndarray]:
    """What came from another process, as `signal_of` takes it.

    Raises:
        CacheError: If it is not what the manifest announces.
    """
    shapes: dict[str, list[int]] = dict(manifest.shapes)
    stored = "uint16" if manifest.stored == "bfloat16" else manifest.stored
    if manifest.codec is not None:
        shapes, stored = {"sparse": [SparseCodec(**manifest.codec).stride]}, "uint8"
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    said = {name: (str(array.dtype), list(array.shape[1:])) for name, array in arrays.items()}
    if said != {name: (stored, shape) for name, shape in shapes.items()}:
        raise CacheError(f"the answer is {said}, and {shapes} of {stored} were announced")
    return arrays


def positions_of(values: Tensor, mask: Tensor, piece: Piece) -> Tensor:
    """What a batch's `[B, L, ...]` says of an input, `[positions, ...]`."""
    if values.shape[:2] != mask.shape:
        raise CacheError(
            f"the teacher answers {tuple(values.shape[:2])} positions for an input of {tuple(mask.shape)}: "
            "what it says of a row depends on the padding of the others. Such a head is not cached."
        )
    return values[piece.row].index_select(0, piece.positions(mask).to(values.device))


def _stored(values: Tensor, dtype: str, name: str) -> np.ndarray:
    """As numpy, in the cache's dtype; bfloat16 as its bits."""
    cast = values.detach().to(DTYPES[dtype]).cpu().contiguous()
    if not bool((cast.isfinite() | torch.isneginf(values.cpu())).all()):
        raise CacheError(
            f"{name} of the teacher is NaN, infinite or too large for {dtype}: choose another stored dtype "
            "(bfloat16 has the range of float32), or check the teacher's own"
        )
    return cast.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else cast.numpy()


def _loaded(array: np.ndarray, dtype: str) -> Tensor:
    array = np.array(array)  # out of the mapped file, so that nobody can write there
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if dtype == "bfloat16" else (
        torch.from_numpy(array)
    )  # fmt: skip


def _sample(signal: TeacherSignal, mask: Tensor | None, codec: SparseCodec, piece: Piece) -> SparseSignal:
    if signal.sparse is not None:
        return _own(signal.sparse, mask, codec, piece)
    generator = torch.Generator().manual_seed(int.from_bytes(piece.key[:7], "little"))
    settings: dict[str, Any] = {
        "temperature": codec.temperature, "least_certain": codec.entries // 2, "generator": generator,
    }  # fmt: skip
    if signal.hidden is None:
        (logits,) = signal.dense().values()
        values = logits[piece.row].unsqueeze(0) if mask is None else positions_of(logits, mask, piece)
        return threshold_sample(values.cpu(), codec.entries, **settings)
    assert mask is not None
    hidden, head = positions_of(signal.hidden.hidden, mask, piece), signal.hidden.head
    step = max(1, _LOGIT_BYTES // (4 * head.classes))
    parts = [
        threshold_sample(head_logits(HiddenTeacher(part, head)).cpu(), codec.entries, **settings)
        for part in hidden.split(step)
    ]
    names = ("ids", "log_probs", "log_tail", "certain", "log_tau")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return SparseSignal(temperature=codec.temperature, **joined)


def _own(signal: SparseSignal, mask: Tensor | None, codec: SparseCodec, piece: Piece) -> SparseSignal:
    """What a teacher that is sparse itself says of an input, as it is."""
    said = {"entries": signal.ids.shape[-1], "temperature": signal.temperature, "draws": signal.has_draws}
    holds = {name: getattr(codec, name) for name in said}
    if said != holds:
        raise CacheError(
            f"the teacher's sparse signal has {said}, the cache {holds}: choose another folder, or ask for "
            "the same (server_top_k is the number of entries of a teacher on a server)"
        )
    if mask is None:
        return signal.map(lambda values: values[piece.row].unsqueeze(0))
    return signal.map(lambda values: positions_of(values, mask, piece))


def _spread(values: Tensor, mask: Tensor | None, fill: float) -> Tensor:
    """`[positions, ...]` to `[B, L, ...]` at the places of the mask."""
    if mask is None:
        return values
    if len(values) == mask.numel():
        return values.unflatten(0, mask.shape)  # no padding
    out = values.new_full((*mask.shape, *values.shape[1:]), fill)
    out[mask] = values
    return out
