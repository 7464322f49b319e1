"""A cached teacher is the teacher: every head, in any order, from whatever batches it was written."""

from __future__ import annotations

import pytest
import torch

from hf_kd import DistillationTrainer
from hf_kd.teachers import CachedTeacher
from hf_kd.teachers.cache import CacheError, CacheWriter
from hf_kd.teachers.cache.make import CacheSettings, describe, fill

from .heads import HEADS, Collator, models, rows_of
from .test_gradient import step

# Heads whose answer to a row depends on the padding of others, or on the other rows.
UNCACHED = {"ctc": "holds one shape"}


def batches_of(name, student, teacher, rows, folder, size=3):
    """What the teacher reads of some rows, in batches of another size than training's."""
    from hf_kd import DistillationArguments

    head = HEADS[name]
    args = DistillationArguments(output_dir=str(folder), alpha=1.0, use_cpu=True, report_to="none")
    trainer = DistillationTrainer(student, args, teacher=teacher, data_collator=Collator(head))
    made = [Collator(head)(rows[i : i + size]) for i in range(0, len(rows), size)]
    return trainer, [trainer.pair.inputs(batch) for batch in made]


def write(name, student, teacher, rows, folder, settings=None, size=3):
    trainer, batches = batches_of(name, student, teacher, rows, folder / "trainer", size)
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    manifest, head = describe(trainer.teacher, batches[0], settings or CacheSettings(fidelity="logits"))
    if head is not None:
        from dataclasses import replace

        from hf_kd.teachers.cache.make import save_head

        manifest = replace(manifest, head=save_head(head, cache))
    manifest.write(cache)
    fill(CacheWriter(cache, manifest), trainer.teacher, batches)
    return cache


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_step_from_the_cache_is_the_step_from_the_teacher(name, tmp_path):
    """Trap 45: rows are found by content, whatever their order and the batches they were written from."""
    head = HEADS[name]
    rows = rows_of(head, 8, seed=3)
    student, teacher = models(head)
    try:
        cache = write(name, student, teacher, rows, tmp_path)
    except CacheError as error:
        assert name in UNCACHED and UNCACHED[name] in str(error)
        return
    assert name not in UNCACHED
    live = step(tmp_path / "live", head, *models(head), rows[::-1])
    student, _ = models(head)
    cached = CachedTeacher(cache)
    assert len({*cached.manifest.teacher}) == 3
    read = step(tmp_path / "read", head, student, cached, rows[::-1])
    assert read[0] == pytest.approx(live[0], rel=1e-6)
    for a, b in zip(read[1].values(), live[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
