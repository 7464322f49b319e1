"""Mistakes with teachers elsewhere, with several of them, and on several ranks.

Each is raised by what raises it for users: a server that really answers so, a group in a thread.
`tests/messages.py` collects what is said.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from hf_kd import DistillationArguments, DistillationTrainer, TeacherSignal, ranks, sharding
from hf_kd.students.memory import VOCABULARY as VOCABULARY_FIELD
from hf_kd.tasks import resolve_task
from hf_kd.teachers import CachedTeacher, ModelTeacher
from hf_kd.teachers.cache.make import CacheSettings
from hf_kd.teachers.deadline import deadline
from hf_kd.teachers.ensemble import Ensemble
from hf_kd.teachers.group import GroupTeacher, group_teacher, read_hello
from hf_kd.teachers.selves import self_teacher
from hf_kd.teachers.server import ServedTeacher
from hf_kd.teaching import Desk

from .cache_messages import ROWS, Mistakes
from .faults.runs import free_port
from .served import VOCABULARY, Served, serving, tiny_llama
from .test_group import Group

TOKENS = {"input_ids": torch.tensor([[9, 5, 3, 7]])}


def with_a_server(lm: Mapping[str, Any]) -> Mistakes:
    """A server that refuses, is silent or lies; and a student that it can't teach."""
    found: Mistakes = {}

    def asked(batch: Mapping[str, Tensor] = TOKENS, fault: Any = None, **options: Any) -> None:
        with serving(tiny_llama()) as (url, served):
            served.faults = [fault] if fault is not None else []
            if options.pop("fewer", False):
                served.top = lambda values, k, token=None: Served.top(served, values, 4, token)  # type: ignore[method-assign]
            given = {"top_k": 5, "vocab_size": VOCABULARY, "retries": 0, "timeout": 10.0, **options}
            ServedTeacher(url, "tiny", **given)(batch)

    def lie(what: str, edit: Callable[[Any], Any], **options: Any) -> None:
        found[what] = lambda: asked(fault=edit, **options)

    def entries(answer: Any) -> dict[str, Any]:
        return answer["choices"][0]["prompt_logprobs"][2]

    def likelier(answer: Any, value: Any) -> None:
        next(iter(entries(answer).values()))["logprob"] = value

    found["silence"] = lambda: asked(fault="stall", timeout=0.5)
    found["a page instead of an answer"] = lambda: asked(fault="garbage")
    for status in (401, 404, 400):
        found[f"HTTP {status}"] = lambda status=status: asked(fault=(status, {}, {"error": "no"}))
    found["a limit of entries"] = lambda: asked(server_format="sglang", fewer=True)
    found["names of tokens, but no tokenizer"] = lambda: asked(
        fault=lambda a: a["choices"][0]["logprobs"]["tokens"].__setitem__(1, " the"), server_format="openai"
    )
    lie("another server_format", lambda a: [1])
    lie("an answer without log-probabilities", lambda a: a["choices"][0].pop("prompt_logprobs") and None)
    lie("a position less", lambda a: a["choices"][0]["prompt_logprobs"].pop() and None)
    lie("a choice twice", lambda a: a["choices"].append(a["choices"][0]))
    lie("a choice of another number", lambda a: a["choices"][0].update(index=3))
    lie("NaN", lambda a: likelier(a, float("nan")))
    lie("a positive log-probability", lambda a: likelier(a, 0.7))
    lie("a word for a log-probability", lambda a: likelier(a, "likely"))
    lie("a word for an id", lambda a: entries(a).update({"the": {"logprob": -9.0}}))
    lie("a token out of range", lambda a: entries(a).update({"61": {"logprob": -9.0}}))
    lie("too much mass", lambda a: [e.update(logprob=-0.1) for e in entries(a).values()] and None)
    lie("another prompt", lambda a: a[0]["meta_info"]["input_token_logprobs"][1].__setitem__(1, 60),
        server_format="sglang")  # fmt: skip
    lie("a token twice", lambda a: a[0]["meta_info"]["input_top_logprobs"][1].extend([[-9.0, 4, None]] * 2),
        server_format="sglang")  # fmt: skip
    lie("no echo", lambda a: a["choices"][0]["logprobs"].update(tokens=["token_id:3"]),
        server_format="openai")  # fmt: skip
    lie("a row cut short", lambda a: a[0].update(tokens_evaluated=0), server_format="llama.cpp")

    def made(url: str = "http://127.0.0.1:9/v1", name: str | None = "tiny", **options: Any) -> ServedTeacher:
        return ServedTeacher(url, name, retries=0, vocab_size=VOCABULARY, **options)

    def student(**options: Any) -> DistillationTrainer:
        args = DistillationArguments(output_dir="out", use_cpu=True, server_model="tiny", **options)
        return DistillationTrainer(args=args, **{**lm, "teacher": "http://127.0.0.1:9/v1"})

    square = {**TOKENS, "attention_mask": torch.ones(1, 1, 4, 4)}
    packed = {**TOKENS, "attention_mask": torch.ones(1, 4), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    return found | {
        "nobody there": lambda: made()(TOKENS),
        "no server_model": lambda: made(name=None),
        "an unknown server_format": lambda: made(server_format="ollama"),
        "an address without a host": lambda: made("http:///v1"),
        "a key in the address": lambda: made("https://me:secret@host/v1"),
        "a key in place of a variable": lambda: made("https://host/v1", api_key_env="sk-secret"),
        "a mask of who sees whom": lambda: made()(square),
        "packed rows with a mask": lambda: made()(packed),
        "temperature=2.0": lambda: student(temperature=2.0),
        "a cache of fewer entries": lambda: student(
            temperature=1.0, teacher_cache="served", cache_miss="compute", server_top_k=300
        ),
    }  # fmt: skip


@contextmanager
def teaching(model: nn.Module, **options: Any) -> Iterator[Any]:
    """A group in a thread, which ends with the student that asked."""
    group = Group(model, **options)
    yield group
    group.thread.join(20)


def with_a_group(made: Mapping[str, Any], lm: Mapping[str, Any]) -> Mistakes:
    """A group that isn't there, is another's, ends, or is asked what it can't answer."""
    task = resolve_task(None, lm["teacher"])

    def joined(**options: Any) -> None:
        with teaching(lm["teacher"], students=1, tokenizer="abc") as group:
            try:
                group.join(**options)
            finally:
                group.join().close()

    def one_too_many() -> None:
        with teaching(lm["teacher"], students=1) as group:
            first = group.join()
            try:
                group.join()
            finally:
                first.close()

    def asked(batch: Mapping[str, Tensor]) -> None:
        with teaching(lm["teacher"], students=1) as group:
            teacher = group.join()
            try:
                teacher(batch)
            finally:
                teacher.close()

    def silent() -> None:
        slow, over = copy.deepcopy(lm["teacher"]), threading.Event()
        slow.register_forward_pre_hook(lambda *_: over.wait(20) and None)
        with teaching(slow, students=1) as group:
            teacher = group.join(timeout=1.0)
            try:
                teacher(TOKENS)
            finally:
                over.set()
                teacher.close()

    def options(**given: Any) -> DistillationTrainer:
        args = DistillationArguments(output_dir="out", use_cpu=True, **given)
        return DistillationTrainer(args=args, **{**lm, "teacher": "torch://10.0.0.7:29600"})

    def of_an_image() -> Desk:
        sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1}
        vit = ViTForImageClassification(ViTConfig(num_attention_heads=2, intermediate_size=8, **sizes))
        return Desk(ModelTeacher(vit, ("logits",)), CacheSettings())

    def with_a_part_of_the_vocabulary() -> GroupTeacher:
        config = SimpleNamespace(**{VOCABULARY_FIELD: [0, 1]})
        student: Any = SimpleNamespace(config=config)
        args = DistillationArguments(output_dir="out", use_cpu=True)
        return group_teacher("torch://10.0.0.7:29600", args, task=task, student=student)

    return {
        "nobody there": lambda: GroupTeacher(f"torch://127.0.0.1:{free_port()}", task=task, patience=0.3),
        "another tokenizer": lambda: joined(tokenizer="xyz", revision="v2"),
        "another head": lambda: joined(task=resolve_task("question-answering", made["teacher"])),
        "a student too many": one_too_many,
        "another version": lambda: read_hello(b'{"protocol": 99}', "torch://10.0.0.7:29600"),
        "a token out of range": lambda: asked({"input_ids": torch.tensor([[10_000]])}),
        "silence": silent,
        "an option of the model": lambda: options(teacher_dtype="float32"),
        "a cache": lambda: options(teacher_cache="said"),
        "a part of the vocabulary": with_a_part_of_the_vocabulary,
        "a model of images": of_an_image,
    }


