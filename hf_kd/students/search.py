"""Depth and width of a student that meets a target: its parameters, bytes, or latency.

Shapes are tried on the meta device, where a model takes no memory; for a latency some of them are built with
random weights and timed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from . import width
from .depth import Ranking, Stack
from .inputs import one_row
from .sizes import Size, resolve_size
from .space import Candidate, Space, Timer

logger = logging.getLogger("hf_kd.students")


@dataclass(frozen=True)
class Target:
    """The most that a student may have; at least one is set.

    Attributes:
        parameters: Each counted once; a share between 0 and 1 is of the teacher's.
        bytes: Of its weights in the teacher's dtype, as saved; a share likewise.
        latency_ms: Median milliseconds of a forward pass of one row on the teacher's device.
    """

    parameters: Size | None = None
    bytes: Size | None = None
    latency_ms: float | None = None

    def resolve(self, parameters: int, bytes: int) -> Target:
        """The same in numbers, for a teacher of this size.

        Raises:
            ValueError: If a target is neither a positive number nor a share.
        """
        if self.latency_ms is not None and not 0 < self.latency_ms < math.inf:
            raise ValueError(f"max_latency_ms={self.latency_ms} is not above 0 and finite: give milliseconds")
        return Target(
            _whole("max_parameters", self.parameters, parameters),
            _whole("max_bytes", self.bytes, bytes),
            self.latency_ms,
        )

    def describe(self) -> str:
        """The targets, as options."""
        values = {
            "max_parameters": self.parameters,
            "max_bytes": self.bytes,
            "max_latency_ms": self.latency_ms,
        }
        return ", ".join(f"{name}={value:,}" for name, value in values.items() if value is not None)


def _whole(option: str, value: Size | None, full: int) -> Size | None:
    if isinstance(value, float) and value >= 1 and value == int(value):
        value = int(value)  # 2e7 is a number as people write it
    return None if value is None else resolve_size(option, value, full)


@dataclass(frozen=True)
class Search:
    """What was tried for a target, and what was chosen.

    Attributes:
        target: In numbers.
        candidates: For each width the deepest student that fits, or the smallest one where none does.
        chosen: The best of them.
        timing: On what latencies were measured; empty where none was.
        uncut: Sizes that this architecture can't change, and why.
    """

    target: Target
    candidates: Sequence[Candidate]
    chosen: Candidate
    timing: str = ""
    uncut: Sequence[str] = ()

    @property
    def why(self) -> str:
        """The rule by which it was chosen, with its numbers."""
        best = self.chosen
        return (
            f"of {sum(c.fits for c in self.candidates)} shapes that meet {self.target.describe()}, the one "
            f"whose most reduced dimension is least reduced ({best.depth_share:.0%} of the layers, "
            f"{best.width_share:.0%} of the widths), then the one with most parameters"
        )

    def log(self) -> None:
        """Say what was tried, and why this one."""
        for line in self.uncut:
            logger.info("search: %s", line)
        for candidate in self.candidates:
            logger.info("search: %s%s", candidate.describe(), "" if candidate.fits else " (too much)")
        if self.timing:
            logger.info("search: latency of %s", self.timing)
        logger.info("search: chosen %s; %s", self.chosen.describe(), self.why)


def search(
    teacher: PreTrainedModel,
    stacks: Sequence[Stack],
    target: Target,
    *,
    num_layers: Size | Mapping[str, Size] | None = None,
    layers: str | Sequence[int] | Mapping[str, Sequence[int]] = "even",
    rankings: Mapping[str, Ranking],
    widths: width.Sizes,
    vocab: Sequence[int] | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
) -> Search:
    """Find depth and width under a target.

    For each width the deepest student that fits is a candidate. Chosen is the one whose most reduced
    dimension, layers or widths, is least reduced. What is given (a number of layers, the layers, a size) is
    not searched.

    Args:
        teacher: The model to cut.
        stacks: Its stacks of layers.
        target: What to meet.
        num_layers: As in `init_student`; None: searched.
        layers: As in `init_student`.
        rankings: The ways to choose layers.
        widths: Sizes by kind, as in `init_student`; None: searched.
        vocab: Tokens that are kept.
        batches: Calibration data, of which one row is what latency is measured on.

    Raises:
        ValueError: If nothing fits; names the smallest that can be made.
    """
    space = Space(teacher, stacks, num_layers, layers, rankings, widths, vocab)
    space.measure(space.depths[-1], 1.0)  # refuses what was given and does not fit
    target = target.resolve(*space.of_teacher())
    timer = None if target.latency_ms is None else Timer(space, one_row(teacher, batches))
    candidates: list[Candidate] = []
    for share in space.shares(timed=timer is not None):
        best = max((c.least_share for c in candidates if c.fits), default=0.0)
        if timer is not None and share < best:
            break  # narrower ones can't be better, and each costs time
        found = _deepest(space, share, target, timer)
        if found is not None and not any(
            (c.layers, c.widths) == (found.layers, found.widths) for c in candidates
        ):
            candidates.append(found)
    fitting = [c for c in candidates if c.fits]
    if not fitting:
        least = min(candidates, key=lambda c: (c.latency_ms or 0.0, c.parameters))
        raise ValueError(
            f"no student of this teacher meets {target.describe()}: the smallest that the search can make is "
            f"{least.describe()}. Set a higher target, trim the vocabulary (vocab), leave out sizes that are "
            "given, or make a student with random weights from student_config"
        )
    chosen = max(fitting, key=lambda c: (c.least_share, c.parameters))
    return Search(target, candidates, chosen, "" if timer is None else timer.described, space.uncut)


def _deepest(space: Space, share: float, target: Target, timer: Timer | None) -> Candidate | None:
    """The deepest student of a width that fits; the shallowest, marked, where none does."""
    sized = [c for c in (space.measure(d, share) for d in space.depths) if c is not None]
    if not sized:
        return None
    fitting = [c for c in sized if _fits(c, target)]
    if not fitting or timer is None:
        return fitting[-1] if fitting else _marked(sized[0])
    limit = target.latency_ms or math.inf
    top = timer(fitting[-1])
    if _ms(top) <= limit:
        return top
    low = timer(fitting[0])
    if _ms(low) > limit:
        return _marked(low)
    # Latency grows by about the same with each layer: start where the line meets the target.
    slope = (_ms(top) - _ms(low)) / max(1, len(fitting) - 1)
    place = int((limit - _ms(low)) / max(slope, 1e-9))
    for i in range(min(place, len(fitting) - 2), 0, -1):
        timed = timer(fitting[i])
        if _ms(timed) <= limit:
            return timed
    return low


def _ms(candidate: Candidate) -> float:
    assert candidate.latency_ms is not None
    return candidate.latency_ms


def _fits(candidate: Candidate, target: Target) -> bool:
    return (target.parameters is None or candidate.parameters <= target.parameters) and (
        target.bytes is None or candidate.bytes <= target.bytes
    )


def _marked(candidate: Candidate) -> Candidate:
    return replace(candidate, fits=False)
