"""Where rows come from: the Hub, a folder, files, or the machine itself; as splits train, eval, test."""

from __future__ import annotations

import csv
import difflib
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from hf_kd.data.builtin import BUILTIN
from hf_kd.data.streamed import streamed
from hf_kd.loading import check_path
from hf_kd.options import RunOptions, nearest

logger = logging.getLogger(__name__)

# File ending -> reader of `datasets`.
_READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
# How files and splits are called that serve as evaluation split, the usual name first.
_EVAL_NAMES = ("validation", "valid", "dev", "val", "eval")
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": (*_EVAL_NAMES, "devel"),
    "test": ("test", "testing"),
}
# Held out from train where there is no evaluation split: a tenth, and not more rows than a score needs.
_HELD_OUT, _HELD_OUT_ROWS = 0.1, 5000


def load_raw(options: RunOptions) -> DatasetDict:
    """Load what `options.dataset` names.

    A Hub id (`owner/name`, optionally `owner/name@revision`), `builtin:digits` or `builtin:stdlib`, a file
    (csv, tsv, json, jsonl, parquet, txt), a folder with files called train, dev or validation, and test, a
    folder of texts (txt), of images with a folder per class, or one that `save_to_disk` wrote.

    Without an evaluation split a tenth of train, at most 5,000 rows, is held out: the same ones in every run.
    With `streaming`, see `streamed`.

    Returns:
        Splits `train` and `eval`, and `test` where one was asked for.

    Raises:
        ValueError: If the data cannot be found or read, or a split does not exist or is empty; says what was
            tried and what there is.
    """
    splits = _load(options)
    chosen: Any = DatasetDict() if not options.streaming else {}
    chosen["train"] = _split(splits, options.train_split, "train_split", options)
    eval_name = options.eval_split or next((n for n in _EVAL_NAMES if n in splits), None)
    if eval_name is not None:
        chosen["eval"] = _split(splits, eval_name, "eval_split", options)
    if options.test_split is not None:
        chosen["test"] = _split(splits, options.test_split, "test_split", options)
    elif options.test_file is not None:
        chosen["test"] = _split(splits, "test", "test_file", options)
    if options.streaming:
        return streamed(chosen, options)
    for name, rows in chosen.items():
        if len(rows) == 0:
            raise ValueError(f"dataset={options.dataset!r} has no rows in its {name} split")
    if "eval" not in chosen:
        chosen["train"], chosen["eval"] = _hold_out(chosen["train"], options)
    return chosen


def load_split(options: RunOptions, name: str) -> Dataset:
    """One split of what `options.dataset` names, whole.

    Raises:
        ValueError: If the data cannot be found or read, or has no such split.
    """
    return _split(_load(options), name, "split", options)


def _load(options: RunOptions) -> dict[str, Dataset]:
    """All splits there are, by their own names."""
    name = options.dataset or ""
    if name.startswith("builtin:"):
        return _load_builtin(name.removeprefix("builtin:"))
    path = Path(name).expanduser()
    for option, extra in (("eval_file", options.eval_file), ("test_file", options.test_file)):
        if extra is not None and not path.is_file():
            raise ValueError(f"{option}={extra!r} needs a file as dataset too, which {name!r} is not")
    if path.is_file():
        files = {"train": path, "validation": options.eval_file, "test": options.test_file}
        return _load_files({split: [_file(f, split)] for split, f in files.items() if f}, options)
    if path.is_dir():
        return _load_folder(path, options)
    if path.suffix in _READERS:
        _refuse_missing(path, "dataset")
    check_path(name.partition("@")[0], "dataset")
    return _load_hub(name, options)


def _load_builtin(name: str) -> dict[str, Dataset]:
    if name not in BUILTIN:
        known = ", ".join(f"builtin:{key}" for key in BUILTIN)
        raise ValueError(f"dataset='builtin:{name}' is not known{nearest(name, BUILTIN)}: there are {known}")
    return dict(BUILTIN[name]())


def _file(name: str | Path, split: str) -> Path:
    path = Path(name).expanduser()
    option = {"train": "dataset", "validation": "eval_file", "test": "test_file"}[split]
    if not path.is_file():
        _refuse_missing(path, option)
    if path.stat().st_size == 0:
        raise ValueError(f"{option}={str(name)!r} is empty: give rows")
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{option}={str(name)!r} ends in {path.suffix!r}: use one of {', '.join(_READERS)}")
    return path


def _refuse_missing(path: Path, option: str) -> None:
    if not path.parent.is_dir():
        hint = f"; the folder {str(path.parent)!r} does not exist either"
    else:  # by the stem: all of a kind are alike in their ending
        inside = {p.stem: p.name for p in path.parent.iterdir()}
        near = difflib.get_close_matches(path.stem, inside, n=1)
        hint = f", did you mean {inside[near[0]]!r}?" if near else f" (looked for {path.resolve()})"
    raise ValueError(f"{option}={str(path)!r} does not exist{hint}")


def _load_folder(path: Path, options: RunOptions) -> dict[str, Dataset]:
    """A folder that `save_to_disk` wrote, with a file per split, of texts, or of a form `datasets` knows."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _by_split(load_from_disk(str(path)))
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        split = _split_of(file)
        if split and file.suffix.lower() in _READERS:
            found.setdefault(split, []).append(file)
    texts = sorted(path.glob("*.txt"))
    if found or texts:  # which datasets would read without their line breaks
        return _load_files(found or {"train": texts}, options)
    try:
        return _by_split(load_dataset(str(path), options.dataset_config, **_lazily(options)))
    except Exception as error:  # whatever a reader of datasets raises on a folder that is not for it
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"dataset={str(path)!r}: the folder has no files called train or dev in {', '.join(_READERS)}, "
            f"and datasets cannot read it either ({type(error).__name__}: {error}). It holds {inside}"
        ) from error


def _split_of(path: Path) -> str | None:
    """The split that a file's name says: `train.csv`, `sst2_dev.tsv`, `train-00000-of-00002.parquet`."""
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    return next((split for split, names in _SPLIT_NAMES.items() if words & set(names)), None)


