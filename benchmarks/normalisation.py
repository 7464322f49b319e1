"""Does the gradient of a step depend on how the step is cut up?

    python benchmarks/normalisation.py    # all heads: a table and benchmarks/results/normalisation.json
    python benchmarks/normalisation.py --head causal-lm single-label    # prints only

For each head, the same rows make one optimizer step three times: at once, in four accumulated micro-batches,
and on two ranks (started with `accelerate launch`). Printed is the norm of the step's gradient over that of
the first run: 1.000 if it depends on the rows alone. The stock Trainer does the task loss (there is no
teacher), TRL's GKDTrainer distillation alone, hf_kd the mix of both. The tiny models and ragged rows are
those of the tests. "-": that trainer cannot do this head.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_kd import DistillationArguments, DistillationTrainer  # noqa: E402
from hf_kd.measure import machine  # noqa: E402
from tests.heads import HEADS, VOCAB, Collator, models, rows_of  # noqa: E402

ROWS, SEED = 8, 1
RESULTS = ROOT / "benchmarks" / "results" / "normalisation.json"
TWO_RANKS = ROOT / "hf_kd" / "accelerate" / "cpu2.yaml"
TRAINERS = ("hf_kd", "Trainer", "GKDTrainer")


class Gradient(TrainerCallback):
    """The gradient that the optimizer would apply, as one vector."""

    def __init__(self) -> None:
        self.vector = torch.zeros(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep it; parameters without a gradient count as zeros."""
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in kwargs["model"].parameters()]
        self.vector = torch.cat([part.detach().flatten().double() for part in parts])


def settings(folder: str, accumulation: int) -> dict[str, Any]:
    """One step over all rows, whatever the number of ranks, that changes no weight."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "output_dir": folder,
        "per_device_train_batch_size": ROWS // accumulation // ranks,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def gradient(kind: str, name: str, accumulation: int) -> Tensor | None:
    """The gradient of one step, or None where the trainer cannot do the head."""
    # An encoder without a head has no loss of its own, and GKD is for language models.
    if (kind == "Trainer" and HEADS[name].kind == "vectors") or (
        kind == "GKDTrainer" and name != "causal-lm"
    ):
        return None
    kept = Gradient()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(kind, name, settings(folder, accumulation), kept)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return kept.vector


def make_trainer(kind: str, name: str, options: dict[str, Any], callback: TrainerCallback) -> Trainer:
    """One of the three, with the same student, teacher and rows."""
    head = HEADS[name]
    student, teacher = models(head)
    rows = rows_of(head, ROWS, seed=SEED)
    shared: dict[str, Any] = {"data_collator": Collator(head), "callbacks": [callback]}
    if kind == "hf_kd":
        arguments = DistillationArguments(**options, alpha=head.alpha, temperature=2.0)
        return DistillationTrainer(
            student, arguments, teacher=teacher, task=head.task, train_dataset=rows, **shared
        )
    if kind == "Trainer":
        return Trainer(student, TrainingArguments(**options), train_dataset=rows, **shared)
    return gkd_trainer(student, teacher, options, rows, shared)


def gkd_trainer(student: Any, teacher: Any, options: dict[str, Any], rows: list[Any], shared: Any) -> Trainer:
    """TRL's trainer on the given rows instead of its student's own text."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    plain = {"lmbda": 0.0, "beta": 0.0, "temperature": 2.0, "bf16": False, "gradient_checkpointing": False}
    words = {f"w{i}": i for i in range(VOCAB)}
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(**options, **plain),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokens,
        **shared,
    )


def available() -> tuple[str, ...]:
    """The trainers that can be imported here."""
    try:
        importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("RANK", "0") == "0":
            print("TRL is not installed, its column stays empty: pip install 'hf-kd[bench]'", file=sys.stderr)
        return TRAINERS[:-1]
    return TRAINERS


def on_this_rank(names: list[str], folder: Path) -> None:
    """Be one of several ranks: one step per head and trainer; the first rank saves the gradients."""
    found = {f"{t}/{n}": gradient(t, n, 1) for n in names for t in available()}
    if os.environ["RANK"] == "0":
        torch.save(found, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


def two_ranks(names: list[str]) -> dict[str, Tensor | None]:
    """The gradients on two ranks, from processes started as a user would."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO_RANKS)]
        said = subprocess.run(
            [*launch, __file__, "--rank-results", folder, "--head", *names],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if said.returncode:
            raise RuntimeError(f"two ranks failed:\n{said.stderr[-4000:]}")
        return torch.load(Path(folder) / "gradients.pt", weights_only=True)


def compare(other: Tensor | None, one: Tensor | None) -> dict[str, float] | None:
    """Ratio of the norms, and how far apart they are once both have the same norm."""
    if other is None or one is None:
        return None
    ratio = float(other.norm() / one.norm())
    turned = float((other / ratio - one).norm() / one.norm())
    return {"ratio": round(ratio, 6), "turned": round(turned, 6)}


def measure(names: list[str]) -> dict[str, Any]:
    """All ratios by head, trainer and way of cutting."""
    ranks = two_ranks(names)
    found: dict[str, Any] = {}
    for name in names:
        found[name] = {}
        for trainer in available():
            one = gradient(trainer, name, 1)
            found[name][trainer] = {
                "accumulation_4": compare(gradient(trainer, name, 4), one),
                "two_ranks": compare(ranks[f"{trainer}/{name}"], one),
            }
    return found


def show(heads: dict[str, Any], console: Console) -> None:
    """A row per head, two columns per trainer; a star where the direction changes as well."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("gradient norm, relative to one process, accumulation 1")
    for trainer in TRAINERS:
        for way in ("acc. 4", "2 ranks"):
            table.add_column(f"{trainer}\n{way}", justify="right")
    for name, trainers in heads.items():
        cells = [
            cell(trainers.get(trainer, {}).get(way))
            for trainer in TRAINERS
            for way in ("accumulation_4", "two_ranks")
        ]
        table.add_row(name, *cells)
    console.print(table)
    console.print("*: the direction changes too, by more than 1 %.")


def cell(value: dict[str, float] | None) -> str:
    """One ratio."""
    if value is None:
        return "-"
    return f"{value['ratio']:.3f}{'*' if value['turned'] > 0.01 else ' '}"


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--head", nargs="+", choices=HEADS, metavar="HEAD", help=f"of {', '.join(HEADS)}")
    parser.add_argument("--rank-results", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.head or list(HEADS)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    # Random teachers are no better than a guess, and the trainer says so.
    logging.getLogger("hf_kd").setLevel(logging.ERROR)
    if options.rank_results:
        on_this_rank(names, options.rank_results)
        return
    heads = measure(names)
    show(heads, Console())
    if options.head is None:
        about = machine("cpu")
        if "GKDTrainer" in available():
            about["versions"]["trl"] = importlib.metadata.version("trl")
        results = {"machine": about, "rows": ROWS, "heads": heads}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
