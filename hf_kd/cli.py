"""The command line: see `COMMANDS`.

Help answers without importing torch; a command imports what it runs.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any

from hf_kd import recipes
from hf_kd.options import (
    DistillationOptions,
    GenerateOptions,
    RunOptions,
    ShrinkOptions,
    TeachOptions,
    nearest,
)

OVERVIEW = """\
hf-kd: distil a Transformers model into a small one, and see what it gained

  hf-kd distill                        the default recipe, digits: train, compare, print the table
  hf-kd distill --config my.yaml --temperature 4
                                       a file or a recipe; flags beat it
  hf-kd distill --teacher DIR_OR_ID --student DIR_OR_ID --dataset ID_OR_FILE
  hf-kd check ...                      the same options: load, look, train nothing
  hf-kd shrink --teacher DIR_OR_ID --student_layers 0.5 --output_dir DIR
                                       a student cut from its teacher, and what it starts from
  hf-kd cache ...                      ask the teacher once, and keep what it says for many students
  hf-kd recipes [NAME]                 list the shipped recipes, or print one
  hf-kd generate --teacher DIR_OR_ID --output_dir DIR --dataset PROMPTS
                                       text that a teacher samples, with what it thought of each token
  hf-kd teach --teacher DIR_OR_ID --address HOST:PORT
                                       a model that answers students in other processes (docs/teach.md)
  hf-kd report DIR [DIR ...]           what runs found, as a table, an HTML page and Markdown with charts
  hf-kd export DIR --onnx [--int8]     the student of a run for ONNX Runtime, checked and measured
  hf-kd publish DIR REPOSITORY         put the student of a run on the Hub, with its card and report
  hf-kd distill --help                 the options

On several processes or devices: accelerate launch scripts/distill.py ... (the same options)
"""

# Of TrainingArguments, what the help names; `--help-all` lists the rest.
TRAINING = """
output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size
gradient_accumulation_steps warmup_steps weight_decay lr_scheduler_type bf16 seed eval_strategy logging_steps
save_strategy load_best_model_at_end resume_from_checkpoint use_cpu report_to
""".split()

TRAINING_TITLE = "Training: every option of transformers.TrainingArguments, such as"

# Options of ours that a run either needs many of or none: the help names them, `--help-all` describes them.
SPECIAL = {
    "Layers compared as well (docs/features.md; described by --help-all)": """
hidden_weight hidden_loss attention_weight attention_loss relation_weight relations relation_heads
embedding_weight last_hidden_weight layer_map
""".split(),
    "What is distilled of what the teacher says (docs/targets.md, docs/signals.md)": """
teacher_calibration target_correction kd_weighting sparse_estimator
""".split(),
    "Where the teacher is (docs/teachers.md, docs/scaling.md)": """
teacher_quantization teacher_device_map shard_teacher teacher_ahead
""".split(),
    "A student cut from the teacher in more than its depth (docs/students.md)": """
student_layer_choice student_importance student_hidden_size student_num_attention_heads
student_num_key_value_heads student_intermediate_size student_vocabulary student_max_parameters
student_max_bytes student_max_latency_ms student_calibration_rows
""".split(),
    "Evaluation on generated text, report, steps that go wrong (docs/report.md, docs/reliability.md)": """
predict_with_generate generation_max_length generation_num_beams slices term_gradients watts spike_action
spike_threshold teacher_timeout
""".split(),
    "Training the teacher first (with train_teacher); data as a stream (docs/scaling.md)": """
teacher_epochs teacher_learning_rate teacher_batch_size streaming stream_buffer
""".split(),
    "Data whose files, labels or masks are not the usual ones": """
eval_file test_file column_names problem_type num_labels mlm_probability
""".split(),
    "Several teachers, or the student's own (docs/teachers.md)": """
teachers ensemble_weighting ensemble_weights ensemble_temperature ensemble_offload teacher_routes self_teacher
self_teacher_dropout exit_layers ema_decay ema_decay_end
""".split(),
    "A teacher on a server (docs/served.md)": """
