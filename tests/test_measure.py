"""What a model costs: parameters, bytes, latency."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_kd import measure
from hf_kd.measure import count_parameters, latency, machine, measure_arm, model_bytes, saved_bytes

TINY = {
    **{"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 32, "max_position_embeddings": 32},
}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))


def bert(**changes):
    return BertForSequenceClassification(BertConfig(**{**TINY, **changes}))


def tokens(rows=4, length=8):
    ids = torch.randint(0, 50, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows).long()}


def test_tied_weights_count_once():
    """Trap 50: a tied embedding is one weight, in numbers and in bytes."""
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == 50 * 16
    assert model_bytes(untied) - model_bytes(tied) == 50 * 16 * 4
    assert count_parameters(tied) < sum(tensor.numel() for tensor in tied.state_dict().values())


def test_masked_lm_with_a_tied_decoder_and_bias_counts_once():
    """Trap 50: BERT ties the decoder's weight and its bias."""
    model = BertForMaskedLM(BertConfig(**TINY))
    assert count_parameters(model) == sum(parameter.numel() for parameter in set(model.parameters()))
    bias_and_weight = 50 + 50 * 16
    total = sum(parameter.numel() for _, parameter in model.named_parameters(remove_duplicate=False))
    assert count_parameters(model) == total - bias_and_weight


def test_sharing_is_seen_through_memory_and_views():
    """Trap 50: two Parameter objects over one memory are one weight."""
    model = nn.ModuleList(
        [nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False), nn.Linear(5, 3, bias=False)]
    )
    assert count_parameters(model) == 45
    model[1].weight.data = model[0].weight.data
    model[2].weight.data = model[0].weight.data.T
    assert count_parameters(model) == 15
    assert model_bytes(model) == 60


def test_slices_of_one_memory_count_separately():
    flat = torch.zeros(12)
    model = nn.ParameterList([nn.Parameter(flat[:4]), nn.Parameter(flat[4:])])
    assert count_parameters(model) == 12
    assert model_bytes(model) == 48


def test_buffers_are_bytes_but_not_parameters():
    model = nn.BatchNorm1d(4)
    assert count_parameters(model) == 8
    assert model_bytes(model) == 4 * 8 + 4 * 8 + 8


def test_bytes_follow_the_dtype():
    model = nn.Linear(4, 4)
    assert model_bytes(model.to(torch.bfloat16)) == 2 * 20
    assert count_parameters(model) == 20


def test_models_without_memory_are_counted():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert count_parameters(model) == 40


def test_saved_bytes_are_those_of_the_weights(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)
    (tmp_path / "optimizer.pt").write_bytes(b"x" * 1000)
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert saved_bytes(tmp_path) == (tmp_path / "model.safetensors").stat().st_size
    assert 0 <= saved_bytes(tmp_path) - 4 * count_parameters(model) < 10_000


