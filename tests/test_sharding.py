"""Models in pieces over the ranks (FSDP 2) train, resume and save as whole ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.sharding import layer_classes, shard_teacher
from hf_kd.teachers.models import fingerprint

from .heads import HEADS, models, oracle, rows_of
from .sharded_ranks import NAMES
from .test_distributed import ROOT, launch
from .test_gradient import assert_same


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What two ranks computed, in one launch with the configuration that ships."""
    folder = tmp_path_factory.mktemp("sharded")
    config, script = ROOT / "hf_kd" / "accelerate" / "fsdp2.yaml", ROOT / "tests" / "sharded_ranks.py"
    launch("accelerate.commands.launch", "--config_file", str(config), str(script), str(folder))
    return folder, torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_one_process(sharded: tuple[Path, dict[str, Any]], name: str) -> None:
    """Traps 17, 19: student and teacher in pieces, without logits where there is a vocabulary."""
    ours = sharded[1][name]
    expected, grads = oracle(HEADS[name], *models(HEADS[name]), rows_of(HEADS[name], 8, seed=3))
    assert ours["pieces"] == [True, True]
    assert ours["fused"] == (name == "causal-lm")
    assert ours["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert_same(ours["grads"], grads)


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_student_is_whole(sharded: tuple[Path, dict[str, Any]], name: str) -> None:
    """It loads as any model, with the weights of the last step, which a resumed run reaches too."""
    folder, results = sharded
    auto = AutoModelForCausalLM if name == "causal-lm" else AutoModelForSequenceClassification
    saved = dict(auto.from_pretrained(folder / name / "final", dtype=torch.float64).named_parameters())
    resumed = results[name]["resumed"]
    assert saved.keys() == resumed.keys()
    start = dict(models(HEADS[name])[0].named_parameters())
    assert any(not torch.equal(saved[n], start[n]) for n in saved)
    for parameter in saved:
        torch.testing.assert_close(saved[parameter].detach(), resumed[parameter], rtol=0, atol=1e-12)


def test_evaluation_and_identity(sharded: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The KL of the saved student, measured whole; the teacher's fingerprint is of whole weights."""
    folder, results = sharded
    head = HEADS["causal-lm"]
    student = AutoModelForCausalLM.from_pretrained(folder / "causal-lm" / "final", dtype=torch.float64)
    teacher = models(head)[1]
    expected, _ = oracle(head, student, teacher, rows_of(head, 7), alpha=1.0, temperature=1.0)
    assert results["causal-lm"]["eval_kl"] == pytest.approx(float(expected), rel=1e-9)
    assert results["identity"] == fingerprint(models(HEADS[NAMES[-1]])[1])


def test_training_in_pieces_again_is_refused(sharded: tuple[Path, dict[str, Any]]) -> None:
    """Accelerate would give the optimizer parameters that are none."""
    assert "holds in pieces already" in sharded[1]["causal-lm"]["refused"]


def test_layers_do_not_hold_the_embedding() -> None:
    """BERT's `_no_split_modules` name its embeddings, which hold what may be tied to its head."""
    student, _ = models(HEADS["single-label"])
    assert "BertEmbeddings" in student._no_split_modules  # type: ignore[operator]
    assert layer_classes(student) == ["BertLayer"]


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    """The option says what it needs."""
    student, teacher = models(HEADS["causal-lm"])
    args = DistillationArguments(output_dir=str(tmp_path), shard_teacher=True, use_cpu=True)
    with pytest.raises(ValueError, match=r"shard_teacher=True needs FSDP 2.*fsdp2.yaml"):
        DistillationTrainer(student, args, teacher=teacher)

    weight: Any = next(student.parameters())
    weight.ds_id = 1
    with pytest.raises(ValueError, match=r"model: its weights lie in pieces.*Give its name instead"):
        DistillationTrainer(
            student, DistillationArguments(output_dir=str(tmp_path), use_cpu=True), teacher=teacher
        )
    del weight.ds_id

    class Sharded:
        is_fsdp2 = True

    teacher.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    placed = DistillationTrainer(
        student, DistillationArguments(output_dir=str(tmp_path), use_cpu=True), teacher=teacher
    ).teacher
    with pytest.raises(ValueError, match="spread by teacher_device_map already"):
        shard_teacher(placed, Sharded(), True)  # type: ignore[arg-type]
