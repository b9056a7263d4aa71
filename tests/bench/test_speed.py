"""The stopwatch times what it says it times, and leaves the caches as it found them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import CompileConfig, GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.bench import speed
from context_pythia.bench.speed import FilledCache, Subject, interleave, measure_cell, measure_conversation, turns
from context_pythia.evaluation.memory import peak_during, weight_bytes
from context_pythia.model.cache import cache_bytes

BODY = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
CONTEXTS = {
    "input": {"context_source": "input", "context_dim": 12},
    "shared": {"context_source": "shared", "context_dim": 12},
    "layer": {"context_source": "layer", "context_dim": 12},
    "layer x2": {"context_source": "layer", "context_dim": 12, "context_sharing": 2},
    "exact": {"context_source": "layer", "context_dim": 32, "num_rotary_keys": 2, "reuse_rotary_keys": True},
}


def subject(name: str) -> Subject:
    torch.manual_seed(0)
    if name in CONTEXTS:
        return Subject(name, ContextPythiaForCausalLM(ContextPythiaConfig(**BODY, **CONTEXTS[name])).eval())
    if name == "int4":
        pytest.importorskip("hqq")
    return Subject(name, GPTNeoXForCausalLM(GPTNeoXConfig(**BODY)).eval(), name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dynamic", "static", "int4", *CONTEXTS])
def test_a_filled_cache_is_the_same_after_every_decoding(name):
    one = subject(name)
    filled = FilledCache(one, batch_size=3, tokens=20, length=24)

    def decode(steps: int) -> torch.Tensor:
        cache, logits = filled.restored(), []
        assert int(cache.get_seq_length()) == 20
        for i in range(steps):
            ids = torch.tensor([[i + 1], [i + 2], [i + 3]])
            logits.append(one.model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
        return torch.cat(logits, dim=1)

    first = decode(4)
    assert first.std() > 0.1 and not torch.equal(first[0], first[1])
    decode(2)
    # The exact numbers: a token too many or an old one too few moves them all.
    assert torch.equal(decode(4), first)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dynamic", "static", *CONTEXTS])
def test_a_filled_cache_has_the_bytes_of_a_real_one(name):
    one = subject(name)
    filled = one.measure(FilledCache(one, batch_size=2, tokens=20, length=20).restored())
    assert filled.length == 20
    assert filled.filled == cache_bytes(one.model.config, 20, 2)
    assert measure_conversation(one, 20).filled == cache_bytes(one.model.config, 20)


def test_runs_take_turns_and_leave_them_when_they_fail_or_took_long():
    calls = []

    def run(name: str, seconds: float) -> float:
        calls.append(name)
        if name == "broken" and len(calls) > 3:
            raise RuntimeError("out of memory\nat line 3")
        return seconds

    ticks = []
    runs = {name: partial(run, name, s) for name, s in (("a", 1.0), ("slow", 5.0), ("broken", 1.0))}
    seconds, errors = interleave(runs, 4, budget=8, done=lambda: ticks.append(1))
    assert calls == ["a", "slow", "broken", "a", "slow", "broken", "a", "a"]
    assert seconds == {"a": [1.0] * 4, "slow": [5.0] * 2, "broken": [1.0]}
    assert errors == {"broken": "out of memory"}
    assert len(ticks) == 12


def test_a_cell_times_the_prefill_of_all_tokens_and_the_decoding_of_the_last(monkeypatch):
    one = subject("layer")
    seen, timed = [], []
    one.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(
            (kwargs["input_ids"].shape[1], int(kwargs["past_key_values"].get_seq_length()))
        ),
        with_kwargs=True,
    )

    def seconds_of(run, device):
        seen.clear()
        run()
        timed.append(list(seen))
        return 8.0

    monkeypatch.setattr(speed, "seconds_of", seconds_of)
    ticks = []
    (row,) = measure_cell([one], 2, 16, new_tokens=4, rounds=2, done=lambda: ticks.append(1))
    steps = [(1, 12), (1, 13), (1, 14), (1, 15)]
    assert timed == [[(16, 0)]] * 2 + [steps] * 4  # twice forward, twice generate()
    assert (row.prefill, row.decode, row.generate) == ([8.0] * 2, [2.0] * 2, [2.0] * 2)
    assert row.cache.length == 16 and row.cache.filled == cache_bytes(one.model.config, 16, 2)
    assert row.error is None
    assert len(ticks) == turns(2)


def test_without_prefill_no_cell_reads_its_tokens():
    one = subject("shared")
    lengths = []
    one.model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ticks = []
    (row,) = measure_cell([one], 2, 16, new_tokens=4, rounds=2, prefill=False, done=lambda: ticks.append(1))
    assert set(lengths) == {1}
    assert not row.prefill and row.peak_bytes is None and len(row.decode) == len(row.generate) == 2
    assert row.cache.length == 16 and row.cache.filled == cache_bytes(one.model.config, 16, 2)
    assert len(ticks) == turns(2, prefill=False)


@pytest.mark.parametrize("name", ["shared"])
def test_a_compiled_row_is_timed_compiled(name, monkeypatch):
    settings = CompileConfig(backend="eager", mode=None, fullgraph=True)
    settings._compile_all_devices = True
    monkeypatch.setattr(speed, "compiled_step", lambda: settings)
    one = replace(subject(name), cache="compiled")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (row,) = measure_cell([one], 2, 16, new_tokens=3, rounds=1)
    assert row.error is None and len(row.generate) == len(row.decode) == 1
    assert row.cache.filled == cache_bytes(one.model.config, 16, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # by generate() and by the bare forward


def test_a_row_that_does_not_fit_or_fails_is_recorded_and_the_others_are_timed(monkeypatch):
    rows = [subject("dynamic"), subject("layer"), subject("shared")]
    small = rows[1].bytes_needed(2, 16)
    monkeypatch.setattr(speed, "free_memory", lambda device: small + 1)

    def fail(*args, **kwargs):
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(rows[2].model.lm_head, "forward", fail)
    large, fits, broken = measure_cell(rows, 2, 16, new_tokens=2, rounds=1)
    assert "GB are free" in large.error and not large.prefill
    assert broken.error == "the machine is on fire"
    assert fits.error is None and len(fits.generate) == 1


def test_an_earlier_peak_does_not_hide_a_later_one():
    device, megabyte = torch.device("cpu"), 2**20

    def hold(megabytes: int) -> int:
        return torch.ones(megabytes * megabyte // 4).numel()

    result, first = peak_during(lambda: hold(96), device)
    if first is None:
        pytest.skip("the system does not say")
    _, second = peak_during(lambda: hold(32), device)
    assert result == 96 * megabyte // 4
    assert 90 <= first / megabyte <= 110
    assert 28 <= second / megabyte <= 48


def test_weights_that_are_shared_count_once():
    tied = GPTNeoXForCausalLM(GPTNeoXConfig(**BODY, tie_word_embeddings=True))
    untied = GPTNeoXForCausalLM(GPTNeoXConfig(**BODY))
    assert weight_bytes(untied) - weight_bytes(tied) == 60 * 32 * 4
