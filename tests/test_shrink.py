"""`hf-kd shrink`, and a cut asked for by the options of a run: from flags, from YAML, from Python."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_kd import run as runs
from hf_kd.cli import main
from hf_kd.config import parse
from hf_kd.data.processors import make_image_processor, train_tokenizer
from hf_kd.options import RunOptions
from hf_kd.options.student import NAMES
from hf_kd.run_teacher import head_of
from hf_kd.setting import load

LINES = [f"{'a good' if i % 2 else 'a bad'} film number {i} about dogs" for i in range(40)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Teachers of two heads with one tokenizer, and their rows."""
    folder = tmp_path_factory.mktemp("shrink")
    rows = [f"{text},{('negative', 'positive')[i % 2]}" for i, text in enumerate(LINES)]
    (folder / "train.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    (folder / "train.txt").write_text("\n".join(LINES), encoding="utf-8")
    more = ["quick brown foxes jumping over lazy dogs while others sleep"] * 3
    tokenizer = train_tokenizer([*LINES, *more], 330, task="sequence-classification")
    size = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4,
        "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(**size, **head_of(["negative", "positive"], None))
    teacher = BertForSequenceClassification(config)
    teacher.classifier.weight.data *= 20
    words = train_tokenizer([*LINES, *more], 330)
    causal = LlamaForCausalLM(LlamaConfig(**{**size, "vocab_size": len(words), "pad_token_id": 0}))
    for name, model, own in (("bert", teacher, tokenizer), ("llama", causal, words)):
        model.save_pretrained(folder / name)
        own.save_pretrained(folder / name)
    return folder


def shrink(texts, out, *more, teacher="bert"):
    return main(["shrink", "--teacher", str(texts / teacher), "--output_dir", str(out), *map(str, more)])


def test_a_target_a_vocabulary_and_what_it_starts_from(texts, tmp_path, capsys):
    """The student loads with its tokenizer, is as small as asked, and is compared with a random start."""
    out = tmp_path / "student"
    sizes = ["--student_max_parameters", "0.5", "--student_vocabulary", "train"]
    assert shrink(texts, out, "--dataset", texts / "train.csv", *sizes) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "shrink.json").read_text())
    student = BertForSequenceClassification.from_pretrained(out)
    teacher = BertForSequenceClassification.from_pretrained(texts / "bert")
    count = sum(p.numel() for p in student.parameters())
    assert report["parameters"] == {"teacher": sum(p.numel() for p in teacher.parameters()), "student": count}
    assert count <= 0.5 * report["parameters"]["teacher"] and f"{count:,}" in printed
    parts = {name for name in report["parts"] if name.startswith("bert.encoder.layer: ")}
    assert len(parts) == 3 and sum(part["student"] for part in report["parts"].values()) == count
    assert report["layers"] == student.config.hf_kd_layers
    assert set(report["start"]) == {"teacher", "student", "random"}
    assert all({"loss", "kl", "agreement"} <= set(report["start"][name]) for name in ("student", "random"))
    tokenizer, old = (AutoTokenizer.from_pretrained(path) for path in (out, texts / "bert"))
    kept = student.config.hf_kd_vocabulary
    assert report["tokens"] == {"teacher": len(old), "student": len(kept)} and len(kept) < len(old)
    covered = [text for text in LINES if set(old(text)["input_ids"]) <= set(kept)]
    assert len(covered) >= 36  # the training rows; four are held out
    for text in covered:
        assert [kept[i] for i in tokenizer(text)["input_ids"]] == old(text)["input_ids"]


def test_yaml_says_the_same_and_flags_beat_it(texts, tmp_path):
    config = tmp_path / "shrink.yaml"
    config.write_text(
        f"teacher: {texts / 'llama'}\noutput_dir: {tmp_path / 'a'}\nstudent_layers: 0.5\n"
        "student_layer_choice: last\nstudent_hidden_size: 8\nstudent_num_attention_heads: 1\n"
        "student_num_key_value_heads: 1\nstudent_intermediate_size: 0.25\n"
        f"student_vocabulary: {texts / 'train.txt'}\nstudent_calibration_rows: 0\n"
    )
    assert main(["shrink", "--config", str(config)]) == 0
    student = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    own = student.config
    assert (own.num_hidden_layers, own.hidden_size, own.intermediate_size) == (2, 8, 8)
    assert (own.num_attention_heads, own.num_key_value_heads) == (1, 1)
    assert own.hf_kd_layers == {"num_hidden_layers": [2, 3]}
    assert own.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "a"))
    layers = ["--student_layer_choice", "[0, 1, 3]", "--student_layers", "3"]
    assert main(["shrink", "--config", str(config), "--output_dir", str(tmp_path / "b"), *layers]) == 0
    kept = LlamaForCausalLM.from_pretrained(tmp_path / "b").config.hf_kd_layers
    assert kept == {"num_hidden_layers": [0, 1, 3]}


