"""A teacher that is not in memory while its student is trained from what it said before.

It is loaded to cut the student from it, and is gone before training; with a student of its own the run needs
no more than its config until then. It comes back for the table at the end.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hf_kd.teachers import CachedTeacher
from hf_kd.teachers.cache import CacheError
from hf_kd.teachers.models import fingerprint

if TYPE_CHECKING:
    from hf_kd.config import DistillationArguments
    from hf_kd.options import RunOptions
    from hf_kd.setting import Setting
    from hf_kd.trainer import DistillationTrainer


@dataclass(frozen=True)
class WaitingTeacher:
    """What stands in a run's place of the teacher while it is not in memory.

    Attributes:
        config: The teacher's.
        name_or_path: What it is loaded from.
        load: Loads it.
        others: Loads further teachers, where there are several.
    """

    config: Any
    name_or_path: str
    load: Callable[[], PreTrainedModel]
    others: Callable[[], tuple[PreTrainedModel, ...]] = tuple


def is_read(args: DistillationArguments) -> bool:
    """Whether all that the teacher says comes from a cache: nobody asks it while the student trains."""
    return bool(args.teacher_cache) and args.cache_miss == "error" and args.needs_teacher


def waiting(
    run: RunOptions, args: DistillationArguments, load: Callable[[], PreTrainedModel]
) -> WaitingTeacher:
    """The teacher of a run, of which the config alone is read."""
    shared = {"revision": args.teacher_revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(str(run.teacher), **shared)
    return WaitingTeacher(config, str(run.teacher), load)


def rested(
    setting: Setting,
    trainer: DistillationTrainer,
    load: Callable[[], PreTrainedModel],
    others: Callable[[], tuple[PreTrainedModel, ...]],
) -> Setting:
    """The same run without its teacher's weights, where the trainer that was made of it doesn't ask for them.

    The caller holds no other reference, and the memory is free.
    """
    cached = isinstance(trainer.teacher, CachedTeacher) and trainer.teacher.live is None
    if not cached or not isinstance(setting.teacher, nn.Module):
        return setting
    stand_in: Any = WaitingTeacher(setting.teacher.config, str(setting.teacher.name_or_path), load, others)
    rest = replace(setting, teacher=stand_in, others=())
    del setting
    gc.collect()  # models may refer to themselves
    return rest


def woken(setting: Setting, identity: dict[str, str]) -> Setting:
    """The same run with its teacher in memory.

    Args:
        setting: The run.
        identity: Of the teacher that the cache was made with.

    Raises:
        CacheError: If the weights that are loaded are not those; names both.
    """
    teacher: Any = setting.teacher
    if not isinstance(teacher, WaitingTeacher):
        return setting
    model = teacher.load()
    one = not setting.run.teachers and setting.args.teacher_quantization is None
    if one and fingerprint(model) != identity.get("fingerprint"):
        raise CacheError(
            f"teacher_cache={setting.args.teacher_cache!r} was made with the weights "
            f"{identity.get('fingerprint')} of {identity.get('name')!r}, but {teacher.name_or_path!r} has "
            f"{fingerprint(model)} now. The student in {setting.args.output_dir} learned from the former; "
            "there is no table, since it would compare with the latter: make the cache again, or give the "
            "teacher it was made with."
        )
    return replace(setting, teacher=model, others=teacher.others())
