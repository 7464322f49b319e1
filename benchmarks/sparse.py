"""What a few stored entries per token say of the full gradient, at V = 151,936.

    python benchmarks/sparse.py     # tables, and benchmarks/results/sparse.json

Made teachers, whose logits are a head of hidden states plus the log frequencies of Zipf's law: one of 2.1
nats of entropy, one of 5. Two students on the same inputs: one from scratch, one whose body and head are the
teacher's plus noise. The gradient is that of the head's matrix and of the body, averaged over the tokens.

Entries are drawn as a cache's are, and go through its codec. The control of the draws is the one that the
library measures, "as estimated" the angle that it says, for 2,048 tokens, without the full teacher. The last
table is the student near the broad teacher, by bytes.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_kd import SparseSignal
from hf_kd.estimator import angles, products, random_signs
from hf_kd.losses.fused import fused_distillation
from hf_kd.losses.projected import head_logits
from hf_kd.losses.tiles import Head, HiddenTeacher
from hf_kd.measure import machine
from hf_kd.teachers.cache.codec import SparseCodec
from hf_kd.teachers.cache.sampling import threshold_sample

RESULTS = Path(__file__).parent / "results" / "sparse.json"
VOCABULARY = 151_936
console = Console(width=150)


def topk_signal(log_p: Tensor, entries: int) -> SparseSignal:
    """The likeliest entries, and the tail's mass."""
    top = log_p.topk(entries, -1)
    rest = log_p.exp().scatter(-1, top.indices, 0.0).sum(-1)
    return SparseSignal(top.indices, top.values, rest.log())


# ---- the gradient ----


class Made:
    """A teacher and a student over the same inputs, at a large vocabulary."""

    def __init__(self, near: bool, tokens: int, width: int, scale: float) -> None:
        g = torch.Generator().manual_seed(0)
        self.near = near
        self.inputs = torch.randn(tokens, width, generator=g)
        spread = scale * (0.8 + 1.2 * torch.rand(tokens, 1, generator=g))
        matrix = torch.randn(VOCABULARY, width, generator=g) / width**0.5
        frequency = -(torch.arange(1.0, VOCABULARY + 1) + 2.7).log()
        frequency = frequency[torch.randperm(VOCABULARY, generator=g)]
        self.inputs = self.inputs * spread
        self.teacher = HiddenTeacher(self.inputs, Head(matrix, frequency))
        if near:
            self.body = torch.eye(width) + 0.1 / width**0.5 * torch.randn(width, width, generator=g)
            self.matrix = matrix + 0.15 / width**0.5 * torch.randn(VOCABULARY, width, generator=g)
            self.bias = frequency
        else:
            self.body = torch.randn(width, width, generator=g) / width**0.5
            self.matrix = 0.02 * torch.randn(VOCABULARY, width, generator=g)
            self.bias = torch.zeros(VOCABULARY)
        self.body.requires_grad_()
        self.matrix.requires_grad_()

    def gradient(self, teacher: Any, divergence: str = "forward_kl") -> tuple[float, Tensor]:
        """Mean divergence, and the gradient of body and head."""
        hidden = self.inputs @ self.body
        head = Head(self.matrix, self.bias)
        out = fused_distillation(
            hidden, head, teacher=teacher, alpha=1.0, temperature=1.0, divergence=divergence,
            kd_weights=torch.ones(len(hidden)),
        )  # fmt: skip
        return float(out.kd_sum / out.kd_count), self._flat(out.loss)

    def hard(self, labels: Tensor) -> Tensor:
        """The gradient of cross-entropy alone."""
        head = Head(self.matrix, self.bias)
        return self._flat(fused_distillation(self.inputs @ self.body, head, labels=labels, alpha=0.0).loss)

    def renormalised(self, top: SparseSignal) -> Tensor:
        """The gradient with both sides renormalised on the entries, in the obvious way."""
        total = torch.zeros(())
        for rows in torch.arange(len(self.inputs)).split(64):
            hidden, ids = self.inputs[rows] @ self.body, top.ids[rows]
            z = torch.einsum("nkh,nh->nk", self.matrix[ids], hidden) + self.bias[ids]
            p = top.log_probs[rows].softmax(-1)
            total = total - (p * z.log_softmax(-1)).sum() / len(self.inputs)
        return self._flat(total)

    def _flat(self, loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (self.body, self.matrix))])


def degrees(a: Tensor, b: Tensor) -> float:
    """The angle between two gradients."""
    cosine = float((a * b).sum(dtype=torch.float64) / (a.double().norm() * b.double().norm()))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def log_probs_of(teacher: HiddenTeacher) -> Tensor:
    """`[N, V]` of some rows."""
    return head_logits(teacher).log_softmax(-1)


