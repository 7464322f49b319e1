"""The student as ONNX: checked against PyTorch, refused where it differs, and measured in the report."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_kd import cli
from hf_kd import run as runs
from hf_kd.results import Results
from hf_kd.tasks import resolve_task

from .test_run import digits

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="the extra `export` is not installed",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run on digits whose student is exported, as ONNX and in 8 bits."""
    out = tmp_path_factory.mktemp("exported")
    before = runs.distill(*digits(out, "--no_control"))
    assert cli.main(["export", str(out), "--onnx", "--int8", "--min_agreement", "0.5"]) == 0
    return out, before, Results.read(out / "results.json")


def test_both_files_are_measured_beside_the_other_models(exported):
    """Trap 50: the same inputs for all."""
    out, before, after = exported
    assert list(after.arms) == ["teacher", "student", "student onnx", "student int8"]
    student, onnx, int8 = (after.arms[name] for name in list(after.arms)[1:])
    assert (
        onnx.metrics["accuracy"] == student.metrics["accuracy"] == before.arms["student"].metrics["accuracy"]
    )
    assert onnx.eval_kl == pytest.approx(student.eval_kl, abs=1e-5)
    assert int8.eval_kl != onnx.eval_kl and 0 <= int8.metrics["accuracy"] <= 1
    assert onnx.bytes_on_disk == (out / "model.onnx").stat().st_size
    assert int8.bytes_on_disk == (out / "model.int8.onnx").stat().st_size
    inputs = [[(t.batch_size, t.inputs) for t in arm.latency] for arm in after.arms.values()]
    assert len(inputs[0]) == 3 and all(shapes == inputs[0] for shapes in inputs)
    assert "student int8" in (out / "report.html").read_text(encoding="utf-8")
    assert after.verdict.startswith("The student keeps")


def test_a_file_that_does_not_answer_as_the_student_does_is_removed(exported, capsys):
    out, _, after = exported
    assert cli.main(["export", str(out), "--onnx", "--tolerance", "0"]) == 2
    said = capsys.readouterr().err
    assert "model.onnx was removed" in said and "more than tolerance=0" in said
    assert not (out / "model.onnx").exists()
    assert Results.read(out / "results.json") == after


def test_wrong_words_and_folders_are_refused(exported, tmp_path, capsys):
    for words, expected in (
        ([str(tmp_path), "--onnx"], "give the folder of a finished run"),
        ([str(tmp_path)], "takes the folder of a run and a format"),
        ([str(tmp_path), "--onnx", "--in8"], "unknown option --in8, did you mean '--int8'?"),
        ([str(tmp_path), "--onnx", "--tolerance", "small"], "--tolerance takes a number, not 'small'"),
    ):
        assert cli.main(["export", *words]) == 2
        assert expected in capsys.readouterr().err


def test_text_of_any_length_and_number_of_rows_gives_the_same_logits(tmp_path):
    from hf_kd.onnx_model import OnnxModel, compare, export_onnx

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    model = BertForSequenceClassification(config).train()
    task = resolve_task(None, model)

    def batch(rows, length):
        ids = torch.randint(1, 50, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(rows, dtype=torch.long)}

    path = export_onnx(model, batch(3, 7), tmp_path / "model.onnx", task=task)
    assert model.training
    seen = compare(model, OnnxModel(path), [batch(1, 5), batch(9, 31)], task=task)
    assert seen.difference < 1e-4 and seen.same == 1.0 and seen.positions == 10
    with torch.no_grad():
        model.classifier.bias += 1.0
    other = compare(model, OnnxModel(path), [batch(2, 5)], task=task)
    assert other.difference == pytest.approx(1.0, abs=1e-3) and other.relative > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_causal_models_give_the_same_logits(tmp_path, kind):
    """Without their cache, padded on either side, at lengths that the export has not seen."""
    from hf_kd.onnx_model import OnnxModel, compare, export_onnx

    torch.manual_seed(0)
    shared = {"vocab_size": 50, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
        model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes, **shared))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **shared))
    task = resolve_task(None, model)

    def batch(rows, length, left):
        ids = torch.randint(3, 50, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = int(not left)
        mask[0, length - length // 3 :] = int(left)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    path = export_onnx(model.eval(), batch(3, 7, False), tmp_path / "model.onnx", task=task)
    seen = compare(
        model, OnnxModel(path), [batch(1, 5, False), batch(4, 31, False), batch(4, 20, True)], task=task
    )
    assert seen.difference < 1e-4 * max(1.0, seen.scale) and seen.same == 1.0 and seen.positions > 100


def test_models_with_a_decoder_of_their_own_are_refused(tmp_path):
    from hf_kd.onnx_model import export_onnx

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="task='seq2seq-lm' has an encoder and a decoder"):
        export_onnx(
            model, {"input_ids": torch.ones(2, 3).long()}, tmp_path / "x", task=resolve_task(None, model)
        )


def test_without_the_extra_the_message_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["export", str(tmp_path), "--onnx"]) == 2
    assert "pip install 'hf-kd[export]'" in capsys.readouterr().err
