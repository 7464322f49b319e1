"""What a distillation run proved, as data: `results.json`.

One `Results` holds the arms (teacher, student, control, any further student), each with its quality and
its cost. What follows from them (quality kept, gap closed, the verdict) is computed: the file carries it for
other tools, under `summary`, and reading ignores it. No torch in here, so that reporting is instant.

Schema. `schema_version` goes up whenever a field is added or changes its meaning; files of older versions
are read, files of newer ones refused. Numbers that are not finite are the strings "NaN", "Infinity" and
"-Infinity", since JSON has no such numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_kd.behaviour import Behaviour, PositionKL
from hf_kd.paired import PairedDifference
from hf_kd.schema import build, to_json
from hf_kd.slices import Slice
from hf_kd.verdict import number, verdict

SCHEMA_VERSION = 5

# No count of anything is above; integers of any size are not numbers that one can divide.
_LARGEST = 1 << 63

# Metrics that are a mean of zeros and ones over examples: their standard error follows from their value.
PROPORTIONS = {"accuracy", "exact_match", "agreement"}

# What the log counts of steps that went wrong, and how a report says it.
SPIKES = {
    "spikes_grad_norm": "spikes of the gradient's norm",
    "spikes_kl": "spikes of the distillation term",
    "kl_growth": "times that the distillation term grew",
    "steps_skipped": "steps dropped",
}


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one forward pass on one batch, in milliseconds.

    Attributes:
        median_ms: the median over `repeats`.
        iqr_ms: its spread, the 75th minus the 25th percentile.
        p95_ms: the 95th percentile.
        repeats: timed passes, after the warm-up.
        batch_size: rows in the batch.
        inputs: shape of each tensor in the batch, by name.
        padding: share of the batch's positions that are padding, in [0, 1].
        device: where the model ran, by the name of the hardware.
        dtype: of the weights.
        threads: torch's intra-op threads.
    """

    median_ms: float
    iqr_ms: float
    p95_ms: float
    repeats: int
    batch_size: int
    inputs: dict[str, list[int]]
    padding: float
    device: str
    dtype: str
    threads: int

    @property
    def examples_per_second(self) -> float:
        """Throughput at this batch size, from the median."""
        return 1000.0 * self.batch_size / self.median_ms if self.median_ms else math.inf

    @property
    def length(self) -> int | None:
        """Tokens in a row of the batch; None where rows are not text."""
        shape = self.inputs.get("input_ids", [])
        return shape[-1] if len(shape) > 1 else None


