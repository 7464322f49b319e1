"""`hf-kd generate`: a dataset and a cache in one, the same however often it was interrupted."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hf_kd import DistillationTrainer, init_student
from hf_kd import generate as module
from hf_kd.cli import main
from hf_kd.config import DistillationArguments
from hf_kd.data.prepare import prepare
from hf_kd.data.processors import train_tokenizer
from hf_kd.generate import generate
from hf_kd.options import GenerateOptions, RunOptions
from hf_kd.sampled_rows import GENERATION_FILE, alone
from hf_kd.teachers.cache import CachedTeacher, SparseCodec

from .faults.runs import child, join

WORDS = "the cat sat on a mat and the dog ran to the red house by the sea while birds sang"
PROMPTS = ["the cat", "a dog ran to", "", "by the sea", "birds", "the red house by"]


def _tokenizer(task: str) -> Any:
    return train_tokenizer([WORDS] * 20, 300, task=task)


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal teacher in a folder."""
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = _tokenizer("causal-lm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence-to-sequence teacher in a folder."""
    folder = tmp_path_factory.mktemp("seq2seq")
    tokenizer = _tokenizer("seq2seq-lm")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        initializer_factor=2.0,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(PROMPTS)))
    return path


def options(teacher: Path, folder: Path, **changes: Any) -> GenerateOptions:
    small: dict[str, Any] = {
        "max_new_tokens": 6,
        "max_prompt_length": 16,
        "batch_size": 2,
        "shard_rows": 4,
        "signal_entries": 8,
    }
    return GenerateOptions(**{"teacher": str(teacher), "output_dir": str(folder), **small, **changes})


def files(folder: Path) -> dict[str, bytes]:
    """Everything that counts, by name; parquet as its rows, whose bytes may hold more."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not path.name.startswith("."):
            found[name] = pq.read_table(path).to_pydict() if path.suffix == ".parquet" else path.read_bytes()
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(load_dataset(str(folder), split="train"))


def exact(model: Any, row: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities `[T, V]` of the model at each sampled token, and the positions."""
    labels = torch.tensor([row["labels"]])
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits[0].log_softmax(
                -1
            ), list(range(labels.shape[1]))
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    places = [i - 1 for i, label in enumerate(row["labels"]) if label != -100]
    return logits[places].log_softmax(-1), places


def test_rows_are_prompts_continued(causal: Path, prompts: Path, tmp_path: Path) -> None:
    folder = generate(
        options(causal, tmp_path / "out", dataset=str(prompts), samples_per_prompt=2, num_rows=5)
    )
    tokenizer = AutoTokenizer.from_pretrained(causal)
    found = rows(folder)
    assert [row["prompt"] for row in found] == [text for text in PROMPTS[:5] for _ in range(2)]
    assert len(list((folder / "data").glob("*.parquet"))) == 3
    for row in found:
        prompt = tokenizer(row["prompt"])["input_ids"] or [tokenizer.eos_token_id]
        made = row["input_ids"][len(prompt) :]
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"] == [-100] * len(prompt) + made
        assert 1 <= len(made) <= 6
        assert row["text"] == tokenizer.decode(made, skip_special_tokens=True)
        assert tokenizer.eos_token_id not in made[:-1]
    assert found[0]["text"] != found[1]["text"]


def test_from_nothing(causal: Path, tmp_path: Path) -> None:
    found = rows(generate(options(causal, tmp_path / "out", num_rows=6)))
    end = AutoTokenizer.from_pretrained(causal).eos_token_id
    assert len({tuple(row["input_ids"]) for row in found}) == 6
    assert {row["input_ids"][0] for row in found} == {end}


