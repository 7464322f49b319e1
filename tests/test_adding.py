"""A cache that a run fills: what the live teacher was asked about is added, and never asked again."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from transformers import LlamaForCausalLM

from hf_kd import DistillationTrainer, TeacherSignal
from hf_kd.teachers import CachedTeacher, SparseSignal
from hf_kd.teachers.cache import CacheError, adding
from hf_kd.teachers.cache.opening import open_cache
from hf_kd.teachers.cache.store import check_shard, locked, read_shards

from .cached import MadeTeacher, batches, contents, write
from .served import serving, tiny_llama
from .test_server import collate, rows_of_text, run
from .test_trainer import arguments

FORK = multiprocessing.get_context("fork")
DATA = batches(24)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def values(signal: TeacherSignal, mask: torch.Tensor) -> list[torch.Tensor]:
    """What a signal says of the positions that exist."""
    if signal.sparse is not None:
        return [signal.sparse.ids[mask], signal.sparse.log_probs[mask]]
    if signal.hidden is not None:
        return [signal.hidden.hidden[mask]]
    return [signal.dense()["logits"][mask]]


# ---- a server ----


def test_each_row_is_asked_about_once(model: Any, tmp_path: Path) -> None:
    """Trap 45: three shuffled epochs and evaluations, then another run: the server hears each row once."""
    cache = tmp_path / "said"
    options: dict[str, Any] = {
        "teacher_cache": str(cache), "cache_miss": "compute", "server_model": "tiny", "num_train_epochs": 3,
        "max_steps": -1, "eval_strategy": "epoch",
    }  # fmt: skip
    with serving(model) as (url, served):
        plain = run(url, tmp_path / "plain", **{**options, "teacher_cache": None, "cache_miss": "error"})
        without = len(served.requests)
        served.requests.clear()
        first = run(url, tmp_path / "first", **options)
        asked = [tuple(row) for _, _, body in served.requests for row in body["prompt"]]
        assert sorted(asked) == sorted({tuple(row) for row in rows_of_text()["input_ids"]})
        assert len(served.requests) < without
        served.requests.clear()
        again = run(url, tmp_path / "again", **options)
        assert not served.requests
        # Nor where it may not be asked: the address is compared by the model's name.
        other = run(url, tmp_path / "other", **{**options, "cache_miss": "error"})
        assert not served.requests
    assert first[0] == again[0] == other[0]
    assert first[0] == pytest.approx(plain[0], rel=2e-3)  # 16 bits a log-probability
    for name, value in first[1].items():
        assert torch.equal(value, again[1][name])
    assert CachedTeacher(cache).rows == 8


def test_a_servers_list_has_no_draws(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trap 12: only the tail's estimate is possible of it, which is said, also when it is read back."""
    options: dict[str, Any] = {
        "teacher_cache": str(tmp_path / "said"), "cache_miss": "compute", "server_model": "tiny",
        "max_steps": 1,
    }  # fmt: skip
    with serving(model) as (url, _):
        run(url, tmp_path / "out", **options)
        assert "takes 'tail': the teacher's signal has no unbiased draws" in caplog.text
        signal = CachedTeacher(tmp_path / "said")(collate(list(rows_of_text()))).sparse
        assert signal is not None and not signal.has_draws
        with pytest.raises(ValueError, match="has no draws from the tail; set sparse_estimator='tail'"):
            run(url, tmp_path / "out", **options, sparse_estimator="draws")
        with pytest.raises(CacheError, match="entries.*: 6.*entries.*: 5"):
            run(url, tmp_path / "out", **options, server_top_k=5)
        with pytest.raises(ValueError, match="server_top_k=300, but teacher_cache=.*can hold 61 tokens"):
            run(url, tmp_path / "out", **options, server_top_k=300)
        with pytest.raises(CacheError, match="teacher weights: the cache has"):
            run(url, tmp_path / "out", **{**options, "server_model": "another", "cache_miss": "error"})


# ---- a teacher in memory ----


@pytest.mark.parametrize("fidelity", ["sparse", "logits", "hidden"])
def test_what_is_added_is_what_would_have_been_written(fidelity: str, tmp_path: Path) -> None:
    """Traps 45, 48: every fidelity: the answers of a cache of all rows, which another reader finds too."""
    whole = CachedTeacher(write(tmp_path / "whole", data=DATA, fidelity=fidelity))
    part = write(tmp_path / "part", data=DATA[:2], fidelity=fidelity)
    live = MadeTeacher(hidden=fidelity == "hidden")
    reader = CachedTeacher(part, live=live, miss="compute")
    for _ in range(2):
        for batch in DATA:
            mask = batch["attention_mask"].bool()
            for ours, theirs in zip(values(reader(batch), mask), values(whole(batch), mask), strict=True):
                assert torch.equal(ours, theirs)
    assert live.asked == len(DATA) - 2, "once each"
    reader.flush()
    assert not reader._added.rows
    assert all(check_shard(part, shard, content=True) is None for shard in read_shards(part))
    again = CachedTeacher(part)
    assert again.rows == whole.rows
    again(DATA[-1])
    assert live.asked == len(DATA) - 2


def test_only_what_is_missing_is_asked_of_who_is_no_model(tmp_path: Path) -> None:
    """A served answer may cost money: rows that are known are not sent again."""
    seen: list[int] = []

    class Counting(MadeTeacher):
        def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
            seen.append(len(batch["input_ids"]))
            return super().__call__(batch)

    folder = write(tmp_path / "cache", data=[{k: v[:3] for k, v in DATA[0].items()}])
    reader = CachedTeacher(folder, live=Counting(), miss="compute")
    found = reader(DATA[0]).sparse
    assert seen == [1]
    expected = CachedTeacher(write(tmp_path / "whole", data=DATA[:1]))(DATA[0]).sparse
    assert found is not None and expected is not None and torch.equal(found.ids, expected.ids)


