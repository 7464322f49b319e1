"""Rows of every task, from local files with the columns of well-known data sets."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from hf_kd.data import load_processor, load_raw, make_image_processor, prepare, train_tokenizer
from hf_kd.data.collate import CausalCollator, PaddingCollator
from hf_kd.data.images import ArrayRows, LazyRows
from hf_kd.data.processors import process_image, treat_alike
from hf_kd.options import RunOptions

TEXT = [
    "the cat sat on the mat and the dog sat on the cat",
    "a stirring , funny and finally transporting film",
    "Jane Smith of Acme Corp lives in Paris , France",
    "who lives in Paris ? Jane Smith lives in Paris",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def bert_tokenizer():
    return train_tokenizer(TEXT, 330, task="masked-lm")


@pytest.fixture(scope="module")
def causal_tokenizer():
    return train_tokenizer(TEXT, 300)


def bert_config(names=("0", "1"), **changes):
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return tf.BertConfig(max_position_embeddings=64, **labels, **changes)


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def both(rows, features=None):
    part = Dataset.from_dict(rows, features=features)
    return DatasetDict(train=part, eval=part)


def run(raw, task, processor, config, **options):
    teacher = options.pop("teacher_processor", None)
    return prepare(
        raw, RunOptions(**options), task=task, processor=processor, config=config, teacher_processor=teacher
    )


def batch_of(prepared, split="train"):
    rows = getattr(prepared, split)
    return prepared.collator([rows[i] for i in range(len(rows))])


# ---- text with a label ----


def test_sst2(tmp_path, bert_tokenizer):
    """Columns of sst2; a model that was not changed reads a batch as it is."""
    rows = [{"idx": i, "sentence": text, "label": i % 2} for i, text in enumerate(TEXT)]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "validation.jsonl", rows[:2])
    raw = load_raw(RunOptions(dataset=str(tmp_path)))
    data = run(raw, "sequence-classification", bert_tokenizer, bert_config())
    batch = batch_of(data)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [0, 1, 0, 1] and batch["labels"].dtype == torch.int64
    assert bert_tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == TEXT[0]
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["input_ids"][padding] == bert_tokenizer.pad_token_id).all()
    assert (data.primary_metric, data.greater_is_better, len(data.eval)) == ("accuracy", True, 2)
    predictions = tf.EvalPrediction(np.eye(2)[[0, 0]], np.array([0, 1]))
    assert data.compute_metrics(predictions)["accuracy"] == 0.5
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = tf.BertForSequenceClassification(bert_config(vocab_size=len(bert_tokenizer), **sizes))
    assert model(**batch).logits.shape == (4, 2)


def test_pairs_have_types_and_are_cut(bert_tokenizer):
    raw = both({"premise": TEXT, "hypothesis": TEXT[::-1], "label": [0, 1, 0, 1]})
    data = run(raw, "sequence-classification", bert_tokenizer, bert_config(), max_length=20)
    batch = batch_of(data)
    assert batch["input_ids"].shape == (4, 20)
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}
    with pytest.raises(
        ValueError, match="max_length=65 is more than model and tokenizer take: set at most 64"
    ):
        run(raw, "sequence-classification", bert_tokenizer, bert_config(), max_length=65)
    with pytest.raises(ValueError, match="one text or a pair"):
        columns = ["premise", "hypothesis", "premise"]
        run(raw, "sequence-classification", bert_tokenizer, bert_config(), text_columns=columns)


def test_roberta_positions_start_late():
    """A model that counts positions from the padding id on takes two tokens fewer than it has positions."""
    tokenizer = train_tokenizer(TEXT, 300, task="masked-lm")
    config = tf.RobertaConfig(max_position_embeddings=22, pad_token_id=1, num_labels=2)
    raw = both({"text": [" ".join(TEXT)] * 2, "label": [0, 1]})
    batch = batch_of(run(raw, "sequence-classification", tokenizer, config))
    assert batch["input_ids"].shape == (2, 20)


def test_unlabelled_text(bert_tokenizer):
    """Trap 2: data without labels makes batches without labels, and metrics stay silent."""
    raw = both({"text": TEXT})
    data = run(raw, "sequence-classification", bert_tokenizer, bert_config(), unlabelled=True)
    assert set(batch_of(data)) == {"input_ids", "token_type_ids", "attention_mask"}
    assert data.compute_metrics(tf.EvalPrediction(np.eye(2), None)) == {}
    labelled = both({"text": TEXT, "label": [0, 1, None, -1]})
    data = run(labelled, "sequence-classification", bert_tokenizer, bert_config())
    assert batch_of(data)["labels"].tolist() == [0, 1, -100, -100]


def test_several_labels_and_numbers(bert_tokenizer):
    raw = both({"text": TEXT, "labels": [[1, 0], [0, 0], [1, 1], [0, 1]]})
    data = run(raw, "sequence-classification", bert_tokenizer, bert_config())
    labels = batch_of(data)["labels"]
    assert labels.tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]] and labels.is_floating_point()
    raw = both({"sentence1": TEXT, "sentence2": TEXT, "score": [0.5, 3.0, 4.25, None]})
    config = bert_config(names=("score",))
    data = run(raw, "sequence-classification", bert_tokenizer, config)
    labels = batch_of(data)["labels"]
    assert labels[:3].tolist() == [0.5, 3.0, 4.25] and labels[3].isnan()
    assert (data.primary_metric, data.greater_is_better) == ("pearson", True)


def test_teacher_with_other_tokens_gets_its_own_columns(bert_tokenizer, causal_tokenizer):
    """Trap 20: every column that the teacher's forward could take from the student has one of its own."""
    raw = both({"text": TEXT, "label": [0, 1, 0, 1]})
    data = run(
        raw, "sequence-classification", bert_tokenizer, bert_config(), teacher_processor=causal_tokenizer
    )
    batch = batch_of(data)
    own = {"input_ids", "token_type_ids", "attention_mask"}
    assert set(batch) == {*own, *(f"teacher_{name}" for name in own), "labels"}
    assert causal_tokenizer.decode(batch["teacher_input_ids"][1], skip_special_tokens=True) == TEXT[1]
    assert batch["teacher_token_type_ids"].shape == batch["teacher_input_ids"].shape
    padding = batch["teacher_attention_mask"] == 0
    assert (batch["teacher_input_ids"][padding] == causal_tokenizer.pad_token_id).all()


