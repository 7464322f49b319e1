"""`DistillationTrainer`: a Trainer with a teacher and a mix. Wiring only; the maths is in `objective.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import EvalLoopOutput

from . import carried, checks, locks, ranks, sharding, streams, whole
from . import projection as projections
from .ahead import Ahead, Question
from .alignment import AlignmentError, ClassMap
from .balance import Balance
from .callbacks import KLThresholdCallback, StepCallback
from .checkpoints import restore_renamed
from .config import DistillationArguments
from .estimator import Estimator, settle
from .features import Features
from .fusing import Fusion
from .loading import load_model
from .matching import match_classes, match_inputs
from .objective import Counts, Mix, Objective, Selection, counts_of, resolve_objective, select
from .pair import Pair
from .predictions import Generation, predictions
from .projection import Projection
from .provenance import Meter
from .publish import push_checkpoint
from .records import write_options
from .results import Results
from .route import find_route
from .rows import ROW, RowCollator, RowDataset
from .schedules import schedule
from .scores import Scores
from .settling import Settled
from .spikes import SpikeWatch
from .students import memory
from .targets import Target
from .tasks import TEXT_ENDS, Batch, Supervision, Task, resolve_task
from .teachers import CachedTeacher, EMATeacher, Teacher, resolve_teacher
from .teachers.cache.adding import AddingCallback
from .teachers.selves import EMACallback
from .terms import TermLog

logger = logging.getLogger(__name__)

_PLAN = "hf_kd_plan"


@dataclass(frozen=True)
class _Plan:
    """What a micro-batch's share of the step is; made when the step's batches are fetched."""

    supervision: Supervision
    selection: Selection
    question: Question | None = None


class DistillationTrainer(Trainer):
    """Train a student on `(1 - alpha) * task + alpha * T^2 * D(teacher || student)`.

    Everything else is `transformers.Trainer`: data, optimizer, distribution, checkpoints, logging.

    Args:
        model: The student: a model, or a Hub id or directory.
        args: The options; see `DistillationArguments`.
        teacher: A model, a Hub id or directory, any `Teacher`, or several of them. None is accepted with
            `alpha=0` or a `self_teacher` only.
        task: What kind of head the two have: a name in `TASKS`, a `Task`, or None to find out from the
            student's class.
        teacher_processing_class: The teacher's tokenizer, if it may be another one than `processing_class`;
            default: the one beside the teacher's weights, if there is one.
        **kwargs: As for `transformers.Trainer` (`train_dataset`, `eval_dataset`, `processing_class`,
            `data_collator`, `compute_metrics`, `compute_loss_func`, `callbacks`, ...). A `compute_loss_func`
            replaces the task term; it has to divide by its `num_items_in_batch`.

    Raises:
        ValueError: If options contradict each other. What needs models and data to be seen is checked when
            training or evaluation starts, all in one message (see `hf_kd.checks`).

    Example:
        >>> trainer = DistillationTrainer(
        ...     model=student, teacher=teacher, args=DistillationArguments(output_dir="out"),
        ...     train_dataset=train, eval_dataset=dev, processing_class=tokenizer,
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    args: DistillationArguments
    objective: Objective
    #: What the command line was told about models and data; saved with the other options.
    run_options: dict[str, Any] | None = None
    #: Where a checkpoint is written before it is put in its place.
    staging: str | None = None

    # The loss is normalised by the counts of the whole step, over accumulation and ranks.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: DistillationArguments | None = None,
        *,
        teacher: nn.Module | Teacher | str | Sequence[Any] | None = None,
        task: str | Task | None = None,
        teacher_processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Load what is named, place the teacher, and find how the two models correspond."""
        if args is None:
            args = DistillationArguments(output_dir="distilled")
        if not isinstance(args, DistillationArguments):
            raise ValueError(
                f"args is a {type(args).__name__}; pass DistillationArguments, which has all its fields and "
                "the distillation options."
            )
        if isinstance(model, str):
            model = load_model(
                model,
                _task_name(task),
                role="student",
                trust_remote_code=args.trust_remote_code,
                new_head=True,
            )
        locks.made(args.folder)
        super().__init__(model=model, args=args, **kwargs)
        self.task = resolve_task(task, self.model, supervise=args.supervise)
        self.teacher = resolve_teacher(
            teacher, self.task, args, student=self.student, processor=self.processing_class
        )
        sharding.shard_teacher(self.teacher, self.accelerator, args.shard_teacher, self.student)
        sharding.name_layers(self.student, self.accelerator)
        self.teacher_processing_class = teacher_processing_class
        self.alignment_problem: AlignmentError | None = None
        classes = ClassMap()
        try:
            classes = match_classes(self)
            match_inputs(self)
        except AlignmentError as error:
            # Reported with every other problem when training or evaluation starts.
            self.alignment_problem = error
        self.objective = resolve_objective(
            self.task,
            divergence=args.divergence,
            divergence_options=args.divergence_options,
            classes=classes,
            label_smoothing=args.label_smoothing_factor,
        )
        self.objective = replace(self.objective, target=Target(args.target_correction, args.kd_weighting))
        self.settled: Settled | None = None  # temperature, calibration and weights that are measured
        for note in classes.notes:
            logger.warning(note)
        self.features = Features(args, self.student, self.teacher, self.task)
        shared: dict[str, Any] = {"device": args.device, "timeout": args.teacher_timeout}
        self.ahead = Ahead(
            args.teacher_ahead,
            self.teacher,
            student=self.student,
            features=self.features.wanted,
            **shared,
        )
        self.pair = Pair(self.student, self.teacher, self.task, ahead=self.ahead, **shared)
        self.projections = nn.ModuleDict(dict(self.features.projections))
        if self.pair.projection is not None:
            self.projections["output"] = self.pair.projection
        self._generation = Generation(
            args.predict_with_generate,
            max_length=args.generation_max_length,
            num_beams=args.generation_num_beams,
        )
        self._fusion: Fusion | str | None = None
        self._checked: set[bool] = set()  # for what: training, evaluation
        self._load_result: Any = None
        self.estimator: Estimator | None = None  # of a sparse teacher, from the first step on
        #: Whether the teacher gives some entries of its distribution alone; the checks find out.
        self.sparse = False
        self.terms = TermLog()
        self.scores = Scores()  # of the evaluation in hand
        self.meter = Meter()
        self.balance = Balance(args.term_gradients)
        #: Instead of the mix of the step, while a term is looked at by itself.
        self.fixed_mix: Mix | None = None
        self.spikes = SpikeWatch()  # of the run in hand
        self.place: streams.Place | None = None  # in the data, of the checkpoint that was resumed
        self._grad_norm: Any = None
        self.add_callback(StepCallback(self))
        if isinstance(self.teacher, EMATeacher):
            self.add_callback(EMACallback(self, self.teacher))
        if isinstance(self.teacher, CachedTeacher) and self.teacher.live is not None:
            self.add_callback(AddingCallback(self, self.teacher.flush))
        if args.kl_threshold is not None:
            self.add_callback(KLThresholdCallback(args.kl_threshold))

    @property
    def student(self) -> nn.Module:
        """The student, unwrapped."""
        assert self.model is not None
        return self.model

    @property
    def distils(self) -> bool:
        """Whether the teacher has any weight at any time; if not, it is never called."""
        return self.args.needs_teacher

    def mix(self) -> Mix:
        """Weights and temperatures now: pure functions of progress, so a resumed run agrees."""
        if self.fixed_mix is not None:
            return self.fixed_mix
        args = self.args
        total = self.state.max_steps or args.max_steps
        progress = min(self.state.global_step / total, 1.0) if total and total > 0 else 0.0
        settled = self.settled or Settled()
        start = settled.temperature or (1.0 if args.temperature == "auto" else float(args.temperature))
        temperature = schedule(args.temperature_schedule, start, args.temperature_end, progress)
        return Mix(
            alpha=schedule(args.alpha_schedule, args.alpha, args.alpha_end, progress),
            temperature=temperature,
            teacher_temperature=(args.teacher_temperature or temperature) * settled.calibration,
        )

    @property
    def projection(self) -> Projection | None:
        """The trained map between the widths of two encoders, if there is one."""
        return self.pair.projection

    # ---- start ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Check everything, then train; see `Trainer.train`. `True` resumes the newest whole checkpoint.

        Raises:
            ValueError: All problems of models, data and options in one message; or another run works in
                `output_dir`, or the checkpoint is not whole.
            RankError: When another rank is gone or silent.
            FloatingPointError: When a term of the loss is not finite; names step, term and rows.
        """
        self.check(training=True)
        sharding.refuse_pieces(self.student, self.accelerator)
        home = Path(self._get_output_dir(kwargs.get("trial")))
        mine = locks.output_dir(home) if self.is_world_process_zero() else nullcontext()
        with mine, ranks.explained(self):
            if self.is_world_process_zero():
                whole.sweep(home)
            self.spikes = SpikeWatch(self.args.spike_action, self.args.spike_threshold)
            resume = whole.resumable(resume_from_checkpoint, home)
            self.place = streams.found_place(self, resume)
            attached = projections.attached(self.student, self.projections)
            with attached, self.features.ready(), self.ahead.running():
                return super().train(resume, *args, **kwargs)

    def check(self, *, training: bool, warn: bool = True) -> None:
        """Run the pre-flight checks once; log warnings (unless others did), raise problems."""
        if {training, True} & self._checked:
            return
        report = checks.inspect(self, training=training)
        for warning in report.warnings if warn else ():
            logger.warning(warning)
        report.raise_problems()
        self.sparse |= report.sparse
        self._checked.add(training)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        carried.load(self, Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restore_renamed(self.state.best_model_checkpoint)

    def _restore_renamed(self, folder: str | None) -> None:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        restored = folder is not None and not sharded and restore_renamed(self.student, folder)
        if self._load_result is not None and not restored:
            super()._issue_warnings_after_load(self._load_result)
        self._load_result = None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Names that are missing may only be others: `_restore_renamed` knows.
        self._load_result = load_result

    # ---- data: the union of what both models read, and each row's number ----

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is not None:
            return
        super()._set_signature_columns_if_needed()
        extra = {ROW, "shift_labels", "span_mask", "special_tokens_mask", *TEXT_ENDS, *self.task.labels}
        if self.teacher is not None:
            extra |= set(self.teacher.columns)
        columns: list[str] = self._signature_columns or []
        self._signature_columns = [*columns, *sorted(extra - set(columns))]  # type: ignore[assignment]

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return RowDataset(super()._remove_unused_columns(dataset, description))

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        collator, pinned = self.data_collator, self.args.dataloader_pin_memory
        self.data_collator = RowCollator(collator)
        # Pinned memory is for copies to an accelerator; torch warns in each pass where there is none.
        self.args.dataloader_pin_memory = pinned and torch.accelerator.is_available()
        try:
            if kwargs.get("is_training") and streams.is_stream(dataset):
                return streams.dataloader(self, dataset, kwargs["batch_size"])
            return super()._get_dataloader(RowDataset.of(dataset), *args, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_pin_memory = collator, pinned

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(RowDataset.unwrap(train_dataset))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return super()._get_eval_sampler(RowDataset.unwrap(eval_dataset))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of one optimizer step and count its supervision over all ranks."""
        self.terms.begin_step()
        if self.sparse:
            self.estimator = self.estimator or settle(self)
            self.objective = self.estimator.apply(self.objective)
        batches, _ = super().get_batch_samples(self.ahead.source(epoch_iterator), num_batches, device)
        batches = [dict(self._prepare_inputs(batch)) for batch in batches]
        if not batches:
            return batches, None
        supervisions = [self.task.supervise_batch(batch) for batch in batches]
        questions = self.ahead.line_up(self, batches)
        plans = map(_Plan, supervisions, select(supervisions), questions)
        for batch, plan in zip(batches, plans, strict=True):
            batch[_PLAN] = plan
        counts = self._global_counts(supervisions)
        self.balance.measure(self, batches, counts)
        return batches, counts

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        # Trainer's count knows one kind of label only; `get_batch_samples` counts both terms.
        return None

    def _global_counts(self, supervisions: list[Supervision]) -> Counts:
        counts = counts_of(supervisions)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return Counts(task=counts[0], kd=counts[1])

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one micro-batch; see `Objective`.

        Args:
            model: The student as Trainer wraps it.
            inputs: One batch.
            return_outputs: Also return the student's outputs.
            num_items_in_batch: The step's `Counts`; anything else makes this batch a step of its own.

        Returns:
            A 0-d tensor, or that and the outputs.
        """
        batch = dict(inputs)
        rows = batch.pop(ROW, None)
        plan: Any = batch.pop(_PLAN, None)
        if plan is None:
            supervision = self.task.supervise_batch(batch)
            plan = _Plan(supervision, select([supervision])[0])
        counts = num_items_in_batch
        if not isinstance(counts, Counts):
            counts = self._global_counts([plan.supervision])
        mix, world = self.mix(), self.accelerator.num_processes
        outputs = None
        fusion = None if return_outputs else self.fusion_for(batch)
        distil, seen = mix.alpha > 0 or self.features.wanted, self.features.seen()
        both: dict[str, Any] = {"distil": distil, "seen": seen, "question": self.ahead.turn(plan.question)}
        if fusion is not None:
            given = {"supervision": plan.supervision, "counts": counts, "mix": mix, "ranks": world}
            use = partial(fusion.terms, self.objective, **given)
            terms = self.pair.fused(fusion, model, batch, use, **both)
        else:
            outputs, student, teacher = self.pair.dense(model, batch, **both)
            terms = self.objective(
                student,
                teacher,
                plan.supervision,
                selection=plan.selection,
                counts=counts,
                mix=mix,
                ranks=world,
                task=self._custom_task_loss(outputs, batch, counts),
                outputs=outputs,
            )
        terms = self.features.add(terms, seen, batch, plan.supervision, counts=counts, ranks=world)
        if self.is_in_train and model.training:
            self.terms.record(terms, rows)
        return (terms.loss, outputs) if return_outputs else terms.loss

    def fusion_for(self, batch: Batch) -> Fusion | None:
        """How to do without logits, found at the first batch; None: the dense path."""
        if self._fusion is None:
            self._fusion = find_route(self, batch)
        return self._fusion if isinstance(self._fusion, Fusion) else None

    def _custom_task_loss(self, outputs: Any, batch: Batch, counts: Counts) -> Tensor | None:
        if self.compute_loss_func is None:
            return None
        labels = tuple(batch.get(name) for name in self.task.labels)
        return self.compute_loss_func(
            outputs, labels[0] if len(labels) == 1 else labels, num_items_in_batch=counts.task
        )

    # ---- what the log says ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def judge_step(self) -> str | None:
        """Look at the step in hand before it is applied: None, "skip" or "stop", on every rank alike.

        Raises:
            FloatingPointError: On every rank, if a term of any rank or the gradient is not finite.
        """
        number = self.state.global_step + 1
        step = self.terms.end_step(self.accelerator, step=number, norm=self._grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        return self.spikes.judge(step=number, norm=step.norm, kl=step.kl, scaled=scaled)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term of the loss, averaged over ranks and over the steps since the last log."""
        if "loss" in logs:
            logs.update(self.terms.means(self.accelerator) | self.balance.take())
            for name in ("alpha", "temperature"):
                if getattr(self.args, f"{name}_schedule") != "constant":
                    logs[name] = getattr(self.mix(), name)
        if "loss" in logs or "train_runtime" in logs:
            logs.update(self.spikes.logs())
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop, with exact means over supervised positions."""
        self.check(training=False)
        sharding.prepare_for_evaluation(self.student, self.accelerator)
        self.scores.begin()
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if output.metrics is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.update(self.scores.metrics(self.objective, prefix))
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """One evaluation batch: the task loss, and the logits and labels unless only the loss is wanted."""
        batch = dict(self._prepare_inputs(inputs))
        batch.pop(ROW, None)
        supervision = self.task.supervise_batch(batch)
        fusion = self.fusion_for(batch) if prediction_loss_only else None
        outputs = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if fusion is not None:
                use = partial(fusion.sums, self.objective, supervision=supervision)
                sums = self.pair.fused(fusion, model, batch, use, distil=self.distils)
            else:
                outputs, student, teacher = self.pair.dense(model, batch, distil=self.distils)
                sums = self.objective.evaluate(student, teacher, supervision, outputs)
        labelled = supervision.labels is not None
        mean = self.scores.add(self.accelerator, sums)
        loss = mean if labelled else None
        if prediction_loss_only:
            return loss, None, None
        if self._generation.wanted:
            logits = self._generation(self.student, self.pair.student_inputs(batch))
        else:
            config = getattr(self.student, "config", None)
            logits = predictions(outputs, self.task.logits, config, ignore_keys)
        labels = nested_detach(tuple(batch[name] for name in self.task.labels)) if labelled else ()
        return loss, logits, (labels[0] if len(labels) == 1 else labels) if labels else None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; further keywords go to `generate` where `predict_with_generate` is set."""
        self._generation.take(kwargs)
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.predict`; further keywords go to `generate` where `predict_with_generate` is set."""
        self._generation.take(kwargs)
        return super().predict(*args, **kwargs)

    def report(self, test_dataset: Any = None, **options: Any) -> Results | None:
        """Compare teacher, student and others on some rows, as page and card; see `live_report.report`."""
        from .live_report import report

        return report(self, test_dataset, **options)

    # ---- what is saved: the student, and a record of how it was made ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student as `from_pretrained` reads it, and `distillation.yaml` beside it."""
        with memory.forgotten(getattr(self.student, "config", None), wanted=not _internal_call):
            super().save_model(output_dir, _internal_call)
            state = None if _internal_call else sharding.whole_state(self.student, self.accelerator)
            if state is not None and self.args.should_save:
                self._save(output_dir or self.args.output_dir, state_dict=state)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            write_options(folder, self)
            if _internal_call:
                carried.save(self, folder)

    def push_to_hub(self, commit_message: str | None = None, **options: Any) -> str | None:  # type: ignore[override]
        """Publish student, card, report and options, as `hf-kd publish` does; see `hf_kd.publish.push`."""
        from .publish import push

        return push(self, commit_message, **options)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Trainer's own also pickles its arguments; `distillation.yaml` has them.
        if not self.args.should_save and not self.is_distributed_loading_by_transformers:
            return
        if self.projections:
            state_dict = projections.without(self.student.state_dict() if state_dict is None else state_dict)
        whole.save_student(self, Path(output_dir or str(self.args.output_dir)), state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return self.staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        home = self._get_output_dir(trial)
        with whole.written(self, home):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(f"{home}/checkpoint-{self.state.global_step}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.staging is None:
            push_checkpoint(self, Path(checkpoint_folder))


def _task_name(task: str | Task | None) -> str | None:
    return task.name if isinstance(task, Task) else task
