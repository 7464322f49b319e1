"""Checkpoints of architectures that save their weights under other names."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from hf_kd.checkpoints import restore_renamed, saved_names
from hf_kd.config import DistillationArguments
from hf_kd.trainer import DistillationTrainer

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def vit(seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=3, **SMALL)
    )


def rows(count: int = 8) -> list[dict]:
    g = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(1, 4, 4, generator=g), "labels": i % 3} for i in range(count)]


def same(one, other) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_names_in_the_file_differ_from_those_in_memory(tmp_path):
    """Why this module is there: once it fails, Transformers saves and loads the same names again."""
    vit(0).save_pretrained(tmp_path)
    assert not saved_names(tmp_path) <= set(vit(0).state_dict())


def test_renamed_weights_are_restored(tmp_path):
    saved, model = vit(0), vit(1)
    saved.save_pretrained(tmp_path)
    assert not same(model, saved)
    assert restore_renamed(model, tmp_path)
    assert same(model, saved)


def test_shards_are_found_by_their_index(tmp_path):
    saved, model = vit(0), vit(1)
    saved.save_pretrained(tmp_path, max_shard_size="2KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert restore_renamed(model, tmp_path)
    assert same(model, saved)


def test_other_models_are_left_alone(tmp_path):
    model = BertForSequenceClassification(BertConfig(vocab_size=20, **SMALL))
    model.save_pretrained(tmp_path)
    assert not restore_renamed(model, tmp_path)
    assert not restore_renamed(torch.nn.Linear(2, 2), tmp_path)
    assert saved_names(tmp_path / "nothing") == set()


def train(folder, max_steps: int, resume: bool = False, **more) -> DistillationTrainer:
    args = DistillationArguments(
        output_dir=str(folder), max_steps=max_steps, per_device_train_batch_size=4, learning_rate=0.1,
        lr_scheduler_type="constant", save_steps=1, disable_tqdm=True, use_cpu=True, **more,
    )  # fmt: skip
    trainer = DistillationTrainer(vit(0), args, teacher=vit(7), train_dataset=rows(), eval_dataset=rows(3))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_resuming_equals_never_having_stopped(tmp_path, caplog):
    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    parts = train(tmp_path / "parts", 4, resume=True)
    assert same(parts.model, whole.model)
    assert "missing keys" not in caplog.text


def test_the_best_model_is_the_one_that_comes_back(tmp_path):
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
    }
    trainer = train(tmp_path, 3, metric_for_best_model="eval_loss", greater_is_better=False, **best)
    assert trainer.state.best_model_checkpoint.endswith("-1")  # not the last one
    saved = ViTForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert same(trainer.model, saved)
