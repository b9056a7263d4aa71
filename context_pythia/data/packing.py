"""From text to samples: tokenizer, split, and packed rows of tokens in a memory-mapped cache.

A corpus is read once, as a stream. Its head (about 8 million characters) stays in memory to choose the split and to
train the tokenizer. After that, documents are tokenized batch by batch into memory maps, until both splits are full.
The name of the cache folder is a fingerprint of text, tokenizer and settings; the folder appears whole or not at all.
If the text ends before the splits are full, the folder has as many samples as the text gives.

Split: a document belongs to validation if the hash of its text is small. The split thus depends only on the text, and
copies of a document are all on the same side.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from context_pythia.config.recipe import DataOptions
from context_pythia.data import associations
from context_pythia.data.corpora import corpus_digest, documents
from context_pythia.data.tokenizers import load_tokenizer, train_tokenizer, vocabulary_rows
from context_pythia.errors import Failure, UsageError
from context_pythia.files import write_json

COUNTS = ("documents_train", "documents_validation")
_FORMAT = 1
_HEAD_CHARACTERS = 1 << 23
_BATCH_CHARACTERS = 1 << 18


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Samples over `tokens` [N, S+1], a read-only memory map: row i gives S inputs and the tokens that follow them.

    Args:
        labeled: booleans of the same shape: the tokens that have labels. All of them by default.
    """

    def __init__(self, tokens: np.ndarray, labeled: np.ndarray | None = None):
        self.tokens = tokens
        self.labeled = labeled
        self.sequence_length = tokens.shape[1] - 1
        self.num_tokens = len(tokens) * self.sequence_length

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` [S] and `labels` [S], int64. The labels are shifted already: the target of each input token, or
        -100 for none."""
        row = torch.from_numpy(self.tokens[index].astype(np.int64))
        labels = row[1:]
        if self.labeled is not None:
            labels = labels.masked_fill(~torch.from_numpy(self.labeled[index, 1:]), -100)
        return {"input_ids": row[:-1], "labels": labels}

    def stream(self, start: int, stop: int) -> Tensor:
        """Input tokens start:stop [stop-start] of the concatenation of all samples [N*S]."""
        start, stop, _ = slice(start, stop).indices(self.num_tokens)
        first, last = start // self.sequence_length, -(-stop // self.sequence_length)
        inputs = self.tokens[first:last, :-1].astype(np.int64).reshape(-1)
        offset = first * self.sequence_length
        return torch.from_numpy(inputs[start - offset : max(start, stop) - offset])


@dataclass
class PackedData:
    """Both splits, their tokenizer, and the facts that a report shows."""

    train: PackedDataset
    validation: PackedDataset
    tokenizer: PreTrainedTokenizerFast
    summary: dict[str, Any]

    @property
    def samples(self) -> int:
        return len(self.train) + len(self.validation)


def load_data(options: DataOptions, progress: bool = True, all_samples: bool = True) -> PackedData:
    """Packs the corpus of `options`, or opens the result of an earlier call with the same text and settings.

    Raises UsageError or FileNotFoundError for unusable options, text or tokenizers, and for a corpus shorter than
    `samples`; ConnectionError when the Hub fails while a data set is read.

    Args:
        all_samples: without it, a shorter corpus gives as many samples as it has.
    """
    if options.data == associations.NAME:
        return _associations(options)
    tokenizer = None if options.tokenizer == "train" else load_tokenizer(options.tokenizer)
    root = Path(options.cache_dir).expanduser() if options.cache_dir else _default_cache()
    digest = corpus_digest(options)
    folder = root / _fingerprint(options, digest, tokenizer)
    packed = _open(folder, options, tokenizer)
    if packed is None:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".packing-", dir=root) as temporary:
            partial = Path(temporary, "packed")
            _pack(options, tokenizer, partial, progress)
            if corpus_digest(options) != digest:
                raise Failure(f"{options.data} changed while it was read: run again when it is complete")
            if _open(folder, options, tokenizer) is None:
                shutil.rmtree(folder, ignore_errors=True)  # damaged
            try:
                os.replace(partial, folder)
            except OSError:
                if not folder.exists():  # else another process has packed the same meanwhile
                    raise
        packed = _open(folder, options, tokenizer)
        assert packed is not None, f"{folder} cannot be read back"
    if all_samples and packed.samples < options.samples:
        raise UsageError(_too_short(options, packed.samples))
    return packed


def _associations(options: DataOptions) -> PackedData:
    length, splits = options.sequence_length, options.split_sizes(options.samples)
    train, validation = (
        PackedDataset(*associations.associations(rows, length, options.vocab_size, seed, mixed=seed == 0))
        for seed, rows in enumerate(splits)
    )
    tokenizer, fingerprint = associations.tokenizer_of_numbers(options.vocab_size), associations.fingerprint(options)
    counts = dict(zip(COUNTS, splits, strict=True))
    return PackedData(
        train, validation, tokenizer, _summary(options, counts, "numbers", options.vocab_size, fingerprint)
    )


def _fingerprint(options: DataOptions, digest: str, tokenizer: PreTrainedTokenizerFast | None) -> str:
    key = {
        "format": _FORMAT,
        "text": digest,
        "text_field": options.text_field,
        "tokenizer": options.vocab_size
        if tokenizer is None
        else [hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(), tokenizer.eos_token_id],
        "samples": options.samples,
        "sequence_length": options.sequence_length,
        "validation_fraction": options.validation_fraction,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "context-pythia"


def _name(data: str) -> str:
    """The name of a corpus or tokenizer in reports: local ones without this machine's folders."""
    path = Path(data).expanduser()
    return path.resolve().name if path.exists() and data not in ("builtin", "train") else data


def _open(folder: Path, options: DataOptions, tokenizer: PreTrainedTokenizerFast | None) -> PackedData | None:
    """The contents of a cache folder, which has the tokenizer if none is given; None if it is missing or damaged."""
    try:
        counts = json.loads((folder / "counts.json").read_text())
        counts = {key: int(counts[key]) for key in COUNTS}
        train, validation = (
            PackedDataset(np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False))
            for split in ("train", "validation")
        )
        if tokenizer is None:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    samples = len(train) + len(validation)
    shapes = [(rows, options.sequence_length + 1) for rows in options.split_sizes(samples)]
    if samples > options.samples or [train.tokens.shape, validation.tokens.shape] != shapes:
        return None
    options = replace(options, samples=samples)
    rows = vocabulary_rows(tokenizer)
    return PackedData(
        train, validation, tokenizer, _summary(options, counts, _name(options.tokenizer), rows, folder.name)
    )


def _summary(
    options: DataOptions, counts: dict[str, int], tokenizer: str, vocab_size: int, fingerprint: str
) -> dict[str, Any]:
    train, validation = options.split_sizes(options.samples)
    return {
        "source": _name(options.data),
        **counts,
        "samples_train": train,
        "samples_validation": validation,
        "sequence_length": options.sequence_length,
        "tokens_train": train * options.sequence_length,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "fingerprint": fingerprint,
    }


class _Rows:
    """One split while it fills: `used` tokens of `documents` documents are written."""

    def __init__(self, path: Path, shape: tuple[int, int], dtype: np.dtype):
        self.tokens = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).reshape(-1)
        self.used = self.documents = 0

    @property
    def room(self) -> int:
        return len(self.tokens) - self.used

    def add(self, tokens: list[int], end: int) -> int:
        """Writes a document and its end token as far as there is room; returns the number of tokens written."""
        row = [*tokens, end][: self.room]
        self.tokens[self.used : self.used + len(row)] = row
        self.used += len(row)
        self.documents += bool(row)
        return len(row)


def _pack(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None, folder: Path, progress: bool) -> None:
    """Writes the cache folder: a memory map for each split, counts.json, and the tokenizer if this call trains it.

    Raises UsageError if the corpus has no two samples.
    """
    given = tokenizer
    stream = documents(options)
    head, threshold = _split(stream, options)
    folder.mkdir()
    if tokenizer is None:
        texts = (text for text in head if _hash(text) > threshold)
        tokenizer = train_tokenizer(texts, options.vocab_size, progress)
        tokenizer.save_pretrained(folder / "tokenizer")
    dtype = np.dtype("<u2" if vocabulary_rows(tokenizer) <= 1 << 16 else "<u4")
    width = options.sequence_length + 1
    train, validation = (
        _Rows(folder / f"{name}.npy", (rows, width), dtype)
        for name, rows in zip(("train", "validation"), options.split_sizes(options.samples), strict=True)
    )
    assigned = ((train if _hash(text) > threshold else validation, text) for text in itertools.chain(head, stream))
    no_bar = None if progress else True  # None: no bar in a log
    with tqdm(total=options.samples * width, desc="packing", unit="tok", unit_scale=True, disable=no_bar) as bar:
        for batch in _batches((rows, text) for rows, text in assigned if rows.room):
            for (rows, _), tokens in zip(batch, _encode(tokenizer, [text for _, text in batch]), strict=True):
                bar.update(rows.add(tokens, tokenizer.eos_token_id))
            if not train.room and not validation.room:
                break
    if train.room or validation.room:
        # Again, with as many samples as the text gives: the same as for a user who asks for that many.
        most = _most_samples(options, train.used // width, validation.used // width)
        if not most:
            raise UsageError(_too_short(options, 0))
        shutil.rmtree(folder)
        return _pack(replace(options, samples=most), given, folder, progress)
    write_json(folder / "counts.json", dict(zip(COUNTS, (train.documents, validation.documents), strict=True)))


def _split(stream: Iterator[str], options: DataOptions) -> tuple[list[str], int]:
    """The head of the corpus, and the threshold: documents with a hash up to it are for validation.

    In order of their hashes, the head's documents up to the threshold have `validation_fraction` of its characters. So
    a small corpus gets its share too, and each split has at least one document. Raises UsageError without two different
    documents.
    """
    head: list[str] = []
    lengths: dict[int, int] = {}
    characters = 0
    for text in stream:
        head.append(text)
        characters += len(text)
        lengths[_hash(text)] = lengths.get(_hash(text), 0) + len(text)
        if characters >= _HEAD_CHARACTERS and len(lengths) > 1:
            break
    if len(lengths) < 2:
        found = "only one distinct document" if lengths else "no text"
        raise UsageError(f"{options.data} has {found}; training and validation need a document each: give more text")
    hashes = sorted(lengths)
    reached = itertools.accumulate(lengths[key] for key in hashes)
    last = next(i for i, length in enumerate(reached) if length >= options.validation_fraction * characters)
    return head, hashes[min(last, len(hashes) - 2)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _batches(pairs: Iterable[tuple[_Rows, str]]) -> Iterator[list[tuple[_Rows, str]]]:
    batch: list[tuple[_Rows, str]] = []
    characters = 0
    for rows, text in pairs:
        batch.append((rows, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of whole texts, without the truncation, padding or start tokens of the tokenizer's file."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _most_samples(options: DataOptions, train: int, validation: int) -> int:
    """The most samples, fewer than `options.samples`, whose splits have at most so many; 0 if none."""

    def fits(samples: int) -> bool:
        rows = options.split_sizes(samples)
        return rows[0] <= train and rows[1] <= validation

    return next((samples for samples in range(options.samples - 1, 1, -1) if fits(samples)), 0)


def _too_short(options: DataOptions, most: int) -> str:
    mend = f"set samples to at most {most}, or " if most else ""
    return (
        f"{options.data} is too short for samples={options.samples}: it gives {most} samples of "
        f"{options.sequence_length} tokens at validation_fraction={options.validation_fraction}, "
        f"{options.split_sizes(most)[0] * options.sequence_length if most else 0} training tokens; "
        f"{mend}give more text or a shorter sequence_length"
    )
