"""Where numbers come from: the same data has one hash, and no energy is made up."""

from __future__ import annotations

import re
import subprocess

from datasets import Dataset

from hf_kd import provenance
from hf_kd.provenance import Meter, data_fingerprint, git_revision, versions


def test_the_same_rows_have_one_hash_and_a_changed_row_another():
    rows = [{"input_ids": [i, i + 1], "labels": i % 2} for i in range(20)]
    held = data_fingerprint(Dataset.from_list(rows))
    assert held == data_fingerprint(rows)
    assert held["rows"] == 20 and held["columns"] == ["input_ids", "labels"]
    changed = [*rows[:7], {"input_ids": [7, 9], "labels": 1}, *rows[8:]]
    assert data_fingerprint(changed)["hash"] != held["hash"]
    assert data_fingerprint(rows[:19])["hash"] != held["hash"]
    assert data_fingerprint(iter(rows)) is None and data_fingerprint(None) is None


def counters(folder, **joules):
    for name, value in joules.items():
        place = folder / f"intel-rapl:{name[1:].replace('_', ':')}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "energy_uj").write_text(str(int(value * 1e6)))
        (place / "max_energy_range_uj").write_text(str(int(1000 * 1e6)))


def test_energy_is_read_from_the_counters_of_the_packages_over_their_wrap(tmp_path):
    counters(tmp_path, p0=990.0, p1=5.0, p0_0=3.0)
    meter = Meter(watts=50, counters=tmp_path)
    counters(tmp_path, p0=26.0, p1=41.0, p0_0=900.0)  # package 0 began again at 1000; 0:0 is a part of it
    energy = meter.record()["energy"]
    assert energy["wh"] == round((36 + 36) / 3600, 4) and "RAPL" in energy["how"]


def test_energy_is_the_stated_power_times_the_time_or_not_measured(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(provenance.time, "monotonic", lambda: now[0])
    stated, silent = Meter(watts=90, counters=tmp_path), Meter(counters=tmp_path)
    now[0] += 1200
    said = stated.record()
    assert said["minutes"] == 20 and said["energy"]["wh"] == 30
    assert "estimate" in said["energy"]["how"] and "90" in said["energy"]["how"]
    assert silent.record()["energy"]["wh"] is None
    assert silent.record()["energy"]["how"].startswith("not measured")


def test_counters_that_can_not_be_read_are_no_energy(tmp_path):
    counters(tmp_path, p0=1.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("")
    assert Meter(counters=tmp_path).record()["energy"]["wh"] is None


def test_the_revision_is_that_of_the_work_tree_and_says_when_it_was_changed(tmp_path):
    assert git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    for what in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *what], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", git_revision(tmp_path))
    (tmp_path / "file").write_text("one")
    for what in (["add", "file"], ["commit", "-q", "-m", "second"]):
        subprocess.run([*git, *what], check=True)
    (tmp_path / "file").write_text("two")
    assert git_revision(tmp_path).endswith("-dirty")


def test_versions_are_those_that_decide():
    assert {"torch", "transformers", "datasets"} <= versions().keys()
