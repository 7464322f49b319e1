"""Training on streams: each row to one rank and one worker, resumed to the bit, memory that does not grow."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset, load_dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import IterableDataset as TorchStream

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd import run as runs
from hf_kd.config import parse
from hf_kd.rows import ROW
from hf_kd.streams import Stream, lanes_of

from .heads import HEADS, Collator, models, oracle, rows_of
from .test_gradient import Gradients, assert_same

HEAD = HEADS["causal-lm"]


def files(folder: Path, *sizes: int) -> list[str]:
    """So many files with so many rows, which are numbered over all of them."""
    numbers, made = itertools.count(), []
    for size in sizes:
        made.append(str(folder / f"{len(made)}.jsonl"))
        Path(made[-1]).write_text("".join(json.dumps({"x": next(numbers)}) + "\n" for _ in range(size)))
    return made


def numbers(folder: Path, *sizes: int) -> Any:
    return load_dataset("json", data_files=files(folder, *sizes), split="train", streaming=True)


class Counting(TorchStream):
    """A stream as users write it: each worker takes a part."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, int]]:
        info = get_worker_info()
        first, by = (0, 1) if info is None else (info.id, info.num_workers)
        yield from ({"x": x} for x in range(first, self.rows, by))


def dealt(
    rows: Any, *, ranks: int, steps: int, workers: int = 0, block: int = 2, **options: Any
) -> list[list]:
    """What every step sees, over all ranks."""
    loaders = [
        iter(
            DataLoader(
                Stream(rows, block=block, rank=rank, ranks=ranks, **options),
                batch_size=block,
                num_workers=workers,
                collate_fn=list,
            )
        )
        for rank in range(ranks)
    ]
    each = 4 // ranks  # micro-batches of a rank
    return [
        [row["x"] for _ in range(each) for loader in loaders for row in next(loader)] for _ in range(steps)
    ]


@pytest.mark.parametrize("kind", ["one file", "four files", "torch"])
def test_a_step_sees_the_same_rows_on_any_number_of_ranks(tmp_path: Path, kind: str) -> None:
    """Trap 17: and each row once before any comes again."""
    rows = {
        "one file": lambda: numbers(tmp_path, 24),
        "four files": lambda: numbers(tmp_path, 6, 6, 6, 6),
        "torch": lambda: Counting(24),
    }[kind]()
    alone = dealt(rows, ranks=1, steps=6)
    assert sorted(itertools.chain(*alone[:3])) == list(range(24))
    assert Counter(itertools.chain(*alone)) == dict.fromkeys(range(24), 2)
    for ranks in (2, 4):
        found = dealt(rows, ranks=ranks, steps=6)
        assert [sorted(step) for step in found] == [sorted(step) for step in alone]
    assert dealt(rows, ranks=2, steps=6, workers=2) == dealt(rows, ranks=2, steps=6)


def test_a_stream_goes_on_where_a_run_ended(tmp_path: Path) -> None:
    """On another number of ranks too, with placeholders for what the trainer skips."""
    for rows in (numbers(tmp_path, 24), numbers(tmp_path, 6, 6, 6, 6)):
        whole = dealt(rows, ranks=1, steps=7)
        for ranks in (1, 2, 4):
            rest = dealt(rows, ranks=ranks, steps=3, start=32)
            assert [sorted(step) for step in rest] == [sorted(step) for step in whole[4:]]
    behind = iter(Stream(rows, block=2, start=16, passed=3))
    assert [isinstance(next(behind), str) for _ in range(6)] == [True] * 6
    assert next(behind)["x"] == whole[2][0]


def test_shuffled_streams_differ_from_pass_to_pass(tmp_path: Path) -> None:
    """`datasets` shuffles by seed and epoch, which is the pass."""
    rows = numbers(tmp_path, 12, 12).shuffle(seed=3, buffer_size=8)
    first = dealt(rows, ranks=1, steps=6)
    passes = [list(itertools.chain(*first[:3])), list(itertools.chain(*first[3:]))]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(24))
    assert passes[0] != passes[1] != list(range(24))
    assert dealt(rows, ranks=1, steps=6) == first


def test_rows_know_their_number(tmp_path: Path) -> None:
    assert [row[ROW] for row in itertools.islice(Stream(Counting(3), block=2, rank=1, ranks=2), 4)] == [
        2,
        3,
        6,
        7,
    ]


