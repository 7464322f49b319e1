"""Nothing that comes from elsewhere runs here, leaves its folder, or carries a secret away."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

from hf_kd import DistillationArguments, DistillationTrainer
from hf_kd.card import write_card
from hf_kd.config import parse
from hf_kd.loading import load_model
from hf_kd.options import RunOptions
from hf_kd.pages import write_html, write_markdown
from hf_kd.results import Arm, Results
from hf_kd.trust import code_metrics, downloaded

from .test_trainer import arguments, classifiers, text_rows

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "hf_kd").rglob("*.py"))
CANARY = "hf_canaryTOKENcanaryTOKENcanary00"

# Calls that load or make objects from bytes, or run text, by the end of their name.
FORBIDDEN = {
    "torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "joblib.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load", "numpy.load", "eval", "exec", "os.system",
    "marshal.loads", "shelve.open",
}  # fmt: skip


def calls(path: Path) -> list[tuple[int, str, ast.Call]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            found.append((node.lineno, ast.unparse(node.func), node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_source_of_ours_pickles_or_runs_text(path: Path) -> None:
    assert "import pickle" not in path.read_text(encoding="utf-8")
    for line, name, node in calls(path):
        assert name not in FORBIDDEN, f"{path}:{line}: {name}"
        for keyword in node.keywords:
            trusted = keyword.arg == "trust_remote_code" and isinstance(keyword.value, ast.Constant)
            assert not (trusted and keyword.value.value), f"{path}:{line} trusts without being asked"
            assert not (keyword.arg == "shell" and getattr(keyword.value, "value", False)), f"{path}:{line}"


def test_the_scan_finds_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import torch\ntorch.load('a')\n")
    with pytest.raises(AssertionError):
        test_no_source_of_ours_pickles_or_runs_text(tmp_path / "x.py")


class Payload:
    """A pickle that leaves a mark where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.mark, "run"))


def torch_file(payload: Any) -> bytes:
    """What `torch.save` would make of an object, with any pickle inside."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


def saved(folder: Path) -> DistillationTrainer:
    student, teacher = classifiers()
    trainer = DistillationTrainer(
        student,
        arguments(folder, max_steps=2, save_strategy="steps", save_steps=1, hub_token=CANARY),
        teacher=teacher,
        train_dataset=text_rows(8),
    )
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints and a student, made with a token in hand; and its log."""
    folder = tmp_path_factory.mktemp("run") / "out"
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", CANARY)
        trainer = saved(folder)
        say = [
            repr(trainer.args),
            str(trainer.args),
            str(trainer.args.to_dict()),
            trainer.args.to_json_string(),
        ]
    logging.getLogger().removeHandler(handler)
    (folder / "said.txt").write_text("\n".join([stream.getvalue(), *say]))
    arm = Arm(metrics={"accuracy": 0.5}, parameters=1, bytes=1)
    from hf_kd.records import resolved_options

    results = Results(
        "sequence-classification", "accuracy", True, {"teacher": arm, "student": arm},
        provenance={"options": resolved_options(trainer.args)},
    )  # fmt: skip
    results.write(folder / "results.json")
    write_html(results, folder)
    write_card(results, RunOptions(teacher="t", dataset="d"), folder)
    return folder


def test_tokens_are_in_no_file_and_no_log(run: Path) -> None:
    """HF_TOKEN and `hub_token` were set: not in YAML, JSON, HTML, the card, the log, nor in what args say."""
    files = [path for path in run.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"distillation.yaml", "results.json", "report.html", "README.md", "said.txt"} <= names
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path