server_model server_format server_top_k server_concurrency server_timeout server_retries server_api_key_env
""".split(),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments (default: those of the process).

    Returns:
        the exit status: 0, or 2 for wrong options, or 1 when `check` found problems.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(OVERVIEW)
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _fail(
            f"unknown command {command!r}{nearest(command, COMMANDS)} (there are {', '.join(COMMANDS)})"
        )
    try:
        return COMMANDS[command](rest)
    except ValueError as error:
        if not _raised_here(error):
            raise
        return _fail(str(error))


def distill(argv: list[str]) -> int:
    """Distil, measure teacher, student and control, and save the student."""
    if _helped("distill", argv):
        return 0
    _quiet()
    from hf_kd import run
    from hf_kd.config import parse

    run.distill(*parse(argv))
    return 0


def check(argv: list[str]) -> int:
    """Load what a run would load and say what it would do, without training."""
    if _helped("check", argv):
        return 0
    _quiet()
    from hf_kd import run
    from hf_kd.config import parse

    return 1 if run.check(*parse(argv), launch=_launch_line(argv)) else 0


def list_recipes(argv: list[str]) -> int:
    """List the recipes, or print one."""
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        sys.stdout.write(
            "hf-kd recipes          list the shipped recipes\nhf-kd recipes NAME     print one\n"
        )
        return 0 if argv[0] in ("-h", "--help") else 2
    if argv:
        sys.stdout.write(recipes.text(argv[0]))
        return 0
    width = max(map(len, recipes.names()))
    for name in recipes.names():
        sys.stdout.write(f"{name:<{width}}  {recipes.summary(name)}\n")
    sys.stdout.write("\nhf-kd recipes NAME prints one, hf-kd distill --config NAME runs it\n")
    sys.stdout.write(f"accelerate launch --config_file: {', '.join(recipes.launch_files())}\n")
    return 0


def generate(argv: list[str]) -> int:
    """Sample text from a teacher, with its signal."""
    if _helped_alone("generate", GenerateOptions, argv):
        return 0
    _quiet()
    from hf_kd.config import parse_one
    from hf_kd.generate import generate as run

    folder = run(parse_one(GenerateOptions, argv))
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{folder}\n")
    return 0


def teach(argv: list[str]) -> int:
    """Let a model answer students in other processes."""
    if _helped_alone("teach", TeachOptions, argv):
        return 0
    _quiet()
    from hf_kd.config import parse_one
    from hf_kd.teaching import teach as run

    return run(parse_one(TeachOptions, argv), say=_say)


def shrink(argv: list[str]) -> int:
    """Cut a student from a teacher, save it with its tokenizer, and print what it starts from."""
    if _helped_alone("shrink", ShrinkOptions, argv):
        return 0
    _quiet()
    from hf_kd.config import parse_one
    from hf_kd.shrink import print_report
    from hf_kd.shrink import shrink as run

    options = parse_one(ShrinkOptions, argv)
    print_report(run(options), str(options.output_dir))
    return 0


REPORT_HELP = """\
hf-kd report DIR        the folder of a run, or its results.json: prints the table, writes report.html and
                        report.md there
hf-kd report DIR DIR ... [--out DIR]     several runs on one task: quality against parameters, latency and
                        bytes, in sweep.html and sweep.md of the folder --out [.]
