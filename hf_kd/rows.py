"""Row numbers that travel with a batch, so that a message can say which rows it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

#: The batch column with each row's number in its data set, `[B]`.
ROW = "hf_kd_row"


class RowDataset(Dataset):
    """A map-style data set whose rows know their number. Rows that are not mappings pass unchanged."""

    def __init__(self, rows: Any) -> None:
        """Wrap a data set with a length."""
        self.rows = rows

    @staticmethod
    def of(dataset: Any) -> Any:
        """Wrap what can be wrapped here; `datasets.Dataset` is wrapped after its columns were chosen."""
        import datasets

        streams = isinstance(dataset, IterableDataset | datasets.IterableDataset)
        if streams or isinstance(dataset, datasets.Dataset) or not hasattr(dataset, "__len__"):
            return dataset
        return RowDataset(dataset)

    @staticmethod
    def unwrap(dataset: Any) -> Any:
        """The data set itself, which samplers look into."""
        return dataset.rows if isinstance(dataset, RowDataset) else dataset

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """One row."""
        return _numbered(self.rows[index], index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Several rows, in one read where the data set can."""
        many = getattr(self.rows, "__getitems__", None)
        rows = many(indices) if many is not None else [self.rows[i] for i in indices]
        return [_numbered(row, index) for row, index in zip(rows, indices, strict=True)]


def _numbered(row: Any, index: int) -> Any:
    return {**row, ROW: int(index)} if isinstance(row, Mapping) else row


class RowCollator:
    """Keep row numbers away from the user's collator, which may not expect them."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        """Wrap a collator."""
        self.collator = collator

    def __call__(self, features: list[Any]) -> Any:
        """Collate, then add the row numbers."""
        numbered = all(isinstance(f, Mapping) and ROW in f for f in features)
        if not numbered:
            return self.collator(features)
        numbers = [f[ROW] for f in features]
        batch = self.collator([{k: v for k, v in f.items() if k != ROW} for f in features])
        if isinstance(batch, Mapping):
            batch = {**batch, ROW: torch.tensor(numbers)}
        return batch
