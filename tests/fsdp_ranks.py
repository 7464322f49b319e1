"""FSDP 2 on two CPU ranks: the fused loss reads the output layer while the forward has it whole.

Started as `torchrun --nproc_per_node 2 tests/fsdp_ranks.py FOLDER`; rank 0 saves the whole gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_kd.alignment import ClassMap  # noqa: E402
from hf_kd.fusing import Fusion  # noqa: E402
from hf_kd.losses.heads import find_head  # noqa: E402
from hf_kd.objective import Counts, Mix, counts_of, resolve_objective  # noqa: E402
from hf_kd.pair import Pair  # noqa: E402
from hf_kd.tasks import resolve_task  # noqa: E402
from hf_kd.teachers import ModelTeacher  # noqa: E402
from tests.heads import HEADS, Collator, models, rows_of  # noqa: E402


def main(folder: Path) -> None:
    """One step of a sharded student with a sharded teacher."""
    dist.init_process_group("gloo")
    head = HEADS["causal-lm"]
    student, teacher = models(head)
    mesh = init_device_mesh("cpu", (2,))
    for model in (student, teacher):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    task = resolve_task(None, student)
    pair = Pair(student, ModelTeacher(teacher, task.logits), task, device="cpu")
    objective = resolve_objective(
        task, divergence="auto", divergence_options=None, classes=ClassMap(), label_smoothing=0.0
    )
    batch = Collator(head)(rows_of(head, 8)[dist.get_rank() :: 2])
    supervision = task.supervise_batch(batch)
    counts = counts_of([supervision])
    dist.all_reduce(counts)
    inputs = pair.student_inputs(pair.inputs(batch))
    fusion = Fusion(find_head(student, inputs), find_head(teacher, inputs), chunk_bytes=1 << 20)
    hidden, answer = pair.fused(fusion, student, batch, distil=True)
    mix = Mix(alpha=0.5, temperature=2.0, teacher_temperature=2.0)
    terms = fusion.terms(
        objective, hidden, answer, supervision, counts=Counts(counts[0], counts[1]), mix=mix, ranks=2
    )
    terms.loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in student.named_parameters()}  # type: ignore[union-attr]
    if dist.get_rank() == 0:
        torch.save(grads, folder / "grads.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
