"""Teachers on a server: honest ones give what the model gives, all others are found out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.cli import main
from hf_kd.data.processors import train_tokenizer
from hf_kd.elsewhere import obstacles
from hf_kd.options import DistillationOptions, RunOptions
from hf_kd.options.teacher import SERVER_FORMAT_NAMES
from hf_kd.results import Results
from hf_kd.teachers import transport
from hf_kd.teachers.server import ServedTeacher, is_address, spelling_of
from hf_kd.teachers.signal import SparseSignal, TeacherSignal
from hf_kd.teachers.transport import ServerError, Transport, backoff, retry_after
from hf_kd.teachers.wire import WIRE_FORMATS
from tests.served import VOCABULARY, Served, serving, tiny_llama
from tests.test_trainer import classifiers

SECRET = "sk-verySecret0123"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def server(model: Any) -> Iterator[tuple[str, Served]]:
    with serving(model) as running:
        yield running


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between tries are noted, and not waited for."""
    noted: list[float] = []
    monkeypatch.setattr(transport.time, "sleep", noted.append)
    return noted


def batch() -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on either side, one twice, one of a single token."""
    ids = torch.zeros(5, 7, dtype=torch.long)
    mask = torch.zeros_like(ids)
    generator = torch.Generator().manual_seed(0)
    for row, (start, length) in enumerate([(0, 7), (0, 4), (2, 5), (0, 4), (6, 1)]):
        ids[row, start : start + length] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, start : start + length] = 1
    ids[3] = ids[1]
    return {"input_ids": ids, "attention_mask": mask}


def teacher(url: str, **options: Any) -> ServedTeacher:
    return ServedTeacher(url, "tiny", **{"top_k": 5, "vocab_size": VOCABULARY, "timeout": 10.0, **options})


def sparse(url: str, given: dict[str, torch.Tensor] | None = None, **options: Any) -> SparseSignal:
    signal = teacher(url, **options)(given or batch()).sparse
    assert signal is not None
    return signal


def check(signal: SparseSignal, model: Any, given: dict[str, torch.Tensor], k: int) -> None:
    """Each position's entries against the model's softmax, in float64; position i predicts token i + 1."""
    assert signal.temperature == 1.0
    assert not signal.has_draws
    for b in range(len(given["input_ids"])):
        places = given["attention_mask"][b].nonzero().squeeze(-1)
        with torch.no_grad():
            logits = model(input_ids=given["input_ids"][b : b + 1, places]).logits[0].double()
        exact = logits.log_softmax(-1)
        for i, place in enumerate(places[:-1]):
            best = exact[i].topk(k)
            assert signal.ids[b, place].tolist() == best.indices.tolist()
            torch.testing.assert_close(signal.log_probs[b, place].double(), best.values, atol=1e-6, rtol=1e-6)
            tail = 1 - best.values.exp().sum()
            torch.testing.assert_close(signal.log_tail[b, place].double().exp(), tail, atol=1e-6, rtol=1e-5)
        silent = torch.ones(len(given["input_ids"][b]), dtype=torch.bool)
        silent[places[:-1]] = False
        assert bool((signal.ids[b, silent] == -1).all())


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("vllm", "/completions"),
        ("openai", "/completions"),
        ("sglang", "/generate"),
        ("llama.cpp", "/completion"),
    ],
)
def test_answers_are_the_models_own(server: Any, model: Any, kind: str, path: str) -> None:
    """Trap 33: what a server says of token i belongs to position i - 1, whatever the padding."""
    url, served = server
    check(sparse(url, server_format=kind), model, batch(), 5)
    assert {request[0] for request in served.requests} == {f"/v1{path}"}


def test_the_address_may_have_the_path_already(server: Any, model: Any) -> None:
    check(sparse(server[0] + "/completions/"), model, batch(), 5)


def test_without_mask_all_tokens_are_sent(server: Any, model: Any) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 6))
    check(sparse(server[0], {"input_ids": ids}), model, {"input_ids": ids, "attention_mask": ids * 0 + 1}, 5)


def test_all_tokens_leave_no_tail(server: Any) -> None:
    signal = sparse(server[0], top_k=VOCABULARY)
    assert bool((signal.log_tail[signal.ids[..., 0] >= 0].exp() < 1e-6).all())


def test_a_batch_is_divided_among_connections_and_equal_rows_are_sent_once(server: Any) -> None:
    url, served = server
    served.slow = 0.05
    sent = teacher(url, concurrency=2)
    ids = torch.arange(3, 51).view(8, 6)
    sent({"input_ids": torch.cat([ids, ids])})
    assert sorted(len(body["prompt"]) for _, _, body in served.requests) == [4, 4]
    assert served.at_once <= 2


def test_choices_in_another_order_are_sorted(server: Any, model: Any) -> None:
    url, served = server
    served.faults = [lambda answer: {"choices": answer["choices"][::-1]}]
    check(sparse(url, concurrency=1), model, batch(), 5)


@pytest.mark.parametrize("fault", ["stall", "trickle", "drop", "garbage", "cut", 429, 500, 502, 503])
def test_a_fault_that_passes_is_survived(server: Any, model: Any, waits: list[float], fault: Any) -> None:
    url, served = server
    served.faults = [fault, fault]
    stuck = fault in ("stall", "trickle")
    check(sparse(url, concurrency=1, timeout=0.4 if stuck else 10.0), model, batch(), 5)
    assert len(served.requests) == 3
    assert len(waits) == 2
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0


@pytest.mark.parametrize("fault", ["stall", "drop", 500])
def test_a_fault_that_stays_is_said(server: Any, fault: Any) -> None:
    url, served = server
    served.faults = [fault] * 3
    with pytest.raises(
        ServerError, match=r"no answer in 3 tries of at most 0.2 s.*the last: .*server_timeout"
    ):
        sparse(url, concurrency=1, retries=2, timeout=0.2)


def test_nobody_there(model: Any) -> None:
    with serving(model) as (url, _):
        pass
    with pytest.raises(ServerError, match=r"gave no answer in 2 tries.*ConnectError"):
        sparse(url, retries=1)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_repeated(server: Any, status: int) -> None:
    url, served = server
    served.faults = [status]
    with pytest.raises(ServerError, match=f"refuses with HTTP {status}: .*status {status}"):
        sparse(url, concurrency=1)
    assert len(served.requests) == 1


def test_retry_after_is_honoured(server: Any, waits: list[float]) -> None:
    url, served = server
    served.faults = [(429, {"Retry-After": "17"}), (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})]
    sparse(url, concurrency=1)
    assert waits == [17.0, 0.0]


def test_retry_after_values() -> None:
    assert retry_after({}) is None
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    assert retry_after({"retry-after": "-3"}) == 0.0
    assert retry_after({"retry-after": "1e9"}) == 600.0


def test_backoff_doubles_up_to_a_limit_with_jitter() -> None:
    for attempt, longest in [(0, 0.5), (3, 4.0), (20, 30.0)]:
        waits = {backoff(attempt) for _ in range(50)}
        assert len(waits) > 10
        assert all(longest / 2 <= wait <= longest for wait in waits)


def vllm(edit: Any) -> Any:
    """Edit the entries of the first row's third token."""

    def change(answer: Any) -> None:
        edit(answer["choices"][0]["prompt_logprobs"][2], answer["choices"][0])

    return change


