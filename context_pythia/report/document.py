"""A document as a list of blocks, written as Markdown or as one self-contained HTML page; a table also for the console.

Both forms come from the same blocks, so they always say the same. Texts are plain, and the renderers escape them,
because model names, paths and errors come from users.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from context_pythia.files import write_bytes


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
    """Lines of code."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A picture in the file `file` beside the document."""

    file: str
    caption: str


Block = Heading | Paragraph | Table | Code | Picture


def write_document(folder: Path, blocks: Iterable[Block], lang: str, pictures: Mapping[str, bytes]) -> list[Path]:
    """Write the pictures, report.md and report.html (report.ja.md, ... unless `lang` is "en"); returns their paths."""
    blocks = list(blocks)
    suffix = "" if lang == "en" else f".{lang}"
    files = dict(pictures)
    files[f"report{suffix}.md"] = to_markdown(blocks).encode()
    files[f"report{suffix}.html"] = to_html(blocks, lang, pictures).encode()
    return [write_bytes(folder / name, content) for name, content in files.items()]


def to_markdown(blocks: Sequence[Block]) -> str:
    """GitHub-flavoured Markdown; pictures are links to files in the document's own folder."""
    return "\n\n".join(_markdown_block(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], lang: str, pictures: Mapping[str, bytes]) -> str:
    """One HTML page that loads nothing: the style is inline, and `pictures` (file -> PNG) become data URIs."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    body = "\n".join(_html_block(block, pictures) for block in blocks)
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return page.substitute(lang=escape(lang), title=escape(title), body=body)


def to_console(table: Table) -> str:
    """Aligned columns, a line below the head."""
    lines = [list(table.head), *(list(row) for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    drawn = []
    for line in lines:
        cells = [
            c.ljust(w) if i < table.text_columns else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
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
        case Code(text):
            longest = max((len(run) for run in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}text\n{text}\n{fence}"
        case Picture(file, caption):
            return f"![{_markdown_text(caption)}]({file})"


def _markdown_text(text: str) -> str:
    text = re.sub(r"([\\`*\[\]<>|$~&])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word an underscore has no meaning in Markdown


def _html_block(block: Block, pictures: Mapping[str, bytes]) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text, role):
            return f'<p class="{role}">{escape(text)}</p>'
        case Table():
            return _html_table(block)
        case Code(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Picture(file, caption):
            data = base64.b64encode(pictures[file]).decode("ascii")
            return (
                f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )


def _html_table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marks = ["" if column < table.text_columns else ' class="number"' for column in range(len(cells))]
        shown = (_unbroken(c) if m and tag == "td" else escape(c) for c, m in zip(cells, marks, strict=True))
        return "<tr>" + "".join(f"<{tag}{m}>{c}</{tag}>" for c, m in zip(shown, marks, strict=True)) + "</tr>"

    kind = "facts" if table.text_columns >= len(table.head) else "figures"
    rows = "\n".join(line(row, "td") for row in table.rows)
    return (
        f'<div class="scroll"><table class="{kind}">\n<thead>{line(table.head, "th")}</thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _unbroken(figure: str) -> str:
    """Lets a figure in a narrow column break only before a bracket or after a slash, and never inside `1e-10`."""
    whole = escape(figure).replace("-", "&#8209;").replace(" ", "&nbsp;")
    return whole.replace("&nbsp;(", " (").replace("/&nbsp;", "/ ")
