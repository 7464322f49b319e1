"""What the quality benchmarks share: arms trained on the same budget, their scores, and a file of results.

The teacher's logits are computed once and looked up by row, so that all arms learn from the same answers and
none waits for them. An arm is a `Recipe`; a run is one arm, one student and one seed; every run is written to
the file of results as soon as it ends, and a run that is there is not made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_kd import DistillationArguments, DistillationTrainer, TeacherSignal
from hf_kd.losses import forward_kl, log_probs
from hf_kd.measure import machine

RESULTS = Path(__file__).resolve().parents[1] / "results"
ALPHA, TEMPERATURE = 0.5, 2.0  # what circulates


@dataclass(frozen=True)
class Recipe:
    """An arm: how a student is taught.

    Attributes:
        name: The arm.
        by: "hf_kd", "hand" (a minimal `compute_loss`) or "textbrewer".
        options: hf_kd's options.
    """

    name: str
    by: str = "hf_kd"
    options: Mapping[str, Any] = field(default_factory=dict)


CONTROL = Recipe("control", options={"alpha": 0.0})
BY_HAND = Recipe("by hand", by="hand")
DEFAULT = Recipe("default")  # alpha=0.9, temperature=1
SAME = Recipe("alpha=0.5, T=2", options={"alpha": ALPHA, "temperature": TEMPERATURE})  # as by hand
TEXTBREWER = Recipe("TextBrewer", by="textbrewer")

# What could be best, the same on every task; it is chosen on development rows.
CANDIDATES = [
    DEFAULT,
    Recipe("forward_kl, T=2", options={"alpha": 0.9, "temperature": 2.0}),
    Recipe("forward_kl, T=4", options={"alpha": 0.9, "temperature": 4.0}),
    Recipe("logit_mse", options={"alpha": 0.9, "divergence": "logit_mse", "temperature": 1.0}),
    Recipe("forward_kl, T=2, hidden", options={"alpha": 0.9, "temperature": 2.0, "hidden_weight": 1.0}),
]


class Answers:
    """A teacher whose logits are known: `[rows, classes]`, looked up by the batch's `row` column."""

    columns = ("row",)

    def __init__(self, logits: Tensor) -> None:
        """Keep the logits."""
        self.logits = logits

    @property
    def identity(self) -> dict[str, str]:
        """The shape and the sum of the logits."""
        return {"name": "answers", "fingerprint": f"{tuple(self.logits.shape)} {self.logits.sum():.6f}"}

    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """Look up."""
        return TeacherSignal(logits={"logits": self.logits[batch["row"].long()]})


class ByHand(Trainer):
    """What one writes without a library: the head's own loss, and a KL that is averaged over the batch."""

    answers: Tensor

    def flat(self, logits: Tensor) -> Tensor:
        """`[N, C]`."""
        return logits

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The mix of both."""
        target = self.flat(self.answers[inputs.pop("row").long()])
        outputs = model(**inputs)
        kl = F.kl_div(
            F.log_softmax(self.flat(outputs.logits) / TEMPERATURE, -1),
            F.softmax(target / TEMPERATURE, -1),
            reduction="batchmean",
        )
        return (1 - ALPHA) * outputs.loss + ALPHA * TEMPERATURE**2 * kl


@dataclass(frozen=True)
class Budget:
    """What all arms get: the same rows, steps, optimizer and schedule."""

    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 0
    by_length: bool = False

    def arguments(self, seed: int, **options: Any) -> dict[str, Any]:
        """As Trainer's arguments."""
        return {
            "output_dir": tempfile.mkdtemp(prefix="quality-"),
            "max_steps": self.max_steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "train_sampling_strategy": "group_by_length" if self.by_length else "random",
            "weight_decay": 0.01,
            "seed": seed,
            "remove_unused_columns": False,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        }


def train(
    recipe: Recipe,
    student: PreTrainedModel,
    rows: Any,
    answers: Tensor,
    *,
    budget: Budget,
    seed: int,
    collator: Callable[[list[Any]], dict[str, Tensor]],
    by_hand: type[ByHand] = ByHand,
    teacher: PreTrainedModel | None = None,
) -> None:
    """Train a student in place; losses on layers run the teacher, whose answers are the same."""
    if recipe.by == "textbrewer":
        _textbrewer(student, rows, answers, budget, seed, collator)
        return
    wiring = {"train_dataset": rows, "data_collator": collator}
    if recipe.by == "hand":
        trainer: Trainer = by_hand(student, TrainingArguments(**budget.arguments(seed)), **wiring)
        trainer.answers = answers  # type: ignore[attr-defined]
    else:
        args = DistillationArguments(**budget.arguments(seed, **recipe.options))
        looks_inside = any(name.endswith("_weight") for name in recipe.options)
        trainer = DistillationTrainer(
            student, args, teacher=teacher if looks_inside else Answers(answers), **wiring
        )
    trainer.train()


class _Silent(nn.Module):
    """A model that is given columns which it doesn't read."""

    def __init__(self, answer: Callable[..., Any], model: nn.Module | None = None) -> None:
        super().__init__()
        self.answer, self.model = answer, model

    def forward(self, **batch: Any) -> Any:
        return self.answer(batch)


