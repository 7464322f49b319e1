"""The examples do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from transformers import BertConfig, BertForSequenceClassification, pipeline

from hf_kd.data.processors import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_linear_pair() -> None:
    """The classic loop reaches its threshold."""
    assert load("linear_pair").main() <= 1e-4


def test_custom_head() -> None:
    """A head described in three lines is distilled."""
    assert load("custom_head").main() < 0.05


def test_a_trainer_script_distils_a_csv(tmp_path: Path) -> None:
    """Three lines are changed, everything else is the script as it was."""
    words = ["good", "bad", "film", "plot", "fine", "dull"]
    rows = [f"{words[i % 6]} {words[(i * 5) % 6]} film,{i % 2}" for i in range(40)]
    (tmp_path / "rows.csv").write_text("sentence,label\n" + "\n".join(rows) + "\n")
    train_tokenizer(words, 300, task="sequence-classification").save_pretrained(tmp_path / "teacher")
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    out = tmp_path / "out"
    said = load("from_run_glue").main(
        ["--teacher", str(tmp_path / "teacher"), "--layers", "2", "--dataset", str(tmp_path / "rows.csv")]
        + ["--epochs", "1", "--output_dir", str(out)]
    )
    assert said["eval_kl"] >= 0 and 0 <= said["eval_accuracy"] <= 1
    classify = pipeline("text-classification", model=str(out))
    assert classify("a good film")[0]["label"] in ("LABEL_0", "LABEL_1")
    assert BertForSequenceClassification.from_pretrained(out).config.num_hidden_layers == 2


def test_a_student_works_in_a_pipeline() -> None:
    """From its folder alone, with the teacher's label names."""
    answers = load("classification_pipeline").main()
    assert [answer["label"] for answer in answers] == ["good", "bad"]


def test_a_student_generates() -> None:
    """With its own `generate` and in a pipeline: the same text, which goes on from the prompt."""
    said = load("text_generation").main()
    assert said["generate"].startswith("def load(") and len(said["generate"]) > len("def load(")
    assert said["pipeline"] == said["generate"]


def test_a_student_encodes_sentences() -> None:
    """Its mean over tokens, as sentence-transformers takes it, becomes the teacher's."""
    cosine = load("sentence_encoder").main()
    assert cosine["after"] > max(cosine["before"], 0.9)


def test_a_distilled_assistant_saves_calls_of_its_teacher() -> None:
    """Speculative decoding: the same text, and fewer calls than with a draft that nobody taught."""
    calls = load("assistant").main()
    assert calls["distilled draft"] < calls["untrained draft"]
    assert calls["distilled draft"] < calls["teacher alone"]
