"""A cache on disk is whole or says what is wrong; whoever writes it may be stopped at any moment."""

from __future__ import annotations

import errno
import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_kd import TeacherSignal
from hf_kd.teachers import CachedTeacher
from hf_kd.teachers.cache import CacheError, Manifest, store
from hf_kd.teachers.cache.make import changing_columns
from hf_kd.teachers.cache.opening import open_cache
from hf_kd.teachers.cache.store import check_shard, locked, map_arrays, read_shards

from .cached import Batch, MadeTeacher, batches, contents, write

FORK = multiprocessing.get_context("fork")
DATA = batches()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that nobody disturbed, of several shards."""
    return write(tmp_path_factory.mktemp("whole") / "cache")


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def read_all(folder: Path, data: list[Batch] | None = None) -> list[torch.Tensor]:
    """Everything that a cache says of some batches."""
    teacher = CachedTeacher(folder)
    found: list[torch.Tensor] = []
    for batch in DATA if data is None else data:
        signal = teacher(batch)
        if signal.sparse is not None:
            s = signal.sparse
            assert s.certain is not None and s.log_tau is not None
            found += [s.ids, s.log_probs, s.log_tail, s.certain, s.log_tau]
        elif signal.hidden is not None:
            found += [signal.hidden.hidden, signal.hidden.head.weight]
        else:
            found += list(signal.dense().values())
    return found


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path: Path, place: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


def test_what_is_written(whole: Path) -> None:
    """Several shards, a list with their checksums, a manifest; nothing is left of the writing."""
    shards = read_shards(whole)
    assert len(shards) > 3
    assert sum(shard.rows for shard in shards) == sum(len(batch["input_ids"]) for batch in DATA)
    assert all(check_shard(whole, shard, content=True) is None for shard in shards)
    assert not [name for name in contents(whole) if name.startswith(".")]
    assert CachedTeacher(whole).rows == 60


def test_two_writers_make_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    """Trap 45: draws depend on a row's content, not on when or where it was asked."""
    assert contents(write(tmp_path / "again")) == contents(whole)
    turned = [{k: v.flip(0) for k, v in batch.items()} for batch in reversed(DATA)]
    other = write(tmp_path / "turned", data=turned)
    assert same(read_all(other), read_all(whole))


def test_keys_are_content(whole: Path) -> None:
    """Trap 45: padding, its side, order and company change nothing; counter-example: the number of a row."""
    teacher = CachedTeacher(whole)
    one = DATA[3]
    length = int(one["attention_mask"][1].sum())
    alone = {k: v[1:2, :length] for k, v in one.items()}
    expected = teacher(alone).sparse
    wide = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in alone.items()}
    left = {k: torch.nn.functional.pad(v, (5, 0)) for k, v in alone.items()}
    assert expected is not None
    for batch, place in ((one, (1, slice(length))), (wide, (0, slice(length))), (left, (0, slice(5, None)))):
        found = teacher(batch).sparse
        assert found is not None and torch.equal(found.ids[place], expected.ids[0])
    by_number = CachedTeacher(whole)(DATA[0]).sparse
    assert by_number is not None and not torch.equal(by_number.ids[1, :2], expected.ids[0, :2])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (
        lambda d: (d / "shard-00000-000001.safetensors").write_bytes(
            (d / "shard-00000-000001.safetensors").read_bytes()[:-7]
        ),
        "shard-00000-000001.safetensors has .* bytes, not .*: it is cut short or was changed.*hf-kd cache",
    ),
    "missing shard": (
        lambda d: (d / "shard-00000-000002.safetensors").unlink(),
        "shard-00000-000002.safetensors is missing.*hf-kd cache",
    ),
    "header of a shard": (
        lambda d: flip(d / "shard-00000-000000.safetensors", 5),
        "shard-00000-000000.safetensors is damaged",
    ),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "is not a teacher cache"),
    "manifest of the future": (
        lambda d: edit(d / "manifest.json", lambda c: c.update(schema_version=99)),
        "schema_version 99, but this hf_kd reads 1 to 1: upgrade",
    ),
    "edited manifest": (
        lambda d: edit(d / "manifest.json", lambda c: c["codec"].update(temperature=3.0)),
        "manifest.json is damaged or was edited",
    ),
    "manifest cut short": (
        lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text()[:50]),
        "manifest.json is damaged",
    ),
    "manifest of no mapping": (lambda d: (d / "manifest.json").write_text("[1]"), "holds no mapping"),
    "unknown fields": (
        lambda d: edit(d / "manifest.json", lambda c: (c.update(more=1), sign(c))),
        "has the fields .*'more'.* not those of a manifest",
    ),
    "a fidelity of its own": (
        lambda d: edit(d / "manifest.json", lambda c: (c.update(fidelity="rumours"), sign(c))),
        "fidelity is 'rumours'",
    ),
    "a codec that can't be": (
        lambda d: edit(d / "manifest.json", lambda c: (c["codec"].update(entries=999), sign(c))),
        "entries=999",
    ),
    "a list that leads elsewhere": (
        lambda d: edit(d / "shards-00000.json", lambda c: c["shards"][0].update(file="../x")),
        r"shards-00000.json is damaged: .*'../x'.* is not a shard",
    ),
    "a list that leads to the root": (
        lambda d: edit(d / "shards-00000.json", lambda c: c["shards"][0].update(file="/etc/passwd")),
        "is not a shard",
    ),
    "a list of something else": (
        lambda d: edit(d / "shards-00000.json", lambda c: c.update(shards=7)), "has no list of shards",
    ),
    "no shards": (lambda d: (d / "shards-00000.json").unlink(), "has no rows: run hf-kd cache to its end"),
}  # fmt: skip


