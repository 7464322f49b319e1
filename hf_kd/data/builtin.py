"""Data that every machine has: scikit-learn's handwritten digits and Python's standard library as text."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

# Folders of the standard library that are not its text: what was installed, tests, and generated build data.
_NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def digits() -> DatasetDict:
    """1,797 handwritten digits, 8 x 8 grey pixels, in 1,197 / 300 / 300 rows, stratified by digit.

    Returns:
        Splits train, validation and test with the columns `image` (PIL, mode L) and `label`.
    """
    from PIL.Image import fromarray
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(np.arange(len(labels)), test_size=300, random_state=0, stratify=labels)
    train, validation = train_test_split(rest, test_size=300, random_state=0, stratify=labels[rest])
    grey = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})

    def split(rows: np.ndarray) -> Dataset:
        columns = {"image": [fromarray(grey[i]) for i in rows], "label": labels[rows].tolist()}
        return Dataset.from_dict(columns, features=features)

    return DatasetDict(train=split(train), validation=split(validation), test=split(test))


def stdlib() -> DatasetDict:
    """The source files of Python's standard library, one a row; 5 % of them each for validation and test.

    Returns:
        Splits train, validation and test with the column `text`. Files come in an order that is the same on
        every machine and has nothing to do with their subject, so that any part of it is a fair sample.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [str(path.relative_to(root)) for path in root.rglob("*.py") if _is_text(path.relative_to(root))]
    names.sort(key=lambda name: hashlib.sha256(Path(name).as_posix().encode()).digest())
    held_out = max(len(names) // 20, 1)
    parts = {
        "train": names[2 * held_out :],
        "validation": names[:held_out],
        "test": names[held_out : 2 * held_out],
    }
    # Through a generator, since what is on disk is cached there after tokenisation too.
    return DatasetDict(
        {
            split: Dataset.from_generator(
                _read_files,
                features=Features({"text": Value("string")}),
                gen_kwargs={"root": str(root), "names": [files], "bytes": [_size(root, files)]},
            )
            for split, files in parts.items()
        }
    )


def _is_text(path: Path) -> bool:
    return not any(part in _NOT_TEXT or part.startswith("config-") for part in path.parts)


def _size(root: Path, names: list[str]) -> int:
    return sum((root / name).stat().st_size for name in names)


def _read_files(root: str, names: list[list[str]], bytes: list[int]) -> Iterator[dict[str, str]]:
    """One row a file; `bytes` only makes a changed installation a new data set in the cache."""
    for name in names[0]:
        yield {"text": (Path(root) / name).read_text(encoding="utf-8", errors="replace")}


BUILTIN: dict[str, Callable[[], DatasetDict]] = {"digits": digits, "stdlib": stdlib}
