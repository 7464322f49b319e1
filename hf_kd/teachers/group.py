"""A teacher on other processes than the student: `hf-kd teach` there, `teacher="torch://host:port"` here.

What comes back is what a cache would hold of the batch, without padding: logits, the last hidden states (the
head comes once), or sparse entries as the cache lays them out.
"""

from __future__ import annotations

import atexit
import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..losses.tiles import Head
from ..students.memory import VOCABULARY
from ..tasks import Task
from .cache.keys import present, teacher_view
from .cache.make import tokenizer_hash
from .cache.record import as_arrays, signal_of
from .cache.store import CacheError, Manifest
from .link import Link, LinkError, host_and_port, near_side
from .models import TEACHER_PREFIX
from .signal import TeacherSignal
from .worker import Worker

if TYPE_CHECKING:
    from ..config import DistillationArguments

logger = logging.getLogger(__name__)

#: Of the messages; both sides must have the same.
PROTOCOL = 2
# Seconds for the last word.
_FAREWELL = 5.0
_SAME = "Give both sides the same version of hf_kd."
# Keys of the store.
HELLO, JOINED, LEFT = "hello", "joined", "left"


class GroupError(ValueError):
    """A teacher group that can't be reached, has ended, or isn't the one that was meant."""


@dataclass
class Traffic:
    """What went over a link: bytes each way, and the positions (tokens, or rows) that were answered."""

    asked: int = 0
    answered: int = 0
    positions: int = 0

    def describe(self) -> str:
        """In words, per position."""
        count = max(1, self.positions)
        return (
            f"{self.positions:,} positions, {self.asked / count:.1f} bytes each to the teacher and "
            f"{self.answered / count:.1f} back"
        )