def _set_first(entries: dict[str, Any], value: Any) -> None:
    entries[next(iter(entries))]["logprob"] = value


LIES = {
    "one position less": (lambda e, c: c["prompt_logprobs"].pop(), "gave 6"),
    "one position more": (lambda e, c: c["prompt_logprobs"].append(c["prompt_logprobs"][-1]), "gave 8"),
    "no positions": (lambda e, c: c.pop("prompt_logprobs"), "no list 'prompt_logprobs'.*server_format"),
    "nan": (lambda e, c: _set_first(e, math.nan), "log-probability nan"),
    "positive": (lambda e, c: _set_first(e, 0.7), "log-probability 0.7"),
    "text": (lambda e, c: _set_first(e, "likely"), "'likely' for a log-probability"),
    "true": (lambda e, c: _set_first(e, True), "True for a log-probability"),
    "id out of range": (lambda e, c: e.update({"61": {"logprob": -9.0}}), "token 61.*has 61"),
    "negative id": (lambda e, c: e.update({"-1": {"logprob": -9.0}}), "'-1', which is no id"),
    "text as id": (lambda e, c: e.update({"the": {"logprob": -9.0}}), "'the', which is no id"),
    "null position": (lambda e, c: c["prompt_logprobs"].__setitem__(2, None), "None.*place of an object"),
    "other prompt": (
        lambda e, c: c["prompt_logprobs"].__setitem__(2, dict(list(e.items())[:3])),
        "at place 2",
    ),
    "mass above one": (lambda e, c: [v.update(logprob=-0.1) for v in e.values()], "add up to"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_found(server: Any, lie: str) -> None:
    url, served = server
    edit, message = LIES[lie]
    given = {"input_ids": torch.tensor([[9, 5, 3, 7, 11, 13, 17]])}
    if lie == "other prompt":  # a token so unlikely that only the server's own addition names it
        values = served.log_probs(given["input_ids"][0].tolist())[1]
        given["input_ids"][0, 2] = int(values.argmin())
    served.faults = [vllm(edit)]
    with pytest.raises(ServerError, match=message):
        sparse(url, given)


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        (
            "vllm",
            lambda a: a["choices"].pop(),
            "asked for 4 choices and gave 3|asked for 3 choices and gave 2",
        ),
        ("vllm", lambda a: a["choices"][1].update(index=0), "each must be there once"),
        ("vllm", lambda a: {"choices": "none"}, "no list 'choices'"),
        ("vllm", lambda a: [1], "place of an object"),
        (
            "openai",
            lambda a: a["choices"][0]["logprobs"]["tokens"].__setitem__(1, "token_id:60"),
            "at place 1",
        ),
        ("openai", lambda a: a["choices"][0]["logprobs"].update(tokens=["token_id:3"]), "llama.cpp"),
        ("sglang", lambda a: a.pop(), "asked for 3 answers and gave 2"),
        ("sglang", lambda a: a[0]["meta_info"]["input_token_logprobs"][1].__setitem__(1, 60), "at place 1"),
        ("sglang", lambda a: a[0]["meta_info"]["input_top_logprobs"].pop(), "gave 6"),
        ("sglang", lambda a: a[0]["meta_info"]["input_top_logprobs"][1].append([-9.0, "x", None]), "'x'"),
        ("llama.cpp", lambda a: a[0].update(tokens_evaluated=2), "sent 1 tokens and says that it saw 2"),
        ("llama.cpp", lambda a: a[0].update(completion_probabilities=[]), "gave 0"),
    ],
)
def test_lies_of_every_format_are_found(server: Any, kind: str, edit: Any, message: str) -> None:
    url, served = server

    def change(answer: Any) -> Any:
        made = edit(answer)
        return made if isinstance(made, dict) and "choices" in made or made == [1] else None

    served.faults = [change]
    with pytest.raises(ServerError, match=message):
        sparse(url, concurrency=1, server_format=kind)


