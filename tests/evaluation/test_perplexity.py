"""Scores against plain formulas over all logits at once, and the two passes against each other."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from transformers import DynamicCache

from context_pythia.data.packing import PackedDataset
from context_pythia.evaluation.perplexity import equal_to_digits, score, score_cached
from context_pythia.model.cache import cache_bytes
from tests.evaluation.conftest import SOURCES, build


def everything(dataset):
    rows = [dataset[i] for i in range(len(dataset))]
    return tuple(torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))


@torch.no_grad()
def plain(model, dataset):
    """Log-probabilities [N, S, V] in one pass, and the labels [N, S]."""
    ids, labels = everything(dataset)
    return model(input_ids=ids).logits.double().log_softmax(-1), labels


def test_a_score_is_that_of_all_logits_at_once(dataset):
    model = build("layer")
    expected, labels = plain(model, dataset)
    losses = -expected.gather(-1, labels[..., None])[..., 0]
    found = score(model, dataset, 3, progress=False)
    assert found.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-6)
    assert found.accuracy == pytest.approx(float((expected.argmax(-1) == labels).double().mean()))
    assert found.losses == pytest.approx(losses.sum(1).tolist(), rel=1e-6)
    assert (found.tokens, found.kl, found.agreement) == (7 * 17, None, None)


def test_tokens_without_labels_count_in_no_figure():
    random = np.random.default_rng(0)
    tokens, labeled = random.integers(0, 61, (5, 18), dtype=np.uint16), random.random((5, 18)) < 0.4
    some, model, reference = PackedDataset(tokens, labeled), build("layer"), build("pythia", seed=1)
    (expected, labels), (wanted, _) = plain(model, some), plain(reference, some)
    expected, wanted, labels = (values[labels >= 0] for values in (expected, wanted, labels))
    same = expected.argmax(-1) == wanted.argmax(-1)
    losses = -expected.gather(-1, labels[:, None])
    for found in (
        score(model, some, 2, reference, progress=False),
        score_cached(model, some, 1000, batch_size=2, reference=reference, progress=False),
    ):
        assert found.tokens == len(labels) == labeled[:, 1:].sum()
        assert found.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-5)
        assert found.accuracy == pytest.approx(float((expected.argmax(-1) == labels).double().mean()))
        assert found.agreement == pytest.approx(float(same.double().mean()))
        assert found.kl == pytest.approx(float((wanted.exp() * (wanted - expected)).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("source", ["pythia", "layer"])
def test_perplexities_by_position_are_those_of_all_logits_in_both_passes_and_add_up(source):
    longer = PackedDataset(np.random.default_rng(0).integers(0, 61, (5, 41), dtype=np.uint16))
    model = build(source)
    expected, labels = plain(model, longer)
    losses = -expected.gather(-1, labels[..., None])[..., 0]
    bands = [slice(0, 16), slice(16, 32), slice(32, 40)]
    for found in (
        score(model, longer, 2, build("pythia", seed=1), progress=False),
        score_cached(model, longer, 1000, batch_size=2, progress=False),
    ):
        assert [(band["from"], band["to"]) for band in found.by_position] == [(0, 16), (16, 32), (32, 40)]
        assert [band["tokens"] for band in found.by_position] == [5 * 16, 5 * 16, 5 * 8]
        perplexities = [band["perplexity"] for band in found.by_position]
        assert perplexities == pytest.approx([float(losses[:, band].mean().exp()) for band in bands], rel=1e-5)
        mean = sum(band["tokens"] * math.log(band["perplexity"]) for band in found.by_position) / found.tokens
        assert mean == pytest.approx(math.log(found.perplexity), abs=1e-6)


def test_a_reference_gives_divergence_and_agreement(dataset):
    model, reference = build("layer"), build("pythia", seed=1)
    (ours, _), (theirs, _) = plain(model, dataset), plain(reference, dataset)
    found = score(model, dataset, 3, reference, progress=False)
    assert found.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-5)
    assert found.agreement == pytest.approx(float((theirs.argmax(-1) == ours.argmax(-1)).double().mean()))
    itself = score(model, dataset, 3, model, progress=False)
    assert itself.kl == pytest.approx(0, abs=1e-6) and itself.agreement == 1


def test_a_reference_of_another_vocabulary_gives_agreement_alone(dataset):
    found = score(build("layer"), dataset, reference=build("pythia", vocab_size=70), progress=False)
    assert found.kl is None and 0 <= found.agreement < 1


def test_the_first_samples_perplexity_is_that_of_scoring_them_alone(dataset):
    model = build("pythia")
    alone = score(model, Subset(dataset, range(3)), progress=False)
    assert score(model, dataset, progress=False).perplexity_of_first(3) == pytest.approx(alone.perplexity, rel=1e-6)


@pytest.mark.parametrize("source", SOURCES)
def test_token_by_token_is_the_parallel_pass(dataset, source):
    model = build(source)
    whole, through = score(model, dataset, 3, progress=False), score_cached(model, dataset, 1000, batch_size=3)
    assert through.losses == pytest.approx(whole.losses, rel=1e-4)
    assert (through.accuracy, through.tokens, through.sequences) == (whole.accuracy, whole.tokens, 3)
    assert through.measurement.length == 17
    assert through.measurement.filled == cache_bytes(model.config, 17, batch_size=3)


def test_token_by_token_takes_whole_samples_and_compares_like_the_parallel_pass(dataset):
    model, reference = build("layer"), build("pythia", seed=1)
    through = score_cached(model, dataset, 18, reference=reference, progress=False)
    whole = score(model, Subset(dataset, range(2)), reference=reference, progress=False)
    assert through.tokens == 34
    assert through.kl == pytest.approx(whole.kl, rel=1e-4) and through.agreement == whole.agreement


class Forgetful(DynamicCache):
    """Loses the values of all tokens but the new ones."""

    def update(self, keys, values, layer_idx, *args, **kwargs):
        held, own = super().update(keys, values, layer_idx, *args, **kwargs)
        own = own.clone()
        own[:, :, : own.shape[2] - values.shape[2]] = 0
        return held, own


def test_a_cache_that_forgets_shows(dataset):
    model = build("pythia")
    whole = score(model, dataset, progress=False)
    wrong = score_cached(model, dataset, 1000, lambda: Forgetful(config=model.config), progress=False)
    assert not equal_to_digits(wrong.perplexity, whole.perplexity)


def test_logits_are_held_for_a_batch_at_a_time(dataset):
    model, reference, sizes = build("layer"), build("pythia"), set()
    for one in (model, reference):
        one.register_forward_hook(lambda module, arguments, output: sizes.add(output.logits.shape[:2]))
    score(model, dataset, 3, reference, progress=False)
    assert sizes == {(3, 17), (1, 17)}
    sizes.clear()
    score_cached(model, dataset, 1000, batch_size=3, progress=False)
    assert sizes == {(3, 1), (1, 1)}


def test_weights_that_are_no_numbers_are_named(dataset):
    model = build("pythia")
    model.get_output_embeddings().weight.data[3, 3] = float("nan")
    with pytest.raises(RuntimeError, match="the validation loss is nan: the model's weights are damaged"):
        score(model, dataset, progress=False)


def test_samples_longer_than_the_positions_are_refused(dataset):
    with pytest.raises(ValueError, match="sequence_length 17: must be at most 16, the model's positions"):
        score(build("pythia", max_position_embeddings=16), dataset, progress=False)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [(78.03, 78.03, True), (78.034, 78.03, True), (78.04, 78.03, False), (1000.4, 1000, True), (1001, 1000, False)],
)
def test_equal_to_four_digits(first, second, equal):
    assert equal_to_digits(first, second) == equal == equal_to_digits(second, first)
