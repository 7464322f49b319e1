"""`DistillationArguments`, and how flags and YAML become options.

YAML values go through the converters of the flags, so `2e-5` is a float in both; flags beat YAML; an unknown
name is an error that offers the nearest one.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import typing
from argparse import Action, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_kd import recipes
from hf_kd.losses.divergences import resolve_divergence
from hf_kd.losses.features import ATTENTION_LOSSES, HIDDEN_LOSSES
from hf_kd.losses.named import find
from hf_kd.losses.vectors import VECTOR_LOSSES
from hf_kd.options import DistillationOptions, RunOptions, nearest, raise_problems
from hf_kd.options.student import NAMES as STUDENT_OPTIONS
from hf_kd.trust import refuse_code

# A flag for one of these drops what the YAML says about its siblings: they are ways to say the same thing.
_ALTERNATIVES = (
    (("teacher",), ("teachers",), ("teacher_config",)),
    (("student",), STUDENT_OPTIONS, ("student_config",)),
)
# What other programs call an option.
_ELSEWHERE = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "model": "student",
    "layers": "student_layers",
    "data": "dataset",
    "output": "output_dir",
    "loss": "divergence",
}
# Options that take a function.
_CALLABLES = ("divergence", "hidden_loss", "attention_loss")


@dataclass
class DistillationArguments(DistillationOptions, TrainingArguments):
    """`TrainingArguments` and the options of distillation; every field is a flag of `hf-kd distill`.

    Raises:
        ValueError: one message with every problem of the options.
    """

    # Trainer's default hides a NaN loss from the curve.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinite losses out of the logged mean."}
    )
    # Trainer's 500 leaves short runs without a curve.
    logging_steps: float = field(
        default=0.02, metadata={"help": "Log every so many steps; below 1: after this share of all steps."}
    )

    def __post_init__(self) -> None:
        _claim_cpu_ranks(self)
        TrainingArguments.__post_init__(self)
        self.validate()

    def __repr__(self) -> str:
        # The dataclass's own would show tokens, which Trainer's leaves out.
        return TrainingArguments.__str__(self)

    @property
    def folder(self) -> Path:
        """`output_dir` as a path; Trainer's own default is filled in by now."""
        return Path(str(self.output_dir))

    def validate(self) -> None:
        """Raise one `ValueError` that lists every problem of these options."""
        problems = self.distillation_problems()
        if self.fp16 and self.device.type == "cpu":
            problems.append(
                "fp16=True does not train on device 'cpu': use bf16=True (with use_cpu=True) or drop fp16"
            )
        raise_problems(problems)

    def distillation_problems(self) -> list[str]:
        """The problems of the options, and of the divergence that they name."""
        found = super().distillation_problems()
        for option, table in (("hidden_loss", HIDDEN_LOSSES), ("attention_loss", ATTENTION_LOSSES)):
            try:
                find(option, getattr(self, option) or "", table)
            except ValueError as error:
                found.append(str(error))
        divergence, options = self.divergence, self.divergence_options
        if divergence is None or divergence in ("auto", *VECTOR_LOSSES):
            if options and isinstance(options, dict):
                found.append(
                    f"divergence_options={options} need a divergence that takes them, "
                    f"not divergence={divergence!r}: name one, e.g. divergence='jsd'"
                )
            return found
        try:
            resolve_divergence(divergence, options if isinstance(options, dict) else None)
        except ValueError as error:
            found.append(str(error))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; a callable becomes its `module:name`."""
        values = super().to_dict()
        return {**values, **{name: _import_name(getattr(self, name)) for name in _CALLABLES}}

    def __getstate__(self) -> dict[str, Any]:
        # Workers may be sent the arguments, and a lambda cannot be pickled.
        return {**self.__dict__, **{name: _import_name(getattr(self, name)) for name in _CALLABLES}}


def _claim_cpu_ranks(args: DistillationArguments) -> None:
    """Let several processes train on the CPU.

    Accelerate takes several ranks to mean several devices and, where there are none, runs each rank alone.
    Trainer leaves `ddp_timeout` out on the CPU: a rank that stalls would hold the others for half an hour.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or (torch.accelerator.is_available() and not args.use_cpu):
        return
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if not dist.is_initialized() and "MASTER_ADDR" in os.environ:
        dist.init_process_group(args.ddp_backend or "gloo", timeout=timedelta(seconds=args.ddp_timeout))


def _import_name(value: Any) -> Any:
    if not callable(value):
        return value
    named = inspect.unwrap(getattr(value, "func", value))
    return f"{getattr(named, '__module__', '?')}:{getattr(named, '__qualname__', type(named).__qualname__)}"