def test_fewer_tokens_than_asked_for(server: Any) -> None:
    url, served = server
    served.top = lambda values, k, token=None: Served.top(served, values, min(k, 4), token)  # type: ignore[method-assign]
    with pytest.raises(ServerError, match=r"server_top_k=5, but the server gave 4 .*server_top_k=4"):
        sparse(url, server_format="sglang")


def test_a_token_without_mass_is_no_entry(server: Any) -> None:
    """Trap 9: -inf and vLLM's -9999 stand for no mass, and nothing becomes NaN."""
    url, served = server

    def change(answer: Any) -> None:
        for entries in answer["choices"][0]["prompt_logprobs"][1:]:
            entries[min(entries, key=lambda i: entries[i]["logprob"])]["logprob"] = -math.inf

    served.faults = [change]
    signal = sparse(url, {"input_ids": torch.tensor([[9, 5, 3]])}, top_k=VOCABULARY)
    assert (signal.ids[0, 0] >= 0).sum() == VOCABULARY - 1
    assert not signal.log_probs.isnan().any()
    assert not signal.log_tail.isnan().any()


class _Tokenizer:
    """Tokens 7 and 8 look alike."""

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, ids: list[int]) -> str:
        return "�" if ids[0] in (7, 8) else f"<{ids[0]}>"