def test_layers_by_importance_and_by_loss(texts, tmp_path, capsys):
    """The layers are those that Python's `init_student` takes with the same rows."""
    for measured in ("influence", "loss"):
        out = tmp_path / measured
        options = ["--student_layers", 2, "--student_layer_choice", "importance", "--batch_size", 40]
        rows = ["--dataset", texts / "train.csv", "--student_calibration_rows", 8]
        assert shrink(texts, out, *options, *rows, "--student_importance", measured) == 0
        said = json.loads((out / "shrink.json").read_text())["steps"]
        line = next(text for text in said if text.startswith("importance of bert.encoder.layer"))
        scores = [float(score) for score in line.partition(": ")[2].split(", ")]
        kept = BertForSequenceClassification.from_pretrained(out).config.hf_kd_layers["num_hidden_layers"]
        assert len(kept) == 2 and min(scores[i] for i in kept) >= sorted(scores)[-2] - 1e-9


def test_images_without_data(tmp_path):
    """A processor that is no tokenizer comes along; without rows nothing is measured."""
    config = ViTConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=4, image_size=8,
        patch_size=4, num_channels=1,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    make_image_processor({"image_size": 8, "num_channels": 1}).save_pretrained(tmp_path / "vit")
    out = tmp_path / "out"
    command = [
        "shrink",
        "--teacher",
        str(tmp_path / "vit"),
        "--output_dir",
        str(out),
        "--student_max_bytes",
        "0.4",
    ]
    assert main(command) == 0
    report = json.loads((out / "shrink.json").read_text())
    assert report["start"] == {} and report["bytes"]["student"] < 0.5 * report["bytes"]["teacher"]
    assert (out / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing is cut"),
        (["--student_layers", "1.5"], "student_layers=1.5 is neither a whole number nor a share"),
        (["--student_layers", "many"], "student_layers='many' is not a number"),
        (["--student_layers", "9"], "student_layers=9: num_layers=9 does not fit a teacher of 4 layers"),
        (["--student_hidden_size", "12"], "hidden_size=12 is no multiple of 8"),
        (["--student_layer_choice", "best"], "student_layer_choice='best'"),
        (["--student_layer_choice", "importance"], "needs rows: set dataset"),
        (["--student_vocabulary", "train"], "needs rows: set dataset"),
        (["--student_vocabulary", "nowhere.txt"], "is not a file"),
        (
            ["--student_layers", "1", "--student_importance", "loss"],
            "student_importance='loss' has no effect",
        ),
        (["--student_max_parameters", "100"], "the smallest that the search can make"),
        (["--student_max_latency_ms", "0"], "student_max_latency_ms=0.0 is not above 0"),
        (["--student_calibration_rows", "-1", "--student_layers", "1"], "student_calibration_rows=-1"),
        (["--student_layers", "1", "--batch_size", "0"], "batch_size=0"),
        (["--student_layers", "1", "--max_length", "0"], "max_length=0"),
        (["--student_layers", "1", "--teacher_dtype", "int3"], "teacher_dtype='int3'"),
        (["--student_layer", "1"], "did you mean '--student_layers'"),
    ],
)
def test_wrong_options_are_named(texts, tmp_path, capsys, flags, message):
    assert shrink(texts, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(texts, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert shrink(texts, tmp_path, "--student_layers", "1") == 2
    assert "is not empty" in capsys.readouterr().err and not (tmp_path / "config.json").exists()
    assert shrink(texts, tmp_path, "--student_layers", "1", "--overwrite") == 0
    assert (tmp_path / "config.json").exists() and (tmp_path / "mine.txt").exists()


def run_of(texts, out, *more, teacher="bert", data="train.csv"):
    common = (
        "--max_steps 2 --per_device_train_batch_size 8 --disable_tqdm --use_cpu --no_control --output_dir"
    )
    models = ["--teacher", str(texts / teacher), "--dataset", str(texts / data)]
    return [*models, *common.split(), str(out), *map(str, more)]


def test_distill_cuts_widths_and_vocabulary(texts, tmp_path):
    """Every size, from flags, and the same run again from the record that it left."""
    sizes = "--student_layers 0.5 --student_hidden_size 8 --student_intermediate_size 0.5"
    rest = "--student_vocabulary train --student_calibration_rows 8"
    results = runs.distill(*parse(run_of(texts, tmp_path, *sizes.split(), *rest.split())))
    student = BertForSequenceClassification.from_pretrained(tmp_path)
    own = student.config
    assert (own.num_hidden_layers, own.hidden_size, own.intermediate_size) == (2, 8, 16)
    assert results.arms["student"].parameters == sum(p.numel() for p in student.parameters())
    assert own.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path)) < results.arms["teacher"].parameters
    assert not hasattr(own, "hf_kd_vocabulary")  # an exported student has nothing of ours
    run, _ = parse(["--config", str(tmp_path / "distillation.yaml")])
    assert run.cuts == {
        "student_layers": 0.5, "student_hidden_size": 8, "student_intermediate_size": 0.5,
        "student_vocabulary": "train",
    }  # fmt: skip
    assert run.student_calibration_rows == 8


