"""Tokenizers: loads one by name, or trains one on the corpus in the manner of GPT-NeoX's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from context_pythia.data.corpora import hub_revision, is_hub_name, require_on_hub, whole_characters
from context_pythia.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 512  # bytes; training takes time quadratic in the length of a word, such as a line of "=" or of DNA


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of this name: a `tokenizer.json`, a folder in Hugging Face form, or a Hub name (`NAME@REVISION`
    for another revision than the main branch).

    Raises FileNotFoundError or UsageError if it is not found or has no end-of-text token.
    """
    path = Path(name).expanduser()
    if path.is_file():
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise UsageError(f"{name} is not a tokenizer.json: {error}") from error
        if backend.token_to_id(END_OF_TEXT) is None:
            raise UsageError(f"{name} has no token {END_OF_TEXT}: give a folder whose tokenizer_config.json names one")
        return _wrapped(backend)
    if not path.is_dir() and not is_hub_name(name):
        raise FileNotFoundError(f"no such tokenizer: {name!r} (give train, a tokenizer.json, a folder or a Hub name)")
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        # transformers would make up an empty tokenizer from the model's configuration.
        raise UsageError(f"tokenizer {name!r} has no tokenizer.json: choose another with --tokenizer")
    try:
        tokenizer = _auto_tokenizer(name, path)
    except Exception as error:  # as above, and any error that a broken configuration causes
        if isinstance(error, ConnectionError | FileNotFoundError | MemoryError):
            raise
        raise UsageError(f"tokenizer {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UsageError(f"tokenizer {name!r} has no tokenizer.json: choose another with --tokenizer")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"tokenizer {name!r} names no end-of-text token: set eos_token in its tokenizer_config.json")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-NeoX: it encodes any text without loss, and `<|endoftext|>` is token 0.

    Only for training, words of more than `LONGEST_WORD` bytes are cut.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_WORD}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    backend.post_processor = processors.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = words
    return _wrapped(backend)


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _auto_tokenizer(name: str, path: Path) -> Any:
    if path.is_dir():
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    name, revision = hub_revision(name)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        require_on_hub("model", name, revision)
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Token ids of a prompt, without the end-of-text token that some tokenizers append.

    Halves of surrogate pairs become U+FFFD (see `whole_characters`).
    """
    added = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    appended = added[::-1].index(0)
    ids: list[int] = tokenizer(whole_characters(prompt))["input_ids"]
    return ids[: len(ids) - appended]


def vocabulary_rows(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that the embedding needs: the highest token id plus one, since a vocabulary may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1
