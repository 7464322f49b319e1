"""The model card of a student: metadata that the Hub understands, and the comparison with its teacher."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markupsafe import Markup

from hf_kd.options import RunOptions
from hf_kd.pages import CARD_CHARTS, content, environment, write_images
from hf_kd.records import write_text
from hf_kd.report import NOT_SHOWN
from hf_kd.results import Results
from hf_kd.tasks import TASKS
from hf_kd.teachers.link import is_link
from hf_kd.teachers.server import is_address

CARD_FILE = "README.md"

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The Hub's names of tasks, where they are others than ours.
_PIPELINES = {
    "sequence-classification": "text-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "seq2seq-lm": "text2text-generation",
    "speech-seq2seq": "automatic-speech-recognition",
    "ctc": "automatic-speech-recognition",
    "semantic-segmentation": "image-segmentation",
    "embedding": "feature-extraction",
    "embedding-similarity": "feature-extraction",
    "next-sentence": "text-classification",
    "image-text": "zero-shot-image-classification",
}


def write_card(
    results: Results, run: RunOptions, folder: Path, *, name: str | None = None, script: bool = False
) -> Path:
    """Write `README.md`, the card of the student in a folder, and its charts as PNG beside it.

    Args:
        results: What the run found.
        run: Its models and data; what is a path of this machine is not named in the card.
        folder: Where the student is.
        name: The student's repository; default: the folder's name.
        script: Whether a script made it, whose models and data `distillation.yaml` does not name.

    Returns:
        The file.
    """
    teacher, data = _public(run.teacher), _public(run.dataset)
    repository = re.sub(r"[^\w./-]", "-", name or folder.resolve().name)
    shown = replace(results, provenance={**results.provenance, "dataset": data or ""})
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=_PIPELINES.get(results.task, results.task),
        tags=["knowledge-distillation", "hf-kd"],
        base_model=teacher,
        datasets=[data] if data else None,
        model_name=repository,
        eval_results=_metrics(results, data),
    )
    text = (
        environment(autoescape=False)
        .get_template("card.md")
        .render(
            **{**content(shown), "title": repository},
            teacher=teacher or _described(run.teacher, results),
            images=write_images(results, folder, CARD_CHARTS),
            control="control" in results.arms,
            repository=Markup(repository),  # a name of letters, digits, dots, dashes and slashes
            script=script,
            auto_class=TASKS[results.task].auto_class if results.task in TASKS else "AutoModel",
            processor_class="AutoTokenizer"
            if (folder / "tokenizer_config.json").is_file()
            else "AutoProcessor",
        )
    )
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")
    path = folder / CARD_FILE
    write_text(path, str(card))
    return path


def _described(teacher: str | None, results: Results) -> str:
    """A teacher without an id on the Hub: by the name that its server gives it, never by its address."""
    if is_link(teacher):
        return "a teacher in processes of its own"
    if is_address(teacher):
        name = _public((results.provenance.get("teacher_identity") or {}).get("name"))
        return f"a teacher on a server, there called {name}" if name else "a teacher on a server"
    return "a teacher that is not on the Hub"


def _public(name: str | None) -> str | None:
    """A Hub id; None for what is only on this machine, whose paths are nobody's business."""
    if name is None or Path(name).expanduser().exists() or not _REPOSITORY.fullmatch(name):
        return None
    return name


def _metrics(results: Results, data: str | None) -> list[EvalResult] | None:
    student = results.arms["student"]
    values = {**student.metrics, "kl_to_teacher": student.eval_kl, "agreement": student.eval_agreement}
    return [
        EvalResult(
            task_type=_PIPELINES.get(results.task, results.task),
            dataset_type=data or "local",
            dataset_name=data or "data of the run",
            metric_type=name,
            metric_value=value,
        )
        for name, value in values.items()
        if name not in NOT_SHOWN and value is not None and math.isfinite(value)
    ] or None
