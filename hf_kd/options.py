"""Every option that is not one of Trainer's own, as two dataclasses that need neither torch nor transformers.

The command line, the YAML files, the Python API and the help text all read these fields, so an option is
named, typed, described and checked in one place. `hf_kd.config` joins `DistillationOptions` with
`TrainingArguments`; `RunOptions` (models and data) is for the command line only.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hf_kd.student_options import StudentOptions

SCHEDULE_NAMES = ("constant", "linear", "cosine")
SUPERVISE_NAMES = ("auto", "all")
LAYER_MAP_NAMES = ("auto", "even", "last", "skip")
FUSED_NAMES = ("auto", "on", "off")
SERVER_FORMAT_NAMES = ("vllm", "openai", "sglang", "llama.cpp")
SPARSE_ESTIMATOR_NAMES = ("auto", "tail", "draws")
CACHE_MISS_NAMES = ("error", "compute")
RELATION_NAMES = ("qq", "kk", "vv")
#: Losses on layers, each with an option `<name>_weight`.
FEATURE_WEIGHTS = ("hidden", "attention", "relation", "embedding", "last_hidden")
SELF_TEACHER_NAMES = ("ema", "frozen", "adapters_off", "deeper")
ENSEMBLE_WEIGHTING_NAMES = ("fixed", "learned", "confidence")
QUANTIZATION_NAMES = ("int8-dynamic", "bnb-8bit", "bnb-4bit")
CORRECTION_NAMES = ("none", "swap", "drop")
SPIKE_ACTION_NAMES = ("warn", "skip", "stop")
KD_WEIGHTING_NAMES = ("none", "confidence", "entropy")
DTYPE_NAMES = ("auto", "float32", "float16", "bfloat16", "float64")


def _option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


def nearest(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the nearest known name, or nothing when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def raise_problems(problems: list[str]) -> None:
    """Raise one `ValueError` that lists every problem, or return when there is none."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        lines = "\n".join(f"  - {text}" for text in problems)
        raise ValueError(f"{len(problems)} options are wrong:\n{lines}")


