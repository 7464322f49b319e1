"""Trimmed vocabularies: the corpus in the same tokens, the same answers, a teacher that is asked right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hf_kd.alignment import ClassMap
from hf_kd.config import DistillationArguments
from hf_kd.students import init_student, trim_vocabulary
from hf_kd.teachers import ModelTeacher, TeacherSignal
from hf_kd.teachers.cache import CachedTeacher, CacheWriter, threshold_sample
from hf_kd.teachers.cache.make import CacheSettings, describe, fill, save_head
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


class Trimmed:
    """A teacher of a whole vocabulary, a noisy student of a part, and rows."""

    def __init__(self, seed=0):
        self.old = bytes_bpe()
        self.new, self.kept = trim_vocabulary(self.old, CORPUS)
        self.teacher = gpt2(self.old)
        self.student = init_student(self.teacher, vocab=self.kept, num_layers=1)
        torch.manual_seed(seed)
        with torch.no_grad():
            for model in (self.teacher, self.student):
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))

    def trainer(self, path, *, teacher=None, **options):
        rows = rows_of(self.new)
        return DistillationTrainer(
            self.student, arguments(path, **options), teacher=teacher or self.teacher,
            teacher_processing_class=self.old, train_dataset=rows, eval_dataset=rows,
            processing_class=self.new,
        )  # fmt: skip

    def gradient(self, trainer):
        """Loss and gradient of one batch, and the evaluation."""
        batch = next(iter(trainer.get_train_dataloader()))
        self.student.zero_grad()
        trainer.student.eval()
        loss = trainer.compute_loss(trainer.student, batch)
        loss.backward()
        return float(loss.detach()), {n: p.grad.double() for n, p in self.student.named_parameters()}, batch

    def oracle(self, batch, alpha, temperature):
        """The same in float64, from whole logits of both models."""
        student, teacher = self.student.double(), self.teacher.double()
        student.zero_grad()
        kept, labels = torch.tensor(self.kept), batch["labels"][:, 1:]
        z = student(batch["input_ids"]).logits[:, :-1]
        with torch.no_grad():
            t = teacher(kept[batch["input_ids"]]).logits[:, :-1][..., kept]
        mask = labels != -100
        log_q, log_p = ((x[mask] / temperature).log_softmax(-1) for x in (z, t))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        task = torch.nn.functional.cross_entropy(z[mask], labels[mask])
        loss = (1 - alpha) * task + alpha * temperature**2 * kl
        loss.backward()
        grads = {n: p.grad.clone() for n, p in student.named_parameters()}
        student.float(), teacher.float()
        return float(loss.detach()), grads


@pytest.mark.parametrize("fused", ["on", "off"])
def test_fused_and_dense_equal_the_oracle(fused, tmp_path):
    """Trap 30: value, gradient and evaluation are those of whole logits in float64, restricted."""
    pair = Trimmed()
    trainer = pair.trainer(tmp_path, fused=fused, alpha=0.6, temperature=2.0)
    loss, grads, batch = pair.gradient(trainer)
    scores = trainer.evaluate()
    wanted, exact = pair.oracle(batch, 0.6, 2.0)
    assert loss == pytest.approx(wanted, rel=1e-5)
    for name, gradient in exact.items():
        assert (grads[name] - gradient).norm() <= 1e-4 * gradient.norm().clamp_min(1e-6), name
    ids = torch.tensor(rows_of(pair.new)["input_ids"])
    kept = torch.tensor(pair.kept)
    with torch.no_grad():
        p = pair.teacher.double()(kept[ids]).logits[:, :-1].softmax(-1)
        log_q = pair.student.double()(ids).logits[:, :-1].log_softmax(-1)
    labels = ids[:, 1:]
    counted = labels != -100
    dropped = 1 - p[..., kept].sum(-1)
    q = p[..., kept] / p[..., kept].sum(-1, keepdim=True)
    kl = (q * (q.log() - log_q)).sum(-1)
    assert scores["eval_kl"] == pytest.approx(float(kl[counted].mean()), rel=1e-4)
    assert scores["eval_teacher_mass_dropped"] == pytest.approx(float(dropped[counted].mean()), rel=1e-4)


@pytest.mark.parametrize("fidelity", ["hidden", "logits", "sparse"])
def test_a_cache_of_the_whole_teacher(fidelity, tmp_path):
    """Rows are found by the teacher's ids, so one cache is for every student."""
    pair = Trimmed()
    live = pair.trainer(tmp_path / "live", fused="off")
    scores = live.evaluate()
    folder = tmp_path / "cache"
    folder.mkdir()
    rows = torch.tensor([[pair.kept[i] for i in row] for row in rows_of(pair.new)["input_ids"]])
    whole = type(live.teacher)(gpt2(pair.old), ("logits",))
    whole.model.load_state_dict(pair.teacher.state_dict())
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    settings = CacheSettings(fidelity, dtype=None if fidelity == "sparse" else "float32", entries=12)
    manifest, head = describe(whole, batch, settings, processor=pair.old)
    if head is not None:
        manifest = replace(manifest, head=save_head(head, folder))
    manifest.write(folder)
    fill(CacheWriter(folder, manifest), whole, [batch])
    again = CacheWriter(folder, manifest)  # a trimmed run that writes finds that all is there
    own = {
        "input_ids": torch.tensor(rows_of(pair.new)["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }
    fill(again, live.teacher, [own])
    assert CachedTeacher(folder).rows == len(rows)
    rows = rows_of(pair.new).add_column("attention_mask", [[1] * 7] * 3)

    def cached(fused, **options):
        trainer = DistillationTrainer(
            pair.student, arguments(tmp_path / fused, fused=fused, teacher_cache=str(folder), **options),
            teacher_processing_class=pair.old, train_dataset=rows, eval_dataset=rows,
            processing_class=pair.new,
        )  # fmt: skip
        return trainer.evaluate()

    if fidelity == "sparse":
        with pytest.raises(ValueError, match="tail of its sparse signal, which does not say how much"):
            cached("on", sparse_estimator="tail")
        found = cached("on", sparse_estimator="draws")
        assert 0 < found["eval_teacher_mass_dropped"] < 1
        return
    for fused in ("on", "off"):
        found = cached(fused)
        for name in ("eval_kl", "eval_agreement", "eval_teacher_mass_dropped"):
            assert found[name] == pytest.approx(scores[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("estimator", ["tail", "draws"])
def test_all_entries_of_a_sparse_teacher_equal_the_oracle(estimator, fused, tmp_path, monkeypatch):
    """Trap 30: with all entries, value, gradient and dropped mass are those of whole logits."""
    pair = Trimmed()
    ids = torch.tensor(rows_of(pair.new)["input_ids"])
    batch = {"input_ids": torch.tensor(pair.kept)[ids], "attention_mask": torch.ones_like(ids)}
    whole = ModelTeacher(pair.teacher, ("logits",))
    settings = CacheSettings("sparse", entries=12, temperature=2.0)
    manifest, _ = describe(whole, batch, settings, processor=pair.old)
    folder = tmp_path / "cache"
    folder.mkdir()
    manifest.write(folder)
    fill(CacheWriter(folder, manifest), whole, [batch])

    def every_class(cache, batch):
        assert cache.tokens is not None
        with torch.no_grad():
            logits = pair.teacher(cache.tokens[batch["input_ids"]]).logits
        signal = threshold_sample(logits.flatten(0, 1), logits.shape[-1], temperature=2.0)
        return TeacherSignal(sparse=signal.map(lambda x: x.unflatten(0, logits.shape[:2])))

    monkeypatch.setattr(CachedTeacher, "__call__", every_class)
    rows = rows_of(pair.new).add_column("attention_mask", [[1] * 7] * 3)
    options = {"alpha": 0.6, "temperature": 2.0, "sparse_estimator": estimator, "teacher_cache": str(folder)}
    trainer = DistillationTrainer(
        pair.student, arguments(tmp_path, fused=fused, **options), teacher_processing_class=pair.old,
        train_dataset=rows, eval_dataset=rows, processing_class=pair.new,
    )  # fmt: skip
    loss, grads, seen = pair.gradient(trainer)
    wanted, exact = pair.oracle(seen, 0.6, 2.0)
    assert loss == pytest.approx(wanted, rel=1e-5)
    for name, gradient in exact.items():
        assert (grads[name] - gradient).norm() <= 1e-4 * gradient.norm().clamp_min(1e-6), name
    with torch.no_grad():
        p = (pair.teacher(batch["input_ids"]).logits[:, :-1] / 2).softmax(-1)
    dropped = 1 - p[..., pair.kept].sum(-1).mean()
    assert trainer.evaluate()["eval_teacher_mass_dropped"] == pytest.approx(float(dropped), rel=1e-4)


def test_draws_show_the_mass_that_is_dropped():
    """Trap 12: the means of draws are the restricted distribution and the dropped mass."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 60, generator=g).expand(4000, -1)
    kept = tuple(torch.randperm(60, generator=g)[:40].tolist())
    classes = ClassMap(order=kept, kept=True)
    drawn = threshold_sample(logits, 24, least_certain=8, generator=g).draws()
    before = drawn.ids.clone()
    entries = classes.entries(drawn)
    assert torch.equal(drawn.ids, before) and int(entries.ids.max()) < 40
    p = logits[0].double().softmax(-1)[list(kept)]
    assert float(classes.dropped(drawn).mean()) == pytest.approx(1 - float(p.sum()), abs=0.005)
    mean = torch.zeros(4000, 41).double()
    mean.scatter_add_(1, entries.ids.long() + 1, entries.weights.double())
    torch.testing.assert_close(mean.mean(0)[1:], p / p.sum(), rtol=0.1, atol=1e-3)
    torch.testing.assert_close(mean.sum(1), torch.ones(4000).double(), rtol=0.3, atol=0)


def test_a_trimmed_student_that_averages_itself(tmp_path):
    """An average of the student has its vocabulary, reads its ids, and is not mapped; the map is kept."""
    pair = Trimmed()
    rows = rows_of(pair.new)
    trainer = DistillationTrainer(
        pair.student, arguments(tmp_path, self_teacher="ema", ema_decay=0.5, learning_rate=0.01),
        train_dataset=rows, eval_dataset=rows, processing_class=pair.new,
    )  # fmt: skip
    trainer.train()
    scores = trainer.evaluate()
    ids = torch.tensor(rows["input_ids"])
    assert trainer.teacher.model.config.vocab_size == len(pair.kept)
    assert torch.equal(trainer.teacher.inputs({"input_ids": ids})["input_ids"], ids)
    with torch.no_grad():
        p, q = (m.eval()(ids).logits[:, :-1].log_softmax(-1) for m in (trainer.teacher.model, pair.student))
    kl = (p.exp() * (p - q)).sum(-1)
    assert scores["eval_kl"] == pytest.approx(float(kl.mean()), rel=1e-3) and scores["eval_kl"] > 1e-6
    assert pair.student.config.hf_kd_vocabulary == pair.kept


def test_several_teachers_itself_and_others(tmp_path):
    """An ensemble is asked in the teachers' ids, a student that teaches itself in its own; others refuse."""
    pair = Trimmed()
    other = gpt2(pair.old)
    both = pair.trainer(tmp_path, teacher=[pair.teacher, other], fused="on")
    scores = both.evaluate()
    ids = torch.tensor(rows_of(pair.new)["input_ids"])
    kept = torch.tensor(pair.kept)
    with torch.no_grad():
        parts = [m(kept[ids]).logits[:, :-1][..., kept].softmax(-1) for m in (pair.teacher, other)]
        log_q = pair.student(ids).logits[:, :-1].log_softmax(-1)
    p = sum(parts) / 2
    assert scores["eval_kl"] == pytest.approx(float((p * (p.log() - log_q)).sum(-1).mean()), rel=1e-4)
    rows = rows_of(pair.new)
    options = {"train_dataset": rows, "eval_dataset": rows, "processing_class": pair.new}
    itself = DistillationTrainer(pair.student, arguments(tmp_path, self_teacher="frozen"), **options)
    assert abs(itself.evaluate()["eval_kl"]) < 1e-6

    class Silent:
        columns, identity = ("input_ids",), {"name": "silent"}

        def __call__(self, batch):
            raise ValueError("asked in ids that are not its own")

    with pytest.raises(ValueError, match="a Silent can't be asked in the teacher's own ids"):
        DistillationTrainer(pair.student, arguments(tmp_path), teacher=Silent(), **options).evaluate()