def test_the_signal_is_the_models_own_distribution(causal: Path, prompts: Path, tmp_path: Path) -> None:
    """Raw softmax at the stored temperature, though sampling is warped; position i predicts token i + 1."""
    made = options(
        causal,
        tmp_path / "out",
        dataset=str(prompts),
        temperature=0.5,
        top_k=3,
        top_p=0.8,
        signal_temperature=2.0,
    )
    folder, model = generate(made), LlamaForCausalLM.from_pretrained(causal)
    teacher = CachedTeacher(folder)
    for row in rows(folder):
        signal = teacher({"input_ids": torch.tensor([row["input_ids"]])}).sparse
        assert signal is not None and signal.temperature == 2.0
        log_p, places = exact(model, row)
        log_p = (log_p / 2.0).log_softmax(-1)
        ids, stored = signal.ids[0, places], signal.log_probs[0, places]
        there = ids >= 0
        assert there.all(-1).all()
        torch.testing.assert_close(stored, log_p.gather(1, ids), atol=1e-3, rtol=1e-3)
        certain = signal.certain[0, places]  # type: ignore[index]
        for i, count in enumerate(certain.tolist()):
            assert 4 <= count < 8
            assert set(ids[i, :count].tolist()) == set(log_p[i].topk(count).indices.tolist())
        silent = [i for i in range(len(row["input_ids"])) if i not in places]
        assert (signal.ids[0, silent] == -1).all()
        assert (signal.log_tail[0, silent] == 0).all()


def test_draws_are_unbiased(causal: Path, tmp_path: Path) -> None:
    """Over many rows from one prompt, the weights of the first token's entries average to its softmax."""
    made = options(causal, tmp_path / "out", num_rows=600, max_new_tokens=1, batch_size=100, shard_rows=600)
    folder, model = generate(made), LlamaForCausalLM.from_pretrained(causal)
    arrays = CachedTeacher(folder)._shards[0]
    teacher = CachedTeacher(folder)
    mean, first = torch.zeros(model.config.vocab_size), arrays["starts"][:-1]
    codec = SparseCodec(**(teacher.manifest.codec or {}))
    drawn = codec.decode(arrays["sparse"][first]).draws()
    assert drawn.weights is not None
    for ids, weights in zip(drawn.ids, drawn.weights, strict=True):
        mean.index_add_(0, ids.clamp_min(0), weights)
    with torch.no_grad():
        start = AutoTokenizer.from_pretrained(causal).eos_token_id
        p = model(input_ids=torch.tensor([[start]])).logits[0, -1].softmax(-1)
    # A draw weighs tau with probability p / tau: standard error sqrt(p tau / 600).
    tau = float(drawn.weights[:, -1].max())
    assert bool(((mean / 600 - p).abs() <= 5 * (p * tau / 600).sqrt() + 1e-3 * p + 1e-6).all())
    assert abs(float(mean.sum()) / 600 - 1) < 0.01


def test_sequence_to_sequence(seq2seq: Path, prompts: Path, tmp_path: Path) -> None:
    folder = generate(options(seq2seq, tmp_path / "out", dataset=str(prompts)))
    model, teacher = T5ForConditionalGeneration.from_pretrained(seq2seq), CachedTeacher(folder)
    for row in rows(folder):
        labels = torch.tensor([row["labels"]])
        batch = {
            "input_ids": torch.tensor([row["input_ids"]]),
            "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels),
        }
        signal = teacher(batch).sparse
        assert signal is not None
        log_p, _ = exact(model, row)
        torch.testing.assert_close(signal.log_probs[0], log_p.gather(1, signal.ids[0]), atol=1e-3, rtol=1e-3)


def test_no_signal_if_none_is_wanted(causal: Path, tmp_path: Path) -> None:
    folder = generate(options(causal, tmp_path / "out", num_rows=3, signal_entries=0))
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "README.md",
        "data",
        GENERATION_FILE,
    ]
    assert len(rows(folder)) == 3


# ---- interrupted, divided, resumed ----


