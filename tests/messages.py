"""What a user reads who did something wrong: `python -m tests.messages > tests/messages.txt`.

Each case is a mistake; the file holds the message it leads to, so that somebody reads each change of wording.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Value
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from hf_kd import DistillationArguments, DistillationTrainer, cli, init_student
from hf_kd.data.processors import train_tokenizer
from hf_kd.teachers import resolve_teacher

from .cache_messages import with_a_cache, with_a_damaged_cache
from .documents import make_files
from .teacher_messages import with_a_group, with_a_server, with_several

PAGE = Path(__file__).with_name("messages.txt")
STUDENT = "--student my-causal-lm --dataset novel.txt"
RUN = "--teacher my-finetuned-bert --student_layers 2 --dataset reviews.csv"

#: Mistakes on the command line: what was typed after `hf-kd`.
COMMANDS = [
    # commands and names
    "distil",
    "distill --temprature 4",
    "distill --lr 1e-4",
    "distill my.yaml",
    "distill --config",
    "distill --config nowhere.yaml",
    "distill --config digit",
    "recipes sst",
    "report nowhere",
    "cache",
    "cache plam",
    "cache push said",
    # values
    f"distill {RUN} --alpha 3",
    f"distill {RUN} --alpha much",
    f"distill {RUN} --temperature 0",
    f"distill {RUN} --temperature hot",
    f"distill {RUN} --alpha_end 0.2",
    f"distill {RUN} --alpha_schedule linear",
    f"distill {RUN} --alpha_schedule stairs --alpha_end 0.2",
    f"distill {RUN} --temperature auto --temperature_schedule linear --temperature_end 4",
    f"distill {RUN} --divergence forward",
    f"distill {RUN} --divergence nowhere:function",
    f"distill {RUN} --divergence_options 3",
    f"""distill {RUN} --divergence_options '{{"beta": 0.5}}'""",
    f"""distill {RUN} --divergence jsd --divergence_options '{{"alpha": 0.5}}'""",
    f"""distill {RUN} --divergence jsd --divergence_options '{{"beta": 5}}'""",
    f"distill {RUN} --kl_threshold 0",
    f"distill {RUN} --supervise some",
    f"distill {RUN} --fused maybe",
    f"distill {RUN} --fused_chunk_mib 0",
    f"distill {RUN} --cache_miss compute",
    f"distill {RUN} --cache_miss ignore",
    f"distill {RUN} --hidden_weight -1",
    f"distill {RUN} --hidden_loss mse",
    f"distill {RUN} --hidden_weight 1 --hidden_loss huber",
    f"distill {RUN} --hidden_weight 1 --layer_map first",
    f"distill {RUN} --relation_weight 1 --relations qk",
    f"distill {RUN} --self_teacher past",
    f"distill {RUN} --self_teacher_dropout",
    f"distill {RUN} --self_teacher ema --ema_decay 2",
    f"distill {RUN} --target_correction replace",
    f"distill {RUN} --kd_weighting margin",
    f"distill {RUN} --teacher_dtype int8",
    f"distill {RUN} --teacher_quantization 4bit",
    f"distill {RUN} --teacher_routes 5",
    f"distill {RUN} --ensemble_weighting votes",
    f"distill {RUN} --server_format ollama",
    f"distill {RUN} --server_timeout 0",
    f"distill {RUN} --fp16 --use_cpu",
    # models and data that contradict each other
    "distill --teacher a",
    "distill --dataset a.csv --student_layers 2",
    "distill --teacher a --student b --student_layers 2 --dataset c",
    "distill --teacher a --teachers a --student b --dataset c",
    """distill --teacher_config '{"model_type": "vit"}' --student_layers 2 --dataset builtin:digits""",
    f"distill {RUN} --unlabelled",
    f"distill {RUN} --max_train_samples 0",
    f"distill {RUN} --problem_type ranking",
    f"distill {RUN} --alpha 2 --temperature -1 --fused no",
    # what does not exist, or does not fit
    "check --teacher my-finetuned-brt --student_layers 2 --dataset reviews.csv",
    "check --teacher my-finetuned-bert --student_layers 2 --dataset review.csv",
    "check --teacher my-finetuned-bert --student_layers 9 --dataset reviews.csv",
    "check --teacher my-finetuned-bert --student_layers 2 --dataset builtin:mnist",
    f"check {RUN} --text_columns sentence",
    f"check {RUN} --label_column stars",
    f"check {RUN} --task classification",
    f"check {RUN} --metrics bleu4",
    "check --teacher my-pretrained-bert --student_layers 2 --dataset reviews.csv",
    "check --teacher my-pretrained-bert --student_layers 2 --dataset reviews.csv "
    "--task sequence-classification",
    "check --teacher my-causal-lm --student my-finetuned-bert --dataset novel.txt",
    f"distill {RUN} --epochs 3",
    f"distill {RUN} --batch_size 8",
    f"distill {RUN} --alpha",
    f"distill {RUN} --student_layers two",
    f"distill {RUN} --eval_strategy sometimes",
    "check --teacher . --student_layers 2 --dataset reviews.csv",
    "check --teacher my-finetuned-bert --student_layers 2 --dataset empty.csv",
    "check --teacher my-finetuned-bert --student_layers 2 --dataset notes.docx",
    "check --teacher my-finetuned-bert --student_layers 2 --dataset other.csv",
    "check --teacher my-finetuned-bert --student_layers 2 --dataset semicolons.csv",
    "check --teacher my-causal-lm --student_layers 2 --dataset short.txt --max_length 64",
    f"check {RUN} --teacher_cache nowhere",
    f"distill {RUN} --eval_split dev",
    # generate and cache
    "generate --dataset prompts.jsonl",
    "generate --teacher my-causal-lm --output_dir out",
    "generate --teacher my-causal-lm --output_dir out --num_rows 8 --top_p 0 --batch_size 3 --shard_rows 8",
    "generate --teacher my-finetuned-bert --output_dir out --num_rows 8",
    "generate --teacher my-causal-lm --output_dir out --dataset prompts.jsonl --prompt_column question",
    f"cache {RUN}",
    f"cache {RUN} --cache_dir said --cache_bits 7",
    f"cache {RUN} --cache_dir said --cache_fidelity top",
    f"cache {RUN} --cache_dir said --cache_entries 0",
    f"cache {RUN} --cache_dir said --teacher_cache said",
    f"cache {RUN} --cache_dir said --temperature auto",
    "cache info nowhere",
    "cache verify nowhere",
    f"cache {RUN} --cache_dir new --streaming --max_steps 4",
    f"cache --teacher torch://10.0.0.7:29600 {STUDENT} --cache_dir new",
    "publish nowhere me/student",
    # teachers elsewhere
    "teach --teacher my-causal-lm --address here --students 0 --fidelity all",
    "teach --teacher my-causal-lm --address here",
    "distill --teacher http://10.0.0.7/v1 --student_layers 2 --dataset novel.txt --push_to_hub",
    f"distill --teacher http://10.0.0.7/v1 --server_model m {STUDENT} --temperature 2",
    f"check --teacher torch://127.0.0.1:9 {STUDENT} --server_retries 0 --server_timeout 0.3",
]

# What stands on the terminal before the message.
_PROGRESS = re.compile(r"examples/s\]|^no evaluation split: ")

#: Mistakes in a YAML file: what it says.
YAML = [
    "- alpha",
    "alpha: [0.5",
    "aplha: 0.5",
    "alpha: much",
    "alpha: [0.5, 0.6]",
    "alpha: 0.5\nalpha: 0.6",
    "alpha_schedule: {start: 0.5}",
    "temperature: null",
    "eval_strategy: sometimes",
]


def models(folder: Path) -> dict[str, Any]:
    """Tiny models and rows for mistakes in Python."""
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "my-finetuned-bert")
    student = AutoModelForSequenceClassification.from_pretrained(folder / "my-other-bert")
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-finetuned-bert")
    rows = Dataset.from_dict({**tokenizer(["good film", "dull plot"] * 4), "labels": [1, 0] * 4})
    return {"teacher": teacher, "model": student, "train_dataset": rows, "processing_class": tokenizer}


def train(made: dict[str, Any], **changes: Any) -> None:
    """Begin to train with these options and arguments."""
    names = ("teacher", "model", "train_dataset", "eval_dataset", "processing_class", "task")
    arguments = {**made, **{name: value for name, value in changes.items() if name in names}}
    options = {name: value for name, value in changes.items() if name not in names}
    args = DistillationArguments(
        output_dir="out", use_cpu=True, max_steps=1, per_device_train_batch_size=4, report_to="none",
        disable_tqdm=True, **options,
    )  # fmt: skip
    DistillationTrainer(args=args, **arguments).train()


def bert(**config: Any) -> BertForSequenceClassification:
    """A tiny BERT of another shape."""
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(intermediate_size=16, **sizes, **config))


def language(folder: Path) -> dict[str, Any]:
    """The same for a causal model."""
    llama = AutoModelForCausalLM.from_pretrained(folder / "my-causal-lm")
    text = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4, "labels": [[5, 6, 7, 8]] * 4})
    return {
        "teacher": llama,
        "model": init_student(llama, num_layers=2),
        "train_dataset": text,
        "processing_class": AutoTokenizer.from_pretrained(folder / "my-causal-lm"),
    }


def in_python(made: dict[str, Any], lm: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Mistakes in a script, by what was done."""
    rows, text = made["train_dataset"], lm["train_dataset"]
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    other = train_tokenizer(["another text"], 280, task="causal-lm")
    shifted = rows.map(lambda row: {"labels": row["labels"] + 1})
    masked = text.map(lambda row: {"labels": [-100] * 4})
    return {
        "teacher=None": lambda: train(made, teacher=None),
        "teacher=3": lambda: train(made, teacher=3),
        "the student as its own teacher": lambda: train({**made, "teacher": made["model"]}),
        "a teacher with three labels": lambda: train(made, teacher=bert(num_labels=3)),
        "a teacher with other label names": lambda: train(made, teacher=bert(**names)),
        "a teacher without label names": lambda: train(made, teacher=bert(num_labels=2)),
        "labels counted from 1": lambda: train(made, train_dataset=shifted),
        "no labels, alpha=0.9": lambda: train(made, train_dataset=rows.rename_column("labels", "mood")),
        "all labels -100": lambda: train(lm, train_dataset=masked, temperature=1.0),
        "an empty data set": lambda: train(made, train_dataset=rows.select([])),
        "no data set": lambda: train(made, train_dataset=None),
        "columns that no model reads": lambda: train(made, train_dataset=Dataset.from_dict({"text": ["a"]})),
        "labels as text": lambda: train(made, train_dataset=rows.cast_column("labels", Value("string"))),
        "kl_threshold without evaluation": lambda: train(made, kl_threshold=0.1),
        "another tokenizer": lambda: DistillationTrainer(
            args=DistillationArguments(output_dir="out", use_cpu=True),
            **lm,
            teacher_processing_class=other,
        ).train(),  # fmt: skip
        "another task than the heads": lambda: train(made, task="causal-lm"),
        "an unknown task": lambda: train(made, task="classification"),
        "fused=on for a classifier": lambda: train(made, fused="on"),
        "several teachers with an option of one": lambda: train(made, self_teacher="ema"),
        "arguments of Trainer": lambda: DistillationTrainer(model=made["model"], args={"alpha": 1}),
        "init_student with too many layers": lambda: init_student(made["teacher"], num_layers=9),
        "init_student with a share of 1.0": lambda: init_student(made["teacher"], num_layers=1.0),
        "init_student by importance without calibration": lambda: init_student(
            made["teacher"], num_layers=2, layers="importance"
        ),
        "init_student with a hidden size that no heads fill": lambda: init_student(
            made["teacher"], hidden_size=11
        ),
        "init_student of a plain module": lambda: init_student(torch.nn.Linear(2, 2)),
        "ensemble_weights of another number": lambda: train(
            made,
            teacher=[made["teacher"], bert(id2label=made["teacher"].config.id2label)],
            ensemble_weights=[1.0],
        ),
        "a served teacher for a classifier": lambda: train(made, teacher="http://127.0.0.1:9/v1"),
        "a divergence that is no function": lambda: train(made, divergence=3),
        "resolve_teacher without a teacher": lambda: resolve_teacher(
            None, None, DistillationArguments(output_dir="out"), student=made["model"]
        ),
    }


