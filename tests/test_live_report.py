"""`trainer.report()` and `trainer.push_to_hub()`: from a script to the page, the card and the Hub."""

from __future__ import annotations

import functools

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, constants
from transformers import BertConfig, BertForSequenceClassification

import hf_kd.publish
from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.data.collate import PaddingCollator
from hf_kd.data.processors import train_tokenizer
from hf_kd.results import Results

from .hub import hub


def bert(layers, names, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.3, id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    return BertForSequenceClassification(config)


def rows(count=48):
    made = [
        {
            "input_ids": [1 + (7 * i + j) % 49 for j in range(4 + i % 9)],
            "labels": i % 2,
            "source": "xy"[i % 3 == 0],
        }
        for i in range(count)
    ]
    return Dataset.from_list([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in made])


def accuracy(predicted):
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def trainer_in(folder, teacher=None, **options):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a b c d"], 300, task="sequence-classification")
    settings = {
        "max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", **options,
    }  # fmt: skip
    return DistillationTrainer(
        bert(1, ["b", "a"], seed=1),
        DistillationArguments(output_dir=str(folder), **settings),
        teacher=teacher or bert(2, ["a", "b"]),
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=PaddingCollator(tokenizer),
        compute_metrics=accuracy,
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A trainer, what it reported, and the further students."""
    folder = tmp_path_factory.mktemp("script")
    trainer = trainer_in(folder, train_sampling_strategy="group_by_length")
    trainer.train()
    trainer.save_model()
    others = {"control": bert(1, ["b", "a"], seed=2), "wide": bert(3, ["b", "a"], seed=3)}
    results = trainer.report(
        control=others["control"],
        students={"wide": others["wide"]},
        slices=["source", "length", "label"],
        dataset="somebody/rows",
        watts=30,
    )
    return trainer, results, others


@torch.no_grad()
def right(model, order=(0, 1)):
    """The share of rows that a model gets right, one row at a time."""
    model.eval()
    found = [
        order[int(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax())] == row["labels"]
        for row in rows()
    ]
    return sum(found) / len(found)


def test_every_arm_is_scored_on_the_same_rows_in_the_order_of_its_own_labels(reported):
    """Trap 32: the teacher names its classes in another order than the student."""
    trainer, results, others = reported
    assert list(results.arms) == ["teacher", "student", "control", "wide"]
    expected = {"teacher": right(trainer.teacher.model, order=(1, 0)), "student": right(trainer.model)}
    expected |= {name: right(model) for name, model in others.items()}
    assert {n: a.metrics["accuracy"] for n, a in results.arms.items()} == pytest.approx(expected)
    assert results.primary_metric == "accuracy" and results.greater_is_better
    assert results.arms["teacher"].eval_agreement == 1 and results.arms["student"].eval_kl > 0
    assert results.arms["student"].bytes_on_disk > 0


def test_differences_are_those_of_the_same_rows(reported):
    """Trap 52: every student against the control, and the student against its teacher."""
    _, results, _ = reported
    assert [(d.one, d.other) for d in results.differences] == [
        ("student", "control"), ("wide", "control"), ("student", "teacher"),
    ]  # fmt: skip
    for found in results.differences:
        scores = [results.arms[name].metrics["accuracy"] for name in (found.one, found.other)]
        assert found.value == pytest.approx(scores[0] - scores[1]) and found.how == "mcnemar"
        assert found.low <= found.value <= found.high
    assert {"loss"} <= results.arms["student"].errors.keys()


def test_rows_are_matched_with_their_slices_even_where_training_groups_them_by_length(reported):
    trainer, results, _ = reported
    part = next(part for part in results.slices if (part.by, part.value) == ("source", "y"))
    model = trainer.model.eval()
    with torch.no_grad():
        hits = [
            int(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax()) == row["labels"]
            for row in rows()
            if row["source"] == "y"
        ]
    assert part.rows == len(hits) and part.scores["student"].value == pytest.approx(sum(hits) / len(hits))
    lengths = [part for part in results.slices if part.by == "length"]
    assert sum(part.rows for part in lengths) == 48
    shown = results.behaviour.differences[0]
    assert shown.kl >= results.behaviour.differences[-1].kl


def test_page_card_and_file_are_in_the_folder(reported):
    trainer, results, _ = reported
    folder = trainer.args.folder
    assert Results.read(folder / "results.json") == results
    assert "source: y" in (folder / "report.html").read_text(encoding="utf-8")
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == ["somebody/rows"] and card.data.base_model is None
    assert "A script made it" in card.text and "hf-kd distill" not in card.text
    assert any("loss_kd" in row for row in results.training)
    assert results.provenance["energy"]["wh"] is not None


def test_what_cannot_be_compared_is_refused_with_the_way_out(reported):
    trainer, _, others = reported
    for options, expected in (
        ({"primary_metric": "f1"}, "primary_metric='f1' is not measured for every model: use one of"),
        ({"slices": ["sauce"]}, "slices='sauce' is no column of the rows: use some of length, label"),
        ({"students": {"control": others["wide"]}, "control": others["wide"]}, "'control' is taken"),
    ):
        with pytest.raises(ValueError, match=expected):
            trainer.report(**options)
    with pytest.raises(ValueError, match="give rows with a length"):
        trainer.report(iter([]))


def test_several_teachers_have_no_weight_and_time_of_their_own(tmp_path):
    trainer = trainer_in(tmp_path, teacher=[bert(2, ["b", "a"], 5), bert(1, ["a", "b"], 6)])
    results = trainer.report()
    taught = results.arms["teacher"]
    assert taught.parameters is None and not taught.latency and results.arms["student"].latency
    answers = [trainer.teacher({"input_ids": torch.tensor([row["input_ids"]])}).dense() for row in rows()]
    hits = [int(a["logits"].argmax()) == row["labels"] for a, row in zip(answers, rows(), strict=True)]
    assert taught.metrics["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert "of its parameters" not in results.verdict and "keeps" in results.verdict
    results = trainer.report(teacher=bert(2, ["b", "a"], 5))
    assert results.arms["teacher"].parameters > 0 and list(results.arms) == ["teacher", "student"]


def test_a_student_that_is_its_own_teacher_is_compared_with_another_model(tmp_path):
    trainer = trainer_in(tmp_path, teacher=bert(2, ["b", "a"], 5), alpha=0.0)
    trainer.teacher = None
    with pytest.raises(ValueError, match="pass the model to compare with as teacher="):
        trainer.report()


def test_a_trainer_publishes_student_card_report_and_options_and_can_try_again(reported, monkeypatch):
    trainer, _, _ = reported
    folder = trainer.args.folder
    (folder / "results.json").unlink()  # it is made where there is none
    with hub(broken=1) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_kd.publish, "HfApi", functools.partial(HfApi, endpoint=server.address))
        monkeypatch.setattr(trainer.args, "hub_model_id", "small")
        with pytest.raises(ValueError, match=f"try again with: hf-kd publish {folder} small"):
            trainer.push_to_hub(token="hf_not-to-be-seen")
        address = trainer.push_to_hub("Distilled", token="hf_not-to-be-seen")
        files = server.files["somebody/small"]
    assert address.endswith("somebody/small")
    assert {"config.json", "model.safetensors", "README.md", "report.html", "results.json"} <= files.keys()
    assert "distillation.yaml" in files and "training_args.bin" not in files and "teacher.json" not in files
    options = yaml.safe_load(files["distillation.yaml"]["content"])
    assert options["temperature"] == 1.0 and str(folder.parent) not in str(options)
    assert b"hf_kd_layers" not in files["config.json"]["content"]
    with pytest.raises(ValueError, match="blocking=False"):
        trainer.push_to_hub(blocking=False)