@pytest.fixture(scope="module")
def whole(causal: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ten rows in three shards are, made in one go."""
    return files(generate(options(causal, tmp_path_factory.mktemp("whole"), num_rows=10)))


class _Killed(BaseException):
    """Like a signal: nothing handles it."""


@pytest.mark.parametrize("point", range(1, 12))
def test_stopped_anywhere_ends_the_same(
    causal: Path, tmp_path: Path, whole: dict[str, Any], point: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 48: stopped before any of its files is in place, a run goes on and ends with the same bytes."""
    count, replace_file = [0], os.replace

    def stopping(source: Any, target: Any) -> None:
        count[0] += 1
        if count[0] == point:
            raise _Killed
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(_Killed):
        generate(options(causal, tmp_path, num_rows=10))
    monkeypatch.setattr(os, "replace", replace_file)
    assert files(generate(options(causal, tmp_path, num_rows=10))) == whole


def test_finished_shards_are_not_made_again(
    causal: Path, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    write = module.write_shard
    monkeypatch.setattr(
        module, "write_shard", lambda work, shard, *a: (made.append(shard), write(work, shard, *a))
    )
    folder = generate(options(causal, tmp_path, num_rows=10))
    assert made == [0, 1, 2]
    generate(options(causal, tmp_path, num_rows=10))
    assert made == [0, 1, 2]
    (folder / "data" / "train-00001.parquet").unlink()
    shard = folder / "shard-00002-000000.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    generate(options(causal, tmp_path, num_rows=10))
    assert made == [0, 1, 2, 1, 2]
    assert files(folder) == whole


def test_two_ranks_make_what_one_makes(
    causal: Path, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, names in [("1", {"train-00001.parquet"}), ("0", {f"train-0000{i}.parquet" for i in range(3)})]:
        monkeypatch.setenv("RANK", rank)
        folder = generate(options(causal, tmp_path, num_rows=10))
        assert {path.name for path in (folder / "data").glob("*.parquet")} == names
    assert files(folder) == whole


def test_text_is_the_same_in_other_shards(causal: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    folder = generate(options(causal, tmp_path, num_rows=10, shard_rows=10, batch_size=5))
    texts = [text for i in range(3) for text in whole[f"data/train-0000{i}.parquet"]["text"]]
    assert [row["text"] for row in rows(folder)] == texts


def test_killed_processes(causal: Path, tmp_path: Path) -> None:
    """Trap 48: kill -9 in the middle of the work; another run ends with what one run makes."""
    folder, least = tmp_path / "out", 3
    given = options(
        causal, folder, num_rows=80, max_new_tokens=4, batch_size=2, shard_rows=2, signal_entries=8
    )
    process = child(generate, given)
    while len(list(folder.glob("data/train-*.parquet"))) < least and process.is_alive():
        time.sleep(0.005)
    process.kill()
    assert join(process) == -signal.SIGKILL
    assert least <= len(list(folder.glob("data/train-*.parquet"))) < 40
    generate(given)
    other = generate(replace(given, output_dir=str(tmp_path / "other")))
    assert files(folder) == files(other)
    assert len(rows(folder)) == 80


def test_two_writers(causal: Path, tmp_path: Path) -> None:
    made = options(causal, tmp_path, num_rows=2)
    with alone(tmp_path, 0), pytest.raises(ValueError, match="being written by another process"):
        generate(made)
    generate(made)


def test_something_else_in_the_folder(causal: Path, tmp_path: Path, prompts: Path) -> None:
    made = options(causal, tmp_path / "out", num_rows=4)
    folder = generate(made)
    for changes, message in [
        ({"temperature": 0.5}, "temperature=1.0, now 0.5"),
        ({"signal_entries": 4}, "signal_entries=8, now 4"),
        ({"num_rows": 5}, "num_rows=4, now 5"),
        ({"dataset": str(prompts)}, "prompts="),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(replace(made, **changes))
    (folder / GENERATION_FILE).unlink()
    with pytest.raises(ValueError, match="has data of something else"):
        generate(made)


def test_a_full_disk(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    def full(path: Path, columns: Any) -> None:
        raise OSError(28, "No space left on device")

    write = module.write_rows
    monkeypatch.setattr(module, "write_rows", full)
    with pytest.raises(ValueError, match="cannot be written .No space left on device.*run the same command"):
        generate(options(causal, tmp_path, num_rows=10))
    monkeypatch.setattr(module, "write_rows", write)
    assert files(generate(options(causal, tmp_path, num_rows=10))) == whole


# ---- options ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": None}, "num_rows is not set"),
        ({"teacher": None}, "teacher is not set"),
        ({"output_dir": None}, "output_dir is not set"),
        ({"temperature": -1.0}, "temperature=-1.0 is not 0 or above"),
        ({"top_p": 0.0}, "top_p=0.0 is outside"),
        ({"top_k": 0}, "top_k=0 is below 1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0 is below 1"),
        ({"signal_entries": 256}, "signal_entries=256 is outside 0 to 255"),
        ({"signal_temperature": 0.0}, "signal_temperature=0.0 is not above 0"),
        ({"seed": -1}, "seed=-1 is not in"),
        ({"shard_rows": 5}, "shard_rows=5 is no multiple of batch_size=2: set shard_rows=4"),
        ({"task": "masked-lm"}, "task='masked-lm' does not generate"),
        ({"task": "seq2seq-lm"}, "answers prompts"),
        ({"teacher_dtype": "int3"}, "teacher_dtype='int3' is not known"),
    ],
)
def test_wrong_options(causal: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(replace(options(causal, tmp_path, num_rows=2), **changes))


def test_rows_longer_than_the_teacher_takes(causal: Path, tmp_path: Path, prompts: Path) -> None:
    with pytest.raises(ValueError, match="make rows of 76 tokens, and the teacher takes 64"):
        generate(options(causal, tmp_path, dataset=str(prompts), max_new_tokens=60))


def test_columns(causal: Path, tmp_path: Path, prompts: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt_column='question' is no column .* id, prompt"):
        generate(options(causal, tmp_path / "a", dataset=str(prompts), prompt_column="question"))
    with pytest.raises(ValueError, match="prompt_column='id' holds int, not text"):
        generate(options(causal, tmp_path / "a", dataset=str(prompts), prompt_column="id"))
    with pytest.raises(ValueError, match="split='test' is no split"):
        generate(options(causal, tmp_path / "a", dataset=str(prompts), split="test"))


def test_command_line_and_yaml(
    causal: Path, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags beat the file, help needs nothing, and an unknown option is offered a name."""
    config = tmp_path / "g.yaml"
    config.write_text(
        f"teacher: {causal}\ndataset: {prompts}\nmax_new_tokens: 3\nseed: 7\nmax_prompt_length: 8\n"
    )
    assert (
        main(["generate", "--config", str(config), "--output_dir", str(tmp_path / "out"), "--seed", "9"]) == 0
    )
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}\n"
    assert "shard 1 of 1:" in said.err and "rows/s" in said.err and "left" in said.err
    record = json.loads((tmp_path / "out" / GENERATION_FILE).read_text())
    assert (record["seed"], record["max_new_tokens"], record["rows"]) == (9, 3, 6)
    assert str(tmp_path) not in json.dumps(
        {k: v for k, v in record.items() if k not in ("dataset", "teacher")}
    )
    assert main(["generate", "--help"]) == 0
    assert "--signal_temperature [1.0]" in capsys.readouterr().out
    assert main(["generate", "--max_tokens", "3"]) == 2
    assert "did you mean '--max_new_tokens'" in capsys.readouterr().err


# ---- to learn from ----


def kd_oracle(teacher: Any, student: Any, signal: Any, row: dict[str, Any]) -> tuple[float, int]:
    """Sum over sampled tokens of KL on the certain entries and the rest as one class; their number."""
    log_p, places = exact(teacher.double(), row)
    log_q, _ = exact(student.double(), row)
    total = 0.0
    for i, place in enumerate(places):
        ids = signal.ids[0, place, : int(signal.certain[0, place])]
        p, q = (torch.cat([x[i, ids].exp(), (1 - x[i, ids].exp().sum())[None]]) for x in (log_p, log_q))
        total += float((p * (p / q).log()).sum())
    return total, len(places)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_student_learns_from_the_folder_alone(
    kind: str, tmp_path: Path, prompts: Path, request: pytest.FixtureRequest
) -> None:
    """Sequence-level distillation (Kim and Rush 2016) without a teacher in memory, without labels of anyone.

    The folder is the dataset and the teacher; the loss of the first step is that of a float64 oracle
    that asks the teacher itself, on batches of rows of unlike lengths.
    """
    where: Path = request.getfixturevalue(kind)
    folder = generate(options(where, tmp_path / "out", dataset=str(prompts), samples_per_prompt=2))
    load: Any = LlamaForCausalLM if kind == "causal" else T5ForConditionalGeneration
    teacher, student = load.from_pretrained(where), init_student(load.from_pretrained(where), num_layers=1)
    args = DistillationArguments(
        output_dir=str(tmp_path / "run"),
        **{"alpha": 1.0, "temperature": 1.0, "teacher_cache": str(folder), "sparse_estimator": "tail"},
        **{"max_steps": 20, "per_device_train_batch_size": 12, "learning_rate": 5e-3, "logging_steps": 1},
        **{"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(where)
    run = RunOptions(dataset=str(folder), student=str(where), unlabelled=True, max_eval_samples=2)
    raw = load_dataset(str(folder))
    raw["eval"] = raw["train"]
    data = prepare(
        raw,
        run,
        task="causal-lm" if kind == "causal" else "seq2seq-lm",
        processor=tokenizer,
        config=student.config,
    )
    cached = CachedTeacher(folder)
    sums = [
        kd_oracle(teacher, copy.deepcopy(student), _signal(cached, teacher, row), row) for row in data.train
    ]
    trainer = DistillationTrainer(
        student,
        args,
        teacher=None,
        train_dataset=data.train,
        data_collator=data.collator,
        processing_class=tokenizer,
    )
    assert isinstance(trainer.teacher, CachedTeacher)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(sum(s for s, _ in sums) / sum(n for _, n in sums), rel=2e-3)
    assert losses[-1] < 0.5 * losses[0]


def _signal(cached: CachedTeacher, model: Any, row: dict[str, Any]) -> Any:
    batch = {"input_ids": torch.tensor([row["input_ids"]])}
    if model.config.is_encoder_decoder:
        labels = torch.tensor([row["labels"]])
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    return cached(batch).sparse


def test_rows_that_do_not_fit_the_student(causal: Path, tmp_path: Path) -> None:
    folder = generate(options(causal, tmp_path / "out", num_rows=4))
    tokenizer, config = AutoTokenizer.from_pretrained(causal), LlamaForCausalLM.from_pretrained(causal).config
    raw = load_dataset(str(folder))
    raw["eval"] = raw["train"]
    run = RunOptions(dataset=str(folder), student=str(causal))
    with pytest.raises(ValueError, match="rows have up to . input_ids, and model and max_length take 3"):
        prepare(raw, replace(run, max_length=3), task="causal-lm", processor=tokenizer, config=config)
    small = train_tokenizer(["a"], 260)
    config.vocab_size = 200
    with pytest.raises(ValueError, match="go up to 2.., and the student's vocabulary has 2.."):
        prepare(raw, run, task="causal-lm", processor=small, config=config)
    asked = prepare(
        raw, replace(run, text_columns=["text"]), task="causal-lm", processor=tokenizer, config=config
    )
    assert len(asked.train) != 4 or "labels" not in asked.train.column_names


def test_datasets_reads_each_folder_anew(tmp_path: Path, causal: Path) -> None:
    """Two folders of one name are two data sets, though `datasets` keeps copies by name."""
    for count in (2, 4):
        assert len(rows(generate(options(causal, tmp_path / str(count) / "out", num_rows=count)))) == count


def test_the_command_line_from_prompts_to_student(causal: Path, tmp_path: Path, prompts: Path) -> None:
    """`generate`, then `distill --dataset DIR --teacher_cache DIR`, no labels: a student and its results."""
    out, student = str(tmp_path / "out"), tmp_path / "student"
    small = "--max_new_tokens 6 --max_prompt_length 16 --batch_size 4 --shard_rows 8".split()
    made = [
        "--teacher",
        str(causal),
        "--output_dir",
        out,
        "--dataset",
        str(prompts),
        "--samples_per_prompt",
        "4",
    ]
    assert main(["generate", *made, *small]) == 0
    taught = ["--teacher", str(causal), "--student_layers", "1", "--dataset", out, "--teacher_cache", out]
    how = "--alpha 1 --unlabelled --temperature 1 --max_steps 4 --report_to none --use_cpu"
    assert main(["distill", *taught, *how.split(), "--output_dir", str(student)]) == 0
    assert (student / "model.safetensors").is_file()
    results = json.loads((student / "results.json").read_text())
    assert {"teacher", "student"} <= set(results["arms"])
    record = json.loads((Path(out) / "manifest.json").read_text())
    assert record["teacher"]["name"] == str(causal)