def test_tokens_by_text(model: Any) -> None:
    """Strings are read where each is exactly one token, and refused where it isn't."""
    tokenizer = _Tokenizer()
    with serving(model, spell=lambda token: tokenizer.decode([token])) as (url, _):
        ids = torch.tensor([[20, 21, 22]])
        with pytest.raises(ServerError, match="no tokenizer to say"):
            sparse(url, {"input_ids": ids}, server_format="openai")
        with pytest.raises(ServerError, match="which is 2 tokens of the tokenizer"):
            sparse(
                url, {"input_ids": torch.tensor([[20, 7, 22]])}, server_format="openai", tokenizer=tokenizer
            )
    spelling = spelling_of(tokenizer)
    assert spelling("<20>") == 20
    assert spelling("token_id:7") == 7
    with pytest.raises(ServerError, match="which is 0 tokens"):
        spelling("unheard of")


def test_packed_texts_are_asked_about_one_by_one(server: Any, model: Any) -> None:
    """Trap 45: without a mask packed texts don't see each other, in a model as on the server."""
    ids, positions = torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([[0, 1, 2, 0, 1]])
    found = sparse(server[0], {"input_ids": ids, "position_ids": positions})
    for place in (slice(0, 3), slice(3, 5)):
        alone = {"input_ids": ids[:, place], "attention_mask": torch.ones_like(ids[:, place])}
        check(found.map(lambda values, place=place: values[:, place]), model, alone, 5)
    asked = [row for _, _, body in server[1].requests for row in body["prompt"]]
    assert sorted(asked) == [[3, 4, 5], [6, 7]]


def test_texts_packed_behind_one_mask_are_refused(server: Any) -> None:
    given = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(ValueError, match="position_ids start anew.*Leave out the mask"):
        sparse(server[0], {**given, "attention_mask": torch.ones(1, 4, dtype=torch.long)})
    with pytest.raises(ValueError, match="or elsewhere than at 0"):
        sparse(server[0], {**given, "position_ids": torch.tensor([[0, 1, 4, 5]])})
    given["position_ids"] = torch.arange(4)[None]
    assert sparse(server[0], given).ids.shape == (1, 4, 5)


# ---- the key ----


