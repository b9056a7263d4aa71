"""A document as a list of blocks, written as Markdown, as one self-contained HTML page, or for the console.

All forms come from the same blocks, so they always say the same. Texts are plain, and the renderers escape them,
because model names, paths and errors come from users.
"""

from __future__ import annotations

import base64
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

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
    language: str = "text"


@dataclass(frozen=True)
class Picture:
    """A picture in the file `file` beside the document. It holds no words of a language, so all languages share it."""

    file: str
    caption: str
    draw: Callable[[], Figure]


Block = Heading | Paragraph | Table | Code | Picture


def write_documents(folder: Path, documents: Mapping[str, Sequence[Block]]) -> list[Path]:
    """Write the blocks of each language as report.md and report.html (Japanese: report.ja.md, ...), and the pictures.

    Returns:
        the paths of the new files.
    """
    pictures: dict[str, bytes] = {}
    texts: dict[str, bytes] = {}
    for lang, blocks in documents.items():
        for block in blocks:
            if isinstance(block, Picture) and block.file not in pictures:
                pictures[block.file] = png(block.draw)
        suffix = "" if lang == "en" else f".{lang}"
        texts[f"report{suffix}.md"] = to_markdown(blocks).encode()
        texts[f"report{suffix}.html"] = to_html(blocks, lang, pictures).encode()
    return [write_bytes(folder / name, content) for name, content in (pictures | texts).items()]


def to_markdown(blocks: Sequence[Block]) -> str:
    """GitHub-flavoured Markdown; pictures are links to files in the document's own folder."""
    return "\n\n".join(_markdown_block(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], lang: str, pictures: Mapping[str, bytes]) -> str:
    """One HTML page that loads nothing: the style is inline, and `pictures` (file -> PNG) become data URIs."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    pages.filters["unbroken"] = _unbroken
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    data = {file: base64.b64encode(content).decode() for file, content in pictures.items()}
    return pages.get_template("page.html").render(lang=lang, title=title, blocks=blocks, pictures=data)


def to_console(blocks: Iterable[Block]) -> str:
    """Aligned tables and filled paragraphs, without the pictures."""
    return "\n\n".join(_console_block(block) for block in blocks if not isinstance(block, Picture))


def _console_block(block: Heading | Paragraph | Table | Code) -> str:
    if isinstance(block, Paragraph):
        return textwrap.fill(block.text, 110)
    if not isinstance(block, Table):
        return block.text
    lines = [block.head, *block.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(block.head))]
    drawn = []
    for line in lines:
        cells = [
            cell.ljust(w) if i < block.text_columns else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        drawn.append("  ".join(cells).rstrip())
    return "\n".join([drawn[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *drawn[1:]])


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_markdown_text(text)}"
        case Paragraph(text, role):
            quoted = _markdown_text(text)
            return {"plain": quoted, "lead": f"**{quoted}**"}.get(role, f"> {quoted}")
        case Table(head, rows, text_columns):
            rule = [":--" if column < text_columns else "--:" for column in range(len(head))]
            lines = [map(_markdown_text, head), rule, *(map(_markdown_text, row) for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Code(text, language):
            longest = max((len(run) for run in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}{language}\n{text}\n{fence}"
        case Picture(file, caption):
            return f"![{_markdown_text(caption)}]({file})"


def _markdown_text(text: str) -> str:
    text = re.sub(r"([\\`*\[\]<>|$~&])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word an underscore has no meaning in Markdown


def _unbroken(figure: str) -> Markup:
    """Lets a figure in a narrow column break only before a bracket or after a slash, and never inside `1e-10`."""
    whole = escape(figure).replace("-", "\u2011").replace(" ", "\xa0")
    return whole.replace("\xa0(", " (").replace("/\xa0", "/ ")
