"""The text: iterates over the documents of any corpus that a recipe can name.

No corpus is loaded whole: files are read in pieces, Hub data sets are streamed. A document is a file of the standard
library (`builtin`), a text file, a line of JSONL, or a row of Parquet or of a Hub data set. A single text file is cut
into about a hundred documents, because one document cannot be split into training and validation.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from context_pythia.config.recipe import DataOptions
from context_pythia.errors import UsageError, first_line

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".parquet")

_NO_CORPUS_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_FILE_SUFFIXES = (".json", ".csv", ".tsv", ".gz", ".zst", ".zip")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_READ_BYTES = 1 << 20
_LONGEST_PIECE = 1_000_000
_SHORTEST_PIECE = 200
_PIECES_OF_A_FILE = 100


def documents(options: DataOptions) -> Iterator[str]:
    """The documents of the corpus `options.data`, in a fixed order.

    Blank documents are skipped, and halves of surrogate pairs become U+FFFD.

    Raises FileNotFoundError for a path or Hub name that is not found, UsageError for text that cannot be read (the file
    and the line are named), ConnectionError when the Hub fails while a data set is read.
    """
    kind, files = _corpus(options)
    if kind == "hub":
        texts = _hub_documents(options)
    else:
        piece = _LONGEST_PIECE
        if kind == "file":
            piece = min(max(files[0].stat().st_size // _PIECES_OF_A_FILE, _SHORTEST_PIECE), _LONGEST_PIECE)
        texts = (text for file in files for text in _file_documents(file, options.text_field, piece))
    return (whole_characters(text) for text in texts if text and not text.isspace())


def _corpus(options: DataOptions) -> tuple[str, list[Path]]:
    """What the corpus is, and its files; a Hub data set has none."""
    if options.data == "builtin":
        return "builtin", _builtin_files()
    path = _local_path(options.data)
    if path is None:
        return "hub", []
    return ("folder", _files(path)) if path.is_dir() else ("file", [path])


def whole_characters(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair: JSON can write one, and tokenizers and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def corpus_digest(options: DataOptions) -> str:
    """Hex digest of the bytes that `documents` reads; for a Hub data set, of its name and split only."""
    kind, files = _corpus(options)
    if kind == "hub":
        kind = f"hub {options.data} {options.data_split}"
    stats = [file.stat() for file in files]
    return _digest(kind, tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)))


@functools.lru_cache
def _digest(kind: str, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Files of the same size and date are read once: a sweep asks again for each training."""
    digest = hashlib.blake2b(f"{kind}\n".encode(), digest_size=16)
    for file, size, _ in files:
        digest.update(f"{_suffix(file)} {size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def is_hub_name(name: str) -> bool:
    """Whether `name`, which is not a file, can be a name `[OWNER/]NAME[@REVISION]` on the Hugging Face Hub."""
    if not _HUB_NAME.fullmatch(name) or name.lower().endswith((*SUFFIXES, *_FILE_SUFFIXES)):
        return False
    return not Path(name.partition("/")[0]).exists()


def hub_revision(name: str) -> tuple[str, str | None]:
    """Name and revision (a branch, tag or commit) of `NAME@REVISION`; None is the main branch."""
    name, _, revision = name.partition("@")
    return name, revision or None


def require_on_hub(kind: str, name: str, revision: str | None = None) -> None:
    """Asks the Hub once for the `kind` ("dataset" or "model") `name`; the loaders would retry for a minute.

    Raises FileNotFoundError if the name or revision does not exist or may not be read, ConnectionError if the Hub
    cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10)
    # A gated repository raises RepositoryNotFoundError.
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" of the revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"there is no {kind} {name!r}{at}, neither here nor on the Hugging Face Hub (if it is private or gated, "
            "accept its terms there and log in with `hf auth login`)"
        ) from error
    except Exception as error:  # which HTTP library raises here changes with the version of huggingface_hub
        raise ConnectionError(
            f"there is no file or folder {name!r} here, and the Hugging Face Hub cannot be asked for a {kind} of that "
            f"name ({first_line(error)}): correct the path, or connect to the network"
        ) from error


def _hub_documents(options: DataOptions) -> Iterator[str]:
    """Streams the texts of the Hub data set `NAME[@REVISION][:CONFIGURATION]`."""
    from datasets import load_dataset
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # its errors say the same
    place, _, config = options.data.partition(":")
    name, revision = hub_revision(place)
    require_on_hub("dataset", name, revision)
    try:
        rows = load_dataset(name, config or None, split=options.data_split, streaming=True, revision=revision)
        for number, row in enumerate(rows, 1):
            yield _text_of(row, options.text_field, f"data set {name!r}, row {number}")
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"data set {name!r} cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # as in require_on_hub
        raise ConnectionError(
            f"data set {name!r} cannot be read ({first_line(error)}): check the network, or name a local file"
        ) from error


def _local_path(data: str) -> Path | None:
    """The file or folder that `data` names, None if it can only be a Hub data set."""
    if not data.strip():
        raise UsageError("data is empty: give builtin, a file, a folder or a Hub data set")
    path = Path(data).expanduser()
    if path.is_dir() or (path.is_file() and _suffix(path)):
        return path
    if path.is_file():
        raise UsageError(f"{data}: unknown kind of file, give one of {', '.join(SUFFIXES)}")
    if not is_hub_name(data.partition(":")[0]):
        raise FileNotFoundError(f"no such file or folder: {data}")
    return None


def _suffix(path: Path) -> str:
    """The entry of SUFFIXES that ends the file's name, "" if there is none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def _files(folder: Path) -> list[Path]:
    """The corpus files under `folder` in path order, without hidden ones."""
    paths = ((path.relative_to(folder), path) for path in folder.rglob("*") if _suffix(path) and path.is_file())
    files = [path for name, path in sorted(paths) if not any(part.startswith(".") for part in name.parts)]
    if not files:
        raise UsageError(f"{folder} has no {', '.join(SUFFIXES)} file: give a folder with text")
    return files


def _builtin_files() -> list[Path]:
    """The standard library's Python files in path order, without its tests.

    Files that the build of Python generates are skipped, so one Python version is the same corpus everywhere.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # Pruned in place: the walk must not enter site-packages, which can be a hundred times larger.
        subfolders[:] = [name for name in subfolders if not _no_corpus(name)]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not _no_corpus(name)]
    return sorted(found)


def _no_corpus(name: str) -> bool:
    return name in _NO_CORPUS_FOLDERS or name.startswith(("config-", "_sysconfigdata"))


def _file_documents(path: Path, text_field: str, piece: int) -> Iterator[str]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from _parquet_documents(path, text_field)
        return
    plain = suffix in TEXT_SUFFIXES
    opened: Any = gzip.open if suffix == ".jsonl.gz" else open
    try:
        # Lines of JSON end at "\n" alone; in plain text every kind of line end becomes "\n".
        with opened(path, "rt", encoding="utf-8-sig", newline=None if plain else "\n") as file:
            yield from _pieces(file, piece) if plain else _jsonl_documents(path, file, text_field)
    except UnicodeDecodeError:
        with opened(path, "rb") as lines:
            raise _not_utf8(path, lines) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: damaged gzip file ({error}), fetch or pack it again") from error


def _pieces(file: Any, longest: int) -> Iterator[str]:
    """A text file in pieces of at most `longest` characters, cut after a blank line, a line or a word if possible."""
    rest = ""
    while text := file.read(_READ_BYTES):
        rest += text
        start = 0
        while len(rest) - start > longest:
            ends = (rest.rfind(mark, start, start + longest) + len(mark) for mark in ("\n\n", "\n", " "))
            # A mark near the start would leave a piece too short to be worth a document.
            end = next((end for end in ends if end > start + longest // 4), start + longest)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield rest


def _not_utf8(path: Path, lines: Iterable[bytes]) -> UsageError:
    """The error for a file that is not UTF-8; it names the first bad byte."""
    for number, line in enumerate(lines, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            place = f"line {number}, byte {error.start + 1} of the line"
            break
    return UsageError(f"{path}: not UTF-8 text at {place}; convert the file to UTF-8")


def _jsonl_documents(path: Path, file: Iterable[str], text_field: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error})") from error
        yield _text_of(row, text_field, f"{path}, line {number}")


def _parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UsageError(_no_field(str(path), text_field, names))
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    yield _text_of({text_field: value.as_py()}, text_field, f"{path}, row {number}")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, row {number}: not UTF-8 text ({error.reason})") from error
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def _text_of(row: Any, text_field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: expected an object with a field {text_field!r}, found {type(row).__name__}")
    if text_field not in row:
        raise UsageError(_no_field(where, text_field, row))
    text = row[text_field]
    if not isinstance(text, str):
        raise UsageError(f"{where}: field {text_field!r} holds {type(text).__name__}, not text")
    return text


def _no_field(where: str, text_field: str, fields: Any) -> str:
    return f"{where}: no field {text_field!r}; set text_field to one of: {', '.join(map(str, fields)) or '(no fields)'}"