def test_the_key_is_sent_and_never_shown(
    server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url, served = server
    monkeypatch.setenv("MY_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    kept = teacher(url, api_key_env="MY_KEY", concurrency=1, retries=0)
    kept(batch())
    assert served.requests[0][1]["Authorization"] == f"Bearer {SECRET}"
    messages = [
        repr(kept),
        str(vars(kept)),
        str(vars(kept._transport)),
        repr(kept._transport),
        str(kept.identity),
    ]
    for fault in (400, 500):  # this server answers with the request's headers
        served.faults = [fault]
        with pytest.raises(ServerError) as error:
            kept(batch())
        assert "***" in str(error.value)
        chain: BaseException | None = error.value
        while chain is not None:
            messages.append(repr(chain))
            chain = chain.__cause__ or chain.__context__
    assert not [text for text in (*messages, caplog.text) if SECRET in text]


def test_no_key_no_header(server: Any) -> None:
    sparse(server[0])
    assert "Authorization" not in server[1].requests[0][1]


@pytest.mark.parametrize("name", [SECRET, "UNSET_VARIABLE_OF_A_TEST"])
def test_a_key_in_the_place_of_its_variable_is_refused_unseen(name: str) -> None:
    with pytest.raises(ValueError, match="does not name an environment variable that is set") as error:
        teacher("http://127.0.0.1:9", api_key_env=name)
    assert name not in str(error.value)


@pytest.mark.parametrize("url", [f"http://me:{SECRET}@host/v1", f"https://host/v1?key={SECRET}"])
def test_a_key_in_the_address_is_refused_unseen(url: str) -> None:
    with pytest.raises(ValueError, match="server_api_key_env") as error:
        teacher(url)
    assert SECRET not in str(error.value)


def test_a_key_without_encryption_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    for url, warned in [
        ("http://127.0.0.1/v1", 0),
        ("https://far.example/v1", 0),
        ("http://far.example/v1", 1),
    ]:
        caplog.clear()
        Transport(url, timeout=1.0, retries=0, connections=1, key_env="MY_KEY")
        assert len(caplog.records) == warned


def test_a_redirect_is_not_followed(server: Any, tmp_path: Path) -> None:
    """The key would go to wherever it points."""
    url, served = server
    served.faults = [(307, {"Location": url + "/elsewhere"})]
    with pytest.raises(ServerError, match="refuses with HTTP 307"):
        sparse(url, concurrency=1)
    assert len(served.requests) == 1


# ---- options ----


def test_addresses() -> None:
    assert is_address("http://x") and is_address("HTTPS://x")
    assert not is_address("org/model") and not is_address("./http") and not is_address(None)
    with pytest.raises(ValueError, match="http:// or https://"):
        teacher("http://")


def test_what_a_teacher_needs() -> None:
    with pytest.raises(ValueError, match="server_model is not set"):
        ServedTeacher("http://127.0.0.1", None)
    with pytest.raises(ValueError, match="server_format='grpc' is not known: use one of vllm, openai"):
        ServedTeacher("http://127.0.0.1", "m", server_format="grpc")


def test_identity_is_the_models_name_not_the_address() -> None:
    one, moved, other = (ServedTeacher(f"http://{h}", m) for h, m in [("a", "m"), ("b", "m"), ("a", "n")])
    assert one.identity == moved.identity
    assert one.identity["fingerprint"] != other.identity["fingerprint"]


def arguments(tmp_path: Path, **options: Any) -> DistillationArguments:
    given = {"temperature": 1.0, "server_model": "tiny", "report_to": "none", "use_cpu": True, **options}
    return DistillationArguments(output_dir=str(tmp_path), **given)


def test_an_address_is_a_teacher(server: Any, tmp_path: Path) -> None:
    """Every `server_...` option reaches the teacher."""
    url, served = server
    student = tiny_llama(1)
    args = arguments(tmp_path, server_top_k=3, server_concurrency=2, server_timeout=7.5, server_retries=1)
    found = DistillationTrainer(student, args, teacher=url).teacher
    assert isinstance(found, ServedTeacher)
    assert (found.top_k, found.vocab_size, found._concurrency) == (3, VOCABULARY, 2)
    assert (found._transport.timeout, found._transport.retries) == (7.5, 1)
    found(batch())
    assert served.requests[0][2]["prompt_logprobs"] == 3
    assert served.requests[0][2]["model"] == "tiny"
    args = arguments(tmp_path, server_format="sglang", teacher_temperature=1.0, temperature=3.0)
    assert DistillationTrainer(student, args, teacher=url).teacher.server_format == "sglang"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="server_api_key_env does not name"):
        DistillationTrainer(student, arguments(tmp_path, server_api_key_env="NOT_SET_HERE"), teacher=url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 2.0}, r"temperature=2, but a server gives .* Set temperature=1"),
        ({"temperature_end": 4.0, "temperature_schedule": "linear"}, "temperature_end=4, but a server"),
        ({"teacher_temperature": 2.0}, "teacher_temperature=2, but a server"),
        ({"server_model": None}, "server_model is not set"),
    ],
)
def test_what_a_server_can_not_do(tmp_path: Path, options: Any, message: str) -> None:
    """Trap 49: a few log-probabilities can't be brought to another temperature."""
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(tiny_llama(1), arguments(tmp_path, **options), teacher="http://127.0.0.1:9/v1")


