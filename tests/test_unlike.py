"""A teacher with another tokenizer: positions after the same text are compared, by sorted probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_kd import DistillationTrainer
from hf_kd.data.unlike import UnlikeCollator, encode_texts
from hf_kd.tasks import resolve_task
from hf_kd.tasks.text import counterparts

from .test_gradient import Gradients, assert_same
from .test_trainer import arguments

TEXTS = ["the cat sat", "a cat, the end", "sat", "thé cat"]


def tokenizer(merges: list[tuple[str, str]], *, side: str = "right") -> PreTrainedTokenizerFast:
    """A byte-level BPE with some merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", *letters, *("".join(pair) for pair in merges)]
    bpe = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", padding_side=side)


STUDENT = tokenizer([("t", "h"), ("th", "e")])
TEACHER = tokenizer([("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("a", "t"), ("s", "at")], side="left")


def llama(vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).double()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return model


def rows() -> Dataset:
    return Dataset.from_dict(encode_texts(TEXTS, STUDENT, TEACHER, max_length=32))


def trainer(folder: Path, data: Any, gradients: Gradients, **options: Any) -> DistillationTrainer:
    options = {"divergence": "uld", "learning_rate": 0.0, "max_grad_norm": 0.0, "alpha": 0.4, **options}
    return DistillationTrainer(
        llama(len(STUDENT), 1),
        arguments(folder, **{"max_steps": 1, "per_device_train_batch_size": 4, **options}),
        teacher=llama(len(TEACHER), 0),
        train_dataset=data,
        eval_dataset=data,
        processing_class=STUDENT,
        teacher_processing_class=TEACHER,
        data_collator=UnlikeCollator(STUDENT, TEACHER),
        callbacks=[gradients],
    )


def oracle(student: LlamaForCausalLM, teacher: LlamaForCausalLM, alpha: float, temperature: float) -> Any:
    """Text by text, each alone: the prefixes of the text that both tokenizers can make."""
    task, kd = [], []
    for text in TEXTS:
        logits, ends = [], []
        for own, model in ((STUDENT, student), (TEACHER, teacher)):
            ids = own(text)["input_ids"]
            logits.append(model(torch.tensor([ids])).logits[0])
            ends.append({own.decode(ids[: i + 1]): i for i in range(len(ids))})
            if model is student:
                log_q = logits[0].log_softmax(-1)
                task += [-log_q[i, ids[i + 1]] for i in range(len(ids) - 1)]
        last = len(STUDENT(text)["input_ids"]) - 1
        for prefix in ends[0].keys() & ends[1].keys():
            if "\ufffd" in prefix or ends[0][prefix] == last:
                continue
            q = (logits[0][ends[0][prefix]] / temperature).softmax(-1).sort(descending=True)[0]
            p = (logits[1][ends[1][prefix]] / temperature).softmax(-1).sort(descending=True)[0].detach()
            width = min(len(q), len(p))
            gap = (q[:width] - p[:width]).abs().sum() + q[width:].sum() + p[width:].sum()
            kd.append(temperature**2 * gap)
    loss = (1 - alpha) * torch.stack(task).mean() + alpha * torch.stack(kd).mean()
    grads = torch.autograd.grad(loss, list(student.parameters()))
    return loss.detach(), {n: g for (n, _), g in zip(student.named_parameters(), grads, strict=True)}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_step_equals_oracle(tmp_path: Path, accumulation: int) -> None:
    """Traps 15, 31: positions that have read the same text, padding on either side, any micro-batch."""
    gradients = Gradients()
    run = trainer(
        tmp_path,
        rows(),
        gradients,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation,
        logging_steps=1,
    )
    run.train()
    loss, grads = oracle(run.student, run.teacher.model, 0.4, 2.0)  # type: ignore[arg-type,union-attr]
    assert run.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_same(gradients.grads, grads)


def test_evaluation_has_a_distance_and_no_kl(tmp_path: Path) -> None:
    """Classes that don't correspond have no KL and no agreement."""
    found = trainer(tmp_path, rows(), Gradients()).evaluate()
    assert 0 < found["eval_distance"] <= 2
    assert "eval_kl" not in found and "eval_agreement" not in found


def test_positions_by_number_are_wrong() -> None:
    """Trap 31, counter-example: pairing positions by their number compares what follows unlike texts."""
    batch = UnlikeCollator(STUDENT, TEACHER)([rows()[i] for i in range(4)])
    where = counterparts(batch)
    assert where is not None
    for row, text in enumerate(TEXTS):
        for i in range(where.shape[1]):
            if where[row, i] < 0:
                continue
            read = [
                own.decode(batch[f"{prefix}input_ids"][row][: n + 1], skip_special_tokens=True)
                for own, prefix, n in ((STUDENT, "", i), (TEACHER, "teacher_", int(where[row, i])))
            ]
            assert read[0] == read[1] and text.startswith(read[0])
    row = TEXTS.index("the cat sat")
    first = [own.decode(own(TEXTS[row])["input_ids"][:3]) for own in (STUDENT, TEACHER)]
    assert first[0] != first[1]


def test_bytes_of_one_character_count_once() -> None:
    """Of several tokens that end at one place, the last has read the text."""
    ends = {"text_ends": torch.tensor([[1, 2, 2, 3, -1]]), "teacher_text_ends": torch.tensor([[-1, 2, 2, 3]])}
    found = counterparts(ends)
    assert found is not None and found.tolist() == [[-1, -1, 2, 3, -1]]
    assert counterparts({"text_ends": ends["text_ends"]}) is None


def test_missing_columns_are_named(tmp_path: Path) -> None:
    """Trap 31: without text ends nobody knows which positions correspond, and that is refused."""
    plain = rows().remove_columns(["text_ends", "teacher_text_ends"])
    run = trainer(tmp_path, plain, Gradients())
    run.data_collator = UnlikeCollator.__mro__[1](STUDENT, TEACHER)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"text_ends, teacher_text_ends are missing"):
        run.train()


@pytest.mark.parametrize("divergence", ["auto", "forward_kl", "dkd"])
def test_other_divergences_are_refused(tmp_path: Path, divergence: str) -> None:
    """Trap 31: a divergence of classes needs one tokenizer; the message names the first unlike token."""
    run = trainer(tmp_path, rows(), Gradients(), divergence=divergence)
    with pytest.raises(ValueError, match=r"token id \d+ is .*divergence='uld'"):
        run.train()


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="teacher_tokenizer: Slow doesn't say where"):
        encode_texts(["a"], STUDENT, Slow(), max_length=4)


def test_special_tokens_are_nowhere(tmp_path: Path) -> None:
    """Special tokens have no text, so nothing is compared there."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat"]))
    words = BertTokenizer(str(tmp_path / "vocab.txt"))
    made = encode_texts(["a cat"], words, STUDENT, max_length=8)
    assert made["text_ends"] == [[-1, 1, 5, -1]]
    assert made["teacher_text_ends"] == [[1, 2, 3, 4, 5]]
    assert resolve_task("causal-lm", llama(9, 0)).teacher_positions(torch.ones(2, 3), {}).shape == (2, 3)
