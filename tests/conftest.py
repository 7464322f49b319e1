"""Shared settings: no network, few threads."""

from __future__ import annotations

import gc
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Files that take longest begin first, so that at the end no worker waits for another one's long file.
LONGEST = (
    "test_notebooks.py", "test_cli.py", "test_distributed.py", "test_gradient.py", "test_run.py",
    "test_stopped.py", "test_sharding.py", "test_fusing.py", "test_messages.py", "test_documents.py",
    "test_caching.py", "test_examples.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which `make test` deals out the files."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """What is imported stays: every training ends with `gc.collect()`, which looked through it for 0.4 s."""
    gc.freeze()
