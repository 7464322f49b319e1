"""What distillation costs on many devices: seconds of a step, bytes a token, device hours of a run.

A step of `n` tokens a device, on `R` devices of `F` operations a second each:

    student     6 P_s n / F                        forward and backward of P_s weights, 2 operations each
    teacher     2 P_t n / F                        forward only; on G devices of its own: 2 P_t n R / (G F)
    gradient    2 (R - 1) / R * 4 P_s / L          a ring's all-reduce in float32, at L bytes a second
    cache       n c / D                            c bytes a token, read and decoded at D bytes a second
    group       n c / L                            the same bytes from a teacher group

A teacher at hand adds its time. One that is elsewhere and asked ahead hides behind the student, or the
student behind it. Where hidden states come, the teacher's output layer is multiplied beside the student's.
Attention over long rows, the optimizer and whatever else a framework does are not in it: `F` is what a device
reaches on matrix products of these models, measured or assumed. `P` are the weights that multiply each token,
output layer included and input embedding not.
"""

from __future__ import annotations

from dataclasses import dataclass

from .teachers.cache.codec import SparseCodec

TEACHERS = ("none", "local", "cache", "group")
_FLOAT = 4


@dataclass(frozen=True)
class Machine:
    """Devices, all alike.

    Attributes:
        flops: Operations a second that one reaches.
        link: Bytes a second to another one.
        disk: Bytes a second of a cache that one reads.
    """

    flops: float
    link: float
    disk: float


@dataclass(frozen=True)
class Run:
    """A student, its teacher, and how they are placed.

    Attributes:
        student: Weights that multiply each token (P_s).
        teacher: The same of the teacher (P_t).
        tokens: A device and a step (n).
        devices: That train the student (R).
        where: "none", "local", "cache" or "group".
        signal: Bytes a token of a cache or a group (c); see `bytes_per_token`.
        head: Of the teacher's weights, those of its output layer, where hidden states come (else 0).
        teachers: Devices of the group (G).
        ahead: Whether a group is asked for the next batch while the student works.

    Raises:
        ValueError: If `where` is not known, or a number is below what it can be.
    """

    student: float
    teacher: float
    tokens: int
    devices: int = 1
    where: str = "local"
    signal: float = 0.0
    head: float = 0.0
    teachers: int = 1
    ahead: bool = True

    def __post_init__(self) -> None:
        """Refuse what has no cost."""
        if self.where not in TEACHERS:
            raise ValueError(f"where={self.where!r} is not known: use one of {', '.join(TEACHERS)}")
        for name in ("student", "tokens", "devices", "teachers"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0")


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, by stage; `bound` names what lasts longest.

    Attributes:
        student: Forward and backward, and the teacher's output layer where hidden states come.
        gradient: Its exchange.
        teacher: The forward, wherever it is made.
        signal: Reading or moving what the teacher says.
        total: Of the step, with what overlaps.
    """

    student: float
    gradient: float
    teacher: float
    signal: float
    total: float

    @property
    def bound(self) -> str:
        """The stage that lasts longest."""
        stages = ("student", "gradient", "teacher", "signal")
        return max(stages, key=lambda name: getattr(self, name))


def step(run: Run, machine: Machine) -> Cost:
    """What one optimizer step takes (one micro-batch; nothing overlaps but a teacher asked ahead)."""
    student = 6 * run.student * run.tokens / machine.flops
    gradient = gradient_bytes(run.student, run.devices) / machine.link
    teacher = signal = 0.0
    if run.where in ("cache", "group"):
        student += 2 * run.head * run.tokens / machine.flops
    if run.where == "local":
        teacher = 2 * run.teacher * run.tokens / machine.flops
    if run.where == "cache":
        signal = run.tokens * run.signal / machine.disk
    if run.where == "group":
        body = run.teacher - run.head
        teacher = 2 * body * run.tokens * run.devices / run.teachers / machine.flops
        signal = run.tokens * run.signal / machine.link
    own, theirs = student + gradient, teacher + signal
    total = max(own, theirs) if run.where == "group" and run.ahead else own + theirs
    return Cost(student, gradient, teacher, signal, total)


def hours(run: Run, machine: Machine, tokens: float) -> float:
    """Hours of a whole run over some tokens."""
    return tokens / (run.tokens * run.devices) * step(run, machine).total / 3600


def gradient_bytes(parameters: float, devices: int) -> float:
    """Bytes that each device sends in a step: a ring's all-reduce of a float32 gradient."""
    return 2 * (devices - 1) / devices * _FLOAT * parameters


def teacher_bytes(way: str, run: Run, *, width: int, devices: int = 1, number: int = 2) -> float:
    """Bytes a token that a device receives for the forward of a teacher that is not whole on it.

    Args:
        way: "device_map" (layers on several devices of a process: what passes from one to the next),
            "sharded" (FSDP 2: the other devices' pieces of all weights, a forward), "offload" (all weights,
            from the host's memory, each forward), or "group" (its signal, `run.signal`).
        run: Of which `teacher`, `tokens` and `signal` are read.
        width: Of the teacher's hidden states.
        devices: That hold it.
        number: Bytes of one of its numbers.

    Raises:
        ValueError: If the way is not known.
    """
    weights = number * run.teacher / run.tokens
    found = {
        "device_map": number * width * (devices - 1),
        "sharded": weights * (devices - 1) / devices,
        "offload": weights,
        "group": run.signal,
    }
    if way not in found:
        raise ValueError(f"way={way!r} is not known: use one of {', '.join(found)}")
    return float(found[way])


def bytes_per_token(
    fidelity: str, *, vocabulary: int, width: int, number: int = 2, entries: int = 28, bits: int = 16
) -> float:
    """Bytes of a token's signal in a cache or on the way from a group, without keys and headers.

    Args:
        fidelity: "logits", "hidden" or "sparse".
        vocabulary: Its classes.
        width: Of the teacher's last hidden state.
        number: Bytes of a stored number.
        entries: Of a sparse signal.
        bits: Of each entry's log-probability.

    Raises:
        ValueError: If the fidelity is not known.
    """
    sizes = {"logits": number * vocabulary, "hidden": number * width}
    if fidelity == "sparse":
        return float(SparseCodec(vocabulary, entries, bits=bits).stride)
    if fidelity not in sizes:
        raise ValueError(f"fidelity={fidelity!r} is not known: use logits, hidden or sparse")
    return float(sizes[fidelity])