def test_checkpoints_hold_no_pickled_arguments(run: Path) -> None:
    """Trainer's `training_args.bin` is not written; what torch wrote can be read with weights only."""
    assert not list(run.rglob("training_args.bin"))
    binary = [path for path in run.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert {path.name for path in binary} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    from transformers.trainer import safe_globals

    for path in binary:
        with safe_globals():
            torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_state_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    """A checkpoint from elsewhere whose optimizer state is a program: an error, and it did not run."""
    import shutil

    folder = Path(shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1"))
    mark = tmp_path / "mark"
    (folder / name).write_bytes(torch_file(Payload(mark)))
    (folder / "checkpoint.json").unlink()
    student, teacher = classifiers()
    trainer = DistillationTrainer(
        student, arguments(tmp_path / "out", max_steps=2), teacher=teacher, train_dataset=text_rows(8)
    )
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert not mark.exists()
    torch.load(folder / name, weights_only=False)  # what would have happened
    assert mark.exists()


def test_hostile_weights_are_refused(tmp_path: Path) -> None:
    """`pytorch_model.bin` with a program in it."""
    student, _ = classifiers()
    student.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(torch_file({"x": Payload(tmp_path / "mark")}))
    with pytest.raises(Exception, match=r"(?i)weights.only|safetensors|unpickl"):
        load_model(str(tmp_path / "model"), role="student")
    assert not (tmp_path / "mark").exists()


CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path("{mark}").write_text("run")
class OwnConfig(BertConfig):
    model_type = "never-heard-of"
class Own(BertForSequenceClassification):
    config_class = OwnConfig
"""


def test_code_of_a_checkpoint_runs_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trust_remote_code` is off, and is passed on when it is on."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    student, _ = classifiers()
    student.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config |= {"architectures": ["Own"], "model_type": "bert"}
    config["auto_map"] = {"AutoConfig": "modeling.OwnConfig"}
    config["auto_map"]["AutoModelForSequenceClassification"] = "modeling.Own"
    config["model_type"] = "never-heard-of"
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "modeling.py").write_text(CODE.format(mark=tmp_path / "mark"))
    with pytest.raises(ValueError, match="trust_remote_code|never-heard-of"):
        load_model(str(tmp_path / "own"), "sequence-classification", role="teacher")
    assert not (tmp_path / "mark").exists()
    assert DistillationArguments(str(tmp_path), use_cpu=True).trust_remote_code is False
    with contextlib.suppress(Exception):  # the class is no model that can be built: its module was run
        load_model(str(tmp_path / "own"), "sequence-classification", role="teacher", trust_remote_code=True)
    assert (tmp_path / "mark").exists()


def test_a_downloaded_configuration_names_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the Hub's cache or a folder that it filled: refused. The same file of one's own: taken."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    hostile = {
        "divergence": "antigravity:open", "hidden_loss": "os:system", "trust_remote_code": True,
        "metrics": ["evil/metric"],
    }  # fmt: skip
    base = {"dataset": "builtin:digits", "teacher": "t", "student": "s", "use_cpu": True}
    snapshot = cache / "models--a--b" / "snapshots" / "1"
    filled = tmp_path / "filled"
    (filled / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (filled / ".cache" / "huggingface" / "download" / "distillation.yaml.metadata").write_text("")
    own = tmp_path / "own"
    for folder, elsewhere in ((snapshot, True), (filled, True), (own, False)):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "distillation.yaml"
        assert downloaded(path) == elsewhere
        for name, value in hostile.items():
            path.write_text(yaml.safe_dump({**base, name: value, "hidden_weight": 1.0}))
            if elsewhere:
                with pytest.raises(ValueError, match=f"was downloaded, and names code.*{name}="):
                    parse(["--config", str(path), "--output_dir", str(tmp_path / "out")])
        path.write_text(yaml.safe_dump({**base, "divergence": "forward_kl", "metrics": ["accuracy"]}))
        parse(["--config", str(path), "--output_dir", str(tmp_path / "out")])
    (own / "distillation.yaml").write_text(yaml.safe_dump({**base, "divergence": "torch:nn"}))
    with pytest.raises(ValueError, match="name a function"):  # it was looked up
        parse(["--config", str(own / "distillation.yaml"), "--output_dir", str(tmp_path / "out")])
    link = tmp_path / "link.yaml"
    link.symlink_to(snapshot / "distillation.yaml")
    assert downloaded(link)
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match="does not exist"):
        parse(["--config", "somebody/distilled"])


def test_metrics_of_the_hub_are_programs(tmp_path: Path) -> None:
    assert code_metrics(["accuracy", "seqeval", "perplexity", "loss"]) == []
    assert code_metrics(["rouge", str(tmp_path)]) == ["rouge"] and code_metrics(None) == []
    from hf_kd.setting import load

    argv = f"--dataset builtin:digits --teacher {tmp_path} --student {tmp_path} --metrics rouge".split()
    argv += f"--output_dir {tmp_path / 'out'} --use_cpu --task image-classification".split()
    with pytest.raises(ValueError, match="metrics: 'rouge' is not built in.*set trust_remote_code=true"):
        load(*parse(argv))


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text in ("alpha: !!python/object/apply:os.getpid []", "divergence_options: !!python/name:os.system"):
        path.write_text(f"dataset: builtin:digits\n{text}\n")
        with pytest.raises((ValueError, yaml.YAMLError)):
            parse(["--config", str(path)])


HOSTILE = "<img src=x onerror=alert(1)>|[a](javascript:b)`{{7*7}}`\n# title\n---"


def test_hostile_names_are_shown_and_not_acted_on(tmp_path: Path) -> None:
    """Labels, models, data, metrics and arms named by somebody else, in HTML, Markdown and the card."""
    arm = Arm(metrics={HOSTILE: 0.5, "accuracy": 0.5}, parameters=1, bytes=1)
    results = Results(
        HOSTILE, "accuracy", True, {"teacher": arm, "student": arm, HOSTILE: arm},
        provenance={"dataset": HOSTILE, "options": {HOSTILE: HOSTILE}},
        machine={"device": HOSTILE, "cpu": HOSTILE},
    )  # fmt: skip
    page = write_html(results, tmp_path).read_text()
    assert "<img" not in page.replace("&lt;img", "") and "49" not in page.split("&lt;img")[1][:60]
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    for text in (write_markdown(results, tmp_path).read_text(),):
        assert "<img" not in text.replace("\\<img", "") and "](javascript" not in text.replace("\\](", "")
        assert not [line for line in text.splitlines()[1:] if line.startswith("# title")]
    results = replace(results, task="image-classification")
    card = write_card(results, RunOptions(teacher=HOSTILE, dataset=HOSTILE), tmp_path, name="a/b").read_text()
    header, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert isinstance(yaml.safe_load(header), dict)
    assert "<img" not in body.replace("\\<img", "") and "\n# title" not in body


def test_a_repository_name_cannot_leave_its_code_block(tmp_path: Path) -> None:
    """The card shows it between quotes in a fenced block."""
    arm = Arm(metrics={"accuracy": 0.5}, parameters=1, bytes=1)
    results = Results("image-classification", "accuracy", True, {"teacher": arm, "student": arm})
    hostile = 'a")\nimport os  # ```\n<img>'
    card = write_card(results, RunOptions(teacher="t"), tmp_path, name=hostile).read_text()
    assert "\nimport os" not in card and "<img>" not in card


def test_import_hooks_of_the_tests_are_clean() -> None:
    """The audit of versions says in words when it can't run; it is a step of CI."""
    text = (ROOT / ".ci" / "run").read_text()
    assert ".ci/audit" in text and "NOT RUN" in (ROOT / ".ci" / "audit").read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "audit")], check=False).returncode == 0


def test_dependencies_are_bounded() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wish in (
        *project["dependencies"],
        *[w for ws in project["optional-dependencies"].values() for w in ws],
    ):
        assert ">=" in wish and ",<" in wish, wish