def _textbrewer(
    student: PreTrainedModel, rows: Any, answers: Tensor, budget: Budget, seed: int, collator: Any
) -> None:
    """The same mix by TextBrewer's `GeneralDistiller`, with its own loss (which has no `T^2`)."""
    import textbrewer

    folder = tempfile.mkdtemp(prefix="quality-")
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    loader = torch.utils.data.DataLoader(
        rows,
        batch_size=budget.batch_size,
        shuffle=True,
        collate_fn=lambda part: dict(collator(part)),
        generator=generator,
    )

    def answer(batch: dict[str, Any]) -> Any:
        return student(**{k: v for k, v in batch.items() if k != "row"})

    distiller = textbrewer.GeneralDistiller(
        train_config=textbrewer.TrainingConfig(
            output_dir=folder, log_dir=None, device="cpu", ckpt_steps=10**9
        ),
        distill_config=textbrewer.DistillationConfig(
            temperature=TEMPERATURE, kd_loss_weight=ALPHA, hard_label_weight=1 - ALPHA
        ),
        model_T=_Silent(lambda batch: answers[batch["row"].long()]),
        model_S=_Silent(answer, student),
        adaptor_T=lambda batch, logits: {"logits": logits},
        adaptor_S=lambda batch, out: {"logits": out.logits, "losses": out.loss},
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=budget.learning_rate, weight_decay=0.01)
    with distiller:
        distiller.train(
            optimizer,
            loader,
            num_steps=budget.max_steps,
            scheduler_class=torch.optim.lr_scheduler.LambdaLR,
            scheduler_args={"lr_lambda": lambda step: max(0.0, 1 - step / budget.max_steps)},
            max_grad_norm=1.0,
            callback=None,
        )


@torch.no_grad()
def logits_of(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """`[rows, classes]`, in the order of the batches."""
    model.eval()
    out = [model(**{k: v for k, v in b.items() if k not in ("labels", "row")}).logits for b in batches]
    return torch.cat(out).float()


def score(logits: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, KL(teacher, student) in nats, agreement with the teacher, calibration error, log loss."""
    log_q, log_p = log_probs(logits, teacher, temperature=1.0)
    guess = logits.argmax(-1)
    sure = log_q.exp().amax(-1)
    bins = (sure * 10).long().clamp_max(9)
    right = (guess == labels).float()
    ece = sum(
        float((right[bins == b].mean() - sure[bins == b].mean()).abs() * (bins == b).float().mean())
        for b in range(10)
        if (bins == b).any()
    )
    return {
        "accuracy": float(right.mean()),
        "kl": float(forward_kl(log_q, log_p).mean()),
        "agreement": float((guess == teacher.argmax(-1)).float().mean()),
        "ece": ece,
        "log_loss": float(F.cross_entropy(logits, labels)),
    }


class Record:
    """The file of results.

    Args:
        name: Its name, without `.json`.
        minutes: After so long, runs that are asked for are skipped and counted.
        settings: What was done; runs under other settings are thrown away.
        folder: Where the file is.
    """

    def __init__(
        self, name: str, *, minutes: float, settings: Mapping[str, Any], folder: Path = RESULTS
    ) -> None:
        """Read what an earlier call left."""
        self.path = folder / f"{name}.json"
        self.end = time.monotonic() + 60 * minutes
        kept = json.loads(json.dumps(dict(settings)))
        self.data: dict[str, Any] = {"settings": kept, "machine": machine(), "runs": [], "skipped": 0}
        with self._shared():
            pass

    def run(self, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        """Make one run, unless it is there or the time is over."""
        with self._shared():
            pass
        if self.of(**key):
            return
        if time.monotonic() > self.end:
            self.note(skipped=self.data["skipped"] + 1)
            return
        start = time.monotonic()
        result = {**key, **make(), "seconds": round(time.monotonic() - start, 1)}
        with self._shared():
            self.data["runs"].append(result)
        test = {k: round(v, 4) for k, v in result.get("test", {}).items()}
        print(*key.values(), test, f"{result['seconds']} s", flush=True)  # noqa: T201

    def taught_by(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Keep the teacher's scores; runs of another one (made on another machine, say) go."""
        known = self.data.get("teacher")
        other = known is not None and any(
            abs(value - known[split][name]) > 1e-5
            for split, own in scores.items()
            for name, value in own.items()
        )
        if other and self.data["runs"]:
            print(f"{self.path.name}: {len(self.data['runs'])} runs of another teacher are made again")  # noqa: T201
        self.note(
            teacher={split: dict(own) for split, own in scores.items()}, **({"runs": []} if other else {})
        )

    def note(self, **facts: Any) -> None:
        """Keep something that is not a run."""
        with self._shared():
            self.data.update(facts)

    @contextlib.contextmanager
    def _shared(self) -> Iterator[None]:
        """Read the file again, change it, replace it at once: calls with other parts may run side by side."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with Path(tempfile.gettempdir(), f"{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                old = json.loads(self.path.read_text())
                if old["settings"] == self.data["settings"]:
                    self.data = {**old, "skipped": self.data["skipped"]}
            before = json.dumps(self.data)
            yield
            if json.dumps(self.data) != before:
                new = self.path.with_suffix(".tmp")
                new.write_text(json.dumps(self.data, indent=1) + "\n")
                new.replace(self.path)

    def of(self, **key: Any) -> list[dict[str, Any]]:
        """The runs with these values."""
        return [run for run in self.data["runs"] if all(run.get(k) == v for k, v in key.items())]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def best_on_dev(record: Record, candidates: list[Recipe], **key: Any) -> Recipe:
    """The candidate with the lowest log loss on the development rows, mean over seeds.

    A log loss is less noisy than an accuracy, and unlike a KL it doesn't prefer whoever copies mistakes.
    """

    def loss(recipe: Recipe) -> float:
        runs = record.of(arm=recipe.name, **key)
        return statistics.fmean(run["dev"]["log_loss"] for run in runs) if runs else math.inf

    return min(candidates, key=loss)


def described(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON."""
    return {**asdict(recipe), "options": dict(recipe.options)}
