"""Value and gradient of `0.5 CE + 0.5 T^2 D` from hidden states: the fused loss, dense, Liger and TRL.

    python benchmarks/fused_loss.py --save fused_loss.json
    python benchmarks/fused_loss.py --tokens 512 --vocabulary 151936 --methods "floor;fused;dense"

Times are CPU time of the process (wall time says little on a shared machine), medians of interleaved
repeats, and as ratios to the floor: the four matrix products that no method can avoid, measured in the
same run. Memory is the peak of the whole process during a call, beyond what it held before (the inputs)
and the gradients. Liger and TRL are measured if they are installed (`pip install hf-kd[bench]`); TRL
has no cross-entropy, so it does less work.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kd.losses.fused import Head, HiddenTeacher, SparseTeacher, fused_distillation

RESULTS = Path(__file__).parent / "results"
TEMPERATURE = 2.0
MIB = 1 << 20


@dataclass
class Case:
    """Inputs of one size: hidden states, heads and labels."""

    tokens: int
    vocabulary: int
    widths: tuple[int, int]
    masked: float = 0.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        student, teacher = self.widths

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape).normal_(generator=g).mul_(scale).to(self.dtype)

        self.hidden = normal(self.tokens, student).requires_grad_()
        self.weight = normal(self.vocabulary, student, scale=2 * student**-0.5).requires_grad_()
        self.teacher_hidden = normal(self.tokens, teacher)
        self.teacher_weight = normal(self.vocabulary, teacher, scale=2 * teacher**-0.5)
        self.labels = torch.randint(0, self.vocabulary, (self.tokens,), generator=g)
        if self.masked:
            self.labels[torch.rand(self.tokens, generator=g) < self.masked] = -100

    def room(self, rows: int) -> Tensor:
        """A buffer for logits `[rows, V]`, kept: a product's time is not that of the system's page faults."""
        if not hasattr(self, "_room"):
            self._room = torch.zeros(rows, self.vocabulary)
        return self._room

    def gradients(self) -> int:
        """Bytes of the gradients that must exist."""
        wanted = (self.hidden, self.weight)
        return sum(x.numel() * x.element_size() for x in wanted if x.requires_grad)


def floor(case: Case, products: str = "zthw") -> None:
    """Products nobody avoids: student `z` and teacher `t` logits, gradients of hidden `h` and head `w`."""
    with torch.no_grad():
        rows = min(512, case.tokens)
        logits = case.room(rows)
        grad_weight = torch.empty_like(case.weight) if "w" in products else None
        for a in range(0, case.tokens, rows):
            hidden = case.hidden[a : a + rows]
            out = logits[: len(hidden)]
            if "t" in products:
                torch.mm(case.teacher_hidden[a : a + rows], case.teacher_weight.T, out=out)
            torch.mm(hidden, case.weight.T, out=out)
            torch.mm(out, case.weight)
            if grad_weight is not None:
                grad_weight.addmm_(out.T, hidden, beta=1 if a else 0)


def fused(case: Case, **options: object) -> None:
    """Ours."""
    teacher = options.pop("teacher", HiddenTeacher(case.teacher_hidden, Head(case.teacher_weight)))
    settings = {"temperature": TEMPERATURE, **options}
    out = fused_distillation(case.hidden, Head(case.weight), teacher=teacher, labels=case.labels, **settings)
    out.loss.backward()


def _wide(logits: Tensor) -> Tensor:
    """At least fp32."""
    return logits if logits.dtype is torch.float64 else logits.float()


def dense(case: Case, divergence: str = "forward_kl") -> None:
    """Logits and autograd, as a careful person writes it."""
    z = case.hidden @ case.weight.T
    with torch.no_grad():
        t = case.teacher_hidden @ case.teacher_weight.T
    z, t = _wide(z), _wide(t)
    loss = 0.5 * F.cross_entropy(z, case.labels)
    log_q, log_p = F.log_softmax(z / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1)
    if divergence == "forward_kl":
        terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        mix = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0))
        terms = 0.5 * F.kl_div(mix, log_p, reduction="none", log_target=True)
        terms = terms + 0.5 * F.kl_div(mix, log_q, reduction="none", log_target=True)
    keep = case.labels != -100
    (loss + 0.5 * TEMPERATURE**2 * terms.sum(-1)[keep].mean()).backward()


def liger(case: Case, beta: float = 0.0) -> None:
    """Liger's chunked distillation, at the chunk size that is fastest here."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(0.5, 0.5, beta, -100, TEMPERATURE, compiled=False, chunk_size=256)
    function(case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.labels).backward()


