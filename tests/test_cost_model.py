"""The cost model against sums by hand, and the page against the model and the benchmark."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hf_kd.cost_model import Machine, Run, bytes_per_token, gradient_bytes, hours, step, teacher_bytes
from hf_kd.teachers.cache import SparseCodec

from . import scaling_tables

MACHINE = Machine(flops=1e12, link=1e9, disk=1e8)
RUN = Run(student=1e9, teacher=4e9, tokens=1000, signal=200.0)


def test_stages_by_hand() -> None:
    """6 operations a weight and token for the student, 2 for the teacher."""
    none, local = step(replace(RUN, where="none"), MACHINE), step(RUN, MACHINE)
    assert (none.student, none.gradient, none.teacher, none.total) == (6.0, 0.0, 0.0, 6.0)
    assert (local.teacher, local.total, local.bound) == (8.0, 14.0, "teacher")
    cached = step(replace(RUN, where="cache", signal=2e6), MACHINE)
    assert (cached.signal, cached.total, cached.bound) == (20.0, 26.0, "signal")


def test_a_ring_sends_twice_what_others_hold() -> None:
    assert gradient_bytes(10, 1) == 0.0
    assert gradient_bytes(10, 2) == 40.0
    assert gradient_bytes(10, 1000) == pytest.approx(79.92)
    two = step(replace(RUN, where="none", devices=2), MACHINE)
    assert two.gradient == pytest.approx(4.0)
    assert two.total == pytest.approx(10.0)


def test_what_is_asked_ahead_hides() -> None:
    """Two students on one teacher that needs 16 s a step: 16.4 s ahead, 26.4 s in turns."""
    group = replace(RUN, where="group", devices=2, signal=4e5)
    ahead, turns = step(group, MACHINE), step(replace(group, ahead=False), MACHINE)
    assert (ahead.teacher, ahead.signal) == (16.0, 0.4)
    assert ahead.total == pytest.approx(16.4)
    assert turns.total == pytest.approx(10.0 + 16.4)
    assert step(replace(group, teachers=4), MACHINE).total == pytest.approx(10.0)


def test_hidden_states_leave_the_head_to_the_student() -> None:
    found = step(replace(RUN, where="group", head=1e9), MACHINE)
    assert (found.student, found.teacher) == (8.0, 6.0)


def test_hours_of_a_run() -> None:
    assert hours(replace(RUN, where="none"), MACHINE, 3.6e6) == pytest.approx(6.0)
    assert hours(replace(RUN, where="none", devices=2), MACHINE, 3.6e6) == pytest.approx(5.0)


def test_bytes_are_those_of_the_cache() -> None:
    shape = {"vocabulary": 32_000, "width": 1024}
    assert bytes_per_token("logits", **shape) == 64_000
    assert bytes_per_token("hidden", number=4, **shape) == 4096
    assert bytes_per_token("sparse", **shape) == SparseCodec(32_000, 28).stride


def test_a_teacher_in_pieces_by_hand() -> None:
    """4 billion weights of 2 bytes for 1,000 tokens: 8 MB each; a device of four lacks three quarters."""
    moved = {
        way: teacher_bytes(way, RUN, width=512, devices=4)
        for way in ("device_map", "sharded", "offload", "group")
    }
    assert moved == {"device_map": 3072.0, "sharded": 6e6, "offload": 8e6, "group": 200.0}
    with pytest.raises(ValueError, match="way='disk' is not known: use one of device_map, sharded"):
        teacher_bytes("disk", RUN, width=1)


def test_a_sharded_teacher_moves_what_was_measured() -> None:
    """Over the loopback device, protocol included."""
    found = json.loads(scaling_tables.RESULTS.read_text())
    run = replace(
        RUN, teacher=found["model"]["weights"]["teacher"], tokens=found["sharded_teacher"]["tokens"]
    )
    predicted = teacher_bytes("sharded", run, width=1, devices=2, number=4)
    assert predicted == pytest.approx(found["sharded_teacher"]["bytes_per_token"], rel=0.01)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="where='moon' is not known: use one of none, local, cache, group"):
        replace(RUN, where="moon")
    with pytest.raises(ValueError, match="devices=0 is not above 0"):
        replace(RUN, devices=0)
    with pytest.raises(ValueError, match="fidelity='all' is not known"):
        bytes_per_token("all", vocabulary=2, width=2)


def test_the_page_has_the_models_tables() -> None:
    """`python -m tests.scaling_tables` was put into docs/scaling.md after the last change."""
    page = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    for table in scaling_tables.tables():
        assert table in page