def sign(content: dict[str, Any]) -> None:
    """Give an edited manifest its right checksum."""
    content.pop("checksum", None)
    content["checksum"] = store._digest(content)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(cache: Path, name: str) -> None:
    """Trap 48: opening a damaged cache is an error that says which part."""
    damage, message = DAMAGES[name]
    damage(cache)
    with pytest.raises(CacheError, match=message):
        CachedTeacher(cache)


def test_a_flipped_bit_is_found_when_its_row_is_read(cache: Path) -> None:
    """Trap 48: the size is right, only the checksum knows; other rows may be read."""
    shard = read_shards(cache)[0]
    flip(cache / shard.file, shard.bytes - 1)
    assert "another checksum" in str(check_shard(cache, shard, content=True))
    with pytest.raises(
        CacheError, match="another checksum than when it was written.*hf-kd cache command again"
    ):
        read_all(cache)
    read_all(cache, DATA[-2:])


def test_a_damaged_head(tmp_path: Path) -> None:
    """Trap 48: the teacher's output layer is checked too."""
    folder = write(tmp_path / "hidden", fidelity="hidden")
    read_all(folder)
    flip(folder / "head.safetensors", -3)
    with pytest.raises(CacheError, match=r"head.safetensors is missing or damaged"):
        CachedTeacher(folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "two"])
def test_torn_shards_are_written_again(cache: Path, whole: Path, damage: str) -> None:
    """Trap 48: the next writer makes the same bytes; sound shards are not asked about again."""
    first = cache / "shard-00000-000001.safetensors"
    if damage == "flip":
        flip(first, -20)
    elif damage == "cut":
        first.write_bytes(first.read_bytes()[:100])
    else:
        first.unlink()
    if damage == "two":
        (cache / "shard-00000-000003.safetensors").unlink()
    teacher = MadeTeacher()
    write(cache, teacher=teacher)
    assert contents(cache) == contents(whole)
    assert teacher.asked <= 2 + len(DATA) * (2 if damage == "two" else 1) / 3


def test_a_whole_cache_is_not_asked_again(cache: Path, whole: Path) -> None:
    teacher = MadeTeacher()
    write(cache, teacher=teacher)
    assert contents(cache) == contents(whole)
    assert teacher.asked == 1  # what its answers look like


def _hold(folder: Path, held: Any, leave: Any) -> None:
    with locked(folder):
        held.set()
        leave.wait(30)


def test_a_second_writer_is_refused(cache: Path) -> None:
    """Two writers of one folder would write over each other; the lock goes with its process."""
    held, leave = FORK.Event(), FORK.Event()
    process = FORK.Process(target=_hold, args=(cache, held, leave))
    process.start()
    assert held.wait(30)
    with pytest.raises(CacheError, match="is being written by another process: wait for it, or choose"):
        write(cache)
    process.kill()
    process.join()
    write(cache)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["shard", "list"])
