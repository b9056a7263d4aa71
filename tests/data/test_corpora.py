"""Every kind of corpus gives its documents in a fixed order, and says clearly what is wrong with a bad one."""

import gzip
import hashlib
import itertools
import json
import os
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from context_pythia.config.recipe import DataOptions
from context_pythia.data.corpora import corpus_digest, documents
from context_pythia.errors import UsageError, exit_code

TEXTS = ["first text\nof two lines", "zweiter Text: äöü 語", "third\u2028text"]


def read(path: Path | str, **options) -> list[str]:
    return list(documents(DataOptions(data=str(path), **options)))


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(
        json.dumps({"id": i, field: text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts)
    ).encode()


def write_parquet(path: Path, texts: list, field: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=2)


@pytest.mark.parametrize("field", ["text", "body"])
def test_jsonl_gzip_and_parquet_give_the_same_documents(field, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, field))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS, field)))
    write_parquet(tmp_path / "a.parquet", TEXTS, field)
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert read(tmp_path / name, text_field=field) == TEXTS, name


def test_blank_lines_and_blank_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + jsonl(["", " \n", "text"]) + b"  \n")
    assert read(tmp_path / "a.jsonl") == ["text"]


def test_a_folder_is_read_in_path_order_without_hidden_and_foreign_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.rst", "c.py", ".git/x.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d.jsonl").write_bytes(jsonl(TEXTS))
    assert read(tmp_path) == ["a/b/c.rst", "a/z.md", "b.txt", "c.py", *TEXTS]


def test_a_text_file_alone_is_cut_at_paragraphs_and_loses_nothing(tmp_path):
    text = "\n\n".join(f"Paragraph {i}: " + "some words " * (i % 40 + 5) for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    pieces = read(tmp_path / "a.txt")
    assert "".join(pieces) == text
    assert 80 <= len(pieces) <= 220
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])


def test_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(tmp_path / "a.txt") == ["one\ntwo\n"]


def test_builtin_is_the_standard_library_without_its_tests():
    first = list(itertools.islice(documents(DataOptions()), 3))
    assert first == list(itertools.islice(documents(DataOptions()), 3))
    texts = {hashlib.sha256(text.encode()).digest() for text in documents(DataOptions())}

    def holds(module) -> bool:
        return hashlib.sha256(Path(module.__file__).read_bytes()).digest() in texts

    assert holds(json) and holds(gzip)
    assert not holds(pytest)
    assert len(texts) > 300


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[tuple]:
    """What is asked of a Hub whose data set is in `tmp_path`."""
    asked: list[tuple] = []
    real = datasets.load_dataset

    def from_disk(name, config, **options):
        asked.append((name, config, options))
        return real(str(tmp_path), split=options["split"], streaming=True)

    monkeypatch.setattr("context_pythia.data.corpora.require_on_hub", lambda *place: asked.append(place))
    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    return asked


def test_a_hub_data_set_is_streamed_by_the_datasets_library(tmp_path, asked):
    (tmp_path / "train.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "test.jsonl").write_bytes(jsonl(["held out"]))
    assert read("owner/name@v2:config", data_split="train") == TEXTS
    options = {"split": "train", "streaming": True, "revision": "v2"}
    assert asked == [("dataset", "owner/name", "v2"), ("owner/name", "config", options)]
    assert read("owner/name", data_split="test") == ["held out"]
    with pytest.raises(ValueError, match="row 1: no field 'body'; set text_field to one of: id, text"):
        read("owner/name", text_field="body")
    with pytest.raises(ValueError, match="nosuch"):
        read("owner/name", data_split="nosuch")


NOT_FOUND = RepositoryNotFoundError("404", response=Mock())


@pytest.mark.parametrize(
    ("answer", "code", "line"),
    [
        (NOT_FOUND, 2, "there is no dataset 'owner/name', neither here nor on the Hugging Face Hub"),
        (TimeoutError("late"), 1, "no file or folder 'owner/name' here, .*late.: correct the path, or connect to"),
    ],
)
def test_a_wrong_hub_name_is_a_mistake_and_a_hub_that_fails_is_a_failure(monkeypatch, answer, code, line):
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", Mock(side_effect=answer))
    with pytest.raises(OSError, match=line) as caught:
        read("owner/name")
    assert exit_code(caught.value) == code and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "missing/", "a/b/c", "/no/such/file", "x.csv"])
