"""Who makes calls beside the main thread: another thread, or another stream of a CUDA device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from .signal import TeacherSignal


class Worker:
    """One thread that makes calls in their order, without gradient.

    It is a daemon: a teacher that stalls must not keep a run that has ended with an error.

    Args:
        name: Of the thread.
        device: The accelerator that is current there.
    """

    def __init__(self, name: str, device: torch.device | None = None) -> None:
        """Start nothing yet."""
        self._name, self._device = name, device
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Make a call after those before it."""
        if self._thread is None:
            # Threads have numbers of cores of their own: another one would sum in another order.
            work, cores = self._work, torch.get_num_threads()
            self._thread = threading.Thread(target=work, args=(cores,), name=self._name, daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._calls.put((call, future))
        return future

    def _work(self, cores: int) -> None:
        torch.set_num_threads(cores)
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with torch.no_grad():
            while True:
                call, future = self._calls.get()
                _settle(future, call)
                del call, future


class SideStream:
    """Calls whose kernels run beside those of the main stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def submit(self, call: Callable[[], TeacherSignal]) -> Future[Any]:
        """Launch what a call computes after all that the main stream was given before; returns at once."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        future: Future[Any] = Future()
        with torch.cuda.stream(self._stream):
            _settle(future, call)
        return future

    def receive(self, signal: TeacherSignal) -> None:
        """Let the main stream wait for what was launched, and keep its memory until it was read."""
        main = torch.cuda.current_stream(self._device)
        main.wait_stream(self._stream)
        for tensor in signal.tensors:
            tensor.record_stream(main)

    def lend(self, batch: Mapping[str, Any]) -> None:
        """Keep the memory of a batch until this stream has read it."""
        for value in batch.values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(self._stream)


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    """Make a call; what it raises is raised again where its result is asked for."""
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