def test_a_full_disk(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    """Trap 48: says how many rows are safe, leaves nothing half written, and goes on when there is room."""
    written = 0
    real = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        nonlocal written
        if "w" in mode and self.name.startswith(".shard-" if where == "shard" else ".shards-"):
            written += 1
            if written > 2:
                real(self, mode, *args, **kwargs).close()
                raise OSError(number, "full")
        return real(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(CacheError, match=r"is full: [1-9]\d* rows of this writer are safe. Make room"):
            write(tmp_path / "full")
    assert not [name for name in contents(tmp_path / "full") if name.startswith(".")]
    safe = read_shards(tmp_path / "full")
    assert len(safe) == 2 and CachedTeacher(tmp_path / "full").rows == sum(s.rows for s in safe)
    assert contents(write(tmp_path / "full")) == contents(whole)


def test_other_errors_of_the_disk_are_not_explained_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="broken") as caught:
        write(tmp_path / "cache")
    assert not isinstance(caught.value, CacheError)


def _write_slowly(folder: Path) -> None:
    write(folder, delay=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_killed_and_resumed(tmp_path: Path, whole: Path, seed: int) -> None:
    """Trap 48: killed at random moments, again and again; in the end the files are those of a quiet run."""
    folder, chance = tmp_path / "cache", random.Random(seed)
    killed = 0
    for _ in range(3):
        process = FORK.Process(target=_write_slowly, args=(folder,))
        process.start()
        time.sleep(chance.uniform(0.02, 0.4))
        killed += process.is_alive()
        process.kill()
        process.join()
        listed = read_shards(folder) if folder.exists() else []
        assert all(check_shard(folder, shard, content=True) is None for shard in listed)
    assert killed
    write(folder)
    assert contents(folder) == contents(whole)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"seed": 1}, "teacher fingerprint: it has 'seed 0', this run 'seed 1'"),
    "revision": (
        {"revision": "b", "fingerprint": "other"}, "teacher revision: it has 'a', this run 'b'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_teacher_is_not_mixed_in(cache: Path, name: str) -> None:
    """Trap 49: a writer with another teacher is refused, and both are named."""
    identity, message = OTHERS[name]
    with pytest.raises(CacheError, match=message):
        write(cache, teacher=MadeTeacher(**identity))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"entries": 7}, "codec: it has .*'entries': 6.*this run .*'entries': 7"),
        ({"temperature": 2.0}, "'temperature': 1.0.*'temperature': 2.0"),
        ({"bits": 8}, "'bits': 16.*'bits': 8"),
        ({"fidelity": "logits"}, "fidelity: it has 'sparse', this run 'logits'"),
    ],
)
def test_other_settings_are_not_mixed_in(cache: Path, options: dict[str, Any], message: str) -> None:
    """Trap 49: nor is a writer with other settings."""
    with pytest.raises(CacheError, match=message):
        write(cache, **options)


@pytest.mark.parametrize(
    "asked,message",
    [
        ({"name": "other/model"}, "teacher: the cache has 'made', this run 'other/model'"),
        ({"revision": "b"}, "teacher_revision: the cache has 'a', this run 'b'"),
        ({"dtype": "bfloat16"}, "teacher_dtype: the cache has 'float32', this run 'bfloat16'"),
        ({"tokenizer": "ffff"}, "tokenizer: the cache has 'eeee', this run 'ffff'"),
        ({"live": MadeTeacher(seed=1)}, "teacher weights: the cache has 'seed 0', this run 'seed 1'"),
    ],
)
def test_a_run_that_asks_for_another_teacher(cache: Path, asked: dict[str, Any], message: str) -> None:
    """Trap 49: a reader is refused, naming both; counter-example: the folder alone would do."""
    edit(cache / "manifest.json", lambda c: (c.update(tokenizer="eeee"), sign(c)))
    CachedTeacher(cache)
    cpu = torch.device("cpu")
    assert open_cache(str(cache), device=cpu, name="made", revision="a", tokenizer="eeee").rows == 60
    with pytest.raises(CacheError, match=message):
        open_cache(str(cache), device=cpu, **asked)


def test_a_row_that_is_not_there(whole: Path) -> None:
    """Trap 48: never the task loss in silence: an error with the row and why, or the live answer."""
    other = batches(rows=8, size=8, seed=5)[0]
    mixed = {k: v.clone() for k, v in other.items()}
    length = min(mixed["input_ids"].shape[1], DATA[0]["input_ids"].shape[1])
    for name in mixed:
        mixed[name][0] = 0
        mixed[name][0, :length] = DATA[0][name][0, :length]
    with pytest.raises(CacheError) as caught:
        CachedTeacher(whole)(mixed)
    said = str(caught.value)
    first = 1 if int(DATA[0]["attention_mask"][0].sum()) <= length else 0
    assert f"row {first} of this batch" in said and str(mixed["input_ids"][first].tolist()[:8]) in said
    assert "another max_length" in said and "cache_miss='compute'" in said

    live = MadeTeacher()
    reader = CachedTeacher(whole, live=live, miss="compute")
    found = reader(mixed).sparse
    again = reader(mixed).sparse
    assert found is not None and again is not None and torch.equal(found.ids, again.ids)
    assert live.asked == 1, "an answer is kept"
    mask = mixed["attention_mask"].bool()
    log_p = live(mixed).dense()["logits"].log_softmax(-1)
    expected = log_p.gather(-1, found.ids.clamp_min(0))
    assert ((found.log_probs - expected)[mask].abs() < 5e-4).all()
    for options, message in (
        ({"miss": "compute"}, "needs a teacher to ask"),
        ({"miss": "guess"}, "'guess' is not known: use one of error, compute"),
    ):
        with pytest.raises(ValueError, match=message):
            CachedTeacher(whole, **options)  # type: ignore[arg-type]


