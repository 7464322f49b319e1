"""How servers give the log-probabilities of a prompt: what to send, and how to read the answer.

Every reader returns, per row of `L` tokens, `L - 1` mappings of token id to log-probability: the i-th is the
distribution over token i + 1 given tokens 0 to i, so it belongs to position i of a causal model's logits.
Readers trust nothing: the tokens that a server says it saw must be those that it was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .transport import ServerError

Row = list[int]
Position = dict[int, float]
#: Token id of a string as a server spells it; raises `ServerError` where that isn't exactly one.
Spelling = Callable[[str], int]


@dataclass(frozen=True)
class WireFormat:
    """One kind of server.

    Attributes:
        path: Where to post, after the address of the API.
        body: `(rows, k, model) -> request` for the k likeliest tokens at every position.
        read: `(answer, rows, spelling) -> positions` per row.
    """

    path: str
    body: Callable[[Sequence[Row], int, str], dict[str, Any]]
    read: Callable[[Any, Sequence[Row], Spelling], list[list[Position]]]


def vllm_body(rows: Sequence[Row], k: int, model: str) -> dict[str, Any]:
    """A completion of one token, with `prompt_logprobs`: they are made anyway, and are keyed by token id."""
    return {
        "model": model,
        "prompt": [list(row) for row in rows],
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprobs": k,
    }


def read_vllm(answer: Any, rows: Sequence[Row], spelling: Spelling) -> list[list[Position]]:
    """`choices[].prompt_logprobs`: null for the first token, then `{id: {"logprob": ...}}` per token.

    The token of the prompt is always among them, likely or not, which tells that it is the one sent.
    """
    found = []
    for row, choice in zip(rows, _choices(answer, len(rows)), strict=True):
        entries = _sized(choice.get("prompt_logprobs"), len(row), "prompt_logprobs")
        positions = [_keyed(entry) for entry in entries[1:]]
        for place, (token, position) in enumerate(zip(row[1:], positions, strict=True), start=1):
            if token not in position:
                raise _other_token(place, token, sorted(position))
        found.append(positions)
    return found


def openai_body(rows: Sequence[Row], k: int, model: str) -> dict[str, Any]:
    """A completion of one token, with the prompt and its log-probabilities echoed."""
    return {
        "model": model,
        "prompt": [list(row) for row in rows],
        "max_tokens": 1,
        "temperature": 1.0,
        "echo": True,
        "logprobs": k,
        # Known to vLLM; others ignore it and answer with strings.
        "return_tokens_as_token_ids": True,
    }


def read_openai(answer: Any, rows: Sequence[Row], spelling: Spelling) -> list[list[Position]]:
    """`choices[].logprobs` with `tokens` and `top_logprobs`, of the prompt and one token more.

    Tokens are strings: `token_id:17`, or text that has to stand for exactly one token.
    """
    found = []
    for row, choice in zip(rows, _choices(answer, len(rows)), strict=True):
        logprobs = _mapping(choice.get("logprobs"))
        tokens, tops = (_list(logprobs.get(name), name) for name in ("tokens", "top_logprobs"))
        if len(tokens) not in (len(row), len(row) + 1) or len(tops) != len(tokens):
            raise ServerError(
                f"The server was sent {len(row)} tokens and answered with {len(tokens)} tokens and "
                f"{len(tops)} top_logprobs: one generated token alone means that it doesn't echo the prompt "
                "(llama.cpp's server: set server_format='llama.cpp'); else it divides text otherwise."
            )
        for place, (token, said) in enumerate(zip(row, tokens, strict=False)):
            if spelling(str(said)) != token:
                raise _other_token(place, token, said)
        found.append([_spelled(top, spelling) for top in tops[1 : len(row)]])
    return found


def sglang_body(rows: Sequence[Row], k: int, model: str) -> dict[str, Any]:
    """SGLang's own `generate`: its answers have token ids."""
    return {
        "input_ids": [list(row) for row in rows],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
        "return_text_in_logprobs": False,
    }


def read_sglang(answer: Any, rows: Sequence[Row], spelling: Spelling) -> list[list[Position]]:
    """`meta_info.input_top_logprobs`: null for the first token, then `[[logprob, id, text], ...]`."""
    answers = _sized([answer] if isinstance(answer, Mapping) else answer, len(rows), "answers")
    found = []
    for row, one in zip(rows, answers, strict=True):
        meta = _mapping(_mapping(one).get("meta_info"))
        seen = _sized(meta.get("input_token_logprobs"), len(row), "input_token_logprobs")
        tops = _sized(meta.get("input_top_logprobs"), len(row), "input_top_logprobs")
        for place, (token, said) in enumerate(zip(row, seen, strict=True)):
            if len(_list(said, "input_token_logprobs")) < 2 or said[1] != token:
                raise _other_token(place, token, said)
        found.append([_pairs((e[1], e[0]) for e in _list(top, "input_top_logprobs")) for top in tops[1:]])
    return found