def _load_files(files: dict[str, list[Path]], options: RunOptions) -> dict[str, Dataset]:
    """Each split by the reader of its file's ending; header and columns are those of the first split."""
    endings = {p.suffix.lower() for paths in files.values() for p in paths}
    first = next(iter(files.values()))[0]
    ending = first.suffix.lower()
    settings = _table_settings(first, options) if ending in (".csv", ".tsv") else {}
    if ending == ".txt":
        settings = {"keep_linebreaks": True}
    names = {split: [str(p) for p in paths] for split, paths in files.items()}
    for path in (p for paths in files.values() for p in paths if p.suffix.lower() in (".json", ".jsonl")):
        _refuse_null_rows(path)
    try:
        if len(endings) == 1:
            return _by_split(load_dataset(_READERS[ending], data_files=names, **settings, **_lazily(options)))
        return {s: _load_files({s: paths}, options)[s] for s, paths in files.items()}
    except Exception as error:  # the readers raise errors of pandas, pyarrow, json ...
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):  # only a header, or nothing at all
            raise ValueError(f"dataset={options.dataset!r} has a split with no rows: give rows") from error
        raise ValueError(
            f"dataset: {', '.join(p for paths in names.values() for p in paths)} cannot be read as "
            f"{' or '.join(sorted(endings))}: {cause}. Check the file, or name its columns with column_names"
        ) from error


def _refuse_null_rows(path: Path) -> None:
    """A line that begins with null is no row, and ends the process in pyarrow's reader (26.0.1)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.lstrip().startswith(b"null"):
                raise ValueError(
                    f"dataset: {path}, line {number}: null is not a row; give one object a line, as in "
                    """{"text": "..."}"""
                )


def _table_settings(path: Path, options: RunOptions) -> dict[str, Any]:
    """How pandas is to read a csv or tsv file. Only an empty cell is missing; "NA" and "null" are text."""
    tabs = path.suffix.lower() == ".tsv"
    settings: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
    if tabs:  # tab-separated files have no quoting: a quote is a character
        settings |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    names = options.column_names or _names_without_header(path, tabs)
    return settings if names is None else {**settings, "names": list(names), "header": None}


def _names_without_header(path: Path, tabs: bool) -> list[str] | None:
    """Names for the columns of a file whose first line is data, or None if that line has the names.

    A name is not a number; a label often is.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
        cells = next(iter(reader), [])
    other = next((mark for mark in ";\t|" if len(cells) == 1 and mark in cells[0]), None)
    if other is not None:
        raise ValueError(
            f"dataset: the first line of {str(path)!r} is one column, {cells[0]!r}: it seems to be separated "
            f"by {other!r}. Write it with {'tabs' if tabs else 'commas (or tabs, as .tsv)'}, or set "
            "column_names"
        )
    numbers = [re.fullmatch(r"[+-]?\d+(\.\d*)?", cell.strip()) is not None for cell in cells]
    if not any(numbers):
        return None
    texts = numbers.count(False)
    names = [
        "label" if number else ("text" if texts == 1 else f"text{numbers[:i].count(False) + 1}")
        for i, number in enumerate(numbers)
    ]
    if numbers.count(True) > 1:
        names = [f"column{i}" for i in range(len(cells))]
    logger.warning("%s has no header line; its columns are called %s (column_names sets them)", path, names)
    return names


def _load_hub(name: str, options: RunOptions) -> dict[str, Dataset]:
    repository, _, revision = name.partition("@")
    try:
        loaded = load_dataset(
            repository, options.dataset_config, revision=revision or None, **_lazily(options)
        )
    except Exception as error:  # the network, a refusal, a missing configuration ...
        raise ValueError(
            f"dataset={name!r} is no file or folder here, and the Hub did not give it "
            f"({type(error).__name__}: {error}). Check the spelling, "
            f"dataset_config={options.dataset_config!r} and the network, or set dataset to a folder with it"
        ) from error
    return _by_split(loaded)


def _lazily(options: RunOptions) -> dict[str, Any]:
    return {"streaming": True} if options.streaming else {}


def _by_split(loaded: Any) -> dict[str, Dataset]:
    single = isinstance(loaded, Dataset | IterableDataset)
    return {"train": loaded} if single else {str(k): v for k, v in loaded.items()}


def _split(splits: dict[str, Dataset], name: str, option: str, options: RunOptions) -> Dataset:
    if name not in splits:
        known: Iterable[str] = sorted(splits)
        raise ValueError(
            f"{option}={name!r} is no split of dataset={options.dataset!r}{nearest(name, known)}: "
            f"there are {', '.join(known)}"
        )
    return splits[name]


def _hold_out(train: Dataset, options: RunOptions) -> tuple[Dataset, Dataset]:
    """Take the evaluation rows from train: at random, or the last ones where rows are lines of a text."""
    if len(train) < 2:
        raise ValueError(
            f"dataset={options.dataset!r} has only {len(train)} row: give more, or set eval_split or "
            "eval_file"
        )
    rows = min(max(int(len(train) * _HELD_OUT), 1), _HELD_OUT_ROWS)
    logger.warning("no evaluation split: %d of %d rows of train are held out for it", rows, len(train))
    if train.column_names == ["text"]:
        kept = len(train) - rows
        return train.select(range(kept)), train.select(range(kept, len(train)))
    parts = train.train_test_split(test_size=rows, seed=0, keep_in_memory=False)
    return parts["train"], parts["test"]
