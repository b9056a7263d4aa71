"""Tokenizers: trained as the library trains them, whatever the length of words, and prompts to go on from."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from context_pythia.data.tokenizers import END_OF_TEXT, LONGEST_WORD, prompt_ids, train_tokenizer, vocabulary_rows

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


@pytest.mark.parametrize(
    ("template", "start"), [("$A", 0), ("$A <|endoftext|>", 0), ("<|endoftext|> $A <|endoftext|>", 1)]
)
def test_a_prompt_keeps_its_start_and_has_no_end(template, start):
    tokenizer = train_tokenizer(ORDINARY, 300, progress=False)
    end = tokenizer.eos_token_id
    plain = tokenizer("a prompt")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(END_OF_TEXT, end)]
    )
    assert prompt_ids(tokenizer, "a prompt") == [end] * start + plain
    # An end that the prompt itself holds is the user's.
    assert prompt_ids(tokenizer, f"a prompt{END_OF_TEXT}") == [end] * start + plain + [end]
    assert prompt_ids(tokenizer, "") == [end] * start


def test_half_a_surrogate_pair_in_a_prompt_is_the_replacement_character():
    tokenizer = train_tokenizer(ORDINARY, 300, progress=False)
    assert tokenizer.decode(prompt_ids(tokenizer, "a \udc80 b")) == "a \ufffd b"
    assert vocabulary_rows(tokenizer) == 300