def llama_cpp_body(rows: Sequence[Row], k: int, model: str) -> dict[str, Any]:
    """llama.cpp's own `completion`, one token after each beginning of each row.

    Its server gives log-probabilities of generated tokens alone. With `cache_prompt` a beginning costs one
    token more than the one before. `n_probs` are taken before any sampling unless asked otherwise.
    """
    return {
        "prompt": [list(row[:end]) for row in rows for end in range(1, len(row))],
        "n_predict": 1,
        "n_probs": k,
        "temperature": 1.0,
        "cache_prompt": True,
        "post_sampling_probs": False,
    }


def read_llama_cpp(answer: Any, rows: Sequence[Row], spelling: Spelling) -> list[list[Position]]:
    """A list of `{"index", "tokens_evaluated", "completion_probabilities": [{"top_logprobs": [{"id", ...`."""
    lengths = [end for row in rows for end in range(1, len(row))]
    answers = _sized([answer] if isinstance(answer, Mapping) else answer, len(lengths), "answers")
    ordered = _in_order([_mapping(one) for one in answers])
    positions = []
    for length, one in zip(lengths, ordered, strict=True):
        if one.get("tokens_evaluated") != length:
            raise ServerError(
                f"The server was sent {length} tokens and says that it saw {one.get('tokens_evaluated')!r}: "
                "it cut the row (start it with a longer context, or set max_length), or added tokens of "
                "its own."
            )
        first = _mapping(_sized(one.get("completion_probabilities"), 1, "tokens")[0])
        tops = [_mapping(entry) for entry in _list(first.get("top_logprobs"), "top_logprobs")]
        positions.append(_pairs((top.get("id"), top.get("logprob")) for top in tops))
    rest = iter(positions)
    return [[next(rest) for _ in row[1:]] for row in rows]


#: By the option `server_format`.
WIRE_FORMATS: dict[str, WireFormat] = {
    "vllm": WireFormat("/completions", vllm_body, read_vllm),
    "openai": WireFormat("/completions", openai_body, read_openai),
    "sglang": WireFormat("/generate", sglang_body, read_sglang),
    "llama.cpp": WireFormat("/completion", llama_cpp_body, read_llama_cpp),
}


def _choices(answer: Any, count: int) -> list[Mapping[str, Any]]:
    """The completions, in the order of the prompts."""
    choices = _mapping(answer).get("choices")
    return _in_order([_mapping(c) for c in _sized(choices, count, "choices")])


def _in_order(answers: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Answers by their `index`, where they have one: each index once."""
    indices = [one.get("index", i) for i, one in enumerate(answers)]
    if sorted(indices, key=str) != sorted(range(len(answers)), key=str):
        raise ServerError(
            f"The server numbers its {len(answers)} answers {indices}; each must be there once. {_question()}"
        )
    return [one for _, one in sorted(zip(indices, answers, strict=True), key=lambda pair: pair[0])]


def _keyed(entry: Any) -> Position:
    position = {}
    for key, value in _mapping(entry).items():
        if not key.isdecimal():
            raise ServerError(f"The server names a token {key[:80]!r}, which is no id. {_question()}")
        position[int(key)] = _number(value, "logprob")
    return position


def _spelled(top: Any, spelling: Spelling) -> Position:
    return _pairs((spelling(str(token)), value) for token, value in _mapping(top).items())


def _pairs(entries: Any) -> Position:
    position: Position = {}
    for token, value in entries:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ServerError(f"The server names a token {token!r}, which is no id. {_question()}")
        if token in position:
            raise ServerError(f"The server names token {token} twice at one position. {_question()}")
        position[token] = _number(value, "")
    return position


def _number(value: Any, name: str) -> float:
    number = value.get(name) if name and isinstance(value, Mapping) else value
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise ServerError(f"The server gives {number!r} for a log-probability. {_question()}")
    return float(number)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ServerError(
            f"The server's answer has {str(value)[:80]!r} in the place of an object. {_question()}"
        )
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ServerError(
            f"The server's answer has no list {name!r} (but {str(value)[:80]!r}). {_question()}"
        )
    return value


def _sized(value: Any, count: int, name: str) -> list[Any]:
    values = _list(value, name)
    if len(values) != count:
        raise ServerError(f"The server was asked for {count} {name} and gave {len(values)}. {_question()}")
    return values


def _other_token(place: int, token: int, said: Any) -> ServerError:
    return ServerError(
        f"The server was sent token {token} at place {place} and answers for {str(said)[:120]}: it changes "
        "the prompt (switch off what adds tokens), or has another tokenizer (give the student that one)."
    )


def _question() -> str:
    """What to look at when an answer has not the form that is read."""
    return (
        "Does it give the log-probabilities of a prompt, and is server_format right (use one of "
        f"{', '.join(WIRE_FORMATS)})?"
    )