def test_same_tokens_need_no_columns_of_their_own(bert_tokenizer):
    """Trap 20: of two tokenizers that read alike, the one that makes more columns is used for both models."""
    bare = train_tokenizer(TEXT, 330, task="masked-lm")
    bare.model_input_names = ["input_ids", "attention_mask"]
    raw = both({"text": TEXT, "label": [0, 1, 0, 1]})
    for mine, theirs in ((bare, bert_tokenizer), (bert_tokenizer, bare)):
        data = run(raw, "sequence-classification", mine, bert_config(), teacher_processor=theirs)
        assert set(batch_of(data)) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


# ---- tokens ----

NAMES = ["O", "B-PER", "I-PER", "B-LOC"]
WORDS = [["Jane", "Smith", "lives", "in", "Paris"], ["who", "lives"]]
TAGS = [[1, 2, 0, 0, 3], [0, 0]]


def test_conll2003(bert_tokenizer):
    """Trap 35: one label a word, on its first token; later tokens and special ones have none."""
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=NAMES))})
    raw = both({"tokens": WORDS, "ner_tags": TAGS}, features)
    data = run(raw, "token-classification", bert_tokenizer, bert_config(NAMES))
    batch = batch_of(data)
    for i, (words, tags) in enumerate(zip(WORDS, TAGS, strict=True)):
        kept = batch["labels"][i] != -100
        assert batch["labels"][i][kept].tolist() == tags
        encoded = bert_tokenizer(words, is_split_into_words=True)
        first = [encoded.word_to_tokens(w).start for w in range(len(words))]
        assert kept.nonzero().flatten().tolist() == first
    assert len(batch["labels"][0]) > len(WORDS[0]) + 2  # some word has several tokens
    assert data.primary_metric == "entity_f1"
    logits = np.eye(4)[np.where(batch["labels"] < 0, 3, batch["labels"])]
    assert data.compute_metrics(tf.EvalPrediction(logits, batch["labels"].numpy()))["entity_f1"] == 1.0