"""


def make_report(argv: list[str]) -> int:
    """Print the table of a finished run, and write it as a page and as Markdown; several runs on one page."""
    from pathlib import Path

    out, given = Path("."), list(argv)
    if "--out" in given[:-1]:
        i = given.index("--out")
        out = Path(given[i + 1])
        del given[i : i + 2]
    if not given or any(word.startswith("-") for word in given):
        sys.stdout.write(REPORT_HELP)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    from hf_kd import pages, report, sweep
    from hf_kd.results import Results

    try:
        if len(given) > 1:
            combined = sweep.combine([Path(word) for word in given])
            for run in combined.runs.values():
                report.print_table(run)
            sys.stdout.write(f"{combined.verdict}\n")
            made = sweep.write_pages(combined, out)
        else:
            path = Path(given[0])
            path = path / "results.json" if path.is_dir() else path
            results = Results.read(path)
            report.print_table(results)
            made = [pages.write_html(results, path.parent), pages.write_markdown(results, path.parent)]
    except FileNotFoundError as error:
        return _fail(str(error))
    for page in made:
        sys.stdout.write(f"{page}\n")
    return 0


def publish_run(argv: list[str]) -> int:
    """Put the student of a finished run on the Hub, with its card and report."""
    private = "--private" in argv
    given = [word for word in argv if word != "--private"]
    if len(given) != 2 or given[0].startswith("-"):
        sys.stdout.write(
            "hf-kd publish DIR REPOSITORY [--private]     upload the student in DIR, its card, report and "
            "options to the Hub\n"
        )
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    from pathlib import Path

    from hf_kd.publish import publish

    sys.stdout.write(f"{publish(Path(given[0]), given[1], private=private or None)}\n")
    return 0


EXPORT_HELP = """\
hf-kd export DIR --onnx [--int8] [--tolerance X] [--min_agreement X]
  DIR                 the folder of a run; model.onnx (and model.int8.onnx) go there, and into its report
  --onnx              write model.onnx, and refuse it if it does not answer as the PyTorch student does
  --int8              also write model.int8.onnx, its weights in 8 bits
  --tolerance X       largest difference of a logit, relative to the largest logit if that is above 1 [0.001]
  --min_agreement X   least share of the decisions that the int8 model must take as the student does [0.9]
