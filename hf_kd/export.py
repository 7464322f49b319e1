"""`hf-kd export`: the student of a finished run as ONNX, checked against PyTorch, measured in the report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_kd import costs, evaluating, paired, report
from hf_kd.comparison import test_rows, trainer_of
from hf_kd.config import DistillationArguments, parse
from hf_kd.loading import load_model
from hf_kd.onnx_model import Agreement, OnnxModel, compare, export_onnx, quantise, require_onnx
from hf_kd.options import RunOptions, nearest
from hf_kd.pages import write_html
from hf_kd.records import OPTIONS_FILE
from hf_kd.results import Arm, Results
from hf_kd.setting import Setting, load
from hf_kd.tasks import resolve_task
from hf_kd.waiting import WaitingTeacher

ONNX_FILE, INT8_FILE = "model.onnx", "model.int8.onnx"
#: What the exported models are called in the report.
ONNX_ARM, INT8_ARM = "student onnx", "student int8"
# Rows that both are compared on, and rows of one comparison.
_ROWS, _TOGETHER = 256, 16
_TOLERANCE, _MIN_AGREEMENT = 1e-3, 0.9
_SWITCHES, _NUMBERS = ("--onnx", "--int8"), ("--tolerance", "--min_agreement")


def command(argv: list[str]) -> int:
    """Read the command line; see `export`."""
    folders: list[str] = []
    numbers = {"--tolerance": _TOLERANCE, "--min_agreement": _MIN_AGREEMENT}
    words = iter(argv)
    for word in words:
        if word in _NUMBERS:
            value = next(words, "")
            try:
                numbers[word] = float(value)
            except ValueError:
                raise ValueError(f"{word} takes a number, not {value!r}") from None
        elif word.startswith("-") and word not in _SWITCHES:
            raise ValueError(f"unknown option {word}{nearest(word, (*_SWITCHES, *_NUMBERS))}")
        elif not word.startswith("-"):
            folders.append(word)
    if len(folders) != 1 or "--onnx" not in argv:
        raise ValueError(
            "hf-kd export takes the folder of a run and a format: hf-kd export DIR --onnx [--int8]"
        )
    made = export(
        Path(folders[0]),
        int8="--int8" in argv,
        tolerance=numbers["--tolerance"],
        min_agreement=numbers["--min_agreement"],
    )
    for path, seen in made.items():
        same = "" if seen.same is None else f", {seen.same:.1%} of the decisions the same"
        sys.stdout.write(
            f"{path}: largest difference of a logit {seen.difference:.2e} (largest logit {seen.scale:.3g})"
            f"{same}, at {seen.positions} positions\n"
        )
    return 0


def export(
    folder: Path,
    *,
    int8: bool = False,
    tolerance: float = _TOLERANCE,
    min_agreement: float = _MIN_AGREEMENT,
) -> dict[Path, Agreement]:
    """Write `model.onnx` (and `model.int8.onnx`) beside the student of a run, and add both to its report.

    A file that does not answer as the student does is removed. The report gets their quality on the test
    rows, their bytes and their latency, timed in turns with all other models.

    Args:
        folder: A run's `output_dir`, with `distillation.yaml` and `results.json`.
        int8: Also quantise.
        tolerance: The largest difference of a logit to the PyTorch student, relative to the largest logit
            where that is above 1.
        min_agreement: The least share of positions where the int8 model has the student's top class.

    Returns:
        How each file agrees with the PyTorch student.

    Raises:
        ValueError: If there is no finished run, the model can't be exported, or a file does not agree.
    """
    require_onnx()
    for name in (OPTIONS_FILE, "results.json", "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the folder of a finished run of hf-kd distill")
    results = Results.read(folder / "results.json")
    run, args = _options(folder)
    setting = load(run, args)
    if isinstance(setting.teacher, WaitingTeacher):
        setting = dataclasses.replace(setting, teacher=setting.teacher.load())
    student: Any = load_model(str(folder), run.task, role="student")
    setting = dataclasses.replace(setting, student=student.eval())
    task = resolve_task(run.task, student, supervise=args.supervise)
    batches = list(_batches(setting))
    made = {folder / ONNX_FILE: ONNX_ARM}
    export_onnx(student, batches[0], folder / ONNX_FILE, task=task)
    agreements = {folder / ONNX_FILE: compare(student, OnnxModel(folder / ONNX_FILE), batches, task=task)}
    _refuse(folder / ONNX_FILE, agreements[folder / ONNX_FILE], tolerance=tolerance)
    if int8:
        path = quantise(folder / ONNX_FILE, folder / INT8_FILE)
        made[path] = INT8_ARM
        agreements[path] = compare(student, OnnxModel(path), batches, task=task)
        _refuse(path, agreements[path], min_agreement=min_agreement)
    exported = {name: OnnxModel(path, student.config) for path, name in made.items()}
    results = _with_arms(results, setting, exported)
    results.write(folder / "results.json")
    write_html(results, folder)
    report.print_table(results, setting.console)
    return agreements


def _options(folder: Path) -> tuple[RunOptions, DistillationArguments]:
    """The options of the run in a folder, wherever it is now, on the CPU."""
    flags = ["--config", str(folder / OPTIONS_FILE), "--output_dir", str(folder), "--use_cpu", "true"]
    run, args = parse(flags)
    changes: dict[str, Any] = {"resume_from_checkpoint": None, "push_to_hub": False, "report_to": "none"}
    return run, dataclasses.replace(args, **changes)


def _batches(setting: Setting) -> Iterator[Mapping[str, Any]]:
    rows = test_rows(setting.data)
    count = min(len(rows), _ROWS)
    if count < 2:
        raise ValueError(f"the run has {count} test rows: two are needed, to tell rows from a constant")
    for first in range(0, count - count % 2, _TOGETHER):
        yield setting.data.collator([rows[i] for i in range(first, min(first + _TOGETHER, count))])


def _refuse(
    path: Path, seen: Agreement, *, tolerance: float | None = None, min_agreement: float | None = None
) -> None:
    problem = None
    if tolerance is not None and not seen.relative <= tolerance:
        problem = (
            f"its logits differ from the PyTorch student's by up to {seen.difference:.2e} (relative "
            f"{seen.relative:.2e}), more than tolerance={tolerance:g}"
        )
    if min_agreement is not None and seen.same is not None and not seen.same >= min_agreement:
        problem = (
            f"it decides as the PyTorch student at {seen.same:.1%} of {seen.positions} positions, less than "
            f"min_agreement={min_agreement:g}"
        )
    if problem:
        path.unlink()
        path.with_name(path.name + ".data").unlink(missing_ok=True)
        raise ValueError(f"{path.name} was removed: {problem}. Raise that bound if you know that it will do")


def _with_arms(results: Results, setting: Setting, exported: Mapping[str, OnnxModel]) -> Results:
    """The results with an arm for each exported model, and all models timed in turns."""
    rows, data = test_rows(setting.data), setting.data
    models: dict[str, Any] = {"student": setting.student}
    if isinstance(setting.teacher, nn.Module):
        models = {"teacher": setting.teacher.eval(), **models}
    control = setting.args.folder / "control"
    if "control" in results.arms and (control / "config.json").is_file():
        models["control"] = load_model(str(control), setting.run.task, role="control")
    times, _ = costs.time_models({**models, **exported}, rows, data.collator)
    arms = {
        name: dataclasses.replace(arm, latency=times[name]) if name in times else arm
        for name, arm in results.arms.items()
        if name not in (ONNX_ARM, INT8_ARM)
    }
    for name, model in exported.items():
        found = evaluating.evaluate(trainer_of(setting, name, model), rows, primary=data.primary_metric)
        scores = {key.removeprefix("eval_"): value for key, value in found.scores.items()}
        known = results.arms["student"].metrics
        arms[name] = Arm(
            metrics={key: float(scores[key]) for key in known if key in scores},
            parameters=results.arms["student"].parameters,
            bytes=model.bytes,
            eval_kl=scores.get("kl"),
            eval_agreement=scores.get("agreement"),
            bytes_on_disk=model.bytes,
            latency=times.get(name, []),
            errors=found.errors,
            **paired.kept(found, results.primary_metric),
        )
    return dataclasses.replace(results, arms=arms)
