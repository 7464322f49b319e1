"""A whole training step of a small Llama pair with a large vocabulary, four ways.

    python benchmarks/lm_step.py            # a table and benchmarks/results/lm_step.json

The same rows, models, optimizer (AdamW) and order for all: hf_kd with the fused loss and with full logits,
TRL's `GKDTrainer` on fixed data (`lmbda=0, beta=0`: forward KL; it has no cross-entropy, so it does less),
and the loop that one would write by hand. Each runs in a process of its own: CPU seconds per step are the
median after the first, memory is the peak resident size of the steps after the first beyond what the process
held before training began (optimizer state and gradients included). TRL needs `pip install hf-kd[bench]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, default_data_collator

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.measure import machine

RESULTS = Path(__file__).parent / "results" / "lm_step.json"
ALPHA, TEMPERATURE, LEARNING_RATE = 0.5, 2.0, 1e-4
MIB = 1 << 20


def llama(width: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights."""
    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(count: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Random tokens: what a step costs does not depend on which."""
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": r, "attention_mask": [1] * length, "labels": r} for r in ids.tolist()]


def status(field: str) -> int:
    """Bytes of one line of `/proc/self/status`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


class Clock(TrainerCallback):
    """CPU seconds of each step, and the peak of memory after the first."""

    def __init__(self) -> None:
        self.before = status("VmRSS")
        self.seconds: list[float] = []

    def start(self) -> None:
        """A step begins."""
        if len(self.seconds) == 1:
            Path("/proc/self/clear_refs").write_text("5")
        self.began = time.process_time()

    def stop(self) -> None:
        """A step has ended, optimizer included."""
        self.seconds.append(time.process_time() - self.began)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Trainers call this."""
        self.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Trainers call this."""
        self.stop()

    def result(self) -> dict[str, Any]:
        """What is reported; the first step loads libraries and is left out."""
        return {"seconds": self.seconds[1:], "bytes": status("VmHWM") - self.before}


def settings(size: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Arguments that every trainer takes."""
    return {
        "output_dir": folder, "per_device_train_batch_size": size.batch, "max_steps": size.steps + 1,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "save_strategy": "no",
        "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "remove_unused_columns": False, "max_grad_norm": 1.0,
    }  # fmt: skip


def hf_kd(size: argparse.Namespace, models: tuple[Any, Any], data: list, fused: str) -> dict[str, Any]:
    """This library."""
    student, teacher = models
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = settings(size, folder) | {"alpha": ALPHA, "temperature": TEMPERATURE, "fused": fused}
        DistillationTrainer(
            student, DistillationArguments(**options), teacher=teacher, callbacks=[clock],
            train_dataset=data, data_collator=default_data_collator,
        ).train()  # fmt: skip
    return clock.result()


def gkd(size: argparse.Namespace, models: tuple[Any, Any], data: list) -> dict[str, Any]:
    """TRL's trainer, on the same rows."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = models
    words = Tokenizer(kinds.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = settings(size, folder) | {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "bf16": False}
        GKDTrainer(
            model=student, teacher_model=teacher, args=GKDConfig(**options, gradient_checkpointing=False),
            train_dataset=Dataset.from_list(data), data_collator=default_data_collator,
            processing_class=tokenizer, callbacks=[clock],
        ).train()  # fmt: skip
    return clock.result()


def by_hand(size: argparse.Namespace, models: tuple[Any, Any], data: list) -> dict[str, Any]:
    """A loop without a trainer."""
    student, teacher = models
    clock = Clock()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    student.train()
    teacher.eval()
    batches = [data[i : i + size.batch] for i in range(0, len(data), size.batch)]
    for batch in batches[: size.steps + 1]:
        clock.start()
        inputs: dict[str, Tensor] = default_data_collator(batch)
        labels = inputs.pop("labels")[:, 1:].reshape(-1)
        with torch.no_grad():
            t = teacher(**inputs).logits[:, :-1].flatten(0, 1)
        z = student(**inputs).logits[:, :-1].flatten(0, 1)
        log_q, log_p = F.log_softmax(z / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1)
        kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        loss = (1 - ALPHA) * F.cross_entropy(z, labels) + ALPHA * TEMPERATURE**2 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.stop()
    return clock.result()


WAYS: dict[str, Callable[..., dict[str, Any]]] = {
    "hf_kd, fused": lambda *a: hf_kd(*a, fused="on"),
    "hf_kd, dense": lambda *a: hf_kd(*a, fused="off"),
    "TRL GKDTrainer": gkd,
    "by hand": by_hand,
}


def main() -> None:
    """Start each way in a process of its own, print the table and save it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--widths", default="256,512")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=129)
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--once", default=None, help="print what one way takes, and nothing else")
    parser.add_argument("--save", default=str(RESULTS))
    size = parser.parse_args()
    torch.set_num_threads(size.threads)
    if size.once:
        student, teacher = (int(width) for width in size.widths.split(","))
        models = llama(student, 2, size.vocabulary), llama(teacher, 4, size.vocabulary)
        data = rows(size.batch * (size.steps + 1), size.length, size.vocabulary)
        print(json.dumps(WAYS[size.once](size, models, data)))
        return
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--once", way]
        for name in ("vocabulary", "widths", "batch", "length", "steps", "threads"):
            command += [f"--{name}", str(getattr(size, name))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{way} failed:\n{done.stderr[-2000:]}")
        found[way] = json.loads(done.stdout.splitlines()[-1])
        found[way]["median"] = statistics.median(found[way]["seconds"])
        shown = found[way]["median"], found[way]["median"] / found["hf_kd, fused"]["median"]
        print(f"{way:18}{shown[0]:10.2f} s{shown[1]:8.2f} x{found[way]['bytes'] / MIB:10.0f} MiB", flush=True)
    described = {name: value for name, value in vars(size).items() if name not in ("once", "save")}
    Path(size.save).write_text(
        json.dumps({"schema_version": 1, **described, "machine": machine(), "ways": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
