"""The terms of the loss between micro-batch and log, kept on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .objective import Terms


@dataclass(frozen=True)
class Step:
    """A step whose loss is finite: the norm of its gradient, and its distillation term; None: not there."""

    norm: float | None
    kl: float | None


class TermLog:
    """Adds up each term without reading it, and reads once per optimizer step whether all are finite."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._window: list[tuple[Terms, Tensor | None]] = []
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def begin_step(self) -> None:
        """Forget the micro-batches of an unfinished step."""
        self._window.clear()

    def record(self, terms: Terms, rows: Tensor | None) -> None:
        """Add one micro-batch's share of the step, with the row numbers of its data, if they are known."""
        self._window.append((terms, rows))
        features = {f"loss_{name}": value for name, value in terms.features.items()}
        for name, value in {"loss_task": terms.task, "loss_kd": terms.kd, **features}.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def end_step(self, accelerator: Any, *, step: int, norm: Any = None) -> Step:
        """Close a step before its gradient is applied.

        Args:
            accelerator: For the sums over ranks; there is one, and one device synchronisation.
            step: Its number.
            norm: Of its gradient before clipping, as Trainer gives it: a number, a tensor, or one of FSDP's.

        Returns:
            What all ranks agree on.

        Raises:
            FloatingPointError: On every rank, if a term of any rank is not finite; names the step, the term
                and the rows of the data.
        """
        window, self._window = self._window, []
        self._steps += 1
        bad = ~torch.stack([terms.loss.detach().isfinite() for terms, _ in window]).all()
        kds = [terms.kd for terms, _ in window if terms.kd is not None]
        kd = torch.stack(kds).sum() if kds else torch.zeros_like(window[0][0].loss)
        facts = torch.stack([bad.to(kd.dtype), kd.detach()])
        if norm is not None:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
            facts = torch.cat([facts, norm.detach().to(facts).reshape(1)])
        if accelerator.num_processes > 1:
            facts = accelerator.reduce(facts, reduction="mean")
        bad_share, kl, *norms = facts.tolist()
        if not bad_share:
            return Step(norm=norms[0] if norms else None, kl=kl if kds else None)
        for terms, rows in window:
            parts = {"task": terms.task, "distillation": terms.kd, **terms.features, "total": terms.loss}
            for name, value in parts.items():
                if value is not None and not bool(value.isfinite()):
                    where = "unknown (the data has no row numbers)" if rows is None else rows.tolist()
                    raise FloatingPointError(
                        f"The {name} loss is {value.item()} at step {step}, rows {where}. No weight was "
                        "changed by this step and the last checkpoint is intact. Look at those rows; else "
                        "lower learning_rate, or raise temperature."
                    )
        raise FloatingPointError(
            f"Another rank's loss is not finite at step {step}; its message names the rows."
        )

    def means(self, accelerator: Any) -> dict[str, float]:
        """Each term's mean over the steps since the last call and over ranks; starts anew."""
        if not self._steps or not self._sums:
            return {}
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names]) / self._steps
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values, reduction="mean")
        self._sums, self._steps = {}, 0
        return dict(zip(names, values.tolist(), strict=True))