def test_a_path_that_leads_nowhere_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no such file or folder: {name}"):
        read(name)


def test_a_missing_file_in_an_existing_folder_is_not_taken_for_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    with pytest.raises(FileNotFoundError, match="texts/missing"):
        read("texts/missing")


def test_text_that_is_not_utf8_is_located(tmp_path):
    # The bad byte lies behind the first chunk, and a character of three bytes straddles the boundary.
    start = ("x" * 1023 + "\n").encode() * 1023 + b"y" * 1023 + "語\n".encode()
    (tmp_path / "a.txt").write_bytes(start + b"ok \xff\n")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text at line 1025, byte 4 of the line;"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(jsonl(["fine"]) + b'{"text": "\xe4"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: not UTF-8 text at line 2, byte 11 of the line;"):
        read(tmp_path / "a.jsonl")


def test_halves_of_surrogate_pairs_become_the_replacement_character(tmp_path):
    lines = rb'{"text": "half \ud83d and more"}' + b"\n" + rb'{"text": "\udc00\ud83d\ude00\ud83d"}' + b"\n"
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read(tmp_path / name) == ["half \ufffd and more", "\ufffd\U0001f600\ufffd"]


def test_parquet_text_that_is_not_utf8_is_located(tmp_path):
    held = pyarrow.array([b"sound", b"half \xed\xa0\xbd"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, held.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet, row 2: not UTF-8 text"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"a\.jsonl, line 2: not JSON"),
        ('{"id": 1, "body": "x"}', r"a\.jsonl, line 2: no field 'text'; set text_field to one of: id, body"),
        ('{"text": 5}', r"a\.jsonl, line 2: field 'text' holds int, not text"),
        ('["x"]', r"a\.jsonl, line 2: expected an object with a field 'text', found list"),
    ],
)
def test_a_bad_jsonl_line_is_named(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.jsonl")


def test_bad_parquet_and_gzip_files_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x", None])
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: field 'text' holds NoneType"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no field 'body'; set text_field to one of: id, text"):
        read(tmp_path / "a.parquet", text_field="body")
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"b\.parquet: not a readable Parquet file"):
        read(tmp_path / "b.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS))[:-12])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: damaged gzip file"):
        read(tmp_path / "b.jsonl.gz")


def test_a_folder_or_name_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no .txt"):
        read(tmp_path)
    with pytest.raises(ValueError, match="data is empty"):
        read("")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"a\.docx: unknown kind of file"):
        read(tmp_path / "a.docx")


def test_the_digest_follows_content_and_not_the_place(tmp_path):
    def digest(name: str) -> str:
        return corpus_digest(DataOptions(data=str(tmp_path / name)))

    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "c.jsonl").write_bytes(jsonl(TEXTS[::-1]))
    assert digest("a.jsonl") == digest("b.jsonl") != digest("c.jsonl")
    before = digest(".")
    (tmp_path / "b.jsonl").write_bytes(jsonl(TEXTS) + b"\n")
    assert digest(".") != before


def test_files_are_hashed_once_a_process_until_their_date_or_size_changes(tmp_path):
    path = tmp_path / "text.txt"

    def digest(text, date):
        path.write_text(text)
        os.utime(path, (date, date))
        return corpus_digest(DataOptions(data=str(tmp_path)))

    first = digest("one", 1)
    assert digest("two", 1) == first and digest("two", 2) != first and digest("three", 1) != first
