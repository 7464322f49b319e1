"""The command line, in this process and as the processes that a user starts."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_kd import cli, recipes
from hf_kd.options import GenerateOptions, ShrinkOptions, TeachOptions

ROOT = Path(__file__).parent.parent
TINY = [
    "--teacher_config", '{"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, '
    '"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}',
    "--student_config", '{"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}',
    "--max_train_samples", "48", "--max_eval_samples", "16", "--teacher_epochs", "1", "--max_steps", "2",
    "--per_device_train_batch_size", "8", "--teacher_batch_size", "8", "--warmup_steps", "0",
    "--disable_tqdm",
]  # fmt: skip


def run(*arguments: str, launcher: tuple[str, ...]):
    """Start a process as a user would, without network."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["distill", "--help"], ["check", "-h"], ["recipes"]])
def test_help_needs_no_torch(arguments):
    code = (
        "import sys; from hf_kd.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status or any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'numpy')))"
    )
    done = run(*arguments, launcher=("-c", code))
    assert done.returncode == 0, done.stderr
    assert "hf-kd" in done.stdout


def test_help_is_about_a_screen_and_has_every_option_of_ours(capsys):
    assert cli.main(["distill", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        f"--{name}" in text for name in ("alpha", "temperature", "divergence", "teacher", "dataset", "task")
    )
    assert "--learning_rate" in text and "--help-all" in text
    assert len(text.splitlines()) < 75
    assert max(map(len, text.splitlines())) <= 110


def test_help_names_only_options_that_exist():
    from dataclasses import fields

    from transformers import TrainingArguments

    assert set(cli.TRAINING) <= {field.name for field in fields(TrainingArguments)}


@pytest.mark.parametrize(
    ("command", "options"),
    [("generate", GenerateOptions), ("teach", TeachOptions), ("shrink", ShrinkOptions)],
)
def test_a_command_describes_every_option_of_its_own(capsys, command, options):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  --{spec.name} " in text for spec in dataclasses.fields(options))


def test_help_all_has_trainers_options(capsys):
    assert cli.main(["distill", "--help-all"]) == 0
    assert "--adam_beta1" in capsys.readouterr().out


def test_recipes_are_listed_and_printed(capsys):
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipes.names())
    assert cli.main(["recipes", "sst2"]) == 0
    assert capsys.readouterr().out == recipes.text("sst2")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distil"], "unknown command 'distil', did you mean 'distill'?"),
        (["recipes", "sst"], "did you mean 'sst2'?"),
        (["distill", "--temprature", "4"], "did you mean '--temperature'?"),
        (["check", "--temp", "4"], "unknown option --temp"),
        (["distill", "--alpha", "3"], "alpha=3.0 is outside [0, 1]"),
        (["distill", "--config", "nowhere.yaml"], "config='nowhere.yaml' does not exist"),
    ],
)
def test_wrong_use_is_one_line_on_stderr(capsys, arguments, expected):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hf-kd: error: ")
    assert expected in captured.err
    assert captured.out == ""


def test_everything_that_does_not_exist_comes_in_one_message(capsys, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n", encoding="utf-8")
    missing = [
        f"--teacher={tmp_path}/teacher",
        f"--student={tmp_path}/student",
        f"--dataset={tmp_path}/trian.csv",
    ]
    assert cli.main(["distill", *missing, "--task", "sequence-classification"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("hf-kd: error: 3 options are wrong")
    assert all(f"{option}=" in message for option in ("teacher", "student", "dataset"))
    assert "train.csv" in message


def test_errors_of_other_libraries_keep_their_traceback(monkeypatch):
    """A message that was not written for users is no help without its place."""
    monkeypatch.setitem(cli.COMMANDS, "distill", lambda argv: json.loads("{"))
    with pytest.raises(ValueError):
        cli.main(["distill"])


def test_the_module_runs_as_a_command():
    done = run("recipes", "sst", launcher=("-m", "hf_kd"))
    assert done.returncode == 2
    assert "did you mean 'sst2'?" in done.stderr and "Traceback" not in done.stderr


def test_accelerate_launch_runs_the_default_recipe_on_two_processes(tmp_path, capsys):
    """The shipped configuration starts two ranks that see half a batch each, and one of them writes.

    The three arms, the table, and a run that can be repeated. One process alone is what `make demo` starts.
    """
    out = tmp_path / "out"
    config = str(ROOT / "hf_kd/accelerate/cpu2.yaml")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", config, "scripts/distill.py")
    done = run(*TINY, "--output_dir", str(out), launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(results["arms"]) == {"teacher", "student", "control"}
    assert results["arms"]["student"]["parameters"] < results["arms"]["teacher"]["parameters"]
    assert results["provenance"]["processes"] == 2
    assert results["examples"] == 16
    assert all(word in done.stdout for word in ("accuracy", "agreement", "latency"))
    assert done.stdout.count("Gap closed:") == 1
    assert cli.main(["distill", "--config", str(out / "distillation.yaml"), "--temperature", "3"]) == 0
    assert "temperature=3.0" in capsys.readouterr().out
