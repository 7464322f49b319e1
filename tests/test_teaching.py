"""Other teachers than one model, through the command line: several, the student's own, in fewer bits."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kd import DistillationTrainer, teachers
from hf_kd import run as runs
from hf_kd.cli import main
from hf_kd.config import parse
from hf_kd.results import Results
from hf_kd.teachers.models import ModelTeacher, fingerprint
from hf_kd.teachers.quantise import loading_options, quantise

from .test_run import text_run, texts  # noqa: F401  (a fixture)
from .test_teachers import batch_of
from .test_trainer import arguments, classifiers, text_rows

SHORT = "--max_steps 2 --per_device_train_batch_size 8 --disable_tqdm --use_cpu --no_control".split()


def command(folder: Path, out: Path, *more: str) -> list[str]:
    """A short run on texts, as flags."""
    data = ["--student", str(folder / "student"), "--dataset", str(folder / "train.csv")]
    return ["distill", *data, *SHORT, "--output_dir", str(out), *more]


@pytest.mark.parametrize(
    "more",
    [
        ["--ensemble_weighting", "learned"],
        ["--ensemble_weights", "1", "3", "--ensemble_temperature", "2", "--ensemble_offload"],
        ["--ensemble_weighting", "confidence"],
    ],
)
def test_several_teachers(texts: Path, tmp_path: Path, more: list[str]) -> None:  # noqa: F811
    """Averaged, with weights given, learned or by confidence, each in its own label order."""
    two = ["--teachers", str(texts / "teacher"), str(texts / "student")]
    assert main(command(texts, tmp_path, *two, *more)) == 0
    results = Results.read(tmp_path / "results.json")
    assert results.arms["student"].eval_kl > 0
    run, args = parse(["--config", str(tmp_path / "distillation.yaml")])
    assert run.teachers == two[1:] and args.ensemble_weighting in more + ["fixed"]


def test_rows_of_two_domains(texts: Path, tmp_path: Path) -> None:  # noqa: F811
    """The `teacher_id` column of the data, from a file to the teacher, and a missing one is named."""
    lines = (texts / "train.csv").read_text(encoding="utf-8").splitlines()
    rows = [f"{line},{5 + i % 2}" for i, line in enumerate(lines[1:])]
    text = "\n".join([lines[0] + ",teacher_id", *rows]) + "\n"
    (tmp_path / "routed.csv").write_text(text, encoding="utf-8")
    config = {
        "teachers": [str(texts / "teacher"), str(texts / "student")],
        "teacher_routes": {"5": 1, "6": 0},
        "alpha": 1.0,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    flags = command(texts, tmp_path / "out", "--config", str(tmp_path / "run.yaml"))
    flags[flags.index("--dataset") + 1] = str(tmp_path / "routed.csv")
    assert main(flags) == 0
    flags[flags.index("--dataset") + 1] = str(texts / "train.csv")
    assert main(flags) == 2


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_student_that_teaches_itself(texts: Path, tmp_path: Path, kind: str) -> None:  # noqa: F811
    """`--teacher` stays what the table compares with."""
    own = ["--teacher", str(texts / "teacher"), "--self_teacher", kind, "--self_teacher_dropout"]
    assert main(command(texts, tmp_path, *own, "--ema_decay", "0.5", "--ema_decay_end", "0.9")) == 0
    assert set(Results.read(tmp_path / "results.json").arms) == {"teacher", "student"}


@pytest.mark.parametrize(
    "more", [["--teacher_quantization", "int8-dynamic"], ["--teacher_device_map", "cpu"]]
)
def test_teacher_in_int8_or_placed_by_a_map(texts: Path, tmp_path: Path, more: list[str]) -> None:  # noqa: F811
    """Trap 27: from the command line to a finished run."""
    assert main(command(texts, tmp_path, "--teacher", str(texts / "teacher"), *more)) == 0
    assert Results.read(tmp_path / "results.json").arms["student"].eval_kl > 0


def test_check_says_what_the_teacher_is_worth(
    texts: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Score, calibration, entropy at several temperatures, and what `auto` takes."""
    flags = command(texts, tmp_path, "--teacher", str(texts / "teacher"), "--temperature", "auto")
    flags += ["--target_correction", "swap", "--kd_weighting", "confidence", "--teacher_calibration"]
    assert main(["check", *flags[1:]]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in ("teacher's own score: accuracy", "ECE", "at T = 8", "temperature='auto': would take"):
        assert text in said
    assert main(flags) == 0


def test_int8_is_near_and_leaves_the_model_alone() -> None:
    """The copy holds int8 linear layers, and answers nearly alike."""
    _, model = classifiers()
    before = fingerprint(model)
    small = quantise(model, "int8-dynamic", torch.device("cpu"))
    kinds = {m._get_name() for m in small.modules()}  # type: ignore[no-untyped-call]
    assert "DynamicQuantizedLinear" in kinds and "Linear" not in kinds
    batch = batch_of()
    one, other = (ModelTeacher(m, ("logits",))(batch).dense()["logits"] for m in (model, small))
    assert 0 < (one - other).abs().max() < 0.05 * one.abs().max()
    assert fingerprint(model) == before


def test_quantisation_that_cannot_be_is_named(tmp_path: Path, caplog: Any) -> None:
    """Trap 27: off the CPU, without bitsandbytes, or of a model that is in memory."""
    _, model = classifiers()
    with pytest.raises(ValueError, match="runs on the CPU, but the device is 'cuda'"):
        quantise(model, "int8-dynamic", torch.device("cuda"))
    with pytest.raises(ValueError, match="teacher_quantization='bnb-4bit'.*in memory"):
        quantise(model, "bnb-4bit", torch.device("cpu"))
    with pytest.raises(ValueError, match="teacher_quantization='bnb-8bit' needs bitsandbytes"):
        loading_options("bnb-8bit")
    assert loading_options("int8-dynamic") == {}
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="teacher_quantization='int4'"):
        arguments(tmp_path, teacher_quantization="int4")


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_asked_of_bitsandbytes(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 27: it quantises while the checkpoint is read, and what it made is neither moved nor cast."""
    student, model = classifiers()
    asked: dict[str, Any] = {}

    def load(name: str, task: str | None, **options: Any) -> Any:
        asked.update(options, name=name)
        return model

    def moved(*_: Any, **__: Any) -> None:
        raise AssertionError("a quantised model is moved")

    find, version = importlib.util.find_spec, importlib.metadata.version
    there = {"bitsandbytes": "0.46.1"}  # as if it were installed
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: there.get(n) or find(n, *a))
    monkeypatch.setattr(importlib.metadata, "version", lambda n: there.get(n) or version(n))
    monkeypatch.setattr(teachers, "load_model", load)
    model.is_quantized, model.to = True, moved  # type: ignore[method-assign, assignment]
    args = arguments(tmp_path, teacher_quantization=f"bnb-{bits}bit", teacher_device_map="auto")
    trainer = DistillationTrainer(student, args, teacher="some/teacher", train_dataset=text_rows())
    config = asked["quantization_config"]
    assert (config.load_in_8bit, config.load_in_4bit) == (bits == 8, bits == 4)
    assert asked["name"] == "some/teacher" and asked["device_map"] == "auto"
    assert isinstance(trainer.teacher, ModelTeacher) and trainer.teacher.model is model


def test_learned_weights_are_those_that_the_table_compares_with(texts: Path, tmp_path: Path) -> None:  # noqa: F811
    """What was learned in training is fixed for the comparison, and recorded."""
    more = ["--teachers", str(texts / "teacher"), str(texts / "student"), "--ensemble_weighting", "learned"]
    run, args = text_run(texts, tmp_path, *more, "--no_control")
    run.teacher = run.teachers[0]
    results = runs.distill(run, args)
    assert len(results.provenance["options"]["ensemble_weights"]) == 2
