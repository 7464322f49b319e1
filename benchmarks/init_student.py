"""What `init_student` takes in memory: the peak of the whole process against teacher and student together.

    python benchmarks/init_student.py                 # a table and benchmarks/results/init_student.json
    python benchmarks/init_student.py --layers 4      # a small teacher, to try it

A Llama of 1.03 billion parameters in fp32 is made in memory, and a student is cut from it: half of its
layers; half of its widths, first channels; half of its widths by importance on a calibration batch. Each in a
process of its own, which the operating system is asked for the most memory that it ever had (`VmHWM` on
Linux), Python and PyTorch included. The aim is at most 1.3 times the bytes of both models' weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

TARGET = 1.3
RESULTS = Path(__file__).parent / "results" / "init_student.json"
WIDTHS = {"hidden_size": 0.5, "num_attention_heads": 0.5, "intermediate_size": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "half of the layers": {"num_layers": 0.5},
    "half of the widths": WIDTHS,
    "half of the widths, by importance": {**WIDTHS, "calibration": True},
    "a quarter of the parameters, searched": {"max_parameters": 0.25},
}


def peak() -> int:
    """The most bytes that this process ever had in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise ValueError("this operating system does not say VmHWM: run on Linux")


def one(case: str, layers: int) -> None:
    """Make the teacher and cut it; prints the figures as JSON."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_kd.measure import count_parameters
    from hf_kd.students import init_student
    from hf_kd.students.weights import empty_model

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    teacher: Any = empty_model(LlamaForCausalLM, config)
    for module in teacher.modules():  # weights are made once, in place
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # Any number will do: what is written is in memory.
                module._parameters[name] = torch.nn.Parameter(torch.full(parameter.shape, 0.01))
    options = dict(CASES[case])
    if options.pop("calibration", False):
        options["calibration"] = {"input_ids": torch.randint(0, 32_000, (1, 64))}
    before = peak()
    student = init_student(teacher, **options)
    sizes = {
        name: sum(p.numel() * p.element_size() for p in model.parameters())
        for name, model in (("teacher", teacher), ("student", student))
    }
    found = {
        "teacher_parameters": count_parameters(teacher),
        "student_parameters": count_parameters(student),
        "teacher_bytes": sizes["teacher"],
        "student_bytes": sizes["student"],
        "peak_before": before,
        "peak": peak(),
    }
    sys.stdout.write(json.dumps(found) + "\n")


def main() -> None:
    """Run every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--layers", type=int, default=20, help="of the teacher; 20 are 1.03 billion parameters"
    )
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        one(options.case, options.layers)
        return
    rows = {}
    for case in CASES:
        command = [sys.executable, __file__, "--layers", str(options.layers), "--case", case]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(answer.stdout.splitlines()[-1])
        both = row["teacher_bytes"] + row["student_bytes"]
        rows[case] = {**row, "ratio": row["peak"] / both, "met": row["peak"] <= TARGET * both}
    table = Table(box=SIMPLE_HEAD)
    for title in ("student", "parameters", "teacher GB", "student GB", "peak GB", "ratio"):
        table.add_column(title, justify="left" if title == "student" else "right")
    for case, row in rows.items():
        sizes = (row["teacher_bytes"], row["student_bytes"], row["peak"])
        table.add_row(
            case,
            f"{row['student_parameters'] / 1e6:,.0f} M",
            *(f"{size / 1e9:.2f}" for size in sizes),
            f"{row['ratio']:.2f}{'' if row['met'] else ' (missed)'}",
        )
    Console().print(table)
    from hf_kd.measure import machine

    result = {"target": TARGET, "layers": options.layers, "machine": machine(), "cases": rows}
    if options.layers == parser.get_default("layers"):
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