def test_a_server_has_no_labels_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task 'causal-lm' alone, .*'sequence-classification'"):
        DistillationTrainer(classifiers()[1], arguments(tmp_path), teacher="http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_top_k": 0}, "server_top_k=0 is below 1"),
        ({"server_concurrency": 0}, "server_concurrency=0 is below 1"),
        ({"server_retries": -1}, "server_retries=-1 is below 0"),
        ({"server_timeout": 0.0}, "server_timeout=0.0 is not above 0"),
        ({"server_format": "grpc"}, "server_format='grpc' is not known: use one of vllm"),
    ],
)
def test_options_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationOptions(**options).validate()


def test_formats_have_one_list_of_names() -> None:
    assert tuple(WIRE_FORMATS) == SERVER_FORMAT_NAMES


# ---- a run ----


class LocalSparse:
    """The same teacher in memory, as a few entries per position."""

    columns = ("input_ids", "attention_mask")

    def __init__(self, model: Any, k: int) -> None:
        self.model, self.k = model, k
        self.identity = {"name": "tiny", "revision": "", "fingerprint": "local"}

    @torch.no_grad()
    def __call__(self, given: Any) -> TeacherSignal:
        logits = self.model(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"]
        ).logits.double()
        top = logits.log_softmax(-1).topk(self.k)
        tail = torch.log1p(-top.values.exp().sum(-1))
        return TeacherSignal(sparse=SparseSignal(top.indices, top.values.float(), tail.float()))