def with_several(made: Mapping[str, Any]) -> Mistakes:
    """Several teachers that don't fit together, and several ranks that lose each other."""
    teacher, student = made["teacher"], made["model"]
    args = SimpleNamespace(process_index=1, world_size=2, ddp_timeout=1800)
    run: Any = SimpleNamespace(args=args, state=SimpleNamespace(global_step=70))
    task = resolve_task(None, teacher)
    rows = {name: torch.tensor(made["train_dataset"][:2][name]) for name in ("input_ids", "attention_mask")}

    def ensemble(**options: Any) -> Ensemble:
        return Ensemble([ModelTeacher(m, ("logits",)) for m in (teacher, student)], task, **options)

    class Few:
        """Sparse, as a server's answers are."""

        identity, columns = {"name": "few"}, ("input_ids",)

        def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
            return CachedTeacher("said")(ROWS[0])

    def other_rank_is_gone() -> None:
        with ranks.explained(run):
            raise RuntimeError("[gloo] Connection closed by peer [10.0.0.8]:29500")

    def in_pieces(role: str) -> None:
        model = nn.Linear(2, 2)
        model.weight.ds_id = 1  # type: ignore[assignment]
        given: Any = SimpleNamespace(model=model) if role == "teacher" else None
        sharding.shard_teacher(given, mock.Mock(), None, model if role == "model" else None)

    def launched(engine: str) -> None:
        with mock.patch.dict("os.environ", {f"ACCELERATE_USE_{engine}": "true"}):
            self_teacher("ema", student, ("logits",), DistillationArguments(output_dir="out", use_cpu=True))

    def silent() -> None:
        with deadline(0.05):
            time.sleep(5)

    def not_in_the_main_thread() -> None:
        caught: list[Exception] = []

        def work() -> None:
            try:
                with deadline(1.0):
                    pass
            except ValueError as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        raise caught[0]

    return {
        "weights below 0": lambda: ensemble(weights=[1.0, -1.0]),
        "a route to nobody": lambda: ensemble(routes={7: 2}),
        "a row of nobody": lambda: ensemble(routes={7: 1})({**rows, "teacher_id": torch.tensor([7, 8])}),
        "rows without teacher_id": lambda: ensemble(routes={7: 1})(rows),
        "one that is sparse": lambda: Ensemble([Few(), Few()], task)(rows),
        "a rank is gone": other_rank_is_gone,
        "a teacher in ZeRO's pieces": lambda: in_pieces("teacher"),
        "a student in ZeRO's pieces": lambda: in_pieces("model"),
        "shard_teacher on one process": lambda: DistillationTrainer(
            args=DistillationArguments(output_dir="out", use_cpu=True, shard_teacher=True), **made
        ),
        "FSDP's pieces as their own teacher": lambda: launched("FSDP"),
        "a teacher that is silent": silent,
        "a time limit in a thread": not_in_the_main_thread,
    }
