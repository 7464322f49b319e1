"""Where rows come from, which columns and labels they have, and errors that say what there is."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import transformers as tf
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from hf_kd.data import BUILTIN, describe_labels, label_names, load_raw
from hf_kd.data import builtin as builtin_module
from hf_kd.data.columns import input_columns, label_column
from hf_kd.data.labels import encoder
from hf_kd.options import RunOptions


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is left in the user's cache, nothing found there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(name, **options):
    return load_raw(RunOptions(dataset=str(name), **options))


def rows_of(raw, split="train"):
    return [dict(row) for row in raw[split]]


# ---- files and folders ----


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.csv", 'text,label\n"a, b",1\nc,0\n'),
        ("data.tsv", "text\tlabel\na, b\t1\nc\t0\n"),
        ("data.jsonl", '{"text": "a, b", "label": 1}\n{"text": "c", "label": 0}\n'),
        ("data.json", '[{"text": "a, b", "label": 1}, {"text": "c", "label": 0}]'),
    ],
)
def test_files_with_names(tmp_path, name, text):
    file = write(tmp_path / name, text)
    raw = load(file, eval_file=file)
    assert rows_of(raw) == rows_of(raw, "eval") == [{"text": "a, b", "label": 1}, {"text": "c", "label": 0}]
    assert set(raw) == {"train", "eval"}


def test_parquet_and_test_file(tmp_path):
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}).to_parquet(tmp_path / "data.parquet")
    file = str(tmp_path / "data.parquet")
    raw = load(file, eval_file=file, test_file=file)
    assert set(raw) == {"train", "eval", "test"} and rows_of(raw, "test")[0] == {"text": "a", "label": 1}


def test_text_file_keeps_line_breaks(tmp_path):
    raw = load(write(tmp_path / "book.txt", "".join(f"line {i}\n" for i in range(20))))
    assert raw["train"]["text"][0] == "line 0\n"
    assert list(raw["eval"]["text"]) == ["line 18\n", "line 19\n"]  # the end, not lines from all over


def test_folder_without_header_as_sst2_comes(tmp_path):
    """Text and label by tab, no header, split by file name; quotes and "NA" are text."""
    write(tmp_path / "train.tsv", 'a "quoted film\t1\nNA\t0\nnull\t1\n')
    write(tmp_path / "dev.tsv", "dull\t0\n")
    write(tmp_path / "test.tsv", "fine\t1\nlate\t0\n")
    raw = load(tmp_path, test_split="test")
    assert rows_of(raw)[0] == {"text": 'a "quoted film', "label": 1}
    assert list(raw["train"]["text"])[1:] == ["NA", "null"]
    assert rows_of(raw, "eval") == [{"text": "dull", "label": 0}] and len(raw["test"]) == 2
    assert "test" not in load(tmp_path)


def test_header_is_told_from_data_or_given(tmp_path):
    pair = write(tmp_path / "pair.tsv", "one\ttwo\t0.5\nthree\tfour\t2.0\n")
    assert load(pair, eval_file=pair)["train"].column_names == ["text1", "text2", "label"]
    named = write(tmp_path / "named.csv", "bad,movie\ngood,film\n")
    assert load(named, eval_file=named)["train"].column_names == ["bad", "movie"]
    given = load(named, eval_file=named, column_names=["label", "text"])
    assert rows_of(given)[0] == {"label": "bad", "text": "movie"}


def test_folder_with_files_of_several_kinds(tmp_path):
    write(tmp_path / "train.jsonl", '{"text": "a", "label": 1}\n')
    write(tmp_path / "my_validation.csv", "text,label\nb,0\n")
    raw = load(tmp_path)
    assert rows_of(raw)[0]["text"] == "a" and rows_of(raw, "eval")[0]["text"] == "b"


def test_folder_of_texts_keeps_line_breaks(tmp_path):
    """In the order of their names; the end is held out."""
    write(tmp_path / "b.txt", "third\nfourth\n")
    write(tmp_path / "a.txt", "first\n\nsecond\n")
    raw = load(tmp_path)
    assert "".join(raw["train"]["text"]) == "first\n\nsecond\nthird\n" and list(raw["eval"]["text"]) == [
        "fourth\n"
    ]


def test_folder_of_images(tmp_path):
    for split in ("train", "validation"):
        for i, name in enumerate(("healthy", "rust")):
            (tmp_path / split / name).mkdir(parents=True)
            shade = np.full((6, 5, 3), 40 * i, dtype=np.uint8)
            Image.fromarray(shade).save(tmp_path / split / name / "leaf.png")
    raw = load(tmp_path)
    assert label_names(raw, RunOptions(task="image-classification")) == ["healthy", "rust"]
    assert raw["eval"][1]["image"].size == (5, 6)


def test_folder_that_save_to_disk_wrote(tmp_path):
    part = Dataset.from_dict({"text": ["a", "b"]})
    DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "saved")
    assert len(load(tmp_path / "saved")["eval"]) == 2
    part.save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one")["train"]) == 1


def test_split_is_held_out_and_always_the_same(tmp_path):
    file = write(tmp_path / "data.csv", "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(50)))
    first, second = load(file), load(file)
    assert (len(first["train"]), len(first["eval"])) == (45, 5)
    assert list(first["eval"]["text"]) == list(second["eval"]["text"]) != [f"t{i}" for i in range(45, 50)]
    assert not set(first["eval"]["text"]) & set(first["train"]["text"])
    assert first["train"]._fingerprint == second["train"]._fingerprint


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {"dataset": "nothing.csv"}, "dataset='.*nothing.csv' does not exist"),
        ({"dtaa.csv": "a,b\n"}, {"dataset": "data.csv"}, "did you mean 'dtaa.csv'"),
        ({"rows.csv": "a,b\n"}, {"dataset": "novel.csv"}, "novel.csv' does not exist .looked for [^,]*$"),
        ({"empty.txt": ""}, {"dataset": "empty.txt"}, "dataset='.*empty.txt' is empty"),
        ({}, {"dataset": "folder/data.csv"}, "the folder '.*folder' does not exist either"),
        ({"data.xml": "<a/>"}, {"dataset": "data.xml"}, "ends in '.xml': use one of .csv"),
        ({"data.csv": "text,label\n"}, {"dataset": "data.csv"}, "has a split with no rows"),
        ({"data.csv": "text\na\n"}, {"dataset": "data.csv"}, "only 1 row"),
        (
            {"d/dev.csv": "text\na\n"},
            {"dataset": "d"},
            "train_split='train' is no split .*there are validation",
        ),
        (
            {"d/train.csv": "text\na\n"},
            {"dataset": "d", "eval_split": "tran"},
            "eval_split='tran' is no split .*did you mean 'train'",
        ),
        ({"d/notes.md": "x"}, {"dataset": "d"}, "no files called train or dev .* It holds notes.md"),
        ({"data.jsonl": "{broken"}, {"dataset": "data.jsonl"}, "data.jsonl cannot be read as .jsonl"),
        ({"d/train.csv": "a\nb\n"}, {"dataset": "d", "eval_file": "d/train.csv"}, "needs a file as dataset"),
        (
            {"a.csv": "a\nb\n"},
            {"dataset": "a.csv", "eval_file": "b.csv"},
            "eval_file='.*b.csv' does not exist",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path, files, options, message):
    for name, text in files.items():
        write(tmp_path / name, text)
    paths = {k: str(tmp_path / v) if k in ("dataset", "eval_file") else v for k, v in options.items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_raw(RunOptions(**paths))


def test_hub_ids_go_to_load_dataset(monkeypatch):
    """The id, configuration and revision reach `load_dataset`; offline the error says what was tried."""
    asked = []

    def load_dataset(path, name=None, *, revision=None):
        asked.append((path, name, revision))
        part = Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]})
        return DatasetDict(train=part, validation=part)

    monkeypatch.setattr("hf_kd.data.sources.load_dataset", load_dataset)
    raw = load("nyu-mll/glue@refs/convert/parquet", dataset_config="sst2")
    assert asked == [("nyu-mll/glue", "sst2", "refs/convert/parquet")] and len(raw["eval"]) == 2
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"dataset='stanfordnlp/sst2' is no file or folder here.*network"):
        load("stanfordnlp/sst2")


# ---- what every machine has ----


def test_digits():
    raw = load("builtin:digits", test_split="test")
    assert {name: len(rows) for name, rows in raw.items()} == {"train": 1197, "eval": 300, "test": 300}
    assert raw["train"].features["label"].names == [str(i) for i in range(10)]
    image = raw["train"][0]["image"]
    assert image.size == (8, 8) and image.mode == "L" and np.asarray(image).max() == 255
    seen = [np.asarray(row["image"]).tobytes() for rows in raw.values() for row in rows]
    assert len(set(seen)) > 1750  # no row in two splits; a few digits are written alike
    assert all(20 <= n <= 40 for n in np.bincount(raw["test"]["label"]))
    again = load("builtin:digits")
    assert raw["train"]._fingerprint == again["train"]._fingerprint


def test_stdlib(tmp_path, monkeypatch):
    for name in [f"module{i}.py" for i in range(30)] + [
        "test/test_x.py",
        "site-packages/other.py",
        "notes.txt",
    ]:
        write(tmp_path / "lib" / name, f"# {name}\n")
    monkeypatch.setattr(builtin_module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    raw = load("builtin:stdlib", test_split="test")
    texts = {name: set(rows["text"]) for name, rows in raw.items()}
    assert {name: len(rows) for name, rows in texts.items()} == {"train": 28, "eval": 1, "test": 1}
    assert set.union(*texts.values()) == {f"# module{i}.py\n" for i in range(30)}
    assert list(raw["train"]["text"]) == list(load("builtin:stdlib")["train"]["text"])


def test_unknown_builtin():
    assert set(BUILTIN) == {"digits", "stdlib"}
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load("builtin:digit")


# ---- columns ----


@pytest.mark.parametrize(
    ("task", "columns", "inputs", "label"),
    [
        ("sequence-classification", ["idx", "sentence", "label"], ["sentence"], "label"),
        ("sequence-classification", ["premise", "hypothesis", "label"], ["premise", "hypothesis"], "label"),
        ("sequence-classification", ["question", "sentence", "label"], ["question", "sentence"], "label"),
        ("token-classification", ["id", "tokens", "pos_tags", "ner_tags"], ["tokens"], "ner_tags"),
        (
            "question-answering",
            ["id", "title", "context", "question", "answers"],
            ["question", "context"],
            "answers",
        ),
        ("causal-lm", ["text"], ["text"], None),
        ("seq2seq-lm", ["document", "summary", "id"], ["document"], "summary"),
        ("image-classification", ["image_file_path", "image", "labels"], ["image"], "labels"),
        ("sequence-classification", ["body", "label"], ["body"], "label"),  # the only column of strings
    ],
)
def test_columns_of_well_known_data(task, columns, inputs, label):
    numbers = {"idx", "label", "labels"}
    rows = Dataset.from_dict({name: [1] if name in numbers else ["x"] for name in columns})
    options = RunOptions()
    assert input_columns(rows, options, task) == inputs
    assert label_column(rows, options, task) == label
    assert label_column(rows, RunOptions(unlabelled=True), task) is None


def test_missing_columns_are_errors_that_name_what_there_is():
    rows = Dataset.from_dict({"titel": ["x"], "body": ["y"], "n": [1]})
    task = "sequence-classification"
    with pytest.raises(ValueError, match="text_columns is not set .* among the columns titel, body, n"):
        input_columns(rows, RunOptions(), task)
    with pytest.raises(ValueError, match="text_columns='title' is no column .*did you mean 'titel'"):
        input_columns(rows, RunOptions(text_columns=["title"]), task)
    with pytest.raises(ValueError, match="label_column is not set .*unlabelled=true with alpha=1"):
        label_column(rows, RunOptions(), task)
    with pytest.raises(ValueError, match="label_column='labels' is no column .*there are titel, body, n"):
        label_column(rows, RunOptions(label_column="labels"), task)


# ---- labels ----


def describe(values, feature=None, other=None, **options):
    features = Features({"label": feature}) if feature is not None else None
    parts = [Dataset.from_dict({"label": v}, features=features) for v in (values, other or values)]
    options = {"task": "sequence-classification", "label_column": "label", **options}
    return describe_labels(DatasetDict(train=parts[0], eval=parts[1]), RunOptions(**options))


def config(names=None, count=None):
    if names is None:
        return tf.BertConfig(num_labels=count)
    return SimpleNamespace(id2label=dict(enumerate(names)), num_labels=len(names))


def encoded(labels, values, **names):
    encode = encoder(labels, config(**names))
    return [encode(value) for value in values]


def test_class_labels_keep_their_order():
    labels = describe([1, 0], ClassLabel(names=["neg", "pos"]))
    assert labels.names == ("neg", "pos") and labels.count == 2
    assert encoded(labels, [1, 0, -1], count=2) == [1, 0, -100]


def test_strings_are_sorted_and_numbered_over_both_splits():
    labels = describe(["b", "c"], other=["a", None])
    assert labels.names == ("a", "b", "c")
    assert encoded(labels, ["c", "a", None], count=3) == [2, 0, -100]


def test_numbers_are_class_ids_or_names():
    assert describe([0, 2, 1]).count == 3 and not describe([0, 2, 1]).named
    stars = describe([1, 5, 3, 2, 4])
    assert stars.names == ("1", "2", "3", "4", "5") and encoded(stars, [1, 5], count=5) == [0, 4]
    assert describe([0, 1, -1]).count == 2  # -1 is what Hub data has where the label is kept secret
    assert describe([0.0, 1.0, None]).problem_type == "single_label_classification"
    assert encoded(describe([0.0, 1.0, None]), [1.0, None, float("nan")], count=2) == [1, -100, -100]
    assert describe([True, False]).names == ("False", "True")


def test_measures_are_a_regression():
    labels = describe([0.5, 3.0, None])
    assert (labels.problem_type, labels.count, labels.names) == ("regression", 1, ())
    values = encoded(labels, [2.5, None], count=1)
    assert values[0] == 2.5 and np.isnan(values[1])
    assert describe([1, 2, 3], problem_type="regression").count == 1
    assert describe([1.0, 2.0], problem_type="single_label_classification").count == 2


def test_lists_are_several_labels():
    named = describe([[0, 2], []], List(ClassLabel(names=["a", "b", "c"])))
    assert named.problem_type == "multi_label_classification"
    assert encoded(named, [[0, 2], [], None], count=3) == [[1, 0, 1], [0, 0, 0], [-100] * 3]
    hot = describe([[1.0, 0.0], [1.0, 1.0]])
    assert hot.multi_hot and encoded(hot, [[1.0, 0.0]], count=2) == [[1, 0]]
    words = describe([["x"], ["y", "x"]])
    assert encoded(words, [["y"]], count=2) == [[0, 1]]
    with pytest.raises(ValueError, match="neither 0 or 1 nor class ids"):
        describe([[0.5, 0.1], [0.2, 0.3]])


def test_labels_are_matched_by_name():
    """Trap 32: where data and model order the same names otherwise, ids follow the model's names."""
    labels = describe([0, 1], ClassLabel(names=["negative", "positive"]))
    assert encoded(labels, [0, 1], names=["Positive", "Negative"]) == [1, 0]
    naive = [0, 1]
    assert naive != encoded(labels, [0, 1], names=["Positive", "Negative"])
    with pytest.raises(ValueError, match="has no positive"):
        encoder(labels, config(names=["negative", "neutral"]))


