"""Cells time what they say they time, from caches that are the same at each run."""

import pytest
import torch
from transformers import CompileConfig, GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.bench import decode as module
from context_pythia.bench import models
from context_pythia.bench.decode import filled_cache, measure_cell
from context_pythia.bench.models import Subject
from context_pythia.bench.options import BenchOptions
from context_pythia.evaluation.memory import CACHE, measure_generated_cache, peak_during, weight_bytes
from context_pythia.model.cache import cache_bytes, measure_cache

BODY = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
CONTEXTS = {
    "input": {"context_source": "input", "context_dim": 12},
    "shared": {"context_source": "shared", "context_dim": 12},
    "layer": {"context_source": "layer", "context_dim": 12},
    "layer x2": {"context_source": "layer", "context_dim": 12, "context_sharing": 2},
    "ids": {"context_source": "layer", "context_dim": 12, "cache_token_ids": True},
    "exact": {"context_source": "layer", "context_dim": 32, "num_rotary_keys": 2, "reuse_rotary_keys": True},
}


def subject(name: str, cache: str = "dynamic", **changes) -> Subject:
    torch.manual_seed(0)
    if name in CONTEXTS:
        config = ContextPythiaConfig(**BODY | CONTEXTS[name] | changes)
        return Subject(name, ContextPythiaForCausalLM(config).eval(), cache)
    return Subject(name, GPTNeoXForCausalLM(GPTNeoXConfig(**BODY)).eval(), name)


def options(**changes) -> BenchOptions:
    return BenchOptions(**{"lengths": (16,), "new_tokens": 4, "rounds": 2} | changes)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dynamic", "static", *CONTEXTS])
def test_a_filled_cache_is_like_a_real_one_and_the_same_after_every_decoding(name):
    one = subject(name)
    fresh = filled_cache(one, batch_size=3, tokens=20, length=24)

    def decode(steps: int) -> torch.Tensor:
        cache, logits = fresh(), []
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
    assert measure_cache(fresh()).filled == cache_bytes(one.model.config, 20, 3)
    assert measure_generated_cache(one.model, 20).filled == cache_bytes(one.model.config, 20)


@torch.no_grad()
def test_a_filled_cache_has_room_for_the_tokens_that_are_timed():
    one = subject("layer")
    cache = filled_cache(one, batch_size=1, tokens=20, length=24)()
    before = cache.layers[0].keys.data_ptr()
    one.model(input_ids=torch.tensor([[1]]), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.data_ptr() == before


def test_a_cell_times_the_prefill_of_all_tokens_and_the_decoding_of_the_last(monkeypatch):
    one = subject("layer")
    seen, timed = [], []
    one.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append((kwargs["input_ids"].shape[1], int(kwargs[CACHE].get_seq_length()))),
        with_kwargs=True,
    )

    def seconds_of(run, device):
        seen.clear()
        run()
        timed.append(list(seen))
        return 8.0

    monkeypatch.setattr(module, "seconds_of", seconds_of)
    (row,) = measure_cell([one], 2, 16, options(), progress=False)
    steps = [(1, 12), (1, 13), (1, 14), (1, 15)]
    assert timed == [[(16, 0)]] * 3 + [steps] * 3  # the warm-up and two rounds
    assert (row.prefill, row.generate) == ([8.0] * 2, [2.0] * 2)
    assert row.cache.length == 16 and row.cache.filled == cache_bytes(one.model.config, 16, 2)
    assert row.error is None


def test_without_prefill_no_cell_reads_its_tokens():
    one = subject("shared")
    lengths = []
    one.model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    (row,) = measure_cell([one], 2, 16, options(prefill=False), progress=False)
    assert set(lengths) == {1}
    assert not row.prefill and row.peak_bytes is None and len(row.generate) == 2
    assert row.cache.length == 16 and row.cache.filled == cache_bytes(one.model.config, 16, 2)


def test_a_compiled_row_is_timed_compiled(monkeypatch):
    settings = CompileConfig(backend="eager", mode=None, fullgraph=True)
    settings._compile_all_devices = True
    monkeypatch.setattr(models, "compiled_step", lambda: settings)
    one = subject("shared", "compiled", num_hidden_layers=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (row,) = measure_cell([one], 2, 16, options(rounds=1, prefill=False), progress=False)
    assert row.error is None and len(row.generate) == 1
    assert row.cache.filled == cache_bytes(one.model.config, 16, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_a_row_that_fails_is_recorded_and_the_others_are_timed(monkeypatch):
    rows = [subject("shared"), subject("layer")]

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory\nat line 3")

    monkeypatch.setattr(rows[0].model.lm_head, "forward", fail)
    broken, sound = measure_cell(rows, 2, 16, options(rounds=1), progress=False)
    assert broken.error == "out of memory" and not broken.prefill
    assert sound.error is None and len(sound.generate) == 1


def test_a_mistake_of_ours_ends_the_bench(monkeypatch):
    one = subject("layer")

    def fail(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(one.model.lm_head, "forward", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        measure_cell([one], 2, 16, options(), progress=False)


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
