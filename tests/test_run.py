"""Runs of the command line in this process: what is trained, compared, saved and used again."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ViTForImageClassification
from transformers.trainer_utils import HubStrategy

from hf_kd import run as runs
from hf_kd import run_teacher
from hf_kd import setting as settings
from hf_kd.config import parse
from hf_kd.data.processors import train_tokenizer
from hf_kd.loading import load_model
from hf_kd.results import Results
from hf_kd.trainer import DistillationTrainer

CANARY = "hf_canaryTOKENcanaryTOKENcanary00"
VIT = {
    "model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


def digits(out, *more: str):
    """Options of a run on digits that takes a second or two."""
    sizes = [
        "--teacher_config",
        json.dumps(VIT),
        "--student_config",
        '{"hidden_size": 8, "intermediate_size": 8}',
    ]
    length = (
        "--max_train_samples 48 --max_eval_samples 16 --teacher_epochs 1 --max_steps 3 --eval_strategy no"
    )
    rest = "--teacher_batch_size 8 --warmup_steps 0 --per_device_train_batch_size 8 --disable_tqdm --use_cpu"
    return parse([*sizes, *length.split(), *rest.split(), "--alpha", "0.7", "--output_dir", str(out), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on digits: its folder, its results, and the weights that each training started from."""
    out = tmp_path_factory.mktemp("digits")
    started: list[tuple[float, int, dict[str, torch.Tensor]]] = []
    train = DistillationTrainer.train

    def spy(self, *args, **kwargs):
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        started.append((self.args.alpha, self.args.seed, state))
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "train", spy)
        patch.setenv("HF_TOKEN", CANARY)
        said = io.StringIO()
        heard = logging.StreamHandler(said)
        logging.getLogger().addHandler(heard)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                results = runs.distill(*digits(out, "--hub_token", CANARY))
                with pytest.raises(ValueError) as error:
                    runs.distill(*digits(out, "--hub_token", CANARY, "--slices", "nothing"))
        finally:
            logging.getLogger().removeHandler(heard)
    (out / "said.txt").write_text(f"{said.getvalue()}\n{error.value!r}")
    return out, results, started


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A teacher and a student for two classes of text, with a tokenizer, and data in a csv file."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [
        (f"{'good' if i % 2 else 'bad'} film number {i}", ("negative", "positive")[i % 2]) for i in range(40)
    ]
    csv = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    (folder / "train.csv").write_text(csv, encoding="utf-8")
    tokenizer = train_tokenizer([text for text, _ in rows], 300, task="sequence-classification")
    names = {
        "teacher": ("negative", "positive"),
        "student": ("positive", "negative"),
        "headless": ("LABEL_0",) * 0,
    }
    for name, labels in names.items():
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id,
            **run_teacher.head_of([*labels], None) if labels else {},
        )  # fmt: skip
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        (model if labels else model.bert).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def text_run(folder, out, *more: str, student: str = "student"):
    models = ["--teacher", str(folder / "teacher"), "--student", str(folder / student)]
    rest = "--max_steps 2 --per_device_train_batch_size 8 --disable_tqdm --use_cpu --output_dir"
    return parse([*models, "--dataset", str(folder / "train.csv"), *rest.split(), str(out), *more])


def test_three_arms_are_measured_alike(finished):
    _, results, _ = finished
    assert list(results.arms) == ["teacher", "student", "control"]
    assert results.primary_metric == "accuracy"
    assert results.examples == 16
    teacher, student, control = results.arms.values()
    assert (teacher.eval_kl, teacher.eval_agreement) == (0.0, 1.0)
    for arm in (student, control):
        assert arm.eval_kl > 0 and 0 <= arm.eval_agreement <= 1
    assert student.parameters == control.parameters < teacher.parameters
    inputs = [[(t.batch_size, t.inputs) for t in arm.latency] for arm in results.arms.values()]
    assert [rows for rows, _ in inputs[0]] == [16, 1, 8] and inputs[0] == inputs[1] == inputs[2]
    for name, arm in results.arms.items():
        assert arm.bytes_on_disk > 0, name
        assert arm.peak_memory > arm.bytes, name