_Options = typing.TypeVar("_Options")


class _Parser(HfArgumentParser):
    """Reads dataclasses, those of a run if none is named; raises instead of printing two screens of usage."""

    def __init__(self, *classes: type) -> None:
        read: Any = list(classes or (RunOptions, DistillationArguments))
        super().__init__(read, prog="hf-kd", allow_abbrev=False, add_help=False)
        if DistillationArguments in read:
            next(a for a in self._actions if a.dest == "temperature").type = number_or_auto
        hints = {name: hint for cls in read for name, hint in typing.get_type_hints(cls).items()}
        self.names: dict[str, Action] = {}
        self.hints: dict[str, tuple[Any, ...]] = {}
        for action in self._actions:
            # The `--no_x` complement of a switch shares its destination; the first one has the converter.
            self.names.setdefault(action.dest, action)
            if hints[action.dest] == bool | None:
                action.nargs, action.const = "?", True  # a switch, like every other
        for name, hint in hints.items():
            members = typing.get_args(hint) if typing.get_origin(hint) not in (list, dict) else (hint,)
            self.hints[name] = tuple(typing.get_origin(member) or member for member in members) or (hint,)

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(plainly(message))


def plainly(message: str) -> str:
    """What argparse says of a flag, with the option, the value and the fix."""
    invalid = re.match(r"argument --(\w+)[^:]*: invalid (\w+) value: '(.*)'$", message, re.DOTALL)
    if invalid:
        return f"{invalid[1]}={invalid[3]!r} {_is_no(invalid[2])}"
    choice = re.match(r"argument --(\w+)[^:]*: invalid choice: (.*) \(choose from (.*)\)$", message)
    if choice:
        return f"{choice[1]}={choice[2]} is not known: use one of {choice[3].replace(chr(39), '')}"
    missing = re.match(r"argument --(\w+)[^:]*: expected (?:at least )?one argument$", message)
    return f"--{missing[1]} needs a value: --{missing[1]} VALUE" if missing else message


def _is_no(kind: str) -> str:
    """What is wrong with a text that a converter refused."""
    kinds = {"float": "a number, as in 0.5", "int": "a whole number, as in 8"}
    kinds["number_or_auto"] = "a number, as in 2.0, or auto"
    return f"is not {kinds.get(kind, kind)}"


def number_or_auto(text: str) -> float | str:
    """The value of an option that may be measured instead of given."""
    return text if text == "auto" else float(text)


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: `2e-5` is a number and `no` is a word."""


_YamlLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse(argv: Sequence[str]) -> tuple[RunOptions, DistillationArguments]:
    """Turn `--config` and flags into checked options.

    Args:
        argv: flags without the program's name; `--config` takes a file or the name of a recipe.

    Returns:
        the models and data of the run, and the arguments of the trainer.

    Raises:
        ValueError: an unknown flag or key, a value of another type, or options that contradict each other.
    """
    parser = _Parser()
    config, flags = _take_config(argv)
    given = {_flag_name(token) for token in flags if token.startswith("--")}
    if config is None and not given & {"teacher", "dataset"}:
        config = recipes.DEFAULT
    if config is not None:
        values = _read_yaml(parser, config)
        for ways in _ALTERNATIVES:
            if any(given & set(way) for way in ways):
                dropped = {name for way in ways if not given & set(way) for name in way}
                values = {name: value for name, value in values.items() if name not in dropped}
        parser.set_defaults(**values)
    namespace, unknown = parser.parse_known_args(flags)
    _refuse_unknown(parser, unknown)
    return _build(vars(namespace))


def parse_one(cls: type[_Options], argv: Sequence[str]) -> _Options:
    """Turn `--config FILE` and flags into one dataclass with a `validate` method; flags beat the file.

    Raises:
        ValueError: an unknown flag or key, a value of another type, or options that contradict each other.
    """
    parser = _Parser(cls)
    config, flags = _take_config(argv)
    if config is not None:
        parser.set_defaults(**_read_yaml(parser, config))
    namespace, unknown = parser.parse_known_args(flags)
    _refuse_unknown(parser, unknown)
    made: Any = cls(**vars(namespace))
    made.validate()
    return made


def _build(values: dict[str, Any]) -> tuple[RunOptions, DistillationArguments]:
    """Make the dataclasses; the problems of both come in one message."""

    def fields_of(cls: type) -> dict[str, Any]:
        return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.init}

    run = RunOptions(**fields_of(RunOptions))
    problems = run.run_problems()
    early = DistillationOptions(**fields_of(DistillationOptions)).distillation_problems()
    if run.unlabelled and values["alpha"] != 1.0:
        problems.append(f"unlabelled=True and alpha={values['alpha']}: without labels set alpha=1")
    if run.streaming and values["max_steps"] <= 0:
        problems.append(
            f"streaming=True and max_steps={values['max_steps']}: how many rows a stream has is not known, "
            "so set max_steps to the number of optimizer steps"
        )
    if problems:
        raise_problems([*problems, *early])
    return run, DistillationArguments(**fields_of(DistillationArguments))


def _flag_name(token: str) -> str:
    name = token.removeprefix("--").split("=", 1)[0].replace("-", "_")
    return name.removeprefix("no_")


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split `--config VALUE` or `--config=VALUE` from the other flags."""
    config, rest, tokens = None, [], iter(argv)
    for token in tokens:
        if token == "--config":
            config = next(tokens, None)
            if config is None or config.startswith("--"):
                raise ValueError("--config needs a value: a YAML file or the name of a recipe")
        elif token.startswith("--config="):
            config = token.removeprefix("--config=")
        else:
            rest.append(token)
    return config, rest