def rows_of_text() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    lengths = [7, 4, 9, 2, 6, 8, 3, 5]
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids})


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    tensors = [torch.tensor(row["input_ids"]) for row in features]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tensors], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run(
    teacher: Any, folder: Path, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, float]]:
    settings: dict[str, Any] = {
        "alpha": 0.7,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "server_top_k": 6,
        "disable_tqdm": True,
    }
    args = arguments(folder, **{**settings, **options})
    trainer = DistillationTrainer(
        tiny_llama(5), args, teacher=teacher, train_dataset=rows_of_text(), eval_dataset=rows_of_text(),
        data_collator=collate,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    return losses, weights, trainer.evaluate()


def test_a_run_is_that_of_the_same_teacher_in_memory(server: Any, model: Any, tmp_path: Path) -> None:
    """Trap 33: losses, weights and evaluation, over shuffled epochs, padding, accumulation, and faults."""
    url, served = server
    served.faults = [500, "drop", 429]
    far = run(url, tmp_path / "far")
    near = run(LocalSparse(model, 6), tmp_path / "near")
    assert len(far[0]) == 6
    assert far[0] == pytest.approx(near[0], rel=1e-5)
    for name, value in near[1].items():
        torch.testing.assert_close(far[1][name], value, atol=1e-4, rtol=1e-3)
    for name in ("eval_kl_tail", "eval_loss", "eval_agreement"):
        assert far[2][name] == pytest.approx(near[2][name], rel=1e-4)
    wrong = run(LocalSparse(tiny_llama(9), 6), tmp_path / "wrong")
    assert far[0] != pytest.approx(wrong[0], rel=1e-2)


def test_nothing_of_the_key_is_written(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, options and logs of a run name the variable, and no more."""
    monkeypatch.setenv("MY_KEY", SECRET)
    run(server[0], tmp_path, server_api_key_env="MY_KEY", save_strategy="steps", save_steps=3)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "distillation.yaml" for path in written)
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for _, headers, _ in server[1].requests)


def test_a_run_stops_at_a_lie(server: Any, tmp_path: Path) -> None:
    """Trap 48: never a silent fallback to the task loss."""
    url, served = server
    served.faults = [None] * 6 + [vllm(lambda e, c: c["prompt_logprobs"].pop())] * 8
    with pytest.raises(ServerError, match="was asked for"):
        run(url, tmp_path)


def test_all_that_a_teacher_elsewhere_can_not_be_is_said_at_once() -> None:
    two = ["http://h/v1", "b"]
    run = RunOptions(teacher=two[0], teachers=two, train_teacher=True, task="masked-lm")
    said = obstacles(run)
    for name in ("train_teacher=True", "student is not set", "teachers=", "task='masked-lm'"):
        assert sum(text.startswith(name) for text in said) == 1, said
    assert obstacles(RunOptions(teacher="torch://h:1", student="s", task="masked-lm")) == []


def test_the_command_line_with_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`hf-kd check` and `hf-kd distill --teacher http://...`: a student, its control, their scores."""
    tokenizer = train_tokenizer(["the cat sat on a mat by the sea"] * 5, 270)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config).eval()
    LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "text.txt").write_text("the cat sat on a mat\na mat by the sea\n" * 20)
    with serving(teacher) as (url, served):
        common = (
            f"--teacher {url} --server_model tiny --student {tmp_path / 'student'} --temperature 1 --use_cpu"
        )
        rest = (
            f"--dataset {tmp_path / 'text.txt'} --max_length 16 --max_steps 2 --report_to none --output_dir"
        )
        command = [*common.split(), *rest.split(), str(tmp_path / "out")]
        assert main(["check", *command]) == 0
        assert len(served.requests) > 0
        assert main(["distill", *command]) == 0
        said = str(tmp_path / "said")
        assert main(["cache", *command, "--cache_dir", said]) == 0
        assert main(["cache", "verify", *command, "--cache_dir", said, "--rows", "4"]) == 0
        assert "rows computed again" in capsys.readouterr().out
        asked = len(served.requests)
        assert main(["distill", *command[:-1], str(tmp_path / "read"), "--teacher_cache", said]) == 0
        assert len(served.requests) == asked, "a cache that has all rows is read, and nobody is asked"
        assert main(["distill", *[word if word != "1" else "2" for word in command]]) == 2
        assert "temperature=2, but a server" in capsys.readouterr().err
        cut = [*command, "--student_layers", "1"]
        i = cut.index("--student")
        assert main(["distill", *cut[:i], *cut[i + 2 :]]) == 2
        assert "of which no student can be cut" in capsys.readouterr().err
    results = Results.read(tmp_path / "out" / "results.json")
    assert set(results.arms) == {"student", "control"}, "entries of a distribution are no score"
    assert results.provenance["teacher_identity"]["name"] == "tiny"
    assert results.primary_metric == "perplexity" and results.difference("student", "control") is not None
    for arm in results.arms.values():
        assert arm.eval_kl is None and arm.metrics["kl_tail"] > 0 and 0 <= arm.eval_agreement <= 1
        assert arm.parameters > 0 and arm.latency and arm.bytes_on_disk > 0
    assert "at least" in results.verdict and "teacher's own score is not known" in results.gap_closed.reason
    read = Results.read(tmp_path / "read" / "results.json")
    assert read.arms["student"].metrics == pytest.approx(results.arms["student"].metrics, rel=1e-2)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "KL to teacher, at least (nats)" in page and "Training: every term of the loss" in page
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "a teacher on a server, there called tiny" in card and url not in card
    assert (tmp_path / "out" / "model.safetensors").is_file()