def test_a_token_is_in_nothing_that_a_run_leaves_or_says(finished):
    """`HF_TOKEN` and `hub_token` were set: not in a file of the run, its report, its log or an error."""
    out, _, _ = finished
    files = [path for path in out.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"results.json", "report.html", "README.md", "distillation.yaml", "said.txt"} <= names
    said = (out / "said.txt").read_text()
    assert "step 3 of 3  loss" in said and "accuracy" in said and "slices='nothing' is no column" in said
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_where_the_numbers_come_from_is_in_the_file(finished):
    """Seeds, versions, data, teacher, revision, hardware, time and energy, and every resolved option."""
    _, results, _ = finished
    made = results.provenance
    assert made["seed"] == 42 and made["resolved"]["seed"] == 42 and "lr_scheduler_type" in made["resolved"]
    assert {"hf-kd", "torch", "transformers", "datasets"} <= made["versions"].keys()
    assert made["data"]["test"]["rows"] == results.examples and len(made["data"]["train"]["hash"]) == 16
    assert len(made["teacher_identity"]["fingerprint"]) == 16
    assert made["minutes"] > 0 and made["started"].startswith("20")
    assert made["energy"]["how"].startswith(("not measured", "processor packages"))
    assert results.machine["cpu"] and results.machine["cores"]


def test_behaviour_is_that_of_the_rows_that_were_scored(finished):
    out, results, _ = finished
    seen = results.behaviour
    assert sum(map(sum, seen.agreement)) == results.examples
    same = sum(seen.agreement[i][i] for i in range(len(seen.classes))) / results.examples
    assert same == pytest.approx(results.arms["student"].eval_agreement)
    assert seen.calibration.keys() == results.arms.keys()
    for name, curve in seen.calibration.items():
        right = sum(a * n for a, n in zip(curve.accuracy, curve.count, strict=True)) / results.examples
        assert right == pytest.approx(results.arms[name].metrics["accuracy"])
    assert any("loss_kd" in row for row in results.training)
    assert results.provenance["options"]["alpha"] == 0.7
    assert "Where the two differ most" in (out / "report.html").read_text(encoding="utf-8")


def test_the_control_differs_by_the_teacher_alone(finished):
    """Trap 51: the same initial weights, seed and steps, alpha = 0."""
    _, _, started = finished
    (_, _, teacher), (alpha, seed, student), (none, control_seed, control) = started
    assert (alpha, none) == (0.7, 0.0) and seed == control_seed
    assert student.keys() == control.keys()
    assert all(torch.equal(student[name], control[name]) for name in student)


def test_results_and_options_are_saved_beside_a_plain_student(finished):
    out, results, _ = finished
    assert Results.read(out / "results.json").arms == results.arms
    model = ViTForImageClassification.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == results.arms["student"].parameters
    assert not any("teacher" in str(value) for value in model.config.to_dict().values())
    assert (out / "preprocessor_config.json").is_file()
    folders = {
        path.name for path in out.iterdir() if path.is_dir() and not path.name.startswith("checkpoint")
    }
    assert folders == {"control", "teacher"}
    run, args = parse(["--config", str(out / "distillation.yaml")])
    assert run.dataset == "builtin:digits" and args.alpha == 0.7


def test_a_trained_teacher_is_used_again_until_an_option_of_its_own_changes(finished):
    out, _, _ = finished
    same = settings.load(*digits(out, "--temperature", "3", "--learning_rate", "0.1", "--no_control"))
    assert not same.untrained
    saved = ViTForImageClassification.from_pretrained(out / "teacher")
    assert torch.equal(same.teacher.classifier.weight, saved.classifier.weight)
    other = settings.load(*digits(out, "--teacher_learning_rate", "0.01"))
    assert other.untrained
    assert not torch.equal(other.teacher.classifier.weight, saved.classifier.weight)


def test_problems_are_found_before_the_teacher_is_trained(tmp_path):
    """No minutes for a teacher whose student cannot be trained."""
    for flags, expected in (
        (["--kl_threshold", "0.1"], "eval_strategy"),
        (["--student_config", '{"hiden_size": 8}'], "hidden_size"),
    ):
        with pytest.raises(ValueError, match=expected):
            runs.distill(*digits(tmp_path, *flags))
    assert not (tmp_path / "teacher").exists()


def test_looking_for_problems_leaves_the_teacher_trainable(tmp_path):
    setting = settings.load(*digits(tmp_path))
    before = [p.requires_grad for p in setting.teacher.parameters()]
    runs.refuse_problems(setting)
    assert [p.requires_grad for p in setting.teacher.parameters()] == before


