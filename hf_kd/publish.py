"""Put a finished run on the Hub: the student, its card, the report, and how it was made.

Once, at the end, with everything that belongs together; not the teacher, the control or checkpoints that lie
in the same folder, and no path of this machine. What fails changes nothing here and can be done again: files
that the Hub has are not sent twice.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hf_kd.pages import HTML_FILE, write_html
from hf_kd.records import OPTIONS_FILE
from hf_kd.results import Results

RESULTS_FILE = "results.json"
# Made by Trainer for itself, or written anew for the public.
_NOT_PUBLIC = ("training_args.bin", OPTIONS_FILE, RESULTS_FILE, HTML_FILE)
_ENDINGS = (".json", ".jinja", ".model", ".safetensors", ".txt", ".md", ".png")


def publish(folder: Path, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload the student in `folder` and what is known about it.

    Args:
        folder: A run's `output_dir`.
        repository: The id on the Hub, "name" or "owner/name"; made if it does not exist.
        private: Whether a new repository is private; None: the account's default.
        token: Default: the one that this machine is logged in with.

    Returns:
        The address of the model.

    Raises:
        ValueError: If there is no finished student in the folder, or the Hub did not take it; says how to try
            again.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no student (config.json and *.safetensors): give a run's output_dir")
    api = HfApi(token=token)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".publish-") as staging:
            gather(folder, Path(staging))
            api.upload_folder(
                repo_id=address.repo_id, folder_path=staging, commit_message="A distilled student"
            )
    except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"the Hub did not take {repository!r} ({type(error).__name__}: {_first_line(error)}). Nothing is "
            f"lost: try again with: hf-kd publish {folder} {repository}"
        ) from error
    return str(address)


def gather(folder: Path, target: Path) -> None:
    """Put what is published of a run into an empty folder."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _ENDINGS and path.name not in _NOT_PUBLIC:
            _link(path, target / path.name)
    if (folder / OPTIONS_FILE).is_file():
        options = without_paths(yaml.safe_load((folder / OPTIONS_FILE).read_text(encoding="utf-8")))
        options = {k: v for k, v in options.items() if not k.startswith(("hub_", "push_to_hub"))}
        header = "# How this model was distilled; run it again with: hf-kd distill --config\n"
        (target / OPTIONS_FILE).write_text(header + yaml.safe_dump(options), encoding="utf-8")
    if (folder / RESULTS_FILE).is_file():
        content = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
        content["provenance"] = without_paths(content.get("provenance", {}))
        (target / RESULTS_FILE).write_text(json.dumps(content), encoding="utf-8")
        results = Results.read(target / RESULTS_FILE)
        results.write(target / RESULTS_FILE)
        write_html(results, target)


def without_paths(value: Any) -> Any:
    """Options or provenance with only the last part of every path of this machine."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    local = Path(value).expanduser()
    is_path = local.is_absolute() or (os.sep in value and local.exists())
    return local.name if is_path else value


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
