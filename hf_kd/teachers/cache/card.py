"""A cache as a dataset repository: what it is, in words, and how it gets to the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import DatasetCard, HfApi

from ...records import write_text
from .store import CacheError, Manifest, check_shard, read_shards

CARD_FILE = "README.md"


def write_card(folder: Path) -> None:
    """Write `README.md`: the folder is a dataset repository as it is."""
    manifest, shards = Manifest.read(folder), read_shards(folder)
    teacher = Path(str(manifest.teacher.get("name") or "a model")).name
    rows, positions = sum(s.rows for s in shards), sum(s.positions for s in shards)
    text = f"""---
tags:
- knowledge-distillation
- hf-kd
viewer: false
---

# What {teacher} says

The answers of `{teacher}` (weights `{manifest.teacher.get("fingerprint")}`, {manifest.dtype}) to {rows:,}
rows, {positions:,} positions, of fidelity `{manifest.fidelity}`: a cache that students are distilled from
without the teacher. It holds hashes of the rows and no rows.

```sh
hf-kd distill --config my.yaml --teacher_cache THIS_REPOSITORY
```
"""
    write_text(folder / CARD_FILE, str(DatasetCard(text)))


def push_cache(
    folder: Path, repository: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a whole cache to a dataset repository, which is made if there is none.

    Raises:
        CacheError: If a shard is missing or damaged.
    """
    for shard in read_shards(folder):
        problem = check_shard(folder, shard, content=True)
        if problem is not None:
            raise CacheError(f"{folder} is not uploaded: {problem}. Run the same hf-kd cache command again")
    write_card(folder)
    api = HfApi(token=token)
    address = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=address.repo_id,
        repo_type="dataset",
        folder_path=folder,
        ignore_patterns=[".*"],
        commit_message="What a teacher says",
    )
    return str(address)
