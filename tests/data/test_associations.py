import numpy as np
import pytest
import torch

from context_pythia.config.recipe import DataOptions
from context_pythia.data.packing import load_data
from context_pythia.errors import UsageError

OPTIONS = DataOptions(data="recall", vocab_size=300, samples=40, sequence_length=50, validation_fraction=0.25)


def test_each_value_that_is_asked_for_was_told_before_and_nothing_else_has_a_label():
    data = load_data(OPTIONS)
    assert (len(data.train), len(data.validation)) == (30, 10)
    sizes = []
    for sample in (*data.train, *data.validation):
        ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
        asked = [t for t, label in enumerate(labels) if label != -100]
        told = dict(zip(ids[: asked[0] : 2], ids[1 : asked[0] : 2], strict=True))
        assert asked == list(range(2 * len(told), 50, 2)) and all(labels[t] == told[ids[t]] for t in asked)
        assert len(set(told.values())) == len(told) and max(told) < min(told.values()) < 300
        sizes.append(len(told))
    assert set(sizes[:30]) == {1, 2, 3, 4, 5, 6} and sizes[30:] == [50 // 8] * 10


def test_samples_are_the_same_at_each_call_and_new_in_each_split():
    first, second = load_data(OPTIONS), load_data(OPTIONS)
    assert np.array_equal(first.train.tokens, second.train.tokens)
    assert not np.array_equal(first.train.tokens[:10], first.validation.tokens)
    assert first.summary == second.summary
    other = DataOptions(**vars(OPTIONS) | {"sequence_length": 48})
    assert load_data(other).summary["fingerprint"] != first.summary["fingerprint"]
    assert torch.equal(first.train.stream(0, 50), first.train[0]["input_ids"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 7}, "sequence_length 7: recall takes at least 8 tokens"),
        ({"sequence_length": 2048}, "vocab_size 300: samples of 2048 tokens take at least 514"),
    ],
)
def test_samples_that_cannot_be_made_are_one_line(changed, message):
    with pytest.raises(UsageError, match=message):
        load_data(DataOptions(**vars(OPTIONS) | changed))
