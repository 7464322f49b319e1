"""What models cost: the same inputs for all, without padding, at several sizes; and memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_kd.costs import peak_memory, time_models


class Embed(nn.Module):
    """`[B, L]` tokens to `[B, 2]`; remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.seen = nn.Embedding(50, 8), nn.Linear(8, 2), []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.seen.append((tuple(input_ids.shape), bool(attention_mask.all())))
        return self.head(self.embed(input_ids).mean(1))


def pad(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def test_all_models_are_timed_on_the_same_unpadded_batches_of_several_sizes_and_lengths():
    """Trap 50: the same inputs, warm, no padding; threads and device are named."""
    models = {"teacher": Embed(), "student": Embed()}
    rows = [{"input_ids": [1] * (4 + i % 13)} for i in range(200)]
    found, batch = time_models(models, rows, pad)
    assert models["teacher"].seen == models["student"].seen
    assert all(full for _, full in models["teacher"].seen)
    assert [(t.batch_size, t.length) for t in found["student"]] == [
        *[(32, 9), (1, 10), (8, 10)],
        *[(32, 14), (1, 16), (8, 16)],
    ]
    assert batch["input_ids"].shape == (32, 9)
    for times in found.values():
        assert all(t.padding == 0 and t.threads >= 1 and t.device == "cpu" for t in times)
        assert all(t.p95_ms >= t.median_ms > 0 and t.examples_per_second > 0 for t in times)


def test_blocks_of_one_length_are_timed_at_a_quarter_of_it_too():
    models = {"student": Embed()}
    found, _ = time_models(models, [{"input_ids": [1] * 16} for _ in range(10)], pad)
    assert [(t.batch_size, t.length) for t in found["student"]] == [
        *[(10, 16), (1, 16), (8, 16)],
        *[(10, 4), (1, 4), (8, 4)],
    ]


def test_rows_that_are_not_text_are_timed_by_batch_size_alone():
    model = nn.Linear(3, 2)
    found, _ = time_models(
        {"student": model}, [{"x": i} for i in range(40)], lambda rows: {"input": torch.ones(len(rows), 3)}
    )
    assert [(t.batch_size, t.length) for t in found["student"]] == [(32, None), (1, None), (8, None)]


def test_peak_memory_is_what_lives_at_one_time():
    """Weights, and at the widest moment two activations of the four that are made."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Linear(10, 1000, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.wide(x)
            for _ in range(3):
                x = x * 2
            return x[:, :2]

    model = Chain().train()
    batch = {"x": torch.ones(4, 10)}
    assert peak_memory(model, batch) == 4 * 10 * 1000 + 2 * (4 * 4 * 1000)
    assert model.training
    inplace = nn.Sequential(nn.Linear(10, 100, bias=False), nn.ReLU(inplace=True))
    assert peak_memory(inplace, torch.ones(4, 10)) == 4 * 10 * 100 + 4 * 4 * 100
