"""Raw rows to what a Trainer takes: data sets, a collator and metrics, for one task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from hf_kd.data.collate import CausalCollator, MaskingCollator, PaddingCollator
from hf_kd.data.columns import input_columns, label_column
from hf_kd.data.images import audio_rows, image_rows
from hf_kd.data.labels import describe_labels
from hf_kd.data.language import are_tokens, causal_rows, masked_rows, pair_rows
from hf_kd.data.mapping import Context, row_length
from hf_kd.data.processors import treat_alike
from hf_kd.data.spans import allowed_tokens, question_rows
from hf_kd.data.streamed import Streamed
from hf_kd.data.text import sequence_rows, token_rows
from hf_kd.metrics import LOWER_IS_BETTER, Compute, default_metrics, keep_top_class, make_compute_metrics
from hf_kd.options import RunOptions
from hf_kd.teachers.ensemble import TEACHER_ID

PREPARE: dict[str, Callable[..., Any]] = {
    "sequence-classification": sequence_rows,
    "token-classification": token_rows,
    "image-classification": image_rows,
    "audio-classification": audio_rows,
    "masked-lm": masked_rows,
    "causal-lm": causal_rows,
    "seq2seq-lm": pair_rows,
    "question-answering": question_rows,
}
# Tasks whose rows are cut from running text, so that a number of rows is one of what is cut.
_RUNNING_TEXT = ("masked-lm", "causal-lm")
# More than a token usually has.
_CHARACTERS = 6


@dataclass(frozen=True)
class Prepared:
    """What a Trainer takes.

    Attributes:
        train: Training rows.
        eval: Evaluation rows.
        test: Rows of the final table, or None to use `eval`.
        collator: Makes batches of them.
        compute_metrics: For `Trainer`, or None where the loss says it all.
        preprocess_logits_for_metrics: For `Trainer`, or None where logits are kept as they are.
        primary_metric: What ranks models: a key of what `compute_metrics` returns, or `perplexity`, which is
            `hf_kd.metrics.perplexity(eval_loss)`.
        greater_is_better: Whether more of it is better.
        columns: Of the rows of the final table, the columns that `slices` names, one value a row.
        sample: The first training rows, where `train` is a stream.
    """

    train: Any
    eval: Any
    test: Any
    collator: Any
    compute_metrics: Compute | None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None
    primary_metric: str
    greater_is_better: bool
    columns: dict[str, list[Any]] = field(default_factory=dict)
    sample: Any = None

    @property
    def at_hand(self) -> Any:
        """Training rows that can be counted: the first ones, where they are a stream."""
        return self.train if self.sample is None else self.sample

    def shuffled(self, seed: int, buffer: int) -> Prepared:
        """With a stream in another order in each pass; rows that can be counted are shuffled by Trainer."""
        if self.sample is None or buffer <= 1:
            return self
        return replace(self, train=self.train.shuffle(seed=seed, buffer_size=buffer))


def prepare(
    raw: DatasetDict,
    options: RunOptions,
    *,
    task: str,
    processor: Any,
    config: Any,
    teacher_processor: Any = None,
) -> Prepared:
    """Make raw rows into what a model of a task is trained and evaluated on.

    Args:
        raw: What `load_raw` returned.
        options: Columns, lengths, numbers of rows and metrics.
        task: A key of `hf_kd.tasks.TASKS`.
        processor: Tokenizer, image processor or feature extractor.
        config: The model's config: its class ids and how long a row may be.
        teacher_processor: The teacher's, if it may be another one. Where it makes something else of the same
            input, its columns are added with the prefix `teacher_`.

    Raises:
        ValueError: If columns, labels or processors do not fit; names what there is and the option to set.
    """
    if task not in PREPARE:
        raise ValueError(
            f"task={task!r} has no data preparation for the command line. If teacher={options.teacher!r} is "
            f"yet to learn its task, set train_teacher=true and task to one of {', '.join(PREPARE)}; else "
            "use DistillationTrainer in Python, with rows of your own"
        )
    options = replace(options, task=task)
    processor, teacher_processor = _own_processors(processor, teacher_processor)
    tokens = are_tokens(raw["train"], options, task)
    context = Context(
        options=options,
        task=task,
        processor=processor,
        teacher_processor=teacher_processor,
        config=config,
        inputs=["input_ids"] if tokens else input_columns(raw["train"], options, task),
        label_column="labels" if tokens else label_column(raw["train"], options, task),
        labels=describe_labels(raw, options),
    )
    splits = {name: _prepare_split(raw[name], name, context) for name in raw}
    names = [config.id2label[i] for i in range(config.num_labels)] if context.labels else None
    problem = context.labels.problem_type if context.labels else None
    metrics = tuple(options.metrics or default_metrics(task, problem, names))
    evaluated = [splits[name] for name in ("eval", "test") if name in splits]
    primary = {"seqeval": "entity_f1"}.get(metrics[0], metrics[0])
    return Prepared(
        train=_prepare_stream(raw.stream, context) if isinstance(raw, Streamed) else splits["train"],
        sample=splits["train"] if isinstance(raw, Streamed) else None,
        eval=splits["eval"],
        test=splits.get("test"),
        collator=_collator(context),
        compute_metrics=make_compute_metrics(
            metrics,
            task,
            problem_type=problem,
            label_names=names,
            allowed=allowed_tokens(evaluated) if task == "question-answering" else None,
        ),
        preprocess_logits_for_metrics=keep_top_class if task.endswith("-lm") else None,
        primary_metric=primary,
        greater_is_better=primary not in LOWER_IS_BETTER,
        columns=_slice_columns(raw, splits, options),
    )


def _slice_columns(raw: DatasetDict, splits: dict[str, Any], options: RunOptions) -> dict[str, list[Any]]:
    """What `slices` names beside "length" and "label", which are known from what was prepared."""
    name = "test" if "test" in splits else "eval"
    rows = _some_rows(raw[name], options.max_eval_samples)
    found = {}
    for column in options.slices or ():
        if column in ("length", "label"):
            continue
        if column not in rows.column_names:
            known = ", ".join(["length", "label", *rows.column_names])
            raise ValueError(f"slices={column!r} is no column of the data: use some of {known}")
        if len(rows) != len(splits[name]):
            raise ValueError(
                f"slices={column!r}: {len(rows)} rows of the data become {len(splits[name])} rows of "
                f"{options.task}, so a column says nothing of one of them; use slices=length or leave it out"
            )
        found[column] = list(rows[column])
    return found


def _own_processors(processor: Any, teacher_processor: Any) -> tuple[Any, Any]:
    """The processors to use: one where both make the same, the one that makes more columns."""
    if teacher_processor is None or processor is teacher_processor:
        return processor, None
    if not treat_alike(processor, teacher_processor):
        return processor, teacher_processor
    if isinstance(processor, PreTrainedTokenizerBase):
        # A tokenizer that leaves out token_type_ids must not starve a teacher that reads them.
        more = set(teacher_processor.model_input_names) > set(processor.model_input_names)
        return (teacher_processor if more else processor), None
    return processor, None


def _prepare_split(rows: Dataset, name: str, context: Context) -> Any:
    limit = context.options.max_train_samples if name == "train" else context.options.max_eval_samples
    if context.task in _RUNNING_TEXT:
        masked = {"masked": name != "train"} if context.task == "masked-lm" else {}
        part = _enough_text(rows, limit, context)
        made = PREPARE[context.task](part, context, **masked)
        if limit is not None and len(made) < limit and len(part) < len(rows):
            made = PREPARE[context.task](rows, context, **masked)
        return made if limit is None or limit >= len(made) else made.select(range(limit))
    part = _some_rows(rows, limit)
    made = PREPARE[context.task](part, context)
    # Which teacher answers for a row, where a row stays one row.
    if TEACHER_ID in part.column_names and len(made) == len(part) and isinstance(made, Dataset):
        made = made.add_column(TEACHER_ID, part[TEACHER_ID][:])
    return made


def _prepare_stream(stream: Any, context: Context) -> Any:
    masked = {"masked": False} if context.task == "masked-lm" else {}
    made, limit = PREPARE[context.task](stream, context, **masked), context.options.max_train_samples
    return made if limit is None else made.take(limit)


def _enough_text(rows: Dataset, limit: int | None, context: Context) -> Dataset:
    """The first rows, as many as probably give `limit` rows of tokens, so that not all text is tokenised."""
    if limit is None:
        return rows
    wanted = limit * row_length(context) * _CHARACTERS
    for i, row in enumerate(rows.select_columns(context.inputs)):
        wanted -= sum(len(text or "") for text in row.values())
        if wanted <= 0:
            return rows.select(range(i + 1))
    return rows


def _some_rows(rows: Dataset, limit: int | None) -> Dataset:
    """The same `limit` rows in every run, from all over the data: files are often sorted by label."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=0).select(range(limit))


def _collator(context: Context) -> PaddingCollator:
    if context.task == "causal-lm":
        return CausalCollator(context.processor)
    if context.task == "masked-lm":
        return MaskingCollator(context.processor, context.options.mlm_probability)
    return PaddingCollator(
        context.processor, context.teacher_processor, labels_right=context.task == "seq2seq-lm"
    )
