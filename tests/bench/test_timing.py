"""The parts of a training step add up to it, in turns that are counted right."""

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.bench.timing import (
    PARTS,
    Stopwatch,
    Turns,
    product_rate,
    product_shapes,
    step_flops,
    train_as_phase2,
    train_plainly,
)
from context_pythia.config.recipe import TrainOptions
from context_pythia.data.packing import PackedData, PackedDataset

BODY = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 16,
}  # fmt: skip


def baseline():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**BODY))


def data(samples: int) -> PackedData:
    tokens = np.random.default_rng(0).integers(40, size=(samples, 9), dtype=np.int32)
    return PackedData(PackedDataset(tokens), PackedDataset(tokens[:1]), None, {})


def turns(*sizes: int):
    """Turns of so many steps, and the list that they are handed to."""
    waiting, handed = iter([*sizes, 0]), []
    return Turns(Stopwatch(torch.device("cpu")), lambda: next(waiting), handed.append), handed


@pytest.mark.parametrize("source", [None, "shared", "layer"])
def test_phase_2_is_timed_by_part_and_really_trains(source, tmp_path):
    model = baseline()
    if source is not None:
        model = ContextPythiaForCausalLM(ContextPythiaConfig(**BODY, context_source=source, context_dim=16))
    before = model.lm_head.weight.detach().clone()
    options = TrainOptions(batch_size=2, gradient_accumulation=2, learning_rate=0.01)
    taken, handed = turns(1, 2)
    train_as_phase2(model, data(4 * 6), options, taken, tmp_path)
    assert [len(turn) for turn in handed] == [1, 2]
    for step in (step for turn in handed for step in turn):
        assert set(step) == {"step", *PARTS}
        assert sum(step[part] for part in PARTS) == pytest.approx(step["step"])
        assert min(step[part] for part in ("body", "head_and_loss", "backward", "optimizer")) > 0
        assert (step["context_block"] > 0) == (source == "shared")
        assert step["rest"] > -1e-6
    assert (model.lm_head.weight - before).abs().max() > 1e-3
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_the_plain_loop_is_timed_by_the_same_parts():
    model = baseline()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    taken, handed = turns(2, 2)
    train_plainly(model, data(8), TrainOptions(batch_size=4, learning_rate=0.01), taken)
    assert [len(turn) for turn in handed] == [2, 2]
    assert all(set(step) == {"step", *PARTS} for turn in handed for step in turn)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_operations_are_those_of_the_matrix_products():
    model = baseline()
    weights = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 64) + 32 * 40
    assert step_flops(model, tokens=100, length=8) == 100 * (6 * weights + 12 * 2 * 32 * 8)
    forward = sum(
        2 * rows * inner * columns * count for rows, inner, columns, count in product_shapes(model.config, 100)
    )
    assert forward == 100 * 2 * weights
    model.lm_head.requires_grad_(False)
    assert step_flops(model, tokens=1, length=8) == 6 * weights - 2 * 32 * 40 + 12 * 2 * 32 * 8


def test_the_rate_is_work_over_time():
    rate = product_rate([(64, 64, 64, 2)], torch.float32, torch.device("cpu"))
    assert 1e6 < rate < 1e14