@dataclass(kw_only=True)
class DistillationOptions:
    """What to compare and how to weigh it. `loss = (1 - alpha) * task + alpha * T^2 * divergence`."""

    alpha: float = _option(0.5, "weight of distillation, 0 to 1; at 1 no labels are needed")
    alpha_end: float | None = _option(None, "value of alpha at the end of training")
    alpha_schedule: str = _option("constant", "path from alpha to alpha_end: constant, linear, cosine")
    temperature: float | str = _option(
        2.0, "softens both distributions; the term is scaled by T^2; or auto: measured"
    )
    temperature_end: float | None = _option(None, "temperature at the end of training")
    temperature_schedule: str = _option("constant", "path to temperature_end: constant, linear, cosine")
    teacher_temperature: float | None = _option(None, "temperature of the teacher, if another")
    divergence: Callable[..., Any] | str | None = _option(
        "auto", "auto, forward_kl, reverse_kl, jsd, tvd ... or package.module:function"
    )
    divergence_options: dict[str, Any] | str | None = _option(
        None, """its parameters as JSON: '{"beta": 0.3}'"""
    )
    supervise: str = _option("auto", "positions that are distilled: auto (the labelled ones), all")
    kl_threshold: float | None = _option(None, "stop at the evaluation whose eval_kl is not above this")
    hidden_weight: float = _option(0.0, "weight of the loss on hidden states of paired layers")
    hidden_loss: Callable[..., Any] | str | None = _option(
        "normalized_mse", "normalized_mse, mse, cosine or package.module:function"
    )
    attention_weight: float = _option(0.0, "weight of the loss on attentions of paired layers")
    attention_loss: Callable[..., Any] | str | None = _option(
        "kl", "kl, mse or package.module:function; reads scores before the softmax"
    )
    relation_weight: float = _option(0.0, "weight of the loss on self-relations in the last paired layer")
    relations: str = _option("vv", "which of them, comma-separated: qq, kk, vv")
    relation_heads: int | None = _option(None, "heads that they are split into (default: the student's)")
    embedding_weight: float = _option(0.0, "weight of hidden_loss on what the first layers read")
    last_hidden_weight: float = _option(0.0, "weight of the cosine loss on the last hidden states")
    layer_map: dict[str, Any] | str | None = _option(
        "auto", """auto, even, last, skip, or student: teacher layers as JSON: '{"-1": -1}'"""
    )
    teacher_dtype: str | None = _option(None, "dtype of the teacher (default: its checkpoint's)")
    teacher_device_map: str | None = _option(None, "device map of the teacher (default: training device)")
    shard_teacher: bool | None = _option(None, "in pieces over the ranks (default: where the student is)")
    teacher_cache: str | None = _option(None, "directory or Hub id of what the teacher said (hf-kd cache)")
    cache_miss: str = _option("error", "a row that the cache lacks: error, compute (ask the teacher)")
    teacher_revision: str | None = _option(None, "branch, tag or commit of the teacher on the Hub")
    teacher_quantization: str | None = _option(
        None, "int8-dynamic (on the CPU), bnb-8bit, bnb-4bit (need bitsandbytes)"
    )
    teacher_calibration: bool = _option(False, "divide its logits by what fits validation labels best")
    target_correction: str = _option("none", "where it contradicts a label: none, swap, drop")
    kd_weighting: str = _option("none", "weight of a position, by its certainty: none, confidence, entropy")
    ensemble_weighting: str = _option("fixed", "of several teachers: fixed, learned, confidence")
    ensemble_weights: list[float] | None = _option(None, "weight of each (default: equal)")
    ensemble_temperature: float = _option(1.0, "temperature at which their probabilities are averaged")
    ensemble_offload: bool = _option(False, "keep them in CPU memory, one on the device at a time")
    teacher_routes: dict[str, Any] | str | None = _option(
        None, """one teacher a row, by column teacher_id: '{"17": 0, "23": 1}'"""
    )
    teacher_timeout: float | None = _option(None, "seconds that it may take for a batch (default: no limit)")
    self_teacher: str | None = _option(None, "the student's own: ema, frozen, adapters_off, deeper")
    exit_layers: list[int] | None = _option(None, "layers that the last one teaches (default: half way)")
    self_teacher_dropout: bool = _option(False, "leave its dropout on: another view of each row")
    ema_decay: float = _option(0.999, "share of the moving average that a step keeps")
    ema_decay_end: float | None = _option(None, "that share at the end, reached by a cosine")
    server_model: str | None = _option(None, "name of the model on the server that teacher=http... names")
    server_format: str = _option("vllm", "how that server answers: vllm, openai, sglang, llama.cpp")
    server_top_k: int = _option(20, "tokens per position that it is asked for")
    server_concurrency: int = _option(8, "requests to it at a time")
    server_timeout: float = _option(60.0, "seconds that it may take for one")
    server_retries: int = _option(5, "further tries after a failed one")
    server_api_key_env: str | None = _option(None, "environment variable that holds its key")
    trust_remote_code: bool = _option(False, "run code of checkpoints, and metrics, from the Hub")
    predict_with_generate: bool = _option(False, "evaluate on text that the student generates")
    generation_max_length: int | None = _option(None, "its length in tokens (default: the model's)")
    generation_num_beams: int | None = _option(None, "its number of beams (default: the model's)")
    spike_action: str = _option("warn", "a step far above those before it: warn, skip (drop it), stop")
    spike_threshold: float = _option(8.0, "how far: robust standard deviations of its logarithm")
    sparse_estimator: str = _option("auto", "tail of a sparse teacher: auto (measured), tail, draws")
    term_gradients: int = _option(0, "times a run that the gradient norm of each term is measured and logged")
    fused: str = _option("auto", "loss without [tokens, vocabulary] logits: auto, on, off")
    fused_chunk_mib: int = _option(256, "MiB that the fused loss may use beyond its gradients")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has any weight at any time."""
        weights = [getattr(self, f"{name}_weight") for name in FEATURE_WEIGHTS]
        return self.alpha > 0 or (self.alpha_end or 0) > 0 or any(weight > 0 for weight in weights)

    def distillation_problems(self) -> list[str]:
        """Every problem of these options, each with the option's name, its value and the fix."""
        found: list[str] = []
        for name in ("alpha", "alpha_end"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                found.append(f"{name}={value} is outside [0, 1]: it is a weight, set e.g. {name}=0.5")
        if self.kl_threshold is not None and not self.kl_threshold > 0.0:
            found.append(f"kl_threshold={self.kl_threshold} is never reached: set a small positive number")
        if self.fused_chunk_mib < 1:
            found.append(f"fused_chunk_mib={self.fused_chunk_mib} is below 1: set e.g. 256")
        for name, known in (
            ("server_format", SERVER_FORMAT_NAMES),
            ("alpha_schedule", SCHEDULE_NAMES),
            ("temperature_schedule", SCHEDULE_NAMES),
            ("supervise", SUPERVISE_NAMES),
            ("fused", FUSED_NAMES),
            ("sparse_estimator", SPARSE_ESTIMATOR_NAMES),
            ("teacher_dtype", (*DTYPE_NAMES, None)),
            ("cache_miss", CACHE_MISS_NAMES),
            ("teacher_quantization", (*QUANTIZATION_NAMES, None)),
            ("self_teacher", (*SELF_TEACHER_NAMES, None)),
            ("ensemble_weighting", ENSEMBLE_WEIGHTING_NAMES),
            ("target_correction", CORRECTION_NAMES),
            ("kd_weighting", KD_WEIGHTING_NAMES),
            ("spike_action", SPIKE_ACTION_NAMES),
        ):
            value = getattr(self, name)
            if value not in known:
                found.append(f"{name}={value!r} is not known: use one of {', '.join(filter(None, known))}")
        found += _mapping_problems(self, ("divergence_options", "teacher_routes"))
        if self.cache_miss == "compute" and not self.teacher_cache:
            found.append("cache_miss='compute' has no effect without teacher_cache: set it, or drop this")
        found += self._schedule_problems() + self._server_problems() + self._watching_problems()
        found += self._teacher_problems() + self._ensemble_problems()
        return found + _feature_problems(self)

    def _watching_problems(self) -> list[str]:
        found = []
        if self.term_gradients < 0:
            found.append(f"term_gradients={self.term_gradients} is below 0: set e.g. 20, or 0 for none")
        if self.term_gradients and any(getattr(self, f"{name}_weight") > 0 for name in FEATURE_WEIGHTS):
            found.append(
                f"term_gradients={self.term_gradients} tells task and distillation apart, but not losses on "
                "layers: set it to 0, or their weights"
            )
        if self.term_gradients and self.self_teacher == "deeper":
            found.append(
                f"term_gradients={self.term_gradients} with self_teacher='deeper': one forward is both "
                "terms; set it to 0"
            )
        if self.teacher_timeout is not None and not 0.0 < self.teacher_timeout < math.inf:
            found.append(f"teacher_timeout={self.teacher_timeout} is not above 0 and finite: set e.g. 600")
        if not 0.0 < self.spike_threshold < math.inf:
            found.append(f"spike_threshold={self.spike_threshold} is not above 0 and finite: set e.g. 8")
        return found

    def _schedule_problems(self) -> list[str]:
        found = []
        for name in ("alpha", "temperature"):
            end, schedule = getattr(self, f"{name}_end"), getattr(self, f"{name}_schedule")
            if schedule == "constant" and end is not None:
                found.append(
                    f"{name}_end={end} has no effect with {name}_schedule='constant': "
                    f"set {name}_schedule='linear' or drop {name}_end"
                )
            if schedule in ("linear", "cosine") and end is None:
                found.append(f"{name}_schedule={schedule!r} has nowhere to go: set {name}_end")
        return found

    def _temperature_problems(self) -> list[str]:
        found = []
        for name in ("temperature", "temperature_end", "teacher_temperature"):
            value = getattr(self, name)
            if value is None or (name == "temperature" and value == "auto"):
                continue
            if isinstance(value, str) or not 0.0 < value < math.inf:
                found.append(f"{name}={value} is not above 0 and finite: set e.g. {name}=2.0")
        return found

    def _teacher_problems(self) -> list[str]:
        found = self._temperature_problems()
        if self.temperature == "auto" and self.temperature_schedule != "constant":
            found.append(
                f"temperature='auto' with temperature_schedule={self.temperature_schedule!r}: both say the "
                "temperature; set temperature_schedule='constant', or temperature to a number"
            )
        for name in ("ema_decay", "ema_decay_end"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                found.append(f"{name}={value} is outside [0, 1]: it is a share, set e.g. 0.999")
        if self.self_teacher is not None and self.teacher_cache:
            found.append(
                f"teacher_cache={self.teacher_cache!r} with self_teacher={self.self_teacher!r}: what changes "
                "or is at hand can't be read from a cache; drop one"
            )
        if self.self_teacher is None and self.self_teacher_dropout:
            found.append("self_teacher_dropout=True with self_teacher=None: name one, or drop the dropout")
        if self.self_teacher == "deeper" and self.self_teacher_dropout:
            found.append(
                "self_teacher_dropout=True with self_teacher='deeper': there is one forward, with the "
                "student's own dropout; drop this"
            )
        if self.exit_layers is not None and self.self_teacher != "deeper":
            found.append(
                f"exit_layers={self.exit_layers} with self_teacher={self.self_teacher!r}: exits are taught "
                "by self_teacher='deeper'; set it, or drop them"
            )
        if self.self_teacher is not None and self.teacher_quantization is not None:
            found.append(
                f"teacher_quantization={self.teacher_quantization!r} with "
                f"self_teacher={self.self_teacher!r}: the student's own weights stay as they are; drop one"
            )
        return found

    def _ensemble_problems(self) -> list[str]:
        found = []
        if not 0.0 < self.ensemble_temperature < math.inf:
            found.append(f"ensemble_temperature={self.ensemble_temperature} is not above 0: set e.g. 1")
        if self.teacher_routes is not None and isinstance(self.teacher_routes, Mapping):
            try:
                self.teacher_routes = {str(int(k)): int(v) for k, v in self.teacher_routes.items()}
            except (TypeError, ValueError):
                found.append(
                    f"teacher_routes={self.teacher_routes} must map whole numbers to teachers' numbers"
                )
            if self.ensemble_weights is not None or self.ensemble_weighting != "fixed":
                found.append(
                    f"teacher_routes={self.teacher_routes} asks one teacher a row, so "
                    f"ensemble_weights={self.ensemble_weights} and "
                    f"ensemble_weighting={self.ensemble_weighting!r} have no effect: drop them"
                )
        if self.ensemble_weighting == "learned" and self.ensemble_weights is not None:
            found.append(
                f"ensemble_weights={self.ensemble_weights} with ensemble_weighting='learned': keep one"
            )
        return found

    def _server_problems(self) -> list[str]:
        found = [
            f"{name}={getattr(self, name)} is below {least}: leave it out for the default"
            for name, least in (("server_top_k", 1), ("server_concurrency", 1), ("server_retries", 0))
            if getattr(self, name) < least
        ]
        if not 0.0 < self.server_timeout < math.inf:
            found.append(f"server_timeout={self.server_timeout} is not above 0 and finite: set e.g. 60")
        return found

    def validate(self) -> None:
        """Raise one `ValueError` that lists every problem of these options."""
        raise_problems(self.distillation_problems())


@dataclass(kw_only=True)
class RunOptions(StudentOptions):
    """Models and data of one run from the command line; the Python API takes objects instead."""

    teacher: str | None = _option(None, "Hub id or directory of the teacher")
    teachers: list[str] | None = _option(
        None, "instead: several, averaged or routed; the first is compared with, and cut"
    )
    student: str | None = _option(None, "Hub id or directory of a student")
    student_config: dict[str, Any] | str | None = _option(
        None, """or: a fresh one, like the teacher but for this JSON"""
    )
    teacher_config: dict[str, Any] | str | None = _option(
        None, """instead of --teacher: one from scratch, '{"model_type": "vit"}'"""
    )
    train_teacher: bool = _option(False, "train the teacher first, into output_dir/teacher")
    teacher_epochs: float | None = _option(None, "epochs of that training (default: num_train_epochs)")
    teacher_learning_rate: float | None = _option(None, "its learning rate (default: learning_rate)")
    teacher_batch_size: int | None = _option(None, "its batch size (default: per_device_train_batch_size)")
    control: bool = _option(True, "also train the same student without the teacher, to compare")
    processor: str | None = _option(None, "tokenizer or image processor (default: the teacher's)")
    task: str | None = _option(None, "e.g. causal-lm (default: from the teacher's class)")
    problem_type: str | None = _option(
        None, "single_label_classification, multi_label_classification, regression"
    )
    num_labels: int | None = _option(None, "labels of a new head (default: from the data)")
    metrics: list[str] | None = _option(None, "evaluate metrics, the main one first (default: by task)")
    dataset: str | None = _option(None, "Hub id, directory, csv/tsv/json/parquet/txt file, builtin:digits")
    dataset_config: str | None = _option(None, "configuration of a Hub dataset, e.g. sst2 of glue")
    train_split: str = _option("train", "split to train on")
    eval_split: str | None = _option(None, "split to evaluate on (default: validation, or part of train)")
    test_split: str | None = _option(None, "split of the final table (default: the evaluation split)")
    eval_file: str | None = _option(None, "file to evaluate on, where --dataset is a file")
    test_file: str | None = _option(None, "file for the final table, where --dataset is a file")
    column_names: list[str] | None = _option(None, "columns of a csv or tsv file without a header line")
    text_columns: list[str] | None = _option(None, "input columns (default: by task)")
    label_column: str | None = _option(None, "column of the labels (default: by task)")
    unlabelled: bool = _option(False, "the data has no labels, or ignore them; needs --alpha 1")
    max_length: int | None = _option(None, "tokens an example is cut to, or the block length of an LM")
    mlm_probability: float = _option(0.15, "share of tokens that are masked in masked LM")
    max_train_samples: int | None = _option(None, "use only this many training rows")
    max_eval_samples: int | None = _option(None, "use only this many evaluation and test rows")
    slices: list[str] | None = _option(None, "also report quality by: length, label, or columns of the data")
    watts: float | None = _option(None, "power that the machine draws, to estimate the energy of the run")

    def _several_problems(self) -> list[str]:
        """What is wrong with `teachers`; the first of them becomes `teacher`."""
        found: list[str] = []
        if not self.teachers:
            return found
        if self.teacher not in (None, self.teachers[0]):
            found.append(f"teacher={self.teacher!r} and teachers={self.teachers}: keep one")
        if len(self.teachers) < 2:
            found.append(f"teachers={self.teachers} names one: use teacher, or name a second")
        if self.train_teacher:
            found.append("train_teacher=True trains one teacher, not teachers: train them one by one")
        self.teacher = self.teachers[0]
        return found

    def run_problems(self) -> list[str]:
        """Every problem of these options, each with the option's name, its value and the fix."""
        found = self._several_problems() + self.student_problems()
        if self.teacher and self.teacher_config:
            found.append(f"teacher={self.teacher!r} and teacher_config={self.teacher_config}: keep one")
        if not self.teacher and not self.teacher_config:
            found.append("teacher is not set: give a directory or Hub id, or teacher_config for a new one")
        if self.teacher_config and not self.train_teacher:
            found.append("train_teacher=False leaves the new teacher untrained: set train_teacher=true")
        students = {"student": self.student, **dict(list(self.cuts.items())[:1])}
        students["student_config"] = self.student_config
        given = [f"{name}={value!r}" for name, value in students.items() if value is not None]
        if len(given) > 1:
            found.append(f"{' and '.join(given)} name different students: keep one")
        if not given:
            found.append(
                "no student: set student (id or directory), student_layers or another size of a cut of the "
                "teacher, or student_config"
            )
        if not self.dataset:
            found.append("dataset is not set: give a Hub id, a directory, a file, or builtin:digits")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                found.append(f"{name}={value} is not positive: set it above 0 or leave it out")
        if not 0.0 < self.mlm_probability < 1.0:
            found.append(f"mlm_probability={self.mlm_probability} is outside (0, 1): set e.g. 0.15")
        if self.problem_type not in (None, *_PROBLEM_TYPES):
            known = ", ".join(_PROBLEM_TYPES)
            found.append(f"problem_type={self.problem_type!r} is not known: use one of {known}")
        found += _mapping_problems(self, ("student_config", "teacher_config"))
        return found


@dataclass(kw_only=True)
class GenerateOptions:
    """What `hf-kd generate` samples, from which teacher, and where it goes."""

    teacher: str | None = _option(None, "Hub id or directory of a causal or sequence-to-sequence model")
    teacher_revision: str | None = _option(None, "its branch, tag or commit on the Hub")
    teacher_dtype: str | None = _option(None, "its dtype (default: its checkpoint's)")
    teacher_device_map: str | None = _option(None, "its device map (default: one device a process)")
    trust_remote_code: bool = _option(False, "run model code that comes with its checkpoint")
    processor: str | None = _option(None, "tokenizer (default: the teacher's)")
    task: str | None = _option(None, "causal-lm or seq2seq-lm (default: from the teacher's class)")
    output_dir: str | None = _option(None, "folder of the data; an unfinished one is gone on with")
    dataset: str | None = _option(None, "prompts: Hub id, directory, file (default: none, from nothing)")
    dataset_config: str | None = _option(None, "configuration of a Hub dataset")
    split: str = _option("train", "split of the prompts")
    prompt_column: str | None = _option(None, "their column (default: prompt, or by task)")
    max_prompt_length: int = _option(256, "tokens that a prompt is cut to")
    num_rows: int | None = _option(None, "rows to sample from nothing, or the most prompts to take")
    samples_per_prompt: int = _option(1, "rows of each prompt")
    max_new_tokens: int = _option(128, "the most tokens of a row")
    temperature: float = _option(1.0, "of the sampling; 0 takes the likeliest token")
    top_p: float = _option(1.0, "sample from the likeliest tokens with this much mass")
    top_k: int | None = _option(None, "sample from so many of the likeliest tokens (default: all)")
    seed: int = _option(42, "of all random numbers")
    batch_size: int = _option(16, "rows decoded together")
    shard_rows: int = _option(1024, "rows a file; what is lost at most when the run is stopped")
    signal_entries: int = _option(32, "entries of the teacher's distribution per token; 0: store none")
    signal_temperature: float = _option(1.0, "temperature of that distribution")

    def validate(self) -> None:
        """Raise one `ValueError` that lists every problem of these options."""
        found = [
            f"{name} is not set: {what}"
            for name, what in (("teacher", "give a directory or Hub id"), ("output_dir", "give a folder"))
            if not getattr(self, name)
        ]
        positive = "max_prompt_length num_rows samples_per_prompt max_new_tokens top_k batch_size shard_rows"
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name}={value} is below 1: set it higher or leave it out")
        if not 0.0 <= self.temperature < math.inf:
            found.append(f"temperature={self.temperature} is not 0 or above: set e.g. 1")
        if not 0.0 < self.top_p <= 1.0:
            found.append(f"top_p={self.top_p} is outside (0, 1]: set e.g. 0.95")
        if not 0 <= self.signal_entries <= 255:
            found.append(f"signal_entries={self.signal_entries} is outside 0 to 255: set e.g. 32")
        if not 0.0 < self.signal_temperature < math.inf:
            found.append(f"signal_temperature={self.signal_temperature} is not above 0: set e.g. 1")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed} is not in [0, 2^63): set e.g. 42")
        raise_problems(found + self._other_problems())

    def _other_problems(self) -> list[str]:
        found = []
        if self.shard_rows % max(self.batch_size, 1):
            found.append(
                f"shard_rows={self.shard_rows} is no multiple of batch_size={self.batch_size}: set "
                f"shard_rows={self.batch_size * max(1, self.shard_rows // max(self.batch_size, 1))}"
            )
        if self.task not in (None, "causal-lm", "seq2seq-lm"):
            found.append(f"task={self.task!r} does not generate: use causal-lm or seq2seq-lm")
        if self.dataset is None and self.num_rows is None:
            found.append("num_rows is not set: without a dataset of prompts, say how many rows to sample")
        if self.dataset is None and self.task == "seq2seq-lm":
            found.append("dataset is not set: a sequence-to-sequence model answers prompts")
        if self.teacher_dtype not in (*DTYPE_NAMES, None):
            known = ", ".join(DTYPE_NAMES)
            found.append(f"teacher_dtype={self.teacher_dtype!r} is not known: use one of {known}")
        return found


