"""Every head that is known, and how a model's head is found."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal

from .base import IGNORE, Batch, Supervision, Task, TaskTerms, content_mask, token_mask
from .dense import CTC, Embedding, EmbeddingSimilarity, ImageText, ObjectDetection, Segmentation
from .text import TEXT_ENDS, CausalLM, DistillationToken, QuestionAnswering, Seq2SeqLM, SequenceClassification

__all__ = [
    "IGNORE",
    "TASKS",
    "TEXT_ENDS",
    "Batch",
    "Supervision",
    "Task",
    "TaskTerms",
    "resolve_task",
    "task_of_class",
]

_CLASSIFIERS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "video-classification": "AutoModelForVideoClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
_SEQ2SEQ = {
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(
            SequenceClassification(name=name, auto_class=auto, per_row=True)
            for name, auto in _CLASSIFIERS.items()
        ),
        Task(
            name="token-classification",
            auto_class="AutoModelForTokenClassification",
            position="labelled token",
            mask=content_mask,
        ),
        Task(name="masked-lm", auto_class="AutoModelForMaskedLM", position="masked token", mask=token_mask),
        CausalLM(
            name="causal-lm", auto_class="AutoModelForCausalLM", position="predicted token", mask=token_mask
        ),
        CausalLM(
            name="image-text-to-text",
            auto_class="AutoModelForImageTextToText",
            position="predicted token",
            mask=token_mask,
        ),
        *(
            Seq2SeqLM(name=name, auto_class=auto, position="decoder token", mask=token_mask)
            for name, auto in _SEQ2SEQ.items()
        ),
        QuestionAnswering(
            name="question-answering",
            auto_class="AutoModelForQuestionAnswering",
            logits=("start_logits", "end_logits"),
            labels=("start_positions", "end_positions"),
            position="row (its start and its end)",
            per_row=True,
        ),
        Task(name="multiple-choice", auto_class="AutoModelForMultipleChoice", position="row of choices"),
        Task(name="next-sentence", auto_class="AutoModelForNextSentencePrediction", position="pair"),
        CTC(name="ctc", auto_class="AutoModelForCTC", position="frame (its task loss: row)"),
        Segmentation(
            name="semantic-segmentation",
            auto_class="AutoModelForSemanticSegmentation",
            position="pixel",
            class_axis=1,
            ignore_index=255,
        ),
        ImageText(
            name="image-text",
            auto_class="AutoModelForZeroShotImageClassification",
            logits=("logits_per_image", "logits_per_text"),
            labels=(),
            position="pair (its image and its text)",
            per_row=True,
            batch_coupled=True,
        ),
        ObjectDetection(
            name="object-detection",
            auto_class="AutoModelForObjectDetection",
            position="row (its queries)",
        ),
        Embedding(
            name="embedding",
            auto_class="AutoModel",
            logits=("last_hidden_state",),
            labels=(),
            kind="vectors",
        ),
        EmbeddingSimilarity(
            name="embedding-similarity",
            auto_class="AutoModel",
            logits=("last_hidden_state",),
            labels=(),
            batch_coupled=True,
        ),
    )
}

# Transformers' own tables of model classes, in the order in which a class is looked up: BART stands in
# several, and its sequence-to-sequence use is the one with a trained head.
_CLASS_TABLES = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "seq2seq-lm",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "speech-seq2seq",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "image-text-to-text",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "causal-lm",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "masked-lm",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "audio-classification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "sequence-classification",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "image-classification",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES": "video-classification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "token-classification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "question-answering",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "multiple-choice",
    "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES": "next-sentence",
    "MODEL_FOR_CTC_MAPPING_NAMES": "ctc",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": "semantic-segmentation",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES": "image-text",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES": "object-detection",
    "MODEL_MAPPING_NAMES": "embedding",
}
# These rank pairs by independent sigmoids, not by a softmax over the batch.
_PAIRWISE = ("siglip", "siglip2", "siglip_model")


def task_of_class(class_name: str) -> str | None:
    """Name of the task of a Transformers model class, or None if it has no known head."""
    from transformers.models.auto import modeling_auto

    for table, task in _CLASS_TABLES.items():
        for names in getattr(modeling_auto, table).values():
            if class_name == names or (not isinstance(names, str) and class_name in names):
                return task
    return None


def resolve_task(task: str | Task | None, model: Any, *, supervise: str = "auto") -> Task:
    """The task of a model: given, named, or found from the model's class, and fitted to its config.

    Args:
        task: A `Task`, a name in `TASKS`, or None to look at the model's class.
        model: The student.
        supervise: `"auto"` or `"all"`; see `Task`.

    Returns:
        The task with the model's config and, for classification, its problem type.

    Raises:
        ValueError: If the name is unknown, or the class's head is; says what to supply.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if task is None:
        task = _found_task(base, config)
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task={task!r} is not known; choose one of {sorted(TASKS)}.")
        task = TASKS[task]
    if supervise not in ("auto", "all"):
        raise ValueError(f"supervise={supervise!r} is not known; choose 'auto' or 'all'.")
    changes: dict[str, Any] = {"config": config, "supervise": supervise}
    if task.name == "image-classification" and _has_distillation_token(base):
        task = DistillationToken(**{f.name: getattr(task, f.name) for f in fields(task)})
    if isinstance(task, SequenceClassification):
        changes["problem_type"] = problem_type(config)
        changes["kind"] = "regression" if changes["problem_type"] == "regression" else "classes"
    if isinstance(task, Segmentation):
        changes["ignore_index"] = getattr(config, "semantic_loss_ignore_index", task.ignore_index)
    if isinstance(task, CTC):
        changes["frames"] = getattr(base, "_get_feat_extract_output_lengths", None)
    return replace(task, **changes)


