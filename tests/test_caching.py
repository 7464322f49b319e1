"""`hf-kd cache` from the command line: written, looked at, checked, planned, uploaded, and trained from."""

from __future__ import annotations

import gc
import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_kd import DistillationTrainer, cli, init_student, run_teacher, setting
from hf_kd.cache_plan import Estimate, recommend
from hf_kd.data.processors import train_tokenizer
from hf_kd.results import Results
from hf_kd.teachers.models import ModelTeacher
from hf_kd.waiting import WaitingTeacher, woken

from .faults.runs import join, two_ranks
from .hub import hub

WORDS = "the film was good bad dull fine plot and actors are great or poor in every scene of it".split()
TINY = (
    "--use_cpu --disable_tqdm --per_device_train_batch_size 4 --per_device_eval_batch_size 3 --report_to none"
)


def sentences(count):
    return [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(3 + i % 5)) for i in range(count)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A classifier and a causal model, each with data."""
    folder = tmp_path_factory.mktemp("texts")
    torch.manual_seed(0)
    rows = [f"{text},{i % 2}" for i, text in enumerate(sentences(24))]
    (folder / "train.csv").write_text("text,label\n" + "\n".join(rows[:16]) + "\n")
    (folder / "eval.csv").write_text("text,label\n" + "\n".join(rows[16:]) + "\n")
    (folder / "text.txt").write_text("\n".join(sentences(120)) + "\n")
    train_tokenizer(WORDS, 300, task="sequence-classification").save_pretrained(folder / "bert")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=300, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, **small)
    BertForSequenceClassification(config).save_pretrained(folder / "bert")
    train_tokenizer(WORDS, 300, task="sequence-classification").save_pretrained(folder / "masked")
    BertForMaskedLM(BertConfig(vocab_size=300, **small)).save_pretrained(folder / "masked")
    train_tokenizer(WORDS, 300).save_pretrained(folder / "llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **small)).save_pretrained(
        folder / "llama"
    )
    return folder


def classifier(texts, *more):
    files = ["--dataset", str(texts / "train.csv"), "--eval_file", str(texts / "eval.csv")]
    return ["--teacher", str(texts / "bert"), "--student_layers", "1", *files, *TINY.split(), *map(str, more)]


def language(texts, *more):
    data = ["--dataset", str(texts / "text.txt"), "--task", "causal-lm", "--max_length", "16"]
    own = ["--teacher", str(texts / "llama"), "--student_layers", "1", "--temperature", "1"]
    return [*own, *data, *TINY.split(), *map(str, more)]


@pytest.fixture
def silent_teacher(monkeypatch):
    """After this is called, nobody may ask a model for its logits as a teacher."""

    def silence():
        def refuse(self, batch):
            raise AssertionError("the teacher was asked")

        monkeypatch.setattr(ModelTeacher, "__call__", refuse)

    return silence


def losses(folder):
    found = Results.read(folder / "results.json").training
    return [row["loss_kd"] for row in found if "loss_kd" in row]


def test_a_run_from_the_cache_has_the_losses_of_the_live_run(texts, tmp_path, capsys):
    """Trap 45: two epochs, shuffled; the same losses step by step, and the same table."""
    cache = tmp_path / "cache"
    assert cli.main(["cache", *classifier(texts), "--cache_dir", str(cache)]) == 0
    said = capsys.readouterr().out
    assert "logits (float32)" in said and "24 in 1 shards" in said
    run = ["--num_train_epochs", "2", "--logging_steps", "1", "--warmup_steps", "0"]
    for name, more in {"live": [], "read": ["--teacher_cache", cache]}.items():
        assert (
            cli.main(["distill", *classifier(texts, *run, *more), "--output_dir", str(tmp_path / name)]) == 0
        )
    assert losses(tmp_path / "read") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)
    assert len(losses(tmp_path / "read")) == 8
    live, read = (Results.read(tmp_path / name / "results.json") for name in ("live", "read"))
    assert live.arms["student"].eval_kl == pytest.approx(read.arms["student"].eval_kl, rel=1e-4)
    files = [cache / "manifest.json", *sorted(cache.glob("shards-*.json"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert read.provenance["teacher_cache"] == {"name": str(cache), "hash": digest[:16]} and len(files) == 2
    assert live.provenance["teacher_cache"] is None
    page = (tmp_path / "read" / "report.html").read_text(encoding="utf-8")
    assert digest[:16] in page


def test_training_from_the_cache_never_asks_the_teacher(texts, tmp_path, silent_teacher):
    from hf_kd import DistillationArguments, DistillationTrainer, init_student
    from hf_kd.config import parse
    from hf_kd.setting import load, wiring

    cache = tmp_path / "cache"
    assert cli.main(["cache", *classifier(texts), "--cache_dir", str(cache)]) == 0
    setting = load(*parse(classifier(texts, "--output_dir", tmp_path / "out")))
    args = DistillationArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        use_cpu=True,
        disable_tqdm=True,
        teacher_cache=str(cache),
    )
    silent_teacher()
    # The name alone is compared: the weights are never loaded.
    trainer = DistillationTrainer(
        init_student(setting.teacher, num_layers=1),
        args,
        teacher=str(texts / "bert"),
        task="sequence-classification",
        **wiring(setting.data, setting.processor),
    )
    trainer.train()
    assert trainer.evaluate()["eval_kl"] > 0
    assert trainer.state.global_step == 3


def test_a_language_model_is_cached_sparse_or_hidden_and_trained_from_either(texts, tmp_path, capsys):
    for fidelity, entries in (("sparse", 12), ("hidden", 28)):
        cache = tmp_path / fidelity
        own = ["--cache_dir", str(cache), "--cache_fidelity", fidelity, "--cache_entries", str(entries)]
        assert cli.main(["cache", *language(texts), *own]) == 0
        assert fidelity in capsys.readouterr().out
        assert cli.main(["cache", "verify", *language(texts), "--cache_dir", str(cache), "--rows", "8"]) == 0
        assert "rows computed again" in capsys.readouterr().out
        more = ["--max_steps", "2", "--teacher_cache", cache, "--control", "false", "--warmup_steps", "0"]
        assert (
            cli.main(["distill", *language(texts, *more), "--output_dir", str(tmp_path / f"{fidelity}-out")])
            == 0
        )
        # The table is made with the teacher itself, so it has the whole KL.
        assert Results.read(tmp_path / f"{fidelity}-out" / "results.json").arms["student"].eval_kl > 0


def test_another_teacher_than_the_caches_is_refused_with_both_named(texts, tmp_path, capsys):
    """Trap 49."""
    cache = tmp_path / "cache"
    assert cli.main(["cache", *classifier(texts), "--cache_dir", str(cache)]) == 0
    torch.manual_seed(5)
    other = tmp_path / "other"
    train_tokenizer(WORDS, 300, task="sequence-classification").save_pretrained(other)
    config = BertConfig.from_pretrained(texts / "bert")
    BertForSequenceClassification(config).save_pretrained(other)
    arguments = classifier(texts, "--teacher_cache", cache, "--output_dir", tmp_path / "out")
    arguments[1] = str(other)
    capsys.readouterr()
    assert cli.main(["distill", *arguments]) == 2
    said = capsys.readouterr().err
    assert "teacher weights: the cache has" in said
    # and another writer may not mix its answers in
    arguments = classifier(texts, "--cache_dir", cache)
    arguments[1] = str(other)
    assert cli.main(["cache", *arguments]) == 2
    assert "teacher fingerprint" in capsys.readouterr().err


def test_random_masks_are_refused_and_the_columns_named(texts, tmp_path, capsys):
    """Trap 46."""
    own = ["--teacher", str(texts / "masked"), "--student_layers", "1", "--task", "masked-lm"]
    data = ["--dataset", str(texts / "text.txt"), "--max_length", "16", *TINY.split()]
    assert cli.main(["cache", *own, *data, "--cache_dir", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err
    assert "['input_ids', 'labels']" in said and "random masking" in said
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_plan_compares_the_fidelities_and_recommends_what_fits(texts, capsys):
    assert cli.main(["cache", "plan", *language(texts), "--disk_mb", "1000"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("logits", "hidden", "sparse", "KL error"))
    assert "Recommended within 1,000 MB: --cache_fidelity hidden" in said
    assert cli.main(["cache", "plan", *language(texts), "--disk_mb", "0.000001"]) == 0
    assert "Nothing fits" in capsys.readouterr().out


def test_a_recommendation_is_the_smallest_faithful_one_that_fits():
    logits = Estimate("logits", 600, 600.0, 1, 0.0, 0.0)
    hidden = Estimate("hidden", 32, 32.0, 1, 1e-9, 0.1)
    sparse = Estimate("sparse", 20, 20.0, 1, 1e-8, 12.0)
    assert recommend([logits, hidden, sparse], 1000.0) is hidden
    assert recommend([logits, hidden, sparse], 25.0) is sparse
    assert recommend([logits, hidden, sparse], 1.0) is None


def test_verify_finds_a_flipped_bit_and_writing_again_mends_it(texts, tmp_path, capsys):
    """Trap 48."""
    cache = tmp_path / "cache"
    command = ["cache", *classifier(texts), "--cache_dir", str(cache)]
    assert cli.main(command) == 0
    shard = next(cache.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    assert cli.main(["cache", "verify", str(cache)]) == 1
    assert "another checksum" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert shard.read_bytes() == whole
    assert cli.main(["cache", "verify", str(cache)]) == 0


def run_command(argv):
    assert cli.main(argv) == 0


def test_two_ranks_write_one_cache(texts, tmp_path):
    cache = tmp_path / "cache"
    command = ["cache", *classifier(texts), "--cache_dir", str(cache)]
    statuses = [join(process) for process in two_ranks(run_command, command, logs=tmp_path)]
    assert statuses == [0, 0], [(tmp_path / f"rank{rank}.log").read_text()[-2000:] for rank in range(2)]
    rows = [
        sum(shard["rows"] for shard in json.loads(path.read_text())["shards"])
        for path in sorted(cache.glob("shards-*.json"))
    ]
    assert len(rows) == 2 and min(rows) > 0 and sum(rows) >= 24
    assert cli.main(["distill", *classifier(texts, "--teacher_cache", cache, "--max_steps", "2"),
                     "--output_dir", str(tmp_path / "out")]) == 0  # fmt: skip


def test_a_cache_is_uploaded_as_a_dataset(texts, tmp_path):
    cache = tmp_path / "cache"
    assert cli.main(["cache", *classifier(texts), "--cache_dir", str(cache)]) == 0
    with hub() as server:
        assert cli.main(["cache", "push", str(cache), "said"]) == 0
        files = server.files["somebody/said"]
    assert {"manifest.json", "README.md", "shards-00000.json"} <= files.keys()
    assert any(name.endswith(".safetensors") for name in files) and ".lock" not in files
    assert str(tmp_path) not in files["README.md"]["content"].decode()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "needs a folder: --cache_dir DIR"),
        (["--cache_dir", "x", "--cache_entries", "0"], "cache_entries=0 is below 1"),
        (["--cache_dir", "x", "--teacher_cache", "y"], "is for runs that read a cache"),
    ],
)
def test_wrong_options_are_named(texts, arguments, said, capsys):
    assert cli.main(["cache", *classifier(texts), *arguments]) == 2
    assert said in capsys.readouterr().err


def alive(layers):
    """Classifiers of so many layers that somebody still holds."""
    gc.collect()
    found = (o for o in gc.get_objects() if type(o) is BertForSequenceClassification)
    return sum(model.config.num_hidden_layers == layers for model in found)


@pytest.mark.parametrize("student", ["cut", "own"])
def test_the_teacher_is_not_in_memory_while_the_student_trains(student, texts, tmp_path, monkeypatch):
    """Trap 27: gone before training, and back for the table; with a student of its own it is not loaded."""
    cache = tmp_path / "cache"
    assert cli.main(["cache", *classifier(texts), "--cache_dir", str(cache)]) == 0
    arguments = classifier(texts, "--max_steps", "2", "--output_dir", tmp_path / "out")
    if student == "own":
        whole = BertForSequenceClassification.from_pretrained(texts / "bert")
        init_student(whole, num_layers=1).save_pretrained(tmp_path / "own")
        del whole
        train_tokenizer(WORDS, 300, task="sequence-classification").save_pretrained(tmp_path / "own")
        i = arguments.index("--student_layers")
        arguments[i : i + 2] = ["--student", str(tmp_path / "own")]
    events = []
    train, load = DistillationTrainer.train, setting.load_model

    def loading(name, *args, **kwargs):
        events.append(kwargs["role"])
        return load(name, *args, **kwargs)

    def training(self, *args, **kwargs):
        events.append(alive(layers=2))
        return train(self, *args, **kwargs)

    for module in (setting, run_teacher):
        monkeypatch.setattr(module, "load_model", loading)
    monkeypatch.setattr(DistillationTrainer, "train", training)
    assert cli.main(["distill", *arguments, "--teacher_cache", str(cache)]) == 0
    before = ["teacher"] if student == "cut" else ["student"]
    # The student, the control, then the teacher for the table.
    assert events == [*before, 0, 0, "teacher"]
    arms = Results.read(tmp_path / "out" / "results.json").arms
    assert arms["teacher"].eval_kl == 0 and arms["student"].eval_kl > 0
    events.clear()
    assert cli.main(["distill", *arguments, "--control", "false"]) == 0
    assert 1 in events, "counter-example: a live teacher is held"


def test_other_weights_at_the_end_than_in_the_cache_are_no_table(texts, tmp_path):
    """Trap 49: what was not loaded before training is compared when it is."""
    model = BertForSequenceClassification.from_pretrained(texts / "bert")
    waiting = WaitingTeacher(model.config, "there", lambda: model)
    run = SimpleNamespace(teachers=None)
    args = SimpleNamespace(teacher_quantization=None, teacher_cache="said", output_dir="out")
    with pytest.raises(ValueError, match="the weights abc of 'x', but 'there' has [0-9a-f]{16} now"):
        woken(SimpleNamespace(teacher=waiting, run=run, args=args), {"name": "x", "fingerprint": "abc"})
