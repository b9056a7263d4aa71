"""A document as a list of blocks, written as Markdown or as one self-contained HTML page; a table also for the console.

The report is composed once and rendered twice, so that both forms always say the same. Texts are plain: whatever
stands in them (model names, paths and errors come from users) is escaped by the renderers.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

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
    """Rows of cells under a head. The first `text_columns` columns stand left, the others, numbers, stand right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Code:
    """Lines shown as they are."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A picture that lies beside the document under the name `file`."""

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
    return (
        f'<!doctype html>\n<html lang="{escape(lang)}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


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
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word Markdown takes an underscore as it is


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
        return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"

    kind = "facts" if table.text_columns >= len(table.head) else "figures"
    rows = "\n".join(line(row, "td") for row in table.rows)
    return (
        f'<div class="scroll"><table class="{kind}">\n<thead>{line(table.head, "th")}</thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


_STYLE = """
:root { --paper: #fff; --ink: #1c2330; --faint: #5b6575; --line: #d9dee6; --tint: #f4f6f9; --accent: #0b63b5;
  --alert: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181f; --ink: #e4e8ee; --faint: #9aa5b5; --line: #323b48; --tint: #1d232d; --accent: #6cb4f5;
    --alert: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 1rem/1.6 system-ui, "Hiragino Sans", "Yu Gothic", "Noto Sans CJK JP", "Noto Sans JP", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.25; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 48rem; overflow-wrap: anywhere; }
.lead { font-size: 1.15rem; padding: .75rem 1rem; border-left: .25rem solid var(--accent); background: var(--tint); }
.note, .alert { padding: .5rem 1rem; border-left: .25rem solid var(--line); color: var(--faint); }
.alert { border-color: var(--alert); color: var(--alert); }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; }
.number { text-align: right; }
.figures th, .figures td { padding-inline: .55rem; }
.figures th { word-break: keep-all; }
.figures td.number { white-space: nowrap; }
.figures td:not(.number) { min-width: 6rem; max-width: 16rem; }
.figures th:first-child, .figures td:first-child { position: sticky; left: 0; background: var(--paper);
  overflow-wrap: anywhere; font-weight: 600; }
.facts td:first-child { color: var(--faint); min-width: 7rem; }
.facts td:last-child { overflow-wrap: anywhere; }
pre { overflow-x: auto; margin: .5rem 0 1rem; padding: .75rem 1rem; border-radius: .4rem; background: var(--tint);
  font: .8rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre code { font: inherit; }
figure { margin: 1rem 0 1.5rem; max-width: 46rem; }
img { display: block; width: 100%; height: auto; padding: .5rem; border-radius: .4rem; background: #fff; }
figcaption { margin-top: .4rem; font-size: .875rem; color: var(--faint); }
@media print { main { max-width: none; } .scroll { overflow: visible; } }
"""