def _has_distillation_token(base: Any) -> bool:
    return any(kind.__name__.endswith("ForImageClassificationWithTeacher") for kind in type(base).__mro__)


def _found_task(base: Any, config: Any) -> str:
    # FSDP and users derive classes from Transformers' own; the head is the ancestor's.
    names = (task_of_class(ancestor.__name__) for ancestor in type(base).__mro__)
    name = next((name for name in names if name is not None), None)
    if name is None and config is None:
        return "sequence-classification"  # a plain module that returns [B, C] logits
    if name == "image-text" and getattr(config, "model_type", "") in _PAIRWISE:
        raise ValueError(
            f"{type(base).__name__} scores pairs by independent sigmoids, not by a softmax over the batch; "
            "describe its head with a Task of your own, or distil its encoders with task='embedding'."
        )
    # The tables mix decoders that read audio or images with encoder-decoders.
    if name in ("seq2seq-lm", "speech-seq2seq") and not getattr(config, "is_encoder_decoder", True):
        return "image-text-to-text"
    if name in ("causal-lm", "image-text-to-text") and getattr(config, "is_encoder_decoder", False):
        return "seq2seq-lm"
    if name is None:
        raise ValueError(
            f"The head of {type(base).__name__} is not known. Name one of task={sorted(TASKS)}, or "
            "describe it: "
            'Task(logits=("<output with the logits>",), labels=("<column with the labels>",), '
            "mask=lambda batch: <[B, ...] mask of positions, or None for one per row>)."
        )
    return name


def problem_type(config: Any) -> Literal["single", "multi", "regression"]:
    """What a classification config means: its `problem_type`, else regression for one output."""
    names: dict[str, Literal["single", "multi", "regression"]] = {
        "single_label_classification": "single",
        "multi_label_classification": "multi",
        "regression": "regression",
    }
    given = getattr(config, "problem_type", None)
    if given is not None:
        return names[given]
    return "regression" if getattr(config, "num_labels", 2) == 1 else "single"