def _refuse_unknown(parser: _Parser, unknown: list[str]) -> None:
    flags = [token for token in unknown if token.startswith("-")]
    if flags:
        name = flags[0].split("=", 1)[0]
        known = {f"--{known}" for known in (*parser.names, "config")}
        word = _flag_name(name)
        other = _ELSEWHERE.get(word)
        close = f", did you mean '--{other}'?" if other else nearest(f"--{word}", known)
        raise ValueError(f"unknown option {name}{close} (see --help and --help-all)")
    if unknown:
        raise ValueError(
            f"unexpected argument {unknown[0]!r}: every value needs a flag, as in --config my.yaml"
        )


def _read_yaml(parser: _Parser, config: str) -> dict[str, Any]:
    """Read a file or a recipe into option values, each through the converter of its flag."""
    source, text = _config_text(config)
    try:
        loader = _YamlLoader(text)
        root = loader.get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f"{source}, line {mark.line + 1}" if mark is not None else source
        raise ValueError(f"{where}: this is not YAML ({what}); write options as in `alpha: 0.5`") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{source} must be a mapping of options, as in `alpha: 0.5`")
    values: dict[str, Any] = {}
    for key_node, value_node in root.value:
        name = str(key_node.value)
        where = f"{source}, line {key_node.start_mark.line + 1}"
        if name not in parser.names:
            raise ValueError(f"{where}: unknown option {name!r}{nearest(name, parser.names)}")
        if name in values:
            raise ValueError(f"{where}: {name!r} is set twice")
        try:
            values[name] = _convert(parser, name, value_node, loader)
        except (ValueError, TypeError, ArgumentTypeError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"{where}: {name}: {error}") from None
    refuse_code(Path(config), values, _CALLABLES)
    return values


def _config_text(config: str) -> tuple[str, str]:
    path = Path(config).expanduser()
    if path.is_file():
        return str(path), path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ValueError(
            f"config={config!r} does not exist (looked for {path.absolute()}): give a YAML file, or the name "
            "of a recipe (hf-kd recipes)"
        )
    try:
        return f"recipe {config}", recipes.text(config)
    except ValueError as error:
        raise ValueError(f"config={config!r} is not a file, and {error}") from None


def _convert(parser: _Parser, name: str, node: yaml.Node, loader: _YamlLoader) -> Any:
    """The value of one YAML node, converted as the text of the flag would be."""
    action, kinds = parser.names[name], parser.hints[name]
    if isinstance(node, yaml.MappingNode):
        if dict not in kinds:
            raise ValueError("takes no mapping: write one value")
        return loader.construct_document(node)
    if isinstance(node, yaml.SequenceNode):
        if list not in kinds:
            raise ValueError("takes one value, not a list: write one without brackets")
        return [_convert_scalar(action, item) for item in node.value]
    if node.tag.endswith(":null"):
        if action.default is not None and type(None) not in kinds:
            raise ValueError(f"takes no null; leave it out for the default, {action.default!r}")
        return None
    value = _convert_scalar(action, node)
    return [value] if action.nargs == "+" else value


def _convert_scalar(action: Action, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("takes a flat list")
    convert = action.type
    try:
        value = convert(node.value) if callable(convert) else node.value
    except ValueError:
        raise ValueError(f"{node.value!r} {_is_no(getattr(convert, '__name__', 'a value'))}") from None
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{node.value!r} is not known: use one of {', '.join(map(str, action.choices))}")
    return value


def help_all() -> str:
    """The help of every flag, Trainer's included."""
    return _Parser().format_help()
