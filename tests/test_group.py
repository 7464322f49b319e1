"""A teacher in other processes: the same answers as here, and a clear end whatever happens to either side."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTForImageClassification,
)

from hf_kd import DistillationArguments, DistillationTrainer, TeacherSignal
from hf_kd.cli import main
from hf_kd.data.processors import train_tokenizer
from hf_kd.losses.projected import head_logits
from hf_kd.measure import model_bytes
from hf_kd.options import TeachOptions
from hf_kd.results import Results
from hf_kd.tasks import resolve_task
from hf_kd.teachers import ModelTeacher
from hf_kd.teachers.cache.make import CacheSettings, tokenizer_hash
from hf_kd.teachers.group import HELLO, GroupError, GroupTeacher, read_hello
from hf_kd.teachers.link import Link, LinkError, host_and_port, read_header
from hf_kd.teaching import Desk, Office

from .faults.runs import FORK, child, free_port, join, models, rows, trainer, two_ranks, weights
from .heads import VOCAB, llama, vit
from .test_gradient import assert_same

KINDS = ("logits", "hidden", "sparse")


def tiny() -> nn.Module:
    """A causal model in float64 with distributions that are far from uniform."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(24)).double()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.25)
    return model


def batch() -> dict[str, Tensor]:
    """Rows of different lengths, padded on either side."""
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for row, (start, length) in enumerate([(0, 7), (0, 4), (2, 5)]):
        ids[row, start : start + length] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, start : start + length] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Group:
    """A group in a thread of this process."""

    def __init__(
        self,
        model: nn.Module,
        *,
        students: int | None = None,
        teachers: int = 1,
        idle: float = 20.0,
        **settings: Any,
    ) -> None:
        options = {"tokenizer": settings.pop("tokenizer", "")}
        self.task = resolve_task(None, model)
        desk = Desk(ModelTeacher(model, self.task.logits), CacheSettings(**settings), **options)
        self.port = free_port()
        self.store = dist.TCPStore(
            "127.0.0.1", self.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
        )
        self.desk = desk
        self.store.set(HELLO, json.dumps(desk.hello(students)))
        self.said: list[str] = []
        self.status: list[int] = []
        shared: dict[str, Any] = {"near": "127.0.0.1", "idle": idle, "say": self.said.append}
        offices = [Office(desk, self.store, rank=i, ranks=teachers, **shared) for i in range(teachers)]
        self.threads = [
            threading.Thread(target=lambda one=one: self.status.append(one.run(students or 1)))
            for one in offices
        ]
        for thread in self.threads:
            thread.start()
        self.thread = self.threads[0]

    def join(self, **options: Any) -> GroupTeacher:
        given = {"task": self.task, "timeout": 20.0, "patience": 20.0, **options}
        return GroupTeacher(f"torch://127.0.0.1:{self.port}", **given)


def logits_of(signal: TeacherSignal) -> Tensor:
    return head_logits(signal.hidden) if signal.hidden is not None else signal.dense()["logits"]


@pytest.mark.parametrize("fidelity", KINDS)
def test_answers_are_the_models_own(fidelity: str) -> None:
    """Trap 33: every position's answer is where the model has it, whatever the padding."""
    model, given = tiny(), batch()
    group = Group(model, fidelity=fidelity, entries=6)
    teacher = group.join()
    answers = [teacher(given), teacher({name: value[:2] for name, value in given.items()})]
    here = given["attention_mask"].bool()
    with torch.no_grad():
        exact = model(**given).logits
    for answer, count in zip(answers, (3, 2), strict=True):
        assert answer.fidelity == fidelity
        place = here[:count]
        if answer.sparse is None:
            torch.testing.assert_close(logits_of(answer)[place], exact[:count][place], rtol=1e-12, atol=1e-12)
            continue
        ids, said = answer.sparse.ids[place], answer.sparse.log_probs[place].double()
        expected = exact[:count][place].log_softmax(-1).gather(-1, ids.clamp_min(0))
        assert bool(((said - expected).abs()[ids >= 0] < 3e-4).all())
        assert answer.sparse.has_draws
    assert teacher.identity == ModelTeacher(model, ("logits",)).identity
    assert teacher.columns[:2] == ("input_ids", "attention_mask")
    tokens = int(here.sum() + here[:2].sum())
    assert teacher.traffic.positions == tokens
    # Ids of 6 bits, 16 bits a log-probability, and 5 bytes for the tail; the rest is headers.
    each = {"logits": 8 * model.config.vocab_size, "hidden": 8 * 24, "sparse": 5 + 5 + 12}[fidelity]
    assert 0 < teacher.traffic.answered - tokens * each < 400
    assert 0 < teacher.traffic.asked - 5 * 7 * 2 * 8 < 400
    teacher.close()
    group.thread.join(20)
    assert group.status == [0]
    assert group.said == [f"student 0 has left: {teacher.traffic.describe()}"]


