"""`hf-kd generate`: text that a teacher samples, with what it thought at every token.

    output_dir/
      generation.json                     what was asked for; a run that asks for something else is refused
      README.md                           what this is
      data/train-00000.parquet            prompt, text, input_ids, labels
      manifest.json shard-... shards-...  the teacher's signal, as a teacher cache

A shard is a range of rows. Its signal is written first and its rows last, each whole or not at all, so that a
shard whose rows are there is finished, however the run ended. Rows are decoded in the same batches whoever
does it, so the shards of an interrupted run, or of one with other ranks, are the same.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from rich.console import Console
from transformers import PreTrainedModel

from .data.mapping import length_limit
from .data.processors import load_processor
from .data.prompts import Prompts, load_prompts
from .decoding import Decoded, Sampling, decode
from .loading import check_path, load_model, task_of_checkpoint
from .options import GenerateOptions, RunOptions
from .records import write_text
from .sampled import SampledSignal, manifest_of
from .sampled_rows import CARD, SCHEMA, agree, alone, has_rows, rows_file, write_rows
from .teachers.cache import SparseCodec
from .teachers.cache.make import tokenizer_hash
from .teachers.cache.store import MANIFEST_FILE
from .teachers.models import ModelTeacher

_IGNORE = -100


@dataclass(frozen=True)
class Generation:
    """A teacher, what it continues, and how.

    Attributes:
        options: What was asked for.
        teacher: The model, as a teacher: it knows its identity and columns.
        tokenizer: Its tokenizer.
        task: "causal-lm" or "seq2seq-lm".
        prompts: What it continues.
        sampling: How tokens are chosen.
        end: Tokens that end a row.
    """

    options: GenerateOptions
    teacher: ModelTeacher
    tokenizer: Any
    task: str
    prompts: Prompts
    sampling: Sampling
    end: list[int]

    @property
    def folder(self) -> Path:
        """Where it goes."""
        return Path(str(self.options.output_dir)).expanduser()

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.prompts) // self.options.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        size = self.options.shard_rows
        return range(shard * size, min((shard + 1) * size, len(self.prompts)))

    def record(self) -> dict[str, Any]:
        """All that decides the rows, as JSON."""
        ignored = ("output_dir", "teacher", "teacher_device_map", "trust_remote_code", "processor")
        settings = {name: value for name, value in asdict(self.options).items() if name not in ignored}
        texts = hashlib.sha256("\0".join(self.prompts.texts).encode()).hexdigest()[:16]
        return {
            **settings,
            "teacher": self.teacher.identity,
            "tokenizer": tokenizer_hash(self.tokenizer),
            "task": self.task,
            "prompts": texts,
            "rows": len(self.prompts),
        }


def generate(options: GenerateOptions) -> Path:
    """Sample rows from a teacher into a folder, or go on where an earlier run stopped.

    On several processes (`accelerate launch -m hf_kd generate ...`) each takes every n-th shard.

    Args:
        options: What to sample.

    Returns:
        The folder.

    Raises:
        ValueError: If something can't be loaded, the folder holds other data, or another process writes
            there.
    """
    options.validate()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    work = load(options, device=_device())
    work.folder.joinpath("data").mkdir(parents=True, exist_ok=True)
    with alone(work.folder, rank):
        agree(work.folder, work.record())
        signal = signal_of(work)
        sound = None if signal is None else signal.sound()
        missing = [
            s
            for s in range(work.shards)
            if not has_rows(rows_file(work.folder, s), len(work.rows_of(s)))
            or (sound is not None and s not in sound)
        ]
        progress = Progress(work, missing, ranks, Console(stderr=True, quiet=rank != 0))
        # By number, not by place among those missing: ranks look at different times.
        for shard in (s for s in missing if s % ranks == rank):
            try:
                write_shard(work, shard, signal)
            except OSError as error:
                raise ValueError(
                    f"output_dir={str(work.folder)!r} cannot be written ({error.strerror or error}). "
                    "Finished shards are kept: make room and run the same command again"
                ) from error
            progress.finished(shard)
        write_text(work.folder / "README.md", CARD.format(teacher=work.teacher.name))
    return work.folder


def load(options: GenerateOptions, *, device: torch.device) -> Generation:
    """Load teacher, tokenizer and prompts.

    Raises:
        ValueError: If something can't be loaded, or rows would be longer than the model takes.
    """
    name = str(options.teacher)
    check_path(name, "teacher")
    shared: dict[str, Any] = {
        "revision": options.teacher_revision,
        "trust_remote_code": options.trust_remote_code,
    }
    task = options.task or task_of_checkpoint(name, role="teacher", **shared)
    if task not in ("causal-lm", "seq2seq-lm"):
        raise ValueError(
            f"teacher={name!r} is for task {task!r}, which does not generate: set task=causal-lm"
        )
    if task == "seq2seq-lm" and options.dataset is None:
        raise ValueError(
            f"dataset is not set: teacher={name!r} answers prompts, it has nothing to start from"
        )
    loading: dict[str, Any] = {"dtype": options.teacher_dtype, "device_map": options.teacher_device_map}
    model: Any = load_model(name, task, role="teacher", **shared, **loading)
    teacher = ModelTeacher(model, ("logits",), device=device, revision=options.teacher_revision)
    run = RunOptions(
        teacher=name,
        processor=options.processor,
        dataset=options.dataset,
        dataset_config=options.dataset_config,
    )
    tokenizer = load_processor(run, DatasetDict(), task=task, **shared)
    _check_length(options, task, tokenizer, model)
    return Generation(
        options=options,
        teacher=teacher,
        tokenizer=tokenizer,
        task=task,
        prompts=load_prompts(options, run, task, tokenizer, model),
        sampling=Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
        ),
        end=_end_tokens(tokenizer, model),
    )


def vocabulary(model: Any) -> int:
    """Number of logits of a model."""
    head = model.get_output_embeddings()
    return int(
        model.config.get_text_config(decoder=True).vocab_size if head is None else head.weight.shape[0]
    )


def _end_tokens(tokenizer: Any, model: PreTrainedModel) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({int(i) for i in (*own, tokenizer.eos_token_id) if i is not None})


def _check_length(options: GenerateOptions, task: str, tokenizer: Any, model: PreTrainedModel) -> None:
    limit = length_limit(tokenizer, model.config)
    prompt = options.max_prompt_length if options.dataset is not None else 1
    longest = prompt + options.max_new_tokens if task == "causal-lm" else max(prompt, options.max_new_tokens)
    if limit is not None and longest > limit:
        raise ValueError(
            f"max_prompt_length={options.max_prompt_length} and max_new_tokens={options.max_new_tokens} make "
            f"rows of {longest} tokens, and the teacher takes {limit}: set them lower"
        )


def signal_of(work: Generation) -> SampledSignal | None:
    """Where the signal of a generation goes, its manifest written; None if none is wanted."""
    options = work.options
    model: Any = work.teacher.model
    if options.signal_entries == 0:
        return None
    classes = vocabulary(model)
    codec = SparseCodec(classes, min(options.signal_entries, classes), options.signal_temperature)
    pad = getattr(model.config, "pad_token_id", None) if work.task == "seq2seq-lm" else None
    manifest = manifest_of(work.teacher, codec, pad=pad, tokenizer=work.tokenizer)
    if not (work.folder / MANIFEST_FILE).is_file():
        manifest.write(work.folder)
    return SampledSignal(work.folder, work.teacher, work.task, codec=codec, pad=pad, shards=work.shards)


def write_shard(work: Generation, shard: int, signal: SampledSignal | None) -> None:
    """Sample the rows of a shard and write them, their signal first."""
    rows = work.rows_of(shard)
    size = work.options.batch_size
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for first in range(rows.start, rows.stop, size):
        numbers = range(first, min(first + size, rows.stop))
        prompts = [work.prompts.row(number) for number in numbers]
        for (text, tokens), made in zip(prompts, _decode(work, prompts, numbers, signal), strict=True):
            if signal is not None:
                signal.add(tokens, made.tokens, made.seen)
            ids, labels = _row(work.task, tokens, made.tokens)
            columns["prompt"].append(text)
            columns["text"].append(work.tokenizer.decode(made.tokens, skip_special_tokens=True))
            columns["input_ids"].append(ids)
            columns["labels"].append(labels)
    if signal is not None:
        signal.write(shard)
    write_rows(rows_file(work.folder, shard), columns)


def _decode(
    work: Generation,
    prompts: Sequence[tuple[str, list[int]]],
    numbers: range,
    signal: SampledSignal | None,
) -> list[Decoded]:
    pad = work.tokenizer.pad_token_id
    if signal is not None:
        signal.begin(work.options.seed, numbers.start)
    return decode(
        work.teacher.model,  # type: ignore[arg-type]
        [tokens for _, tokens in prompts],
        list(numbers),
        work.sampling,
        pad=0 if pad is None else pad,
        end=work.end,
        see=None if signal is None else signal.see,
    )


def _row(task: str, prompt: list[int], made: list[int]) -> tuple[list[int], list[int]]:
    """`input_ids` and `labels`: only what the teacher sampled is learned."""
    if task == "seq2seq-lm":
        return prompt, made
    return [*prompt, *made], [*([_IGNORE] * len(prompt)), *made]


def _device() -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


class Progress:
    """Says after every shard how far it is, how fast, and how long it takes still."""

    def __init__(self, work: Generation, missing: list[int], ranks: int, console: Console) -> None:
        """Start the clock."""
        self.work, self.ranks, self.console = work, ranks, console
        self.left = sum(len(work.rows_of(shard)) for shard in missing)
        self.done, self.start = 0, time.monotonic()
        kept = len(work.prompts) - self.left
        if kept:
            console.print(f"{kept:,} of {len(work.prompts):,} rows are there already")

    def finished(self, shard: int) -> None:
        """Count a shard of this rank; the others are taken to be as fast."""
        self.done += len(self.work.rows_of(shard))
        rate = self.done * self.ranks / max(time.monotonic() - self.start, 1e-9)
        left = max(self.left - self.done * self.ranks, 0)
        size = sum(path.stat().st_size for path in self.work.folder.rglob("*") if path.is_file())
        self.console.print(
            f"shard {shard + 1} of {self.work.shards}: {rate:,.1f} rows/s, {_duration(left / rate)} left, "
            f"{size / 1e6:,.1f} MB"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
