"""The code blocks of README and docs, and what the names in them stand for when the tests run them."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)

#: Words in shell blocks that a reader replaces, and the local files and folders that stand for them.
NAMES: dict[str, str] = {
    "DIR_OR_ID": "my-finetuned-bert",
    "ID_OR_FILE": "reviews.csv",
    "A": "my-finetuned-bert",
    "B": "my-other-bert",
    "C": "my-finetuned-bert",
    "S": "my-other-bert",
    "D": "reviews.csv",
    "text.txt": "novel.txt",
    "train.csv": "reviews.csv",
}
#: The same, on one page.
NAMES_ON: dict[str, dict[str, str]] = {
    "README.md": {"DIR": "out/my"},
    "generate.md": {"DIR_OR_ID": "my-causal-lm"},
}

#: Added to commands that are run, so that they take a second; and to those that have options of their own.
SHORT = (
    "--max_steps 2 --max_train_samples 16 --max_eval_samples 8 --per_device_train_batch_size 4 "
    "--logging_steps 1 --report_to none --disable_tqdm true --use_cpu true --control false"
)
SHORT_ALONE = {"generate": "--max_new_tokens 4 --batch_size 2 --shard_rows 2", "shrink": "--batch_size 8"}

#: Pages whose `hf-kd` commands are run, one after the other, on tiny models; elsewhere options are parsed.
RUN = (
    "README.md",
    "quickstart.md",
    "caching.md",
    "generate.md",
    "teachers.md",
    "students.md",
    "features.md",
    "losses.md",
)

#: What "..." stands for, "the options of your run", where such a command is run.
YOUR_RUN = ["--config", "my.yaml"]

#: Commands on those pages that are parsed and not run: the beginning, and why.
NOT_RUN: dict[str, str] = {
    "hf-kd export": "takes ten seconds; tests/test_export.py runs it",
    "hf-kd publish": "needs the Hub; tests/test_publish.py runs it against a local one",
    "hf-kd distill --teacher my-finetuned-bert --student my-": "the CSV below is such a run",
    "accelerate launch scripts/distill.py": "parsed; .ci/run and tests/test_cli.py start it",
    "accelerate launch --config_file": "parsed; .ci/run and tests/test_cli.py start it",
}

#: The demo takes minutes; .ci/run does it with fewer steps.
DEMO = ["hf-kd", "distill"]

#: Programs other than ours in shell blocks, and why nothing is run.
OTHERS: dict[str, str] = {
    "make": "the target exists; .ci/run uses make",
    "pip": "files that it names exist; make installs by the same line",
    "python": "the script exists and has the options; benchmarks take minutes",
    "python3": "makes a virtual environment",
    ".": "activates it",
    "export": "sets a variable",
    ".ci/run": "this is what it runs",
    ".venv/bin/pre-commit": "changes the repository's hooks",
}


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        """Where it is, as pytest's name of it."""
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The fenced blocks of all pages in these languages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            indent = len(match[1])
            body = "\n".join(line[indent:] for line in match[3].splitlines()) + "\n"
            block = Block(page.name, text[: match.start()].count("\n") + 1, match[2], body)
            if block.language in languages:
                found.append(block)
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block as words, with the names that a reader replaces replaced."""
    names = {**NAMES, **NAMES_ON.get(block.page, {})}
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield [names.get(word, word) for word in words]


def shortened(words: list[str]) -> list[str]:
    """What a command is given besides, to take a second."""
    if "--help" in words or not {"--config", "--teacher", "--teachers"} & set(words):
        return []
    length = " --max_length 16" if "my-causal-lm" in words and words[0] not in SHORT_ALONE else ""
    return (SHORT_ALONE.get(words[0], SHORT) + length).split()


def make_files(folder: Path) -> None:
    """Write the models and data that the pages name, as small as they can be."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    from hf_kd.data.processors import train_tokenizer

    words = ["good", "bad", "film", "plot", "fine", "dull", "from", "the", "start"]
    texts = [f"{words[i % 9]} {words[(i * 5) % 9]} film" for i in range(40)]
    with (folder / "reviews.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([text, ("positive", "negative")[i % 2]] for i, text in enumerate(texts))
    (folder / "novel.txt").write_text("\n".join(texts * 8) + "\n", encoding="utf-8")
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in texts[:4])
    (folder / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    tokens = train_tokenizer(texts, 300, task="sequence-classification")
    for name, layers in (("my-other-bert", 2), ("my-finetuned-bert", 7)):
        config = BertConfig(
            vocab_size=len(tokens), max_position_embeddings=64, num_hidden_layers=layers, **sizes, **labels
        )
        model = BertForSequenceClassification(config)
        model.save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)
    model.base_model.save_pretrained(folder / "my-pretrained-bert")
    tokens.save_pretrained(folder / "my-pretrained-bert")
    tokens = train_tokenizer(texts, 300, task="causal-lm")
    llama = LlamaConfig(
        vocab_size=len(tokens), num_hidden_layers=7, num_key_value_heads=1, eos_token_id=tokens.eos_token_id,
        bos_token_id=tokens.bos_token_id, pad_token_id=tokens.pad_token_id, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(folder / "my-causal-lm")
    tokens.save_pretrained(folder / "my-causal-lm")
    run = "teacher: my-finetuned-bert\nstudent_layers: 2\ndataset: reviews.csv\noutput_dir: out/my\n"
    (folder / "my.yaml").write_text(run, encoding="utf-8")
