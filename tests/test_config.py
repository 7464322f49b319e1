"""Flags and YAML: the same converters, strict names, and a dump that reads back."""

from __future__ import annotations

import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import yaml

from hf_kd import recipes
from hf_kd.config import DistillationArguments, help_all, parse
from hf_kd.losses.divergences import forward_kl
from hf_kd.options import DistillationOptions
from hf_kd.records import OPTIONS_FILE, write_options

MODELS = ["--teacher", "t", "--student", "s", "--dataset", "d"]


@pytest.fixture
def write(tmp_path):
    """Write YAML and return its path."""

    def to_file(text: str) -> str:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return to_file


@pytest.fixture
def saved(tmp_path):
    """The text of the `distillation.yaml` that a run saves."""

    def text_of(run, args) -> str:
        write_options(tmp_path, SimpleNamespace(run_options=dataclasses.asdict(run), args=args))
        return (tmp_path / OPTIONS_FILE).read_text(encoding="utf-8")

    return text_of


def parse_yaml(write, text: str, *flags: str):
    return parse(["--config", write("teacher: t\nstudent: s\ndataset: d\n" + text), *flags])


def test_yaml_scalars_go_through_the_flags_converters(write):
    """`2e-5` has no dot and is a string to YAML 1.1; `no` is a word, and null is nothing."""
    run, args = parse_yaml(
        write,
        "learning_rate: 2e-5\nweight_decay: 1E-2\nmax_steps: 10\nwarmup_steps: 3\neval_strategy: no\n"
        "teacher_revision: 0123e4\nkl_threshold: null\nbf16: false\nmax_length: ~\n",
    )
    assert args.learning_rate == 2e-5 and args.weight_decay == 0.01
    assert args.max_steps == 10 and isinstance(args.max_steps, int)
    assert args.eval_strategy.value == "no"
    assert args.teacher_revision == "0123e4"
    assert args.kl_threshold is None and run.max_length is None


def test_yaml_equals_flags(write):
    text = "alpha: 0.25\ntemperature: 3\nmetrics: [accuracy, f1]\ncontrol: false\nlearning_rate: 1e-3\n"
    flags = "--alpha 0.25 --temperature 3 --metrics accuracy f1 --no_control --learning_rate 1e-3".split()
    from_yaml, from_flags = parse_yaml(write, text), parse([*MODELS, *flags])
    assert from_yaml[0] == from_flags[0]
    assert from_yaml[1].to_dict() == from_flags[1].to_dict()


def test_flags_beat_yaml(write):
    _, args = parse_yaml(write, "alpha: 0.25\ntemperature: 3\n", "--temperature", "4")
    assert (args.alpha, args.temperature) == (0.25, 4.0)
    run, _ = parse_yaml(
        write, "control: true\ntrain_teacher: true\n", "--no-control", "--train-teacher=false"
    )
    assert run.control is False and run.train_teacher is False


def test_mappings_keep_their_types(write):
    run, args = parse(
        [
            "--config",
            write(
                "teacher: t\ndataset: d\nstudent_config: {hidden_size: 32, layer_norm_eps: 1e-6, act: no}\n"
                "divergence: jsd\ndivergence_options: {beta: 0.3}\nlr_scheduler_kwargs:\n  min_lr: 1e-7\n"
            ),
        ]
    )
    assert run.student_config == {"hidden_size": 32, "layer_norm_eps": 1e-6, "act": "no"}
    assert args.divergence_options == {"beta": 0.3}
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-7}
    _, args = parse([*MODELS, "--divergence", "jsd", "--divergence_options", '{"beta": 0.3}'])
    assert args.divergence_options == {"beta": 0.3}


def test_one_value_is_a_list_of_one(write):
    assert parse_yaml(write, "metrics: accuracy\n")[0].metrics == ["accuracy"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temprature: 4\n", "line 4: unknown option 'temprature', did you mean 'temperature'?"),
        ("alpha: much\n", "alpha: 'much' is not a number"),
        ("alpha: true\n", "alpha: 'true' is not a number"),
        ("max_steps: 1.5\n", "max_steps: '1.5' is not a whole number"),
        ("control: maybe\n", "control: Truthy value expected"),
        ("alpha: [0.5]\n", "alpha: takes one value, not a list"),
        ("alpha: {a: 1}\n", "alpha: takes no mapping"),
        ("alpha: null\n", "alpha: takes no null; leave it out for the default, 0.9"),
        ("metrics: [[a]]\n", "metrics: takes a flat list"),
        ("lr_scheduler_type: lineer\n", "lr_scheduler_type: 'lineer' is not known: use one of linear"),
        ("alpha: 0.5\nalpha: 0.6\n", "line 5: 'alpha' is set twice"),
        ("alpha: [\n", "is not YAML"),
    ],
)
def test_wrong_yaml_names_file_line_and_option(write, text, expected):
    with pytest.raises(ValueError) as error:
        parse_yaml(write, text)
    assert "my.yaml" in str(error.value)
    assert expected in str(error.value)