def test_what_is_in_hand_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is written when enough is in hand: memory does not grow with the data."""
    monkeypatch.setattr(adding, "_SHARD_BYTES", 400)
    reader = CachedTeacher(write(tmp_path / "cache", data=DATA[:1]), live=MadeTeacher(), miss="compute")
    most = 0
    for batch in DATA:
        reader(batch)
        most = max(most, len(reader._added.rows))
    assert most < 8 and len(read_shards(tmp_path / "cache")) > 3


def test_two_runs_may_add_to_one_cache(tmp_path: Path) -> None:
    """Each writes whole shards while it has the lock, and finds what the other one added."""
    folder = write(tmp_path / "cache", data=DATA[:1])
    teachers = MadeTeacher(), MadeTeacher()
    first, second = (CachedTeacher(folder, live=t, miss="compute", rank=i) for i, t in enumerate(teachers))
    first(DATA[1])
    first.flush()
    second(DATA[1])
    assert teachers[1].asked == 0
    second(DATA[2])
    second.flush()
    first(DATA[2])
    assert [t.asked for t in teachers] == [1, 1]
    assert sorted(path.name for path in folder.glob("shards-*")) == ["shards-00000.json", "shards-00001.json"]


def test_a_writer_of_the_same_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf-kd cache` holds the folder for as long as it runs."""
    monkeypatch.setattr(adding, "_PATIENCE", 0.05)
    folder = write(tmp_path / "cache", data=DATA[:1])
    reader = CachedTeacher(folder, live=MadeTeacher(), miss="compute")
    reader(DATA[1])
    before = contents(folder)
    with locked(folder), pytest.raises(CacheError, match="is being written by another process"):
        reader.flush()
    assert contents(folder) == before
    reader.flush()
    assert CachedTeacher(folder).rows == 8


def test_the_hubs_copy_is_not_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "cache", data=DATA[:1])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(folder))
    assert open_cache("somebody/said", device=CPU).rows == 4
    with pytest.raises(CacheError, match="'somebody/said' is the Hub's copy: download it"):
        open_cache("somebody/said", device=CPU, live=MadeTeacher(), miss="compute")


# ---- streams ----


def test_a_stream_is_read_from_a_cache(model: Any, tmp_path: Path) -> None:
    """Trap 45: content needs no length and no row numbers: the second pass over a stream asks nobody."""
    teacher = LocalTeacher(model)

    def rows() -> Iterator[dict[str, Any]]:
        yield from rows_of_text()

    def trained(folder: Path, data: Any, **options: Any) -> list[float]:
        args = arguments(
            folder, max_steps=6, per_device_train_batch_size=2, logging_steps=1, temperature=1.0, **options
        )
        trainer = DistillationTrainer(
            tiny_llama(5), args, teacher=copy.copy(teacher), train_dataset=data, data_collator=collate
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    from hf_kd.teachers.cache.make import CacheSettings, describe

    cache = tmp_path / "said"
    cache.mkdir()
    describe(teacher, collate([rows_of_text()[0]]), CacheSettings())[0].write(cache)
    options = {"teacher_cache": str(cache), "cache_miss": "compute"}
    filled = trained(tmp_path / "filled", IterableDataset.from_generator(rows), **options)
    assert CachedTeacher(cache).rows == 8
    asked = teacher.asked[:]
    read = trained(tmp_path / "read", IterableDataset.from_generator(rows), teacher_cache=str(cache))
    assert teacher.asked == asked and len(read) == 6
    assert read == filled


class LocalTeacher:
    """A few entries of a model's distribution, with a list of how many rows it was asked about."""

    columns = ("input_ids", "attention_mask")
    identity = {"name": "tiny", "revision": "", "fingerprint": "local"}
    vocab_size = 61

    def __init__(self, model: Any) -> None:
        self.model, self.asked = model, []

    @torch.no_grad()
    def __call__(self, given: Mapping[str, Any]) -> TeacherSignal:
        self.asked.append(len(given["input_ids"]))
        logits = self.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
        top = logits.double().log_softmax(-1).topk(8)
        tail = torch.log1p(-top.values.exp().sum(-1))
        return TeacherSignal(sparse=SparseSignal(top.indices, top.values.float(), tail.float()))


# ---- kill -9 ----


def _add_slowly(folder: Path, pause: float) -> None:
    adding._SHARD_BYTES = 200
    reader = CachedTeacher(folder, live=MadeTeacher(), miss="compute")
    for batch in DATA:
        reader(batch)
        FORK.Event().wait(pause)
    reader.flush()


def test_killed_while_adding(tmp_path: Path) -> None:
    """Trap 48: killed ten times while it adds: what is listed is whole, in the end nothing is missing."""
    folder = write(tmp_path / "cache", data=DATA[:1])
    killed, rows = 0, 4
    for trial in range(10):
        process = FORK.Process(target=_add_slowly, args=(folder, 0.01))
        process.start()
        process.join(0.005 + 0.012 * trial)
        killed += process.is_alive()
        process.kill()
        process.join()
        assert all(check_shard(folder, shard, content=True) is None for shard in read_shards(folder))
        assert CachedTeacher(folder).rows >= rows
        rows = CachedTeacher(folder).rows
    assert killed >= 3
    _add_slowly(folder, 0.0)
    whole, found = CachedTeacher(write(tmp_path / "whole", data=DATA)), CachedTeacher(folder)
    for batch in DATA:
        mask = batch["attention_mask"].bool()
        for ours, theirs in zip(values(found(batch), mask), values(whole(batch), mask), strict=True):
            assert torch.equal(ours, theirs)