def test_too_few_outputs_are_refused():
    with pytest.raises(ValueError, match="3 classes, 0, 1, 2, and the .*num_labels=2: out of range"):
        encoder(describe([0, 1, 2]), config(count=2))
    with pytest.raises(ValueError, match="num_labels=2 but label_column='label' has 3 classes"):
        describe([0, 1, 2], num_labels=2)
    assert describe([0, 1, 2], num_labels=5).count == 5


def test_tags_are_described_by_what_is_in_the_lists():
    names = ["O", "B-PER", "I-PER"]
    labels = describe([[0, 1, 2]], List(ClassLabel(names=names)), task="token-classification")
    assert labels.names == tuple(names) and labels.problem_type == "single_label_classification"
    assert encoded(labels, [[0, 2]], names=["I-PER", "O", "B-PER"]) == [[1, 0]]
    words = describe([["O", "B-X"]], task="token-classification")
    assert words.names == ("B-X", "O") and encoded(words, [["O"]], count=2) == [[1]]


def test_without_labels_there_is_nothing_to_describe():
    assert describe([0, 1], unlabelled=True) is None
    assert describe([0, 1], task="causal-lm") is None
    with pytest.raises(ValueError, match="has no values"):
        describe([None, None], Value("int64"))


def test_squad_answers_survive_json(tmp_path):
    row = {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}}
    raw = load(write(tmp_path / "squad.jsonl", "\n".join([json.dumps(row)] * 4)))
    assert raw["train"][0]["answers"] == {"text": ["c"], "answer_start": [0]}


@pytest.mark.parametrize("text", ['null{"a": 1}\n', "null\n", '{"a": 1}\n  null\n{"a": 2}\n'])
def test_a_row_of_null_is_refused_before_the_reader_sees_it(tmp_path, text):
    """Found by fuzzing: pyarrow ends the process where a block of a JSON file begins with null."""
    number = 1 if text.startswith("null") else 2
    for name in ("rows.json", "rows.jsonl"):
        path = write(tmp_path / name, text)
        with pytest.raises(ValueError, match=rf"{name}, line {number}: null is not a row"):
            load(path)
    path = write(tmp_path / "fine.jsonl", '{"a": null}\n{"a": "null"}\n' * 20)
    assert len(load(path)["train"]) > 20