_POSITIVE = (
    "teacher_epochs",
    "teacher_learning_rate",
    "teacher_batch_size",
    "num_labels",
    "max_length",
    "max_train_samples",
    "max_eval_samples",
    "watts",
)
_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def as_mapping(value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The dict that an option holds, whether it came from Python or YAML (a dict) or from a flag (JSON)."""
    if value is None:
        return {}
    parsed = json.loads(value) if isinstance(value, str) else value
    if not isinstance(parsed, Mapping):
        raise ValueError(f"{value!r} is not a mapping")
    return dict(parsed)


def without_features() -> dict[str, Any]:
    """The options of losses on layers at their defaults, under which there are none."""
    names = {spec.name: spec.default for spec in fields(DistillationOptions)}
    return {name: names[name] for name in _FEATURE_OPTIONS}


def _feature_problems(options: DistillationOptions) -> list[str]:
    """Every problem of the losses on layers."""
    found = []
    weights = {name: getattr(options, f"{name}_weight") for name in FEATURE_WEIGHTS}
    for name, weight in weights.items():
        if not 0.0 <= weight < math.inf:
            found.append(f"{name}_weight={weight} is not 0 or above and finite: set e.g. {name}_weight=1")
    relations = [name.strip() for name in str(options.relations).split(",")]
    if not set(relations) <= set(RELATION_NAMES) or len(set(relations)) < len(relations):
        found.append(
            f"relations={options.relations!r} is not known: use qq, kk, vv, each once, as in 'qq,kk,vv'"
        )
    if options.relation_heads is not None and options.relation_heads < 1:
        found.append(f"relation_heads={options.relation_heads} is below 1: set e.g. 12, or leave it out")
    defaults = without_features()
    for name, users in _FEATURE_OPTIONS.items():
        value = getattr(options, name)
        if value != defaults[name] and users and not any(weights[user] > 0 for user in users):
            needed = " or ".join(f"{user}_weight" for user in users)
            found.append(
                f"{name}={value!r} has no effect while {needed} is 0: set it above 0, or drop {name}"
            )
    layer_map = options.layer_map
    if isinstance(layer_map, str) and layer_map.lstrip().startswith("{"):
        found += _mapping_problems(options, ("layer_map",))
    elif not isinstance(layer_map, Mapping) and layer_map not in LAYER_MAP_NAMES:
        found.append(
            f"layer_map={layer_map!r} is not known: use one of {', '.join(LAYER_MAP_NAMES)}, or pairs of a "
            """student's and a teacher's layer, '{"0": 3, "-1": -1}'"""
        )
    return found


# The options of losses on layers, and the weights under which each has an effect.
_FEATURE_OPTIONS: dict[str, tuple[str, ...]] = {
    **{f"{name}_weight": () for name in FEATURE_WEIGHTS},
    "hidden_loss": ("hidden", "embedding"),
    "attention_loss": ("attention",),
    "relations": ("relation",),
    "relation_heads": ("relation",),
    "layer_map": ("hidden", "attention", "relation", "embedding"),
}


def _mapping_problems(options: object, names: tuple[str, ...]) -> list[str]:
    """Turn the named options into dicts in place; say which ones are not mappings."""
    found = []
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        try:
            setattr(options, name, as_mapping(value))
        except ValueError:
            found.append(f"""{name}={value!r} is not a mapping: write it as JSON, e.g. '{{"key": 1}}'""")
    return found
