"""Options, their checks, and the promise that reading them needs no torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from hf_kd import recipes
from hf_kd.options import DistillationOptions, RunOptions, as_mapping, nearest, raise_problems


def run_options(**changes):
    """A complete set of run options, but for `changes`."""
    return RunOptions(**{"teacher": "t", "student": "s", "dataset": "d", **changes})


def test_defaults_are_valid():
    DistillationOptions().validate()
    assert run_options().run_problems() == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"alpha": 1.5}, "alpha=1.5 is outside [0, 1]"),
        ({"alpha": float("nan")}, "alpha=nan is outside"),
        ({"alpha_end": -0.1, "alpha_schedule": "linear"}, "alpha_end=-0.1 is outside"),
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"teacher_temperature": -1.0}, "teacher_temperature=-1.0"),
        ({"alpha_end": 0.2}, "alpha_end=0.2 has no effect with alpha_schedule='constant'"),
        ({"temperature_schedule": "cosine"}, "temperature_schedule='cosine' has nowhere to go"),
        (
            {"alpha_schedule": "quadratic"},
            "alpha_schedule='quadratic' is not known: use one of constant, linear",
        ),
        ({"supervise": "some"}, "supervise='some'"),
        ({"fused": "yes"}, "fused='yes'"),
        ({"teacher_dtype": "int8"}, "teacher_dtype='int8'"),
        ({"kl_threshold": 0.0}, "kl_threshold=0.0"),
        ({"fused_chunk_mib": 0}, "fused_chunk_mib=0"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 is not 0 or above"),
        ({"relation_weight": float("nan")}, "relation_weight=nan"),
        ({"relation_weight": 1.0, "relations": "qk"}, "relations='qk' is not known: use qq, kk, vv"),
        ({"relation_weight": 1.0, "relation_heads": 0}, "relation_heads=0 is below 1"),
        ({"hidden_loss": "mse"}, "hidden_loss='mse' has no effect while hidden_weight or embedding_weight"),
        ({"layer_map": "last"}, "layer_map='last' has no effect while hidden_weight or attention_weight"),
        ({"hidden_weight": 1.0, "layer_map": "middle"}, "layer_map='middle' is not known: use one of auto"),
        ({"hidden_weight": 1.0, "layer_map": "{0"}, "layer_map='{0' is not a mapping"),
        ({"divergence_options": "[1]"}, "divergence_options='[1]' is not a mapping"),
        ({"divergence_options": "{beta"}, "divergence_options='{beta' is not a mapping"),
    ],
)
def test_distillation_problems_name_option_and_value(changes, expected):
    with pytest.raises(ValueError) as error:
        DistillationOptions(**changes).validate()
    assert expected in str(error.value)


def test_schedules_with_both_ends_are_valid():
    DistillationOptions(
        alpha=1.0, alpha_end=0.0, alpha_schedule="linear", temperature_end=1.0, temperature_schedule="cosine"
    ).validate()


def test_all_problems_come_in_one_message():
    with pytest.raises(ValueError) as error:
        DistillationOptions(alpha=2.0, temperature=-1.0, fused="maybe").validate()
    message = str(error.value)
    assert message.startswith("3 options are wrong")
    assert all(name in message for name in ("alpha=2.0", "temperature=-1.0", "fused='maybe'"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher": None}, "teacher is not set"),
        ({"teacher_config": {"model_type": "vit"}, "train_teacher": True}, "keep one"),
        ({"teacher": None, "teacher_config": {"model_type": "vit"}}, "train_teacher=False"),
        ({"student": None}, "no student"),
        ({"student_layers": 2}, "student='s' and student_layers=2"),
        ({"student": None, "student_layers": 0}, "student_layers=0 is not positive"),
        ({"dataset": None}, "dataset is not set"),
        ({"max_train_samples": -1}, "max_train_samples=-1"),
        ({"mlm_probability": 1.0}, "mlm_probability=1.0"),
        ({"problem_type": "ordinal"}, "problem_type='ordinal'"),
    ],
)
def test_run_problems_name_option_and_fix(changes, expected):
    problems = run_options(**changes).run_problems()
    assert len(problems) == 1
    assert expected in problems[0]


def test_json_becomes_a_mapping():
    options = run_options(student=None, student_config='{"hidden_size": 32}')
    assert options.run_problems() == []
    assert options.student_config == {"hidden_size": 32}
    assert as_mapping(None) == {}


def test_nearest_offers_only_what_is_near():
    assert nearest("temprature", ["temperature", "alpha"]) == ", did you mean 'temperature'?"
    assert nearest("zzz", ["temperature", "alpha"]) == ""


def test_one_problem_needs_no_list():
    raise_problems([])
    with pytest.raises(ValueError, match="^only this$"):
        raise_problems(["only this"])


def test_every_option_has_help_of_one_line():
    for cls in (DistillationOptions, RunOptions):
        for field in dataclasses.fields(cls):
            assert 5 < len(field.metadata["help"]) <= 75, field.name


def test_options_and_recipes_need_no_torch():
    code = (
        "import sys; from hf_kd import options, recipes; recipes.text('digits');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_recipes_are_ten_to_twenty_lines_and_say_what_they_do():
    assert recipes.names()[0] == recipes.DEFAULT
    assert set(recipes.names()) == {
        "digits", "stdlib-lm", "sst2", "conll2003", "squad", "wikitext2-mlm", "xsum", "beans",
    }  # fmt: skip
    for name in recipes.names():
        assert recipes.text(name).startswith("# ")
        assert 10 <= len(recipes.text(name).splitlines()) <= 20, name
        assert len(recipes.summary(name)) > 20


def test_unknown_recipe_offers_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        recipes.text("digit")