def test_few_classes_are_told_as_logits(tmp_path: Path) -> None:
    _, model = models()
    group = Group(model)
    teacher = group.join()
    given = {name: torch.tensor(rows(3)[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(teacher(given).dense()["logits"], model.eval()(**given).logits)
    assert teacher.config.id2label == model.config.id2label
    teacher.close()
    group.thread.join(20)


@pytest.mark.parametrize("fidelity", ["logits", "hidden"])
def test_half_precision_arrives_as_it_was(fidelity: str) -> None:
    model, given = tiny().bfloat16(), batch()
    group = Group(model, fidelity=fidelity)
    teacher = group.join()
    answer = teacher(given)
    teacher.close()
    group.thread.join(20)
    with torch.no_grad():
        out = model(**given, output_hidden_states=True)
    said = answer.dense()["logits"] if answer.hidden is None else answer.hidden.hidden
    own = out.logits if answer.hidden is None else out.hidden_states[-1]
    here = given["attention_mask"].bool()
    assert said.dtype == torch.bfloat16
    assert torch.equal(said[here], own[here])


def test_packed_texts_are_answered_as_the_model_does() -> None:
    """Two texts in a row without a mask: positions that start anew go along."""
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    model = tiny()
    group = Group(model, fidelity="hidden")
    teacher = group.join()
    answer = teacher(given)
    teacher.close()
    group.thread.join(20)
    here, alone = ModelTeacher(model, ("logits",))(given), {"input_ids": ids[:, 4:]}
    torch.testing.assert_close(logits_of(answer), here.dense()["logits"], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(answer)[:, 4:], model(**alone).logits, rtol=1e-12, atol=1e-12)


def test_students_are_divided_among_teachers() -> None:
    """Three students, two teachers: the second has one of them; all leave, and both end."""
    model = tiny()
    group = Group(model, students=3, teachers=2)
    students = [group.join() for _ in range(3)]
    with torch.no_grad():
        exact = model(**batch()).logits[0]
    for student in students:
        torch.testing.assert_close(logits_of(student(batch()))[0], exact, rtol=1e-12, atol=1e-12)
    for student in students:
        student.close()
    for thread in group.threads:
        thread.join(20)
    assert group.status == [0, 0]
    assert sorted(line.split(" has")[0] for line in group.said) == [f"student {i}" for i in range(3)]


def test_a_group_that_nobody_asks_ends() -> None:
    group = Group(tiny(), idle=0.2)
    group.thread.join(20)
    assert group.status == [1]
    assert group.said == ["no question for idle_timeout=0.2 s: this is the end"]


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group(tiny(), students=2, tokenizer="abc")
    yield group
    for _ in range(2 - int(group.store.add("joined", 0))):
        group.join().close()
    group.thread.join(20)
    assert not group.thread.is_alive()


def test_another_teacher_than_was_meant_is_refused(group: Group) -> None:
    with pytest.raises(GroupError, match="tokenizer: this run has 'xyz', the group 'abc'"):
        group.join(tokenizer="xyz")
    with pytest.raises(GroupError, match="teacher_revision: this run has 'v2', the group ''"):
        group.join(tokenizer="abc", revision="v2")
    classifier = resolve_task("question-answering", models()[1])
    with pytest.raises(GroupError, match=r"outputs: this run has \['start_logits', 'end_logits'\]"):
        group.join(task=classifier)
    first, second = group.join(tokenizer="abc"), group.join()
    with pytest.raises(GroupError, match="started for 2 students, and this is number 3"):
        group.join()
    first.close()
    second.close()


def test_what_the_teacher_raises_is_told_and_it_lives_on(group: Group) -> None:
    teacher = group.join()
    bad = batch()
    bad["input_ids"][0, 0] = 10_000
    with pytest.raises(GroupError, match="could not answer: IndexError"):
        teacher(bad)
    assert teacher(batch()).fidelity == "logits"
    teacher.close()


def test_nobody_there() -> None:
    with pytest.raises(GroupError, match=r"can't be reached.*hf-kd teach --address 127.0.0.1"):
        GroupTeacher(f"torch://127.0.0.1:{free_port()}", task=resolve_task(None, tiny()), patience=0.5)


def test_pixels_are_refused() -> None:
    model = ViTForImageClassification(vit(16))
    with pytest.raises(ValueError, match="reads pixel_values, and a teacher group serves models of tokens"):
        Desk(ModelTeacher(model, ("logits",)), CacheSettings())


def test_addresses() -> None:
    assert host_and_port("torch://10.0.0.7:29600", "teacher") == ("10.0.0.7", 29600)
    assert host_and_port("[::1]:80", "address") == ("::1", 80)
    for wrong in ("torch://host", "host:port", ":80", "a:b@host:80", "host:80/x", "host:0", "host:99999"):
        with pytest.raises(ValueError, match=f"address='{wrong}' is no address"):
            host_and_port(wrong, "address")


TENSORS = ('["x", "float32"]', '["x", "object", [1]]', '["x", "int8", [-1]]', '["x", "int8", [1.5]]')
HEADERS = [
    f'{{"about": {{}}, "tensors": [{one}]}}'
    for one in (*TENSORS, '[1, "int8", [1]]', '["x", "int8", [1099511627776]]')
]


@pytest.mark.parametrize("header", ["\0", "[]", "{}", '{"about": 1, "tensors": []}', "[" * 100_000, *HEADERS])
def test_headers_of_any_kind_are_refused(header: str) -> None:
    with pytest.raises(LinkError, match="the other end"):
        read_header(header.encode())


@pytest.mark.parametrize("said", ["", "[]", '{"protocol": 2}', '{"protocol": 1}', '{"protocol": 2, "x": 1}'])
def test_something_else_at_the_address(said: str) -> None:
    with pytest.raises(GroupError, match="the same version of hf_kd"):
        read_hello(said.encode(), "torch://x:1")


def test_options_are_checked() -> None:
    with pytest.raises(ValueError) as error:
        TeachOptions(
            fidelity="all", students=0, entries=256, bits=7, temperature=0.0, idle_timeout=-1
        ).validate()
    names = "teacher address fidelity students entries bits temperature idle_timeout".split()
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_dtype": "float32"}, "teacher_dtype='float32' with teacher='torch://h:1'.*hf-kd teach"),
        ({"teacher_cache": "x"}, "a teacher group keeps nothing.*hf-kd cache"),
    ],
)
def test_options_that_belong_to_the_other_side(tmp_path: Path, options: Any, message: str) -> None:
    args = DistillationArguments(output_dir=str(tmp_path), use_cpu=True, **options)
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(models()[0], args, teacher="torch://h:1", train_dataset=rows())


def test_a_cache_is_made_where_the_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache"
    argv = f"cache --teacher torch://h:1 --student s --dataset rows.csv --cache_dir {folder}".split()
    assert main(argv) == 2
    assert "teacher='torch://h:1' is a teacher group, which keeps nothing" in capsys.readouterr().err
    assert not folder.exists()


# ---- processes ----


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def saved_teacher(folder: Path) -> Path:
    """A classifier that is sure of what it says."""
    _, model = models()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.25)
    model.save_pretrained(folder)
    return folder