class GroupTeacher:
    """One of the processes that `hf-kd teach` started, as a student's teacher.

    Args:
        address: `torch://host:port` of the group.
        task: The student's head; the teacher's must have the same outputs.
        tokenizer: Hash of the student's tokenizer; "": not compared.
        revision: What the teacher's revision must be; None: not compared.
        timeout: Seconds that an answer may take.
        patience: Seconds that the group may take to load its model.

    Attributes:
        traffic: What was moved for signals; the head is not counted.

    Raises:
        GroupError: If there is no such group in time, it has students enough, or its teacher has other
            outputs, another tokenizer or another revision: names both.
    """

    works_elsewhere = True

    def __init__(
        self,
        address: str,
        *,
        task: Task,
        tokenizer: str = "",
        revision: str | None = None,
        timeout: float = 60.0,
        patience: float = 360.0,
    ) -> None:
        """Join the group."""
        self.address, self.timeout = address, timeout
        host, port = host_and_port(address, "teacher")
        self.traffic = Traffic()
        try:
            store = dist.TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience)
            )
            self._hello = read_hello(store.get(HELLO), address)
            self._refuse_other(task, tokenizer, revision)
            number = store.add(JOINED, 1) - 1
            most = self._hello["students"]
            if most is not None and number >= most:
                raise GroupError(
                    f"teacher={address!r} was started for {most} students, and this is number {number + 1}: "
                    "start it with another --students, or without."
                )
            self._link = Link(
                dist.PrefixStore(f"link{number}", store), 1, near=near_side(host, port), timeout=timeout
            )
        except (dist.DistError, LinkError) as error:
            raise GroupError(
                f"teacher={address!r} can't be reached ({str(error).splitlines()[0][:200]}): start it with "
                f"hf-kd teach --address {host}:{port}, or raise server_timeout."
            ) from error
        self._manifest: Manifest | None = None
        self._head: Head | None = None
        self._worker = Worker("teacher-group")
        atexit.register(self.close)

    def _refuse_other(self, task: Task, tokenizer: str, revision: str | None) -> None:
        said = self._hello
        pairs = {
            "outputs": (list(task.logits), said["outputs"]),
            "tokenizer": (tokenizer, said["tokenizer"] if tokenizer else ""),
            "teacher_revision": (revision, said["teacher"].get("revision") if revision else None),
        }
        if not said["tokenizer"]:
            del pairs["tokenizer"]
        differing = [
            f"{name}: this run has {ours!r}, the group {theirs!r}"
            for name, (ours, theirs) in pairs.items()
            if ours != theirs
        ]
        if differing:
            raise GroupError(
                f"teacher={self.address!r} serves {said['teacher'].get('name')!r}, which does not fit: "
                f"{'; '.join(differing)}. Give the student the teacher's tokenizer and head, or start the "
                "group with the model that is meant."
            )

    @property
    def identity(self) -> dict[str, str]:
        """That of the model there: moving it to other processes doesn't make it another teacher."""
        return dict(self._hello["teacher"])

    @property
    def model_size(self) -> dict[str, int]:
        """Of the model there: `parameters`, and `bytes` in memory."""
        return {name: self._hello[name] for name in ("parameters", "bytes")}

    @property
    def columns(self) -> tuple[str, ...]:
        """What the model there reads, plain and with the `teacher_` prefix."""
        names = self._hello["columns"]
        return (*names, *(TEACHER_PREFIX + name for name in names))

    @property
    def config(self) -> SimpleNamespace:
        """What is known of its classes: their names, and the size of its vocabulary."""
        names = {int(key): name for key, name in self._hello["id2label"].items()}
        return SimpleNamespace(
            num_labels=len(names) or None, id2label=names, vocab_size=self._hello["vocab_size"]
        )

    def start(self, batch: Mapping[str, Any]) -> Future[TeacherSignal]:
        """Ask about a batch; answers come in the order of the questions."""
        return self._worker.submit(lambda: self._ask(batch))

    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """Ask about a batch, and wait for the answer.

        Raises:
            GroupError: If the teacher has ended, is silent for too long, or could not answer: says why.
        """
        return self.start(batch).result()

    def _ask(self, batch: Mapping[str, Any]) -> TeacherSignal:
        view = teacher_view(batch, self._hello["columns"])
        first = next(iter(view.values()))
        tensors = self._exchange(view, first.device)
        manifest = self._manifest
        assert manifest is not None
        mask = present(view, manifest.pad) if manifest.per_position else None
        count = len(first) if mask is None else int(mask.sum())
        try:
            arrays = as_arrays(tensors, manifest)
        except CacheError as error:
            raise GroupError(f"teacher={self.address!r}: {error}. {_SAME}") from error
        lengths = {len(array) for array in arrays.values()}
        if lengths != {count}:
            raise GroupError(
                f"teacher={self.address!r} was asked about {count} positions and answers for "
                f"{sorted(lengths)}. {_SAME}"
            )
        self.traffic.positions += count
        return signal_of(arrays, mask, manifest, len(first), head=self._head, device=first.device)

    def _exchange(self, view: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
        link = self._link
        before = link.sent, link.received
        try:
            link.send({"kind": "ask"}, view)
            about, tensors = link.receive()
            kept = 0
            if about.get("kind") == "manifest":
                self._learn(about, tensors, device)
                kept = link.received - before[1]
                about, tensors = link.receive()
        except LinkError as error:
            raise GroupError(
                f"teacher={self.address!r} is lost: {error}. Its process has ended, or it was silent for "
                f"server_timeout={self.timeout:g} s; its own output says why. No weight was changed by this "
                "step: start it again, and go on with resume_from_checkpoint=True."
            ) from error
        if about.get("kind") != "signal":
            raise GroupError(
                f"teacher={self.address!r} could not answer: {about.get('message')}. Its own output says "
                "more; check that this batch is what its model reads (its vocabulary, its longest row)."
            )
        self.traffic.asked += link.sent - before[0]
        self.traffic.answered += link.received - before[1] - kept
        return tensors

    def _learn(self, about: dict[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """What all answers look like, and the head where they are hidden states."""
        try:
            self._manifest = Manifest.of(about["manifest"])
        except (KeyError, TypeError, CacheError) as error:
            raise GroupError(
                f"teacher={self.address!r} does not say what it answers ({error}). {_SAME}"
            ) from error
        if "weight" in tensors:
            given, bias = about.get("head", {}), tensors.get("bias")
            self._head = Head(
                tensors["weight"].to(device),
                None if bias is None else bias.to(device),
                given.get("softcap"),
                given.get("scale", 1.0),
            )

    def close(self) -> None:
        """Say that no question follows; what was moved is logged."""
        atexit.unregister(self.close)
        farewell = self._worker.submit(lambda: self._link.send({"kind": "bye"}, {}))
        try:
            farewell.result(min(self.timeout, _FAREWELL))
        except LinkError:
            return  # it has ended before
        except TimeoutError:
            # Somebody waits for an answer still: a thread must not be left inside compiled code.
            self._link.abort()
            wait([farewell], _FAREWELL)
            return
        logger.info("teacher=%r: %s", self.address, self.traffic.describe())


def read_hello(text: bytes, address: str) -> dict[str, Any]:
    """What a group says of itself.

    Raises:
        GroupError: If it is something else, or another version's.
    """
    kinds: dict[str, Any] = {
        "teacher": dict, "columns": list, "outputs": list, "tokenizer": str, "id2label": dict,
        "vocab_size": int, "students": int | None, "parameters": int, "bytes": int,
    }  # fmt: skip
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    found = said if isinstance(said, dict) else {}
    version = found.get("protocol")
    fits = all(name in found and isinstance(found[name], kind) for name, kind in kinds.items())
    if version != PROTOCOL or not fits:
        raise GroupError(
            f"teacher={address!r} speaks protocol {version!r} of hf-kd teach, and this is {PROTOCOL}. {_SAME}"
        )
    return found


def group_teacher(
    address: str, args: DistillationArguments, *, task: Task, student: nn.Module, processor: Any = None
) -> GroupTeacher:
    """The teacher group that a run's options ask for.

    Raises:
        GroupError: If it can't be reached, or isn't the one that is meant.
        ValueError: If an option changes the teacher, which is done where it is.
    """
    for name in ("teacher_dtype", "teacher_device_map", "teacher_quantization", "shard_teacher"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"{name}={getattr(args, name)!r} with teacher={address!r}: the model is loaded where it is, "
                f"so give it to hf-kd teach, and drop it here."
            )
    if hasattr(getattr(student, "config", None), VOCABULARY):
        raise ValueError(
            f"teacher={address!r} reads the teacher's tokens, and this student has a part of them only: give "
            "the teacher as a model, or a cache (teacher_cache)."
        )
    return GroupTeacher(
        address,
        task=task,
        tokenizer=tokenizer_hash(processor),
        revision=args.teacher_revision,
        timeout=args.server_timeout,
        patience=args.server_timeout * (args.server_retries + 1),
    )
