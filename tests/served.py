"""A real HTTP server around a small model, that can also be told to misbehave."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61


def tiny_llama(seed: int = 0, *, layers: int = 1) -> LlamaForCausalLM:
    """A causal model whose distributions are far from flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


class Served:
    """The server.

    Attributes:
        faults: What to do with the next requests, one each, before it behaves again: "stall", "trickle",
            "drop", "garbage", a status, a status with headers (and an answer), or a function that edits the
            honest answer.
        requests: `(path, headers, body)` of every request.
        at_once: The largest number of requests in work at a time.
    """

    def __init__(self, model: nn.Module, *, spell: Callable[[int], str] | None = None) -> None:
        self.model, self.spell = model, spell or (lambda token: f"token_id:{token}")
        self.faults: list[Any] = []
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.at_once = self._working = 0
        self.slow = 0.0
        self.released = threading.Event()
        self._lock = threading.Lock()

    @torch.no_grad()
    def log_probs(self, row: list[int]) -> torch.Tensor:
        """`[L, V]`; row by row, as an honest server might."""
        with self._lock:
            return self.model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)

    def top(self, values: torch.Tensor, k: int, token: int | None = None) -> dict[int, float]:
        best = values.topk(min(k, len(values)))
        found = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return found if token is None else {**found, token: float(values[token])}

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path.endswith("/completions") and "prompt_logprobs" in body:
            return {"choices": [self._vllm(i, r, body) for i, r in enumerate(body["prompt"])]}
        if path.endswith("/completions"):
            return {"choices": [self._openai(i, r, body) for i, r in enumerate(body["prompt"])]}
        if path.endswith("/generate"):
            return [self._sglang(r, body) for r in body["input_ids"]]
        return [self._llama_cpp(i, r, body) for i, r in enumerate(body["prompt"])]

    def _tops(self, row: list[int], k: int, *, own: bool) -> list[dict[int, float]]:
        values = self.log_probs(row)
        return [self.top(values[i], k, row[i + 1] if own else None) for i in range(len(row) - 1)]

    def _vllm(self, index: int, row: list[int], body: dict[str, Any]) -> dict[str, Any]:
        tops = self._tops(row, body["prompt_logprobs"], own=True)
        made = [{str(t): {"logprob": v, "rank": 1} for t, v in top.items()} for top in tops]
        return {"index": index, "text": "?", "prompt_logprobs": [None, *made]}

    def _openai(self, index: int, row: list[int], body: dict[str, Any]) -> dict[str, Any]:
        tops = [
            {self.spell(t): v for t, v in top.items()} for top in self._tops(row, body["logprobs"], own=True)
        ]
        tokens = [self.spell(token) for token in [*row, 3]]
        last = {self.spell(3): -0.5}
        return {"index": index, "logprobs": {"tokens": tokens, "top_logprobs": [None, *tops, last]}}

    def _sglang(self, row: list[int], body: dict[str, Any]) -> dict[str, Any]:
        tops = self._tops(row, body["top_logprobs_num"], own=False)
        made = [[[v, t, None] for t, v in top.items()] for top in tops]
        seen = [[None, row[0], None], *([-1.0, token, None] for token in row[1:])]
        return {"meta_info": {"input_token_logprobs": seen, "input_top_logprobs": [None, *made]}}

    def _llama_cpp(self, index: int, row: list[int], body: dict[str, Any]) -> dict[str, Any]:
        top = self.top(self.log_probs(row)[-1], body["n_probs"])
        entries = [{"id": t, "token": "?", "logprob": v} for t, v in top.items()]
        first = {**entries[0], "top_logprobs": entries}
        return {"index": index, "tokens_evaluated": len(row), "completion_probabilities": [first]}

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        body = json.loads(raw)
        with self._lock:
            self.requests.append((handler.path, dict(handler.headers), body))
            fault = self.faults.pop(0) if self.faults else None
            self._working += 1
            self.at_once = max(self.at_once, self._working)
        try:
            if self.slow:
                threading.Event().wait(self.slow)
            self._reply(handler, fault, body)
        finally:
            with self._lock:
                self._working -= 1

    def _reply(self, handler: BaseHTTPRequestHandler, fault: Any, body: dict[str, Any]) -> None:
        status, headers = 200, {}
        if fault == "stall":
            self.released.wait(30)
            return
        if fault == "drop":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        answer = self.answer(handler.path, body)
        if isinstance(fault, int):
            status = fault
            answer = {"error": f"status {fault}", "headers": dict(handler.headers)}
        elif isinstance(fault, tuple):
            status, headers, *other = fault
            answer = other[0] if other else answer
        elif callable(fault):
            answer = fault(answer) or answer
        text = b"<html>bad gateway</html>" if fault == "garbage" else json.dumps(answer).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        if fault == "trickle":
            for i in range(0, len(text), 8):
                if self.released.wait(0.05):
                    return
                handler.wfile.write(text[i : i + 8])
                handler.wfile.flush()
        elif fault == "cut":
            handler.wfile.write(text[: len(text) // 2])
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            handler.wfile.write(text)


@contextmanager
def serving(model: nn.Module, **options: Any) -> Iterator[tuple[str, Served]]:
    """Run the server on the loopback interface; gives its address."""
    served = Served(model, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            try:
                served.handle(self)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client had enough

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", served
    finally:
        served.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
