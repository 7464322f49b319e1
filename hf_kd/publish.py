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
from typing import TYPE_CHECKING, Any

import httpx2
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from hf_kd.elsewhere import is_elsewhere
from hf_kd.pages import HTML_FILE, write_html
from hf_kd.records import OPTIONS_FILE, TEACHER_FILE, write_options
from hf_kd.results import Results

if TYPE_CHECKING:
    from hf_kd.trainer import DistillationTrainer

RESULTS_FILE = "results.json"
# Made by Trainer for itself, or written anew for the public.
_NOT_PUBLIC = ("training_args.bin", TEACHER_FILE, OPTIONS_FILE, RESULTS_FILE, HTML_FILE)
# States of training, which belong to no model.
_OF_A_CHECKPOINT = {
    "trainer_state.json", "checkpoint.json", "spikes.json", TEACHER_FILE, "target.json",
    "sparse_estimator.json", "projections.safetensors", "ema.safetensors",
}  # fmt: skip
_ENDINGS = (".json", ".jinja", ".model", ".safetensors", ".txt", ".md", ".png")


def publish(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "A distilled student",
) -> str:
    """Upload the student in `folder` and what is known about it.

    Args:
        folder: A run's `output_dir`.
        repository: The id on the Hub, "name" or "owner/name"; made if it does not exist.
        private: Whether a new repository is private; None: the account's default.
        token: Default: the one that this machine is logged in with.
        revision: The branch; default: the main one.
        message: Of the commit.

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
                repo_id=address.repo_id, folder_path=staging, commit_message=message, revision=revision
            )
    except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"the Hub did not take {repository!r} ({type(error).__name__}: {_first_line(error)}). Nothing is "
            f"lost: try again with: hf-kd publish {folder} {repository}"
        ) from error
    return str(address)


def push(
    trainer: DistillationTrainer,
    message: str | None = None,
    *,
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
) -> str | None:
    """Publish a trainer's student with its card, report and options; what `trainer.push_to_hub` does.

    All ranks have to call it. The report is the one that `trainer.report` (or `hf-kd distill`) left in
    `output_dir`; where there is none it is made on the trainer's `eval_dataset`.

    Args:
        trainer: After training; `hub_model_id` of its arguments names the repository (default: the folder's
            name), `hub_private_repo` and `hub_token` count too.
        message: Of the commit.
        blocking: True alone: files of one commit belong together.
        token: Instead of `hub_token`.
        revision: The branch.
        private: Instead of `hub_private_repo`.

    Returns:
        The address on rank 0, None on the others.

    Raises:
        ValueError: If there is no report and none can be made, or the Hub did not take it.
    """
    if not blocking:
        raise ValueError("blocking=False would upload files while they may still change: leave it out")
    args, folder = trainer.args, trainer.args.folder
    from transformers import Trainer

    from hf_kd.students import memory

    # Not `trainer.save_model`: where args.push_to_hub is set, that calls this again.
    with memory.forgotten(getattr(trainer.student, "config", None), wanted=True):
        Trainer.save_model(trainer, str(folder), _internal_call=True)
    if args.should_save:
        write_options(folder, trainer)
    trainer.accelerator.wait_for_everyone()
    if not (folder / RESULTS_FILE).is_file():
        trainer.report()
    if args.process_index != 0:
        return None
    return publish(
        folder,
        args.hub_model_id or folder.resolve().name,
        private=args.hub_private_repo if private is None else private,
        token=token or args.hub_token,
        revision=revision or args.hub_revision,
        message=message or "A distilled student",
    )


def push_checkpoint(trainer: DistillationTrainer, folder: Path) -> None:
    """Upload the student of a checkpoint in the background, as `push_to_hub` and `hub_strategy` ask for.

    From links of its own: the checkpoint may be deleted meanwhile. A further one waits for nobody: while an
    upload is under way it is left out, unless `hub_always_push` is set.

    Args:
        trainer: Whose options say where to.
        folder: The checkpoint.
    """
    args, strategy = trainer.args, HubStrategy(trainer.args.hub_strategy)
    before: Any = trainer.push_in_progress
    busy = before is not None and not before.is_done()
    if not trainer.is_world_process_zero() or strategy == HubStrategy.END:
        return
    if busy and not args.hub_always_push:
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    whole_ones = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
    jobs = [_upload(trainer, folder, None)]
    if strategy in whole_ones:
        jobs.append(_upload(trainer, folder, whole_ones[strategy]))
    if busy:
        before.jobs.extend(jobs)
    else:
        made: Any = PushInProgress(jobs)  # type: ignore[arg-type]
        trainer.push_in_progress = made


def _upload(trainer: DistillationTrainer, folder: Path, inside: str | None) -> Any:
    """Upload a checkpoint's model to the root of the repository, or all of it into a folder `inside` it."""
    staging = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".publish-")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (inside or (path.parent == folder and path.suffix in _ENDINGS)):
            if inside is None and path.name in _OF_A_CHECKPOINT:
                continue
            target = Path(staging.name) / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(path, target)
    job = HfApi(token=trainer.args.hub_token).upload_folder(
        repo_id=str(trainer.hub_model_id),
        folder_path=staging.name,
        path_in_repo=inside,
        commit_message=f"Training in progress, step {trainer.state.global_step}",
        revision=trainer.args.hub_revision,
        run_as_future=True,
    )
    job.add_done_callback(lambda _: staging.cleanup())
    return job


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
    """Options or provenance without addresses of teachers, and with the last part of this machine's paths."""
    if isinstance(value, Mapping):
        return {
            key: "ADDRESS" if key == "teacher" and is_elsewhere(item) else without_paths(item)
            for key, item in value.items()
        }
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