def test_random_columns_are_found() -> None:
    """Trap 46: what differs when the same rows are collated twice is what no cache can know."""
    batch, other = DATA[0], {k: v.clone() for k, v in DATA[0].items()}
    assert changing_columns(batch, other) == []
    other["input_ids"][0, 0] = 36 if int(batch["input_ids"][0, 0]) != 36 else 35
    assert changing_columns(batch, other) == ["input_ids"]
    wider = {k: torch.nn.functional.pad(v, (0, 1)) for k, v in batch.items()}
    assert changing_columns(batch, wider) == ["attention_mask", "input_ids"]


def test_a_teacher_that_is_broken(tmp_path: Path) -> None:
    """NaN is not stored as an answer, at any fidelity."""

    class Broken(MadeTeacher):
        def __call__(self, batch: Any) -> TeacherSignal:
            logits = super().__call__(batch).dense()["logits"]
            if self.asked > 1:
                logits[0, 0, 0] = torch.nan
            return TeacherSignal({"logits": logits})

    for fidelity in ("sparse", "logits"):
        with pytest.raises(ValueError, match="NaN"):
            write(tmp_path / fidelity, teacher=Broken(), fidelity=fidelity)


def test_shards_are_mapped_and_not_writable(whole: Path) -> None:
    """Trap 11: what is read is a copy: nobody can edit the teacher's answer in place."""
    arrays = map_arrays(whole / read_shards(whole)[0].file)
    assert not arrays["sparse"].flags.writeable
    before = read_all(whole)
    teacher = CachedTeacher(whole)
    signal = teacher(DATA[0]).sparse
    assert signal is not None
    signal.log_probs.zero_()
    assert same(read_all(whole), before)


FILES = ("manifest.json", "shards-00000.json", "shard-00000-000000.safetensors", "head.safetensors")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, bytes], Any]]:
    """A small cache of each fidelity, its bytes, and what it says."""
    made = {}
    for fidelity in ("sparse", "logits", "hidden"):
        folder = tmp_path_factory.mktemp("fuzz") / fidelity
        write(folder, fidelity=fidelity, data=DATA[:4])
        made[fidelity] = folder, contents(folder), read_all(folder, DATA[:4])
    return made


@given(st.sampled_from(["sparse", "logits", "hidden"]), st.sampled_from(FILES), st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_an_error_or_changes_nothing(
    fuzzed: dict[str, tuple[Path, dict[str, bytes], Any]], fidelity: str, file: str, data: st.DataObject
) -> None:
    """Trap 48: bits, bytes, cuts and other JSON at any place: an error of the cache, or the right answer."""
    folder, good, said = fuzzed[fidelity]
    if file not in good:
        return
    content = bytearray(good[file])
    kind = data.draw(st.sampled_from(["bits", "cut", "insert", "json"]))
    if kind == "bits":
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif kind == "insert":
        place = data.draw(st.integers(0, len(content)))
        content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    elif file.endswith(".json"):
        content = bytearray(json.dumps(edited(json.loads(good[file]), data)).encode())
    (folder / file).write_bytes(bytes(content))
    try:
        assert same(read_all(folder, DATA[:4]), said)
    except ValueError:
        pass
    finally:
        (folder / file).write_bytes(good[file])


def edited(content: Any, data: st.DataObject) -> Any:
    """JSON with one value somewhere replaced by another."""
    if isinstance(content, dict | list) and content and data.draw(st.integers(0, 4)):
        keys = sorted(content) if isinstance(content, dict) else range(len(content))
        key = data.draw(st.sampled_from(list(keys)))
        content[key] = edited(content[key], data)
        return content
    return data.draw(
        st.one_of(
            st.none(), st.booleans(), st.integers(-5, 1 << 40), st.text(max_size=8), st.just([]), st.just({}),
            st.floats(allow_nan=True),
        )
    )  # fmt: skip


def test_the_manifest_comes_back(whole: Path) -> None:
    made = Manifest.read(whole)
    assert made.fidelity == "sparse" and made.teacher["name"] == "made" and made.columns == [
        "input_ids", "attention_mask",
    ]  # fmt: skip
    assert np.isclose(made.codec["temperature"], 1.0)  # type: ignore[index]