def test_tags_follow_the_names_of_the_model(bert_tokenizer):
    """Trap 32: a teacher that orders its tags otherwise."""
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=NAMES))})
    raw = both({"tokens": WORDS, "ner_tags": TAGS}, features)
    batch = batch_of(run(raw, "token-classification", bert_tokenizer, bert_config(NAMES[::-1])))
    assert batch["labels"][0][batch["labels"][0] >= 0].tolist() == [2, 1, 3, 3, 0]


def test_unlabelled_words_mark_the_same_positions(bert_tokenizer):
    """Trap 2: without tags the same tokens are distilled as with them."""
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=NAMES))})
    raw = both({"tokens": WORDS, "ner_tags": TAGS}, features)
    tagged = batch_of(run(raw, "token-classification", bert_tokenizer, bert_config(NAMES)))
    bare = batch_of(run(raw, "token-classification", bert_tokenizer, bert_config(NAMES), unlabelled=True))
    assert "labels" not in bare
    assert torch.equal(bare["special_tokens_mask"] == 0, tagged["labels"] != -100)


def test_words_and_tags_must_correspond(bert_tokenizer):
    raw = both({"tokens": WORDS, "ner_tags": [[0, 1, 0], [0, 0]]})
    with pytest.raises(ValueError, match="3 tags for the 5 words"):
        run(raw, "token-classification", bert_tokenizer, bert_config())
    raw = both({"tokens": WORDS, "ner_tags": TAGS})
    other = train_tokenizer(TEXT[:1], 270, task="masked-lm")
    with pytest.raises(ValueError, match="divide words differently"):
        run(raw, "token-classification", bert_tokenizer, bert_config(NAMES), teacher_processor=other)


# ---- running text ----


def test_causal_rows_hold_every_token_once(causal_tokenizer):
    raw = both({"text": TEXT})
    config = tf.LlamaConfig(max_position_embeddings=16, vocab_size=len(causal_tokenizer))
    data = run(raw, "causal-lm", causal_tokenizer, config)
    rows = list(data.train["input_ids"])
    assert all(len(row) == 16 for row in rows[:-1])
    end = causal_tokenizer.eos_token_id
    whole = [t for text in TEXT for t in [*causal_tokenizer(text)["input_ids"], end]]
    assert [t for row in rows for t in row] == whole
    assert data.compute_metrics is None and data.primary_metric == "perplexity"
    assert not data.greater_is_better


def test_lines_of_a_text_are_joined(tmp_path, causal_tokenizer):
    """Between lines stands their line break, between texts the end token."""
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\nfour\n")
    raw = load_raw(RunOptions(dataset=str(tmp_path / "a.txt"), eval_file=str(tmp_path / "a.txt")))
    config = tf.LlamaConfig(max_position_embeddings=64)
    data = run(raw, "causal-lm", causal_tokenizer, config)
    assert causal_tokenizer.decode(data.train[0]["input_ids"]) == "one\n\ntwo\nthree\nfour\n"
    data = run(both({"text": ["def f():\n    pass\n", "x"]}), "causal-lm", causal_tokenizer, config)
    assert causal_tokenizer.decode(data.train[0]["input_ids"]) == "def f():\n    pass\n<eos>x<eos>"