def trl(case: Case, beta: float = 0.0) -> None:
    """TRL's chunked divergence (torch, no cross-entropy)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    out, _ = ChunkedDivergenceFunction.apply(
        case.hidden, case.weight, None, case.teacher_hidden, case.teacher_weight, None, beta, TEMPERATURE
    )
    out.mean().mul(0.5 * TEMPERATURE**2).backward()


def _sparse(case: Case, k: int = 64) -> SparseTeacher:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, case.vocabulary - k, (case.tokens, 1), generator=g) + torch.arange(k)
    log_p = F.log_softmax(torch.randn(case.tokens, k + 1, generator=g), -1)
    return SparseTeacher(ids, log_p[:, :k], log_p[:, k])


def _drawn(case: Case, k: int = 64) -> SparseTeacher:
    signal = _sparse(case, k)
    return SparseTeacher(signal.ids, signal.log_probs, weights=signal.log_probs.exp())


METHODS: dict[str, Callable[[Case], None]] = {
    "floor": floor,
    "floor of cross-entropy": lambda case: floor(case, "zhw"),
    "floor, frozen head": lambda case: floor(case, "zth"),
    "fused": fused,
    "fused, 64 MiB": lambda case: fused(case, chunk_bytes=64 * MIB),
    "fused, 40 MiB": lambda case: fused(case, chunk_bytes=40 * MIB),
    "fused, T = 1": lambda case: fused(case, temperature=1.0),
    "fused, entropies": lambda case: fused(case, entropies=True),
    "fused, jsd": lambda case: fused(case, divergence="jsd"),
    "fused, reverse_kl": lambda case: fused(case, divergence="reverse_kl"),
    "fused, jeffreys": lambda case: fused(case, divergence="jeffreys"),
    "fused, skew_kl": lambda case: fused(case, divergence="skew_kl"),
    "fused, tvd": lambda case: fused(case, divergence="tvd"),
    "fused cross-entropy": lambda case: fused(case, alpha=0.0),
    "fused, sparse tail": lambda case: fused(case, teacher=_sparse(case)),
    "fused, sparse draws": lambda case: fused(case, teacher=_drawn(case)),
    "dense": dense,
    "dense, jsd": lambda case: dense(case, "jsd"),
    "liger": liger,
    "liger, jsd": lambda case: liger(case, 0.5),
    "trl": trl,
    "trl, jsd": lambda case: trl(case, 0.5),
}
DEFAULT = ("floor", "fused", "fused, 64 MiB", "dense", "liger", "trl")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}.")


def _give_back() -> None:
    """Freed memory returns to the system, so that a call's peak has all that it takes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure_once(case: Case, method: str) -> dict[str, float]:
    """CPU and wall seconds of one call, and its peak resident bytes beyond the inputs and the gradients."""
    case.hidden.grad = case.weight.grad = None
    gc.collect()
    if "floor" in method:
        case.room(min(512, case.tokens))
    _give_back()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    wall, cpu = time.perf_counter(), time.process_time()
    METHODS[method](case)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"seconds": cpu, "wall": wall, "bytes": _status("VmHWM") - before - case.gradients()}


def measure(case: Case, methods: list[str], repeats: int) -> dict[str, list[dict[str, float]]]:
    """What each call takes; the repeats of all methods are interleaved."""
    out: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for method in methods:  # libraries are loaded
        METHODS[method](Case(16, 4096, case.widths, dtype=case.dtype))
    for _ in range(repeats):
        for method in methods:
            out[method].append(measure_once(case, method))
            print(f"{method:28}{out[method][-1]['seconds']:12.3f} s", flush=True)
    return out


