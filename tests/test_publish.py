"""Publishing, from the command line, to a stand-in for the Hub on this machine."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import BertConfig, BertForSequenceClassification

from hf_kd import cli
from hf_kd.card import write_card
from hf_kd.options import RunOptions
from hf_kd.pages import write_html
from hf_kd.publish import publish, push_checkpoint, without_paths

from .hub import hub
from .test_report import results

TOKEN = "hf_not-to-be-seen"


@pytest.fixture
def finished(tmp_path):
    """What a run leaves in its folder: the student, and things that are nobody's business."""
    out = tmp_path / "out"
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20
    )
    BertForSequenceClassification(config).save_pretrained(out)
    for name in ("teacher", "control", "checkpoint-2"):
        (out / name).mkdir()
        (out / name / "model.safetensors").write_bytes(b"0")
    (out / "training_args.bin").write_bytes(b"0")
    rows = str(tmp_path / "private place" / "rows.csv")
    options = {
        "teacher": "a/teacher",
        "dataset": rows,
        "alpha": 0.5,
        "hub_model_id": "x/y",
        "output_dir": "out",
    }
    (out / "distillation.yaml").write_text(yaml.safe_dump(options))
    found = replace(results(), provenance={"dataset": rows, "seed": 1, "options": options})
    found.write(out / "results.json")
    write_html(found, out)
    write_card(found, RunOptions(teacher="a/teacher", dataset=rows), out)
    return out


def test_the_student_its_card_and_its_report_are_published_and_nothing_else(finished, capsys):
    with hub(token=TOKEN) as server:
        assert cli.main(["publish", str(finished), "small", "--private"]) == 0
        files = server.files["somebody/small"]
    assert server.private == {"somebody/small": True}
    assert {
        "config.json",
        "model.safetensors",
        "README.md",
        "report.html",
        "report-quality.png",
    } <= files.keys()
    assert {"results.json", "distillation.yaml"} <= files.keys()
    assert not any("/" in name for name in files) and "training_args.bin" not in files
    assert files["model.safetensors"]["content"] == (finished / "model.safetensors").read_bytes()
    assert not any(b"private place" in file["content"] for file in files.values())
    options = yaml.safe_load(files["distillation.yaml"]["content"])
    assert (
        options["teacher"] == "a/teacher"
        and options["dataset"] == "rows.csv"
        and "hub_model_id" not in options
    )
    assert f"Bearer {TOKEN}" in server.tokens
    assert TOKEN not in "".join(capsys.readouterr())
    assert not any(TOKEN.encode() in file["content"] for file in files.values())
    assert not list(finished.glob(".publish-*"))


def test_what_the_hub_does_not_take_is_said_with_the_way_to_try_again(finished, capsys):
    command = ["publish", str(finished), "small"]
    with hub(broken=99, token=TOKEN) as server:
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert f"try again with: hf-kd publish {finished} small" in said and TOKEN not in said
        server.broken = 0
        assert cli.main(command) == 0
        assert "model.safetensors" in server.files["somebody/small"]
        server.shutdown()
        server.server_close()
        capsys.readouterr()
        assert cli.main(command) == 2
        assert "try again" in capsys.readouterr().err


def test_a_folder_without_a_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no student"):
        publish(tmp_path, "small")


def test_only_the_last_part_of_a_path_is_public(tmp_path):
    given = {"a": [str(tmp_path / "x.csv")], "b": "owner/model", "c": 3, "teacher": "torch://10.0.0.7:29600"}
    assert without_paths({"options": given}) == {
        "options": {"a": ["x.csv"], "b": "owner/model", "c": 3, "teacher": "ADDRESS"}
    }


class FakeHub:
    """`HfApi` whose uploads begin when they are let go; keeps what each one sent."""

    pool = ThreadPoolExecutor(1)

    def __init__(self, gate, sent):
        self.gate, self.sent = gate, sent

    def __call__(self, token=None):
        return self

    def upload_folder(self, *, folder_path, path_in_repo, run_as_future, **kwargs):
        assert run_as_future

        def upload():
            self.gate.wait(30)
            folder = Path(folder_path)
            files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            self.sent.append((kwargs["commit_message"], path_in_repo, files))

        return self.pool.submit(upload)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_checkpoints_are_uploaded_from_links(tmp_path, monkeypatch, strategy):
    """In the background, from links of their own: the checkpoint may be deleted before the upload begins."""
    import threading

    gate, sent = threading.Event(), []
    monkeypatch.setattr("hf_kd.publish.HfApi", FakeHub(gate, sent))
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "optimizer.pt", "trainer_state.json", "checkpoint.json"):
        (folder / name).write_text(name)
    args = SimpleNamespace(hub_strategy=strategy, hub_always_push=False, hub_token=None, hub_revision=None)
    trainer = SimpleNamespace(
        args=args,
        push_in_progress=None,
        is_world_process_zero=lambda: True,
        hub_model_id="a/b",
        control=None,
        state=SimpleNamespace(global_step=5),
        callback_handler=SimpleNamespace(on_push_begin=lambda *a: None),
    )
    push_checkpoint(trainer, folder)
    push_checkpoint(trainer, folder)  # one is under way: this one is left out
    shutil.rmtree(folder)
    gate.set()
    if strategy == "end":
        assert trainer.push_in_progress is None
        return
    trainer.push_in_progress.wait_until_done()
    expected = [(None, ["config.json", "model.safetensors"])]
    if strategy != "every_save":
        inside = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-5"}[strategy]
        names = ["checkpoint.json", "config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"]
        expected.append((inside, names))
    assert [entry[1:] for entry in sent] == expected