def test_padding_is_no_label_but_the_end_token_is(causal_tokenizer):
    """Trap 33: where the padding token is the end token, naive collators drop the label of every end."""
    tokenizer = train_tokenizer(TEXT, 300)
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    rows = [{"input_ids": [5, 6, 7, end]}, {"input_ids": [8, end]}]
    batch = CausalCollator(tokenizer)(rows)
    assert batch["labels"].tolist() == [[5, 6, 7, end], [8, end, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    naive = tf.DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    assert naive["labels"][0].tolist() != [5, 6, 7, end]


def test_limits_of_running_text_count_what_is_cut(causal_tokenizer):
    raw = both({"text": TEXT * 50})
    config = tf.LlamaConfig(max_position_embeddings=16)
    data = run(raw, "causal-lm", causal_tokenizer, config, max_train_samples=3, max_eval_samples=2)
    assert (len(data.train), len(data.eval)) == (3, 2)
    whole = run(raw, "causal-lm", causal_tokenizer, config)
    assert list(data.train["input_ids"]) == list(whole.train["input_ids"])[:3]
    assert len(run(raw, "causal-lm", causal_tokenizer, config, max_train_samples=10**6).train) == len(
        whole.train
    )


def test_masked_rows_are_masked_anew_in_training_and_once_for_evaluation(bert_tokenizer):
    """Trap 35: only masked positions have labels; all models are evaluated on the same ones."""
    raw = both({"text": [*TEXT, "", "  \n"] * 4})
    config = bert_config(vocab_size=len(bert_tokenizer))
    data = run(raw, "masked-lm", bert_tokenizer, config, max_length=32, mlm_probability=0.3)
    torch.manual_seed(0)
    first, second = batch_of(data), batch_of(data)
    assert not torch.equal(first["labels"], second["labels"])
    share = (first["labels"] != -100).float().mean()
    assert 0.15 < share < 0.4
    changed = first["input_ids"] != second["input_ids"]
    assert ((first["labels"] != -100) | (second["labels"] != -100))[changed].all()
    one, two = batch_of(data, "eval"), batch_of(data, "eval")
    assert torch.equal(one["input_ids"], two["input_ids"]) and torch.equal(one["labels"], two["labels"])
    again = run(raw, "masked-lm", bert_tokenizer, config, max_length=32, mlm_probability=0.3)
    assert list(again.eval["labels"]) == list(data.eval["labels"])
    special = torch.tensor(bert_tokenizer.all_special_ids)
    for batch in (first, one):
        assert not torch.isin(batch["labels"], special).any()
        assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_masked_rows_need_a_mask_token(causal_tokenizer):
    with pytest.raises(ValueError, match="has no mask token"):
        run(both({"text": TEXT}), "masked-lm", causal_tokenizer, bert_config())


def test_xsum(tmp_path, bert_tokenizer):
    """Trap 34: labels are padded with -100, and are the target alone."""
    rows = [
        {"document": text * 9, "summary": text[: 9 * (i + 1)], "id": str(i)} for i, text in enumerate(TEXT)
    ]
    raw = load_raw(RunOptions(dataset=jsonl(tmp_path / "a.jsonl", rows), eval_file=str(tmp_path / "a.jsonl")))
    config = tf.T5Config(vocab_size=len(bert_tokenizer))
    data = run(raw, "seq2seq-lm", bert_tokenizer, config, max_length=40)
    batch = batch_of(data)
    assert batch["input_ids"].shape == (4, 40)
    target = batch["labels"][0]
    assert bert_tokenizer.decode(target[target != -100], skip_special_tokens=True) == TEXT[0][:9]
    assert (target == -100).any() and target[0] != -100
    with pytest.raises(ValueError, match="needs one, true or generated"):
        run(raw, "seq2seq-lm", bert_tokenizer, config, unlabelled=True)


def test_language_models_refuse_two_tokenizers(bert_tokenizer, causal_tokenizer):
    """Trap 31: different tokenizers are refused where tokens are compared."""
    for task, config in (("causal-lm", tf.LlamaConfig()), ("masked-lm", bert_config())):
        with pytest.raises(ValueError, match="different tokenizers"):
            run(both({"text": TEXT}), task, bert_tokenizer, config, teacher_processor=causal_tokenizer)


# ---- questions ----


def squad_rows():
    context = "It was long ago. Jane Smith of Acme Corp lives in Paris , France. " * 3
    answers = [
        {"text": ["Paris"], "answer_start": [context.index("Paris")]},
        {"text": ["France"], "answer_start": [context.rindex("France")]},
        {"text": [], "answer_start": []},
    ]
    return [
        {"id": str(i), "title": "t", "context": context, "question": " where does Jane live ?", "answers": a}
        for i, a in enumerate(answers)
    ]


@pytest.fixture
def squad(tmp_path):
    file = jsonl(tmp_path / "squad.jsonl", squad_rows())
    return load_raw(RunOptions(dataset=file, eval_file=file))


def test_squad(squad, bert_tokenizer):
    """Trap 36: an answer's tokens are found; the question and padding are marked as no place for one."""
    data = run(squad, "question-answering", bert_tokenizer, bert_config(), max_length=64)
    batch = batch_of(data)
    rows, length = batch["input_ids"].shape
    assert rows > 3 and length == 64  # passages that are too long became several rows
    found = []
    for i in range(rows):
        start, end = int(batch["start_positions"][i]), int(batch["end_positions"][i])
        allowed = batch["span_mask"][i].bool()
        assert allowed[start] and allowed[end] and allowed[0]
        question = batch["token_type_ids"][i] == 0
        question[0] = False
        assert not (allowed & question).any()
        assert not (allowed & (batch["attention_mask"][i] == 0)).any()
        assert not (allowed & (batch["input_ids"][i] == bert_tokenizer.sep_token_id)).any()
        if start > 0:
            found.append(bert_tokenizer.decode(batch["input_ids"][i][start : end + 1]).strip())
    assert set(found) == {"Paris", "France"}


def test_squad_metrics_look_at_the_passage_only(squad, bert_tokenizer):
    """Trap 36: the highest logit on a question token is not an answer."""
    data = run(squad, "question-answering", bert_tokenizer, bert_config(), max_length=64)
    batch = batch_of(data, "eval")
    labels = (batch["start_positions"].numpy(), batch["end_positions"].numpy())
    start, end = (5 * np.eye(64)[side] for side in labels)
    start[:, 3] = end[:, 3] = 50
    assert data.compute_metrics(tf.EvalPrediction((start, end), labels))["exact_match"] == 1.0
    other = (
        labels[0][:2],
        labels[1][:2],
    )  # rows that are not an evaluation of ours: nothing is known of them
    assert data.compute_metrics(tf.EvalPrediction((start[:2], end[:2]), other))["exact_match"] < 1.0


def test_unlabelled_questions(squad, bert_tokenizer):
    data = run(squad, "question-answering", bert_tokenizer, bert_config(), max_length=64, unlabelled=True)
    assert set(batch_of(data)) == {"input_ids", "token_type_ids", "attention_mask", "span_mask"}


# ---- images and sound ----


def leaves(tmp_path):
    for split in ("train", "validation"):
        for i, name in enumerate(("angular_leaf_spot", "bean_rust", "healthy")):
            (tmp_path / split / name).mkdir(parents=True)
            shades = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(shades).save(tmp_path / split / name / "0.png")
    return load_raw(RunOptions(dataset=str(tmp_path)))


def vit_config(names, **changes):
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return tf.ViTConfig(**labels, **changes)


def test_beans(tmp_path):
    """Photographs by folder, and a teacher whose processor normalises and sizes otherwise (trap 42)."""
    raw = leaves(tmp_path)
    config = vit_config(["healthy", "bean_rust", "angular_leaf_spot"])
    mine = make_image_processor({"image_size": 8})
    theirs = tf.ViTImageProcessorPil(size={"height": 16, "width": 16})
    data = run(raw, "image-classification", mine, config, teacher_processor=theirs)
    batch = batch_of(data)
    assert batch["pixel_values"].shape == (3, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert batch["teacher_pixel_values"].shape == (3, 3, 16, 16)
    assert batch["labels"].tolist() == [2, 1, 0]  # by name, in the model's order
    expected = theirs(raw["train"][0]["image"], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(batch["teacher_pixel_values"][0], expected)


def test_equal_image_processors_make_one_column(tmp_path):
    raw = leaves(tmp_path)
    config = vit_config(["angular_leaf_spot", "bean_rust", "healthy"])
    mine, theirs = make_image_processor({"image_size": 8}), make_image_processor({"image_size": 8})
    batch = batch_of(run(raw, "image-classification", mine, config, teacher_processor=theirs))
    assert set(batch) == {"pixel_values", "labels"}
    theirs.image_mean = [0.4, 0.5, 0.5]
    assert not treat_alike(mine, theirs)


def test_images_are_held_in_memory_on_disk_or_read_again(tmp_path, monkeypatch):
    raw = leaves(tmp_path)
    config = vit_config(["angular_leaf_spot", "bean_rust", "healthy"])
    processor = make_image_processor({"image_size": 8})
    batches = []
    for memory, disk, kind in ((2**20, 2**20, ArrayRows), (0, 2**20, Dataset), (0, 0, LazyRows)):
        monkeypatch.setattr("hf_kd.data.images._IN_MEMORY", memory)
        monkeypatch.setattr("hf_kd.data.images._ON_DISK", disk)
        data = run(raw, "image-classification", processor, config)
        assert isinstance(data.train, kind)
        batches.append(batch_of(data))
    for batch in batches[1:]:
        assert torch.equal(batch["pixel_values"], batches[0]["pixel_values"])
        assert torch.equal(batch["labels"], batches[0]["labels"])


def test_digits_as_they_are():
    options = RunOptions(dataset="builtin:digits", max_train_samples=40, max_eval_samples=20)
    raw = load_raw(options)
    config = {"model_type": "vit", "image_size": 8, "num_channels": 1}
    options.teacher_config = config
    processor = load_processor(options, raw, task="image-classification")
    data = prepare(
        raw,
        options,
        task="image-classification",
        processor=processor,
        config=vit_config([str(i) for i in range(10)]),
    )
    batch = batch_of(data)
    assert batch["pixel_values"].shape == (40, 1, 8, 8) and len(data.eval) == 20
    assert (batch["pixel_values"].min(), batch["pixel_values"].max()) == (-1, 1)
    assert len(batch["labels"].unique()) > 5  # not the first of a sorted file
    grey = np.asarray(raw["train"][0]["image"], dtype=np.float32) / 127.5 - 1
    np.testing.assert_allclose(process_image(processor, raw["train"][0]["image"])[0], grey, atol=1e-6)


def test_unlabelled_images(tmp_path):
    raw = leaves(tmp_path)
    processor = make_image_processor({"image_size": 8})
    data = run(raw, "image-classification", processor, tf.ViTConfig(), unlabelled=True)
    assert set(batch_of(data)) == {"pixel_values"}


def test_sound():
    """Lists of samples at the model's rate; padded to the longest."""
    sounds = [np.sin(np.arange(n) / 9).tolist() for n in (900, 1600)]
    raw = both({"audio": sounds, "label": ["yes", "no"]})
    extractor = tf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    config = tf.Wav2Vec2Config(id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    batch = batch_of(run(raw, "audio-classification", extractor, config))
    assert batch["input_values"].shape == (2, 1600) and batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].sum(-1).tolist() == [900, 1600]
    assert (batch["input_values"][0, 900:] == 0).all()
    half = tf.Wav2Vec2FeatureExtractor(sampling_rate=8000)
    with pytest.raises(ValueError, match="16000 samples per second, the teacher 8000"):
        run(raw, "audio-classification", extractor, config, teacher_processor=half)
    assert isinstance(Audio(), Audio)


# ---- processors, cache, limits ----


def test_trained_tokenizer_is_the_same_every_time_and_loads(tmp_path, causal_tokenizer):
    again = train_tokenizer(TEXT, 300)
    assert again.get_vocab() == causal_tokenizer.get_vocab() and len(again) == 300
    again.save_pretrained(tmp_path)
    raw = both({"text": TEXT})
    loaded = load_processor(RunOptions(teacher=str(tmp_path)), raw, task="causal-lm")
    assert treat_alike(loaded, causal_tokenizer) and loaded.pad_token_id == 0
    text = "déjà vu \n\tx"
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_processor_of_teacher_student_or_option(tmp_path, bert_tokenizer, causal_tokenizer):
    for name, tokenizer in (("teacher", bert_tokenizer), ("student", causal_tokenizer)):
        tokenizer.save_pretrained(tmp_path / name)
    raw = both({"text": TEXT})
    options = RunOptions(teacher=str(tmp_path / "teacher"), student=str(tmp_path / "student"))
    sizes = [len(load_processor(options, raw, task="causal-lm", role=r)) for r in ("teacher", "student")]
    assert sizes == [len(bert_tokenizer), len(causal_tokenizer)]
    options.processor = str(tmp_path / "student")
    assert len(load_processor(options, raw, task="causal-lm")) == len(causal_tokenizer)
    made = RunOptions(teacher_config={"model_type": "llama", "vocab_size": 280})
    assert len(load_processor(made, raw, task="causal-lm")) == 280


def test_processor_that_is_not_there(tmp_path):
    raw = both({"text": TEXT})
    with pytest.raises(ValueError, match="teacher='.*nowhere': this path does not exist"):
        load_processor(RunOptions(teacher=str(tmp_path / "nowhere")), raw, task="causal-lm")
    with pytest.raises(ValueError, match="teacher='.*' has no ImageProcessor .* Set processor"):
        load_processor(RunOptions(teacher=str(tmp_path)), raw, task="image-classification")


def test_prepared_rows_are_found_in_the_cache(tmp_path, bert_tokenizer):
    """The key has nothing of a tokenizer's state, which use changes, and all that decides the rows."""
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXT)]
    file = jsonl(tmp_path / "a.jsonl", rows)

    def prints(tokenizer, **options):
        raw = load_raw(RunOptions(dataset=file, eval_file=file))
        return run(raw, "sequence-classification", tokenizer, bert_config(), **options).train._fingerprint

    fresh = train_tokenizer(TEXT, 330, task="masked-lm")
    first = prints(fresh, max_length=20)
    fresh(TEXT, padding=True, truncation=True, max_length=5)
    assert prints(fresh, max_length=20) == first == prints(bert_tokenizer, max_length=20)
    assert prints(fresh, max_length=21) != first
    assert prints(train_tokenizer(TEXT[:2], 330, task="masked-lm"), max_length=20) != first
    assert len(list(Path(datasets.config.HF_DATASETS_CACHE).rglob("cache-*.arrow"))) >= 3


def test_limited_rows_are_the_same_ones_from_all_over(bert_tokenizer):
    raw = both({"text": [f"word {i}" for i in range(100)], "label": [0] * 50 + [1] * 50})
    options = {"max_train_samples": 20, "max_eval_samples": 5}
    data = run(raw, "sequence-classification", bert_tokenizer, bert_config(), **options)
    again = run(raw, "sequence-classification", bert_tokenizer, bert_config(), **options)
    assert (len(data.train), len(data.eval)) == (20, 5) and set(data.train["labels"]) == {0, 1}
    assert list(data.train["input_ids"]) == list(again.train["input_ids"])


def test_collator_pads_on_the_side_of_the_tokenizer(bert_tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [1, 2, 3]}, {"input_ids": [8], "labels": [4]}]
    tokenizer = train_tokenizer(TEXT, 330, task="masked-lm")
    tokenizer.padding_side = "left"
    batch = PaddingCollator(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["labels"].tolist() == [[1, 2, 3], [-100, -100, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    decoder = PaddingCollator(tokenizer, labels_right=True)(rows)
    assert decoder["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


def test_task_without_preparation(bert_tokenizer):
    with pytest.raises(ValueError, match="task='ctc' has no data preparation .*sequence-classification"):
        run(both({"text": TEXT}), "ctc", bert_tokenizer, bert_config())
