"""Tokenizers: trained as the library trains them, whatever the length of words."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from context_pythia.data.tokenizers import END_OF_TEXT, LONGEST_WORD, train_tokenizer

ORDINARY = [
    "def cached(context):\n    return " + " ".join(f"word{i % 17}_{i % 5}" for i in range(300)),
    "=" * 79,
]


def plainly_trained(texts: list[str], vocab_size: int) -> Tokenizer:
    """By the library alone, with words of any length."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def test_ordinary_text_trains_the_very_tokenizer_of_the_library():
    trained = train_tokenizer(ORDINARY, 400, progress=False)
    assert trained.backend_tokenizer.to_str() == plainly_trained(ORDINARY, 400).to_str()


@pytest.mark.parametrize("word", ["=", "ACGTTGCAAC"])
def test_words_are_cut_for_training_alone(word):
    text = word * (16 * LONGEST_WORD // len(word))
    assert max(map(len, plainly_trained([text], 400).get_vocab())) > LONGEST_WORD
    trained = train_tokenizer([text], 400, progress=False)
    assert max(map(len, trained.get_vocab())) <= LONGEST_WORD
    assert trained.decode(trained(text)["input_ids"]) == text
