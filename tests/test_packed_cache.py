"""Texts packed into one row, in a cache: each is found by itself where they don't see each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_kd import TeacherSignal
from hf_kd.teachers import CachedTeacher, ModelTeacher
from hf_kd.teachers.cache import CacheError, CacheWriter
from hf_kd.teachers.cache.keys import row_keys
from hf_kd.teachers.cache.make import CacheSettings, describe, fill

from .served import VOCABULARY, tiny_llama

LENGTHS = [5, 3, 7, 2, 4, 6]
Batch = dict[str, Tensor]


def documents() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (n,), generator=g) for n in LENGTHS]


def padded(texts: list[Tensor]) -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths.unsqueeze(-1)).long(),
    }


def packed(texts: list[Tensor]) -> Batch:
    """As `DataCollatorWithFlattening` makes it: one row, positions that start anew, no mask."""
    return {
        "input_ids": torch.cat(texts).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(len(text)) for text in texts]).unsqueeze(0),
    }


@pytest.fixture(scope="module")
def teacher() -> ModelTeacher:
    return ModelTeacher(tiny_llama(layers=2), ("logits",))


def write(folder: Path, teacher: Any, data: list[Batch], fidelity: str = "logits") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    manifest, _ = describe(teacher, data[0], CacheSettings(fidelity=fidelity, entries=8))
    manifest.write(folder)
    fill(CacheWriter(folder, manifest), teacher, data)
    return folder


@pytest.mark.parametrize("written", ["padded", "packed"])
def test_another_packing_finds_its_texts(written: str, teacher: ModelTeacher, tmp_path: Path) -> None:
    """Trap 45: written from padded rows or from one packing, read in others: the live teacher's answer."""
    texts = documents()
    make = padded if written == "padded" else packed
    data = [make(texts[:4]), make(texts[4:])]
    cached = CachedTeacher(write(tmp_path / "cache", teacher, data))
    assert cached.rows == len(texts)
    for order in ([5, 0, 3], [2, 1, 4, 0]):
        batch = packed([texts[i] for i in order])
        ours, live = cached(batch).dense()["logits"], teacher(batch).dense()["logits"]
        torch.testing.assert_close(ours, live, rtol=1e-4, atol=1e-5)
        # Counter-example: where texts see each other the answer is another.
        crossing = teacher({"input_ids": batch["input_ids"]}).dense()["logits"]
        assert (crossing - live).abs().max() > 1e-2
    batch = padded([texts[2], texts[5]])
    mask = batch["attention_mask"].bool()
    read, said = (one(batch).dense()["logits"][mask] for one in (cached, teacher))
    torch.testing.assert_close(read, said, rtol=1e-4, atol=1e-5)


def test_draws_of_a_text_do_not_depend_on_its_packing(teacher: ModelTeacher, tmp_path: Path) -> None:
    """Trap 45: the sparse signal of a packed text has the entries of the same text alone."""
    texts = documents()
    folders = {"alone": [padded(texts)], "packed": [packed(texts[::-1])]}
    read = [
        CachedTeacher(write(tmp_path / name, teacher, data, "sparse"))(packed(texts)).sparse
        for name, data in folders.items()
    ]
    assert read[0] is not None and read[1] is not None
    assert torch.equal(read[0].ids, read[1].ids)


def test_a_missing_text_is_named(teacher: ModelTeacher, tmp_path: Path) -> None:
    texts = documents()
    cached = CachedTeacher(write(tmp_path / "cache", teacher, [packed(texts[:3])]))
    with pytest.raises(CacheError) as caught:
        cached(packed([texts[0], texts[4]]))
    said = str(caught.value)
    assert "a text packed into row 0" in said and str(texts[4].tolist()) in said


def test_rows_that_are_read_as_one_are_one_input(teacher: ModelTeacher, tmp_path: Path) -> None:
    """With a mask, or without positions, texts see those before them: another packing has other answers."""
    texts = documents()
    ones, places = torch.ones(1, 15, dtype=torch.long), torch.arange(15)[None]
    for extra in ({"attention_mask": ones}, {"position_ids": places}):
        batch = {**packed(texts[:3]), **extra}
        assert len(row_keys(batch)) == 1
        cached = CachedTeacher(write(tmp_path / "-".join(extra), teacher, [batch]))
        torch.testing.assert_close(cached(batch).dense(), teacher(batch).dense())
        turned = {**packed([texts[2], texts[0], texts[1]]), **extra}
        with pytest.raises(CacheError, match="texts packed or cut into blocks in another way"):
            cached(turned)


def test_a_mask_of_who_sees_whom_is_refused(teacher: ModelTeacher, tmp_path: Path) -> None:
    batch = {**packed(documents()[:2]), "attention_mask": torch.ones(1, 1, 8, 8)}
    with pytest.raises(CacheError, match=r"attention_mask has the shape \(1, 1, 8, 8\).*give position_ids"):
        write(tmp_path / "cache", teacher, [batch])


class Crossing(ModelTeacher):
    """A model that lets packed texts see each other: it is told of no positions."""

    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        return super().__call__({k: v for k, v in batch.items() if k != "position_ids"})


def test_a_teacher_whose_texts_see_each_other_is_refused(tmp_path: Path) -> None:
    """Trap 45: its answer to a text depends on the packing, and no key could say so."""
    crossing = Crossing(tiny_llama(layers=2), ("logits",))
    with pytest.raises(CacheError, match="this teacher lets packed texts see each other"):
        write(tmp_path / "packed", crossing, [packed(documents())])
    write(tmp_path / "padded", crossing, [padded(documents())])