@dataclass(frozen=True)
class Arm:
    """One model of the comparison: its quality on the evaluation data and its cost.

    Attributes:
        metrics: task metrics by name, without an `eval_` prefix.
        parameters: number of parameters, tied ones once; None if not known (a teacher elsewhere).
        bytes: of parameters and buffers in memory, tied ones once; None likewise.
        eval_kl: mean KL(teacher || model) at T = 1 over supervised positions, in nats; None if not measured.
        eval_agreement: share of positions with the teacher's top-1 class, in [0, 1]; None if not measured.
        bytes_on_disk: of the saved weights; None if not saved.
        latency: one entry per input shape; tables show the first.
        peak_memory: most bytes at one time during a forward pass on the batch of the first latency: weights,
            buffers and what is computed on the way; None if not measured.
        errors: standard errors by metric, where they don't follow from its value.
        right: where the primary metric is a share of rows, which it is right on: "1", "0", or "-" for a row
            without a label, in the order of the rows.
        samples: for other primary metrics, its values on bootstrap samples of the rows; the same draws for
            the same number of rows.
    """

    metrics: dict[str, float]
    parameters: int | None
    bytes: int | None
    eval_kl: float | None = None
    eval_agreement: float | None = None
    bytes_on_disk: int | None = None
    latency: list[Latency] = field(default_factory=list)
    peak_memory: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    right: str | None = None
    samples: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """A ratio of two scores or, where it is not defined, the reason."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Results:
    """Everything `results.json` holds.

    Attributes:
        task: name of the task, e.g. "image-classification".
        primary_metric: what quality is judged by, a key of each arm's `metrics`; None without labels.
        greater_is_better: False for metrics such as loss and perplexity.
        arms: by name. "student" is required; "teacher" is there where its answers can be scored (the entries
            that a server gives can't); "control" is the same student trained without the teacher; other names
            are further students.
        examples: rows of the evaluation data, for standard errors; None if not known.
        machine: what the measurements ran on, see `hf_kd.measure.machine`.
        provenance: what was run (dataset, seed, recipe, versions), of the caller's choice.
        training: what the student's training logged, in order: numbers by name, with their `step`.
        behaviour: how student and teacher answer the same rows; None for heads without one class a row.
        positions: KL to the teacher along the sequence, for heads with one position a token.
        slices: quality of every arm on parts of the evaluation rows.
        differences: the student and every further student against the control, and the student against the
            teacher, in the primary metric on the same rows, where these were kept.

    Raises:
        ValueError: an arm or the primary metric is missing, or a value is impossible; all problems at once.
    """

    task: str
    primary_metric: str | None
    greater_is_better: bool
    arms: dict[str, Arm]
    examples: int | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    training: list[dict[str, float]] = field(default_factory=list)
    behaviour: Behaviour | None = None
    positions: list[PositionKL] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    differences: list[PairedDifference] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Refuse what no report could show."""
        problems = [] if "student" in self.arms else ["arms has no 'student'"]
        if self.examples is not None and not 1 <= self.examples < _LARGEST:
            problems.append(f"examples is {self.examples}: give the number of evaluation rows, or None")
        for name, arm in self.arms.items():
            problems += [f"arms.{name}.{text}" for text in _arm_problems(arm, self.primary_metric)]
        if problems:
            raise ValueError("; ".join(problems))

    def score(self, name: str) -> float | None:
        """Value of the primary metric of the arm called `name`; None where either does not exist."""
        if self.primary_metric is None or name not in self.arms:
            return None
        return self.arms[name].metrics[self.primary_metric]

    @property
    def quality_kept(self) -> Ratio:
        """Student / teacher in the primary metric; teacher / student where lower is better."""
        scores, reason = self.scores("teacher", "student")
        if reason:
            return Ratio(None, reason)
        teacher, student = scores
        above, below = (student, teacher) if self.greater_is_better else (teacher, student)
        if above < 0 or below <= 0:
            return Ratio(None, f"the ratio of {number(above)} to {number(below)} says nothing")
        return Ratio(above / below)

    @property
    def gap_closed(self) -> Ratio:
        """(student - control) / (teacher - control) in the primary metric.

        What the teacher added, where `quality_kept` mostly shows what any student reaches. Not defined where
        the control is as good as the teacher, for then there is no gap.
        """
        scores, reason = self.scores("teacher", "student", "control")
        if reason:
            return Ratio(None, reason)
        teacher, student, control = scores
        gap = self.lead(teacher, control)
        if abs(gap) <= 1e-9 * max(abs(teacher), abs(control)):
            return Ratio(None, f"teacher and control score the same ({number(teacher)}), there is no gap")
        if gap < 0:
            better = f"the control ({number(control)}) is better than the teacher ({number(teacher)})"
            return Ratio(None, better)
        return Ratio(self.lead(student, control) / gap)

    @property
    def spikes(self) -> dict[str, int]:
        """How often a step went wrong, by what is counted (`hf_kd.spikes`); only what happened."""
        last: dict[str, int] = {}
        for row in self.training:
            last |= {name: int(row[name]) for name in SPIKES if math.isfinite(row.get(name, math.nan))}
        return last

    @property
    def scale(self) -> float | None:
        """Best possible primary metric where it is a proportion: 1, or 100 if in percent; None for others."""
        if self.primary_metric not in PROPORTIONS:
            return None
        return 100.0 if any(arm.metrics[self.primary_metric] > 1 for arm in self.arms.values()) else 1.0

    def standard_error(self, name: str, metric: str | None = None) -> float | None:
        """Standard error of an arm's metric: the one that was measured, or that of a share of rows.

        The latter is sqrt(p (1 - p) / examples), for the primary metric if it is a proportion and `examples`
        is known; else None.
        """
        metric = metric or self.primary_metric
        if name in self.arms and metric in self.arms[name].errors:
            return self.arms[name].errors[metric]
        value, scale = self.score(name), self.scale
        if value is None or scale is None or self.examples is None or metric != self.primary_metric:
            return None
        share = value / scale
        return scale * math.sqrt(share * (1 - share) / self.examples) if 0 <= share <= 1 else None

    def difference(self, one: str, other: str) -> PairedDifference | None:
        """How two arms differ in the primary metric on the same rows; None where that is not known."""
        for found in self.differences:
            if (found.one, found.other, found.metric) == (one, other, self.primary_metric):
                return found
        return None

    def standard_error_of_difference(self, one: str, other: str) -> float | None:
        """Standard error of the difference of two arms' scores, as if they had seen different examples.

        They saw the same ones, so the true error is smaller where both fail on the same rows: this one is on
        the side of caution.
        """
        first, second = self.standard_error(one), self.standard_error(other)
        return None if first is None or second is None else math.hypot(first, second)

    @property
    def verdict(self) -> str:
        """Two plain sentences: what the student keeps at what cost, and whether the teacher helped."""
        return verdict(self)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the results as JSON; readers of `path` see the old file or the new one, never a torn one."""
        path = Path(path)
        content = dataclasses.asdict(self)
        content["summary"] = {
            "quality_kept": dataclasses.asdict(self.quality_kept),
            "gap_closed": dataclasses.asdict(self.gap_closed),
            "verdict": self.verdict,
        }
        text = json.dumps(to_json(content), indent=2, allow_nan=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        # A directory and not a bare temporary file: the file inside gets ordinary permissions.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        return path

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Results:
        """Read and validate a file that `write` made.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, comes from a newer version, or has fields that are missing, unknown or
                of another type; all of these at once.
        """
        path = Path(path)
        if not path.is_file():
            runs = [str(file.parent) for file in sorted(path.parent.glob(f"*/{path.name}"))]
            give = f"there are some in {', '.join(runs[:8])}" if runs else "give the folder of a finished run"
            raise FileNotFoundError(f"no results at {path}: {give}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON, or is cut short ({error}): make it again") from error
        version = content.get("schema_version") if isinstance(content, dict) else None
        if type(version) is not int:
            raise ValueError(f"{path} has no schema_version: it is not the results.json of a run")
        if not 1 <= version <= SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema_version {version}, but this hf_kd reads 1 to {SCHEMA_VERSION}: upgrade it"
            )
        content.pop("summary", None)
        problems: list[str] = []
        results = build(cls, content, "", problems)
        if not isinstance(results, cls) or problems:
            raise ValueError(f"{path}: " + "; ".join(problems))
        return results

    def lead(self, one: float, other: float) -> float:
        """How much better a score is than another one."""
        return one - other if self.greater_is_better else other - one

    def scores(self, *names: str) -> tuple[list[float], str | None]:
        """The scores of the arms called `names`, or why they cannot be compared."""
        missing = [name for name in names if name not in self.arms]
        if missing:
            trained = missing[0] != "teacher"
            return [], f"no {missing[0]} was trained" if trained else "the teacher's own score is not known"
        scores = [score for name in names if (score := self.score(name)) is not None]
        if len(scores) < len(names):
            return [], "there is no metric to judge by (no labels)"
        bad = [
            f"{name} {score}" for name, score in zip(names, scores, strict=True) if not math.isfinite(score)
        ]
        return scores, f"{self.primary_metric} is not finite ({', '.join(bad)})" if bad else None


def _arm_problems(arm: Arm, primary_metric: str | None) -> list[str]:
    problems = []
    if primary_metric is not None and primary_metric not in arm.metrics:
        problems.append(f"metrics has no primary metric {primary_metric!r}, only {sorted(arm.metrics)}")
    for name in ("parameters", "bytes", "bytes_on_disk", "peak_memory"):
        value = getattr(arm, name) or 0
        if value < 0:
            problems.append(f"{name} is {value}, below 0")
        elif value >= _LARGEST:
            problems.append(f"{name} is too large")
    if set(arm.right or "") - set("01-"):
        problems.append("right has other characters than 0, 1 and -")
    agreement = arm.eval_agreement
    if agreement is not None and (agreement < 0 or agreement > 1):
        problems.append(f"eval_agreement is {agreement}, outside [0, 1]")
    return problems
