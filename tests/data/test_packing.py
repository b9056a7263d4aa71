"""Packing: what lies in the samples, what never crosses the split, and when the cache is trusted."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from context_pythia.config.recipe import DataOptions
from context_pythia.data import packing
from context_pythia.data.packing import PackedData, load_data
from context_pythia.data.tokenizers import load_tokenizer, train_tokenizer

WORDS = [f"{a}{b}" for a in ("bel", "cor", "dun", "fil", "gar", "hos") for b in ("a", "emi", "o", "und", "is", "y")]


def texts(count: int = 60, words: int = 60) -> list[str]:
    """Documents that each hold a word of their own, by which they are recognized in packed rows."""
    draw = random.Random(0)
    return [" ".join([f"<doc{i}>", *draw.choices(WORDS, k=words), f"<doc{i}>"]) for i in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def options(tmp_path) -> DataOptions:
    return DataOptions(
        data=str(write_jsonl(tmp_path / "corpus.jsonl", texts())),
        vocab_size=320,
        samples=100,
        sequence_length=16,
        cache_dir=str(tmp_path / "cache"),
    )


def load(options: DataOptions) -> PackedData:
    return load_data(options, progress=False)


def test_labels_are_the_inputs_shifted_by_one(options):
    train = load(options).train
    for i in (0, 7, len(train) - 1):
        sample = train[i]
        assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
        assert sample["input_ids"].shape == sample["labels"].shape == (16,)
        assert torch.equal(sample["input_ids"][1:], sample["labels"][:-1])
        assert sample["labels"][-1] == int(train.tokens[i, 16])


def test_rows_are_the_tokenized_documents_joined_by_the_end_of_text(options):
    data = load(options)
    end = data.tokenizer.eos_token_id
    for split in (data.train, data.validation):
        flat = split.tokens.reshape(-1).tolist()
        shown = [text for text in texts() if text in data.tokenizer.decode(flat)]
        expected = [token for text in shown for token in [*data.tokenizer(text)["input_ids"], end]]
        assert flat[: len(expected)] == expected
        assert len(expected) > 0.8 * len(flat)


def test_stream_is_all_inputs_one_after_another(options):
    train = load(options).train
    everything = torch.cat([train[i]["input_ids"] for i in range(len(train))])
    assert train.num_tokens == len(everything) == len(train) * train.sequence_length
    for start, stop in [(0, train.num_tokens), (0, 5), (3, 16), (15, 17), (16, 32), (100, 333), (50, 50), (40, 30)]:
        assert torch.equal(train.stream(start, stop), everything[start:stop]), (start, stop)
    assert torch.equal(train.stream(train.num_tokens - 3, train.num_tokens + 9), everything[-3:])


def test_samples_are_divided_by_the_validation_fraction(options):
    options.validation_fraction = 0.23
    data = load(options)
    assert (len(data.train), len(data.validation)) == (77, 23)
    assert data.summary["samples_train"] == 77
    assert data.summary["tokens_train"] == 77 * 16
    options.samples, options.validation_fraction = 2, 0.01
    assert (len(load(options).train), len(load(options).validation)) == (1, 1)


def test_no_document_lies_in_both_splits(options):
    data = load(options)
    train, validation = (data.tokenizer.decode(s.tokens.reshape(-1).tolist()) for s in (data.train, data.validation))
    in_train = {i for i in range(60) if f"<doc{i}>" in train}
    in_validation = {i for i in range(60) if f"<doc{i}>" in validation}
    assert in_train and in_validation
    assert not in_train & in_validation
    assert data.summary["documents_train"] >= len(in_train)
    assert data.summary["documents_validation"] >= len(in_validation)


def test_copies_of_a_document_stay_on_one_side(options, tmp_path):
    unique = texts(10)
    options.data = str(write_jsonl(tmp_path / "copies.jsonl", unique * 8))
    data = load(options)
    train, validation = (data.tokenizer.decode(s.tokens.reshape(-1).tolist()) for s in (data.train, data.validation))
    assert not any(f"<doc{i}>" in train and f"<doc{i}>" in validation for i in range(10))


def test_the_split_is_that_of_the_text_alone(options):
    sides = []
    for samples in (20, 100):
        options.samples = samples
        data = load(options)
        sides.append(data.tokenizer.decode(data.validation[0]["input_ids"]))
    assert sides[0] == sides[1]


def test_two_documents_are_enough_and_one_is_not(options, tmp_path):
    options.samples = 2
    options.data = str(write_jsonl(tmp_path / "two.jsonl", texts(2)))
    assert (len(load(options).train), len(load(options).validation)) == (1, 1)
    options.data = str(write_jsonl(tmp_path / "one.jsonl", texts(1) * 5))
    with pytest.raises(ValueError, match=r"one\.jsonl has only one distinct document; training and validation"):
        load(options)


def test_the_tokenizer_is_trained_on_the_training_split_only(options, tmp_path, monkeypatch):
    marked = [text.replace("bel", "qzx") if i % 2 else text for i, text in enumerate(texts(80))]
    options.data = str(write_jsonl(tmp_path / "marked.jsonl", marked))
    seen: list[str] = []
    real = packing.train_tokenizer

    def spy(training, vocab_size, progress):
        seen.extend(training)
        return real(seen, vocab_size, progress)

    monkeypatch.setattr(packing, "train_tokenizer", spy)
    data = load(options)
    validation = data.tokenizer.decode(data.validation.tokens.reshape(-1).tolist())
    assert seen and set(seen) < set(marked)
    assert not any(text in validation for text in seen)


def test_the_second_load_neither_tokenizes_nor_trains(options, monkeypatch):
    first = load(options)

    def never(*arguments):
        raise AssertionError("packed again")

    monkeypatch.setattr(packing, "_pack", never)
    second = load(options)
    assert second.summary == first.summary
    assert np.array_equal(second.train.tokens, first.train.tokens)
    assert not second.train.tokens.flags.writeable
    assert second.tokenizer.backend_tokenizer.to_str() == first.tokenizer.backend_tokenizer.to_str()


def test_changed_text_or_settings_change_the_fingerprint(options, tmp_path):
    def fingerprint(**changes) -> str:
        return load(DataOptions(**{**vars(options), **changes})).summary["fingerprint"]

    changed = write_jsonl(tmp_path / "changed.jsonl", [*texts(59), "another text"])
    copied = write_jsonl(tmp_path / "copied.jsonl", texts())
    found = [fingerprint(), fingerprint(data=str(changed)), fingerprint(samples=90), fingerprint(sequence_length=15)]
    found += [fingerprint(validation_fraction=0.2), fingerprint(vocab_size=300)]
    assert len(set(found)) == len(found)
    assert fingerprint(data=str(copied)) == found[0]


def test_a_tokenizer_json_a_folder_and_the_trained_one_agree(options, tmp_path):
    trained = load(options)
    trained.tokenizer.save_pretrained(tmp_path / "folder")
    for name in (tmp_path / "folder", tmp_path / "folder" / "tokenizer.json"):
        options.tokenizer = str(name)
        data = load(options)
        assert np.array_equal(data.train.tokens, trained.train.tokens)
        assert data.summary["tokenizer"] == name.name
        assert data.summary["fingerprint"] != trained.summary["fingerprint"]


def test_truncation_written_in_a_tokenizer_file_does_not_shorten_documents(options, tmp_path):
    trained = load(options)
    backend = trained.tokenizer.backend_tokenizer
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    options.tokenizer = str(tmp_path / "tokenizer.json")
    assert np.array_equal(load(options).train.tokens, trained.train.tokens)


def test_a_large_vocabulary_is_kept_in_four_bytes(options, tmp_path, monkeypatch):
    expected = load(options).train.tokens
    options.cache_dir = str(tmp_path / "other")
    monkeypatch.setattr(packing, "vocabulary_rows", lambda tokenizer: 70_001)
    tokens = load(options).train.tokens
    assert expected.dtype == np.uint16 and tokens.dtype == np.uint32 and np.array_equal(tokens, expected)


def test_damage_in_the_cache_is_mended_by_packing_again(options, tmp_path):
    first = load(options)
    expected = np.array(first.train.tokens)
    folder = tmp_path / "cache" / first.summary["fingerprint"]
    for damage in ("train.npy", "counts.json", "tokenizer/tokenizer.json"):
        content = (folder / damage).read_bytes()
        (folder / damage).write_bytes(content[: len(content) // 2])
        assert np.array_equal(load(options).train.tokens, expected), damage
        assert (folder / damage).read_bytes() == content


def test_packing_that_breaks_off_leaves_nothing_that_is_trusted(options, tmp_path, monkeypatch):
    real = packing._encode

    def breaks(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "_encode", breaks)
    with pytest.raises(KeyboardInterrupt):
        load(options)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(packing, "_encode", real)
    assert len(load(options).train) == 90


def test_a_second_writer_takes_what_the_first_published(options, tmp_path, monkeypatch):
    real = packing._pack

    def overtaken(*arguments):
        monkeypatch.setattr(packing, "_pack", real)
        load(options)
        real(*arguments)

    monkeypatch.setattr(packing, "_pack", overtaken)
    data = load(options)
    assert len(data.train) == 90
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [data.summary["fingerprint"]]


def test_text_that_changes_under_packing_is_not_cached(options, tmp_path, monkeypatch):
    real = packing._pack

    def edited(*arguments):
        real(*arguments)
        write_jsonl(Path(options.data), texts(61))

    monkeypatch.setattr(packing, "_pack", edited)
    with pytest.raises(RuntimeError, match="changed while it was read"):
        load(options)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_default_cache_is_the_users(options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    options.cache_dir = None
    fingerprint = load(options).summary["fingerprint"]
    assert (tmp_path / "xdg" / "context-pythia" / fingerprint / "train.npy").is_file()


def test_a_corpus_that_is_too_short_says_what_it_gives_and_that_much_works(options):
    options.samples = 5000
    with pytest.raises(ValueError, match=r"corpus\.jsonl is too short for samples=5000: it gives \d+ samples") as e:
        load(options)
    options.samples = int(str(e.value).split("it gives ")[1].split()[0])
    trained = int(str(e.value).split(", ")[1].split()[0])
    assert trained == load(options).train.num_tokens
    assert len(load(options).train) + len(load(options).validation) == options.samples > 100
    options.samples += 1
    with pytest.raises(ValueError, match=f"it gives {options.samples - 1} samples"):
        load(options)


def test_a_corpus_that_is_too_short_can_give_what_it_has_as_if_that_was_asked_for(options, monkeypatch):
    with pytest.raises(ValueError, match="too short") as e:
        load(replace(options, samples=5000))
    monkeypatch.setattr(packing, "_pack", None)  # that call has packed what there is
    short = load_data(replace(options, samples=5000), progress=False, all_samples=False)
    monkeypatch.undo()
    asked = load(replace(options, samples=short.samples))
    assert f"it gives {short.samples} samples" in str(e.value)
    for split in ("train", "validation"):
        assert np.array_equal(getattr(short, split).tokens, getattr(asked, split).tokens)
    assert short.tokenizer.get_vocab() == asked.tokenizer.get_vocab()
    assert short.summary | {"fingerprint": ""} == asked.summary | {"fingerprint": ""}


def test_an_empty_corpus_is_refused(options, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    options.data = str(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"empty\.txt has no text"):
        load(options)


def test_tokenizers_that_cannot_be_used_are_named(options, tmp_path, monkeypatch):
    def message(name: str, error: type[Exception]) -> str:
        with pytest.raises(error) as e:
            load_tokenizer(name)
        assert "\n" not in str(e.value)
        return str(e.value)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    backend = json.loads(train_tokenizer(texts(), 300, progress=False).backend_tokenizer.to_str())
    backend["added_tokens"][0]["content"] = "<end>"
    backend["model"]["vocab"]["<end>"] = backend["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "endless.json").write_text(json.dumps(backend))
    assert "bad.json is not a tokenizer.json" in message(str(tmp_path / "bad.json"), ValueError)
    assert "no token <|endoftext|>" in message(str(tmp_path / "endless.json"), ValueError)
    assert "has no tokenizer.json" in message(str(tmp_path / "empty"), ValueError)
    assert "missing/tokenizer.json" in message("missing/tokenizer.json", FileNotFoundError)
    assert "no file or folder 'owner/tokenizer'" in message("owner/tokenizer", ConnectionError)
