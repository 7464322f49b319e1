"""The loss after a fixed training budget, by what is kept of the teacher: a part of `benchmarks/cache.py`.

A Llama teacher is trained on text, and asked once: its last hidden states (which are as good as its logits)
and a few entries of each distribution go into two caches. Students start alike within a seed, and take the
same steps on the same blocks, each block once; what differs is what they are told of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

sys.path.insert(0, str(Path(__file__).parent / "quality"))
from arms import Budget, Record, spread
from shakespeare import llama, logits, measured, text_of, tokens_of

from hf_kd import DistillationArguments, DistillationTrainer, SparseSignal, TeacherSignal
from hf_kd.data.builtin import stdlib
from hf_kd.losses.projected import head_logits
from hf_kd.teachers import CachedTeacher, ModelTeacher
from hf_kd.teachers.cache import CacheWriter
from hf_kd.teachers.cache.make import CacheSettings, describe, fill, save_head
from hf_kd.teachers.cache.store import Manifest

# Arm: what is read of the teacher, and the run's options.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("hidden", {}),
    "cross-entropy only": ("hidden", {"alpha": 0.0}),
    "top-k, renormalised": ("renormalised", {"sparse_estimator": "tail"}),
    "top-k, tail bucket": ("top", {"sparse_estimator": "tail"}),
    "cached entries, tail bucket": ("sparse", {"sparse_estimator": "tail"}),
    "cached entries, draws": ("sparse", {"sparse_estimator": "draws"}),
    "cached entries, draws or tail as measured": ("sparse", {"sparse_estimator": "auto"}),
}
_CHARACTERS = 3_000_000


class TopK:
    """A teacher's likeliest classes alone, from a cache that has all of them.

    Renormalised, as most code does it: their probabilities are made to sum to 1, so that all others are
    taught to be impossible.
    """

    def __init__(self, whole: CachedTeacher, entries: int, *, renormalise: bool) -> None:
        """Wrap a cache of hidden states."""
        self.whole, self.entries, self.renormalise = whole, entries, renormalise
        self.columns, self.config = whole.columns, whole.config

    @property
    def identity(self) -> dict[str, str]:
        """The cache's, and what is left of it."""
        return {**self.whole.identity, "top": f"{self.entries} {self.renormalise}"}

    def __call__(self, batch: Mapping[str, Any]) -> TeacherSignal:
        """The entries of a batch."""
        hidden = self.whole(batch).hidden
        assert hidden is not None
        log_p = head_logits(hidden).log_softmax(-1)
        top = log_p.topk(self.entries, -1)
        rest = log_p.exp().scatter(-1, top.indices, 0.0).sum(-1).log()
        if self.renormalise:
            total = top.values.logsumexp(-1, keepdim=True)
            kept = SparseSignal(top.indices, top.values - total, torch.full_like(rest, -torch.inf))
        else:
            kept = SparseSignal(top.indices, top.values, rest)
        return TeacherSignal(sparse=kept)


def rows_of(blocks: Tensor) -> list[dict[str, Tensor]]:
    """As a data set."""
    return [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in blocks]


def corpus(name: str) -> str:
    """The beginning of the standard library, or of a text."""
    text = "\n".join(stdlib()["train"]["text"]) if name == "builtin:stdlib" else text_of(name)
    return text[:_CHARACTERS]


def trained_teacher(blocks: Tensor, steps: int, vocabulary: int, folder: Path) -> LlamaForCausalLM:
    """Trained once, and kept."""
    if not (folder / "config.json").exists():
        model = llama(192, 3, 0, vocabulary=vocabulary)
        budget = Budget(max_steps=steps, batch_size=8, learning_rate=1e-3, warmup_steps=40)
        options = TrainingArguments(**budget.arguments(0, remove_unused_columns=True))
        Trainer(model, options, train_dataset=rows_of(blocks), data_collator=default_data_collator).train()
        model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def filled(folder: Path, teacher: LlamaForCausalLM, blocks: Tensor, settings: CacheSettings) -> CachedTeacher:
    """A cache of some blocks."""
    asked = ModelTeacher(teacher, ("logits",))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in blocks.split(32)]
    manifest, head = describe(asked, batches[0], settings)
    folder.mkdir()
    if head is not None:
        manifest = replace(manifest, head=save_head(head, folder))
    manifest.write(folder)
    fill(CacheWriter(folder, Manifest.read(folder)), asked, batches)
    return CachedTeacher(folder)