def of_python(mistake: Callable[[], Any]) -> str:
    """The error, with its class."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            mistake()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "(nothing is said)"


def of_command(line: str) -> str:
    """What stands on the terminal: the error, or what a check found."""
    import shlex

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(shlex.split(line))
        except Exception as error:
            return f"{type(error).__name__} with a traceback: {error}"
    said = quiet(err.getvalue()) or quiet(out.getvalue())
    return said if status else f"(nothing is wrong) {said}"


def collect(folder: Path) -> dict[str, str]:
    """Every mistake with its message."""
    make_files(folder)
    (folder / "empty.csv").write_text("text,label\n", encoding="utf-8")
    (folder / "other.csv").write_text(
        "text,label\n" + "good film,great\nbad film,awful\n" * 9, encoding="utf-8"
    )
    (folder / "semicolons.csv").write_text("text;label\ngood film;positive\n" * 4, encoding="utf-8")
    (folder / "short.txt").write_text("good film\n", encoding="utf-8")
    (folder / "notes.docx").write_text("good film\n", encoding="utf-8")
    found = {f"hf-kd {line}": of_command(line) for line in COMMANDS}
    for text in YAML:
        (folder / "wrong.yaml").write_text(text + "\n", encoding="utf-8")
        found["in YAML: " + text.replace("\n", " / ")] = of_command("distill --config wrong.yaml")
    made, lm = models(folder), language(folder)
    rooms = {
        "in Python": in_python(made, lm),
        "with a cache": {**with_a_damaged_cache(folder), **with_a_cache(folder, made)},
        "with a server": with_a_server(lm),
        "with a group": with_a_group(made, lm),
        "with several teachers or ranks": with_several(made),
    }
    for room, mistakes in rooms.items():
        found |= {f"{room}: {name}": of_python(mistake) for name, mistake in mistakes.items()}
    return {name: plain(message, folder) for name, message in found.items()}


def plain(message: str, folder: Path) -> str:
    """A message without what differs from machine to machine."""
    message = message.replace(str(folder.resolve()), "HERE").replace(str(folder), "HERE")
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    message = re.sub(r"(?<=127\.0\.0\.1)([:, ]+)\d{2,5}", r"\1PORT", message)
    message = re.sub(r"\b(?!0123456789abcdef)[0-9a-f]{16}\b", "FINGERPRINT", message)
    return quiet(message)


def quiet(text: str) -> str:
    """The lines that say something, without progress."""
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line and not _PROGRESS.search(line))


def page(found: dict[str, str]) -> str:
    """The file."""
    return "\n".join(f"$ {name}\n{message}\n" for name, message in found.items())


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    with tempfile.TemporaryDirectory() as name:
        before = Path.cwd()
        os.chdir(name)
        text = page(collect(Path(name)))
        os.chdir(before)
    sys.stdout.write(text)
