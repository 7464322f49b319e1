"""What README and docs show runs: Python as it is, commands on tiny models, and links lead to what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
)

import hf_kd
from hf_kd import caching, cli
from hf_kd.config import parse, parse_one
from hf_kd.options import GenerateOptions, ShrinkOptions, TeachOptions

from . import documents
from .documents import NOT_RUN, OTHERS, ROOT, RUN, YOUR_RUN, Block, blocks, commands

# Of the commands that are no run.
SWITCHES = ("--private", "--out", "--onnx", "--int8")
PYTHON, SHELL = blocks("python", "py"), blocks("sh", "bash", "shell", "console")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and data that the pages name."""
    folder = tmp_path_factory.mktemp("documents")
    documents.make_files(folder)
    return folder


def names(folder: Path, page: str) -> dict[str, Any]:
    """What a Python block may take for given: a teacher, a student, rows, and the usual imports."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-finetuned-bert")
    texts = ["a good film", "a dull plot", "fine from the start", "bad"] * 3
    rows = Dataset.from_dict({**tokenizer(texts), "labels": [0, 1, 0, 1] * 3})

    def metrics(predicted: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    def look_up(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (len(rows), 4)
        return torch.zeros(*shape, 1, dtype=torch.long), torch.zeros(*shape, 1), torch.full(shape, -torch.inf)

    causal = page == "served.md"
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    return {
        "teacher": AutoModelForSequenceClassification.from_pretrained(folder / "my-finetuned-bert"),
        "student": kind.from_pretrained(folder / ("my-causal-lm" if causal else "my-other-bert")),
        "tokenizer": tokenizer,
        "teacher_tokenizer": tokenizer,
        "texts": texts,
        "rows": rows,
        "train": rows,
        "dev": rows,
        "batch": dict(tokenizer(texts, padding=True, return_tensors="pt")),
        "metrics": metrics,
        "look_up": look_up,
        "torch": torch,
        "F": torch.nn.functional,
        "Trainer": Trainer,
        **{name: getattr(hf_kd, name) for name in hf_kd.__all__},
    }


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_block_runs(block: Block, files: Path, tmp_path: Path, monkeypatch) -> None:
    """As it is, on a tiny BERT; what it may take for given is in `names`."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), names(files, block.page))


def kd_command(words: list[str]) -> list[str] | None:
    """The words after `hf-kd` that a command means, launched or not; None for another program."""
    if words[0] == "hf-kd":
        return words[1:]
    if words[:2] != ["accelerate", "launch"]:
        return None
    if "scripts/distill.py" in words:
        return ["distill", *words[words.index("scripts/distill.py") + 1 :]]
    return words[words.index("hf_kd") + 1 :]


def check_options(command: str, rest: list[str]) -> None:
    """Every option exists, with a value of its kind, by the parser that a run uses."""
    if "--help" in rest or "--help-all" in rest:
        return
    if command in ("distill", "check"):
        parse(rest)
    elif command == "shrink":
        parse_one(ShrinkOptions, rest)
    elif command == "generate":
        parse_one(GenerateOptions, rest)
    elif command == "teach":
        parse_one(TeachOptions, rest)
    elif command == "cache" and rest[0] in ("plan", "verify") and rest[1].startswith("-"):
        caching._parse(f"cache {rest[0]}", rest[1:])
    elif command == "cache" and rest[0].startswith("-"):
        caching._parse("cache", rest)
    else:
        assert command in cli.COMMANDS
        assert not any(word.startswith("-") for word in rest if word not in SWITCHES), rest


def is_run(page: str, words: list[str]) -> bool:
    """Whether a command is run, not only parsed."""
    line = " ".join(words)
    wanted = page in RUN and words != documents.DEMO
    return wanted and not any(line.startswith(start) for start in NOT_RUN)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands(block: Block, files: Path, monkeypatch, capsys) -> None:
    """Options are those of the real parser; on some pages the commands are run, in order."""
    monkeypatch.chdir(files)
    for words in commands(block):
        ours = kd_command([new for word in words for new in (YOUR_RUN if word == "..." else [word])])
        if ours is None:
            assert words[0] in OTHERS, f"{block}: say in tests/documents.py why {words[0]} is not run"
            check_other(words)
            continue
        if words[0] == "accelerate":
            config = words[words.index("--config_file") + 1] if "--config_file" in words else "README.md"
            assert (ROOT / config).is_file()
        check_options(ours[0], ours[1:])
        if is_run(block.page, words):
            assert cli.main([*ours, *documents.shortened(ours)]) == 0, capsys.readouterr().err


def check_other(words: list[str]) -> None:
    """Targets, files and options that other programs are given exist."""
    if words[0] == "make":
        targets = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            assert "=" in word or re.search(rf"^{word}:", targets, re.MULTILINE), word
    elif words[0] == "python" and words[1] == "-m":
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), words[2]
    elif words[0] == "python":
        source = (ROOT / words[1]).read_text()
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in source, f"{words[1]} has no {option}"
    elif words[0] == "pip":
        for option, value in zip(words, words[1:], strict=False):
            assert option != "-c" or (ROOT / value).is_file()


@pytest.mark.parametrize("page", documents.PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files exist; parts of pages are headings there."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in known, f"{page.name}: {target}"


def test_python_options_in_tables_exist() -> None:
    """`name=value` in the text of migration and troubleshooting names an option of ours or of theirs."""
    from dataclasses import fields

    from hf_kd.config import DistillationArguments
    from hf_kd.options import RunOptions

    ours = {
        field.name for cls in (DistillationArguments, RunOptions, GenerateOptions) for field in fields(cls)
    }
    for name in ("migration.md", "troubleshooting.md", "choose-loss.md", "concepts.md", "choose-teacher.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        last = [row.rsplit("|", 2)[1] for row in text.splitlines() if row.startswith("|")]
        prose = [line for line in text.splitlines() if not line.startswith(("|", "    ", "#"))]
        used = re.findall(r"`(?:--)?([a-z_0-9]+)=[^`]*`", "\n".join([*last, *prose]))
        unknown = {
            option for option in used if option not in {*ours, "teacher", "lmbda", "num_layers", "w_hl"}
        }
        assert not unknown, f"{name}: {unknown}"
