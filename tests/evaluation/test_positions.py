"""Bands of positions: which there are, and that nothing is lost or counted twice between them."""

import math

import pytest
import torch

from context_pythia.evaluation.perplexity import perplexity_by_position, position_bands


@pytest.mark.parametrize(
    ("length", "bands"),
    [
        (1, [(0, 1)]),
        (16, [(0, 16)]),
        (128, [(0, 16), (16, 32), (32, 64), (64, 96), (96, 128)]),
        (300, [(0, 16), (16, 32), (32, 64), (64, 96), (96, 128), (128, 256), (256, 300)]),
    ],
)
def test_bands_are_short_at_first_then_double_and_end_at_the_length(length, bands):
    assert position_bands(length) == bands


def test_longer_samples_have_the_bands_of_shorter_ones_and_more():
    assert position_bands(2048) == [*position_bands(512), (512, 1024), (1024, 2048)]


def test_every_position_is_in_one_band():
    for length in range(1, 300):
        assert [p for start, stop in position_bands(length) for p in range(start, stop)] == list(range(length))


def test_the_bands_weighed_by_their_tokens_are_the_total():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (200,), generator=generator)
    losses = 11 * torch.rand(200, generator=generator, dtype=torch.float64) * tokens
    bands = perplexity_by_position(losses, tokens)
    assert [(band["from"], band["to"]) for band in bands] == position_bands(200)
    assert sum(band["tokens"] for band in bands) == tokens.sum()
    total = math.fsum(band["tokens"] * math.log(band["perplexity"]) for band in bands) / int(tokens.sum())
    assert total == pytest.approx(float(losses.sum() / tokens.sum()), rel=1e-12)


def test_a_band_in_which_nothing_is_predicted_is_left_out():
    tokens = torch.ones(64)
    tokens[16:32] = 0
    assert [band["from"] for band in perplexity_by_position(tokens, tokens)] == [0, 32]