def test_what_is_left_out_of_a_stream_stays_out(tmp_path: Path) -> None:
    """`skip` and `take` of a part would be others than those of the whole."""
    rows = numbers(tmp_path, 6, 6)
    assert lanes_of(rows) == 2 and lanes_of(rows.skip(3)) == 1
    seen = {row["x"] for row in itertools.islice(Stream(rows.skip(3), block=2), 40)}
    assert seen == set(range(3, 12))


def test_streams_that_cannot_be_dealt_are_refused(tmp_path: Path) -> None:
    from datasets.distributed import split_dataset_by_node

    rows = numbers(tmp_path, 6, 6)
    with pytest.raises(ValueError, match="is split for one rank"):
        Stream(split_dataset_by_node(rows, rank=0, world_size=2), block=2)
    with pytest.raises(ValueError, match=r"per_device_train_batch_size=4.*no multiple"):
        Stream(rows, block=4, start=6)
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        next(iter(Stream(Counting(0), block=2)))


# ---- through the trainer ----


def texts(folder: Path, count: int = 10) -> Any:
    """The rows of a tiny language model as a stream."""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({**row, "junk": "a"}) + "\n" for row in rows_of(HEAD, count)))
    return load_dataset("json", data_files=str(path), split="train", streaming=True)


class Noisy(Collator):
    """A collator that draws: the model reads other tokens each time."""

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        noise = torch.rand(batch["input_ids"].shape) < 0.3
        return {**batch, "input_ids": batch["input_ids"].masked_fill(noise, 5)}


def trainer_for(folder: Path, rows: Any, *, collator: Any = None, **options: Any) -> DistillationTrainer:
    student, teacher = models(HEAD)
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = DistillationArguments(**{**defaults, **options})
    collator = collator or Noisy(HEAD)
    return DistillationTrainer(student, args, teacher=teacher, train_dataset=rows, data_collator=collator)


def weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.student.state_dict().items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, workers: int) -> None:
    """To the bit, in the second pass over the stream, with a collator that draws random numbers."""
    rows = texts(tmp_path)
    trainer = trainer_for(tmp_path, rows, dataloader_num_workers=workers)
    trainer.train()
    undisturbed = weights(trainer)
    # Step 4 is in the second pass: 10 rows, 4 a step.
    again = trainer_for(tmp_path, rows, dataloader_num_workers=workers)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 5
    for name, value in weights(again).items():
        assert torch.equal(value, undisturbed[name])
    over = trainer_for(tmp_path, rows)
    over.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert over.state.global_step == 5
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(over).items())


def test_the_gradient_is_that_of_the_rows(tmp_path: Path) -> None:
    """Traps 1, 17: of the first four rows of the stream."""
    gradients = Gradients()
    trainer = trainer_for(
        tmp_path, texts(tmp_path), collator=Collator(HEAD), max_steps=1, alpha=HEAD.alpha, temperature=2.0,
        learning_rate=0.0, max_grad_norm=0.0,
    )  # fmt: skip
    trainer.add_callback(gradients)
    trainer.train()
    _, expected = oracle(HEAD, *models(HEAD), rows_of(HEAD, 10)[:4])
    assert_same(gradients.grads, expected)


def test_other_steps_go_on_with_the_next_row(tmp_path: Path) -> None:
    """A stream counts rows; a data set with a length counts steps, so there another step is refused."""
    trainer_for(tmp_path, texts(tmp_path), max_steps=2).train()
    seen = []

    class Watching(Noisy):
        def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
            seen.append([row["input_ids"] for row in rows])
            return super().__call__(rows)

    again = trainer_for(
        tmp_path, texts(tmp_path), collator=Watching(HEAD), max_steps=3, gradient_accumulation_steps=1
    )
    again.check(training=True)
    seen.clear()
    again.train(resume_from_checkpoint=True)
    assert seen[0] == [row["input_ids"] for row in rows_of(HEAD, 10)[8:]]
    known = rows_of(HEAD, 10)
    folder = tmp_path / "known"
    trainer_for(folder, known, max_steps=2).train()
    with pytest.raises(ValueError, match=r"2 rows .*had 4.*gradient_accumulation_steps=2"):
        trainer_for(folder, known, gradient_accumulation_steps=1).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"is a stream of 1 file, and was a data set with a length"):
        trainer_for(folder, texts(tmp_path)).train(resume_from_checkpoint=True)
    anew = trainer_for(folder, known, gradient_accumulation_steps=1, ignore_data_skip=True)
    anew.train(resume_from_checkpoint=True)
    assert anew.state.global_step == 5


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True"),
    ],
)
def test_options_that_a_stream_ignores_are_refused(tmp_path: Path, options: Any, what: str) -> None:
    trainer = trainer_for(tmp_path, texts(tmp_path), **options)
    with pytest.raises(ValueError, match=what):
        trainer.train()