def test_distill_searches_and_goes_on_from_a_shrunk_folder(texts, tmp_path, capsys):
    """A target in YAML; then a student that `hf-kd shrink` left, with its trimmed vocabulary."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"teacher: {texts / 'llama'}\ndataset: {texts / 'train.txt'}\nmax_length: 12\nuse_cpu: true\n"
        f"student_max_parameters: 0.5\nstudent_max_bytes: 0.6\noutput_dir: {tmp_path / 'run'}\n"
    )
    setting = load(*parse(["--config", str(config)]))
    count = sum(p.numel() for p in setting.student.parameters())
    assert count <= 0.5 * sum(p.numel() for p in setting.teacher.parameters())
    assert "search: chosen" in capsys.readouterr().out.replace("\n", " ")
    cut = ["--student_layers", 2, "--student_vocabulary", texts / "train.txt"]
    assert shrink(texts, tmp_path / "small", *cut, teacher="llama") == 0
    more = ["--student", tmp_path / "small", "--max_length", 12, "--temperature", 1]
    results = runs.distill(*parse(run_of(texts, tmp_path / "out", *more, teacher="llama", data="train.txt")))
    assert results.arms["student"].eval_kl > 0
    assert "teacher_mass_dropped" in results.arms["student"].metrics


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student_layers", "1.0"], "student_layers=1.0 is neither"),
        (["--student_layers", "7"], "does not fit a teacher of 4 layers"),
        (["--student_hidden_size", "0.5", "--student", "x"], "student='x' and student_hidden_size=0.5"),
        (["--student_max_parameters", "10"], "the smallest that the search can make"),
        (["--student_layers", '{"decoder_layers": 1}'], "the teacher's stacks are"),
    ],
)
def test_check_finds_a_bad_cut_before_training(texts, tmp_path, capsys, flags, message):
    assert main(["check", *run_of(texts, tmp_path / "out", *flags)]) == 2
    assert message in capsys.readouterr().err


def test_a_cut_and_another_student_replace_each_other():
    """A flag for one of them drops what the recipe says of the others; sizes are kept together."""
    run, _ = parse(["--config", "sst2", "--student_hidden_size", "0.5"])
    assert run.student_layers == 3 and run.student_hidden_size == 0.5
    run, _ = parse(["--config", "sst2", "--student", "x"])
    assert run.cuts == {} and run.student == "x"
    run, _ = parse(["--config", "digits", "--student_max_parameters", "2e4"])
    assert run.student_config is None and run.student_max_parameters == 20_000


def test_python_takes_numbers_mappings_and_lists():
    given = RunOptions(
        teacher="t", dataset="d", student_layers={"encoder_layers": 2}, student_layer_choice=[0, 1],
        student_max_bytes=0.5,
    )  # fmt: skip
    assert given.run_problems() == []
    assert given.cuts["student_layers"] == {"encoder_layers": 2}
    assert given.init_arguments()["layers"] == [0, 1] and given.init_arguments()["max_bytes"] == 0.5
    bad = RunOptions(teacher="t", dataset="d", student_layers={"encoder_layers": -2})
    assert "student_layers[encoder_layers]=-2 is not positive" in bad.run_problems()[0]
    assert len(NAMES) == 12
