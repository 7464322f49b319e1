"""Two models that prepare the same picture differently (trap 42)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, ViTForImageClassification, ViTImageProcessorPil
from transformers import Wav2Vec2FeatureExtractor as Extractor

from hf_kd import DistillationTrainer
from hf_kd.alignment import AlignmentError
from hf_kd.processors import align_processors

from .heads import HEADS, Collator, rows_of, vit
from .test_trainer import arguments


def processor(**kwargs: Any) -> ViTImageProcessorPil:
    """A processor of small pictures."""
    return ViTImageProcessorPil(**{"size": {"height": 8, "width": 8}, **kwargs})


def test_same_picture(tmp_path: Path) -> None:
    """Trap 42: pixels normalised for the student become what the teacher's own processor would make."""
    picture = (torch.rand(8, 8, 3) * 255).to(torch.uint8).numpy()
    ours = processor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    theirs = processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.9, 0.8, 0.7])
    pixels = align_processors(ours, theirs)
    assert pixels is not None
    made, expected = (p(picture, return_tensors="pt")["pixel_values"] for p in (ours, theirs))
    torch.testing.assert_close(pixels(made), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(made, expected, atol=0.1)  # what the teacher would be shown otherwise
    plain = processor(do_normalize=False)
    back = align_processors(ours, plain)
    assert back is not None
    torch.testing.assert_close(
        back(made), plain(picture, return_tensors="pt")["pixel_values"], rtol=1e-5, atol=1e-6
    )


def test_alike() -> None:
    """Nothing to do for equal processors, or where one is not known."""
    assert align_processors(processor(), processor()) is None
    assert align_processors(processor(), None) is None
    assert align_processors(None, processor()) is None


@pytest.mark.parametrize(
    "ours,theirs,named",
    [
        (processor(), processor(size={"height": 16, "width": 16}), "size"),
        (processor(), processor(rescale_factor=1.0), "rescale_factor"),
        (Extractor(sampling_rate=16000), Extractor(sampling_rate=8000), "16000.*8000"),
    ],
)
def test_what_cannot_be_undone(ours: Any, theirs: Any, named: str) -> None:
    """Trap 42: another size, scale or rate is refused, both values named, with the column that would work."""
    with pytest.raises(AlignmentError, match=f"{named}.*teacher_pixel_values"):
        align_processors(ours, theirs)


def test_through_the_trainer(tmp_path: Path) -> None:
    """The processor beside the teacher's weights is found and its pixels reach the teacher."""
    teacher = ViTForImageClassification(vit(16)).eval()
    theirs = processor(image_mean=[0.1], image_std=[0.9], do_convert_rgb=False)
    teacher.save_pretrained(tmp_path / "teacher")
    theirs.save_pretrained(tmp_path / "teacher")
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "teacher").image_mean) == [0.1]
    ours = processor(image_mean=[0.5], image_std=[0.5], do_convert_rgb=False)
    head = HEADS["image"]
    trainer = DistillationTrainer(
        ViTForImageClassification(vit(16)), arguments(tmp_path, remove_unused_columns=False),
        teacher=str(tmp_path / "teacher"), train_dataset=rows_of(head, 4), processing_class=ours,
        data_collator=Collator(head, dtype=torch.float32),
    )  # fmt: skip
    batch = Collator(head, dtype=torch.float32)(rows_of(head, 4))
    assert trainer.teacher is not None
    shown = (batch["pixel_values"] * 0.5 + 0.5 - 0.1) / 0.9
    with torch.no_grad():
        expected = teacher(pixel_values=shown).logits
    torch.testing.assert_close(trainer.teacher(batch).logits["logits"], expected)
    trainer.train()