"""


def export_run(argv: list[str]) -> int:
    """Export the student of a finished run to ONNX, check it against PyTorch, and measure it."""
    if not argv or "--help" in argv or "-h" in argv:
        sys.stdout.write(EXPORT_HELP)
        return 0 if argv else 2
    _quiet()
    from hf_kd import export

    return export.command(argv)


CACHE_HELP = """\
hf-kd cache OPTIONS [the options of a run]     ask the run's teacher about its rows, and keep what it says
  --cache_dir DIR           where; a writer that was stopped goes on there
  --cache_fidelity NAME     logits, hidden, sparse [auto: logits of up to 256 classes, else sparse]
  --cache_entries N         entries a position, sparse [28]
  --cache_bits N            bits of their log-probabilities, 8 or 16 [16]
  --cache_dtype NAME        of logits [the teacher's] and hidden states [float16]
  --shard_mib N             size of a file [256]
hf-kd cache plan OPTIONS [--disk_mb N]         what each fidelity would take and lose, and a recommendation
hf-kd cache verify DIR                         are the files as they were written
hf-kd cache verify OPTIONS [--rows N]          and does the run's teacher say the same of some rows [64]
hf-kd cache info DIR                           what a cache holds
hf-kd cache push DIR REPOSITORY [--private]    upload it to a dataset repository of the Hub

On several processes: accelerate launch -m hf_kd cache OPTIONS. To use it: hf-kd distill --teacher_cache DIR
"""


def cache(argv: list[str]) -> int:
    """Write, plan, verify, show or upload a cache of what a teacher says."""
    if not argv or "--help" in argv or "-h" in argv:
        sys.stdout.write(CACHE_HELP)
        return 0 if argv else 2
    _quiet()
    from hf_kd import cache_plan, caching

    if argv[0] == "push":
        return _push_cache(argv[1:])
    commands = {"plan": cache_plan.plan, "verify": caching.verify, "info": caching.info}
    if argv[0] in commands:
        return commands[argv[0]](argv[1:])
    if not argv[0].startswith("-"):
        return _fail(f"unknown command 'cache {argv[0]}'{nearest(argv[0], (*commands, 'push'))}")
    return caching.write(argv)


def _push_cache(argv: list[str]) -> int:
    given = [word for word in argv if word != "--private"]
    if len(given) != 2:
        return _fail("hf-kd cache push takes a folder and a repository: hf-kd cache push DIR REPOSITORY")
    from pathlib import Path

    from hf_kd.teachers.cache.card import push_cache

    address = push_cache(Path(given[0]), given[1], private=True if "--private" in argv else None)
    sys.stdout.write(f"{address}\n")
    return 0


COMMANDS = {
    "distill": distill,
    "check": check,
    "cache": cache,
    "recipes": list_recipes,
    "generate": generate,
    "shrink": shrink,
    "teach": teach,
    "report": make_report,
    "export": export_run,
    "publish": publish_run,
}


def help_text(command: str) -> str:
    """The help of `distill` and `check`: every option of ours on a line, and Trainer's by name."""
    lines = [
        f"usage: hf-kd {command} [--config FILE_OR_RECIPE] [--OPTION VALUE ...]     (flags beat the file)",
        "",
        "Models and data",
        *_option_lines(RunOptions),
        "",
        "Distillation: loss = (1 - alpha) * task + alpha * temperature^2 * divergence(teacher, student)",
        *_option_lines(DistillationOptions, own_first=False),
    ]
    lines.append("")
    for title, named in {**SPECIAL, TRAINING_TITLE: TRAINING}.items():
        names = " ".join(f"--{name}" for name in named)
        wrapped = textwrap.wrap(
            names, 108, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
        lines += [title, *wrapped]
    return "\n".join(lines) + "\n"


def _option_lines(cls: type, special: Sequence[str] | None = None, *, own_first: bool = True) -> list[str]:
    """A line for each option; what a class shares with others comes after what is its own."""
    lines = []
    hidden = {name for names in SPECIAL.values() for name in names} if special is None else special
    for field in sorted(
        dataclasses.fields(cls), key=lambda f: own_first and f.name not in cls.__annotations__
    ):
        if field.name in hidden:
            continue
        default = "" if field.default is None else f" [{str(field.default).lower()}]"
        lines.append(f"  --{field.name + default:<32} {field.metadata['help']}")
    return lines


def _helped(command: str, argv: list[str]) -> bool:
    """Answer `--help` and `--help-all`, whatever stands around them."""
    if "--help-all" in argv:
        from hf_kd.config import help_all

        sys.stdout.write(help_all())
        return True
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(help_text(command))
        return True
    return False


def _helped_alone(command: str, options: type, argv: list[str]) -> bool:
    """The same for a command with options of its own, all of which are described."""
    if argv and not {"--help", "-h"} & set(argv):
        return False
    usage = f"usage: hf-kd {command} [--config FILE] [--OPTION VALUE ...]     (flags beat the file)"
    sys.stdout.write("\n".join([usage, "", *_option_lines(options, special=())]) + "\n")
    return True


def _quiet() -> None:
    """Leave out what says nothing about the run."""
    os.environ.setdefault("TQDM_DELAY", "1")  # no bars of what is done in a second
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and writing weights; training has its own


def _say(line: str) -> None:
    """Print a line now, also where the output is a file."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _launch_line(argv: list[str]) -> str:
    """The command for one or more processes; an installed package has no scripts folder beside it."""
    script = "scripts/distill.py" if os.path.exists("scripts/distill.py") else "-m hf_kd distill"
    return f"accelerate launch {script} {shlex.join(argv)}".rstrip()


def _raised_here(error: BaseException) -> bool:
    """Whether the message is ours: written for the user, who then needs no traceback."""
    frames: list[Any] = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")).startswith("hf_kd")


def _fail(message: str) -> int:
    rank = os.environ.get("RANK")
    sys.stderr.write(f"hf-kd{f' (rank {rank})' if rank else ''}: error: {message}\n")
    return 2
