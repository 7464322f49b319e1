"""The teacher or teachers: how they are placed, mixed, asked, and made of the student itself, as options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .fields import DTYPE_NAMES, mapping_problems, option, unknown_names

SERVER_FORMAT_NAMES = ("vllm", "openai", "sglang", "llama.cpp")
CACHE_MISS_NAMES = ("error", "compute")
SELF_TEACHER_NAMES = ("ema", "frozen", "adapters_off", "deeper")
ENSEMBLE_WEIGHTING_NAMES = ("fixed", "learned", "confidence")
AHEAD_NAMES = ("auto", "on", "off")
QUANTIZATION_NAMES = ("int8-dynamic", "bnb-8bit", "bnb-4bit")


@dataclass(kw_only=True)
class TeacherOptions:
    """A teacher in memory, from a cache or a server, several of them, or the student's own."""

    teacher_dtype: str | None = option(None, "dtype of the teacher (default: its checkpoint's)")
    teacher_device_map: str | None = option(None, "device map of the teacher (default: training device)")
    shard_teacher: bool | None = option(None, "in pieces over the ranks (default: where the student is)")
    teacher_cache: str | None = option(None, "directory or Hub id of what the teacher said (hf-kd cache)")
    cache_miss: str = option("error", "a row that the cache lacks: error, compute (ask the teacher)")
    teacher_revision: str | None = option(None, "branch, tag or commit of the teacher on the Hub")
    teacher_quantization: str | None = option(
        None, "int8-dynamic (on the CPU), bnb-8bit, bnb-4bit (need bitsandbytes)"
    )
    ensemble_weighting: str = option("fixed", "of several teachers: fixed, learned, confidence")
    ensemble_weights: list[float] | None = option(None, "weight of each (default: equal)")
    ensemble_temperature: float = option(1.0, "temperature at which their probabilities are averaged")
    ensemble_offload: bool = option(False, "keep them in CPU memory, one on the device at a time")
    teacher_routes: dict[str, Any] | str | None = option(
        None, """one teacher a row, by column teacher_id: '{"17": 0, "23": 1}'"""
    )
    teacher_timeout: float | None = option(None, "seconds that it may take for a batch (default: no limit)")
    teacher_ahead: str = option(
        "auto", "ask ahead while the student works: auto (a teacher elsewhere), on, off"
    )
    self_teacher: str | None = option(None, "the student's own: ema, frozen, adapters_off, deeper")
    exit_layers: list[int] | None = option(None, "layers that the last one teaches (default: half way)")
    self_teacher_dropout: bool = option(False, "leave its dropout on: another view of each row")
    ema_decay: float = option(0.999, "share of the moving average that a step keeps")
    ema_decay_end: float | None = option(None, "that share at the end, reached by a cosine")
    server_model: str | None = option(None, "name of the model on the server that teacher=http... names")
    server_format: str = option("vllm", "how that server answers: vllm, openai, sglang, llama.cpp")
    server_top_k: int = option(20, "tokens per position that it is asked for")
    server_concurrency: int = option(8, "requests to it at a time")
    server_timeout: float = option(60.0, "seconds that it may take for one")
    server_retries: int = option(5, "further tries after a failed one")
    server_api_key_env: str | None = option(None, "environment variable that holds its key")

    def teacher_problems(self) -> list[str]:
        """Every problem of these options, each with the option's name, its value and the fix."""
        known = {
            "server_format": SERVER_FORMAT_NAMES,
            "teacher_dtype": (*DTYPE_NAMES, None),
            "teacher_ahead": AHEAD_NAMES,
            "cache_miss": CACHE_MISS_NAMES,
            "teacher_quantization": (*QUANTIZATION_NAMES, None),
            "self_teacher": (*SELF_TEACHER_NAMES, None),
            "ensemble_weighting": ENSEMBLE_WEIGHTING_NAMES,
        }
        found = unknown_names(self, known) + mapping_problems(self, ("teacher_routes",))
        if self.cache_miss == "compute" and not self.teacher_cache:
            found.append("cache_miss='compute' has no effect without teacher_cache: set it, or drop this")
        if self.teacher_timeout is not None and not 0.0 < self.teacher_timeout < math.inf:
            found.append(f"teacher_timeout={self.teacher_timeout} is not above 0 and finite: set e.g. 600")
        return found + self._server_problems() + self._self_problems() + self._ensemble_problems()

    def _server_problems(self) -> list[str]:
        found = [
            f"{name}={getattr(self, name)} is below {least}: leave it out for the default"
            for name, least in (("server_top_k", 1), ("server_concurrency", 1), ("server_retries", 0))
            if getattr(self, name) < least
        ]
        if not 0.0 < self.server_timeout < math.inf:
            found.append(f"server_timeout={self.server_timeout} is not above 0 and finite: set e.g. 60")
        return found

    def _self_problems(self) -> list[str]:
        found = []
        for name in ("ema_decay", "ema_decay_end"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                found.append(f"{name}={value} is outside [0, 1]: it is a share, set e.g. 0.999")
        if self.self_teacher is not None and self.teacher_cache:
            found.append(
                f"teacher_cache={self.teacher_cache!r} with self_teacher={self.self_teacher!r}: what changes "
                "or is at hand can't be read from a cache; drop one"
            )
        if self.self_teacher is None and self.self_teacher_dropout:
            found.append("self_teacher_dropout=True with self_teacher=None: name one, or drop the dropout")
        if self.self_teacher == "deeper" and self.self_teacher_dropout:
            found.append(
                "self_teacher_dropout=True with self_teacher='deeper': there is one forward, with the "
                "student's own dropout; drop this"
            )
        if self.exit_layers is not None and self.self_teacher != "deeper":
            found.append(
                f"exit_layers={self.exit_layers} with self_teacher={self.self_teacher!r}: exits are taught "
                "by self_teacher='deeper'; set it, or drop them"
            )
        if self.self_teacher is not None and self.teacher_quantization is not None:
            found.append(
                f"teacher_quantization={self.teacher_quantization!r} with "
                f"self_teacher={self.self_teacher!r}: the student's own weights stay as they are; drop one"
            )
        return found

    def _ensemble_problems(self) -> list[str]:
        found = []
        if not 0.0 < self.ensemble_temperature < math.inf:
            found.append(f"ensemble_temperature={self.ensemble_temperature} is not above 0: set e.g. 1")
        if self.teacher_routes is not None and isinstance(self.teacher_routes, Mapping):
            try:
                self.teacher_routes = {str(int(k)): int(v) for k, v in self.teacher_routes.items()}
            except (TypeError, ValueError):
                found.append(
                    f"teacher_routes={self.teacher_routes} must map whole numbers to teachers' numbers"
                )
            if self.ensemble_weights is not None or self.ensemble_weighting != "fixed":
                found.append(
                    f"teacher_routes={self.teacher_routes} asks one teacher a row, so "
                    f"ensemble_weights={self.ensemble_weights} and "
                    f"ensemble_weighting={self.ensemble_weighting!r} have no effect: drop them"
                )
        if self.ensemble_weighting == "learned" and self.ensemble_weights is not None:
            found.append(
                f"ensemble_weights={self.ensemble_weights} with ensemble_weighting='learned': keep one"
            )
        return found
