"""Where the numbers of a run come from: everything that one would need to get them again.

Energy is never invented: it is read from the processor's own counters (RAPL) where the system lets us,
or it is the power that the user states times the time that the run took; else it is "not measured".
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("hf-kd", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
_RAPL = Path("/sys/class/powercap")
_SAMPLE = 256


class Meter:
    """Time and, where it can be known, energy from its making on.

    Args:
        watts: Power that the machine draws while it works, in watts, as the user knows it; None: not known.
        counters: Where Linux shows the processor's energy counters.
    """

    def __init__(self, watts: float | None = None, *, counters: Path = _RAPL) -> None:
        """Start."""
        self.watts, self._counters = watts, counters
        self._start, self._date = time.monotonic(), datetime.datetime.now(datetime.UTC)
        self._joules = self._read()

    def record(self) -> dict[str, Any]:
        """`started` (UTC), `minutes`, and `energy`: watt-hours and how they are known."""
        seconds = time.monotonic() - self._start
        return {
            "started": self._date.isoformat(timespec="seconds"),
            "minutes": round(seconds / 60, 2),
            "energy": self._energy(seconds),
        }

    def _energy(self, seconds: float) -> dict[str, Any]:
        now = self._read()
        if self._joules and now and self._joules.keys() == now.keys():
            spent = 0.0
            for name, (joules, limit) in now.items():
                used = joules - self._joules[name][0]
                spent += used if used >= 0 else used + limit  # the counter starts again at its limit
            return {
                "wh": round(spent / 3600, 4),
                "how": "processor packages alone, by RAPL",
            }
        if self.watts is not None:
            wh = self.watts * seconds / 3600
            return {
                "wh": round(wh, 4),
                "how": f"estimate: option watts={self.watts:g} x {seconds / 60:.2f} minutes",
            }
        return {"wh": None, "how": "not measured: no readable energy counters, and option watts is not set"}

    def _read(self) -> dict[str, tuple[float, float]]:
        """Joules of each processor package, and where its counter starts again."""
        found = {}
        for folder in sorted(self._counters.glob("intel-rapl:*")):
            if folder.name.count(":") > 1:
                continue  # a part of a package, counted in it
            try:
                joules, limit = (
                    int((folder / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj")
                )
            except (OSError, ValueError):
                return {}
            found[folder.name] = (joules, limit)
        return found


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: str | os.PathLike[str] | None = None) -> str | None:
    """The commit of the work tree that a folder is in (default: the current one), "-dirty" if it was changed.

    None where there is no git or no work tree.
    """
    command = ["git", "-C", str(folder or Path.cwd())]
    try:
        head, changed = (
            subprocess.run([*command, *what], capture_output=True, text=True, check=True, timeout=10).stdout
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("-dirty" if changed.strip() else "")


def data_fingerprint(rows: Any) -> dict[str, Any] | None:
    """Number of rows of a data set, its columns, and a hash of its contents.

    The hash is over up to 256 rows spread evenly, so it is the same wherever and however they were loaded.
    None for what has no length.
    """
    if rows is None or not hasattr(rows, "__len__"):
        return None
    digest = hashlib.sha256(str(len(rows)).encode())
    columns: list[str] = []
    step = max(1, len(rows) // _SAMPLE)
    for i in range(0, len(rows), step):
        row = rows[i]
        if isinstance(row, Mapping):
            columns = columns or sorted(map(str, row))
            row = sorted((str(key), _value(item)) for key, item in row.items())
        digest.update(repr(_value(row)).encode())
    return {"rows": len(rows), "columns": columns, "hash": digest.hexdigest()[:16]}


def _value(item: Any) -> Any:
    """A number, a text or nested lists of them, whatever holds them."""
    if hasattr(item, "tolist"):
        return item.tolist()
    if isinstance(item, Mapping):
        return sorted((str(key), _value(value)) for key, value in item.items())
    return [_value(value) for value in item] if isinstance(item, list | tuple) else item


def cache_identity(folder: str | None) -> dict[str, Any] | None:
    """Which cache of a teacher's answers was read: a hash of its manifest and of its lists of shards.

    These hold the teacher's identity and each shard's checksum, so caches of one hash say the same.
    """
    if not folder:
        return None
    from hf_kd.teachers.cache.opening import local_folder

    place = local_folder(folder)
    digest = hashlib.sha256()
    for path in [place / "manifest.json", *sorted(place.glob("shards-*.json"))]:
        digest.update(path.read_bytes())
    return {"name": folder, "hash": digest.hexdigest()[:16]}
