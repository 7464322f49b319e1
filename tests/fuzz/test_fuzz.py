"""A short run of what `benchmarks/fuzz.py` does a million times; fixed seeds make a finding come again."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import targets
from .mutate import mutate

COUNTS = {"cache": 150, "dataset": 12, "configuration": 400}


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    targets.cleanup()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_are_accepted(name: str) -> None:
    """A target whose seeds are refused would test its first check only."""
    accepted = {
        "results": lambda d: targets.Results.read(targets._file("results.json", d)),
        "shards": lambda d: targets.read_shards(targets._CACHE),
        "arrays": lambda d: targets.map_arrays(targets._file("shard.safetensors", d)),
        "configuration": lambda d: targets._read_yaml(targets._PARSER, str(targets._file("config.yaml", d))),
    }
    for seed in targets.seeds(name):
        targets.TARGETS[name](seed)
        assert accepted.get(name, lambda d: True)(seed)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_damaged_files(name: str) -> None:
    """Nothing but the documented errors."""
    chance, seeds = random.Random(name), targets.seeds(name)
    for _ in range(COUNTS.get(name, 1500)):
        targets.TARGETS[name](mutate(chance.choice(seeds), chance))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    "schema_version",
    "task",
    "arms",
    "teacher",
    "metrics",
    "shards",
    "file",
    "files",
    "norms",
    "counts",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["results", "manifest", "shards", "checkpoint", "spikes"]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6) | JSON,
)
def test_json_of_any_shape(name: str, value: object) -> None:
    """Right syntax, wrong types, names that the readers know."""
    import json

    targets.TARGETS[name](json.dumps(value).encode())


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([n for n in targets.TARGETS if n not in ("dataset", "cache")]), st.binary(max_size=64))
def test_bytes(name: str, data: bytes) -> None:
    targets.TARGETS[name](data)
