"""What is said about mistakes is what `tests/messages.txt` holds, and each message can be acted upon."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import messages

STORED = messages.PAGE.read_text(encoding="utf-8")
# How a message goes on after it has said what is wrong.
FIX = re.compile(
    r"\b(set|use|did you mean|give|pass|there (is|are)|as in|leave it out|keep one|drop|rename|choose|"
    r"take one|see --help|needs|make (it|one|them|the cache)|takes|must|its options|write|distil|check|build|"
    r"run|start|raise|lower|add)\b|"
    r"--cache_dir DIR",
    re.IGNORECASE,
)
ENTRIES = dict(entry.split("\n", 1) for entry in re.split(r"^\$ ", STORED, flags=re.MULTILINE)[1:])


def test_messages_are_the_stored_ones(tmp_path: Path) -> None:
    """`python -m tests.messages > tests/messages.txt` was run, and what changed was read.

    In a process of its own, whose warnings and logging no other test has touched.
    """
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.messages"],
        cwd=root, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == STORED


@pytest.mark.parametrize("name", ENTRIES)
def test_message_says_what_to_do(name: str) -> None:
    """No traceback, no error that was not meant for users, and a fix or a list of what there is."""
    message = ENTRIES[name]
    assert "traceback" not in message and "(nothing" not in message
    assert not re.match(r"(?!(Value|Cache|Server|Group|Rank)Error)\w+Error:", message)
    assert FIX.search(message), message
