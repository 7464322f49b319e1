"""Mistakes with a teacher's cache: files that are really damaged, and caches of something else.

`tests/messages.py` collects what is said.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hf_kd import DistillationArguments, DistillationTrainer, TeacherSignal
from hf_kd.caching import refuse_random
from hf_kd.teachers import CachedTeacher, ModelTeacher
from hf_kd.teachers.cache import store
from hf_kd.teachers.cache.card import push_cache
from hf_kd.teachers.cache.make import CacheSettings, describe
from hf_kd.teachers.cache.opening import open_cache
from hf_kd.waiting import WaitingTeacher, woken

from .cached import MadeTeacher, batches, write

Mistakes = dict[str, Callable[[], Any]]
ROWS = batches(8)


def edited(file: Path, **values: Any) -> Path:
    """Change entries of a JSON file; the folder that it is in."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return file.parent


def flipped(file: Path, place: int = -3) -> Path:
    """Change one byte of a file; the folder that it is in."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    return file.parent


def missing(file: Path) -> Path:
    """Remove a file; the folder that it was in."""
    file.unlink()
    return file.parent


def cut(file: Path) -> Path:
    """Take the end of a file away; the folder that it is in."""
    file.write_bytes(file.read_bytes()[:-9])
    return file.parent


def with_a_damaged_cache(folder: Path) -> Mistakes:
    """A cache that is torn, edited, or of another version."""
    write(folder / "said", data=ROWS)
    write(folder / "hidden", data=ROWS, fidelity="hidden")

    def like(name: str, source: str = "said") -> Path:
        return Path(shutil.copytree(folder / source, folder / f"cache with {name}"))

    def shard(name: str) -> Path:
        return next(like(name).glob("shard-*.safetensors"))

    def newer(path: Path) -> Path:
        return edited(path / store.MANIFEST_FILE, schema_version=99)

    def other_fields(path: Path) -> Path:
        content = json.loads((path / store.MANIFEST_FILE).read_text())
        del content["checksum"], content["fidelity"]
        content["checksum"] = store._digest(content)
        (path / store.MANIFEST_FILE).write_text(json.dumps(content))
        return path

    def changed_byte() -> None:
        teacher = CachedTeacher(flipped(shard("a changed byte")))
        for batch in ROWS:
            teacher(batch)

    return {
        "a newer hf_kd": lambda: CachedTeacher(newer(like("a newer version"))),
        "an edited manifest": lambda: CachedTeacher(
            edited(like("an edited manifest") / store.MANIFEST_FILE, dtype="float16")
        ),
        "a torn manifest": lambda: CachedTeacher(cut(like("a torn manifest") / store.MANIFEST_FILE)),
        "another manifest": lambda: CachedTeacher(other_fields(like("another manifest"))),
        "no shard list": lambda: CachedTeacher(missing(like("no list") / "shards-00000.json")),
        "a shard list of something else": lambda: CachedTeacher(
            edited(like("another list") / "shards-00000.json", shards=[{"file": "../x"}])
        ),
        "a missing shard": lambda: CachedTeacher(missing(shard("no shard"))),
        "a shard cut short": lambda: CachedTeacher(cut(shard("a torn shard"))),
        "a changed byte": changed_byte,
        "a changed header": lambda: CachedTeacher(flipped(shard("a changed header"), 9)),
        "another output layer": lambda: CachedTeacher(
            flipped(like("a changed head", "hidden") / "head.safetensors")
        ),
        "an upload of a damaged cache": lambda: push_cache(flipped(shard("an upload")), "me/said"),
    }


def with_a_cache(folder: Path, made: Mapping[str, Any]) -> Mistakes:
    """A cache of something else, or that can't hold what the teacher says; after `with_a_damaged_cache`."""

    def two_writers() -> None:
        with store.locked(folder / "said"), store.locked(folder / "said"):
            raise AssertionError("both write")

    def full() -> None:
        with mock.patch("hf_kd.teachers.cache.writer.write_shard", side_effect=OSError(28, "full")):
            write(folder / "full", data=ROWS)

    def not_finite() -> None:
        teacher = MadeTeacher()
        teacher.table *= 1e6
        write(folder / "too large", data=ROWS, teacher=teacher, fidelity="logits", dtype="float16")

    class Changing:
        """A collator that masks at random."""

        def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
            return {"input_ids": torch.rand(len(rows), 2)}

    def opened(**options: Any) -> CachedTeacher:
        return open_cache(str(folder / "said"), device=torch.device("cpu"), **options)

    def other_weights() -> None:
        waiting = WaitingTeacher(made["teacher"].config, "my-finetuned-bert", lambda: made["teacher"])
        args = SimpleNamespace(teacher_quantization=None, teacher_cache="said", output_dir="out")
        setting: Any = SimpleNamespace(teacher=waiting, run=SimpleNamespace(teachers=None), args=args)
        woken(setting, {"name": "my-finetuned-bert", "fingerprint": "0123456789abcdef"})

    square = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 1, 3, 3)}
    inputs = {name: torch.tensor(made["train_dataset"][:2][name]) for name in ("input_ids", "attention_mask")}
    classifier = ModelTeacher(made["teacher"], ("logits",))
    data: Any = SimpleNamespace(
        train_dataset=[{"input_ids": 1}] * 2, data_collator=Changing(), _remove_unused_columns=lambda d, _: d
    )
    run = DistillationArguments(output_dir="out", use_cpu=True, teacher_cache=str(folder / "said"))
    return {
        "rows that are not there": lambda: CachedTeacher(folder / "said")(batches(4, seed=1)[0]),
        "cache_miss='ask'": lambda: CachedTeacher(folder / "said", miss="ask"),
        "nobody to ask": lambda: CachedTeacher(folder / "said", miss="compute"),
        "another teacher": lambda: write(folder / "said", teacher=MadeTeacher(seed=1), data=ROWS),
        "other settings": lambda: write(folder / "said", data=ROWS, entries=7, bits=8),
        "another teacher than the run's": lambda: DistillationTrainer(args=run, **made),
        "other options than the run's": lambda: opened(name="mine", revision="v2", dtype="bfloat16"),
        "the teacher's weights changed": other_weights,
        "two writers": two_writers,
        "a full disk": full,
        "a teacher out of float16's range": not_finite,
        "columns made anew": lambda: refuse_random(data),
        "a mask of who sees whom": lambda: CachedTeacher(folder / "said")(square),
        "hidden states of a classifier": lambda: describe(
            classifier, inputs, CacheSettings(fidelity="hidden")
        ),
        "an unknown cache_dtype": lambda: describe(
            MadeTeacher(), ROWS[0], CacheSettings(fidelity="logits", dtype="int8")
        ),
        "too many entries": lambda: write(folder / "many", data=ROWS, entries=300, teacher=Wide()),
    }  # fmt: skip


class Wide(MadeTeacher):
    """More classes than a record has room for."""

    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        return TeacherSignal({"logits": torch.zeros(*batch["input_ids"].shape, 400)})
