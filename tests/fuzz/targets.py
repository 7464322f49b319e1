"""Readers of files from elsewhere, as functions of bytes; and seeds, which are files that they accept.

A target returns on success and on a documented error; anything else escapes, and is a finding.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import torch

from hf_kd import whole
from hf_kd.config import _Parser, _read_yaml
from hf_kd.results import Arm, Results
from hf_kd.spikes import SpikeWatch
from hf_kd.teachers import CachedTeacher
from hf_kd.teachers.cache import CacheError, Manifest
from hf_kd.teachers.cache.store import map_arrays, read_shards

from ..cached import batches, write

Target = Callable[[bytes], None]
_PLACE = "/dev/shm" if Path("/dev/shm").is_dir() else None
FOLDER = Path(tempfile.mkdtemp(prefix="hf_kd_fuzz_", dir=_PLACE))
_DATA = batches(rows=8)
_CACHE = write(FOLDER / "cache", data=_DATA)
_PARSER = _Parser()


def _file(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def results(data: bytes) -> None:
    """A results file, and what a report says of it."""
    try:
        read = Results.read(_file("results.json", data))
    except ValueError:
        return
    str(read.verdict)


def manifest(data: bytes) -> None:
    """The manifest of a cache."""
    _file("manifest.json", data)
    try:
        Manifest.read(FOLDER)
    except CacheError:
        return


def shards(data: bytes) -> None:
    """The list of a cache's shards; every name has to stay in the folder."""
    (FOLDER / "lists").mkdir(exist_ok=True)
    _file("lists/shards-00000.json", data)
    try:
        found = read_shards(FOLDER / "lists")
    except CacheError:
        return
    assert all("/" not in shard.file and not shard.file.startswith(".") for shard in found)


def arrays(data: bytes) -> None:
    """A shard of a cache."""
    try:
        found = map_arrays(_file("shard.safetensors", data))
    except CacheError:
        return
    for array in found.values():
        array[:1].tobytes()


def cache(data: bytes) -> None:
    """A whole cache, one of whose files (the first byte says which) is another: opened and read."""
    files = sorted(p.name for p in _CACHE.iterdir() if p.name != ".lock")
    name = files[(data[0] if data else 0) % len(files)]
    original = (_CACHE / name).read_bytes()
    try:
        (_CACHE / name).write_bytes(data[1:])
        teacher = CachedTeacher(_CACHE)
        for batch in _DATA:
            teacher(batch)
    except CacheError:
        return
    finally:
        (_CACHE / name).write_bytes(original)


def checkpoint(data: bytes) -> None:
    """The list of a checkpoint's files."""
    folder = FOLDER / "checkpoint-1"
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text("{}")
    _file("checkpoint-1/checkpoint.json", data)
    found = whole.problem(folder)
    assert found is None or isinstance(found, str)


def spikes(data: bytes) -> None:
    """The record of spikes in a checkpoint."""
    _file("spikes.json", data)
    try:
        SpikeWatch().load(FOLDER)
    except ValueError:
        return


def configuration(data: bytes) -> None:
    """A YAML file of options."""
    try:
        _read_yaml(_PARSER, str(_file("config.yaml", data)))
    except ValueError:
        return


def dataset(data: bytes) -> None:
    """A data file; the first byte says of which kind."""
    from hf_kd.data.sources import load_raw
    from hf_kd.options import RunOptions

    datasets.disable_progress_bars()
    kind = ("json", "csv", "txt", "parquet")[(data[0] if data else 0) % 4]
    path = _file(f"data.{kind}", data[1:])
    try:
        load_raw(RunOptions(dataset=str(path), teacher="t", student="s", task="text-classification"))
    except ValueError:
        return


TARGETS: dict[str, Target] = {
    "results": results,
    "manifest": manifest,
    "shards": shards,
    "arrays": arrays,
    "cache": cache,
    "checkpoint": checkpoint,
    "spikes": spikes,
    "configuration": configuration,
    "dataset": dataset,
}


def seeds(name: str) -> list[bytes]:
    """Inputs that the target accepts, to be damaged."""
    arm = Arm(metrics={"accuracy": 0.5}, parameters=1, bytes=1, eval_kl=0.1, eval_agreement=0.9)
    made = Results("t", "accuracy", True, {"teacher": arm, "student": arm, "control": arm}, examples=5)
    found: dict[str, Callable[[], list[bytes]]] = {
        "results": lambda: [made.write(FOLDER / "seed.json").read_bytes()],
        "manifest": lambda: [(_CACHE / "manifest.json").read_bytes()],
        "shards": lambda: [p.read_bytes() for p in _CACHE.glob("shards-*.json")],
        "arrays": lambda: [p.read_bytes() for p in sorted(_CACHE.glob("shard-*"))[:1]],
        "cache": lambda: [
            bytes([i]) + p.read_bytes()
            for i, p in enumerate(sorted(p for p in _CACHE.iterdir() if p.name != ".lock"))
        ],
        "checkpoint": lambda: [b'{"files": {"trainer_state.json": 2}}'],
        "spikes": _spikes,
        "configuration": lambda: [
            b"alpha: 0.3\ndivergence: jsd\ndivergence_options: {beta: 0.1}\ntext_columns: [a, b]\n"
        ],
        "dataset": lambda: [
            b'\x00{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n',
            b"\x01text,label\na,1\nb,0\n",
            b"\x02one line\nanother\n",
        ],
    }
    return found[name]()


def _spikes() -> list[bytes]:
    watch = SpikeWatch()
    for i in range(5):
        watch.judge(step=i, norm=1.0 + i, kl=0.5)
    watch.save(FOLDER)
    return [(FOLDER / "spikes.json").read_bytes()]


def cleanup() -> None:
    """Remove the folder of all inputs."""
    shutil.rmtree(FOLDER, ignore_errors=True)


torch.set_num_threads(1)
