"""Whether it was worth it, in two plain sentences; "helped" only where the rows can show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_kd.paired import Z_95

if TYPE_CHECKING:
    from hf_kd.results import Results


def verdict(results: Results) -> str:
    """What the student keeps at what cost, and whether the teacher helped."""
    return f"{_kept(results)} {_helped(results)}"


def _kept(results: Results) -> str:
    student = results.arms["student"]
    kept, (scores, _) = results.quality_kept, results.scores("teacher", "student")
    if kept.value is not None:
        quality = f"quality ({results.primary_metric} {number(scores[1])}, teacher {number(scores[0])})"
        return f"The student keeps {percent(kept.value)} of the teacher's {quality}{_cost(results)}."
    # Of a teacher that can't be scored, how far the student is from it is all there is to say.
    silent = results.primary_metric is None or "teacher" not in results.arms
    least = student.metrics.get("kl_tail")
    distance = least if student.eval_kl is None else student.eval_kl
    if not silent or distance is None or student.eval_agreement is None:
        return f"Quality kept is not known: {kept.reason}."
    far = f"{'at least ' if student.eval_kl is None else ''}{distance:.3g} nats (KL) away"
    agreed = f"{percent(student.eval_agreement)} of the positions, {far}"
    return f"The student agrees with the teacher on {agreed}{_cost(results)}."


def _cost(results: Results) -> str:
    """What the student costs beside its teacher, as far as that is known."""
    teacher, student = results.arms.get("teacher"), results.arms["student"]
    said = []
    if teacher and teacher.parameters and student.parameters is not None:
        said.append(f"{percent(student.parameters / teacher.parameters)} of its parameters")
    if teacher and teacher.latency and student.latency and teacher.latency[0].median_ms:
        ratio = student.latency[0].median_ms / teacher.latency[0].median_ms
        said.append(f"{percent(ratio)} of its latency")
    return f" at {' and '.join(said)}" if said else ""


def _helped(results: Results) -> str:
    scores, reason = results.scores("student", "control")
    if reason:
        return f"Whether the teacher helped is not known: {reason}."
    lead = results.lead(*scores)
    said = f"{results.primary_metric} {number(scores[0])} with it, {number(scores[1])} without"
    clear, how = _clear(results, lead)
    if lead == 0 and not clear:
        return f"The teacher made no difference that these rows can show ({said})."
    if clear is None:
        return f"Whether the teacher made a difference can't be told: {said}, and {how}."
    if not clear:
        return f"No difference between with and without the teacher that these rows can show ({said}; {how})."
    if lead > 0:
        return f"The teacher helped ({said}; {how})."
    return f"The teacher did not help, the same student trained without it is better ({said}; {how})."


def _clear(results: Results, lead: float) -> tuple[bool | None, str]:
    """Whether the rows can tell student and control apart, None where nobody knows; and the figures."""
    paired = results.difference("student", "control")
    if paired is not None:
        ends = f"{number(paired.low)} to {number(paired.high)}"
        return paired.is_clear, f"the difference is {number(paired.value)}, 95 % interval {ends}"
    error = results.standard_error_of_difference("student", "control")
    if not error:
        return None, "the error of that metric is not known"
    return abs(lead) > Z_95 * error, f"{abs(lead) / error:.1f} standard errors apart"


def percent(share: float) -> str:
    """A share as a person reads it."""
    return f"{100 * share:.1f} %"


def number(value: float) -> str:
    """A score with four digits."""
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"
