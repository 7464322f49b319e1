"""What a teacher thought of the tokens that it sampled, written as a teacher cache beside them.

The model has just computed the logits, so keeping a few entries of each distribution costs no second pass.
They are those of the model's own softmax, before the sampling's temperature, top-k and top-p: what a
student is to learn is the model, not the way it was sampled.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tasks.text import decoder_inputs
from .teachers.cache import Manifest, SparseCodec, threshold_sample
from .teachers.cache.keys import row_keys
from .teachers.cache.make import tokenizer_hash
from .teachers.cache.store import check_shard, read_shards, shard_arrays, write_list, write_shard
from .teachers.models import TEACHER_PREFIX, ModelTeacher
from .teachers.signal import SparseSignal

_MOST_SHARDS = 100_000


class SampledSignal:
    """Keeps the signal of sampled rows and writes it shard by shard.

    Args:
        folder: Of the cache.
        teacher: Whose signal it is.
        task: "causal-lm" or "seq2seq-lm".
        codec: How it is stored.
        pad: The padding token of a decoder; None for causal models.
        shards: How many there will be.

    Raises:
        ValueError: If there are more than a cache can number.
    """

    def __init__(
        self,
        folder: Path,
        teacher: ModelTeacher,
        task: str,
        *,
        codec: SparseCodec,
        pad: int | None,
        shards: int,
    ) -> None:
        """Prepare what stands for a position without a signal."""
        if shards > _MOST_SHARDS:
            raise ValueError(f"{shards} shards are more than {_MOST_SHARDS}: set a higher shard_rows")
        self.folder, self.teacher, self.task, self.codec, self.pad = folder, teacher, task, codec, pad
        self._generator = torch.Generator()
        self._empty = codec.encode(_nothing(codec))
        self._keys: list[bytes] = []
        self._rows: list[dict[str, np.ndarray]] = []

    def begin(self, seed: int, row: int) -> None:
        """Seed the draws of a batch by its first row: it is the same batch in every run."""
        state = np.random.SeedSequence([seed, row, 1]).generate_state(1, np.uint64)[0]
        self._generator.manual_seed(int(state >> np.uint64(1)))

    def see(self, logits: Tensor) -> Sequence[np.ndarray]:
        """A few entries of each row's distribution `[B, V]`, as bytes."""
        signal = threshold_sample(
            logits[:, : self.codec.classes].cpu(),
            self.codec.entries,
            temperature=self.codec.temperature,
            least_certain=self.codec.entries // 2,
            generator=self._generator,
        )
        return list(self.codec.encode(signal))

    def add(self, prompt: list[int], made: list[int], seen: Sequence[np.ndarray]) -> None:
        """Keep a row under the key that a trainer will look for.

        Position i of a causal model's row is the distribution over token i + 1: nothing is known of those
        within the prompt, and nothing follows the last one. A decoder's positions are its labels.
        """
        data = np.stack(list(seen))
        view: dict[str, Tensor] = {"input_ids": torch.tensor([prompt])}
        if self.task == "causal-lm":
            view["input_ids"] = torch.tensor([[*prompt, *made]])
            before = np.repeat(self._empty, len(prompt) - 1, axis=0)
            data = np.concatenate([before, data, self._empty])
        else:
            view["decoder_input_ids"] = decoder_inputs(torch.tensor([made]), self.teacher.model)
            view["decoder_attention_mask"] = torch.ones(1, len(made), dtype=torch.long)
        self._keys += row_keys(view, self.pad)
        self._rows.append({"sparse": data})

    def write(self, shard: int) -> None:
        """Write the rows in hand as a shard, with a list of its own: any rank may write any shard."""
        arrays = shard_arrays(self._keys, self._rows)
        name = f"shard-{shard:05d}-000000.safetensors"
        write_list(self.folder, shard, [write_shard(self.folder, name, arrays)])
        self._keys, self._rows = [], []

    def sound(self) -> set[int]:
        """The shards that are there and whole, byte by byte."""
        return {
            int(shard.file.split("-")[1])
            for shard in read_shards(self.folder)
            if check_shard(self.folder, shard, content=True) is None
        }


def _nothing(codec: SparseCodec) -> SparseSignal:
    """One position of which nothing is known: no entry, all mass in the tail, draws without weight."""
    shape = (1, codec.entries)
    return SparseSignal(
        ids=torch.full(shape, -1),
        log_probs=torch.zeros(shape),
        log_tail=torch.zeros(1),
        temperature=codec.temperature,
        certain=torch.zeros(1, dtype=torch.long),
        log_tau=torch.full((1,), -torch.inf),
    )


def manifest_of(teacher: ModelTeacher, codec: SparseCodec, *, pad: int | None, tokenizer: Any) -> Manifest:
    """What the cache holds: what `hf-kd cache` would say of the same teacher and settings."""
    dtype = str(teacher.model.dtype).removeprefix("torch.")
    return Manifest(
        fidelity="sparse",
        teacher=teacher.identity,
        columns=[name for name in teacher.columns if not name.startswith(TEACHER_PREFIX)],
        outputs=["sparse"],
        dtype=dtype,
        stored=dtype,
        shapes={},
        per_position=True,
        tokenizer=tokenizer_hash(tokenizer),
        pad=pad,
        codec=codec.describe(),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        note={"classes": codec.classes, "id2label": {}},
    )
