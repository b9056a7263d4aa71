"""Turns are counted right, and the steps that are timed really train."""

from functools import partial

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.bench import training
from context_pythia.bench.timing import interleave
from context_pythia.bench.training import (
    phase2_turn,
    plain_turn,
    product_rate,
    random_data,
    step_flops,
)
from context_pythia.config.recipe import TrainOptions

BODY = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 16,
}  # fmt: skip


def baseline():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**BODY))


def test_runs_take_turns_after_a_warm_up_and_leave_them_when_they_fail():
    calls = []

    def run(name: str) -> int:
        calls.append(name)
        if name == "broken" and len(calls) > 3:
            raise RuntimeError("out of memory\nat line 3")
        return len(calls)

    rounds, results = [], {"a": [], "broken": []}
    errors = interleave(
        {name: partial(run, name) for name in results}, results, 3, progress=False, after_round=lambda: rounds.append(1)
    )
    assert calls == ["a", "broken", "a", "broken", "a", "a"]
    assert results == {"a": [3, 5, 6], "broken": []}
    assert errors == {"broken": "out of memory"} and len(rounds) == 3


@pytest.mark.parametrize("turn", [phase2_turn, plain_turn])
def test_the_timed_steps_really_train(turn):
    model = baseline()
    before = model.lm_head.weight.detach().clone()
    steps = turn(model, random_data(12, 8, 40), TrainOptions(batch_size=4, learning_rate=0.01))
    assert len(steps) == 2 and all(step["step"] > 0 for step in steps)
    assert (model.lm_head.weight - before).abs().max() > 1e-3


def test_operations_are_those_of_the_matrix_products():
    model = baseline()
    weights = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 64) + 32 * 40
    assert step_flops(model, tokens=100, length=8) == 100 * (6 * weights + 12 * 2 * 32 * 8)
    model.lm_head.requires_grad_(False)
    assert step_flops(model, tokens=1, length=8) == 6 * weights - 2 * 32 * 40 + 12 * 2 * 32 * 8


def test_the_rate_is_the_work_of_all_linear_maps_over_their_time(monkeypatch):
    monkeypatch.setattr(training, "seconds_of", lambda run, device: 0.5)
    weights = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 64) + 32 * 40
    assert product_rate(baseline(), 100, torch.float32) == 2 * 100 * weights / (0.5 * (4 * 2 + 1))