def test_the_teachers_training_has_its_own_options(tmp_path):
    run, args = digits(
        tmp_path, "--teacher_learning_rate", "0.5", "--teacher_batch_size", "4", "--kl_threshold", "1"
    )
    own = run_teacher.teacher_arguments(run, args)
    assert (own.learning_rate, own.per_device_train_batch_size, own.num_train_epochs) == (0.5, 4, 1.0)
    assert (own.max_steps, own.alpha, own.kl_threshold) == (-1, 0.0, None)
    run = dataclasses.replace(run, teacher_epochs=None)
    assert run_teacher.teacher_arguments(run, args).max_steps == args.max_steps


def test_a_student_of_its_own_keeps_its_label_order(texts, tmp_path):
    """Trap 32: teacher and student name the same labels in another order; each is scored in its own."""
    setting = settings.load(*text_run(texts, tmp_path))
    assert setting.student.config.id2label == {0: "positive", 1: "negative"}
    ids = {model: [row["labels"] for row in data.eval] for model, data in
           (("student", setting.data), ("teacher", setting.teacher_data))}  # fmt: skip
    assert ids["student"] == [1 - i for i in ids["teacher"]]
    results = runs.distill(*text_run(texts, tmp_path))
    assert set(results.arms) == {"teacher", "student", "control"}


def test_a_student_without_a_head_gets_the_teachers_labels(texts, tmp_path, caplog):
    """What is new of it is one line."""
    setting = settings.load(*text_run(texts, tmp_path, student="headless"))
    new = [record.getMessage() for record in caplog.records if "classifier" in record.getMessage()]
    assert len(new) == 1 and new[0].endswith(
        "2 weights are new, to be trained: classifier.bias, classifier.weight"
    )
    assert setting.student.config.id2label == {0: "negative", 1: "positive"}
    assert setting.data is setting.teacher_data or len(setting.data.eval) == len(setting.teacher_data.eval)


