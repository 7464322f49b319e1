"""Tensors between two processes over `torch.distributed`: a JSON header, then the bytes; nothing is pickled.

A link is a process group of two (gloo) with a store of its own, so it stands beside whatever groups a
launcher made, and one that breaks leaves the others alone.
"""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool,
    )
}  # fmt: skip
_MOST_HEADER = 64 << 20
_MOST_BYTES = 1 << 38
_SCHEME = "torch://"


class LinkError(RuntimeError):
    """The other side has ended, was silent for too long, or sent what is no message."""


def is_link(name: Any) -> bool:
    """Whether a teacher's name is the address of a teacher group."""
    return isinstance(name, str) and name.lower().startswith(_SCHEME)


def host_and_port(address: str, option: str) -> tuple[str, int]:
    """`torch://host:port` or `host:port`, taken apart.

    Raises:
        ValueError: If it is something else.
    """
    parts = urlsplit(address if is_link(address) else _SCHEME + address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or not port or parts.path.strip("/") or parts.query or "@" in parts.netloc:
        raise ValueError(
            f"{option}={address!r} is no address of a teacher group: write host:port, as in 10.0.0.7:29600."
        )
    return parts.hostname, port


class Link:
    """One end of a connection; one thread at a time may use it.

    Args:
        store: Where both ends find each other; not used once they have.
        rank: 0 at one end, 1 at the other.
        near: A host name or number of this machine, as the other end reaches it.
        timeout: Seconds that the other end may take to come, to answer, or to take what is sent.

    Attributes:
        sent: Bytes that went out.
        received: Bytes that came in.

    Raises:
        LinkError: If the other end doesn't come in time.
    """

    def __init__(self, store: Any, rank: int, *, near: str, timeout: float) -> None:
        """Connect."""
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=timeout)
        options._devices = [gloo.create_device(hostname=near)]
        self._other, self.timeout = 1 - rank, timeout
        self.sent = self.received = 0
        try:
            self._group = gloo(store, rank, 2, options)
        except RuntimeError as error:
            raise LinkError(f"no connection was made in {timeout:g} s ({_first(error)})") from error

    def send(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Send a message: JSON values, and tensors by name."""
        parts = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        listed = [
            [name, str(value.dtype).removeprefix("torch."), list(value.shape)]
            for name, value in parts.items()
        ]
        header = json.dumps({"about": about, "tensors": listed}).encode()
        self._push(torch.tensor([len(header)]))
        self._push(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        for value in parts.values():
            if value.numel():
                self._push(value.reshape(-1).view(torch.uint8))

    def receive(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The next message.

        Raises:
            LinkError: If the other end is gone or silent, or sends something else.
        """
        length = int(self._pull(torch.zeros(1, dtype=torch.int64)))
        if not 0 < length <= _MOST_HEADER:
            raise LinkError(f"the other end announces a header of {length} bytes")
        header = self._pull(torch.zeros(length, dtype=torch.uint8)).numpy().tobytes()
        about, shapes = read_header(header)
        tensors = {}
        for name, (dtype, shape) in shapes.items():
            tensors[name] = torch.empty(shape, dtype=dtype)
            if tensors[name].numel():
                self._pull(tensors[name].view(-1).view(torch.uint8))
        return about, tensors

    def abort(self) -> None:
        """End what a thread waits for here: it raises there."""
        self._group.abort()

    def _push(self, data: Tensor) -> None:
        self._done(lambda: self._group.send([data], self._other, 0))
        self.sent += data.numel() * data.element_size()

    def _pull(self, data: Tensor) -> Tensor:
        self._done(lambda: self._group.recv([data], self._other, 0))
        self.received += data.numel() * data.element_size()
        return data

    def _done(self, begin: Callable[[], Any]) -> None:
        try:
            begin().wait()
        except RuntimeError as error:
            raise LinkError(_first(error)) from error


def read_header(text: bytes) -> tuple[dict[str, Any], dict[str, tuple[torch.dtype, list[int]]]]:
    """What a message is about, and the dtype and shape of each of its tensors.

    Raises:
        LinkError: If it is no header, or announces more than anybody holds.
    """
    try:
        content = json.loads(text)
        about, listed = content["about"], content["tensors"]
        if not isinstance(about, dict):
            raise TypeError("about")
        found = {}
        for name, dtype, shape in listed:
            sizes = [size for size in shape if type(size) is int and size >= 0]
            if not isinstance(name, str) or len(sizes) != len(shape):
                raise TypeError("shape")
            found[name] = (DTYPES[dtype], sizes)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LinkError(f"the other end sends no header that is known ({type(error).__name__})") from error
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in found.values())
    if total > _MOST_BYTES:
        raise LinkError(f"the other end announces {total} bytes")
    return about, found


def near_side(host: str, port: int) -> str:
    """The number of this machine on the way to another."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family[0], socket.SOCK_DGRAM) as probe:
        probe.connect(family[4])  # sends nothing
        return str(probe.getsockname()[0])


def _first(error: Exception) -> str:
    """The reason that the library gives, without where it was built."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\] *", "", line).split(". This is")[0][:200]
