"""JSON over HTTP that survives a busy server: time-outs, retries with back-off, a key that is never shown."""

from __future__ import annotations

import email.utils
import ipaddress
import json
import logging
import os
import random
import re
import time
from typing import Any
from urllib.parse import urlsplit

import httpx2

logger = logging.getLogger(__name__)

# Busy, restarting or overloaded; every other refusal would be the same the next time.
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_RETRY_AFTER = 0.5, 30.0, 600.0
_SHOWN = 300


class ServerError(ValueError):
    """A server that doesn't answer, or answers what can't be used."""


class Transport:
    """Posts JSON to one address, from several threads at a time.

    Args:
        url: Where to post.
        timeout: Seconds that one try may take, from connecting to the last byte.
        retries: Further tries after a failed one.
        connections: Posts at a time.
        key_env: Name of the environment variable with the key, sent as a bearer token; None: no key. The key
            is read when a request is made and kept nowhere.

    Raises:
        ValueError: If the address isn't HTTP or has a password or a query in it, or the variable isn't set.
    """

    def __init__(
        self, url: str, *, timeout: float, retries: int, connections: int, key_env: str | None = None
    ) -> None:
        """Check the address and the key's variable; nothing is sent."""
        self.url, self.timeout, self.retries, self._key_env = url, timeout, retries, key_env
        _check_url(url)
        if key_env is not None:
            _check_variable(key_env)
            if urlsplit(url).scheme == "http" and not _is_local(urlsplit(url).hostname or ""):
                logger.warning("The key of the teacher's server is sent without encryption: use https.")
        # Each phase has its own limit there; the whole of a try is watched in `_once`.
        self._client = httpx2.Client(
            timeout=timeout, limits=httpx2.Limits(max_connections=connections), follow_redirects=False
        )

    def post(self, body: dict[str, Any]) -> Any:
        """The answer to one request, as JSON.

        Raises:
            ServerError: If the server refuses, or no try succeeded.
        """
        for attempt in range(self.retries + 1):
            try:
                status, text, headers = self._once(body)
            except (httpx2.TransportError, TimeoutError) as error:
                problem, wait = self._clean(f"{type(error).__name__}: {error}"), None
            else:
                if status == 200:
                    try:
                        return json.loads(text)
                    except ValueError:
                        problem, wait = f"no JSON but {self._clean(text)!r}", None
                elif status in _RETRIED:
                    problem, wait = f"HTTP {status}: {self._clean(text)}", retry_after(headers)
                else:
                    raise ServerError(
                        f"teacher={self.url!r} refuses with HTTP {status}: {self._clean(text)}{_hint(status)}"
                    )
            if attempt < self.retries:
                time.sleep(backoff(attempt) if wait is None else wait)
        raise ServerError(
            f"teacher={self.url!r} gave no answer in {self.retries + 1} tries of at most {self.timeout:g} s; "
            f"the last: {problem}. Check the server, or raise server_timeout or server_retries."
        ) from None

    def _once(self, body: dict[str, Any]) -> tuple[int, str, Any]:
        deadline = time.monotonic() + self.timeout
        headers = {}
        if self._key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self._key_env, '')}"
        with self._client.stream("POST", self.url, json=body, headers=headers) as response:
            parts = []
            for part in response.iter_bytes():
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the answer was not complete after {self.timeout:g} s")
            return response.status_code, b"".join(parts).decode("utf-8", "replace"), response.headers

    def _clean(self, text: str) -> str:
        """The start of what a server said, without the key: some answer with the request's headers."""
        key = os.environ.get(self._key_env, "") if self._key_env is not None else ""
        return (text.replace(key, "***") if key else text).strip()[:_SHOWN]

    def __repr__(self) -> str:
        """The address alone."""
        return f"Transport({self.url!r})"


def backoff(attempt: int) -> float:
    """Seconds to wait after try number `attempt`: doubled each time, with jitter so that ranks spread."""
    return min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)


def retry_after(headers: Any) -> float | None:
    """The seconds that a server asks to wait (`Retry-After`, a number or a date), at most ten minutes."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER) if seconds == seconds else None


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            "teacher is not an http:// or https:// address with a host name: write e.g. http://10.0.0.7:8000/v1."
        )
    if parts.username is not None or parts.password is not None or parts.query:
        # Not repeated here: it may be a secret.
        raise ValueError(
            f"teacher: the address of the server at {parts.hostname!r} has a user, password or query in it, "
            "which would be stored with the run. Put the key in an environment variable and name that in "
            "server_api_key_env."
        )


def _check_variable(name: str) -> None:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None or not os.environ.get(name):
        # Not repeated here either: a key given in its place would be shown.
        raise ValueError(
            "server_api_key_env does not name an environment variable that is set. Give the variable's name, "
            "not the key, and set the variable on every machine of the run."
        )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hint(status: int) -> str:
    if status in (401, 403):
        return " (set server_api_key_env to the variable that holds the key)"
    if status in (404, 405):
        return " (check the address, server_format and server_model)"
    return " (the server may have a limit: lower server_top_k, or max_length, the length of a row)"