def gradient_errors(case: Case, methods: list[str]) -> dict[str, float]:
    """`|dh - dh64| / |dh64|` of each method's gradient of the hidden states; dh64 is dense in float64."""

    def gradient(method: str, case: Case) -> Tensor:
        case.hidden.grad = case.weight.grad = None
        METHODS[method](case)
        assert case.hidden.grad is not None
        return case.hidden.grad.double()

    exact = copy.copy(case)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        value = getattr(case, name)
        setattr(exact, name, value.detach().double().requires_grad_(value.requires_grad))
    wanted = gradient("dense", exact)
    return {
        method: float((gradient(method, case) - wanted).norm() / wanted.norm())
        for method in methods
        if "floor" not in method
    }


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def plot(path: Path) -> None:
    """Draw time and memory against the number of tokens, for the vocabulary with the most sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = {"masked": 0, "frozen": False, "threads": 1, "dtype": "float32"}
    runs = json.loads(path.read_text())["runs"]
    runs = [run for run in runs if all(run[name] == value for name, value in plain.items())]
    sizes = {(run["vocabulary"], run["widths"]): 0 for run in runs}
    for run in runs:
        sizes[run["vocabulary"], run["widths"]] += 1
    chosen = max(sizes, key=lambda size: sizes[size])
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for number, method in enumerate(DEFAULT):
        for axis, key, unit in ((axes[0], "seconds", 1), (axes[1], "extra_bytes", MIB)):
            points = sorted(
                (run["tokens"], row[key] / unit)
                for run in runs
                for row in run["rows"]
                if (run["vocabulary"], run["widths"]) == chosen
                and row["method"] == method
                and (row[key] or 0) > 0
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=method)
    axes[0].set_ylabel("CPU seconds, one thread")
    axes[1].set_ylabel("MiB beyond the gradients")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="tokens")
        tokens = sorted({run["tokens"] for run in runs if (run["vocabulary"], run["widths"]) == chosen})
        axis.set_xticks(tokens, [str(number) for number in tokens])
        axis.xaxis.set_minor_locator(pyplot.NullLocator())
        axis.legend(fontsize=7)
    figure.suptitle(f"value and gradient, V = {chosen[0]:,}, widths {chosen[1]}")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main() -> None:
    """Measure one size and print; `--save` adds it to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--widths", default="256,512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default=None, help="names separated by ';'")
    parser.add_argument("--masked", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--errors", action="store_true", help="errors of gradients against float64 instead")
    parser.add_argument("--frozen", action="store_true", help="the student's head gets no gradient")
    parser.add_argument("--save", default=None, help="file under benchmarks/results to append to")
    parser.add_argument("--plot", default=None, help="draw what a file under benchmarks/results holds")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(RESULTS / arguments.plot)
        return
    torch.set_num_threads(arguments.threads)
    student, teacher = map(int, arguments.widths.split(","))
    case = Case(
        arguments.tokens,
        arguments.vocabulary,
        (student, teacher),
        arguments.masked,
        getattr(torch, arguments.dtype),
    )
    case.weight.requires_grad_(not arguments.frozen)
    methods = list(DEFAULT) if arguments.methods is None else arguments.methods.split(";")
    if arguments.errors:
        for method, error in gradient_errors(case, methods).items():
            print(f"{method:28}{error:12.1e}", flush=True)
        return
    found = measure(case, methods, arguments.repeats)
    base = None
    rows = []
    for method, calls in found.items():
        row: dict[str, Any] = {"method": method, "calls": calls}
        for key, name in (("seconds", "seconds"), ("wall", "wall"), ("bytes", "extra_bytes")):
            row[name] = statistics.median(call[key] for call in calls) if calls else None
        if "floor" in method:
            row["extra_bytes"] = None
        base = row["seconds"] if method == methods[0] else base
        row["over_first"] = row["seconds"] / base if base and calls else None
        rows.append(row)
        shown = "".join(
            f"{value / unit:12.3f}" if value is not None else f"{'-':>12}"
            for value, unit in ((row["seconds"], 1), (row["over_first"], 1), (row["extra_bytes"], MIB))
        )
        print(f"{method:28}{shown}", flush=True)
    if arguments.save:
        path = RESULTS / arguments.save
        path.parent.mkdir(exist_ok=True)
        known = json.loads(path.read_text()) if path.exists() else {"schema_version": 2, "runs": []}
        size = {name: getattr(arguments, name) for name in ("tokens", "vocabulary", "widths", "threads")}
        size |= {name: getattr(arguments, name) for name in ("masked", "dtype", "frozen", "repeats")}
        known["runs"].append({**size, "machine": machine(), "rows": rows})
        path.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
