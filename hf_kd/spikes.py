"""Steps that go wrong: a gradient or a KL far above those before it, and a KL that grows.

Three rules, on what all ranks see alike: the gradient's norm before clipping, and the step's distillation
term (`T^2` included, without its weight `alpha`).

1. *Not finite.* A gradient with infinities or NaN is never applied: training ends with an error, or with
   `spike_action="skip"` the step is dropped. (With fp16 the loss scaler drops such steps by itself.)
2. *Spike.* On a logarithmic scale, where norms are nearly symmetric, a value is a spike if it lies more than
   `spike_threshold` robust standard deviations above the median of the last 64 steps. The robust
   deviation is 1.4826 times the median absolute deviation (Rousseeuw and Croux 1993), at least 0.1, so that
   steps of nearly one size don't make every other one a spike. There is no verdict before 16 steps. Spikes
   enter the window too: a run that moves to a new level for good is taken at its word after half a window.
3. *Growth.* The median KL of a full window is more than twice the smallest one so far. One step is not to
   blame for that, so `skip` drops none: growth is reported, and ends training under `stop`.

A dropped step leaves weights and optimizer as they were and counts as a step: the schedule and the data go
on. Windows and counts are part of a checkpoint, so a resumed run decides as an undisturbed one would.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .records import write_text

logger = logging.getLogger(__name__)

SPIKES_FILE = "spikes.json"
#: What is counted, as it is named in the log and in `results.json`.
COUNTS = ("spikes_grad_norm", "spikes_kl", "kl_growth", "steps_skipped")
_FEWEST = 16  # steps before a verdict
_LEAST_SPREAD = 0.1
_LEAST = 1e-6  # values below are one to us: noise around a KL of 0 is no spike
_GROWTH = 2.0
_SMALLEST_MEDIAN = 1e-3  # nats; growth from less than this is none
_MOST_MESSAGES = 10


@dataclass
class SpikeWatch:
    """Looks at every step of a run before it is applied.

    Attributes:
        action: What follows a spike: "warn", "skip" or "stop".
        threshold: Robust standard deviations.
        window: Steps that a new one is compared with.
        counts: How often each thing happened.
    """

    action: str = "warn"
    threshold: float = 8.0
    window: int = 64
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    norms: deque[float] = field(init=False)
    kls: deque[float] = field(init=False)
    best: float | None = None
    growing: bool = False

    def __post_init__(self) -> None:
        """Start with empty windows."""
        self.norms, self.kls = deque(maxlen=self.window), deque(maxlen=self.window)

    def judge(self, *, step: int, norm: float | None, kl: float | None, scaled: bool = False) -> str | None:
        """What is to be done about a step: None (apply it), "skip" or "stop".

        Args:
            step: Its number.
            norm: Of the gradient, before clipping; None: not known.
            kl: Of the distillation term; None: there is none.
            scaled: Whether a loss scaler drops steps that are not finite.

        Raises:
            FloatingPointError: If the gradient is not finite, and nothing else drops the step.
        """
        found = []
        if norm is not None and not math.isfinite(norm):
            if scaled:
                return None
            self.counts["spikes_grad_norm"] += 1
            if self.action != "skip":
                raise FloatingPointError(
                    f"The gradient's norm is {norm} at step {step}, though the loss is finite. No weight was "
                    "changed by this step and the last checkpoint is intact. Lower learning_rate, train in "
                    "bf16 or fp32, or set spike_action='skip' to drop such steps."
                )
            found.append(f"the gradient's norm is {norm}")
        else:
            found += self._spike("spikes_grad_norm", "gradient's norm", norm, self.norms)
        found += self._spike("spikes_kl", "distillation term", kl, self.kls)
        grown = self._growth(step)
        if grown and self.action == "stop":
            found.append(grown)
        elif grown:
            logger.warning("Step %d: %s.", step, grown)
        return self._act(step, found)

    def _spike(self, name: str, said: str, value: float | None, window: deque[float]) -> list[str]:
        if value is None:
            return []
        past = [math.log(max(one, _LEAST)) for one in window]
        window.append(value)
        if len(past) < min(_FEWEST, self.window):
            return []
        middle = statistics.median(past)
        spread = 1.4826 * statistics.median(abs(one - middle) for one in past)
        bound = middle + self.threshold * max(spread, _LEAST_SPREAD)
        if math.log(max(value, _LEAST)) <= bound:
            return []
        self.counts[name] += 1
        return [
            f"the {said} is {value:.3g}, of the last {len(past)} steps the median is {math.exp(middle):.3g} "
            f"and the bound {math.exp(bound):.3g}"
        ]

    def _growth(self, step: int) -> str | None:
        if len(self.kls) < self.window:
            return None
        now = max(statistics.median(self.kls), _SMALLEST_MEDIAN)
        self.best = now if self.best is None else min(self.best, now)
        if now <= _GROWTH * self.best:
            self.growing = False
            return None
        if self.growing:
            return None
        self.growing = True
        self.counts["kl_growth"] += 1
        return (
            f"the distillation term grows: its median over {self.window} steps is {now:.3g}, and was "
            f"{self.best:.3g} (a lower learning_rate may help)"
        )

    def _act(self, step: int, found: list[str]) -> str | None:
        if not found:
            return None
        action = None if self.action == "warn" else self.action
        self.counts["steps_skipped"] += action is not None
        if sum(self.counts.values()) <= _MOST_MESSAGES or action == "stop":
            done = {None: "it is applied", "skip": "it is dropped", "stop": "it is dropped, training ends"}
            logger.warning(
                "Step %d: %s; spike_action=%r: %s.", step, "; ".join(found), self.action, done[action]
            )
        return action

    def logs(self) -> dict[str, float]:
        """What happened so far, for the log; nothing where nothing did."""
        return {name: float(count) for name, count in self.counts.items() if count}

    def save(self, folder: Path) -> None:
        """Record windows and counts in a checkpoint."""
        state = {"norms": list(self.norms), "kls": list(self.kls), "counts": self.counts}
        text = json.dumps({**state, "best": self.best, "growing": self.growing}, indent=1)
        write_text(folder / SPIKES_FILE, text + "\n")

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, if it has a record.

        Raises:
            ValueError: If it is damaged.
        """
        path = folder / SPIKES_FILE
        if not path.is_file():
            return
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            self.norms.extend(map(float, state["norms"]))
            self.kls.extend(map(float, state["kls"]))
            self.counts.update({name: int(state["counts"].get(name, 0)) for name in COUNTS})
            self.best = None if state["best"] is None else float(state["best"])
            self.growing = bool(state["growing"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): resume from another checkpoint") from error


def drop_step(optimizer: Any) -> None:
    """Take the gradient away: an optimizer leaves parameters without one, and their state, alone."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
