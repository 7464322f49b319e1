"""A teacher behind an HTTP endpoint: token ids go there, a few log-probabilities per position come back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..tasks import Task
from ..tasks.text import CausalLM
from .cache.keys import pieces
from .signal import SparseSignal, TeacherSignal
from .transport import ServerError, Transport
from .wire import WIRE_FORMATS, Position, Row, WireFormat

if TYPE_CHECKING:
    from ..config import DistillationArguments

# What float32 sums of a softmax may exceed 1 by, and single entries 0.
_SLACK = 1e-3
_RAW = (
    "Start it so that it gives log-probabilities as the model has them (vLLM: --logprobs-mode raw_logprobs)."
)


def is_address(teacher: Any) -> bool:
    """Whether a teacher's name is the address of a server."""
    return isinstance(teacher, str) and teacher.lower().startswith(("http://", "https://"))


class ServedTeacher:
    """A causal language model on a server that gives the log-probabilities of a prompt.

    Its signal is sparse, at temperature 1, without draws: the `top_k` likeliest tokens per position and the
    mass of all others. Servers give log-softmax of the raw logits; the distribution at another temperature
    would need the logits of every token.

    Position i of the answer is the distribution over token i + 1, as in a model's logits. Nothing is asked
    about the token after the last one of a row: no label follows it.

    Args:
        url: Address of the API, such as `http://127.0.0.1:8000/v1` (vLLM, OpenAI) or `http://host:30000`
            (SGLang, llama.cpp); the path of `server_format` is added if it isn't there.
        model: The name that the server knows the model by. It stands for the weights in checkpoints and
            caches, since those can't be seen from here.
        server_format: Key of `WIRE_FORMATS`: "vllm", "openai" (`echo` and `logprobs`), "sglang", "llama.cpp".
        top_k: Tokens per position. Servers have a limit (vLLM: `--max-logprobs`, 20 by default).
        vocab_size: Ids from here on are refused; None: they are not looked at.
        concurrency: Requests at a time; a batch is divided among them.
        timeout: Seconds a try may take.
        retries: Further tries after a failed one, with exponential back-off (or as `Retry-After` says).
        api_key_env: Name of the environment variable with the key.
        tokenizer: For servers that name tokens by text ("openai"): which id a text is.

    Raises:
        ValueError: If the address, the format, the model's name or the key's variable can't be used.
        ServerError: When called: if the server doesn't answer, refuses, or answers for other tokens, other
            lengths, or with numbers that are no log-probabilities. It is a `ValueError`.
    """

    works_elsewhere = True

    def __init__(
        self,
        url: str,
        model: str | None,
        *,
        server_format: str = "vllm",
        top_k: int = 20,
        vocab_size: int | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 5,
        api_key_env: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Check the options; nothing is asked yet."""
        if not model:
            raise ValueError(
                "server_model is not set: name the model as the server knows it, for the name is all that "
                "tells this teacher from another one."
            )
        if server_format not in WIRE_FORMATS:
            raise ValueError(
                f"server_format={server_format!r} is not known: use one of {', '.join(WIRE_FORMATS)}."
            )
        self._format: WireFormat = WIRE_FORMATS[server_format]
        url = url.rstrip("/")
        self.url = url if url.endswith(self._format.path) else url + self._format.path
        self.model_name, self.server_format, self.top_k = model, server_format, top_k
        self.vocab_size, self._concurrency = vocab_size, concurrency
        self._transport = Transport(
            self.url, timeout=timeout, retries=retries, connections=concurrency, key_env=api_key_env
        )
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="served-teacher")
        self._spelling = spelling_of(tokenizer)

    @property
    def identity(self) -> dict[str, str]:
        """The model's name on the server: moving the server doesn't make it another teacher."""
        digest = hashlib.sha256(f"served {self.model_name}".encode()).hexdigest()[:16]
        return {"name": self.model_name, "revision": "", "fingerprint": digest}

    @property
    def columns(self) -> tuple[str, ...]:
        """Tokens, which of them are there, and where packed rows begin."""
        return ("input_ids", "attention_mask", "position_ids")

    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """Ask about every text of a batch; equal ones are asked about once.

        Args:
            batch: `input_ids` `[B, L]`, and `attention_mask` if rows are padded (on either side); or, where
                texts are packed into rows without padding, `position_ids` that start anew with each.

        Returns:
            A sparse signal `[B, L, k]`; positions that predict nothing have no entry.
        """
        ids: Tensor = batch["input_ids"]
        places = _places(batch)
        tokens = ids.cpu()
        rows = [tokens[b, place].tolist() for b, place in places]
        known = self._ask(list({tuple(row): row for row in rows if len(row) > 1}.values()))
        shape = (*ids.shape, self.top_k)
        out_ids, out_logs = torch.full(shape, -1), torch.zeros(shape)
        log_tail = torch.zeros(ids.shape)
        for row, (b, place) in zip(rows, places, strict=True):
            if len(row) > 1:
                out_ids[b, place[:-1]], out_logs[b, place[:-1]], log_tail[b, place[:-1]] = known[tuple(row)]
        device = ids.device
        return TeacherSignal(
            sparse=SparseSignal(out_ids.to(device), out_logs.to(device), log_tail.to(device), temperature=1.0)
        )

    def _ask(self, rows: list[Row]) -> dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]]:
        """The entries of every row, `[L - 1, k]`, `[L - 1, k]` and `[L - 1]`."""
        size = max(1, math.ceil(len(rows) / self._concurrency))
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        tasks = [self._pool.submit(self._ask_part, part) for part in parts]
        try:
            found = [tensors for task in tasks for tensors in task.result()]
        finally:
            for task in tasks:
                task.cancel()
        return {tuple(row): tensors for row, tensors in zip(rows, found, strict=True)}

    def _ask_part(self, rows: list[Row]) -> list[tuple[Tensor, Tensor, Tensor]]:
        answer = self._transport.post(self._format.body(rows, self.top_k, self.model_name))
        try:
            found = self._format.read(answer, rows, self._spelling)
            return [self._tensors(positions) for positions in found]
        except ServerError as error:
            said = f"teacher={self.url!r} (server_format={self.server_format!r})"
            raise ServerError(f"{said}: {error}") from None

    def _tensors(self, positions: list[Position]) -> tuple[Tensor, Tensor, Tensor]:
        shape = (len(positions), self.top_k)
        ids, logs = torch.full(shape, -1), torch.zeros(shape, dtype=torch.float64)
        for i, position in enumerate(positions):
            best = self._likeliest(position)
            ids[i, : len(best)] = torch.tensor([token for token, _ in best], dtype=torch.long)
            logs[i, : len(best)] = torch.tensor([value for _, value in best], dtype=torch.float64)
        mass = logs.exp().masked_fill(ids < 0, 0.0).sum(-1)
        if bool((mass > 1 + _SLACK).any()):
            raise ServerError(
                f"The server's probabilities of one position add up to {float(mass.max()):.4f}: they are no "
                f"softmax at temperature 1. {_RAW}"
            )
        return ids, logs.float(), torch.log1p(-mass.clamp_max(1.0)).float()

    def _likeliest(self, position: Position) -> list[tuple[int, float]]:
        """The `top_k` likeliest entries, checked. Servers add the prompt's own token to those asked for."""
        for token, value in position.items():
            if math.isnan(value) or value > _SLACK:
                fix = "Check its model's weights and dtype." if math.isnan(value) else _RAW
                raise ServerError(f"The server gives token {token} the log-probability {value}. {fix}")
            if token < 0 or (self.vocab_size is not None and token >= self.vocab_size):
                raise ServerError(
                    f"The server names token {token}, but the student's vocabulary has {self.vocab_size}: "
                    "its model has another tokenizer. Give the student that one, or name the right "
                    "server_model."
                )
        wanted = self.top_k if self.vocab_size is None else min(self.top_k, self.vocab_size)
        if len(position) < wanted:
            raise ServerError(
                f"server_top_k={self.top_k}, but the server gave {len(position)} tokens at one position: "
                f"raise its limit, or set server_top_k={len(position)}."
            )
        best = sorted(position.items(), key=lambda entry: (-entry[1], entry[0]))[: self.top_k]
        return [(token, min(value, 0.0)) for token, value in best if value > -math.inf]


def spelling_of(tokenizer: Any) -> Callable[[str], int]:
    """Which id a server means by a text: `token_id:17`, or what exactly one token decodes to."""
    known: dict[str, list[int]] = {}

    def spelling(text: str) -> int:
        number = text.removeprefix("token_id:")
        if number != text and number.isdecimal():
            return int(number)
        if tokenizer is None:
            raise ServerError(
                f"The server names a token by its text, {text!r}, and there is no tokenizer to say which one "
                "that is: give the trainer a processing_class, or use a server_format with ids."
            )
        if not known:
            for i in range(len(tokenizer)):
                known.setdefault(tokenizer.decode([i]), []).append(i)
        found = known.get(text, [])
        if len(found) != 1:
            raise ServerError(
                f"The server names a token by its text, {text!r}, which is {len(found)} tokens of the "
                "tokenizer, not 1: use a server that gives ids (vLLM, SGLang, llama.cpp)."
            )
        return found[0]

    return spelling


def _places(batch: Mapping[str, Any]) -> list[tuple[int, Tensor]]:
    """The row of each text, and the positions of its tokens, in order.

    Raises:
        ValueError: If texts packed into a row are behind one mask, so that a model would let them see each
            other, and a server that is asked about them one by one would not.
    """
    ids, mask, positions = (batch.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    assert ids is not None
    there = torch.ones_like(ids) if mask is None else mask
    if there.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(there.shape)} and input_ids {tuple(ids.shape)}: a served "
            "teacher can't be given a mask of its own. Leave it out, or give the teacher as a model."
        )
    if mask is None and positions is not None and positions.shape == ids.shape:
        view = {"input_ids": ids, "position_ids": positions}
        places = [(piece.row, piece.positions(there).cpu()) for piece in pieces(view)]
    else:
        places = [(b, row.nonzero().squeeze(-1)) for b, row in enumerate(there.cpu())]
    for b, place in places:
        if positions is None:
            continue
        numbers = positions.cpu()[b % len(positions), place]
        if len(place) and not torch.equal(numbers - numbers[0], torch.arange(len(place))):
            raise ValueError(
                "position_ids start anew within a row that has an attention_mask, or elsewhere than at 0: "
                "models in memory read what follows after what was before, and a server reads texts one by "
                "one. Leave out the mask, as padding-free batches do (DataCollatorWithFlattening), or don't "
                "pack."
            )
    return places