def test_saved_bytes_add_up_shards_and_name_a_missing_one(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert saved_bytes(tmp_path) == sum(shard.stat().st_size for shard in shards)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        saved_bytes(tmp_path)


def test_saved_bytes_of_nothing_is_an_error_and_not_zero(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights in"):
        saved_bytes(tmp_path)


class Probe(nn.Module):
    """Records what it is called with, and in which order among its peers."""

    def __init__(self, name, calls, dtype=torch.float32):
        super().__init__()
        self.name, self.calls = name, calls
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, pixel_values, attention_mask=None):
        self.calls.append((self.name, pixel_values, self.training, torch.is_grad_enabled()))
        return {"logits": pixel_values * self.weight}


def test_latency_gives_all_models_the_same_inputs_in_turns():
    """Trap 50: same inputs, after a warm-up, in eval mode and without gradient, taking turns."""
    calls = []
    models = {name: Probe(name, calls) for name in ("teacher", "student", "control")}
    pixels = torch.rand(6, 3)
    times = latency(models, {"pixel_values": pixels, "labels": torch.zeros(6)}, repeats=6, warmup=3)
    assert all(torch.equal(seen, pixels) and not training and not grad for _, seen, training, grad in calls)
    names = [name for name, *_ in calls]
    rounds = [names[i : i + 3] for i in range(0, len(names), 3)]
    assert len(rounds) == 9
    assert all(sorted(turn) == ["control", "student", "teacher"] for turn in rounds)
    assert {turn[0] for turn in rounds[3:]} == set(models)
    assert all(model.training for model in models.values())
    one = times["student"]
    assert (one.repeats, one.batch_size, one.inputs) == (6, 6, {"pixel_values": [6, 3]})
    assert (one.device, one.dtype, one.threads) == ("cpu", "float32", torch.get_num_threads())


def test_latency_leaves_the_warm_up_out_and_waits_for_the_device(monkeypatch):
    """Trap 50: the clock starts and stops on an idle device, and the first slow passes do not count."""
    now, waits = [0.0], []
    pending = [0.0]

    class Queued(nn.Linear):
        """Returns at once; its work is done when someone waits for the device."""

        count = 0

        def forward(self, x):
            Queued.count += 1
            pending[0] += 1.0 if Queued.count <= 2 else 0.01
            return super().forward(x)

    def synchronize(device):
        waits.append(device)
        now[0], pending[0] = now[0] + pending[0], 0.0

    monkeypatch.setattr(measure, "_synchronize", synchronize)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    times = latency({"model": Queued(3, 3)}, torch.rand(2, 3), repeats=5, warmup=2)["model"]
    assert times.median_ms == pytest.approx(10.0)
    assert times.p95_ms == pytest.approx(10.0)
    assert times.iqr_ms == pytest.approx(0.0, abs=1e-6)
    assert len(waits) == 2 * 7


def test_the_median_and_its_spread_survive_an_outlier(monkeypatch):
    durations = iter([0.001] + [0.001, 0.002, 0.003, 0.004, 9.0])
    monkeypatch.setattr(measure, "_timed", lambda *_: next(durations))
    times = latency({"model": nn.Linear(3, 3)}, torch.rand(2, 3), repeats=5, warmup=1)["model"]
    assert times.median_ms == pytest.approx(3.0)
    assert times.iqr_ms == pytest.approx(2.0)
    assert times.p95_ms > 1000


def test_latency_of_real_models_leaves_them_as_they_were():
    """Trap 22: a base that teacher and student share keeps each module's own mode."""
    teacher, student = llama(num_hidden_layers=2), llama()
    student.model.embed_tokens = teacher.model.embed_tokens
    teacher.eval()
    student.train()
    teacher.model.layers[1].train()
    before = [module.training for model in (teacher, student) for module in model.modules()]
    times = latency({"teacher": teacher, "student": student}, tokens(), repeats=5, warmup=1)
    assert before == [module.training for model in (teacher, student) for module in model.modules()]
    assert all(time.median_ms > 0 and time.p95_ms >= time.median_ms for time in times.values())
    assert times["teacher"].inputs == {"input_ids": [4, 8], "attention_mask": [4, 8]}
    student(**tokens(), logits_to_keep=1).logits.sum().backward()


def test_each_model_gets_only_the_inputs_that_it_takes():
    """Trap 20: an input that one of the two does not know neither fails nor is withheld from the other."""
    seen = {}

    class Narrow(nn.Module):
        def forward(self, input_ids):
            seen["narrow"] = {"input_ids"}

    class Wide(nn.Module):
        def forward(self, input_ids, token_type_ids=None, **kwargs):
            seen["wide"] = {"input_ids", "token_type_ids", *kwargs}

    batch = {**tokens(), "token_type_ids": torch.zeros(4, 8).long()}
    latency({"narrow": Narrow(), "wide": Wide()}, batch, repeats=5, warmup=1)
    assert seen["wide"] == {"input_ids", "token_type_ids", "attention_mask"}


def test_inputs_take_the_dtype_of_the_model():
    calls = []
    models = {"half": Probe("half", calls, torch.bfloat16), "full": Probe("full", calls)}
    times = latency(models, {"pixel_values": torch.rand(2, 3)}, repeats=5, warmup=1)
    assert {seen.dtype for name, seen, *_ in calls if name == "half"} == {torch.bfloat16}
    assert (times["half"].dtype, times["full"].dtype) == ("bfloat16", "float32")


def test_padding_is_recorded_and_warned_about(caplog):
    """Trap 50: a padding-heavy batch is not what the model will meet."""
    batch = tokens()
    batch["attention_mask"][:, 4:] = 0
    with caplog.at_level(logging.WARNING):
        assert latency({"student": bert()}, batch, repeats=5, warmup=1)["student"].padding == 0.5
    assert "50 % is padding" in caplog.text


def test_latency_errors_name_what_is_wrong():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="repeats is 1 and warmup 0"):
        latency({"student": model}, torch.rand(2, 3), repeats=1, warmup=0)
    with pytest.raises(ValueError, match=r"no input tensors, only \['labels'\]"):
        latency({"student": model}, {"labels": torch.zeros(3)})
    with pytest.raises(ValueError, match="teacher on meta, student on cpu"):
        latency({"teacher": nn.Linear(3, 3, device="meta"), "student": model}, torch.rand(2, 3))
    with pytest.raises(RuntimeError, match="the model called 'student' fails on the batch"):
        latency({"student": model}, torch.rand(2, 4))
    assert model.training


def test_an_arm_takes_what_evaluate_returned(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    evaluation = {
        **{"eval_loss": 0.5, "eval_kl": 0.01, "eval_agreement": 0.99, "eval_accuracy": np.float32(0.75)},
        **{"eval_runtime": 3.0, "eval_samples_per_second": 9.0, "epoch": 1.0, "eval_per_class": [0.5, 1.0]},
    }
    arm = measure_arm(model, evaluation, folder=tmp_path)
    assert arm.metrics == {"loss": 0.5, "accuracy": 0.75}
    assert (arm.eval_kl, arm.eval_agreement) == (0.01, 0.99)
    assert arm.parameters == count_parameters(model)
    assert arm.bytes_on_disk == saved_bytes(tmp_path)
    assert measure_arm(model, {"test_kl": 0.2}, prefix="test_").eval_kl == 0.2


def test_machine_names_the_hardware_and_not_the_machine():
    said = machine()
    assert said["cores"] >= 1
    assert said["cpu"] and said["device"]
    assert said["threads"] == torch.get_num_threads()
    assert said["versions"]["torch"] == torch.__version__
    assert set(said) == {"cpu", "cores", "threads", "device", "system", "versions"}
    assert machine("cpu")["device"] == "cpu"
    json.dumps(said)