def _teach(folder: Path, port: int) -> None:
    address = f"127.0.0.1:{port}"
    os._exit(main(["teach", "--teacher", str(folder), "--address", address, "--students", "2"]))


def _learn(folder: Path, port: int, **options: Any) -> None:
    run = trainer(folder, teacher=f"torch://127.0.0.1:{port}", max_steps=6, save_strategy="no", **options)
    assert run.ahead.used
    without_dropout(run.student)
    run.train()
    run.save_model(str(folder))
    run.teacher.close()  # type: ignore[union-attr]  # a fork ends without what is to be done at the end


def test_two_students_learn_what_one_does_with_the_model_at_hand(tmp_path: Path) -> None:
    """The gradient is that of a live teacher: six steps on two ranks, four rows each, end where eight do."""
    saved_teacher(tmp_path / "teacher")
    port = free_port()
    options = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    teacher = child(_teach, tmp_path / "teacher", port, log=str(tmp_path / "teacher.log"))
    students = two_ranks(_learn, tmp_path / "out", port, logs=tmp_path, **options)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "teacher")
    shared = {"max_steps": 6, "save_strategy": "no", "per_device_train_batch_size": 8}
    live = trainer(tmp_path / "live", teacher=loaded, **shared, **options)
    without_dropout(live.student)
    live.train()
    assert [join(process) for process in (*students, teacher)] == [0, 0, 0]
    log = (tmp_path / "teacher.log").read_text()
    assert "answers at torch://127.0.0.1" in log
    assert log.count("has left: 28 positions") == 2, log  # four of them in the checks
    assert_same(weights(tmp_path / "out"), dict(live.student.state_dict()), 1e-5)