def test_an_evaluation_stream_on_several_ranks_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """How many rows each rank has would not be known."""
    trainer = trainer_for(tmp_path, texts(tmp_path))
    trainer.eval_dataset = texts(tmp_path)
    assert trainer.evaluate()["eval_kl"] > 0
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    trainer._checked.clear()
    with pytest.raises(ValueError, match=r"eval_dataset is a stream.*Dataset.from_list"):
        trainer.evaluate()


def test_a_generator_is_a_stream(tmp_path: Path) -> None:
    """`IterableDataset.from_generator`, with shards of its own."""
    rows = IterableDataset.from_generator(_shards, gen_kwargs={"shards": [0, 1, 2]})
    assert lanes_of(rows) == 3
    assert Counter(x for step in dealt(rows, ranks=2, steps=3) for x in step) == dict.fromkeys(range(12), 2)


def _shards(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        yield from ({"x": 4 * shard + i} for i in range(4))


# ---- through the command line ----


def test_a_run_of_the_command_line_on_a_stream(tmp_path: Path, monkeypatch: Any) -> None:
    """The teacher's training, the student's and the control's; resumed, it is the same student."""
    rows = [{"text": f"{'good' if i % 2 else 'bad'} film number {i}", "label": i % 2} for i in range(60)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 32,
    }  # fmt: skip
    common = (
        "--task sequence-classification --train_teacher --student_layers 1 --streaming --stream_buffer 8 "
        "--max_steps 8 --max_eval_samples 12 --per_device_train_batch_size 8 --save_steps 4 --use_cpu "
        "--disable_tqdm --warmup_steps 0"
    ).split()

    def options(out: str, *more: str) -> Any:
        models = ["--teacher_config", json.dumps(config), "--dataset", str(path)]
        return parse([*models, *common, "--output_dir", str(tmp_path / out), *more])

    trained: list[DistillationTrainer] = []
    train = DistillationTrainer.train

    def spy(self: DistillationTrainer, *args: Any, **kwargs: Any) -> Any:
        trained.append(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "train", spy)
    results = runs.distill(*options("out"))
    assert list(results.arms) == ["teacher", "student", "control"] and results.examples == 12
    assert [trainer.state.global_step for trainer in trained] == [8, 8, 8]  # 48 rows: more than one pass
    assert all(isinstance(trainer.train_dataset, IterableDataset) for trainer in trained)
    passes = itertools.islice(Stream(trained[1].train_dataset, block=8), 96)
    seen = [tuple(row["input_ids"]) for row in passes]
    assert len(set(seen)) == 48 and set(seen[:48]) == set(seen[48:]) and seen[:48] != seen[48:]
    assert not set(seen) & {tuple(row["input_ids"]) for row in trained[1].eval_dataset}
    undisturbed = load_file(tmp_path / "out" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    runs.distill(*options("out", "--resume_from_checkpoint", "true", "--no_control"))
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == undisturbed.keys()
    assert all(torch.equal(value, undisturbed[name]) for name, value in again.items())
    with pytest.raises(ValueError, match=r"max_steps=-1.*set max_steps"):
        options("none", "--max_steps", "-1")
    with pytest.raises(ValueError, match="a stream has no epochs"):
        options("none", "--teacher_epochs", "2")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Twenty times the rows, 76 MB more of text, and less than half of that in memory at any time."""

    def peak_of_reading(rows: int) -> float:
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as lines:
            for i in range(rows):
                lines.write(json.dumps({"text": f"{i} " + "word " * 800}) + "\n")
        read = {"split": "train", "streaming": True, "chunksize": 1 << 18}
        data = load_dataset("json", data_files=str(path), **read)
        data = data.map(lambda row: {"length": len(row["text"])}).shuffle(seed=0, buffer_size=100)
        Path("/proc/self/clear_refs").write_text("5")
        stream = itertools.islice(Stream(data, block=8), rows)
        assert sum(1 for row in stream if row["length"] > 4000) == rows
        path.unlink()
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    few = peak_of_reading(1_000)
    many = peak_of_reading(20_000)
    sys.stdout.write(f"\npeak of 4 MB: {few:.1f} MiB, of 80 MB: {many:.1f} MiB\n")
    assert many - few < 35
