"""What a few stored entries per token say of the full gradient, at V = 151,936.

    python benchmarks/sparse.py     # a table and benchmarks/results/sparse.json

A made teacher, whose logits are a head of hidden states plus the log frequencies of Zipf's law, and two
students on the same inputs: one from scratch, one whose body and head are the teacher's plus noise. The
gradient is that of the head's matrix and of the body, averaged over the tokens.

Entries are drawn as a cache's are; bytes are those of its codec, with log-probabilities in 16 bits, whose
rounding (below 1e-7 nats) is not part of these figures.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_kd import SparseSignal
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


def gradient(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Angles of every way to use the entries."""
    rows = []
    for near in (False, True):
        made = Made(near, args.tokens, args.width, args.scale)
        kl, full = made.gradient(made.teacher)
        parts: list[tuple[SparseSignal, SparseSignal]] = []
        labels, entropy = [], 0.0
        g = torch.Generator().manual_seed(1)
        for index in torch.arange(args.tokens).split(128):
            log_p = log_probs_of(HiddenTeacher(made.inputs[index], made.teacher.head))
            entropy -= float((log_p.exp() * log_p).sum()) / args.tokens
            labels.append(torch.multinomial(log_p.exp(), 1, generator=g).squeeze(1))
            parts.append(
                (
                    topk_signal(log_p, args.entries),
                    threshold_sample(log_p, args.entries, least_certain=args.entries // 2, generator=g),
                )
            )
        top, drawn = (_joined([part[i] for part in parts]) for i in (0, 1))
        found: dict[str, tuple[float | None, Tensor]] = {
            "labels alone (cross-entropy)": (None, made.hard(torch.cat(labels))),
            "top-k, both renormalised": (None, made.renormalised(top)),
            "top-k, tail bucket": made.gradient(top.tail()),
            "certain ones of the draws, tail bucket": made.gradient(drawn.tail()),
            "draws": made.gradient(drawn.draws()),
        }
        kept = float(-top.log_tail.exp().mean() + 1)
        for name, (value, grad) in found.items():
            rows.append({
                "student": "near the teacher" if near else "from scratch", "entries": args.entries,
                "bytes per token": SparseCodec(VOCABULARY, args.entries).stride, "read as": name,
                "angle (degrees)": degrees(grad, full), "length": float(grad.norm() / full.norm()),
                "KL (nats)": kl, "KL error (nats)": None if value is None else value - kl,
                "teacher's entropy": entropy, "teacher's mass in the top": kept, "tokens": args.tokens,
            })  # fmt: skip
    return rows


def _joined(parts: list[SparseSignal]) -> SparseSignal:
    def cat(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return SparseSignal(
        cat("ids"), cat("log_probs"), cat("log_tail"), certain=cat("certain"), log_tau=cat("log_tau")
    )


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--entries", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--scale", type=float, default=5.0, help="of the teacher's logits; 2.5: a broad one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = gradient(args)
    table = Table(*rows[0])
    for row in rows:
        cells = (row.get(name) for name in rows[0])
        table.add_row(*("-" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    console.print(table)
    args.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