@contextlib.contextmanager
def heard():
    """What Transformers logs, as text."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("transformers").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("transformers").removeHandler(handler)


def test_a_head_of_another_size_is_one_line_and_no_table(texts, caplog):
    with heard() as theirs:
        load_model(
            str(texts / "teacher"), "sequence-classification", role="student", new_head=True, num_labels=5
        )
    assert "classifier" not in theirs.getvalue()
    assert caplog.messages[-1].endswith(
        "2 weights are new, to be trained: classifier.bias, classifier.weight"
    )


def test_a_teacher_without_a_head_is_refused_unless_it_is_trained(texts, tmp_path):
    """Trap 37: a head that was just initialised at random teaches noise. Said once, by the error."""
    headless = text_run(
        texts, tmp_path, "--teacher", str(texts / "headless"), "--task", "sequence-classification"
    )
    with heard() as theirs, pytest.raises(ValueError, match="classifier.*would be random"):
        settings.load(*headless)
    assert "classifier" not in theirs.getvalue()
    run, args = text_run(texts, tmp_path, "--teacher", str(texts / "headless"), "--train_teacher",
                         "--task", "sequence-classification", "--teacher_epochs", "1")  # fmt: skip
    setting = settings.with_trained_teacher(settings.load(run, args))
    assert setting.teacher.config.id2label == {0: "negative", 1: "positive"}
    assert (tmp_path / "teacher" / run_teacher.TRAINED_FILE).is_file()


def test_quality_is_reported_by_length_label_and_columns_of_the_data(texts, tmp_path):
    kinds = (("bad", "negative"), ("good", "positive"))
    rows = "text,label,source\n" + "".join(
        f"{kinds[i % 2][0]} film {'number ' * (i % 5)},{kinds[i % 2][1]},{'ab'[i % 3 == 0]}\n"
        for i in range(60)
    )
    (tmp_path / "rows.csv").write_text(rows, encoding="utf-8")
    flags = [
        "--dataset",
        str(tmp_path / "rows.csv"),
        "--slices",
        "source",
        "length",
        "label",
        "--watts",
        "60",
    ]
    results = runs.distill(*text_run(texts, tmp_path / "out", *flags))
    for by in ("source", "length", "label"):
        parts = [part for part in results.slices if part.by == by]
        assert sum(part.rows for part in parts) == results.examples and len(parts) > 1
        for name, arm in results.arms.items():
            right = sum(part.scores[name].value * part.rows for part in parts)
            assert right / results.examples == pytest.approx(arm.metrics["accuracy"])
    assert results.provenance["energy"]["wh"] > 0
    assert Results.read(tmp_path / "out" / "results.json") == results
    with pytest.raises(
        ValueError, match="slices='sauce' is no column of the data: use some of length, label"
    ):
        settings.load(*text_run(texts, tmp_path, *flags[:2], "--slices", "sauce"))


def test_labels_are_not_needed_at_alpha_one(texts, tmp_path):
    (tmp_path / "plain.csv").write_text("text\n" + "a good film\n" * 20, encoding="utf-8")
    flags = ["--dataset", str(tmp_path / "plain.csv"), "--alpha", "1", "--unlabelled"]
    results = runs.distill(*text_run(texts, tmp_path / "out", *flags))
    assert list(results.arms) == ["teacher", "student"]
    assert results.primary_metric is None
    assert results.arms["student"].eval_kl is not None


def test_check_trains_nothing_and_prints_what_would_run(texts, tmp_path, capsys):
    assert runs.check(*text_run(texts, tmp_path / "out"), launch="accelerate launch it") == []
    text = capsys.readouterr().out
    assert "accelerate launch it" in text and "BertForSequenceClassification" in text
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.safetensors"))


def test_check_returns_the_problems(texts, tmp_path):
    problems = runs.check(*text_run(texts, tmp_path, "--kl_threshold", "0.1"), launch="")
    assert [problem.option for problem in problems] == ["kl_threshold"]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [(None, None), ("false", None), ("true", "checkpoint-20"), ("some/where", "some/where")],
)
def test_resume_means_the_last_checkpoint_or_a_path(tmp_path, wish, expected):
    for step in (3, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    found = runs._checkpoint(wish, tmp_path)
    assert found == (str(tmp_path / expected) if wish == "true" else expected)
    assert runs._checkpoint("true", tmp_path / "nothing") is None


def test_a_run_resumes_from_its_last_checkpoint(tmp_path):
    """An interrupted run, resumed, ends with the weights of an uninterrupted one."""
    flags = [
        "--no_control",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--lr_scheduler_type",
        "constant",
    ]
    whole = runs.distill(*digits(tmp_path / "whole", *flags, "--max_steps", "4"))
    runs.distill(*digits(tmp_path / "parts", *flags, "--max_steps", "2"))
    parts = runs.distill(
        *digits(tmp_path / "parts", *flags, "--max_steps", "4", "--resume_from_checkpoint", "true")
    )
    assert parts.arms["student"].metrics == whole.arms["student"].metrics
    assert parts.arms["student"].eval_kl == whole.arms["student"].eval_kl


def test_a_run_uploads_no_checkpoints_with_their_neighbours(texts, tmp_path):
    run, args = text_run(texts, tmp_path / "out")
    args.push_to_hub, args.hub_strategy = True, HubStrategy.CHECKPOINT
    with pytest.raises(ValueError, match="hub_strategy='checkpoint' uploads checkpoints.*hub_strategy='end'"):
        runs.distill(run, args)


def test_losses_on_layers_from_flags_and_from_yaml(texts, tmp_path):
    """Each weight and its options, pairs of layers too: the same from flags and from the file they leave."""
    weights = {"hidden": 1.0, "attention": 0.5, "relation": 0.25, "embedding": 0.1, "last_hidden": 0.2}
    flags = [word for name, value in weights.items() for word in (f"--{name}_weight", str(value))]
    more = "--relations qq,vv --relation_heads 2 --hidden_loss mse --attention_loss mse --no_control"
    pairs = ["--layer_map", '{"0": 1, "-1": "-1"}', "--logging_steps", "1"]
    first = runs.distill(*text_run(texts, tmp_path / "a", *flags, *more.split(), *pairs))
    logged = {name: row[name] for row in first.training for name in row if name.startswith("loss_")}
    assert {f"loss_{name}" for name in weights} <= logged.keys()
    assert all(logged[f"loss_{name}"] > 0 for name in weights)
    again = parse(
        ["--config", str(tmp_path / "a" / "distillation.yaml"), "--output_dir", str(tmp_path / "b")]
    )
    assert again[1].layer_map == {"0": 1, "-1": "-1"} and again[1].relations == "qq,vv"
    second = runs.distill(*again)
    assert [{k: v for k, v in row.items() if "loss" in k} for row in second.training] == [
        {k: v for k, v in row.items() if "loss" in k} for row in first.training
    ]
