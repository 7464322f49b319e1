"""Open the cache that a run asks for, and refuse one that was made of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..signal import Teacher
from .reader import CachedTeacher
from .store import MANIFEST_FILE, CacheError, Manifest
from .writer import refuse_other


def open_cache(
    folder: str,
    *,
    device: torch.device,
    miss: str = "error",
    live: Teacher | None = None,
    name: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    tokenizer: str = "",
    rank: int = 0,
) -> CachedTeacher:
    """A cached teacher, checked against what the run says of its teacher.

    Args:
        folder: A directory, or the id of a dataset repository on the Hub.
        device: Where signals are wanted.
        miss: See `CachedTeacher`.
        live: The teacher, where it is in memory: its weights must be those that were asked.
        name: Otherwise, what it would be loaded from.
        revision: The revision that the run asks for.
        dtype: The dtype that the run asks for.
        tokenizer: Hash of the run's tokenizer.
        rank: Of this process.

    Raises:
        CacheError: If the cache is damaged, or was made with another teacher, revision, dtype or tokenizer;
            names both.
    """
    path = local_folder(folder)
    if miss == "compute" and not Path(folder).expanduser().is_dir():
        raise CacheError(
            f"cache_miss='compute' adds what the teacher says to the cache, but teacher_cache={folder!r} is "
            f"the Hub's copy: download it (hf download {folder} --repo-type dataset --local-dir DIR) and "
            "give DIR"
        )
    manifest = Manifest.read(path)
    wanted: dict[str, tuple[Any, Any]] = {}
    if live is not None:
        wanted["teacher weights"] = (
            manifest.teacher.get("fingerprint"),
            live.identity.get("fingerprint"),
        )
        model = getattr(live, "model", None)
        if isinstance(getattr(model, "dtype", None), torch.dtype):
            dtype = str(model.dtype).removeprefix("torch.")  # type: ignore[union-attr]
    elif name is not None:
        wanted["teacher"] = (manifest.teacher.get("name"), name)
    if revision is not None:
        wanted["teacher_revision"] = (manifest.teacher.get("revision"), revision)
    if dtype not in (None, "auto"):
        wanted["teacher_dtype"] = (manifest.dtype, dtype)
    if tokenizer and manifest.tokenizer:
        wanted["tokenizer"] = (manifest.tokenizer, tokenizer)
    differing = {option: pair for option, pair in wanted.items() if pair[0] != pair[1]}
    if differing:
        said = "; ".join(
            f"{option}: the cache has {old!r}, this run {new!r}" for option, (old, new) in differing.items()
        )
        raise CacheError(
            f"teacher_cache={folder!r} was made with something else than this run asks for ({said}). Make a "
            "cache with this run's options, or give the options that the cache was made with."
        )
    return CachedTeacher(path, device=device, live=live, miss=miss, rank=rank)


def start_cache(folder: str, manifest: Manifest) -> None:
    """Make an empty cache, which `cache_miss="compute"` fills; one that is there stays as it is.

    Raises:
        CacheError: If a folder that is there holds something else than the manifest says.
    """
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    if (path / MANIFEST_FILE).exists():
        refuse_other(path, manifest)
    else:
        manifest.write(path)


def local_folder(folder: str) -> Path:
    """The directory itself, or where the Hub's copy of it was put."""
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or folder.startswith(".") or folder.count("/") > 1:
        raise CacheError(f"teacher_cache={folder!r} does not exist: make it with hf-kd cache")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(folder, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CacheError(
            f"teacher_cache={folder!r} is no directory, and no dataset of the Hub that can be had "
            f"({type(error).__name__}): make it with hf-kd cache"
        ) from error