def test_a_teacher_that_is_killed_ends_its_students(tmp_path: Path) -> None:
    saved_teacher(tmp_path / "teacher")
    port = free_port()
    teacher = child(_teach, tmp_path / "teacher", port, log=str(tmp_path / "teacher.log"))
    students = two_ranks(_dawdle, tmp_path / "out", port, tmp_path / "begun", logs=tmp_path)
    while not (tmp_path / "begun").exists():
        assert all(process.is_alive() for process in students)
        time.sleep(0.05)
    os.kill(teacher.pid, signal.SIGKILL)  # type: ignore[arg-type]
    start = time.monotonic()
    assert [join(process) for process in students] == [1, 1]
    assert time.monotonic() - start < 60
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)]
    assert any(re.search("is lost: .*(closed|reset) by peer", text, re.I) for text in said), said
    assert all("is lost" in text or "lost the others" in text for text in said), said
    join(teacher)


def _dawdle(folder: Path, port: int, mark: Path) -> None:
    run = trainer(folder, teacher=f"torch://127.0.0.1:{port}", max_steps=1000, save_strategy="no")
    original = run.training_step

    def step(*args: Any, **kwargs: Any) -> Tensor:
        mark.touch()
        time.sleep(0.02)
        return original(*args, **kwargs)

    run.training_step = step  # type: ignore[method-assign]
    run.train()


def test_a_student_that_is_killed_is_noticed() -> None:
    group = Group(tiny())
    victim = FORK.Process(target=_ask_and_die, args=(group.port,))
    victim.start()
    join(victim)
    group.thread.join(20)
    assert group.status == [1]
    assert "student 0 is lost" in group.said[0]


def _ask_and_die(port: int) -> None:
    GroupTeacher(f"torch://127.0.0.1:{port}", task=resolve_task(None, tiny()))(batch())
    os.kill(os.getpid(), signal.SIGKILL)


def test_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    """A causal student from text; the control is evaluated by the teacher that was joined for the student."""
    tokenizer = train_tokenizer(["the cat sat on a mat", "a mat by the sea"] * 4, 60)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **small)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "text.txt").write_text("the cat sat on a mat\na mat by the sea\n" * 20)
    group = Group(LlamaForCausalLM(config), tokenizer=tokenizer_hash(tokenizer), fidelity="hidden")
    options = (
        f"--teacher torch://127.0.0.1:{group.port} --student {tmp_path / 'student'} --use_cpu --max_steps 2 "
        f"--dataset {tmp_path / 'text.txt'} --max_length 16 --report_to none --output_dir {tmp_path / 'out'}"
    )
    assert main(["distill", *options.split()]) == 0
    results = Results.read(tmp_path / "out" / "results.json")
    assert list(results.arms) == ["teacher", "student", "control"]
    taught, student, control = results.arms.values()
    assert taught.metrics["perplexity"] > 1 and student.eval_kl > 0 and control.eval_kl > 0
    # What it costs there is not known here, but for its size.
    assert taught.parameters == sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert taught.bytes == model_bytes(LlamaForCausalLM(config))
    assert not taught.latency and taught.peak_memory is None
    assert student.latency and results.positions[0].kl["student"] > 0
    assert [(d.one, d.other) for d in results.differences] == [("student", "control"), ("student", "teacher")]
    assert results.provenance["teacher_identity"] == group.desk.teacher.identity
    assert "a teacher in processes of its own" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert main(["distill", *options.replace("--student ", "--student_config {} --processor ").split()]) == 2
    assert "of which no student can be cut" in capsys.readouterr().err


def test_a_silent_end_is_left_in_time() -> None:
    port = free_port()
    seconds = timedelta(seconds=20)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=seconds)
    ends: list[Link] = []
    thread = threading.Thread(target=lambda: ends.append(Link(store, 0, near="127.0.0.1", timeout=20.0)))
    thread.start()
    other = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=seconds)
    link = Link(other, 1, near="127.0.0.1", timeout=0.3)
    thread.join(20)
    with pytest.raises(LinkError, match="Timed out waiting 300ms"):
        link.receive()
