"""`hf-kd teach`: a model in processes of its own that answers students elsewhere; see `teachers/group.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_kd.alignment import tokenizer_of
from hf_kd.loading import load_model
from hf_kd.losses.heads import HeadSpec, UnsupportedHead, find_head, head_inputs
from hf_kd.losses.tiles import Head, HiddenTeacher
from hf_kd.measure import count_parameters, model_bytes
from hf_kd.options import TeachOptions
from hf_kd.tasks import resolve_task
from hf_kd.teachers.cache.keys import pieces, present
from hf_kd.teachers.cache.make import CacheSettings, describe, tokenizer_hash
from hf_kd.teachers.cache.record import records
from hf_kd.teachers.cache.store import Manifest
from hf_kd.teachers.group import HELLO, JOINED, LEFT, PROTOCOL, Traffic
from hf_kd.teachers.link import Link, LinkError, host_and_port, near_side
from hf_kd.teachers.models import ModelTeacher, fingerprint
from hf_kd.teachers.quantise import loading_options, quantise
from hf_kd.teachers.signal import TeacherSignal

#: Up to so many classes, logits take no more bytes than hidden states.
FEW_CLASSES = 256
# Seconds for threads to end.
_FAREWELL = 5.0
# Seconds between looks for a student that joins.
_LOOK = 0.02


class Desk:
    """Answers questions about batches, one at a time.

    Args:
        teacher: A model in memory that reads tokens.
        settings: What is told of its answers; "auto" keeps all of them in the fewest bytes.
        tokenizer: Hash of its tokenizer.

    Raises:
        ValueError: If the model reads something else, which students would have to prepare as it does.
    """

    def __init__(self, teacher: ModelTeacher, settings: CacheSettings, *, tokenizer: str = "") -> None:
        """Ask nothing yet."""
        self.teacher, self.settings, self.tokenizer = teacher, settings, tokenizer
        kind = getattr(teacher.model, "main_input_name", "input_ids")
        if kind != "input_ids":
            raise ValueError(
                f"teacher={teacher.name!r} reads {kind}, and a teacher group serves models of tokens: give "
                "it to the student as a model, or cache what it says (hf-kd cache)."
            )
        self._turn = threading.Lock()
        self._manifest: Manifest | None = None
        self._head: Head | None = None
        self._spec: HeadSpec | None = None
        self.device = next(teacher.model.parameters()).device

    def hello(self, students: int | None) -> dict[str, Any]:
        """What students are told before they ask."""
        config: Any = getattr(self.teacher.model, "config", None)
        nested = getattr(config, "get_text_config", None)
        labels = getattr(config, "id2label", None) or {}
        head: Any = None
        with contextlib.suppress(AttributeError, NotImplementedError):
            head = self.teacher.model.get_output_embeddings()  # type: ignore[operator]
        size = getattr(nested(decoder=True) if nested is not None else config, "vocab_size", 0)
        columns = [name for name in self.teacher.columns if not name.startswith("teacher_")]
        return {
            "protocol": PROTOCOL,
            "teacher": self.teacher.identity,
            "columns": columns,
            "outputs": list(self.teacher.outputs),
            "tokenizer": self.tokenizer,
            "id2label": {str(key): str(value) for key, value in labels.items()},
            "vocab_size": int(size if head is None else head.weight.shape[0]),
            "students": students,
            "parameters": count_parameters(self.teacher.model),
            "bytes": model_bytes(self.teacher.model),
        }

    def learn(self, view: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What all answers look like, as a message, and the head where they are hidden states."""
        with self._turn:
            if self._manifest is None:
                self._manifest, self._head = self._describe(view)
            about: dict[str, Any] = {"kind": "manifest", "manifest": dataclasses.asdict(self._manifest)}
        tensors: dict[str, Tensor] = {}
        if self._head is not None:
            about["head"] = {"softcap": self._head.softcap, "scale": self._head.scale}
            tensors = {"weight": self._head.weight}
            if self._head.bias is not None:
                tensors["bias"] = self._head.bias
        return about, tensors

    def _describe(self, view: Mapping[str, Tensor]) -> tuple[Manifest, Head | None]:
        """What is answered, and the head that goes with it."""
        wish, inputs = self.settings, self.teacher.inputs({name: v[:1] for name, v in view.items()})
        if wish.fidelity != "logits":
            with contextlib.suppress(UnsupportedHead):
                self._spec = find_head(self.teacher.model, inputs)
        if wish.fidelity == "auto":
            few = self._spec is None or self._spec.head().classes <= FEW_CLASSES
            wish = dataclasses.replace(wish, fidelity="logits" if few else "hidden")
        if wish.fidelity == "hidden":
            dtype = str(getattr(self.teacher.model, "dtype", torch.float32)).removeprefix("torch.")
            wish = dataclasses.replace(wish, dtype=dtype)
        return describe(self.teacher, view, wish)

    def _ask(self, view: Mapping[str, Tensor], fidelity: str) -> TeacherSignal:
        if fidelity == "logits" or self._spec is None:
            return self.teacher(view)
        with head_inputs(self._spec) as captured:
            self.teacher(view)
        return TeacherSignal(hidden=HiddenTeacher(*captured[-1]))

    def answer(self, view: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the teacher says of each position that exists, one row after the other."""
        manifest = self._manifest
        assert manifest is not None
        mask = present(view, manifest.pad) if manifest.per_position else None
        asked = pieces(view, manifest.pad, whole=mask is None)
        with self._turn:
            said = records(self._ask(view, manifest.fidelity), mask, manifest, asked)
        return {name: torch.cat([torch.from_numpy(row[name]) for row in said]) for name in said[0]}


def load_desk(options: TeachOptions, device: torch.device) -> Desk:
    """The model that the options name, on its device.

    Raises:
        ValueError: If it can't be loaded or served.
    """
    shared: dict[str, Any] = {
        "revision": options.teacher_revision, "trust_remote_code": options.trust_remote_code,
    }  # fmt: skip
    model = load_model(
        str(options.teacher),
        options.task,
        role="teacher",
        dtype=options.teacher_dtype,
        device_map=options.teacher_device_map,
        **shared,
        **loading_options(options.teacher_quantization),
    )
    task = resolve_task(options.task, model)
    made = None
    if options.teacher_quantization is not None:
        made = f"{fingerprint(model)} {options.teacher_quantization}"
        model = quantise(model, options.teacher_quantization, device)
    teacher = ModelTeacher(
        model, task.logits, device=device, revision=options.teacher_revision, fingerprint=made
    )
    settings = CacheSettings(options.fidelity, options.entries, options.bits, options.temperature)
    return Desk(teacher, settings, tokenizer=tokenizer_hash(_tokenizer(options)))


def _tokenizer(options: TeachOptions) -> Any:
    from transformers import AutoTokenizer

    name = options.processor or options.teacher
    shared: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if name == options.teacher:
        shared["revision"] = options.teacher_revision
    try:
        return tokenizer_of(AutoTokenizer.from_pretrained(name, **shared))
    except (OSError, ValueError, KeyError):
        if options.processor:
            raise
        return None  # none beside the weights: the sizes of the vocabularies are compared alone


def teach(options: TeachOptions, *, say: Callable[[str], None]) -> int:
    """Serve students until all have left.

    Args:
        options: The model and the address. Under `torchrun` each process is one teacher of several.
        say: Prints a line.

    Returns:
        0; 1 if a student was lost, or nobody asked for too long.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    host, port = host_and_port(str(options.address), "address")
    idle = timedelta(seconds=options.idle_timeout)
    # The store opens first, so that students that come while the model is loaded wait for it.
    store = dist.TCPStore(host, port, is_master=rank == 0, wait_for_workers=False, timeout=idle)
    desk = load_desk(options, _device())
    if rank == 0:
        store.set(HELLO, json.dumps(desk.hello(options.students)))
    where = "" if ranks == 1 else f" (process {rank + 1} of {ranks})"
    say(f"{options.teacher} answers at torch://{host}:{port}{where}")
    near = host if rank == 0 else near_side(host, port)
    office = Office(desk, store, near=near, rank=rank, ranks=ranks, idle=options.idle_timeout, say=say)
    return office.run(options.students)


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


class Office:
    """Lets students in, each with a thread of its own, and knows when all have left.

    Args:
        desk: Who answers.
        store: Where students announce themselves, one number after the other.
        near: A name of this machine, as students reach it.
        rank: Of this process among the teachers; it serves every `ranks`-th student.
        ranks: How many teachers there are.
        idle: Seconds without a question after which it ends.
        say: Prints a line.
    """

    def __init__(
        self,
        desk: Desk,
        store: Any,
        *,
        near: str,
        rank: int = 0,
        ranks: int = 1,
        idle: float = 3600.0,
        say: Callable[[str], None],
    ) -> None:
        """Let nobody in yet."""
        self.desk, self.store, self.near, self.idle, self._say = desk, store, near, idle, say
        self._next, self._ranks = rank, ranks
        self._lost = False
        self._heard = time.monotonic()
        self._links: dict[threading.Thread, Link | None] = {}

    def run(self, students: int | None) -> int:
        """Serve until so many students have left, on all teachers together."""
        expected = math.inf if students is None else students
        try:
            while students is None or int(self.store.add(LEFT, 0)) < students:
                if min(int(self.store.add(JOINED, 0)), expected) > self._next:
                    thread = threading.Thread(target=self._serve, args=(self._next,), daemon=True)
                    self._links[thread] = None
                    thread.start()
                    self._next += self._ranks
                    continue
                if time.monotonic() - self._heard > self.idle:
                    self._say(f"no question for idle_timeout={self.idle:g} s: this is the end")
                    return 1
                time.sleep(_LOOK)
            return int(self._lost)
        finally:
            for thread, link in self._links.items():
                if link is not None and thread.is_alive():
                    link.abort()  # a thread must not be left inside compiled code
                thread.join(_FAREWELL)

    def _serve(self, number: int) -> None:
        try:
            link = Link(dist.PrefixStore(f"link{number}", self.store), 0, near=self.near, timeout=self.idle)
            self._links[threading.current_thread()] = link
            traffic = self._converse(link)
            self._say(f"student {number} has left: {traffic.describe()}")
        except LinkError as error:
            self._lost = True
            self._say(f"student {number} is lost: {error}")
        finally:
            self.store.add(LEFT, 1)

    def _converse(self, link: Link) -> Traffic:
        """Answer one student until it says good-bye."""
        traffic, told = Traffic(), False
        while True:
            before = link.received
            about, view = link.receive()
            self._heard = time.monotonic()
            if about.get("kind") == "bye":
                return traffic
            try:
                view = {name: value.to(self.desk.device) for name, value in view.items()}
                if not told:
                    link.send(*self.desk.learn(view))
                    told = True
                found = self.desk.answer(view)
            except LinkError:
                raise
            except Exception as error:  # whatever it is, the student is told
                link.send({"kind": "error", "message": f"{type(error).__name__}: {error}"}, {})
                continue
            sent = link.sent
            link.send({"kind": "signal"}, found)
            traffic.asked += link.received - before
            traffic.answered += link.sent - sent
            traffic.positions += len(next(iter(found.values())))
