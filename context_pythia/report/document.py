"""A document as a list of blocks, written as Markdown, as one self-contained HTML page, or for the console.

All forms come from the same blocks, so they always say the same. Texts are plain, and the templates escape them,
because model names, paths and errors come from users.
"""

from __future__ import annotations

import base64
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from context_pythia.files import write_bytes
from context_pythia.report.figures import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text. `role` is "plain", "lead" (the finding), "note" (a caveat) or "alert" (a failure)."""

    text: str
    role: str = "plain"


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head. The first `text_columns` columns align left; the others, numbers, align right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Code:
    """Lines of code or of a log."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A picture in the file `file` beside the document. It holds no words of a language, so all languages share it."""

    file: str
    caption: str
    draw: Callable[[], Figure]


Block = Heading | Paragraph | Table | Code | Picture


def write_documents(folder: Path, documents: Mapping[str, Sequence[Block]]) -> list[Path]:
    """Write the blocks of each language as report.md and report.html (Japanese: report.ja.md, ...), and the pictures.

    The page loads nothing: its style is inline, and its pictures are data URIs.

    Returns:
        the paths of the new files.
    """
    drawn = {block.file: block.draw for blocks in documents.values() for block in blocks if isinstance(block, Picture)}
    files = {name: png(draw) for name, draw in drawn.items()}
    data = {name: base64.b64encode(picture).decode() for name, picture in files.items()}
    for lang, blocks in documents.items():
        name = "report" if lang == "en" else f"report.{lang}"
        files[f"{name}.md"] = to_markdown(blocks).encode()
        files[f"{name}.html"] = rendered("page.html", blocks=blocks, lang=lang, pictures=data).encode()
    return [write_bytes(folder / name, content) for name, content in files.items()]


def to_markdown(blocks: Sequence[Block]) -> str:
    """GitHub-flavoured Markdown; pictures are links to files in the document's own folder."""
    return rendered("page.md", blocks=blocks)


def rendered(template: str, **values: Any) -> str:
    """A template of the folder `pages` with the values. In HTML `{{ }}` escapes texts, in Markdown `| text` does."""
    return _TEMPLATES.get_template(template).render(**values)


def to_console(blocks: Iterable[Block]) -> str:
    """Aligned tables and filled paragraphs, without the pictures."""
    return "\n\n".join(_console_block(block) for block in blocks if not isinstance(block, Picture))


def _console_block(block: Heading | Paragraph | Table | Code) -> str:
    if isinstance(block, Paragraph):
        return textwrap.fill(block.text, 110)
    if not isinstance(block, Table):
        return block.text
    widths = [max(map(len, column)) for column in zip(block.head, *block.rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < block.text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (block.head, *block.rows)
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def _markdown_text(text: str) -> str:
    text = re.sub(r"([\\`*\[\]<>|$~&])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word an underscore has no meaning in Markdown


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("pages")),
    autoescape=select_autoescape(["html"]),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["text"] = _markdown_text