class Stored(NamedTuple):
    """What is kept of a teacher."""

    top: SparseSignal
    drawn: SparseSignal
    labels: Tensor
    entropy: float
    codec: SparseCodec

    @classmethod
    def of(cls, made: Made, entries: int, bits: int) -> Stored:
        """Ask it about all tokens."""
        tops, draws, labels, entropy = [], [], [], 0.0
        g = torch.Generator().manual_seed(1)
        codec = SparseCodec(VOCABULARY, entries, bits=bits)
        for index in torch.arange(len(made.inputs)).split(128):
            log_p = log_probs_of(HiddenTeacher(made.inputs[index], made.teacher.head))
            entropy -= float((log_p.exp() * log_p).sum()) / len(made.inputs)
            labels.append(torch.multinomial(log_p.exp(), 1, generator=g).squeeze(1))
            sample = threshold_sample(log_p, entries, least_certain=entries // 2, generator=g)
            tops.append(topk_signal(log_p, entries))
            draws.append(codec.decode(codec.encode(sample)))
        return cls(_joined(tops), _joined(draws), torch.cat(labels), entropy, codec)


def compare(made: Made, full: Tensor, kl: float, entries: int, bits: int, few: bool) -> list[dict[str, Any]]:
    """Angles of the ways to use the entries; `few`: of what a cache offers alone."""
    stored = Stored.of(made, entries, bits)
    found: dict[str, tuple[float | None, Tensor]] = {}
    if not few:
        found = {
            "labels alone (cross-entropy)": (None, made.hard(stored.labels)),
            "top-k, both renormalised": (None, made.renormalised(stored.top)),
            "top-k, tail bucket": made.gradient(stored.top.tail()),
        }
    tail, zero, one = (
        made.gradient(t) for t in (stored.drawn.tail(), stored.drawn.draws(), stored.drawn.draws(1.0))
    )
    # The control that the library would measure; the draws are linear in it.
    signs = [
        made.gradient(random_signs(stored.drawn, generator=torch.Generator().manual_seed(0), control=c))[1]
        for c in (0.0, 1.0)
    ]
    sums = products([tail[1]], ([zero[1]], [one[1]]), [([signs[0]], [signs[1]])])
    best = angles(sums, len(made.inputs))
    controlled = tuple((1 - best.control) * a + best.control * b for a, b in zip(zero, one, strict=True))
    found |= {
        "certain ones of the draws, tail bucket": tail,
        "draws": zero,
        "draws, controlled": controlled,
    }
    estimated = {
        "certain ones of the draws, tail bucket": best.angle_tail,
        "draws, controlled": best.angle_draws,
    }
    kept = float(-stored.top.log_tail.exp().mean() + 1)
    rows = []
    for name, (value, grad) in found.items():
        is_controlled = name == "draws, controlled"
        rows.append({
            "student": "near the teacher" if made.near else "from scratch",
            "teacher's entropy": stored.entropy, "entries": entries, "bits": bits,
            "bytes per token": stored.codec.stride, "read as": name,
            "angle (degrees)": degrees(grad, full),
            "as estimated": estimated.get(name), "control": best.control if is_controlled else None,
            "length": float(grad.norm() / full.norm()), "KL (nats)": kl,
            "KL error (nats)": None if value is None else value - kl,
            "teacher's mass in the top": kept, "tokens": len(made.inputs),
        })  # fmt: skip
    return rows


def _joined(parts: list[SparseSignal]) -> SparseSignal:
    def cat(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return SparseSignal(
        cat("ids"), cat("log_probs"), cat("log_tail"), certain=cat("certain"), log_tau=cat("log_tau")
    )


def show(rows: list[dict[str, Any]]) -> None:
    """As a table."""
    table = Table(*rows[0])
    for row in rows:
        cells = (row.get(name) for name in rows[0])
        table.add_row(*("-" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    console.print(table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All students and teachers, then the curve; as it goes into the file.

    Args:
        args: `entries`, `bits`, `angle_tokens`, `angle_width`, `scales` and `curve`.
    """
    rows, curve = [], []
    for scale in args.scales:
        for near in (False, True):
            made = Made(near, args.angle_tokens, args.angle_width, scale)
            kl, full = made.gradient(made.teacher)
            rows += compare(made, full, kl, args.entries, args.bits, few=False)
            if near and scale == args.scales[-1]:
                for point in args.curve:
                    entries, bits = map(int, point.split("x"))
                    curve += compare(made, full, kl, entries, bits, few=True)
    return {"machine": machine(), "rows": rows, "curve": curve}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `measure` reads, but for `entries`."""
    parser.add_argument("--bits", type=int, default=16, choices=(8, 16), help="of a log-probability")
    parser.add_argument("--angle_tokens", type=int, default=2048)
    parser.add_argument("--angle_width", type=int, default=32, help="of the made models")
    parser.add_argument("--scales", type=float, nargs="+", default=[5.0, 2.5], help="of teachers' logits")
    parser.add_argument(
        "--curve", nargs="*", default=["9x16", "37x8", "112x16"], help="entries x bits of the last table"
    )


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--entries", type=int, default=28)
    add_options(parser)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"command": "python benchmarks/sparse.py", **measure(args)}
    args.output.write_text(json.dumps(found, indent=2) + "\n")
    for rows in (found["rows"], found["curve"]):
        if rows:
            show(rows)


if __name__ == "__main__":
    main()
