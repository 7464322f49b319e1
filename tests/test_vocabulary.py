"""Trimmed vocabularies: the corpus in the same tokens, the same answers, a teacher that is asked right."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hf_kd.config import DistillationArguments
from hf_kd.students import init_student, trim_vocabulary
from hf_kd.trainer import DistillationTrainer

WORDS = (
    "the quick brown fox jumps over the lazy dog while seventeen students distil a teacher into something "
    "smaller and faster than anybody expected; unbelievably, tokenizers merge characters again and again"
).split()
TEXTS = [" ".join(WORDS[i : i + 7]) for i in range(len(WORDS) - 7)] * 3
CORPUS = [
    "the lazy fox jumps again",
    "students merge a teacher, and again!",
    "sm\u00e4ller dog \u2603 \u4e2d",
]


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=special))
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ids)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip


def bytes_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


@pytest.mark.parametrize("build", [wordpiece, bytes_bpe, unigram])
def test_the_corpus_is_cut_into_the_same_tokens(build, tmp_path):
    old = build()
    new, kept = trim_vocabulary(old, CORPUS)
    assert len(new) == len(kept) < len(old)
    assert [new.convert_ids_to_tokens(i) for i in range(len(kept))] == old.convert_ids_to_tokens(kept)
    new.save_pretrained(tmp_path)
    loaded = tf.AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        ids = old(text)["input_ids"]
        for tokenizer in (new, loaded):
            own = tokenizer(text)["input_ids"]
            assert [kept[i] for i in own] == ids
            assert tokenizer.decode(own) == old.decode(ids)
    assert new.special_tokens_map == old.special_tokens_map
    assert new.model_max_length == old.model_max_length
    other = new("zebra 42")["input_ids"]
    assert new.unk_token is None or new.unk_token_id not in other or build is not bytes_bpe


def test_bpe_without_the_inner_merges_would_cut_otherwise():
    """Counter-example: the tokens alone are not enough, BPE reaches them through tokens it does not give."""
    import json

    old = bytes_bpe()
    used = {token for text in CORPUS for token in old.tokenize(text)}
    state = json.loads(old.backend_tokenizer.to_str())
    there = used | set(pre_tokenizers.ByteLevel.alphabet())
    state["model"]["merges"] = [m for m in state["model"]["merges"] if {*m, "".join(m)} <= there]
    naive = Tokenizer.from_str(json.dumps(state))
    assert any(naive.encode(text).tokens != old.backend_tokenizer.encode(text).tokens for text in CORPUS)


def gpt2(tokenizer):
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=len(tokenizer) + 3, n_embd=16, n_head=2, n_layer=2, n_positions=64, bos_token_id=0,
        eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config).eval()


def test_student_predicts_the_kept_tokens_as_the_teacher_does(tmp_path):
    """Tied heads, ids of special tokens and the generation config follow; the map stays in the config."""
    old = bytes_bpe()
    new, kept = trim_vocabulary(old, CORPUS)
    teacher = gpt2(old)
    student = init_student(teacher, vocab=kept)
    assert student.config.vocab_size == len(kept) and student.config.hf_kd_vocabulary == kept
    assert student.lm_head.weight is student.transformer.wte.weight
    assert student.generation_config.eos_token_id == new.eos_token_id
    with torch.no_grad():
        ours = student(torch.tensor([new(CORPUS[0])["input_ids"]])).logits
        theirs = teacher(torch.tensor([old(CORPUS[0])["input_ids"]])).logits
    torch.testing.assert_close(ours, theirs[..., kept])
    student.save_pretrained(tmp_path)
    assert tf.AutoConfig.from_pretrained(tmp_path).hf_kd_vocabulary == kept
    for vocab, message in (([1, 1], "each once"), ([9999], "each once"), ([0, 5], "eos_token_id")):
        with pytest.raises(ValueError, match=message):
            init_student(teacher, vocab=vocab)


def arguments(path, **options):
    return DistillationArguments(
        output_dir=str(path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", **{"alpha": 1.0, "temperature": 1.0, **options},
    )  # fmt: skip


def rows_of(tokenizer, labels=True):
    rows = [tokenizer(text)["input_ids"][:7] for text in CORPUS]
    rows = [row + [tokenizer.pad_token_id] * (7 - len(row)) for row in rows]
    return Dataset.from_list([{"input_ids": row, **({"labels": row} if labels else {})} for row in rows])


def test_distilling_a_trimmed_student_from_the_whole_teacher(tmp_path, caplog):
    """Trap 30: the teacher reads its own ids, is compared on kept tokens, and dropped mass is logged."""
    old = bytes_bpe()
    new, kept = trim_vocabulary(old, CORPUS)
    teacher = gpt2(old)
    student = init_student(teacher, vocab=kept)
    trainer = DistillationTrainer(
        student, arguments(tmp_path, fused="auto"), teacher=teacher, teacher_processing_class=old,
        train_dataset=rows_of(new), eval_dataset=rows_of(new), processing_class=new,
    )  # fmt: skip
    scores = trainer.evaluate()
    assert abs(scores["eval_kl"]) < 1e-6 and scores["eval_agreement"] == 1.0
    ids = torch.tensor([old(text)["input_ids"][:7] for text in CORPUS[:1]])
    inputs = trainer.teacher.inputs({"input_ids": torch.tensor(rows_of(new)["input_ids"][:1])})
    assert torch.equal(inputs["input_ids"], ids)
    mass = []
    with torch.no_grad():
        for row in rows_of(new)["input_ids"]:
            full = teacher(torch.tensor([[kept[i] for i in row]])).logits[0, :-1]
            mass.append(1 - full.softmax(-1)[:, kept].sum(-1))
    assert scores["eval_teacher_mass_dropped"] == pytest.approx(float(torch.cat(mass).mean()), rel=1e-4)
    trainer.train()
    trainer.save_model()
    assert "hf_kd" not in (tmp_path / "config.json").read_text()


def test_a_classifier_with_a_trimmed_vocabulary(tmp_path):
    """Heads without a vocabulary too: the student's ids are turned into the teacher's."""
    old = wordpiece()
    new, kept = trim_vocabulary(old, CORPUS)
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(old), hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2,
        max_position_embeddings=64, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    teacher = tf.BertForSequenceClassification(config).eval()
    student = init_student(teacher, vocab=kept)
    rows = rows_of(new, labels=False).add_column("labels", [0, 1, 2])
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, teacher_processing_class=old, train_dataset=rows,
        eval_dataset=rows, processing_class=new,
    )  # fmt: skip
    assert abs(trainer.evaluate()["eval_kl"]) < 1e-6
    with pytest.raises(ValueError, match="hf_kd_vocabulary"):
        DistillationTrainer(
            init_student(teacher, vocab=[*kept[:-2], kept[-1], kept[-2]]), arguments(tmp_path),
            teacher=teacher, teacher_processing_class=old, eval_dataset=rows, processing_class=new,
        ).evaluate()  # fmt: skip