def budget(args: Any, folder: Path) -> dict[str, Any]:
    """Train all arms on all seeds.

    Args:
        args: `text`, `budget_vocabulary`, `entries`, `budget_steps`, `teacher_steps`, `seeds`, `minutes` and
            `work`, the folder of the teacher and of runs that are done.
        folder: Where caches go.
    """
    work = Path(args.work)
    plan = Budget(max_steps=args.budget_steps, batch_size=8, learning_rate=2e-3, warmup_steps=20)
    settings = {
        "text": Path(args.text).name, "vocabulary": args.budget_vocabulary, "entries": args.entries,
        "teacher": "3 layers of width 192", "teacher_steps": args.teacher_steps,
        "student": "2 layers of width 96", **vars(plan),
    }  # fmt: skip
    record = Record("cache_budget", minutes=args.minutes, settings=settings, folder=work)
    blocks = tokens_of(corpus(args.text), vocabulary=args.budget_vocabulary)
    used, test = blocks["train"][: plan.max_steps * plan.batch_size], blocks["test"][:64]
    if len(used) < plan.max_steps * plan.batch_size:
        raise SystemExit(f"--text has {len(used)} blocks, {plan.max_steps} steps need more: fewer steps")
    name = f"teacher-{settings['text']}-{args.budget_vocabulary}-{args.teacher_steps}"
    teacher = trained_teacher(
        blocks["train"].flip(0), args.teacher_steps, args.budget_vocabulary, work / name
    )
    known = logits(teacher, test)
    log_p = known[:, :-1].float().log_softmax(-1)
    record.note(
        teacher=measured(known, known, test),
        teacher_entropy=float(-(log_p.exp() * log_p).sum(-1).mean()),
        teacher_mass_in_top=float(log_p.topk(args.entries, -1).values.exp().sum(-1).mean()),
    )
    del log_p
    hidden = filled(folder / "hidden", teacher, used, CacheSettings("hidden"))
    tellers: dict[str, Any] = {
        "hidden": hidden,
        "sparse": filled(folder / "sparse", teacher, used, CacheSettings("sparse", entries=args.entries)),
        "top": TopK(hidden, args.entries, renormalise=False),
        "renormalised": TopK(hidden, args.entries, renormalise=True),
    }

    def run(arm: str, seed: int) -> dict[str, Any]:
        teller, options = ARMS[arm]
        student = llama(96, 2, seed, vocabulary=args.budget_vocabulary)
        settings = {"alpha": 1.0, "temperature": 1.0, **options}
        trainer = DistillationTrainer(
            student, DistillationArguments(**plan.arguments(seed, **settings)), teacher=tellers[teller],
            task="causal-lm", train_dataset=rows_of(used), data_collator=default_data_collator,
        )  # fmt: skip
        trainer.train()
        found: dict[str, Any] = {"test": measured(logits(student, test), known, test)}
        if trainer.estimator is not None:
            found["estimator"] = vars(trainer.estimator)
        return found

    for seed in range(args.seeds):
        for arm in ARMS:
            record.run({"arm": arm, "seed": seed}, lambda arm=arm, seed=seed: run(arm, seed))
    return {**record.data, "means": means(record)}


def means(record: Record) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and spread of each arm."""
    return {
        arm: {key: spread([r["test"][key] for r in record.of(arm=arm)]) for key in ("log_loss", "kl")}
        for arm in ARMS
        if record.of(arm=arm)
    }