def test_a_yaml_list_is_no_config(write):
    with pytest.raises(ValueError, match="must be a mapping"):
        parse(["--config", write("- alpha\n")])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--temprature", "4"], "unknown option --temprature, did you mean '--temperature'?"),
        (["--learning-rte=4"], "unknown option --learning-rte, did you mean '--learning_rate'?"),
        (["--temp", "4"], "unknown option --temp"),  # an abbreviation
        (["--confg", "x"], "did you mean '--config'?"),
        (["extra"], "unexpected argument 'extra'"),
        (["--alpha", "much"], "alpha='much' is not a number"),
        (["--config"], "--config needs a value"),
        (["--config", "digit"], "did you mean 'digits'?"),
        (["--config", "nowhere/my.yaml"], "config='nowhere/my.yaml' does not exist"),
    ],
)
def test_wrong_flags_name_the_nearest(flags, expected):
    with pytest.raises(ValueError) as error:
        parse([*MODELS, *flags])
    assert expected in str(error.value)


def test_problems_of_models_data_and_loss_come_together():
    with pytest.raises(ValueError) as error:
        parse(
            ["--teacher", "t", "--dataset", "d", "--alpha", "2", "--temperature", "0", "--divergence", "jsdd"]
        )
    assert all(part in str(error.value) for part in ("no student", "alpha=2.0", "temperature=0.0"))


def test_a_flag_replaces_its_alternatives_in_yaml(write):
    """Naming another teacher or student than the recipe's is no contradiction."""
    run, _ = parse(["--config", "digits", "--teacher", "elsewhere", "--student_layers", "2"])
    assert (run.teacher, run.teacher_config) == ("elsewhere", None)
    assert (run.student_layers, run.student_config) == (2, None)


def test_digits_is_the_default_recipe_only_when_nothing_is_named():
    assert parse([])[0].dataset == "builtin:digits"
    assert parse(["--temperature", "3"])[1].temperature == 3.0
    with pytest.raises(ValueError, match="teacher is not set"):
        parse(["--dataset", "my.csv", "--student", "s"])


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_parses_and_reads_back(name, write, saved):
    """The saved `distillation.yaml` holds every value and gives the same run."""
    run, args = parse(["--config", name])
    text = saved(run, args)
    values = yaml.safe_load(text)
    assert all(
        field.name in values or getattr(args, field.name) is None
        for field in dataclasses.fields(DistillationOptions)
    )
    again = parse(["--config", write(text)])
    assert again[0] == run
    assert again[1].to_dict() == args.to_dict()


def test_rare_options_read_back(write, saved):
    flags = """--debug underflow_overflow --optim sgd --seed 7 --average_tokens_across_devices false
        --activation_checkpointing --label_names a b
        --lr_scheduler_type cosine --lr_scheduler_kwargs {"min_lr":1e-7} --divergence jsd
        --divergence_options {"beta":0.3} --accelerator_config {"split_batches":true}"""
    run, args = parse([*MODELS, *flags.split()])
    again = parse(["--config", write(saved(run, args))])
    assert again[1].to_dict() == args.to_dict()
    assert again[1].accelerator_config.split_batches is True


def test_secrets_stay_out_of_the_saved_options(saved):
    run, args = parse([*MODELS, "--hub_token", "hf_secret"])
    assert "hf_secret" not in saved(run, args)


def test_arguments_check_themselves(tmp_path):
    with pytest.raises(ValueError, match=r"alpha=3 is outside"):
        DistillationArguments(output_dir=str(tmp_path), alpha=3)
    with pytest.raises(ValueError, match="jsd"):
        DistillationArguments(output_dir=str(tmp_path), divergence="jsdd")
    with pytest.raises(ValueError, match="divergence_options=.* need a divergence"):
        DistillationArguments(output_dir=str(tmp_path), divergence_options={"beta": 0.5})


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16=True does not train on device 'cpu': use bf16"):
        DistillationArguments(output_dir=str(tmp_path), fp16=True, use_cpu=True)


def test_a_nan_loss_is_not_filtered_from_the_log(tmp_path):
    """Trap 29: Trainer's default replaces a NaN loss by the last good one."""
    assert DistillationArguments(output_dir=str(tmp_path)).logging_nan_inf_filter is False


def test_arguments_with_a_callable_pickle_and_dump(tmp_path):
    """Trainer writes its arguments beside each checkpoint, so a lambda must not stop it."""
    args = DistillationArguments(output_dir=str(tmp_path), divergence=forward_kl)
    assert args.to_dict()["divergence"] == "hf_kd.losses.divergences:forward_kl"
    local = DistillationArguments(output_dir=str(tmp_path), divergence=lambda log_q, log_p: log_q.sum(-1))
    assert callable(local.divergence)
    assert isinstance(pickle.loads(pickle.dumps(local)).divergence, str)
    args.to_json_string()


def test_help_all_lists_trainers_options_too():
    text = help_all()
    assert "--temperature" in text and "--learning_rate" in text and "--student_layers" in text