def served_teacher(
    url: str, args: DistillationArguments, *, task: Task, student: nn.Module, tokenizer: Any = None
) -> ServedTeacher:
    """The served teacher that a run's options ask for.

    Args:
        url: Its address.
        args: The options.
        task: The head; a server continues text.
        student: Its vocabulary bounds the ids.
        tokenizer: The student's.

    Raises:
        ValueError: If the options can't be used, or ask for another task or temperature than a server has.
    """
    if not isinstance(task, CausalLM):
        raise ValueError(
            f"teacher={url!r} is a server, which gives log-probabilities for task 'causal-lm' alone, and the "
            f"student's task is {task.name!r}: give a model or its id as the teacher."
        )
    option = "temperature" if args.teacher_temperature is None else "teacher_temperature"
    asked = {option: getattr(args, option)}
    if args.teacher_temperature is None and args.temperature_end is not None:
        asked["temperature_end"] = args.temperature_end
    for name, value in asked.items():
        if value != 1.0:
            shown = value if isinstance(value, str) else f"{value:g}"
            raise ValueError(
                f"{name}={shown}, but a server gives log-probabilities at temperature 1, and a few of them "
                f"can't be brought to another one: that takes the whole softmax. Set {name}=1."
            )
    return ServedTeacher(
        url,
        args.server_model,
        server_format=args.server_format,
        top_k=args.server_top_k,
        vocab_size=_vocab_size(student),
        concurrency=args.server_concurrency,
        timeout=args.server_timeout,
        retries=args.server_retries,
        api_key_env=args.server_api_key_env,
        tokenizer=tokenizer,
    )


def _vocab_size(student: nn.Module) -> int | None:
    find: Any = getattr(student, "get_output_embeddings", None)
    weight = getattr(find() if find is not None else None, "weight", None)
    return None if weight is None else int(weight.shape[0])
